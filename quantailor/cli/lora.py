"""What the shell says of adapters: the options of `train --lora`, and `quantailor merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantailor.cli import options as o
from quantailor.errors import UsageError

if TYPE_CHECKING:
    from quantailor.nn.lora import LoRA

RankOption = Annotated[
    int | None,
    typer.Option(
        "--lora",
        help="rank of an adapter inside the rounding, on a packed base: trains little, and merges exactly",
    ),
]
AlphaOption = Annotated[float | None, typer.Option("--lora-alpha", help="by default twice the rank")]
DropoutOption = Annotated[
    float | None, typer.Option("--lora-dropout", help="share of an adapter's inputs that a step leaves out")
]
TargetsOption = Annotated[
    str | None,
    typer.Option("--lora-targets", help="layers by the last parts of their names: q_proj,v_proj; by default all"),
]
BaseBitsOption = Annotated[
    int | None,
    typer.Option("--lora-base-bits", help="bits a weight that the frozen base keeps; by default 8, fractions included"),
]
InitOption = Annotated[
    str | None, typer.Option("--lora-init", help="zeros, or loftq: base and adapter found in turns by SVD")
]
BesideOption = Annotated[
    bool, typer.Option("--lora-beside", help="QLoRA: the adapter stands beside the rounding, and merging rounds again")
]
ScalesOption = Annotated[bool, typer.Option("--lora-scales", help="the grid's scales train with the adapter")]
AdapterOutOption = Annotated[
    Path | None, typer.Option("--adapter-out", help="new folder for the adapter alone, in peft's format")
]
BaseOutOption = Annotated[
    Path | None, typer.Option("--base-out", help="new folder for the base that the adapter belongs to")
]


def lora_of(
    rank: int | None,
    alpha: float | None,
    dropout: float | None,
    targets: str | None,
    base_bits: int | None,
    init: str | None,
    beside: bool,
    scales: bool,
    adapter_out: Path | None,
    base_out: Path | None,
    from_float: bool,
) -> LoRA | None:
    """The adapter that the options describe; None without --lora. Raises: UsageError for options that need others."""
    from quantailor.nn.lora import LoRA

    given = {
        "--lora-alpha": alpha,
        "--lora-dropout": dropout,
        "--lora-targets": targets,
        "--lora-base-bits": base_bits,
        "--lora-init": init,
        "--lora-beside": beside or None,
        "--lora-scales": scales or None,
        "--adapter-out": adapter_out,
        "--base-out": base_out,
    }
    if rank is None:
        if lonely := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{lonely[0]} is about an adapter, and none is trained; add --lora 16")
        return None
    if adapter_out is not None and base_out is None and from_float:
        raise UsageError(
            "--adapter-out saves an adapter without its base, and the model is float; add --base-out for the base"
        )
    names = None if targets is None else tuple(name.strip() for name in targets.split(",") if name.strip())
    return LoRA(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout or 0.0,
        target_modules=names,
        inside=not beside,
        base_bits=base_bits,
        init=init or "zeros",
        scales=scales,
    )


def merge(
    base: Annotated[Path, typer.Argument(help="the packed folder that the adapter was trained on", show_default=False)],
    adapter: Annotated[Path, typer.Argument(help="folder of the adapter alone", show_default=False)],
    out: o.OutOption,
    format: o.FormatOption = None,
    overwrite: o.OverwriteOption = False,
    json: o.JsonOption = False,
) -> None:
    """Merge an adapter into its base: an ordinary packed folder, with the very integers that were trained.

    An adapter that stood beside the rounding (QLoRA, or any that peft trained) is rounded again, and told by how much.

    Example:  quantailor merge ./base ./adapter --out ./merged

    Exit status 2 if the adapter belongs to another base.
    """
    from quantailor.cost.size import weight_file_bytes
    from quantailor.store.publish import new_folder
    from quantailor.verbs.adapters import adapter_details, load_adapter
    from quantailor.verbs.adapters import merge as merged
    from quantailor.verbs.model import fill

    o.check_format(format)
    with new_folder(out, overwrite=overwrite, inputs=[base, adapter]) as folder:
        both = load_adapter(base, adapter)
        result = merged(both)
        fill(folder, result, format, adapter_details(both))
    document: dict[str, Any] = {
        "out": str(out),
        "exact": both.model is not None and not any("beside" in note for note in result.notes),
        "size_bytes": weight_file_bytes(out),
        "notes": result.notes,
    }
    text = f"merged {adapter} into {base}; saved to {out}"
    o.show(document, "\n".join([text, *(f"note: {n}" for n in result.notes)]), json)
