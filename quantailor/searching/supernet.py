"""A weight-sharing supernet for decoders: every smaller architecture is the leading part of each of its tensors.

Depth d keeps the first d blocks, width w the first w channels, h heads the first h heads of unchanged size (with as
many of them to a key-value head as before), ffn f the first f of the feed-forward channels. Trained by the sandwich
rule with in-place distillation: each step the largest learns the task, the smallest and some drawn in between learn
the largest's answers, each at bits of its own, fake-quantized: so weights are shared by widths *and* by grids.
Source: BigNAS, Yu et al. 2020, arXiv:2003.11142, section 3 (sandwich rule, in-place distillation); quantized sharing as
in APQ, Wang et al. 2020, arXiv:2006.08509. Axes: O = out_features, N = in_features.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from quantailor.data.examples import Examples
from quantailor.errors import UsageError
from quantailor.models.structure import blocks, modules_of
from quantailor.numerics.affine import fake_quantize
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.progress import Progress
from quantailor.qat.losses import kl_to_teacher, scored, task_loss
from quantailor.spec import Int


@dataclass(frozen=True, order=True)
class Architecture:
    """One network: blocks, channels of the hidden state, heads, feed-forward channels, and bits of its weights."""

    depth: int
    width: int
    heads: int
    ffn: int
    bits: int

    def __str__(self) -> str:
        return f"{self.depth} blocks, width {self.width}, {self.heads} heads, ffn {self.ffn}, {self.bits} bits"


NAMES = tuple(field.name for field in dataclasses.fields(Architecture))
_CONFIG = {
    "depth": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
}


@dataclass(frozen=True)
class ArchitectureSpace:
    """What may be chosen, each largest first; `group` is the scale groups' size of every candidate."""

    depth: tuple[int, ...]
    width: tuple[int, ...]
    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    bits: tuple[int, ...] = (4, 3, 2)
    group: int = 32

    def __post_init__(self) -> None:
        for name in NAMES:
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < 1:
                raise UsageError(f"{name}={values} must be different numbers above 0")
            object.__setattr__(self, name, tuple(sorted(values, reverse=True)))
        for bits in self.bits:
            Int(bits)

    @staticmethod
    def around(model: PreTrainedModel, changes: Mapping[str, tuple[int, ...]]) -> ArchitectureSpace:
        """The model itself and smaller ones: `changes`, or all, three quarters and half of what it has.

        Raises: UsageError for a model that cannot be cut so, and for values that it has not.
        """
        most = _most(model)
        found: dict[str, Any] = {}
        for name in _CONFIG:
            whole = most[name]
            found[name] = changes.get(name) or tuple(sorted({whole, max(1, 3 * whole // 4), max(1, whole // 2)}))
        share = most["heads"] // most["kv_heads"]
        if "heads" not in changes:
            found["heads"] = tuple(sorted({max(share, h // share * share) for h in found["heads"]}))
        found |= {name: changes[name] for name in ("bits",) if name in changes}
        space = ArchitectureSpace(**found)
        for name in _CONFIG:
            if max(getattr(space, name)) > most[name]:
                raise UsageError(f"{name}={max(getattr(space, name))} is more than the model's {most[name]}")
        if odd := [h for h in space.heads if h % share]:
            raise UsageError(f"heads={odd[0]}: {share} heads share a key-value head here; use multiples of {share}")
        return space

    @property
    def largest(self) -> Architecture:
        return Architecture(**{name: max(getattr(self, name)) for name in NAMES})

    @property
    def smallest(self) -> Architecture:
        return Architecture(**{name: min(getattr(self, name)) for name in NAMES})

    def drawn(self, draw: random.Random) -> Architecture:
        return Architecture(**{name: draw.choice(getattr(self, name)) for name in NAMES})

    def changed(self, one: Architecture, draw: random.Random) -> Architecture:
        """The same with one of its numbers, or two, drawn again."""
        names = draw.sample(NAMES, draw.choice((1, 2)))
        return dataclasses.replace(one, **{name: draw.choice(getattr(self, name)) for name in names})

    def __len__(self) -> int:
        count = 1
        for name in NAMES:
            count *= len(getattr(self, name))
        return count

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Supernet:
    """`model` is the largest network, whose tensors all others are parts of; training moves it in place."""

    def __init__(self, model: PreTrainedModel, space: ArchitectureSpace, *, quantized: bool = True) -> None:
        _most(model)
        self.model, self.space, self.quantized = model, space, quantized
        self._templates: dict[tuple[int, ...], PreTrainedModel] = {}

    def parts(self, one: Architecture) -> dict[str, Tensor]:
        """The tensors of a network, as views of the supernet's."""
        whole = dict(self.model.named_parameters())
        template = self._template(one)
        return {n: whole[n][tuple(slice(0, size) for size in p.shape)] for n, p in template.named_parameters()}

    def logits(self, one: Architecture, batch: Mapping[str, Tensor]) -> Tensor:
        """[rows, tokens, vocabulary], with gradients into the supernet; the blocks' matrices on the grid of `one`."""
        template, parts = self._template(one), self.parts(one)
        if self.quantized:
            for name in _block_matrices(template):
                parts[name] = on_grid(parts[name], one.bits, self.space.group)
        inputs = {n: batch[n] for n in ("input_ids", "attention_mask") if n in batch}
        answer: Tensor = functional_call(template, parts, kwargs={**inputs, "use_cache": False}).logits
        return answer

    def inherited(self, one: Architecture) -> PreTrainedModel:
        """A network of its own with a copy of the shared weights, in float."""
        model = copy.deepcopy(self._template(one))
        with torch.no_grad():
            parts = self.parts(one)
            for name, parameter in model.named_parameters():
                parameter.copy_(parts[name])
        return model.eval()

    def train(
        self,
        examples: Examples,
        steps: int,
        *,
        learning_rate: float = 2e-3,
        batch_size: int = 8,
        between: int = 2,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[float]:
        """So many steps of the sandwich rule, `between` networks drawn beside the ends. The largest's loss at each."""
        draw = random.Random(seed)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.1
        )
        rows, losses = _forever(examples, batch_size, seed), []
        with (progress or Progress()).task("supernet", steps) as advance:
            for _ in range(steps):
                batch = next(rows)
                optimizer.zero_grad()
                answer, targets = scored(self.logits(self.space.largest, batch), batch["labels"], "lm")
                loss = task_loss(answer, targets)
                loss.backward()
                teacher = answer.detach()
                for one in (self.space.smallest, *(self.space.drawn(draw) for _ in range(between))):
                    student, _ = scored(self.logits(one, batch), batch["labels"], "lm")
                    kl_to_teacher(student, teacher).backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                advance(1)
        return losses

    def _template(self, one: Architecture) -> PreTrainedModel:
        """A network of this shape, whose own weights are never used."""
        key = (one.depth, one.width, one.heads, one.ffn)
        if key not in self._templates:
            config = copy.deepcopy(self.model.config)
            most = _most(self.model)
            for name, field in _CONFIG.items():
                setattr(config, field, getattr(one, name))
            config.num_key_value_heads = one.heads * most["kv_heads"] // most["heads"]
            config.head_dim = most["head_dim"]
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: one.depth]
            with torch.random.fork_rng(devices=[]):
                made: Any = type(self.model)(config)
                self._templates[key] = made.to(self.model.dtype).eval()
        return self._templates[key]


def on_grid(weight_ON: Tensor, bits: int, group: int) -> Tensor:
    """Fake-quantized, straight-through; the step of a group is 2 mean|w| / sqrt(qmax), where LSQ starts
    (arXiv:1902.08153, section 2.1): it needs no search at each step."""
    grid = Int(bits)
    w = to_groups(weight_ON, group)
    scale = (2 * w.detach().abs().mean(-1, keepdim=True) / grid.qmax**0.5).clamp(min=1e-8)
    return from_groups(fake_quantize(w, scale, 0, grid.qmin, grid.qmax), weight_ON.shape[1])


def _block_matrices(model: nn.Module) -> list[str]:
    """Names of the weights that a scheme quantizes: the Linears of the blocks."""
    inside = [name + "." for name, _ in blocks(model) if name]
    return [f"{n}.weight" for n, _ in modules_of(model, nn.Linear) if n.startswith(tuple(inside))]


def _forever(examples: Examples, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from examples.batches(batch_size, shuffle=True, seed=seed)
        seed += 1


def _most(model: PreTrainedModel) -> dict[str, int]:
    """What the model has. Raises: UsageError where leading parts of its tensors are no smaller model of its kind."""
    config = model.config
    names = {**_CONFIG, "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
    missing = [field for field in names.values() if not isinstance(getattr(config, field, None), int)]
    if missing:
        raise UsageError(
            f"{type(model).__name__} cannot be cut into smaller ones: its config has no {missing[0]}; "
            "decoders of the Llama kind can (Llama, Mistral, Qwen)"
        )
    return {name: int(getattr(config, field)) for name, field in names.items()}
