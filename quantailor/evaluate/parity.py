"""Is what was trained what is served? The same integers, layer by layer, and the same outputs.

`digests` names what a model's layers hold, simulated or packed alike, so two can be compared without both in memory;
`compare` runs both on the same tokens and finds the first layer whose output differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.evaluate.measuring import measuring
from quantailor.models.prepare import PACKED, SIMULATED
from quantailor.models.structure import logits_of, modules_of
from quantailor.nn.int_forward import float_products
from quantailor.nn.lora import LoRALinear
from quantailor.nn.points import POINTS
from quantailor.numerics.measures import relative_max_difference

Digests = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Parity:
    """`differing`: layers with an unequal integer, scale or zero point, each with what differs.

    `max_logit_difference` is relative to the largest logit; `per_layer` the same a layer output, in running order;
    `top1_equal`: the likeliest class or token is the same everywhere; `points`: how many inside blocks were compared.
    """

    layers: int
    integers: int
    differing: dict[str, str]
    max_logit_difference: float
    top1_equal: bool
    per_layer: dict[str, float]
    tolerance: float
    points: int = 0

    @property
    def equal(self) -> bool:
        return not self.differing and self.max_logit_difference <= self.tolerance and self.top1_equal

    def to_json(self) -> dict[str, Any]:
        worst = max(self.per_layer.items(), key=lambda item: item[1], default=(None, 0.0))
        return {
            "equal": self.equal,
            "layers": self.layers,
            "max_logit_difference": self.max_logit_difference,
            "differing": [{"layer": name, "what": what} for name, what in self.differing.items()],
            "integers_compared": self.integers,
            **({"points": self.points} if self.points else {}),
            "top1_equal": self.top1_equal,
            "tolerance": self.tolerance,
            "worst_layer": {"layer": worst[0], "output_difference": worst[1]},
        }


def digests(model: nn.Module) -> Digests:
    """sha256 of each quantized layer's integers, scales, zero points and static activation scales; of each point inside
    a block its spec and static scale."""
    layers = {name: {part: _sha(t) for part, t in _parts(module).items()} for name, module in _layers(model)}
    return layers | {name: _point(module) for name, module in modules_of(model, POINTS)}


def _point(module: Any) -> dict[str, str]:
    return {"spec": str(module.point)} | ({} if module.spec.dynamic else {"scale": _sha(module.scale)})


def num_integers(model: nn.Module) -> int:
    """How many weights are held as integers."""
    return sum(_parts(module)["integers"].numel() for _, module in _layers(model))


def differing(expected: Digests, found: Digests) -> dict[str, str]:
    """Layer -> what differs, for every layer whose digests are not the same."""
    result = {}
    for name in (*expected, *(n for n in found if n not in expected)):
        mine, theirs = expected.get(name), found.get(name)
        if mine is None or theirs is None:
            result[name] = "is quantized in only one of the two"
        elif parts := [part for part in {**mine, **theirs} if mine.get(part) != theirs.get(part)]:
            result[name] = ", ".join(parts)
    return result


def compare(
    simulated: nn.Module, packed: nn.Module, inputs: dict[str, Tensor], expected: Digests | None = None
) -> Parity:
    """Run both on `inputs` and hold them against each other.

    `expected`: digests of the simulated model taken when it was packed; by default those of `simulated`.
    Tolerance: 1e-5 where only weights are quantized, 1e-3 where activations are too (METHODS, A10).
    """
    found = digests(packed)
    with _outputs(simulated) as left, float_products():  # so that no kernel is held against itself
        logits = _logits(simulated, inputs)
    with _outputs(packed) as right:
        packed_logits = _logits(packed, inputs)
    per_layer = {name: relative_max_difference(right[name], left[name]) for name in left if name in right}
    layers, points = list(_layers(packed)), list(modules_of(packed, POINTS))
    activations = bool(points) or any(m.scheme.input is not None or m.scheme.output is not None for _, m in layers)
    return Parity(
        layers=len(layers),
        integers=num_integers(packed),
        differing=differing(expected if expected is not None else digests(simulated), found),
        max_logit_difference=relative_max_difference(packed_logits, logits),
        top1_equal=bool((packed_logits.argmax(-1) == logits.argmax(-1)).all()),
        per_layer=per_layer,
        tolerance=1e-3 if activations else 1e-5,
        points=len(points),
    )


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Quantized layers under every name they have, so that tied ones count as the inventory does."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SIMULATED + PACKED):
            yield name, module


def _parts(module: Any) -> dict[str, Tensor]:
    if isinstance(module, LoRALinear):
        module = module.merged()
    if isinstance(module, PACKED):
        store = module.packed
        zero_point = store.zero_points()
        parts = {"integers": store.integers(), "scales": store.scales()}
        activations = {n: getattr(module, n) for n in ("input_scale", "output_scale") if hasattr(module, n)}
    else:
        quantizer = module.weight_quantizer
        zero_point = quantizer.zero_point.squeeze(-1) if quantizer.is_asymmetric else 0
        parts = {"integers": quantizer.integers(module.weight_ON), "scales": quantizer.scale.squeeze(-1)}
        pairs = (("input_scale", module.input_quantizer), ("output_scale", module.output_quantizer))
        activations = {n: q.scale for n, q in pairs if q is not None and not q.spec.dynamic}
    if isinstance(zero_point, Tensor):
        parts["zero points"] = zero_point
    return parts | {name.replace("_", " "): scale for name, scale in activations.items()}


def _sha(tensor: Tensor) -> str:
    plain = tensor.detach().to(torch.float32 if tensor.is_floating_point() else torch.int16).cpu().contiguous()
    return hashlib.sha256(repr(tuple(plain.shape)).encode() + plain.numpy().tobytes()).hexdigest()


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with measuring(model) as device:
        result = model(**{name: value.to(device) for name, value in inputs.items()})
    return logits_of(result).float()


@contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    kept: dict[str, Tensor] = {}
    handles = []
    for name, module in modules_of(model, SIMULATED + PACKED + POINTS):
        handles.append(
            module.register_forward_hook(lambda _m, _a, out, name=name: kept.__setitem__(name, out.detach().float()))
        )
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
