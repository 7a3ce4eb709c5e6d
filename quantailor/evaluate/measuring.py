"""The state a model is in while it is measured, and out of which it is brought back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

Progress = Callable[[int, int], None]  # called with (rows done, rows in all)


@contextmanager
def measuring(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode, without gradients; gives the device that inputs go to.

    Afterwards each module is in the mode it was in: a frozen part of a model in training stays frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    tensor = next(chain(model.parameters(), model.buffers()), None)
    model.eval()
    try:
        with torch.inference_mode():
            yield torch.device("cpu") if tensor is None else tensor.device
    finally:
        for module, mode in modes:
            module.training = mode
