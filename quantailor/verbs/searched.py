"""What `search` answers: the document of search.json, and its lines for people."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantailor.environment import environment
from quantailor.evaluate.result import jsonable
from quantailor.searching.auto_qat import Found
from quantailor.searching.latency import Latency
from quantailor.searching.shared_study import Tried
from quantailor.searching.space import Space
from quantailor.verbs.model import Result


@dataclass(frozen=True)
class Searched:
    """What `search` found. `verdict`: feasible, infeasible, or `trials` where no winner was to be trained.

    `data` is search.json: every trial, the front, the winner measured again, and what the search itself cost.
    """

    verdict: str
    data: dict[str, Any]
    out: Path | None

    @property
    def meets(self) -> bool:
        return self.verdict != "infeasible"

    def to_json(self) -> dict[str, Any]:
        return self.data

    def text(self) -> str:
        """Lines for people: the front, the winner, the cost."""
        data = self.data
        unit = data["cost_unit"]
        lines = [f"Pareto front of {len(data['trials'])} trials (loss relative to float, {unit}):"]
        by_number = {t["number"]: t for t in data["trials"]}
        for number in sorted(data["front"], key=lambda n: by_number[n]["cost"]):
            t = by_number[number]
            mark = "  <- winner" if data["winner"] and number == data["winner"]["number"] else ""
            lines.append(f"  {_cost(t['cost'], unit):>14}  {t['loss']:+8.2%}  trial {number:<3} {t['recipe']}{mark}")
        if data["latency_how"]:
            lines.append(f"latency: {data['latency_how']}")
        lines.append(_cost_line(data["cost"]))
        lines.append(data["sentence"])
        return "\n".join([*lines, *(f"note: {note}" for note in data["notes"])])


def document_of(
    found: Found, space: Space, budgets: dict[str, Any], latency: Latency | None, float_result: Result
) -> dict[str, Any]:
    """search.json, as far as the search alone has come."""
    return {
        "verdict": "trials",
        "metric": float_result.metric,
        "float": {"value": float_result.value},
        "budgets": budgets,
        "cost_unit": "ms" if latency else "bytes",
        "latency_how": latency.how if latency else None,
        "winner": None if found.winner is None else _trial(found.winner),
        "front": found.front,
        "trials": [_trial(t) for t in found.tried],
        "cost": {
            "search_seconds": found.seconds,
            "processor_seconds": found.processor_seconds,
            "trial_seconds": found.trial_seconds,
            "trials": len(found.tried),
            "workers": len({t.facts.get("worker") for t in found.tried}),
            "budget_seconds": 60 * budgets["minutes"],
        },
        "stopped": found.stopped,
        "space": space.to_json(),
        "environment": environment(),
    }


def _trial(tried: Tried) -> dict[str, Any]:
    facts = {n: v for n, v in tried.facts.items() if not n.startswith("look ") and n not in ("pid", "seconds_per_step")}
    looks = [v[:2] for n, v in sorted(tried.facts.items()) if n.startswith("look ")]
    point = tried.point.to_json()
    return {
        "number": tried.number,
        "recipe": str(tried.point),
        "point": point,
        "loss": tried.loss,
        "cost": tried.cost,
        **facts,
        "looks": looks,
    }


def only_trials(document: dict[str, Any], found: Found, notes: list[str], began: float, place: Path) -> Searched:
    """A worker's answer: the front so far."""
    document |= {"notes": [*notes, *found.notes], "study": str(place)}
    document["cost"] |= {"seconds": time.monotonic() - began}
    document["sentence"] = f"{found.stopped}; no model was trained beyond its trial: that is what --out is for"
    return Searched("trials", jsonable(document), None)


def sentence_of(document: dict[str, Any], excess: float) -> str:
    """The verdict in words, with every budget beside what was measured."""
    final, budgets = document["final"], document["budgets"]
    metric, unit = document["metric"], document["cost_unit"]
    limit = budgets["latency_ms"] if unit == "ms" else budgets["size_bytes"]
    cost = final["latency_ms"] if unit == "ms" else final["size_bytes"]
    parts = [f"{metric} {final['value']:.4g} ({final['loss']:+.2%} of float, at most {budgets['loss']:+.2%})"]
    parts.append(_cost(cost, unit) + (f" (at most {_cost(limit, unit)})" if limit is not None else ""))
    parts.append(f"{document['cost']['seconds'] / 60:.2f} of {budgets['minutes']:g} minutes")
    if excess <= 0:
        return f"feasible: {document['winner']['recipe']}: {', '.join(parts)}"
    return (
        f"infeasible, closest is {document['winner']['recipe']}: {', '.join(parts)}; "
        f"the worse of the two is {excess:.1%} over its budget"
    )


def _cost(value: float, unit: str) -> str:
    return f"{value:.3f} ms" if unit == "ms" else f"{int(value):,} bytes"


def _cost_line(cost: dict[str, Any]) -> str:
    winner = f", training the winner {cost['winner_seconds']:.0f} s" if "winner_seconds" in cost else ""
    return (
        f"the search cost {cost['trial_seconds']:.0f} s of {cost['trials']} trials by {cost['workers']} worker(s)"
        f"{winner}; {cost['seconds']:.0f} s in all of {cost['budget_seconds']:.0f} s"
    )
