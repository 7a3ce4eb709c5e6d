"""Decoder blocks that answer for one token by a native call (kernels/blocks.py) while a model serves.

A block is taken for what its parts say it is, and then proved: three tokens through its own forward and through the
native one must come out alike. What is not taken keeps its own forward, and the reason is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from quantailor.kernels import decode
from quantailor.kernels.blocks import BlockShape, NativeBlock
from quantailor.kernels.decode import StoredWeight
from quantailor.models.cache import Int8Layer
from quantailor.models.structure import blocks
from quantailor.nn.packed import QuantLinear

ALIKE = 1e-3  # of the largest output: what `serving` promises of logits
_PARTS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


class NotNative(Exception):
    """Why a block keeps its own forward."""


@dataclass(frozen=True)
class Blocks:
    """How many of a model's blocks answer by a native call, and why the others do not ("" where all do)."""

    taken: int
    total: int
    why: str


class FastBlock:
    """Stands in for a block's forward: one token by `native`, everything else by the block itself."""

    def __init__(self, block: Any, native: NativeBlock) -> None:
        self.native, self.own = native, block.forward
        self.index = int(block.self_attn.layer_idx)

    def __call__(self, hidden_states: Tensor, *more: Any, **given: Any) -> Any:
        cached: Any = given.get("past_key_values")
        mask: Any = given.get("attention_mask")
        turn: Any = given.get("position_embeddings")
        if more or turn is None or not self._takes(hidden_states, cached, mask):
            return self.own(hidden_states, *more, **given)
        layer = cached.layers[self.index]
        x = hidden_states.reshape(-1).clone()
        position, visible = int(layer.cumulative_length), mask.reshape(-1)
        self.step(x, turn[0].reshape(-1), turn[1].reshape(-1), layer, position, visible)
        layer.cumulative_length.add_(1)
        return x.view_as(hidden_states)

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, layer: Any, position: int, visible: Tensor) -> None:
        """`x` [N] is changed in place, the cache's `layer` at `position`; `cos`, `sin` [D], `visible` bool [L]."""
        scales = (layer.key_scales, layer.value_scales) if isinstance(layer, Int8Layer) else None
        self.native(x, cos, sin, layer.keys[0], layer.values[0], position, visible, scales)

    def _takes(self, x: Tensor, cached: Any, mask: Any) -> bool:
        """One token of one text in float32, a laid-out cache that its prompt has filled, a mask of yes and no."""
        if x.shape[:2] != (1, 1) or x.dtype != torch.float32 or x.requires_grad or cached is None:
            return False
        layers = getattr(cached, "layers", [])
        layer: Any = layers[self.index] if self.index < len(layers) else None
        if type(layer) not in (StaticLayer, Int8Layer) or not layer.is_initialized:
            return False
        return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (1, 1, 1, layer.max_cache_len)


def install(model: nn.Module) -> Blocks:
    """Give every block that can have one a `FastBlock` for its forward; `remove` takes them away. The layers must
    serve already (models/serving.py)."""
    found, taken, why = blocks(model), 0, ""
    for _, block in found:
        try:
            fast = FastBlock(block, native_block(block, model))
            _prove(block, fast, model)
        except NotNative as reason:
            why = why or str(reason)
            continue
        block.forward = fast
        taken += 1
    return Blocks(taken, len(found), why)


def remove(model: nn.Module) -> None:
    """The blocks' own forwards again."""
    for _, block in blocks(model):
        if isinstance(vars(block).get("forward"), FastBlock):
            del block.forward


