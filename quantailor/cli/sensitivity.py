"""Which layers hurt:   quantailor sensitivity ./model --data calib.txt --average-bits 4.5 --save-rules rules.txt"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress
from quantailor.errors import UsageError

if TYPE_CHECKING:
    from quantailor.verbs.mixing import Mixed
    from quantailor.verbs.sensitivity import Sensitivity


def sensitivity(
    model: o.ModelArgument,
    data: Annotated[Path, typer.Option(help="calibration data", show_default=False)],
    bits: Annotated[str, typer.Option(help="widths to try, by comma")] = "8,4,3,2",
    group_size: Annotated[int, typer.Option(help="weights that share a scale; 0: an output channel", min=0)] = 32,
    method: Annotated[str, typer.Option(help="what solves each layer: rtn, gptq, hqq")] = "gptq",
    how: Annotated[
        str | None, typer.Option(help="measured, or fisher (from gradients); by default what suits the model's size")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="nats of KL that a type of layers may cost")] = 0.01,
    untied: Annotated[bool, typer.Option("--untied", help="look at q, k, v and at gate, up one by one")] = False,
    average_bits: Annotated[
        float | None, typer.Option(help="also search the mix of schemes for this many bits a weight, scales counted")
    ] = None,
    choices: Annotated[str | None, typer.Option(help="schemes of that search, by comma")] = None,
    save_rules: Annotated[
        Path | None, typer.Option(help="new file: the mix, or the recommendation by type, a line a layer")
    ] = None,
    samples: o.SamplesOption = 128,
    context: o.ContextOption = 256,
    seed: o.SeedOption = 0,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Show how much each layer and each type of layer costs at few bits, and what to give each.

    Example:  quantailor sensitivity ./model --data calib.txt --average-bits 4.5 --save-rules rules.txt
    """
    from quantailor.spec import Scheme
    from quantailor.verbs.mixing import CHOICES, mixed, rule_lines
    from quantailor.verbs.model import load
    from quantailor.verbs.sensitivity import sensitivity as look

    if how not in (None, "measured", "fisher"):
        raise UsageError(f"--how {how!r} is none of measured, fisher; leave it out to let the size decide")
    if choices is not None and average_bits is None:
        raise UsageError("--choices are of the search for a mix; give --average-bits as well, or leave it out")
    if save_rules is not None and save_rules.exists():
        raise UsageError(f"{save_rules} exists and is left alone; name a new file with --save-rules")
    schemes = [Scheme.parse(c) for c in choices.split(",")] if choices is not None else list(CHOICES)
    source, bars = load(model), progress(quiet)
    shared: dict[str, Any] = {"method": method, "how": how, "samples": samples, "context": context, "seed": seed}
    found = look(source, data, _bits(bits), group_size=group_size or None, tied=not untied, progress=bars, **shared)
    found.recommend(tolerance)  # a wrong tolerance is told before the search
    mix = None
    if average_bits is not None:
        mix = mixed(source, data, average_bits=average_bits, choices=schemes, progress=bars, **shared)
    document = found.to_json() | {"recommendation": [vars(r) for r in found.recommend(tolerance)]}
    if mix is not None:
        document["mixed"] = mix.to_json()
    if save_rules is not None:
        lines = rule_lines(mix.rules if mix is not None else found.rules(tolerance))
        save_rules.write_text("\n".join(lines) + "\n", encoding="utf-8")
        document["rules_file"] = str(save_rules)
    o.show(document, _page(found, mix, tolerance), json)


def _bits(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--bits {text!r} is no list of widths; write 8,4,3,2") from error


def _page(found: Sensitivity, mix: Mixed | None, tolerance: float) -> str:
    """The heat map and what follows from it. Colours where the terminal has them; the figures stand there anyway."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    values = [v for row in found.rows for v in row.kl.values() if v is not None]
    values += [v for by_bits in found.types.values() for v in by_bits.values()]
    title = "KL from float, nats a position, one unit on the grid at a time"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("unit", no_wrap=True)
    table.add_column("type", no_wrap=True)
    for b in found.bits:
        table.add_column(f"{b} bits", justify="right", no_wrap=True)

    def cells(by_bits: dict[int, Any]) -> list[Text]:
        return [_cell(by_bits[b], values) for b in found.bits]

    for row in found.rows:
        table.add_row(Text(row.unit.name), row.unit.role, *cells(dict(row.kl)))
    table.add_section()
    for role, by_bits in found.types.items():
        table.add_row(Text("all together"), role, *cells(dict(by_bits)))
    console = Console(highlight=False)
    longest = max((len(row.unit.name) for row in found.rows), default=0)
    console.width = max(console.width, longest + 12 + 12 * (len(found.bits) + 1))
    with console.capture() as capture:
        console.print(table)
    lines = [
        *(line.rstrip() for line in capture.get().rstrip().splitlines()),
        "",
        f"fewest bits at which a whole type costs at most {tolerance:g} nats:",
    ]
    for r in found.recommend(tolerance):
        lines.append(
            f"  {r.role:<10} {f'{r.bits} bits' if r.bits is not None else f'over {max(found.bits)}':<8} {r.reason}"
        )
    lines.append(f"{found.how} with {found.method} on {found.positions:,} positions, {found.seconds:.0f} s")
    if mix is not None:
        lines += ["", mix.text()]
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def _cell(value: float | None, values: list[float]) -> Any:
    """A figure on a background from dark green to dark red, by the logarithm of its place among all."""
    from rich.text import Text

    if value is None:
        return Text("-")
    logs = [math.log10(max(v, 1e-8)) for v in values if math.isfinite(v)]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    at = 1.0 if not math.isfinite(value) else (math.log10(max(value, 1e-8)) - low) / max(high - low, 1e-9)
    red, green = int(150 * min(1.0, 2 * at)), int(120 * min(1.0, 2 - 2 * at))
    return Text(f" {value:.5f} ", style=f"white on rgb({red},{green},20)")
