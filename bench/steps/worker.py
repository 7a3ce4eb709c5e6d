"""One contestant of bench/qat_step.py: builds the model, trains some steps, prints what they took. One JSON line.

Runs in the environment of the tool it measures, so it imports nothing of quantailor unless it is ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SHAPES = {"bert": (32, 128), "llama": (4, 256), "tiny": (4, 32)}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """Seeded random weights of a real shape: right for time and memory, silent about accuracy. No dropout."""
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
            num_key_value_heads=12, vocab_size=32000, use_cache=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).to(dtype)
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = transformers.BertConfig(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **(small if name == "tiny" else {})
    )
    return transformers.BertModel(config, add_pooling_layer=False).to(dtype)


def layers_of(model: nn.Module) -> nn.Module:
    """The stack of blocks: what is quantized and what is compiled. Embeddings and head stay as they are."""
    return model.encoder if hasattr(model, "encoder") else model.model.layers


def ours(scheme: str, backward: torch.dtype) -> Callable[[nn.Module, dict[str, Tensor]], None]:
    def apply(model: nn.Module, batch: dict[str, Tensor]) -> None:
        from quantailor.models.prepare import prepare
        from quantailor.nn.int_forward import set_backward
        from quantailor.nn.weight_quantizer import WeightQuantizer
        from quantailor.observers.weights import weight_scale
        from quantailor.recipe import Recipe
        from quantailor.spec import Scheme

        prepare(model, Recipe(Scheme.parse(scheme), (), "rtn"))  # embeddings and heads stay float by default
        for module in model.modules():
            quantizer = getattr(module, "weight_quantizer", None)
            if isinstance(quantizer, WeightQuantizer):
                quantizer.set_scale(*weight_scale(module.weight_ON.detach(), quantizer.spec))
        set_backward(model, backward)

    return apply


def torchao_qat(weight: str) -> Callable[[nn.Module, dict[str, Tensor]], None]:
    def apply(model: nn.Module, batch: dict[str, Tensor]) -> None:
        from torchao.quantization import quantize_
        from torchao.quantization.granularity import PerAxis, PerToken
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        activation = IntxFakeQuantizeConfig(torch.int8, PerToken(), is_symmetric=False)  # all it has per token
        weights = (
            IntxFakeQuantizeConfig(torch.int8, PerAxis(0), is_symmetric=True)
            if weight == "w8"
            else IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
        )
        config = QATConfig(
            activation_config=None if weight == "w4" else activation, weight_config=weights, step="prepare"
        )
        quantize_(layers_of(model), config)

    return apply


def torch_ao(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """torch.ao's eager QAT: fused moving-average fake quantization, a scale a channel of the weight."""
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import get_default_qat_qconfig

    qconfig = get_default_qat_qconfig("x86")

    class WithInput(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            linear.qconfig = qconfig
            self.input, self.linear = qconfig.activation(), Linear.from_float(linear)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.input(x))

    _replace(layers_of(model), WithInput)


def brevitas(model: nn.Module, batch: dict[str, Tensor]) -> None:
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    def make(linear: nn.Linear) -> nn.Module:
        new = QuantLinear(
            linear.in_features, linear.out_features, bias=linear.bias is not None,
            weight_quant=Int8WeightPerChannelFloat, input_quant=Int8ActPerTensorFloat,
        )  # fmt: skip
        new.weight = linear.weight
        if linear.bias is not None:
            new.bias = linear.bias
        return new

    _replace(layers_of(model), make)


def _replace(root: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child))


