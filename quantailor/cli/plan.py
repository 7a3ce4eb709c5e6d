"""Before paying:   quantailor plan ./model --scheme w4a16-g128 --data train.jsonl --hardware 8xA100"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantailor.cli import options as o

if TYPE_CHECKING:
    from quantailor.cost.figures import Figure
    from quantailor.verbs.planning import Plan


def plan(
    model: Annotated[Path, typer.Argument(help="folder with config.json, or that file; no weight is read")],
    scheme: o.SchemeOption,
    data: Annotated[str | None, typer.Option(help="training data, or how many rows there are")] = None,
    hardware: Annotated[
        str | None, typer.Option(help="A100, 8xH100, ...; by default this machine, by a probe of about a minute")
    ] = None,
    price: Annotated[float | None, typer.Option(help="of one device and hour; replaces the table's")] = None,
    probe: Annotated[str, typer.Option(help="cached, or again: measure this machine anew")] = "cached",
    budget: Annotated[float | None, typer.Option(help="in the money of --price")] = None,
    tolerance: Annotated[str, typer.Option(help="loss allowed, as a share of the float model's figure")] = "2%",
    context: o.ContextOption = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    accumulate: Annotated[int, typer.Option(help="micro-batches an update", min=1)] = 1,
    epochs: Annotated[float | None, typer.Option(help="of the longer QAT; by default fit's number of steps")] = None,
    samples: o.SamplesOption = 128,
    rank: Annotated[int, typer.Option(help="of LoRA-QAT's adapters", min=1)] = 16,
    lora_targets: Annotated[
        str | None, typer.Option(help="layers that get them, by the last parts of their names; by default all")
    ] = None,
    no_weights: Annotated[bool, typer.Option("--no-weights", help="there is no trained model to start from")] = False,
    native: Annotated[bool, typer.Option("--native", help="an architecture made for few bits, such as BitNet")] = False,
    must_be_faster: Annotated[
        bool, typer.Option("--must-be-faster", help="smaller alone is not enough: without a kernel, say no")
    ] = False,
    monthly_cost: Annotated[
        float | None, typer.Option(help="of inference as it is now; with --speedup: pay-back")
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="of inference, as measured or promised")] = None,
    why_not: Annotated[str | None, typer.Option(help="say of another way why it was left: qat, hybrid, ...")] = None,
    rule: o.RuleOption = None,
    json: o.JsonOption = False,
) -> None:
    """Tell what it will cost, and which way to take, before anything is paid for or loaded.

    Memory, disk, steps, time and money of PTQ, hybrid, QAT, LoRA-QAT, progressive and from scratch, each with an
    interval and with what it rests on: counted, measured, table or assumed.

    Example:  quantailor plan ./model --scheme w4a16-g128 --data train.jsonl --hardware 8xA100 --price 1.8
    """
    from quantailor.verbs.planning import plan as make

    rows = int(data) if data is not None and data.isdigit() else None
    found = make(
        model,
        scheme,
        data=rows if rows is not None else None if data is None else Path(data),
        hardware=hardware,
        price=price,
        probe=probe,
        budget=budget,
        tolerance=o.share(tolerance),
        context=context,
        batch_size=batch_size,
        accumulate=accumulate,
        epochs_wanted=epochs,
        samples=samples,
        rank=rank,
        pretrained=not no_weights,
        native=native,
        must_be_faster=must_be_faster,
        monthly_cost=monthly_cost,
        speedup=speedup,
        rules=o.rules(rule),
    )
    document = found.to_json()
    document["lora"], lines = adapter(model, rank, lora_targets)
    if why_not is not None:
        answer = found.why_not(why_not)
        document["asked"] = {"why_not": why_not, "because": answer}
        lines += f"\nwhy not {why_not}: {answer}"
    o.show(document, "" if json else text(found) + lines, json)


def adapter(model: Path, rank: int, targets: str | None) -> tuple[dict[str, float] | None, str]:
    """What LoRA-QAT's adapters train, counted: for the document, and a line for people. (None, "") without a linear
    layer. Raises: UsageError for a target that is in no layer's name."""
    from quantailor.errors import UsageError
    from quantailor.nn.lora import LoRA
    from quantailor.verbs.adapters import lora_size

    names = None if targets is None else tuple(name.strip() for name in targets.split(",") if name.strip())
    try:
        size = lora_size(model, LoRA(r=rank, target_modules=names))
    except UsageError:
        if targets is not None:
            raise
        return None, ""
    where = "every linear layer" if names is None else ", ".join(names)
    document: dict[str, float] = {"rank": rank, "trainable": size.trainable, "total": size.total, "layers": size.layers}
    return document, f"\nadapters of rank {rank} on {where}: {size}"


