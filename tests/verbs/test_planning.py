import json
import subprocess
import sys

import pytest

from quantailor.errors import UntrustedInput, UsageError
from quantailor.verbs.planning import data_size, plan
from tests.cost.configs import folder, machine

WAYS = ["ptq", "hybrid", "qat", "lora-qat", "progressive", "scratch"]
BASES = {"counted", "measured", "table", "assumed"}


def figures(value, path=""):
    """Every figure in a document."""
    if isinstance(value, dict):
        if {"value", "low", "high"} <= value.keys():
            yield path, value
        for name, item in value.items():
            yield from figures(item, f"{path}.{name}")


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "moe"])
def test_a_plan_of_every_kind_has_every_way(tmp_path, kind):
    found = plan(folder(tmp_path, kind), "w4a16-g32", data=5000, hardware="2xA100", price=2.0)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))

    assert list(document["ways"]) == WAYS
    for path, figure in figures(document):
        assert figure["low"] <= figure["value"] <= figure["high"] and figure["basis"] in BASES, path
    assert document["hardware"]["price_per_hour"] == {
        "value": 2.0, "low": 2.0, "high": 2.0, "basis": "table", "source": "the price you gave",
    }  # fmt: skip
    assert all(way["seconds"]["basis"] == "assumed" for way in document["ways"].values())
    assert found.command.startswith("quantailor ")


def test_every_amount_is_hours_times_price(tmp_path):
    path = folder(tmp_path, "llama")
    for count, price in ((1, 3.0), (8, 0.5)):
        found = plan(path, "w8a8", data=1000, hardware=f"{count}xH100", price=price)
        for way in found.ways.values():
            assert way.hours.value == pytest.approx(way.seconds.value * count / 3600)
            assert way.money.value == pytest.approx(way.hours.value * price)
            assert way.money.low <= way.money.value <= way.money.high


def test_on_this_machine_it_rests_on_the_probe_and_costs_nothing_unless_priced(tmp_path):
    path = folder(tmp_path, "llama")
    free = plan(path, "w4a16-g32", data=1000, machine=machine())
    assert free.step.basis == "measured" and free.ways["qat"].peak.basis == "measured"
    assert free.ways["qat"].money.value == 0 and free.target.price.basis == "assumed"
    assert plan(path, "w4a16-g32", data=1000, machine=machine(), price=1.0).ways["qat"].money.value > 0


