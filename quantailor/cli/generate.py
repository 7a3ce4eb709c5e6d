"""A look at the text:   quantailor generate ./model-w4 --prompt "Once upon a time" """

from __future__ import annotations

from typing import Annotated

import typer

from quantailor.cli import options as o


def generate(
    model: o.ModelArgument,
    prompt: Annotated[str, typer.Option(help="what the text starts with")] = "Once upon a time",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    json: o.JsonOption = False,
) -> None:
    """Continue a prompt greedily, with a float or quantized language model.

    Example:  quantailor generate ./model-w4 --prompt "Once upon a time" --max-new-tokens 100
    """
    from quantailor import api

    text = api.generate(model, prompt, max_new_tokens=max_new_tokens)
    o.show({"prompt": prompt, "text": text, "max_new_tokens": max_new_tokens}, text, json)
