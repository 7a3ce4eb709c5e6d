"""What bench/gpu.py says without a GPU, and how it sums up."""

import json
import sys

import pytest
import torch

from tests.bench.loaded import loaded


@pytest.fixture(scope="module")
def bench():
    return loaded("gpu")


def test_without_a_gpu_one_line_and_status_2(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    told = capsys.readouterr()
    assert stopped.value.code == 2 and told.out == ""
    assert told.err == "bench/gpu.py measures nothing here: torch sees no CUDA device\n"
    assert not list(tmp_path.iterdir())


def test_a_ratio_is_taken_round_by_round(bench):
    row = bench.compared({"plain": [2.0, 4.0, 9.0], "mine": [1.0, 4.0, 3.0]}, "mine", "plain", asked=2.0)
    assert row["speedup"] == {"median": 2.0, "min": 1.0, "max": 3.0} and row["met"]
    assert not bench.compared({"plain": [1.0], "mine": [1.1]}, "mine", "plain", asked=1.0)["met"]
    assert json.dumps(row)


def test_contestants_take_turns(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "seconds", lambda run, calls: run() or 1.0)
    found = bench.in_turn({name: lambda name=name: seen.append(name) for name in "ab"}, rounds=2)
    assert "".join(seen[4:]) == "baabba" and {n: len(v) for n, v in found.items()} == {"a": 2, "b": 2}


def test_every_contestant_runs(bench, monkeypatch, capsys):
    """On a CPU, in small: all but the recording of a graph is the code that a GPU gets."""
    small = {"DEVICE": "cpu", "WIDE": 64, "GROUP": 32, "ROWS": (8, 24), "TOKENS": (16, 32), "no_gpu": lambda: ""}
    alike = {"as_graph": lambda run: run, "seconds": lambda run, calls: run() is None or 1.0}
    for name, value in (small | alike).items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rounds", "1"])
    bench.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = {f"step, {tokens} tokens{how}" for tokens in (16, 32) for how in ("", ", as a CUDA graph")}
    for name in ("int8, 8 rows", "int8, 24 rows", "decode"):
        measured |= {name, f"{name}, launched one by one"}
    assert set(document["results"]) | set(document["not_measured"]) == measured
    assert document["results"]["step, 32 tokens"]["met"] and not document["results"]["int8, 8 rows"]["met"]
    assert all(set(row["ms"]) >= {"bf16"} for row in document["results"].values())
