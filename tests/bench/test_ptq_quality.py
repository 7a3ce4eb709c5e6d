"""The parts of the comparison that need no rival: what is replaced, what is run again, how it is summed up."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("ptq_quality", ROOT / "bench" / "ptq_quality.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ptq_quality"] = module
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def result(ratio, kl=0.1, **more):
    judged = {"ratio": ratio, "kl": kl, "top1_agreement": 0.9}
    rest = {"seconds": 1.0, "peak_rss_mib": 5.0, "load": [1.0], "versions": {}, "settings": {}, "notes": []}
    return {"judged": judged, **rest, **more}


def test_the_interval_is_students(bench):
    low, high = bench.interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0)
    assert high - 2.0 == pytest.approx(4.303 / 3**0.5)  # standard deviation 1, three values
    assert bench.interval([1.0]) is None


@pytest.mark.parametrize("group_size", [3, 4, 32])
def test_levels_are_counted_in_each_group(bench, group_size):
    weight = torch.tensor([[0.0, 1.0, 1.0, 2.0, 5.0, 5.0, 5.0], [0.0] * 7])
    slow = max(
        len(set(row[start : start + group_size])) for row in weight.tolist() for start in range(0, 7, group_size)
    )
    assert bench.most_levels([weight[1:], weight], group_size) == slow


def test_the_verdict_pairs_our_draws_with_the_rivals(bench):
    rows = {
        "ours:gptq": bench.summary([result(1.02, kl=0.3), result(1.04, kl=0.3)]),
        "ours:rtn": bench.summary([result(1.10, kl=0.2)]),
        "a": bench.summary([result(1.03), result(1.08)]),
        "b": bench.summary([{"error": "no CUDA"}]),
        "c": bench.summary([result(1.20, kl=0.05)]),
    }
    final = bench.verdict(rows)
    by_perplexity, by_kl = final["perplexity"], final["kl"]
    assert (by_perplexity["ours"], by_perplexity["best_rival"]) == ("ours:gptq", "a")
    assert by_perplexity["of_the_rivals"] == pytest.approx((1.02 / 1.03 + 1.04 / 1.08) / 2)
    assert by_perplexity["best_rival_value"] == pytest.approx(1.055)
    assert (by_kl["ours"], by_kl["best_rival"], by_kl["of_the_rivals"]) == ("ours:rtn", "c", pytest.approx(4.0))
    assert "could not run: no CUDA" in bench.printed(rows, final).splitlines()[-3]
    del rows["ours:gptq"], rows["ours:rtn"]
    assert bench.verdict(rows) is None


def test_a_data_free_rival_is_paired_with_every_draw(bench):
    rows = {"ours:x": bench.summary([result(1.1), result(1.3)]), "hqq": bench.summary([result(1.2)])}
    assert bench.verdict(rows)["perplexity"]["of_the_rivals"] == pytest.approx((1.1 + 1.3) / 2 / 1.2)


def options(tmp_path, **more):
    given = {"cache": tmp_path, "only": [], "again": [], "since": 10.0, "seconds": False, "venvs": tmp_path, **more}
    return argparse.Namespace(threads=1, timeout=5, **given)


def test_what_the_cache_has_is_not_run_again_unless_asked(bench, tmp_path, monkeypatch):
    case = bench.Case(bench.Entry("ours", "gptq"), "stories260k", 4, 32, 0)
    runs = []

    def run(self, case):
        runs.append(case)
        return result(1.5, seconds=float(len(runs)), started=10.0 + len(runs))

    monkeypatch.setattr(bench.Bench, "_run", run)
    assert bench.Bench(options(tmp_path, only=["hqq"])).measure(case) is None
    assert bench.Bench(options(tmp_path)).measure(case)["seconds"] == 1.0
    assert bench.Bench(options(tmp_path)).measure(case)["seconds"] == 1.0
    again = bench.Bench(options(tmp_path, again=["ours:*"], since=11.5))
    assert again.measure(case)["seconds"] == 2.0
    assert again.measure(case)["seconds"] == 2.0  # newer than this call: once is enough
    assert len(runs) == 2
    kept = json.loads(case.file(tmp_path).read_text())
    assert [earlier["seconds"] for earlier in kept["earlier"]] == [1.0]


def test_only_the_seconds_are_taken_once_more(bench, tmp_path, monkeypatch):
    case = bench.Case(bench.Entry("hqq"), "stories260k", 4, 32, 0)
    outcomes = [result(1.5, seconds=9.0, started=0), result(99.0, seconds=2.0, started=20)]
    monkeypatch.setattr(bench.Bench, "_run", lambda self, case: outcomes.pop(0))
    bench.Bench(options(tmp_path)).measure(case)
    found = bench.Bench(options(tmp_path, again=["hqq"], seconds=True)).measure(case)
    assert (found["judged"]["ratio"], found["seconds"]) == (1.5, 2.0)


def test_files_differ_by_what_is_measured(bench, tmp_path):
    entry = bench.Entry("ours", "gptq")
    cases = [bench.Case(entry, "stories260k", bits, 32, draw) for bits in (3, 4) for draw in (0, 1)]
    cases += [bench.Case(entry, "stories260k", 4, 32, 0, layers) for layers in (("a",), ("a", "b"))]
    cases += [bench.Case(bench.Entry("ours", "rtn"), "stories260k", 4, 32, 0)]
    assert len({case.file(tmp_path) for case in cases}) == len(cases)


def test_a_rival_without_its_environment_is_an_error_in_the_table(bench, tmp_path):
    case = bench.Case(bench.Entry("hqq"), "stories260k", 4, 32, 0)
    found = bench.Bench(options(tmp_path)).measure(case)
    assert "no virtual environment" in found["error"] and "README" in found["error"]


def test_just_the_given_weights_are_replaced_and_put_back(bench, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = {}

    class FakeJudge:
        float = argparse.Namespace(model=model)

        def __call__(self, judged):
            seen.update({name: p.detach().clone() for name, p in judged.named_parameters()})
            return {"ratio": 1.0}

    work = bench.Bench(options(tmp_path))
    work.judges["m"] = FakeJudge()
    new = torch.tensor([[0.0, 1.0, 0.0, 2.0]]).repeat(3, 1)
    save_file({"0.weight": new}, tmp_path / "w.safetensors")
    assert work._judge("m", tmp_path / "w.safetensors", ["0"], 4) == {"ratio": 1.0, "levels": 3}
    assert torch.equal(seen["0.weight"], new)
    assert torch.equal(seen["1.weight"], before["1.weight"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    save_file({"0.weight": new.T.contiguous()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"0.weight came back as \[4, 3\]"):
        work._judge("m", tmp_path / "w.safetensors", ["0"], 4)


def test_coverage_is_told_apart(bench):
    every = [f"{i}.{kind}" for i in range(3) for kind in ("q", "k", "up")]
    some = [name for name in every if not name.endswith("up")]
    assert bench.coverage(every, every) == "all layers"
    assert bench.coverage(some, every) == "without up"
    assert bench.coverage([n for n in every if n[-1] == "q"], every) == "without k, up"
    parts = {bench.coverage([n for n in every if n != left], every) for left in ("0.up", "1.up")}
    assert len(parts) == 2 and all(p.startswith("without up in part") for p in parts)
