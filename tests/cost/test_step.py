"""The traced step against one that is run on real tensors, block by block and all blocks at once."""

import pytest
import torch

from quantailor.cost.memory import of_training
from quantailor.cost.skeleton import on_meta, skeleton
from quantailor.cost.step import Batch, trace_step
from quantailor.cost.trace import Tracer
from quantailor.qat.losses import kl_to_teacher
from quantailor.recipe import Recipe
from quantailor.spec import Scheme
from tests.cost.configs import CONFIGS, folder


def schemes_of(found, scheme):
    return Recipe(Scheme.parse(scheme)).assign(found.model).quantized if scheme else {}


def step_of(tmp_path, kind, scheme="w4a16-g32", batch=Batch(3, 16), lora=None, teacher=True, **options):
    found = skeleton(folder(tmp_path, kind, **options))
    distance = kl_to_teacher if teacher else None
    return trace_step(found, schemes_of(found, scheme), batch, distance=distance, lora=lora)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "moe"])
def test_two_traces_of_few_blocks_give_what_many_blocks_have(tmp_path, kind, monkeypatch):
    quick = step_of(tmp_path, kind, layers=9)
    monkeypatch.setattr("quantailor.cost.step._BASE", 9)
    whole = step_of(tmp_path, kind, layers=9)

    assert quick.num_blocks == whole.num_blocks == 9
    assert quick.flops == whole.flops and quick.ops == whole.ops and quick.update_ops == whole.update_ops
    assert quick.weight_bytes == whole.weight_bytes and quick.quantizer_bytes == whole.quantizer_bytes
    assert quick.saved_bytes == whole.saved_bytes
    assert quick.dynamic_peak == pytest.approx(whole.dynamic_peak, rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_float_step_is_that_of_real_tensors(tmp_path, kind):
    """No weights are needed for it to be the same operators with the same flops, and the same peak."""
    step = step_of(tmp_path, kind, scheme=None, teacher=False)
    config = CONFIGS[kind]()
    found = skeleton(tmp_path / kind)
    with torch.device("cpu"):
        model = type(found.model)._from_config(config).train()
    ids = torch.zeros(3, 16, dtype=torch.int64)
    tracer = Tracer()
    tracer.own((*model.parameters(), *model.buffers(), ids))
    with tracer, tracer.phase("all"):
        logits = model(input_ids=ids, **({"use_cache": False} if kind == "llama" else {})).logits
        if kind == "llama":
            index = torch.zeros(3 * 15, dtype=torch.int64)
            logits = logits[:, :-1][index, index]
        torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64)).backward()

    assert tracer.trace.flops == step.flops
    early = max(peak for phase, peak in step.peaks.items() if phase != "update")
    assert tracer.trace.peaks["all"] == pytest.approx(early, rel=0.02)


def test_the_parts_of_a_step_by_hand(tmp_path):
    step = step_of(tmp_path, "llama")
    found = skeleton(tmp_path / "llama")
    weights = 4 * sum(p.numel() for p in found.model.parameters())
    scales = sum(rows * n // 32 for rows, n in [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)])
    assert step.num_parameters == weights // 4
    assert step.gradient_bytes == weights + 2 * 4 * scales  # the logarithms of scales train as well
    assert step.optimizer_bytes == 2 * step.gradient_bytes
    assert step.quantizer_bytes == 3 * 2 * 4 * scales  # log_scale, base_scale, zero_point
    assert step.teacher_bytes == step.weight_bytes >= weights


def test_a_tied_head_is_one_weight(tmp_path):
    tied, loose = step_of(tmp_path, "llama", tie=True), step_of(tmp_path, "llama")
    assert loose.num_parameters - tied.num_parameters == 200 * 64


def test_adapters_train_alone(tmp_path):
    full, adapted = step_of(tmp_path, "llama"), step_of(tmp_path, "llama", lora=4)
    per_block = sum(4 * (a + b) for a, b in [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)])
    assert adapted.trainable == 2 * per_block
    assert adapted.optimizer_bytes < full.optimizer_bytes / 4 and adapted.num_blocks == 2


def test_memory_adds_up_and_accumulation_keeps_gradients(tmp_path):
    step = step_of(tmp_path, "llama", batch=Batch(4, 64))
    once, twice = of_training(step), of_training(step, accumulate=2)
    assert once.peak.value == sum(size for _, size in once)
    assert once.phase == "loss" and once.gradients == 0
    assert twice.gradients == step.gradient_bytes
    assert twice.peak.value - once.peak.value == pytest.approx(step.gradient_bytes, rel=0.05)
    assert once.peak.low < once.peak.value < once.peak.high and once.peak.basis == "measured"


def test_memory_of_gpus_is_shared_and_said_to_be_assumed(tmp_path):
    memory = of_training(step_of(tmp_path, "llama"), copies=2)
    eighth = memory.on_gpus(8, rows=8)
    assert eighth.weights == -(-memory.weights // 8) and eighth.cache == 0 and eighth.peak.basis == "assumed"
    assert memory.on_gpus(8, rows=2).activations == -(-memory.activations // 2)


def test_outlier_columns_are_traced_as_plain_ones_and_said_so(tmp_path):
    step = step_of(tmp_path, "llama", scheme="w8a8-outliers")
    assert any("outlier" in note for note in step.notes)
    assert step.flops == step_of(tmp_path, "llama", scheme="w8a8").flops


def test_experts_are_traced_evenly_and_said_so(tmp_path):
    assert any("experts" in note for note in step_of(tmp_path, "moe").notes)


def test_nothing_of_the_kernels_stays_switched(tmp_path):
    from quantailor.kernels import operators
    from quantailor.kernels.native import library

    pointer = library.pointer
    step_of(tmp_path, "llama", scheme="w8a8")
    assert operators.torch is torch and library.pointer is pointer


def test_a_convolutional_model(tmp_path):
    found = skeleton(folder(tmp_path, "mobilenet"))
    step = trace_step(found, schemes_of(found, "w8a8"), Batch(2, 32), distance=kl_to_teacher)
    assert step.flops > 1e6 and step.dynamic_peak > 0
    assert isinstance(on_meta(found.config, "image", torch.float32), torch.nn.Module)
