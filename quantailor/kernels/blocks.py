"""One token through a decoder block in one native call (native/block.c): what is small between the products costs more
in calls than in arithmetic.

The block is the Llama family's: RMS norms, rotary positions, grouped heads, a gated feed-forward layer. Its weights are
packed ones that the kernel of decode.py takes, or float32. Keys and values are float32, or int8 with a scale a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, byref, c_double, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantailor.kernels.decode import NativeWeight, StoredWeight
from quantailor.kernels.native import library as native
from quantailor.kernels.scratch import scratch

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # in the order of native/block.c


class _Block(Structure):
    _fields_ = [("weights", NativeWeight * 7), ("biases", c_void_p * 7)]
    _fields_ += [(name, c_void_p) for name in ("first_gain", "second_gain", "q_gain", "k_gain")]
    _fields_ += [(name, c_double) for name in ("eps", "head_eps", "scaling")]
    _fields_ += [(name, c_int64) for name in ("width", "heads", "kv_heads", "head_dim", "activation")]


class _Place(Structure):
    _fields_ = [(name, c_void_p) for name in ("x", "cos", "sin", "keys", "values", "key_scales", "value_scales")]
    _fields_ += [("visible", c_void_p), ("length", c_int64), ("position", c_int64), ("room", c_void_p)]


@dataclass(frozen=True)
class BlockShape:
    """What the tensors do not tell. `head_eps` is of the norms of heads, where there are any."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    eps: float
    head_eps: float
    activation: str


class NativeBlock:
    """`weights`: q, k, v, o, gate, up, down, each packed or float32 [O, N]; `biases` float32 [O] or None. `gains`: of
    the first and the second norm [N], of q's and k's heads [D] or None."""

    def __init__(
        self,
        weights: Sequence[StoredWeight | Tensor],
        biases: Sequence[Tensor | None],
        gains: Sequence[Tensor | None],
        shape: BlockShape,
    ) -> None:
        self._held = (*weights, *biases, *gains)  # what the pointers point to
        made = [NativeWeight.of_floats(w) if isinstance(w, Tensor) else w.native for w in weights]
        places = [_pointer(t) for t in (*biases, *gains)]
        numbers = (shape.eps, shape.head_eps, shape.scaling, made[0].n, shape.heads, shape.kv_heads, shape.head_dim)
        activation = ACTIVATIONS.index(shape.activation)
        self._block = _Block((NativeWeight * 7)(*made), (c_void_p * 7)(*places[:7]), *places[7:], *numbers, activation)
        self._here = byref(self._block)

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        position: int,
        visible: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Changes `x` float32 [N] in place, and `keys` and `values` [K, L, D] at `position`: float32, or int8 with
        `scales` float32 [K, L] of each. `cos`, `sin` float32 [D]; `visible` bool [L], what the token may look at."""
        run, needed = _functions()
        length = keys.shape[-2]
        assert position < length and x.is_contiguous() and keys.is_contiguous() and values.is_contiguous()
        room = scratch("block", (needed(self._here, length),), torch.uint8, x.device)
        of_scales = (None, None) if scales is None else (scales[0].data_ptr(), scales[1].data_ptr())
        places = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(), *of_scales)
        run(self._here, byref(_Place(*places, _pointer(visible), length, position, room.data_ptr())))


def _pointer(x: Tensor | None) -> int | None:
    assert x is None or (x.is_contiguous() and x.device.type == "cpu")
    return None if x is None else x.data_ptr()


@cache
def _functions() -> tuple[Any, Any]:
    lib = native.library()
    assert lib is not None, native.why_not()
    lib.run_block.argtypes, lib.run_block.restype = [c_void_p, c_void_p], None
    lib.block_bytes.argtypes, lib.block_bytes.restype = [c_void_p, c_int64], c_int64
    return lib.run_block, lib.block_bytes
