"""What calibration keeps of a layer's input: X^T X, or only its diagonal, over the rows that count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantailor.errors import UntrustedInput
from quantailor.observers.ranges import rows_that_count
from quantailor.ptq import distributed


@dataclass
class Statistics:
    """Sums over calibration rows. N = input features (for a convolution: inputs times kernel).

    `hessian` float32 [N, N] = X^T X, None where only `diagonal` [N] was asked for; `cross` [N, N] = X^T X_float,
    with the same rows as they are in the float model, None where no method asked.
    """

    diagonal: Tensor
    hessian: Tensor | None
    cross: Tensor | None = None
    num_rows: int = 0
    rejected: int = 0
    batches: int = 0
    exact: Tensor | None = None  # `diagonal` in float64: the scales chosen by it then depend on no order of batches

    @staticmethod
    def empty(in_features: int, full: bool, device: torch.device, crossed: bool = False) -> Statistics:
        hessian, cross = (
            torch.zeros(in_features, in_features, device=device) if wanted else None for wanted in (full, crossed)
        )
        exact = torch.zeros(in_features, dtype=torch.float64, device=device)
        return Statistics(exact.float(), hessian, cross, exact=exact)

    def add(self, x_TN: Tensor, float_TN: Tensor | None = None) -> None:
        """Fold rows in; `float_TN`: the same rows in the float model. A batch that is not finite is only counted."""
        x = x_TN.detach().float()
        self.batches += 1
        if not bool(torch.isfinite(x).all()):
            self.rejected += 1
            return
        self.num_rows += x.shape[0]
        self.exact = self._sum() + x.square().sum(0, dtype=torch.float64)
        self.diagonal.copy_(self.exact)
        if self.hessian is not None:
            self.hessian.addmm_(x.t(), x)
        if self.cross is not None and float_TN is not None:
            self.cross.addmm_(x.t(), float_TN.detach().float())

    def _sum(self) -> Tensor:
        return self.diagonal.double() if self.exact is None else self.exact

    def share(self) -> None:
        """Sum with the statistics that other processes have of the same layer; nothing to do in a single one.

        Rows of the float model that one process lacks are left out by all.
        """
        if distributed.world() == 1:
            return
        if not all(distributed.from_all(self.cross is not None)):
            self.cross = None
        self.exact = self._sum()
        distributed.sum_((self.exact, self.hessian, self.cross))
        self.diagonal.copy_(self.exact)
        counts = distributed.from_all((self.num_rows, self.rejected, self.batches))
        self.num_rows, self.rejected, self.batches = (sum(values) for values in zip(*counts))

    def check(self, name: str) -> None:
        """Raises: UntrustedInput if over 1 % of the batches were not finite."""
        if self.rejected > 0.01 * self.batches:
            raise UntrustedInput(
                f"{name}: {self.rejected} of {self.batches} calibration batches held NaN or Inf inputs (limit 1 %); "
                "check the model in float on this data"
            )

    @property
    def importance(self) -> Tensor | None:
        """Mean of x_j^2, [N]; None where no row was seen or every input was zero."""
        if self.num_rows == 0 or not bool((self.diagonal > 0).any()):
            return None
        return self.diagonal / self.num_rows


def rows_of(x: Tensor, module: nn.Module, mask: Tensor | None) -> Tensor:
    """The input rows [T, N] that count: padding left out; for a convolution one row a position of the kernel."""
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:  # a grouped product has one X^T X a group: only their mean is kept
            x = x.unflatten(1, (module.groups, -1)).flatten(0, 1)
        padded = F.pad(x, module._reversed_padding_repeated_twice)  # what `padding` says, "same" included
        columns = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
        return columns.transpose(1, 2).flatten(0, 1)
    return rows_that_count(x, mask)