def test_steps_follow_epochs_and_the_data(tmp_path):
    path = folder(tmp_path, "llama")
    found = plan(path, "w4a16-g32", data=1000, epochs_wanted=2, batch_size=8, accumulate=5, hardware="T4")
    assert found.ways["qat"].steps == 50 and found.epochs == pytest.approx(2.0)
    assert found.ways["hybrid"].steps == 12 and found.ways["progressive"].steps == 100  # 8 bits, then 4
    deep = plan(path, "w2a16-g32", data=1000, epochs_wanted=2, batch_size=8, accumulate=5, hardware="T4")
    assert deep.ways["progressive"].steps == 150
    weights = found.num_parameters
    assert found.ways["scratch"].steps == -(-20 * weights // (40 * 256))
    with pytest.raises(UsageError, match="epochs"):
        plan(path, "w4a16-g32", epochs_wanted=2, hardware="T4")


def test_accumulation_costs_time_and_not_activations(tmp_path):
    path = folder(tmp_path, "llama")
    one = plan(path, "w4a16-g32", machine=machine(), batch_size=8, data=100)
    four = plan(path, "w4a16-g32", machine=machine(), batch_size=8, accumulate=4, data=100)
    assert 3 < four.step.value / one.step.value < 4
    assert four.ways["qat"].memory.activations <= one.ways["qat"].memory.activations


def test_the_decision_knows_the_plan(tmp_path):
    path = folder(tmp_path, "llama")
    assert plan(path, "w8a8", data=5000, hardware="A100").decision.way == "ptq"
    deep = plan(path, "w2a16-g32", data=5000, hardware="A100")
    assert deep.decision.way == "qat" and "--scheme w2a16" in deep.command
    poor = plan(path, "w2a16-g32", data=5000, hardware="A100", budget=0.0)
    assert poor.decision.leaf == "no money" and "budget" in poor.why_not("qat")
    scratch = plan(path, "w8a8", data=5000, hardware="A100", pretrained=False)
    assert scratch.decision.way == "scratch" and scratch.checklist[0].level == "warning"


def test_no_kernel_is_said_before_anything_runs(tmp_path):
    path = folder(tmp_path, "llama")
    asked = plan(path, "w2a16-g32", data=100, hardware="A100", must_be_faster=True, monthly_cost=100.0, speedup=2.0)
    assert asked.decision.leaf == "no kernel" and asked.roi["monthly_saving"] == 0
    warned = plan(path, "w2a16-g32", data=100, hardware="A100")
    assert warned.decision.warnings and all(k.kernel != "native" for k in warned.kernels)


def test_pay_back_and_budget(tmp_path):
    found = plan(
        folder(tmp_path, "bert"), "w8a8", data=5000, hardware="A100", monthly_cost=1000.0, speedup=4.0, budget=500.0
    )
    assert found.roi["monthly_saving"] == 750 and found.roi["speedup"]["basis"] == "assumed"
    assert "qat" not in found.budget_split and sum(found.budget_split.values()) == pytest.approx(500, abs=0.05)
    with pytest.raises(UsageError, match="both"):
        plan(folder(tmp_path, "bert"), "w8a8", hardware="A100", monthly_cost=1.0)


def test_a_mobilenet_has_no_adapters_and_images_for_data(tmp_path):
    found = plan(folder(tmp_path, "mobilenet"), "w8a8", data=10_000, batch_size=4, hardware="V100", pretrained=False)
    assert "lora-qat" not in found.ways and found.ways["scratch"].steps == 300 * 10_000 // 4
    assert found.settings["context"] == 32


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "float"}, {"tolerance": 1.0}, {"budget": -1.0}, {"budget": float("nan")}, {"context": 0},
        {"batch_size": 0}, {"accumulate": 0}, {"samples": 0}, {"rank": 0}, {"probe": "often"}, {"data": 0},
        {"hardware": "abacus"}, {"price": -1.0}, {"epochs_wanted": 0.0, "data": 5}, {"scheme": "w9a9"},
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(tmp_path, options):
    given = {"scheme": "w4a16-g32", "hardware": "A100", **options}
    with pytest.raises(UsageError) as caught:
        plan(folder(tmp_path, "llama"), given.pop("scheme"), **given)
    assert len(str(caught.value).splitlines()) == 1


def test_data_is_counted_without_being_read_for_meaning(tmp_path):
    jsonl, text, table = (tmp_path / f"data.{end}" for end in ("jsonl", "txt", "csv"))
    jsonl.write_text('{"a": 1}\n\n{"a": 2}\n')
    table.write_text("a,b\n1,2\n3,4\n")
    text.write_text("x" * 8192)
    assert data_size(jsonl, 256).rows == 2 and data_size(jsonl, 256).basis == "counted"
    assert data_size(table, 256).rows == 2
    assert data_size(text, 256).rows == 8 and data_size(text, 256).basis == "assumed"
    with pytest.raises(UntrustedInput, match="no file"):
        data_size(tmp_path / "none.txt", 256)


BIG = """
import json, re, sys, time
from quantailor.verbs.planning import plan
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1e6
begin = time.process_time()
found = plan(sys.argv[1], "w4a16-g128", data=50000, hardware="8xH100", context=2048)
print(json.dumps([time.process_time() - begin, peak(), found.num_parameters, found.storage.total]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_70b_is_planned_in_seconds_and_little_memory(tmp_path):
    """What it takes of memory; the seconds (5 asked) are of a machine, and no test's matter: bench/plan_accuracy.py."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "big")  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", BIG, tmp_path / "big"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    seconds, gigabytes, parameters, size = json.loads(ran.stdout.splitlines()[-1])
    assert parameters == 70_553_706_496 and 38e9 < size < 41e9
    assert seconds > 0 and gigabytes < 1
