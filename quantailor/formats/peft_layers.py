"""peft's own LoRA on packed layers: `get_peft_model` works on a quantized model, adapters are peft's standard files.

    config = with_packed_layers(LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    tuned = get_peft_model(model.model, config)

The base stays packed; the adapter stands beside the rounding (QLoRA). peft keeps the mapping from layers to adapters
in the config object and not in its files, so loading takes the same call: `PeftModel.from_pretrained(model, folder,
config=with_packed_layers(LoraConfig.from_pretrained(folder)))`; without it peft says that it does not know the layer.
Merging rounds a second time, and warns by how much; nn/lora.py is the adapter that merges exactly.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.nn.packed import PackedWeight, QuantLinear
from quantailor.nn.recompute import runs


class LoraQuantLinear(nn.Module, LoraLayer):
    """peft's layer around a `QuantLinear`: y = base(x) + scaling * B(A(dropout(x)))."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **others: Any) -> None:
        for name, off in (("use_dora", False), ("lora_bias", False)):
            if getattr(config, name, off) != off:
                raise UsageError(f"{name}={getattr(config, name)!r} has no meaning on packed integers; leave it out")
        if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
            raise UsageError(
                f"init_lora_weights={config.init_lora_weights!r} looks into the weight, which is packed; use True, or "
                'quantailor\'s own LoRA(init="loftq")'
            )
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self._unmerged: PackedWeight | None = None
        self.update_layer(adapter_name, others.pop("r"), lora_alpha=others.pop("lora_alpha"), config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        """peft guesses by type, and warns of one that it does not know."""
        return (module.in_features, module.out_features) if isinstance(module, QuantLinear) else (None, None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                a: Any = self.lora_A[name]
                cast = x if torch.is_autocast_enabled(x.device.type) else x.to(a.weight.dtype)
                y = y + (self.lora_B[name](a(self.lora_dropout[name](cast))) * self.scaling[name]).to(y.dtype)
        return y

    def get_delta_weight(self, name: str, rows: slice = slice(None)) -> Tensor:
        """[O, N]: what the adapter adds to the weight, or some rows of it."""
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        delta: Tensor = (b.weight[rows] @ a.weight) * self.scaling[name]
        return delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Round base plus adapters onto the base's grid. Warns by how much that changes what was learned."""
        wanted = adapter_names or self.active_adapters
        names = [n for n in wanted if n in self.lora_A and n not in self.merged_adapters]
        if not names:
            return
        layer: Any = self.base_layer
        base: PackedWeight = layer.packed
        new = PackedWeight(base.spec, base.out_features, base.in_features, base.scales().device)
        parts = runs(base.out_features, base.in_features, base.scales().device)
        new.fill(
            torch.cat([base.encode(base.dequantize(p) + self._delta(names, p), p).to(torch.int16) for p in parts]),
            base,
            base.scales(),
        )
        lost = sum(
            float((new.dequantize(p) - base.dequantize(p) - self._delta(names, p)).square().sum()) for p in parts
        )
        if moved := sum(float(self._delta(names, p).square().sum()) for p in parts):
            warnings.warn(
                f"merged onto a grid of {base.spec.grid}: off by {(lost / moved) ** 0.5:.0%} of what the adapter had "
                "changed; quantailor's own adapters (train(lora=...)) merge exactly",
                stacklevel=2,
            )
        self._unmerged = self._unmerged or base
        layer.packed = new
        self.merged_adapters.extend(names)

    def _delta(self, names: list[str], rows: slice) -> Tensor:
        return torch.stack([self.get_delta_weight(name, rows) for name in names]).sum(0)

    def unmerge(self) -> None:
        """Put the base's integers back."""
        if self._unmerged is not None:
            layer: Any = self.base_layer
            layer.packed, self._unmerged = self._unmerged, None
            self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def with_packed_layers(config: LoraConfig) -> LoraConfig:
    """`config` itself, which from now on knows packed linear layers."""
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config