def native_block(block: nn.Module, model: nn.Module) -> NativeBlock:
    """Raises: NotNative with the reason."""
    parts: dict[str, Any] = dict(block.named_modules())
    config = getattr(model, "config", None)
    if any(name not in parts for name in (*_PARTS, *_NORMS[:2])) or not hasattr(parts["self_attn"], "layer_idx"):
        raise NotNative("its blocks are not built like Llama's")
    if getattr(config, "_attn_implementation", None) != "sdpa":
        raise NotNative("its attention is not transformers' sdpa")
    if decode.why_no_kernel():
        raise NotNative(decode.why_no_kernel())
    known = {"", "self_attn", "mlp", "mlp.act_fn", *_PARTS, *_NORMS, *(f"{name}.packed" for name in _PARTS)}
    if extra := sorted(set(parts) - known):
        raise NotNative(f"its blocks have {extra[0]}, which the native one has not")
    if any(m._forward_hooks or m._forward_pre_hooks for m in parts.values()):
        raise NotNative("hooks hang in its blocks")
    attention = parts["self_attn"]
    gains = [_gain(parts[name]) if name in parts else None for name in _NORMS]
    layers = [parts[name] for name in _PARTS]
    dim = int(attention.head_dim)
    held = [_weight(layer) for layer in layers]
    if any(layer.in_features % 8 for layer in (layers[0], layers[3])) or dim % 8:
        raise NotNative("its sizes are no multiples of 8")
    heads, kv_heads = (layer.out_features // dim for layer in layers[:2])
    shape = BlockShape(
        heads,
        kv_heads,
        dim,
        float(attention.scaling),
        _eps(parts["input_layernorm"]),
        _eps(parts["self_attn.q_norm"]) if "self_attn.q_norm" in parts else 0.0,
        _activation(parts["mlp.act_fn"]),
    )
    return NativeBlock(held, [_bias(m) for m in layers], gains, shape)


def _weight(layer: Any) -> StoredWeight | Tensor:
    if type(layer) is nn.Linear:
        if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
            raise NotNative(f"a layer of its blocks is in {layer.weight.dtype} on {layer.weight.device.type}")
        return layer.weight.detach().contiguous()
    if not isinstance(layer, QuantLinear):
        raise NotNative(f"a layer of its blocks is a {type(layer).__name__}")
    if layer.scheme.input is not None or layer.scheme.output is not None:
        raise NotNative("its activations are quantized too")
    if (device := layer.packed.scales().device.type) != "cpu":  # where other kernels may take the layer alone
        raise NotNative(f"native blocks run on a CPU, and a layer of these is on {device}")
    if reason := decode.why_not(layer.held, 1, device):
        raise NotNative(reason)
    assert layer.held is not None
    return layer.held


def _bias(layer: Any) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach().float().contiguous()


def _gain(norm: Any) -> Tensor:
    if not isinstance(getattr(norm, "weight", None), Tensor) or norm.weight.dtype != torch.float32:
        raise NotNative(f"a norm of its blocks, {type(norm).__name__}, has no float32 weight")
    return norm.weight.detach().contiguous()


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def _activation(act: nn.Module) -> str:
    x = torch.linspace(-6, 6, 49)
    for name, function in (("silu", F.silu), ("gelu_pytorch_tanh", lambda v: F.gelu(v, approximate="tanh"))):
        if torch.allclose(act(x), function(x), atol=1e-6):
            return name
    raise NotNative(f"its activation function, {type(act).__name__}, is neither SiLU nor GELU by tanh")


@torch.no_grad()
def _prove(block: Any, fast: FastBlock, model: Any) -> None:
    """Raises: NotNative unless three tokens come out alike."""
    generator = torch.Generator().manual_seed(0)
    width, dim, places = block.self_attn.q_proj.in_features, block.self_attn.head_dim, 4
    caches = [StaticCache(config=model.config, max_cache_len=places) for _ in range(2)]
    if type(caches[0].layers[fast.index]) is not StaticLayer:
        raise NotNative("its attention looks through a window")
    for position in range(3):
        x = torch.randn(1, 1, width, generator=generator)
        angles = torch.rand(1, 1, dim // 2, generator=generator).repeat(1, 1, 2) * 6
        visible = (torch.arange(places) <= position).view(1, 1, 1, -1)
        given = {"attention_mask": visible, "position_embeddings": (angles.cos(), angles.sin()), "use_cache": True}
        expected = fast.own(x, past_key_values=caches[0], **given)
        if position == 0:  # a first token lays the cache out, by the block itself
            fast.own(x, past_key_values=caches[1], **given)
            continue
        found = fast(x, past_key_values=caches[1], **given)
        if not (found - expected).abs().max() <= ALIKE * expected.abs().max():
            raise NotNative("its own forward and the native one do not agree")
