"""The best iterate so far, and the way back to it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.lora import LoRALinear
from quantailor.nn.packed import PackedWeight
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.qat.distributed import put, whole

# Their buffers are set by calibration, or are integers that training leaves alone.
_SET_BEFORE = WeightQuantizer | ActivationQuantizer | PackedWeight | LoRALinear
Score = tuple[float, ...]  # lower is better, compared left to right; NaN counts as worst


class Best:
    """Keeps a copy of everything that training moves, at the step with the lowest score: parameters that train, and
    buffers that belong to the model's state, such as the running averages of a BatchNorm.

    Copies live on the CPU, in the parameters' own dtype: once the size of the trained weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.score: Score | None = None
        self.start_score: Score = ()
        self.step = -1
        self.start: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}

    def offer(self, step: int, score: Score) -> bool:
        """Keep the model as it is now if `score` is the best yet. The first offer is the start."""
        score = tuple(float("inf") if value != value else value for value in score)
        better = self.score is None or score < self.score
        if better:
            self.score, self.step = score, step
            self.state = self._copy()
            if not self.start:
                self.start, self.start_score = self.state, score
        return better

    def restore(self) -> None:
        """Put the best iterate back."""
        self._put(self.state)

    def restore_start(self) -> None:
        """Put the first offer back."""
        self._put(self.start)

    def _copy(self) -> dict[str, Tensor]:
        return {name: whole(tensor) for name, tensor in _moved(self.model)}

    def _put(self, state: dict[str, Tensor]) -> None:
        places = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        for name, value in state.items():
            put(places[name], value)


def _moved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for prefix, module in model.named_modules():
        if not isinstance(module, _SET_BEFORE):
            passing = module._non_persistent_buffers_set
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in passing:
                    yield name, buffer
