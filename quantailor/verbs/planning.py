"""Before anything is paid for: `plan`. Loads no weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantailor.cost import hardware as devices
from quantailor.cost import throughput
from quantailor.cost.checklist import Finding, Run, check
from quantailor.cost.economics import Alternative, Return, alternatives, return_on, saving, split
from quantailor.cost.figures import Figure
from quantailor.cost.hardware import Support, has_kernel, support
from quantailor.cost.skeleton import Skeleton, skeleton
from quantailor.cost.step import Batch, Step, trace_step
from quantailor.cost.storage import Storage, storage
from quantailor.cost.ways import Target, Way, epochs, ptq, scratch_steps, step_seconds, training
from quantailor.environment import environment
from quantailor.errors import UntrustedInput, UsageError
from quantailor.ptq.defaults import one_pass, rungs
from quantailor.qat.losses import kl_to_teacher
from quantailor.recipe import Inventory, Recipe, Rule
from quantailor.searching.decision import Decision, Facts, decide
from quantailor.searching.ladder import Goal
from quantailor.spec import Binary, Scheme, Ternary

BYTES_PER_TOKEN = 4  # of text, where no tokenizer has read it: assumed
IMAGE_LENGTH = 224


@dataclass(frozen=True)
class DataSize:
    """What is known of training data before it is read: rows of `context` tokens, and how that is known."""

    rows: int | None
    source: str
    basis: str = "counted"


@dataclass(frozen=True)
class Plan:
    """What `plan` found. `ways` by name; `decision` picks one; `command` runs it."""

    model: str
    scheme: str
    num_parameters: int
    target: Target
    storage: Storage
    ways: dict[str, Way]
    step: Figure
    flops: int
    decision: Decision
    command: str
    kernels: list[Support]
    checklist: list[Finding]
    data: DataSize
    epochs: float | None
    alternatives: list[Alternative]
    budget_split: dict[str, float] | None = None
    roi: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def why_not(self, way: str) -> str:
        """Why another way was left."""
        return self.decision.why_not(way)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "scheme": self.scheme,
            "num_parameters": self.num_parameters,
            "settings": self.settings,
            "hardware": self.target.to_json(),
            "kernels": [{"runtime": s.runtime, "kernel": s.kernel, "why": s.why} for s in self.kernels],
            "storage": self.storage.to_json(),
            "step_seconds": self.step.to_json(),
            "step_flops": self.flops,
            "ways": {name: way.to_json() for name, way in self.ways.items()},
            "decision": self.decision.to_json(),
            "command": self.command,
            "data": {"rows": self.data.rows, "source": self.data.source, "basis": self.data.basis},
            "epochs": self.epochs,
            "checklist": [finding.to_json() for finding in self.checklist],
            "budget_split": self.budget_split,
            "roi": self.roi,
            "alternatives": [vars(a) for a in self.alternatives],
            "notes": list(self.notes),
            "environment": environment(),
        }


def plan(
    model: str | Path,
    scheme: str | Scheme,
    *,
    data: str | Path | int | None = None,
    hardware: str | None = None,
    price: float | None = None,
    probe: str = "cached",
    budget: float | None = None,
    tolerance: float = 0.02,
    context: int = 256,
    batch_size: int = 8,
    accumulate: int = 1,
    epochs_wanted: float | None = None,
    samples: int = 128,
    rank: int = 16,
    pretrained: bool = True,
    native: bool = False,
    must_be_faster: bool = False,
    monthly_cost: float | None = None,
    speedup: float | None = None,
    rules: Sequence[Rule] = (),
    machine: throughput.Machine | None = None,
) -> Plan:
    """Memory, disk, steps, seconds, device hours and money of every way to `scheme`, and which one to take and why.

    `model`: a folder with config.json, or that file; no weight is read. `data`: a file, or how many rows there are.
    `hardware`: `A100`, `8xH100` and so on, None for this machine; `price` an hour of one device replaces the table's.
    `probe` "again" measures this machine anew; `machine` uses a measurement at hand. `budget` in the price's money.
    `monthly_cost` of inference as it is, with `speedup` as measured or promised, gives the pay-back.
    Raises: UsageError, UntrustedInput for what cannot be planned.
    """
    parsed = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
    _check(parsed, budget, tolerance, context, batch_size, accumulate, epochs_wanted, samples, rank, probe)
    if (monthly_cost is None) != (speedup is None):
        raise UsageError("a pay-back needs both what inference costs a month and the speed-up that is expected")
    target = _target(hardware, price, probe, machine)
    found = skeleton(model)
    inventory = Recipe(parsed, tuple(rules)).assign(found.model)
    assert parsed.weight is not None
    bits = parsed.weight.grid.bits
    size = data_size(data, context)
    disk = storage(inventory, torch.finfo(found.dtype).bits // 8)
    length = _length(found, context)
    batch = Batch(batch_size, length)
    trained = _traced(found, inventory, batch, teacher=True)
    goal = Goal()
    short, long = goal.short_steps, goal.long_steps
    rows_a_step = batch_size * accumulate
    if epochs_wanted is not None:
        if size.rows is None:
            raise UsageError(f"epochs={epochs_wanted} of what? give the data, or how many rows there are")
        long = max(1, math.ceil(epochs_wanted * size.rows / rows_a_step))
        short = max(1, long // 4)
    ways = _ways(found, inventory, disk, target, trained, batch, accumulate, samples, rank, short, long, size, bits)
    kernels = support(parsed, target.hardware.generation if target.hardware else None)
    facts = Facts(
        bits=bits,
        grouped=(parsed.weight.group_size or 10**9) <= 128,
        parameters=trained.num_parameters,
        pretrained=pretrained,
        architecture="native" if native else "standard",
        ternary_or_binary=isinstance(parsed.weight.grid, Binary | Ternary),
        rows=size.rows,
        tolerance=tolerance,
        budget=budget,
        costs={name: way.money.value for name, way in ways.items()},
        fits={name: way.fits for name, way in ways.items() if way.fits is not None},
        kernel=has_kernel(kernels),
        must_be_faster=must_be_faster,
    )
    decision = decide(facts)
    seen = epochs(long, rows_a_step, size.rows)
    quantized = [e for e in inventory if e.scheme]
    run = Run(
        bits=bits,
        pretrained=pretrained,
        epochs=seen,
        precision=str(found.dtype).removeprefix("torch."),
        half_is_faster=_half_is_faster(target),
        batch_size=batch_size,
        accumulate=accumulate,
        evaluations=goal.settings.evaluations,
        coverage=inventory.coverage,
        small_layers=sum(e.num_weights < 1000 for e in quantized),
        reuses=pretrained,
    )
    amount = ways[decision.way].money.value if decision.way in ways else 0.0
    return Plan(
        model=found.name,
        scheme=str(parsed),
        num_parameters=trained.num_parameters,
        target=target,
        storage=disk,
        ways=ways,
        step=step_seconds(target, trained, accumulate),
        flops=trained.flops,
        decision=decision,
        command=command(decision.way, model, parsed, data, long, target, tolerance),
        kernels=kernels,
        checklist=check(run),
        data=size,
        epochs=seen,
        alternatives=alternatives(long, bits, 8 * torch.finfo(found.dtype).bits // 8),
        budget_split=None if budget is None else split(budget, without=["qat"] if decision.way == "ptq" else []),
        roi=_roi(amount, monthly_cost, speedup, has_kernel(kernels)),
        notes=(*found.notes, *trained.notes),
        settings={
            "context": length,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "steps": {"short": short, "long": long},
            "samples": samples,
            "tolerance": tolerance,
            "budget": budget,
            "lora_rank": rank,
        },
    )


def _check(
    scheme: Scheme,
    budget: float | None,
    tolerance: float,
    context: int,
    batch_size: int,
    accumulate: int,
    epochs_wanted: float | None,
    samples: int,
    rank: int,
    probe: str,
) -> None:
    if scheme.weight is None:
        raise UsageError(
            f"scheme {scheme} leaves the weights in float: there is nothing to plan; use w8a8 or w4a16-g128"
        )
    if not 0 <= tolerance < 1:
        raise UsageError(f"tolerance={tolerance} must be 0 or more and below 1; 2% is 0.02")
    if budget is not None and not 0 <= budget < math.inf:
        raise UsageError(f"budget={budget} must be 0 or more")
    if epochs_wanted is not None and not 0 < epochs_wanted < 10_000:
        raise UsageError(f"epochs={epochs_wanted} must be above 0 and below 10000")
    if probe not in ("cached", "again"):
        raise UsageError(f"probe={probe!r} is neither cached nor again")
    for name, value, most in (
        ("context", context, 2**22),
        ("batch_size", batch_size, 2**20),
        ("accumulate", accumulate, 2**20),
        ("samples", samples, 2**24),
        ("rank", rank, 2**14),
    ):
        if not 1 <= value <= most:
            raise UsageError(f"{name}={value} must be from 1 to {most}")


def _target(hardware: str | None, price: float | None, probe: str, machine: throughput.Machine | None) -> Target:
    if hardware is not None:
        its = devices.device(hardware, price)
        return Target(f"{its.count}x{its.name}", its.price, its.count, its.memory_gb * 1e9, hardware=its)
    known = machine or throughput.measured(again=probe == "again")
    free = Figure(0.0, 0.0, 0.0, "assumed", "your own machine, no price given: --price sets one")
    return Target("this machine", free if price is None else devices.given(price), 1, _physical_memory(), machine=known)


def _physical_memory() -> float | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return None


def _half_is_faster(target: Target) -> bool:
    if target.hardware is not None:
        return target.hardware.peak.get("bfloat16", 0) > target.hardware.peak["float32"]
    assert target.machine is not None
    return target.machine.flops_per_second("bfloat16") > 1.2 * target.machine.flops_per_second()


def _length(found: Skeleton, context: int) -> int:
    if found.kind == "image":
        size = getattr(found.config, "image_size", IMAGE_LENGTH)
        return int(size) if isinstance(size, int) else IMAGE_LENGTH
    positions = getattr(found.config, "max_position_embeddings", None)
    return min(context, positions) if isinstance(positions, int) else context


def _traced(
    found: Skeleton, inventory: Inventory, batch: Batch, *, teacher: bool, lora: int | None = None, train: bool = True
) -> Step:
    distance = kl_to_teacher if teacher else None
    try:
        return trace_step(found, inventory.quantized, batch, distance=distance, lora=lora, train=train)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        if isinstance(error, UsageError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UntrustedInput(
            f"{found.name}: a step of {type(found.model).__name__} cannot be traced without its data ({first}); "
            "check the sizes in its config.json"
        ) from error


def _ways(
    found: Skeleton,
    inventory: Inventory,
    disk: Storage,
    target: Target,
    trained: Step,
    batch: Batch,
    accumulate: int,
    samples: int,
    rank: int,
    short: int,
    long: int,
    size: DataSize,
    bits: int,
) -> dict[str, Way]:
    forward = _traced(found, inventory, batch, teacher=False, train=False)
    common = {"rows": samples, "length": batch.length, "batch": batch.size, "bits": bits}
    scheme = next(iter(inventory.quantized.values()))
    descends = any("blockap" in name for name in rungs(scheme))
    quick = ptq(target, forward, None, inventory, disk, **common)
    ways = {"ptq": ptq(target, forward, trained if descends else None, inventory, disk, **common)}
    ways["hybrid"] = training(
        "hybrid", target, trained, short, disk, accumulate=accumulate, rows=batch.size, start=ways["ptq"].seconds,
        notes=(f"the best PTQ, then {short} steps",),
    )  # fmt: skip
    ways["qat"] = training(
        "qat", target, trained, long, disk, accumulate=accumulate, rows=batch.size, start=quick.seconds,
        notes=(f"one pass of PTQ, then {long} steps with a float teacher",),
    )  # fmt: skip
    if any(e.kind in ("Linear", "Conv1D") and e.scheme for e in inventory):
        adapted = _traced(found, inventory, batch, teacher=True, lora=rank)
        ways["lora-qat"] = training(
            "lora-qat", target, adapted, long, disk, accumulate=accumulate, rows=batch.size, start=quick.seconds,
            sources=0,
            notes=(f"rank {rank}: {adapted.trainable:,} trainable; weight gradients are computed all the same",),
        )  # fmt: skip
    stages = [b for b in (8, 4) if b > bits] + [bits]
    ways["progressive"] = training(
        "progressive", target, trained, len(stages) * long, disk, accumulate=accumulate, rows=batch.size,
        start=quick.seconds,
        notes=(f"stages of {', '.join(map(str, stages))} bits, {long} steps each, each as dear as the last stage's",),
    )  # fmt: skip
    own = trained if trained.teacher_bytes == 0 else _traced(found, inventory, batch, teacher=False)
    steps, how = scratch_steps(own, found.kind, size.rows, batch.size * accumulate, batch.length)
    if steps:
        ways["scratch"] = training(
            "scratch", target, own, steps, disk, accumulate=accumulate, rows=batch.size, sources=0, notes=(how,)
        )
    return ways


def data_size(data: str | Path | int | None, context: int) -> DataSize:
    """How many rows there are, reading no more than line ends. Raises: UntrustedInput if there is no file."""
    if data is None:
        return DataSize(None, "none given")
    if isinstance(data, int):
        if data < 1:
            raise UsageError(f"data={data} rows are none; leave it out where there is none")
        return DataSize(data, "rows that you said")
    path = Path(data)
    if not path.is_file():
        raise UntrustedInput(f"{path} is no file; name one, or say how many rows there are")
    if path.suffix in (".jsonl", ".csv", ".tsv"):
        header = int(path.suffix != ".jsonl")
        with path.open("rb") as stream:
            rows = sum(1 for line in stream if line.strip()) - header
        return DataSize(max(rows, 0) or None, f"lines of {path.name}")
    rows = path.stat().st_size // (BYTES_PER_TOKEN * context)
    source = f"bytes of {path.name} at {BYTES_PER_TOKEN} a token, {context} tokens a row"
    return DataSize(max(rows, 1), source, "assumed")


def _roi(cost: float, monthly: float | None, speedup: float | None, kernel: bool) -> dict[str, Any] | None:
    if monthly is None or speedup is None:
        return None
    if not kernel:
        return {
            "monthly_saving": 0.0,
            "payback_days": None,
            "why": "no runtime multiplies this scheme there: no saving",
        }
    found: Return = return_on(cost, saving(monthly, speedup))
    payback = None if math.isinf(found.payback_days) else found.payback_days
    first_year = None if math.isinf(found.first_year) else found.first_year
    return {
        **found.to_json(),
        "payback_days": payback,
        "first_year": first_year,
        "speedup": {"value": speedup, "basis": "assumed"},
    }


def command(
    way: str,
    model: str | Path,
    scheme: Scheme,
    data: str | Path | int | None,
    steps: int,
    target: Target,
    tolerance: float,
) -> str:
    """The command that takes this way: what is typed next."""
    path = Path(model)
    folder = path.parent if path.is_file() else path
    text = str(data) if isinstance(data, str | Path) else "TRAIN"
    device = "" if target.hardware is None else "   # on the hardware planned for"
    out = f"--out {folder.name or 'model'}-{scheme}"
    if way == "none":
        return "quantailor schemes"
    if way == "ptq":
        method = one_pass(scheme)
        given = f" --data {text}" if data is not None else ""
        if data is None:  # no solver without data
            method = "rtn"
        return f"quantailor quantize {folder} --scheme {scheme} --method {method}{given} {out}{device}"
    if way in ("hybrid", "qat"):
        goal = f"--tolerance {tolerance:g} --steps {max(4, steps)}"
        return f"quantailor fit {folder} --data {text} --scheme {scheme} {goal} {out}{device}"
    extra = {"lora-qat": " --lora 16", "scratch": " --from-scratch"}[way]
    return f"quantailor train {folder} --data {text} --scheme {scheme} --steps {steps}{extra} {out}{device}"
