"""Architectures scored under quantization: which part of a supernet is best at how many bits, within so many bytes.

A candidate's score is its loss in nats with the shared weights rounded to its own grid by the very PTQ that would serve
it (RTN on a few calibration rows), so a network that is good in float and does not survive its bits scores badly.
Search: candidates drawn evenly, then children of the best of them (regularized evolution's mutation, Real et al. 2019,
arXiv:1802.01548), each scored once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.models.prepare import pack_model, prepare
from quantailor.progress import Progress
from quantailor.ptq.driver import calibrate, methods_of
from quantailor.recipe import Recipe
from quantailor.searching.latency import size_bytes
from quantailor.searching.space import scheme_of
from quantailor.searching.supernet import Architecture, ArchitectureSpace, Supernet

_PARENTS = 5  # the best ones, that children are made of
_DRAWS = 200  # times of the candidates asked for, before a budget counts as too tight


@dataclass(frozen=True)
class Candidate:
    """`score`: nats a token under quantization, shared weights. `size_bytes` of the packed weights."""

    architecture: Architecture
    score: float
    size_bytes: int


def quantized_part(
    net: Supernet, one: Architecture, batches: Sequence[dict[str, Tensor]], method: str = "rtn"
) -> nn.Module:
    """A network of the supernet on its grid, simulated."""
    model = net.inherited(one)
    recipe = Recipe(scheme_of(one.bits, net.space.group, 16), (), method)
    state = prepare(model, recipe)
    calibrate(model, list(batches), methods_of(state, method), Progress())
    state.method = method
    return model


def packed_size(net: Supernet, one: Architecture) -> int:
    """Bytes of the packed weights of a network, from its shapes."""
    model = net.inherited(one)
    prepare(model, Recipe(scheme_of(one.bits, net.space.group, 16), (), "rtn"))
    return size_bytes(pack_model(model))


def search(
    net: Supernet,
    score: Callable[[Architecture], float],
    size: Callable[[Architecture], int],
    most_bytes: float,
    candidates: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Candidate]:
    """So many different networks within the bytes, the best first: half drawn, half children of the best.

    Raises: UsageError where not even the smallest fits.
    """
    if candidates < 1:
        raise UsageError(f"candidates={candidates} scores nothing; use 1 or more")
    space, draw = net.space, random.Random(seed)
    sizes: dict[Architecture, int] = {}
    if (least := size(space.smallest)) > most_bytes:
        raise UsageError(
            f"the smallest network of the space takes {least:,} bytes, over the {most_bytes:,.0f} allowed; "
            "allow more, or add smaller values to the space"
        )
    found: dict[Architecture, Candidate] = {}
    with (progress or Progress()).task("scoring", candidates) as advance:
        for _ in range(_DRAWS * candidates):
            if len(found) >= min(candidates, len(space)):
                break
            one = _proposed(space, found, candidates, draw)
            if one in found:
                continue
            if one not in sizes:
                sizes[one] = size(one)
            if sizes[one] <= most_bytes:
                value = score(one)
                found[one] = Candidate(one, value if math.isfinite(value) else math.inf, sizes[one])
                advance(1)
    return sorted(found.values(), key=lambda c: (c.score, c.size_bytes, c.architecture))


def _proposed(
    space: ArchitectureSpace, found: dict[Architecture, Candidate], candidates: int, draw: random.Random
) -> Architecture:
    if 2 * len(found) < candidates:
        return space.drawn(draw)
    parents = sorted(found.values(), key=lambda c: c.score)[:_PARENTS]
    return space.changed(draw.choice(parents).architecture, draw)


def kendall_tau(left: Sequence[float], right: Sequence[float]) -> float:
    """Kendall's tau-b of two rankings: (concordant - discordant) pairs over the geometric mean of untied pairs.

    >>> kendall_tau([1, 2, 3], [1, 3, 2])
    0.3333333333333333
    """
    if len(left) != len(right) or len(left) < 2:
        raise ValueError(f"{len(left)} and {len(right)} values are no two rankings of the same things")

    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    pairs = [(sign(left[i] - left[j]), sign(right[i] - right[j])) for i in range(len(left)) for j in range(i)]
    untied = math.sqrt(sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs))
    return sum(a * b for a, b in pairs) / untied if untied else math.nan
