"""A model run from one of its blocks on, the outputs of the blocks before being known.

What a change in block l does can be seen by running blocks l and later only: half of the work on average. The blocks
before return what they returned in the last full pass. Whether a model lets that be done is tried out, not assumed:
where skipping all blocks but the last does not give the same logits bit for bit, every pass is a full one, and `notes`
say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.models.structure import blocks

CACHE_BYTES = 2 << 30


class Suffix:
    """`model` on fixed `batches`: `logits(i, start)` skips the first `start` blocks in the order they run.

    The model must be in eval mode. Call `refresh` after every change that is to stay.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.model, self.cache_bytes = model, cache_bytes
        self.batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
        self.notes: list[str] = []
        self.order: list[nn.Module] = []
        self.start_of: dict[str, int] = {}  # layer -> blocks that had ended when it was first called
        self.outputs: list[list[Any]] = []
        self.logits_now: list[Tensor] = []
        self.dropped = False  # the outputs of some batch were too many to keep
        self.can_skip = False
        self._watch()
        self.refresh()
        self.can_skip = self._fits() and self._is_same()
        if not self.can_skip:
            self.order = []
            self.outputs = [[] for _ in self.batches]

    def logits(self, index: int, start: int = 0) -> Tensor:
        """[B, T, V] or [B, C] on batch `index`."""
        if not self.can_skip or start == 0:
            return self._run(index)
        with self._skipping(self.outputs[index], start):
            return self._run(index)

    def until(self, index: int, start: int, layer: nn.Module, see: Callable[[Tensor], None]) -> None:
        """Call `see` with what `layer` is called with on batch `index`, and end the pass there."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(args[0])
            raise _Seen

        handle = layer.register_forward_pre_hook(hook)
        try:
            self.logits(index, start)
        except _Seen:
            pass
        finally:
            handle.remove()

    def refresh(self, start: int = 0) -> None:
        """Remember each block's output as the model is now. `start`: blocks before it have not changed."""
        size = 0
        for index in range(len(self.batches)):
            logits, outputs = self._noted(index, start)
            size += sum(t.numel() * t.element_size() for output in outputs for t in _tensors(output))
            self.dropped = size > self.cache_bytes
            self.logits_now[index : index + 1] = [logits]
            self.outputs[index : index + 1] = [[] if self.dropped else outputs]

    @torch.no_grad()
    def _run(self, index: int) -> Tensor:
        cache = {"use_cache": False} if bool(getattr(getattr(self.model, "config", None), "use_cache", False)) else {}
        result = self.model(**self.batches[index], **cache)
        logits = getattr(result, "logits", result)
        assert isinstance(logits, Tensor)
        return logits

    def _noted(self, index: int, start: int) -> tuple[Tensor, list[Any]]:
        outputs: list[Any] = []
        handles = [b.register_forward_hook(lambda _m, _a, result: outputs.append(result)) for b in self.order]
        try:
            return self.logits(index, start), outputs
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self) -> None:
        """The order of the blocks, and how many of them had ended before each layer's first call."""
        named = [b for n, b in blocks(self.model) if n]
        called: list[nn.Module] = []
        handles = [b.register_forward_hook(lambda m, _a, _r: called.append(m)) for b in named]

        def on_call(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self.start_of.setdefault(name, len(called))

            return hook

        handles += [m.register_forward_pre_hook(on_call(n)) for n, m in self.model.named_modules() if n]
        try:
            self._run(0)
        finally:
            for handle in handles:
                handle.remove()
        self.order = called
        if len(called) != len(named) or len({id(m) for m in called}) != len(called):
            self.notes.append("the blocks do not run once each in a pass: every measurement ran the whole model")
            self.order = []

    def _fits(self) -> bool:
        """Whether there are blocks whose outputs could all be kept."""
        if self.dropped:
            most = self.cache_bytes / 2**30
            self.notes.append(
                f"the blocks' outputs take more than {most:.1f} GiB: every measurement ran the whole model"
            )
        return bool(self.order) and not self.dropped

    def _is_same(self) -> bool:
        with self._skipping(self.outputs[0], len(self.order) - 1):
            same = torch.equal(self._run(0), self.logits_now[0])
        if not same:
            self.notes.append("the blocks do not just feed one another: every measurement ran the whole model")
        return same

    @contextmanager
    def _skipping(self, outputs: list[Any], start: int) -> Iterator[None]:
        skipped = self.order[:start]
        for block, output in zip(skipped, outputs):
            block.forward = _Known(output)
        try:
            yield
        finally:
            for block in skipped:
                del block.forward


class _Known:
    """A block's answer without the work."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.output


class _Seen(Exception):
    """What was wanted has been seen."""


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for part in output for t in _tensors(part)] if isinstance(output, tuple | list) else []
