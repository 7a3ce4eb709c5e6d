"""Orthogonal matrices that spread one large entry over all: Hadamard matrices of as many sizes as are cheap to make.

    Q = diag(signs) (S (x) C)      S: Sylvester's matrix / sqrt(s), C: a small orthogonal core, n = s * c

C is 1 x 1 for powers of two, else Paley's matrix of the smallest order 2^a * m that a prime gives (m the odd part of
n, a >= 2: 12, 20, 28, 36, 44, 104 ...), else a random orthogonal m x m block, whose entries are not all of one size.
Random signs in front make which coordinates add up, and which cancel, a matter of chance (QuaRot, arXiv:2404.00456,
section 3). S is never stored: `rotated` is a fast Walsh-Hadamard transform.
Sources: Sylvester 1867; Paley 1933, "On orthogonal matrices", constructions I and II.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Core = Literal["none", "paley", "random"]
_LARGEST_CORE = 1024  # its product is a dense one


@dataclass(frozen=True, eq=False)
class Rotation:
    """Q [n, n] in factors. `signs` [n] of +-1, `core` [c, c] orthogonal, both float64. A row costs n (c + log2 n)."""

    signs: Tensor
    core: Tensor
    kind: Core

    @property
    def size(self) -> int:
        return len(self.signs)

    @property
    def is_hadamard(self) -> bool:
        """Whether every entry of Q is +-1 / sqrt(n)."""
        return self.kind != "random"

    def rotated(self, x: Tensor) -> Tensor:
        """x @ Q along the last axis. Shapes: `x` [*, n]; returns x.dtype [*, n], computed in float64."""
        shape = x.shape
        y = (x.double() * self.signs.to(x.device)).reshape(-1, self.size // len(self.core), len(self.core))
        y = walsh_hadamard(y.transpose(1, 2)).transpose(1, 2) @ self.core.to(x.device)
        return y.reshape(shape).to(x.dtype)

    def matrix(self) -> Tensor:
        """Q itself, float64 [n, n]."""
        return self.rotated(torch.eye(self.size, dtype=torch.float64))


def rotation(n: int, seed: int = 0) -> Rotation:
    """A randomized Hadamard matrix of size n, or as near to one as the size allows; the same for the same seed.

    Raises: ValueError unless n >= 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: a rotation has a size of at least 1")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
    odd = n // (n & -n)
    if odd == 1:
        return Rotation(signs, torch.ones(1, 1, dtype=torch.float64), "none")
    order = 4 * odd
    while n % order == 0 and order <= _LARGEST_CORE:
        if (core := paley(order)) is not None:
            return Rotation(signs, core / math.sqrt(order), "paley")
        order *= 2
    return Rotation(signs, random_orthogonal(odd, generator), "random")


def walsh_hadamard(x: Tensor) -> Tensor:
    """x @ S with Sylvester's matrix divided by sqrt(s). Shapes: `x` [*, s], s a power of two; returns [*, s].

    >>> walsh_hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    shape, size, width = x.shape, x.shape[-1], 1
    x = x.reshape(-1, size)
    while width < size:
        pairs = x.view(len(x), -1, 2, width)
        x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).view(len(x), size)
        width *= 2
    return (x / math.sqrt(size)).view(shape)


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix of +-1, float64 [order, order]; None where no prime gives one of this order.

    I: order = q + 1 with q = 3 mod 4;  II: order = 2 (q + 1) with q = 1 mod 4;  q prime (prime powers are left out).
    """
    if _is_prime(q := order - 1) and q % 4 == 3:
        skew = _bordered(q, sign=-1.0)
        return skew + torch.eye(order, dtype=torch.float64)
    if order % 2 == 0 and _is_prime(q := order // 2 - 1) and q % 4 == 1:
        conference = _bordered(q, sign=1.0)
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, ones) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
    return None


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Uniformly random among orthogonal matrices, float64 [n, n] (Mezzadri 2007, math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).contiguous()


def _bordered(q: int, sign: float) -> Tensor:
    """Paley's conference matrix [q + 1, q + 1]: 0 on the diagonal, chi(a - b) inside, first row 1, column `sign`."""
    squares = {a * a % q for a in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if a in squares else -1.0 for a in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    inside = chi[(index[:, None] - index[None, :]) % q]
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:], matrix[0, 1:], matrix[1:, 0] = inside, 1.0, sign
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
