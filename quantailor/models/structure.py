"""What a Transformer looks like: its blocks in the order they run, and which of its layers share an input.

Works from the module tree, so any model with lists of alike blocks is covered; nothing here knows an architecture by
name. A model without such lists is one block: itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.recipe import block_prefixes


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of each repeated block, in the order of the tree; [("", model)] where there is none."""
    modules = dict(model.named_modules())
    found = [
        (prefix + name, child)
        for prefix in block_prefixes(model)
        for name, child in modules[prefix.removesuffix(".")].named_children()
    ]
    return found or [("", model)]


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` wherever the module called `name` hangs: a shared one stays shared."""
    replace_all(model, {name: new})


def replace_all(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """`replace` for each of these names, in one walk through the model. None may lie within another."""
    instead = {id(model.get_submodule(name)): module for name, module in new.items()}
    for parent in list(model.modules()):
        for child in [child for child, module in parent._modules.items() if id(module) in instead]:
            setattr(parent, child, instead[id(parent._modules[child])])


def modules_of(model: nn.Module, kinds: type | tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """(name, module) of all modules of these types; a module that hangs in two places comes once, as torch lists it."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def logits_of(output: Any) -> Tensor:
    """What a model answers: its logits; those of starts and ends side by side [B, T, 2] where it points into a text;
    else the output itself."""
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    return logits
