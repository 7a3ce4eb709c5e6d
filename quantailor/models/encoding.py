"""BERT-like blocks with 8-bit weights and inputs, kept in integers from product to product while a model serves.

    q, k, v = products of the integers of h, made once       -> softmax attention in float
    h1      = LayerNorm(h + out(context)), and its integers   one pass
    m       = integers of f(up(h1))                           behind the product, at once where the next scale is fixed
    h       = LayerNorm(h1 + down(m)), and its integers for the next block

Same integers and the same order of operations as the block's own forward, but for the last bits of softmax, norm and
activation function, which decide where a value lies between two integers. Whole rows are worked on some at a time, so
that what lies between two products stays in the cache. Products are those of kernels/panels.py, which apply f and the
next grid to sums in the first cache; a processor with an int8 instruction takes its own (AMX tiles, torch's), and one
pass over what they give. A block is recognised by its parts and by its answer: each must give what its own forward
gives on random rows, one of them padded, or it keeps that forward and the reason is told. A call with anything unusual
(gradients, a cache, recorded attention) goes the block's own way as well.
Axes: B rows, T tokens, H features.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantailor.kernels import panels, passes, tiles
from quantailor.kernels.operators import opaque
from quantailor.kernels.ops import IntegerInput, IntegerWeight, int_linear, multiplies_int8
from quantailor.kernels.scratch import scratch
from quantailor.models.structure import blocks, modules_of
from quantailor.nn.packed import QuantLinear
from quantailor.spec import Int

_AT_ONCE = 512  # tokens whose floats between two products stay in the caches: 1.5 MiB a tensor of 768
_NEAR = 1e-3  # of the largest output
_LAYOUTS = (  # where the parts of a block are called so
    {
        "attention": "attention.self", "query": "attention.self.query", "key": "attention.self.key",
        "value": "attention.self.value", "out": "attention.output.dense", "norm1": "attention.output.LayerNorm",
        "up": "intermediate.dense", "act": "intermediate.intermediate_act_fn", "down": "output.dense",
        "norm2": "output.LayerNorm",
    },
    {
        "attention": "attention", "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin",
        "out": "attention.out_lin", "norm1": "sa_layer_norm", "up": "ffn.lin1", "act": "ffn.activation",
        "down": "ffn.lin2", "norm2": "output_layer_norm",
    },
)  # fmt: skip
_LINEARS = ("query", "key", "value", "out", "up", "down")
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class _Unfit(Exception):
    """Why a block keeps its own forward."""


@dataclass(frozen=True)
class Product:
    """A packed layer as the kernel takes it."""

    layer: QuantLinear
    limits: tuple[int, int]  # of its input's integers
    input_scale: Tensor | None  # [1]; None: one a token, found at each call

    def integers(self, x: Tensor) -> IntegerInput:
        """Of `x` float32 [T, N]."""
        if self.input_scale is None:
            return IntegerInput(*passes.quantize_tokens(x, *self.limits))
        return IntegerInput(passes.quantize_values(x, self.input_scale, *self.limits), self.input_scale)

    def takes_the_same_as(self, other: Product) -> bool:
        """Whether both turn an input into the same integers."""
        a, b = self.input_scale, other.input_scale
        same = a is b if a is None or b is None else torch.equal(a, b)
        return self.limits == other.limits and same

    def of(self, x: IntegerInput, role: str, activation: str | None = None) -> Tensor:
        """float32 [T, O], in memory that the next product of this role uses again."""
        y = scratch(f"encoder {role}", (x.q.shape[0], self.layer.out_features), torch.float32, x.q.device)
        return self._into(y, x, activation)

    def into_integers(self, x: IntegerInput, activation: str, follower: Product) -> IntegerInput:
        """What `follower` takes of the result: at once where its scale is fixed, else by way of floats."""
        if (scale := follower.input_scale) is None:
            return follower.integers(self.of(x, "between", activation))
        y = scratch("encoder between", (x.q.shape[0], self.layer.out_features), torch.int8, x.q.device)
        return IntegerInput(self._into(y, x, activation, follower), scale)

    def _into(self, y: Tensor, x: IntegerInput, activation: str | None, follower: Product | None = None) -> Tensor:
        packed = self.layer.packed
        last = {} if follower is None else {"next_scale": follower.input_scale, "limits": follower.limits}
        w_q, w_scale, size = packed.integers(), packed.scales(), packed.spec.group_size
        parts = (x.q, x.scale.reshape(-1), w_q, w_scale, packed.shift(), size, self.layer.bias)
        if not multiplies_int8():
            return panels.panel_linear(*parts, activation=activation, out=y, **last)  # type: ignore[arg-type]
        if tiles.fits(x.q, w_q, size):
            floats = y if follower is None else scratch("encoder floats", y.shape, torch.float32, y.device)
            tiles.tile_linear(*parts, in_bf16=False, tiles=self.held_tiles, out=floats)
        else:
            floats = int_linear(x, IntegerWeight(*parts[2:6]), self.layer.bias)
        if activation is None and follower is None:
            return floats
        return panels.finish(floats, activation=activation, out=y, **last)  # type: ignore[arg-type]

    @cached_property
    def held_tiles(self) -> Tensor:
        """The weight as AMX takes it, made at its first product and held as long as this: while the model serves."""
        return tiles.weight_tiles(self.layer.packed.integers(), self.layer.packed.spec.group_size)


class EncoderBlock:
    """One block's fast forward. `follower`: the block that runs next, whose integers this one leaves behind."""

    def __init__(self, block: nn.Module) -> None:
        """Raises: _Unfit, with the reason."""
        parts = _parts(block)
        self.block, self.own = block, block.forward
        products = {name: _product(name, parts[name]) for name in _LINEARS}
        self.query, self.key, self.value, self.out, self.up, self.down = (products[name] for name in _LINEARS)
        self.norm1, self.norm2 = (_norm(parts[name]) for name in ("norm1", "norm2"))
        self.activation = _function(parts["act"])
        attention = parts["attention"]
        self.head_size = int(getattr(attention, "attention_head_size", 0))
        self.scaling = getattr(attention, "scaling", None)
        if not self.head_size or getattr(attention, "is_causal", False) or getattr(block, "is_decoder", False):
            raise _Unfit("its attention is not an encoder's")
        held = {id(parts[name]) for name in (*_LINEARS, "norm1", "norm2")}
        held |= {id(parts[name].packed) for name in _LINEARS}
        for name, module in block.named_modules():
            state = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if (state and id(module) not in held) or hasattr(module, "score_point"):
                raise _Unfit(f"it holds something besides its layers and norms: {name or type(block).__name__}")
        self.inner = [module for module in block.modules() if module is not block]
        self.follower: EncoderBlock | None = None
        self.given: tuple[weakref.ref[Tensor], IntegerInput] | None = None  # an input, and its integers for `query`

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *more: Any, **options: Any) -> Any:
        """As the block's own. hidden_states [B, T, H]; mask [B or 1, 1 or heads, T or 1, T], bool or to be added."""
        if not self._takes(hidden_states, attention_mask, more, options):
            self.given = None
            return self.own(hidden_states, attention_mask, *more, **options)
        batch, tokens, width = hidden_states.shape
        given, self.given = self.given, None
        known = given[1] if given is not None and given[0]() is hidden_states else None
        result, left = torch.empty_like(hidden_states), []
        run = max(1, _AT_ONCE // max(1, tokens))
        for start in range(0, batch, run):
            rows = slice(start, min(start + run, batch))
            mask = attention_mask if attention_mask is None or len(attention_mask) == 1 else attention_mask[rows]
            flat = slice(rows.start * tokens, rows.stop * tokens)
            part = None if known is None else _rows(known, flat)
            left.append(self._some(hidden_states[rows], mask, part, result[rows].view(-1, width)))
        if self.follower is not None:
            self.follower.given = weakref.ref(result), _joined(left)
        return result

    def _takes(self, hidden: Tensor, mask: Tensor | None, more: tuple[Any, ...], options: dict[str, Any]) -> bool:
        plain = hidden.dtype == torch.float32 and hidden.dim() == 3 and hidden.is_contiguous() and hidden.numel() > 0
        masked = mask is None or (mask.dim() == 4 and mask.dtype in (torch.bool, torch.float32))
        unusual = [v for name, v in options.items() if name != "position_ids" and v is not None and v is not False]
        if opaque(hidden) or not plain or not masked or unusual or any(v is not None for v in more):
            return False
        differs = self.block.training or (torch.is_grad_enabled() and hidden.requires_grad)
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self.inner)
        return not differs and not hooked and not torch.is_autocast_enabled(hidden.device.type)

    def _some(self, hidden: Tensor, mask: Tensor | None, known: IntegerInput | None, out: Tensor) -> IntegerInput:
        """The block on some rows: floats to `out` [B * T, H], and the integers of these for the next block."""
        batch, tokens, width = hidden.shape
        rows = hidden.view(-1, width)
        x = known or self.query.integers(rows)
        heads: list[Any] = []
        for name, product in (("query", self.query), ("key", self.key), ("value", self.value)):
            same = product.takes_the_same_as(self.query)
            y = product.of(x if same else product.integers(rows), name)
            heads.append(y.view(batch, tokens, -1, self.head_size).transpose(1, 2))
        context = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask, scale=self.scaling)
        context = context.transpose(1, 2).reshape(batch * tokens, -1)
        y = self.out.of(self.out.integers(context), "out")
        middle = scratch("encoder middle", (batch * tokens, width), torch.float32, hidden.device)
        up, scale = self.up, self.up.input_scale
        x = IntegerInput(*passes.add_norm(y, rows, self.norm1, *up.limits, scale, middle))
        y = self.down.of(up.into_integers(x, self.activation, self.down), "out")
        following = self.query if self.follower is None else self.follower.query
        return IntegerInput(*passes.add_norm(y, middle, self.norm2, *following.limits, following.input_scale, out))


