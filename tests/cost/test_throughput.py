import json
from collections import Counter

import pytest

from quantailor.cost import throughput
from quantailor.cost.probe import Probe, Sample
from quantailor.cost.throughput import Machine, at, cache_file, fitted, measured
from quantailor.cost.trace import Op
from tests.cost.configs import machine


def test_between_probed_sizes_on_a_line_and_beyond_them_in_proportion():
    line = [(100, 1.0), (10_000, 10.0)]
    assert at(line, 1000) == pytest.approx(10**0.5)
    assert at(line, 100) == pytest.approx(1.0) and at(line, 10_000) == pytest.approx(10.0)
    assert at(line, 1_000_000) == 1000.0
    assert at(line, 50) == 1.0 and at(line, 10) == pytest.approx(0.1)


def test_seconds_are_calls_and_work():
    ops = Counter({Op("mm", "float32", 10**9, 0): 2, Op("mul", "float32", 0, 10**9): 3, Op("view", "none", 0, 0): 5})
    assert machine().seconds(ops) == pytest.approx(5.0)
    assert machine(call=0.1, factor=2.0).seconds(ops) == pytest.approx(2 * 5 + 10 * 0.1)
    figure = machine().figure(ops)
    assert figure.basis == "measured" and figure.low < figure.value < figure.high and "made-up" in figure.source


@pytest.fixture
def quick_probe(monkeypatch, tmp_path):
    """A probe of a moment, and a cache of its own. Returns how often it ran."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("quantailor.cost.probe._SHAPES", ((32, 32, 32), (64, 64, 64)))
    monkeypatch.setattr("quantailor.cost.probe._SIZES", (2**12, 2**14))
    monkeypatch.setattr("quantailor.cost.probe._SHORT", 1e-5)
    monkeypatch.setattr(throughput, "_ROUNDS", 1)
    runs = []
    real = Probe.round
    monkeypatch.setattr(Probe, "round", lambda self: (runs.append(1), real(self)))
    return runs


def test_a_probe_meets_the_steps_it_was_set_right_by(quick_probe):
    probe = Probe()
    probe.round()
    found = fitted(probe)
    steps = probe.step_medians()
    ratios = [found.seconds(throughput._small(name)) / steps[name] for name in ("small", "middle")]
    assert ratios[0] * ratios[1] == pytest.approx(1, rel=0.2)  # the factor is between the two
    assert found.call > 0 and found.flops_per_second() > 1e6 and found.bytes_per_second() > 1e6


def test_the_probe_is_kept_and_redone_on_demand(quick_probe):
    assert not throughput.is_known()
    first = measured()
    assert throughput.is_known() and len(quick_probe) == 1
    again = measured()
    assert again.table == first.table and again.call == first.call and len(quick_probe) == 1
    measured(again=True)
    assert len(quick_probe) == 2


@pytest.mark.parametrize("damage", ["", "{}", '{"table": [["mm", "float32", 1, -1]]}', "[1]", "null"])
def test_a_damaged_cache_is_made_anew(quick_probe, damage):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(damage)
    measured()
    assert len(quick_probe) == 1 and json.loads(cache_file().read_text())["table"]


def test_a_machine_survives_json():
    one = machine(call=1e-6, factor=1.5)
    assert Machine.from_json(json.loads(json.dumps(one.to_json()))) == one
    with pytest.raises(ValueError):
        Machine.from_json({**one.to_json(), "factor": float("nan")})


def test_another_number_of_threads_is_another_machine(monkeypatch):
    before = cache_file()
    monkeypatch.setattr(throughput, "environment", lambda: {"threads": "64"})
    assert cache_file() != before


def test_spread_is_of_the_steps():
    probe = Probe(steps={"a": [1.0, 1.0, 1.0, 1.0]})
    assert probe.spread() == 0
    probe.steps["a"] = [0.8, 0.9, 1.0, 1.1, 1.2]
    assert 0.05 < probe.spread() < 0.2 and Probe().spread() == 0
    assert Sample("mm", "float32", 1) == Sample("mm", "float32", 1)