def text(found: Plan) -> str:
    """The plan for people: tables, then the decision, then the command."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=118, highlight=False, no_color=True)
    target, disk = found.target, found.storage
    price = target.price
    table = Table(box=None, pad_edge=False)
    for name in (
        "way",
        "steps",
        "time",
        "device hours",
        f"at {price.value:g} an hour",
        "peak memory",
        "disk",
        "fits",
        "rests on",
    ):
        table.add_column(name, justify="left" if name in ("way", "fits", "rests on") else "right")
    for name, way in found.ways.items():
        table.add_row(
            ("→ " if name == found.decision.way else "  ") + name,
            f"{way.steps:,}" if way.steps else "–",
            _seconds(way.seconds),
            _short(way.hours.value),
            _amount(way.money),
            f"{_bytes(way.peak.value)} ±{(way.peak.high / way.peak.value - 1) * 100:.0f} %",
            _bytes(way.disk),
            {True: "yes", False: "NO", None: "?"}[way.fits],
            way.seconds.basis,
        )
    parts = Table(box=None, pad_edge=False)
    qat = found.ways["qat"].memory
    assert qat is not None
    for name, _ in qat:
        parts.add_column(name, justify="right")
    parts.add_row(*(_bytes(size) for _, size in qat))
    with console.capture() as capture:
        console.print(
            f"{found.model}: {found.num_parameters:,} parameters, {found.scheme}; on {target.name}, price "
            f"{price.value:g} an hour and device ({price.basis}: {price.source})",
            markup=False,
        )
        console.print(
            f"disk: {_bytes(disk.float_bytes)} float -> {_bytes(disk.total)} "
            f"({_bytes(disk.integers)} integers + {_bytes(disk.scales)} scales + {_bytes(disk.floats)} left float), "
            f"{disk.bits_per_weight:.2f} bits a weight (counted)",
            markup=False,
        )
        console.print(
            f"a step of QAT: {_seconds(found.step)}, {found.flops / 1e12:.3g} TFLOP a micro-batch "
            f"({found.step.basis}: {found.step.source})",
            markup=False,
        )
        for answer in found.kernels:
            console.print(f"kernel: {answer.runtime}: {answer.kernel} ({answer.why})", markup=False)
        console.print()
        console.print(table)
        console.print()
        console.print(f"memory of QAT at its peak ({qat.phase}):", markup=False)
        console.print(parts)
        console.print()
        console.print(f"decision: {found.decision.way} ({found.decision.to_json()['meaning']})", markup=False)
        for reason in found.decision.reasons:
            console.print(f"  because {reason.text}  [{reason.basis}: {reason.source}]", markup=False)
        for warning in found.decision.warnings:
            console.print(f"  warning: {warning}", markup=False)
        for finding in found.checklist:
            if finding.level != "ok":
                console.print(f"  {finding.level}: {finding.item}: {finding.text}", markup=False)
        if found.roi is not None:
            days = found.roi["payback_days"]
            back = "never" if days is None else f"in {days:.1f} days"
            console.print(f"  saves {found.roi['monthly_saving']:,.0f} a month, paid back {back} (speed-up: assumed)")
        for note in found.notes:
            console.print(f"  note: {note}", markup=False)
        console.print()
        console.print(f"next: {found.command}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _bytes(size: float) -> str:
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= least:
            return f"{size / least:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _time(seconds: float) -> str:
    for unit, least in (("years", 31_557_600.0), ("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= least:
            return f"{seconds / least:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def _seconds(figure: Figure) -> str:
    return f"{_time(figure.value)} ({_time(figure.low)} to {_time(figure.high)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _amount(figure: Figure) -> str:
    return f"{_short(figure.value)} ({_short(figure.low)} to {_short(figure.high)})"