def _rows(x: IntegerInput, rows: slice) -> IntegerInput:
    return IntegerInput(x.q[rows], x.scale if x.scale.dim() == 1 else x.scale[rows])


def _joined(parts: list[IntegerInput]) -> IntegerInput:
    if len(parts) == 1:
        return parts[0]
    scale = parts[0].scale if parts[0].scale.dim() == 1 else torch.cat([part.scale for part in parts])
    return IntegerInput(torch.cat([part.q for part in parts]), scale)


def _parts(block: nn.Module) -> dict[str, Any]:
    for layout in _LAYOUTS:
        try:
            return {name: _under(block, path) for name, path in layout.items()}
        except AttributeError:
            continue
    raise _Unfit("its parts are not those of a BERT-like block")


def _under(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _product(name: str, layer: Any) -> Product:
    if not isinstance(layer, QuantLinear) or layer.scheme.input is None or not layer.packed.is_int8:
        raise _Unfit(f"its {name} layer has not both 8-bit weights and integer inputs")
    spec = layer.scheme.input
    if layer.scheme.output is not None or not isinstance(spec.grid, Int):
        raise _Unfit(f"its {name} layer quantizes its output, or its input by signs")
    if spec.group_size is not None or spec.outliers is not None or layer.packed.spec.is_indexed:
        raise _Unfit(f"its {name} layer has groups or outlier columns of inputs")
    scale = None if spec.dynamic else layer.get_buffer("input_scale")
    return Product(layer, (spec.grid.qmin, spec.grid.qmax), scale)


def _norm(norm: Any) -> nn.LayerNorm:
    plain = isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
    if not plain or norm.weight.dtype != torch.float32:
        raise _Unfit("its norms are no LayerNorms in float32")
    return norm


def _function(function: Callable[[Tensor], Tensor]) -> str:
    """The name of the one of `_FUNCTIONS` that gives these values."""
    x = torch.linspace(-6, 6, 97)
    values = function(x)
    for name, known in _FUNCTIONS.items():
        if torch.allclose(values, known(x), rtol=0, atol=1e-6):
            return name
    raise _Unfit("its activation function has no kernel (GELU, GELU by tanh, SiLU and ReLU have)")


def _candidates(model: nn.Module) -> list[tuple[nn.Module, EncoderBlock | str]]:
    """Blocks with integer inputs, in order, each with its fast form or the reason why it has none."""
    found: list[tuple[nn.Module, EncoderBlock | str]] = []
    for _, block in blocks(model):
        if not any(layer.scheme.input is not None for _, layer in modules_of(block, QuantLinear)):
            continue
        try:
            if away := {t.device.type for t in (*block.parameters(), *block.buffers())} - {"cpu"}:
                raise _Unfit(f"the kernel runs on a CPU, and the block is on {', '.join(sorted(away))}")
            if reason := panels.why_not():
                raise _Unfit(reason)
            kind = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
            if kind not in ("sdpa", "eager"):
                raise _Unfit(f"its attention implementation is {kind}, not sdpa or eager")
            found.append((block, EncoderBlock(block)))
        except _Unfit as reason:
            found.append((block, str(reason)))
    return found


@torch.inference_mode()
def _difference(fast: EncoderBlock, seed: int) -> float:
    """Of the two forwards on random rows, the second one padded: the largest, as a part of the largest output."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 9, fast.query.layer.in_features, generator=random)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[1, ..., 5:] = False
    added = torch.zeros(2, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    worst = 0.0
    for given in (added, None):
        expected = fast.own(hidden, given)
        expected = expected[0] if isinstance(expected, tuple) else expected
        difference = (fast.forward(hidden, given) - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(difference)) if difference.isfinite() else float("inf")
    return worst


@contextmanager
def encoding(model: nn.Module) -> Iterator[dict[int, str]]:
    """Fast blocks while it lasts; yields id of each QuantLinear in a block with integer inputs -> "" or why not."""
    candidates, changed = _candidates(model), []
    reasons: dict[int, str] = {}
    for block, found in candidates:
        reason = found if isinstance(found, str) else ""
        if isinstance(found, EncoderBlock):
            # The second draw, because a value between two integers may fall to either side once.
            difference = min(_difference(found, seed) for seed in (0, 1))
            if difference > _NEAR:
                reason = f"its fast form is off by {difference:.1e} of the largest output"
            else:
                changed.append(found)
        reasons |= {id(layer): reason for _, layer in modules_of(block, QuantLinear)}
    try:
        for one, following in zip(changed, [*changed[1:], None]):
            one.follower = following
            one.block.forward = one.forward
        yield reasons
    finally:
        for one in changed:
            del one.block.forward


def why_not_encoded(model: nn.Module) -> dict[int, str]:
    """As `encoding` yields it, from the blocks' parts alone."""
    return {
        id(layer): found if isinstance(found, str) else ""
        for block, found in _candidates(model)
        for _, layer in modules_of(block, QuantLinear)
    }
