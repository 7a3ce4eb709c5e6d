"""A look at the text:   quantailor generate ./model-w4 --prompt "Once upon a time" """

from __future__ import annotations

from typing import Annotated

import typer

from quantailor.cli import options as o


def generate(
    model: o.ModelArgument,
    prompt: Annotated[str, typer.Option(help="what the text starts with")] = "Once upon a time",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    reference: Annotated[
        bool, typer.Option("--reference", help="multiply as `check` does, bit for bit what was trained; slower")
    ] = False,
    cache_bits: Annotated[
        int | None,
        typer.Option(help="8: keys and values in int8, a quarter of their memory; else as they are"),
    ] = None,
    device: o.DeviceOption = "cpu",
    json: o.JsonOption = False,
) -> None:
    """Continue a prompt greedily, with a float or quantized language model, and show the text as it comes.

    Example:  quantailor generate ./model-w4 --prompt "Once upon a time" --max-new-tokens 100

    Packed weights are multiplied by the kernels that `quantailor bench` lists, and blocks like Llama's answer by one
    native call a token; logits differ from the proven ones by some 1e-4 of the largest, so that now and then another
    word may follow. How long the warm-up took and what runs is said on stderr.
    """
    from quantailor import api
    from quantailor.models.serving import choices
    from quantailor.verbs.model import placed

    ready = placed(api.load(model), device)
    for choice in [] if reference else choices(ready.model):
        if choice.few_rows == "float blocks":
            typer.echo(f"{choice.layers} layers of {choice.scheme} run on float blocks: {choice.why}", err=True)
    shown: list[str] = []

    def say(text: str) -> None:
        shown.append(text)
        typer.echo(text if len(shown) > 1 else prompt + text, nl=False)

    text = api.generate(
        ready,
        prompt,
        max_new_tokens=max_new_tokens,
        fast=not reference,
        cache_bits=cache_bits,
        on_text=None if json else say,
        on_note=lambda line: typer.echo(line, err=True),
    )
    if json:
        document = {"prompt": prompt, "text": text, "max_new_tokens": max_new_tokens, "reference": reference}
        o.show(document | {"cache_bits": cache_bits}, text, json)
    else:
        typer.echo("" if shown else text)
