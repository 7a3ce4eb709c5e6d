"""A training step run without numbers: every operator with its shapes, and every byte while it lives.

The step's own modules run on torch's fake tensors, which have shapes, types and storages and no data. A dispatch mode
below autograd sees each operator, forward and backward, with what it reads and writes; storages are watched until they
are let go of, so the peak is that of the real run's tensors. What kernels allocate inside themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 32 * 2**20  # bytes


@dataclass(frozen=True)
class Op:
    """One operator at one size. `flops`: of products, 2 a multiply-add. `moved`: bytes read and written; 0 for a view.
    `rows`: the smallest dimension of a product, which decides how well a kernel fills; 0 for others."""

    name: str
    dtype: str
    flops: int
    moved: int
    rows: int = 0


@dataclass
class Trace:
    """What ran: operators with how often, and the largest live bytes of each phase, over what was there before."""

    ops: Counter[Op] = field(default_factory=Counter)
    peaks: dict[str, int] = field(default_factory=dict)
    saved: int = 0  # live when the forward pass was over: what backward needs
    saved_small: int = 0  # of that, in pieces that glibc keeps on its heap: below its largest mmap threshold, 32 MiB

    @property
    def flops(self) -> int:
        return sum(op.flops * n for op, n in self.ops.items())


class Tracer(TorchDispatchMode):
    """Use as a context around the step, within that of the fake tensors; `phase` names what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.live = 0
        self.live_small = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._phase = ""

    def own(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that are there already and are counted elsewhere, such as parameters."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, name
        self.trace.peaks[name] = max(self.trace.peaks.get(name, 0), self.live)
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "prim":
            return out
        outputs = list(_tensors(out))
        new = [o for o in outputs if self._adopt(o)]
        inputs = list(_tensors(args)) + list(_tensors((kwargs or {}).values()))
        self.trace.ops[_op(name, func, inputs, outputs, bool(new))] += 1
        return out

    def _adopt(self, tensor: Tensor) -> bool:
        """Whether `tensor` has memory of its own that was not there before."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.live_small += size if size < SMALL else 0
        weakref.finalize(storage, self._let_go, size)
        self.trace.peaks[self._phase] = max(self.trace.peaks.get(self._phase, 0), self.live)
        return True

    def _let_go(self, size: int) -> None:
        self.live -= size
        self.live_small -= size if size < SMALL else 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | type({}.values())):
        for item in value:
            yield from _tensors(item)


def _touched(tensor: Tensor) -> int:
    """Bytes that an operator reads of it: a broadcast tensor is read from fewer."""
    logical = tensor.numel() * tensor.element_size()
    return min(logical, int(tensor.untyped_storage().nbytes()))


_PRODUCTS: dict[str, Callable[[list[Tensor]], tuple[int, int]]] = {}


def _product(*names: str) -> Callable[[Any], Any]:
    def add(function: Callable[[list[Tensor]], tuple[int, int]]) -> Any:
        _PRODUCTS.update(dict.fromkeys(names, function))
        return function

    return add


@_product("mm", "_int_mm")
def _mm(x: list[Tensor]) -> tuple[int, int]:
    (m, k), n = x[0].shape, x[1].shape[1]
    return 2 * m * k * n, min(m, k, n)


@_product("int_linear", "tile_linear")
def _int_linear(x: list[Tensor]) -> tuple[int, int]:
    """x_q [..., N], x_scale, w_q [O, N]: counted as integer products."""
    n, o = x[0].shape[-1], x[2].shape[0]
    t = x[0].numel() // n
    return 2 * t * n * o, min(t, n, o)


@_product("addmm")
def _addmm(x: list[Tensor]) -> tuple[int, int]:
    return _mm(x[1:])


@_product("bmm")
def _bmm(x: list[Tensor]) -> tuple[int, int]:
    (b, m, k), n = x[0].shape, x[1].shape[2]
    return 2 * b * m * k * n, min(m, k, n)


@_product("baddbmm")
def _baddbmm(x: list[Tensor]) -> tuple[int, int]:
    return _bmm(x[1:])


@_product("_grouped_mm")
def _grouped(x: list[Tensor]) -> tuple[int, int]:
    """Rows in order of their expert, weights [E, K, N]: each row meets one expert."""
    if x[0].dim() == 2 and x[1].dim() == 3:
        return 2 * x[0].shape[0] * x[0].shape[1] * x[1].shape[2], min(x[1].shape[1:])
    return 2 * x[0].shape[0] * x[0].shape[-1] * x[1].shape[-1], min(x[0].shape[-1], x[1].shape[-1])


@_product("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention")
def _attention(x: list[Tensor]) -> tuple[int, int]:
    """Two products [T, D] x [D, S] and [T, S] x [S, D]; causal ones are counted whole: the kernel skips about half."""
    b, h, t, d = x[0].shape
    return 4 * b * h * t * x[1].shape[2] * d, d


@_product("_scaled_dot_product_flash_attention_for_cpu_backward")
def _attention_backward(x: list[Tensor]) -> tuple[int, int]:
    """Five products instead of two: the scores are computed again."""
    flops, d = _attention(x[1:])
    return 5 * flops // 2, d


def _convolution_flops(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, int]:
    if func.overloadpacket.__name__ == "convolution":
        out, weight = outputs[0], inputs[1]
        factor = 1
    else:  # backward: grad_output, input, weight; of the input and of the weight, where both are asked for
        out, weight = inputs[0], inputs[2]
        factor = sum(o.dim() == 4 for o in outputs)
    per_output = weight.numel() // weight.shape[0]
    return factor * 2 * out.numel() * per_output, min(weight.shape[0], per_output)


def _op(name: str, func: Any, inputs: list[Tensor], outputs: list[Tensor], has_new: bool) -> Op:
    dtype = str(outputs[0].dtype).removeprefix("torch.") if outputs else "none"
    if name in _PRODUCTS:
        flops, rows = _PRODUCTS[name](inputs)
        return Op(name, dtype, flops, sum(map(_touched, inputs)) + sum(map(_touched, outputs)), rows)
    if name in ("convolution", "convolution_backward"):
        flops, rows = _convolution_flops(func, inputs, outputs)
        return Op(name, dtype, flops, sum(map(_touched, inputs)) + sum(map(_touched, outputs)), rows)
    in_place = func._schema.is_mutable
    if not has_new and not in_place:
        return Op("view", "none", 0, 0)
    if name in ("embedding", "index", "index_select", "gather"):  # few rows of the table are read
        return Op(name, dtype, 0, 2 * sum(map(_touched, outputs)))
    moved = sum(map(_touched, inputs)) + sum(map(_touched, outputs))
    return Op(name, dtype, 0, moved)
