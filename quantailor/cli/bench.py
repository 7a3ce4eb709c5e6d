"""How fast is it here:   quantailor bench ./model-w4"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress
from quantailor.errors import UsageError

if TYPE_CHECKING:
    from quantailor.verbs.benching import Bench


def bench(
    model: o.ModelArgument,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of a row, or of the prompt that is read", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="tokens that a language model makes", min=2)] = 32,
    batches: Annotated[str, typer.Option(help="rows a pass, for models that make no text; commas between")] = "1,32",
    rounds: Annotated[int, typer.Option(help="of timing; the first comes on top and is not counted", min=1)] = 3,
    with_float: Annotated[
        bool, typer.Option("--float/--no-float", help="time the model in float32 too; it needs that memory")
    ] = True,
    engines: Annotated[
        bool, typer.Option("--engines/--no-engines", help="export to ONNX and time ONNX Runtime and OpenVINO, if here")
    ] = True,
    device: o.DeviceOption = "cpu",
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Time a quantized model on this machine: which kernels run it, how fast, and what would serve it faster.

    Example:  quantailor bench ./model-w4 --new-tokens 64

    Prefill reads the prompt, all tokens in one pass: arithmetic is its limit. Decoding makes one token a pass and reads
    every weight for it: memory is its limit, so the share of what this memory reads is shown beside it. Small models
    stay in the caches and may pass 100 %. A second table has every shape of layer, the kernel that it takes at one row
    and at many, why, and the milliseconds of each other way.

    Threads are those of OMP_NUM_THREADS; bind them (OMP_PROC_BIND=true OMP_PLACES=cores), or they may share a core.
    Figures of one run may be compared with each other, not with those of another day.
    """
    from quantailor import api
    from quantailor.verbs.model import placed

    try:
        sizes = tuple(int(part) for part in batches.split(","))
    except ValueError:
        raise UsageError(f"--batches {batches!r} is no list of numbers; write 1,32") from None
    found = api.bench(
        placed(api.load(model), device),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batches=sizes,
        rounds=rounds,
        with_float=with_float,
        with_engines=engines,
        progress=progress(quiet),
    )
    o.show(found.to_json(), "" if json else _text(found), json)


def _text(found: Bench) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=118, highlight=False, color_system=None)
    engines = Table(box=box.SIMPLE, title=f"{found.scheme}, a second, median of {found.rounds} (lowest to highest)")
    counted = list(dict.fromkeys(name for row in found.rows for name in row.speeds))
    for name in ("engine", *counted):
        engines.add_column(name)
    if found.task == "lm":
        engines.add_column("share of the memory's limit")
    for row in found.rows:
        cells = [str(row.speeds[name]) if name in row.speeds else "–" for name in counted]
        if found.task == "lm":
            cells.append("–" if row.share_of_limit is None else f"{row.share_of_limit:.0%}")
        engines.add_row(row.engine, *cells)
    shapes = Table(box=box.SIMPLE, title="what each layer takes")
    for name in ("layers", "scheme", "out x in", "rows", "takes", "ms", "why"):
        shapes.add_column(name)
    for p in found.products:
        others = ", ".join(f"{ms:.3g} {way}" for way, ms in p.ms.items() if way != p.takes)
        shape = f"{p.out_features} x {p.in_features}"
        shapes.add_row(str(p.layers), p.scheme, shape, str(p.rows), p.takes, f"{p.ms[p.takes]:.3g} ({others})", p.why)
    with console.capture() as captured:
        console.print(engines)
        console.print(shapes)
    lines = [captured.get().rstrip()]
    lines += [
        f"note: {p.takes} was not the fastest for {p.out_features} x {p.in_features} at {p.rows} rows here"
        for p in found.products
        if not p.is_fastest
    ]
    lines += [f"{name}: {reason}" for name, reason in found.left_out.items()]
    machine = f"{found.threads} threads, memory reads {found.memory_gb_per_s:.1f} GB/s, load before {found.load:.1f}"
    lines.append(f"own kernels: {found.native}; {machine}")
    lines += [f"decoding: {found.decoding}"] if found.decoding else []
    lines += [f"fastest {counted}: {engine}" for counted, engine in found.fastest.items()]
    return "\n".join(lines)
