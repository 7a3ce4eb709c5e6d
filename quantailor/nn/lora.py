"""A linear layer on a packed base with low-rank adapters: inside the rounding (LoRA-QAT), or beside it (QLoRA).

Inside, the layer computes what its merged twin will: integers round(v + (alpha/r) B A / s) on the weight's own grid
(numerics/lora.py has the equations), made a run of rows at a time, forwards, backwards and for the merge, by the same
code. Beside, it is y = x w_hat^T + (alpha/r) x A^T B^T, and merging has to round a second time. No float copy of the
weight exists. Axes: T tokens, O out, N in, G groups a row, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from quantailor.errors import UsageError
from quantailor.kernels.ops import IntegerInput, IntegerWeight, has_integer_product
from quantailor.nn.packed import PackedWeight, QuantLinear, _Quant
from quantailor.nn.recompute import InputGradient, Kept, Rows, frozen_linear, multiplied, runs
from quantailor.numerics import grids
from quantailor.numerics.grouping import from_groups
from quantailor.numerics.packing import pack, unpack
from quantailor.spec import NF4

INITS = ("zeros", "loftq")


@dataclass(frozen=True)
class LoRA:
    """What an adapter is; the names are peft's where peft has them.

    `lora_alpha` None: twice r. `target_modules` None: every quantized linear layer; else names, or their last parts.
    `inside`: the adapter is rounded with the weight (LoRA-QAT), else it stands beside (QLoRA), and a merge rounds
    again. `base_bits`: what the frozen base keeps of each weight, the grid's bits included; more than those need the
    float model (None: 8, or the weight's own bits where only integers are left, or with "loftq"). `lora_dropout`
    inside: the share of A's columns, the input features, that a step leaves out; beside: of x, as peft does it.
    `init` "loftq": a base and an adapter found in turns, `iterations` times. `scales`: the grid's scales train too.
    """

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    inside: bool = True
    base_bits: int | None = None
    init: str = "zeros"
    iterations: int = 5
    scales: bool = False

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 1:
            raise UsageError(f"r={self.r} is no rank; use 1 or more (16 is usual)")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"lora_alpha={self.lora_alpha} must be above 0; twice r is usual")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout={self.lora_dropout} is a share; use 0 or more and less than 1")
        if isinstance(self.target_modules, str) or (self.target_modules is not None and not all(self.target_modules)):
            raise UsageError(f"target_modules={self.target_modules!r} is no list of names; use ('q_proj', 'v_proj')")
        if self.target_modules is not None and not self.target_modules:
            raise UsageError("target_modules names no layer; leave it out for every quantized linear layer")
        if self.base_bits is not None and not 1 <= self.base_bits <= 16:
            raise UsageError(f"base_bits={self.base_bits}: a base keeps 1 to 16 bits; 8 is usual")
        if self.init not in INITS:
            raise UsageError(f"init={self.init!r} is not known; use {' or '.join(INITS)}")
        if self.iterations < 1:
            raise UsageError(f"iterations={self.iterations} does nothing; use 1 or more (5 is usual)")
        if self.scales and not self.inside:
            raise UsageError(
                "scales belong to what is rounded, and this adapter stands beside; leave one of the two out"
            )

    @property
    def alpha(self) -> float:
        return 2.0 * self.r if self.lora_alpha is None else float(self.lora_alpha)

    @property
    def scaling(self) -> float:
        """alpha / r: what B A is multiplied by."""
        return self.alpha / self.r


class Adapter(nn.Module):
    """A [R, N], B [O, R] in units of the weight, and the logarithms of what scales are multiplied by, where they train.

    B starts at 0 and A as peft draws it (uniform, Kaiming with a = sqrt 5), so that the first model is the base.
    """

    def __init__(self, lora: LoRA, base: PackedWeight, device: torch.device) -> None:
        super().__init__()
        self.lora = lora
        self.lora_A = nn.Parameter(torch.empty(lora.r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, lora.r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        shape = base.scales().shape
        self.log_scale = nn.Parameter(torch.zeros(shape, device=device)) if lora.scales else None

    def scales(self, base: PackedWeight) -> Tensor:
        """float32 [O, G] or [1, 1]: what the integers are multiplied by."""
        return base.scales() if self.log_scale is None else base.scales() * self.log_scale.exp()

    def extra_repr(self) -> str:
        return f"r={self.lora.r}, alpha={self.lora.alpha:g}"


class LoRALinear(_Quant):
    """y = x w_hat^T + bias of a packed base and the active adapter.   x [..., N] -> y [..., O]

    Buffers beside the packed layer's: `fraction` int32 [O, words], what rounding to the grid threw away, in
    `fraction_bits` bits a weight (numerics.packing), absent at 0 bits. `adapters` by name; `active` None is the base.
    """

    def __init__(self, source: QuantLinear, fraction: Tensor | None = None, fraction_bits: int = 0) -> None:
        super().__init__(source.scheme, source.packed, source.bias)
        for name in ("input_scale", "output_scale"):
            if hasattr(source, name):
                self.register_buffer(name, getattr(source, name))
        self.fraction_bits = fraction_bits
        if fraction_bits:
            assert fraction is not None
            self.register_buffer("fraction", pack(fraction + 2 ** (fraction_bits - 1), fraction_bits))
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.train(source.training)

    @property
    def in_features(self) -> int:
        return self.packed.in_features

    @property
    def out_features(self) -> int:
        return self.packed.out_features

    @property
    def weight(self) -> Tensor:
        """The merged weight, made anew: for code that looks at `.weight.dtype` or `.weight.device`."""
        return self.merged().packed.dequantize()

    @property
    def adapter(self) -> Adapter | None:
        return None if self.active is None else self.adapters[self.active]  # type: ignore[return-value]

    def add(self, name: str, adapter: Adapter) -> None:
        """Raises: UsageError where the weight's grid has no integers to round to."""
        if adapter.lora.inside and isinstance(self.packed.spec.grid, NF4):
            raise UsageError("nf4 has no integers for an adapter to be rounded into; use inside=False, which is QLoRA")
        self.adapters[name] = adapter

    # ------------------------------------------------------------------------------------------------ the rounding

    def base_steps(self, rows: slice) -> Tensor:
        """v of the frozen base, float32 [n, N]: its integers and what rounding threw away."""
        q = self.packed.integers(rows).float()
        if not self.fraction_bits:
            return q
        words: Tensor = self.fraction[rows]  # type: ignore[index]
        r = unpack(words, self.fraction_bits, self.in_features).float() - 2 ** (self.fraction_bits - 1)
        return q.add_(r, alpha=2.0**-self.fraction_bits)

    def rounded(self, rows: slice, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """(integers as float32 [n, N], where they lie on the grid unclipped): what is trained, and what is merged."""
        qmin, qmax, _ = grids.limits(self.packed.spec.grid)
        with torch.autocast(a.device.type, enabled=False):
            delta = self.packed.grouped(b[rows].float() @ a.float())
        scale = self.packed.scales()
        scale = scale if scale.shape[0] == 1 else scale[rows]
        steps = from_groups(delta * self.packed.of_groups(scaling / scale).unsqueeze(-1), self.in_features)
        unclipped = torch.round(self.base_steps(rows) + steps)
        q = unclipped.clamp(qmin, qmax)
        return q, unclipped == q

    def on_grid(self, rows: slice, q: Tensor, scale: Tensor) -> IntegerWeight:
        """Integers (float32) with their scales, as the products take them."""
        shift = self.packed.shift()
        if scale.shape[0] != 1:
            scale, shift = scale[rows], None if shift is None else shift[rows]
        dtype = torch.int8 if has_integer_product(self.packed.spec.grid) else torch.uint8
        if self.packed.spec.is_indexed:  # each input by itself, with its group's scale
            shift = None if shift is None else self.packed.of_groups(shift)
            return IntegerWeight(q.to(dtype), self.packed.of_groups(scale), shift, 1)
        return IntegerWeight(q.to(dtype), scale, shift, self.packed.spec.group_size)

    def trained_rows(
        self, a: Tensor, b: Tensor, log_scale: Tensor | None, scaling: float, quantized_input: bool
    ) -> Rows:
        """Makes rows of the trained weight: integers where the input has them too, else their float values."""
        scale = self.packed.scales() if log_scale is None else self.packed.scales() * log_scale.exp()
        on_integers = quantized_input and has_integer_product(self.packed.spec.grid)

        def made(rows: slice) -> IntegerWeight | Tensor:
            weight = self.on_grid(rows, self.rounded(rows, a, b, scaling)[0], scale)
            return weight if on_integers else weight.dequantize()

        return made

    @torch.no_grad()
    def merged(self) -> QuantLinear:
        """The packed twin. Inside: the integers that the forward pass multiplies, to the bit. Beside: rounded a second
        time on the base's scales, which changes the layer (`merge_error`)."""
        bias = None if self.bias is None else self.bias.clone()
        result = QuantLinear(self.scheme, self._merged_weight(), bias)
        for name in ("input_scale", "output_scale"):
            if hasattr(self, name):
                getattr(result, name).copy_(getattr(self, name))
        return result.train(self.training)

    def _merged_weight(self) -> PackedWeight:
        adapter, base = self.adapter, self.packed
        if adapter is None:
            return base
        new = PackedWeight(base.spec, base.out_features, base.in_features, base.scales().device)
        new.fill(torch.cat([self._merged_rows(adapter, part) for part in self._runs()]), base, adapter.scales(base))
        return new

    def _merged_rows(self, adapter: Adapter, rows: slice) -> Tensor:
        if adapter.lora.inside:
            q = self.rounded(rows, adapter.lora_A, adapter.lora_B, adapter.lora.scaling)[0]
            return q.to(torch.int16)
        weight = self.packed.dequantize(rows) + adapter.lora.scaling * (adapter.lora_B[rows] @ adapter.lora_A)
        return self.packed.encode(weight, rows).to(torch.int16)

    @torch.no_grad()
    def merge_error(self) -> float:
        """|merged - trained| / |trained - base| of the weights (Frobenius): 0 inside; beside, what a merge loses."""
        adapter = self.adapter
        if adapter is None or adapter.lora.inside:
            return 0.0
        merged, lost, moved = self._merged_weight(), 0.0, 0.0
        for part in self._runs():
            delta = adapter.lora.scaling * (adapter.lora_B[part] @ adapter.lora_A)
            lost += float((merged.dequantize(part) - self.packed.dequantize(part) - delta).square().sum())
            moved += float(delta.square().sum())
        return math.sqrt(lost / moved) if moved else 0.0

    def _runs(self) -> list[slice]:
        return runs(self.out_features, self.in_features, self.packed.scales().device)

    # ------------------------------------------------------------------------------------------------ the forward pass

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        x_int = None if self.scheme.input is None else self._quantize_input(x)
        if adapter is not None and adapter.lora.inside:
            return self._out(self._inside(x, x_int, adapter))
        on_integers = x_int is not None and has_integer_product(self.packed.spec.grid)
        rows = self.packed.grid_rows if on_integers else self.packed.dequantize
        y = frozen_linear(self._carrier(x), x_int, rows, self.bias, self.out_features, self.in_features)
        if adapter is not None:
            p = adapter.lora.lora_dropout
            dropped = F.dropout(x, p, self.training) if p else x
            dropped = dropped if torch.is_autocast_enabled(x.device.type) else dropped.to(adapter.lora_A.dtype)
            y = y + adapter.lora.scaling * F.linear(F.linear(dropped, adapter.lora_A), adapter.lora_B).to(y.dtype)
        return self._out(y)

    def _inside(self, x: Tensor, x_int: IntegerInput | None, adapter: Adapter) -> Tensor:
        a: Tensor = adapter.lora_A
        if self.training and (p := adapter.lora.lora_dropout):
            a = a * F.dropout(a.new_ones(a.shape[1]), p)  # one mask a step, so that what is rounded is one weight
        kept, tensors = Kept.of(x_int)
        return _Adapted.apply(
            self._carrier(x), a, adapter.lora_B, adapter.log_scale, self, adapter.lora.scaling, kept, *tensors
        )


class _Adapted(torch.autograd.Function):
    """The layer with its adapter inside. Kept for backward: input (or its integers), A, B. The rest is made anew."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        log_scale: Tensor | None,
        layer: LoRALinear,
        scaling: float,
        kept: Kept | None,
        *tensors: Tensor,
    ) -> Tensor:
        x_int = None if kept is None else kept.back(tensors)
        ctx.layer, ctx.scaling, ctx.kept, ctx.x_like = layer, scaling, kept, (x.shape, x.dtype)  # type: ignore[attr-defined]
        ctx.save_for_backward(*((x,) if kept is None else tensors), a, b, log_scale)  # type: ignore[arg-type]
        rows = layer.trained_rows(a, b, log_scale, scaling, kept is not None)
        return multiplied(x, x_int, rows, layer.bias, layer._runs(), layer.out_features)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, a, b, log_scale = ctx.saved_tensors  # type: ignore[attr-defined]
        layer, scaling, kept = ctx.layer, ctx.scaling, ctx.kept  # type: ignore[attr-defined]
        shape, dtype = ctx.x_like  # type: ignore[attr-defined]
        need_x, need_s = ctx.needs_input_grad[0], ctx.needs_input_grad[3]  # type: ignore[attr-defined]
        grad = grad_outputs[0].reshape(-1, layer.out_features)
        x = inputs[0] if kept is None else kept.back(tuple(inputs)).dequantize()
        x = x.reshape(-1, layer.in_features).to(grad.dtype)
        factor = None if log_scale is None else log_scale.exp()
        grad_x, grad_a, grad_b = InputGradient(), torch.zeros_like(a), torch.empty_like(b)
        grad_s = None if log_scale is None or not need_s else torch.zeros_like(log_scale)
        scale = layer.packed.scales() if factor is None else layer.packed.scales() * factor
        with torch.autocast(grad.device.type, enabled=False):
            for part in layer._runs():
                q, inside = layer.rounded(part, a, b, scaling)
                w_hat = layer.on_grid(part, q, scale).dequantize()
                dy = grad[:, part]
                if need_x:
                    grad_x.add(dy, w_hat)
                dw = (dy.t() @ x).float()
                if grad_s is not None:
                    per_group = layer.packed.summed(dw * w_hat)
                    grad_s[part if grad_s.shape[0] != 1 else slice(0, 1)] += (
                        per_group if grad_s.shape[0] != 1 else per_group.sum(0, keepdim=True)
                    )
                dw.mul_(inside)
                if factor is not None:
                    some = factor if factor.shape[0] == 1 else factor[part]
                    some = layer.packed.of_groups(some).unsqueeze(-1)
                    dw = from_groups(layer.packed.grouped(dw) * some, layer.in_features)
                grad_b[part] = (dw @ a.float().t()).mul_(scaling)
                grad_a += (b[part].float().t() @ dw).mul_(scaling)
        of_x = None
        if need_x:
            assert grad_x.total is not None
            of_x = grad_x.total.to(dtype).reshape(shape)
        return of_x, grad_a, grad_b, grad_s, None, None, None, *(None for _ in inputs if kept is not None)
