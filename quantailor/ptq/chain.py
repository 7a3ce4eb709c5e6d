"""A method from its name: `gptq`, or a chain such as `smoothquant+gptq`, `magr+qronos+bias`.

One part of a chain finds the integers; the others come before and after it. Where none of those named does, it is what
one of them is published with (AWQ's clipped ranges), or RTN. A part that refines whole blocks (`autoround`) starts from
the solver named before it, or from its own.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantailor.errors import UsageError
from quantailor.ptq.method import Before, Finish, Method, OnBlock, OnModel, Refine, Solution
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.spec import QuantSpec


@dataclass(frozen=True)
class Chain:
    """Parts in the order named; `solver` is the one that finds the integers."""

    name: str
    parts: tuple[Any, ...]
    solver: Method

    @property
    def needs_hessian(self) -> bool:
        return any(getattr(part, "needs_hessian", False) for part in (*self.parts, self.solver))

    @property
    def needs_data(self) -> bool:
        """Whether it cannot do all it is named for without calibration data."""
        return self.needs_hessian or any(isinstance(p, OnModel | OnBlock | Refine | Finish) for p in self.parts)

    @property
    def needs_float_path(self) -> bool:
        return any(getattr(part, "needs_float_path", False) for part in (*self.parts, self.solver))

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        """The solver's integers, for the weight that the parts before it made."""
        report: dict[str, Any] = {}
        for part in self.parts:
            if isinstance(part, Before):
                weight_ON, lines = part.before(weight_ON, statistics, spec)
                report |= lines
        found = self.solver.solve(weight_ON, statistics, spec)
        return dataclasses.replace(found, report={**found.report, **report})

    def parts_with(self, hook: type) -> tuple[Any, ...]:
        """The parts that offer this hook."""
        return tuple(part for part in self.parts if isinstance(part, hook))


def as_chain(method: Method) -> Chain:
    """A chain of one part; a chain is itself."""
    return method if isinstance(method, Chain) else Chain(type(method).__name__.lower(), (method,), method)


def parse_method(text: str, known: Mapping[str, Any]) -> Chain:
    """The method that `text` names; `known` maps the names of parts to them.

    Raises: UsageError on an unknown part, one named twice, or two that both find the integers.
    """
    names = [name.strip().lower() for name in text.split("+")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"method {text!r}: {name!r} is none of {', '.join(known)}{hint}")
        if names.count(name) > 1:
            raise UsageError(f"method {text!r} names {name!r} twice; name each part once")
    parts = [known[name] for name in names]
    solvers = [(name, part) for name, part in zip(names, parts) if hasattr(part, "solve")]
    refiners = [name for name, part in solvers if isinstance(part, Refine)]
    plain = [(name, part) for name, part in solvers if name not in refiners]
    if len(plain) > 1 or len(refiners) > 1:
        both = " and ".join(name for name, _ in (plain if len(plain) > 1 else solvers))
        raise UsageError(f"method {text!r}: {both} each find the integers; keep one of them")
    if refiners and plain:  # it goes on from where the named solver stopped
        place = names.index(refiners[0])
        parts[place] = dataclasses.replace(parts[place], start=plain[0][1])
        solver: Method = parts[place]
    else:
        solver = solvers[0][1] if solvers else next((p.rounds_by for p in parts if hasattr(p, "rounds_by")), RTN())
    return Chain("+".join(names), tuple(parts), solver)