Change = Callable[[nn.Module, dict[str, Tensor]], None]
F32, BF16 = torch.float32, torch.bfloat16
# name -> (what is done to the model, autocast, compiled, package whose version is told)
CONTESTANTS: dict[str, tuple[Change | None, bool, bool, str]] = {
    "plain": (None, False, False, "torch"),
    "plain, compiled": (None, False, True, "torch"),
    "plain, bf16": (None, True, False, "torch"),
    "plain, bf16 compiled": (None, True, True, "torch"),
    "ours w8a8": (ours("w8a8", BF16), False, False, "torch"),
    "ours w8a8, fp32 backward": (ours("w8a8", F32), False, False, "torch"),
    "ours w8a8, compiled": (ours("w8a8", BF16), False, True, "torch"),
    "ours w8a8, bf16": (ours("w8a8", BF16), True, False, "torch"),
    "ours w8a8, bf16 compiled": (ours("w8a8", BF16), True, True, "torch"),
    "ours w4a8-g32": (ours("w4a8-g32", BF16), False, False, "torch"),
    "ours w4a16-g32": (ours("w4a16-g32", F32), False, False, "torch"),
    "ours w4a16-g32, compiled": (ours("w4a16-g32", F32), False, True, "torch"),
    "ours w4a16-g32, bf16": (ours("w4a16-g32", F32), True, False, "torch"),
    "torchao w8a8": (torchao_qat("w8"), False, False, "torchao"),
    "torchao w8a8, compiled": (torchao_qat("w8"), False, True, "torchao"),
    "torchao w8a8, bf16": (torchao_qat("w8"), True, False, "torchao"),
    "torchao w8a8, bf16 compiled": (torchao_qat("w8"), True, True, "torchao"),
    "torchao w4a16-g32": (torchao_qat("w4"), False, False, "torchao"),
    "torchao w4a16-g32, compiled": (torchao_qat("w4"), False, True, "torchao"),
    "torch.ao w8a8 static": (torch_ao, False, False, "torch"),
    "brevitas w8a8 static": (brevitas, False, False, "brevitas"),
}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


class Stepper:
    """One training step, its parts timed. `kept`: bytes autograd holds for backward, parameters not counted."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], autocast: bool, device: str) -> None:
        self.model, self.batch, self.autocast, self.device = model, batch, autocast, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def loss(self) -> Tensor:
        with torch.autocast(self.device, BF16) if self.autocast else contextlib.nullcontext():
            output = self.model(**self.batch)
            return output.loss if getattr(output, "loss", None) is not None else output[0].float().square().mean()

    def __call__(self) -> dict[str, float]:
        start = self._now()
        loss = self.loss()
        forward = self._now()
        loss.backward()
        backward = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = self._now()
        return {
            "step": end - start,
            "forward": forward - start,
            "backward": backward - forward,
            "update": end - backward,
        }

    def kept(self) -> int:
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.loss()
        return sum(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    options = parser.parse_args()
    change, autocast, compiled, package = CONTESTANTS[options.contestant]
    model = build(options.model, torch.float32)
    rows, length = SHAPES[options.model]
    batch = {"input_ids": torch.randint(1, 1000, (rows, length), generator=torch.Generator().manual_seed(1))}
    if options.model == "llama":
        batch["labels"] = batch["input_ids"]
    before = resident("VmRSS") - sum(p.numel() * p.element_size() for p in model.parameters())
    if change is not None:
        change(model, batch)
    model.to(options.device).train()
    batch = {name: value.to(options.device) for name, value in batch.items()}
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # nothing may fall back to eager unseen
        for block in layers_of(model).modules():
            if type(block).__name__ in ("BertLayer", "LlamaDecoderLayer"):
                block.compile()
    stepper = Stepper(model, batch, autocast, options.device)
    for _ in range(3 if compiled else 1):
        stepper()
    if options.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            stepper()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=35, max_name_column_width=60))
        return
    times = [stepper() for _ in range(options.steps)]
    result: dict[str, Any] = {
        "contestant": options.contestant,
        "times": times,
        "peak_bytes": resident("VmHWM") - before,
        "kept_bytes": None if compiled else stepper.kept(),
        "loss": float(stepper.loss().detach()),
        "versions": {name: metadata.version(name) for name in {"torch", "transformers", package}},
        "threads": torch.get_num_threads(),
    }
    if options.device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    if options.contestant.startswith("ours"):
        from quantailor.kernels.native import library

        result["native"] = library.why_not() or ("tiles" if library.has_tiles() else "passes only")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
