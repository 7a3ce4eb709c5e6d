"""The grid of one weight: its scales and zero points, learned or fixed, and the two maps onto it.

One object serves simulated, trained and packed execution: `forward` gives the fake-quantized weight, `integers` the
same grid's integers. Two modules that share a weight share this object as well.
Axes: O out, N in, G groups a row, g group size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantailor.kernels.ops import IntegerWeight, has_integer_product
from quantailor.nn.int_forward import WeightGrid, fake_quantized_weight
from quantailor.numerics import grids, nf4
from quantailor.numerics.affine import checked_scale, learned_scale
from quantailor.numerics.grouping import from_groups, num_groups, to_groups
from quantailor.numerics.lsq import gradient_scale
from quantailor.spec import NF4, Balanced, Int, PerTensor, QuantSpec


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight [O, N].

    scale = base_scale * exp(log_scale): its sign is fixed by calibration, it never reaches 0, and it is exactly
    `base_scale` until training moves it. Parameter `log_scale`, buffers `base_scale`, `zero_point`: [O, G, 1]
    ([1, 1, 1] per tensor). They start at 1 and 0: `set_scale` comes before the first use.
    """

    own_gradient = False  # whether integer products, whose backward is LSQ's, would give another gradient

    def __init__(
        self, spec: QuantSpec, out_features: int, in_features: int, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = in_features, out_features
        rows = 1 if isinstance(spec.granularity, PerTensor) else out_features
        shape = (rows, num_groups(in_features, spec.group_size), 1)
        self.log_scale = nn.Parameter(torch.zeros(shape, device=device))
        self.base_scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("base_scale", torch.ones(shape, device=device))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32, device=device))
        if isinstance(spec.grid, NF4):
            self.log_scale.requires_grad_(False)  # NF4's scale is the block's largest element, not a step to learn
            if spec.grid.double_quant:  # what is stored of `base_scale`; kept, since rounding it twice would move it
                self.register_buffer("scale_codes", torch.zeros(shape[:2], dtype=torch.uint8, device=device))
                blocks = -(-shape[0] * shape[1] // nf4.SECOND_BLOCK)
                self.register_buffer("scale_second", torch.ones(blocks, device=device))
                self.register_buffer("scale_mean", torch.zeros(1, device=device))
        if spec.is_indexed:
            self.register_buffer("group_index", torch.zeros(in_features, dtype=torch.int32, device=device))
        self.enabled = True
        per_scale = in_features if spec.group_size is None else min(spec.group_size, in_features)
        per_scale *= out_features if isinstance(spec.granularity, PerTensor) else 1
        self.g = gradient_scale(per_scale, grids.limits(spec.grid)[1])
        # The grid as the one-pass kernels take it; None for NF4, listed groups, and where integers do not fit int8.
        self.grid: WeightGrid | None = None
        if has_integer_product(spec.grid) and not spec.is_indexed:
            qmin, qmax, offset = grids.limits(spec.grid)
            stretch = 0.0 if isinstance(spec.grid, Int) else 0.5
            self.grid = WeightGrid(offset, stretch, self.g, qmin, qmax, spec.group_size)

    @property
    def is_asymmetric(self) -> bool:
        return isinstance(self.spec.grid, Int) and not self.spec.grid.symmetric

    @property
    def scale(self) -> Tensor:
        """[O, G, 1], not 0; negative where calibration turned the grid around."""
        return learned_scale(self.base_scale, self.log_scale)

    @property
    def scale_OG(self) -> Tensor:
        """[O, G], also where one scale serves all rows."""
        scale = self.scale.squeeze(-1)
        return scale if scale.shape[0] == self.out_features else scale.expand(self.out_features, -1).contiguous()

    @property
    def zero_point_OG(self) -> Tensor | None:
        """int32 [O, G]; None where it is 0 everywhere by the grid's nature."""
        if not self.is_asymmetric:
            return None
        return self.zero_point.squeeze(-1).expand(self.out_features, -1).contiguous()

    @torch.no_grad()
    def set_scale(self, scale: Tensor, zero_point: Tensor) -> None:
        """Put the grid here. With double quantization the scales are rounded to what their 8 bits can hold.

        Raises: ValueError unless every scale is finite and one this grid can have, and shapes are those of the buffers.
        """
        if scale.shape != self.base_scale.shape:
            raise ValueError(f"scale has shape {list(scale.shape)}; this weight needs {list(self.base_scale.shape)}")
        if isinstance(self.spec.grid, NF4) and self.spec.grid.double_quant:
            self.set_double(*nf4.double_quantize(scale.squeeze(-1)))
            return
        self.base_scale.copy_(checked_scale(scale, signed=grids.can_be_negative(self.spec.grid)))
        self.zero_point.copy_(zero_point)
        self.log_scale.zero_()

    @torch.no_grad()
    def set_double(self, codes: Tensor, second: Tensor, mean: Tensor) -> None:
        """Put the grid where doubly quantized scales say (numerics/nf4.py)."""
        buffers = dict(self.named_buffers())
        for name, value in (("scale_codes", codes), ("scale_second", second), ("scale_mean", mean)):
            buffers[name].copy_(value)
        self.base_scale.copy_(checked_scale(nf4.double_dequantize(codes, second, mean).unsqueeze(-1)))

    @property
    def doubled(self) -> tuple[Tensor, ...] | None:
        """(codes, second, mean) where scales are quantized twice."""
        buffers = dict(self.named_buffers())
        names = ("scale_codes", "scale_second", "scale_mean")
        return tuple(buffers[n] for n in names) if "scale_codes" in buffers else None

    def forward(self, weight_ON: Tensor) -> Tensor:
        """[O, N] -> fake-quantized [O, N], the same dtype; float where switched off."""
        if not self.enabled:
            return weight_ON
        if self.grid is not None:
            return fake_quantized_weight(weight_ON, self.scale_OG, self.zero_point_OG, self.grid)
        w = self.groups(weight_ON.float())
        w_hat = grids.fake_quantize(w, *self.grid_of_groups(self.scale, self.zero_point), self.spec.grid, self.g)
        return from_groups(w_hat, self.in_features).to(weight_ON.dtype)

    def rows(self, weight_ON: Tensor, index: Tensor) -> Tensor:
        """Fake-quantized rows only: `index` [*] -> [*, N]. An embedding touches few of its rows at a step."""
        if not self.enabled:
            return weight_ON[index]
        flat = index.flatten()
        scale, zero_point = (t if t.shape[0] == 1 else t[flat] for t in (self.scale, self.zero_point))
        w = self.groups(weight_ON[flat].float())
        w_hat = grids.fake_quantize(w, *self.grid_of_groups(scale, zero_point), self.spec.grid, self.g)
        return from_groups(w_hat, self.in_features).to(weight_ON.dtype).unflatten(0, index.shape)

    @torch.no_grad()
    def integers(self, weight_ON: Tensor) -> Tensor:
        """The grid's integers, int8 [O, N] (uint8 for 8 asymmetric bits)."""
        w = self.groups(weight_ON.float())
        scale, zero_point = self.grid_of_groups(self.scale, self.zero_point)
        return from_groups(grids.encode(w, scale, zero_point, self.spec.grid), self.in_features)

    @torch.no_grad()
    def dequantize(self, q_ON: Tensor) -> Tensor:
        """Integers [O, N] -> float32 [O, N]."""
        scale, zero_point = self.grid_of_groups(self.scale, self.zero_point)
        return from_groups(grids.decode(self.groups(q_ON), scale, zero_point, self.spec.grid), self.in_features)

    def groups(self, x_ON: Tensor) -> Tensor:
        """[O, N] -> [O, G, g], or one by one, [O, N, 1], where a list says which group each is in."""
        return x_ON.unsqueeze(-1) if self.spec.is_indexed else to_groups(x_ON, self.spec.group_size)

    def grid_of_groups(self, scale_OG1: Tensor, zero_point_OG1: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points as `groups` meets them."""
        if not self.spec.is_indexed:
            return scale_OG1, zero_point_OG1
        index: Tensor = self.group_index  # type: ignore[assignment]
        return scale_OG1[:, index], zero_point_OG1[:, index]

    @torch.no_grad()
    def shadow(self, weight_ON: Tensor, q_ON: Tensor) -> Tensor:
        """The float weight nearest to `weight_ON` whose integers are `q_ON`: where QAT starts after a PTQ solver.

        Keeping the original value inside the solver's cell keeps what rounding threw away; a weight set onto its grid
        point would start every element at the same distance from both neighbours, and the outer ones on the clip edge,
        where LSQ's gradient is 0.
        """
        if isinstance(self.spec.grid, NF4):
            return self.dequantize(q_ON)
        qmin, qmax, offset = grids.limits(self.spec.grid)
        q = self.groups(q_ON).float()
        scale, zero_point = self.grid_of_groups(self.scale, self.zero_point)
        shift = zero_point - offset
        v = self.groups(weight_ON.float()) / scale + shift
        low = torch.where(q == qmin, q + 0.02, q - 0.48)
        high = torch.where(q == qmax, q - 0.02, q + 0.48)
        v = torch.minimum(torch.maximum(v, low), high)
        return from_groups((v - shift) * scale, self.in_features)

    @torch.no_grad()
    def off_the_edges(self, weight_ON: Tensor) -> Tensor:
        """`weight_ON` with what lies on an edge between two cells 0.15 of a step inside its own: [O, N]; integers stay.

        `shadow` leaves those weights on edges that a solver put into another cell than the nearest. The first steps of
        an optimizer are as large for all weights, and would throw half of them back at once. Much further inside, the
        error that is watched would start below what it is among weights anywhere in their cells. For even grids of two
        bits and more; what is clipped stays where it is.
        """
        if not isinstance(self.spec.grid, Int | Balanced):
            return weight_ON
        offset = grids.limits(self.spec.grid)[2]
        q = self.groups(self.integers(weight_ON)).float()
        scale, zero_point = self.grid_of_groups(self.scale, self.zero_point)
        shift = zero_point - offset
        v = self.groups(weight_ON.float()) / scale + shift
        edge = ((v - q).abs() > 0.47) & ((v - q).abs() < 0.51)
        inside = (q + 0.35 * (v - q).sign() - shift) * scale
        moved = torch.where(edge, inside, self.groups(weight_ON.float()))
        return from_groups(moved, self.in_features).to(weight_ON.dtype)

    @torch.no_grad()
    def integer_weight(self, weight_ON: Tensor) -> IntegerWeight:
        """The weight as the integer product takes it: what `PackedWeight` will hold."""
        offset = grids.limits(self.spec.grid)[2]
        shift = (offset - self.zero_point.float()).squeeze(-1)
        no_shift = not offset and not self.is_asymmetric
        scale = self.scale.squeeze(-1)
        return IntegerWeight(self.integers(weight_ON), scale, None if no_shift else shift, self.spec.group_size)
