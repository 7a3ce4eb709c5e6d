"""Training that survives a kill -9: all that the next step depends on, as safetensors and JSON, no pickle.

    state-00000125.safetensors   weights and scales that train, buffers that changed, the optimizer's tensors, the best
                                 iterate, the averages, the random generators of every process
    the record (store/work.py)   step, schedule, rates, scores, and what is no tensor; written after the file, with its
                                 sha256

A checkpoint whose file is not what its record says has not happened: the one before it counts (two files are kept).
The position in the data follows from the step: the order of each epoch is drawn from the seed and the epoch's number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantailor.qat import distributed
from quantailor.qat.best import Best
from quantailor.store.header import read_header
from quantailor.store.tensors import read_tensor
from quantailor.store.work import PASSING, Work

KEPT = 2  # files of checkpoints; `Work` is to be opened with `states=KEPT`


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was found, in every process the same."""

    record: dict[str, Any]
    tensors: dict[str, Tensor]

    def of(self, kind: str) -> dict[str, Tensor]:
        """The tensors of one kind: `model`, `best`, `average`, `optimizer`, `random`, `stable`, `seen`."""
        return {name.partition("/")[2]: t for name, t in self.tensors.items() if name.startswith(kind + "/")}

    @torch.no_grad()
    def put_model(self, model: nn.Module) -> None:
        """Weights, scales and changed buffers, in place."""
        places = dict([*model.named_parameters(), *model.named_buffers()])
        for name, value in self.of("model").items():
            distributed.put(places[name], value)

    def put_best(self, best: Best) -> None:
        """`best` as it was: the model must still be at its start."""
        best.offer(0, numbers(self.record["start"]))
        if values := self.of("best"):
            best.state, best.score, best.step = values, numbers(self.record["best"]), self.record["best_step"]


def newest(work: Work | None) -> Restored | None:
    """The last sound checkpoint of `work`, which only process 0 has; sent to all."""
    found = None
    if work is not None and work.records:
        record = work.records[-1]
        facts = read_header(work.path(_file(record["step"])))
        found = record, {name: read_tensor(fact) for name, fact in facts.items()}
    found = distributed.from_rank(found)
    return None if found is None else Restored(*found)


def save(work: Work | None, trainer: Any, best: Best, changed: Mapping[str, Tensor], watched: dict[str, Any]) -> None:
    """A checkpoint behind the step that `trainer` has finished. Every process calls it; the first one writes.

    `changed`: buffers by name. `watched`: `tensors` (kind/name -> tensor) and what else the record is to hold.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model/{name}"] = distributed.whole(parameter)
    tensors |= {f"model/{name}": distributed.whole(buffer) for name, buffer in changed.items()}
    if best.step > 0:
        tensors |= {f"best/{name}": value.clone() for name, value in best.state.items()}
    state = _inner(trainer.optimizer).state_dict()
    others: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = distributed.whole(value)
            else:
                others.setdefault(str(index), {})[key] = value
    generators = distributed.from_all(_random_state())
    for rank, (found, _) in enumerate(generators):
        tensors |= {f"random/{rank}/{name}": value for name, value in found.items()}
    tensors |= {name: distributed.whole(value) for name, value in watched.pop("tensors").items()}
    if work is None:
        return
    step = trainer.state.global_step
    schedule = _inner(trainer.lr_scheduler, "scheduler").state_dict()
    record = {
        **watched,
        "step": step,
        "parts": trainer.parts,
        "trainer": json.loads(json.dumps(dataclasses.asdict(trainer.state), default=str)),
        "schedule": schedule,
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
        "others": others,
        "random": [gauss for _, gauss in generators],
        "start": words(best.start_score),
        "best": words(best.score or ()),
        "best_step": best.step,
    }
    path = work.path(_file(step))
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    work.finish(record, [path])


def restore_optimizer(restored: Restored, optimizer: Any, schedule: Any) -> None:
    """The optimizer's tensors and rates, and the schedule's place."""
    inner = _inner(optimizer)
    own = inner.state_dict()
    parameters = [p for group in inner.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in restored.of("optimizer").items():
        index, _, key = name.partition("/")
        parameter = parameters[int(index)]
        fits = value.shape == parameter.shape  # sharded as its parameter is; a count of steps is not
        state.setdefault(int(index), {})[key] = distributed.like(parameter, value) if fits else value
    for index_, entries in restored.record["others"].items():
        state.setdefault(int(index_), {}).update(entries)
    groups = [
        {**theirs, "params": ours["params"]} for theirs, ours in zip(restored.record["groups"], own["param_groups"])
    ]
    inner.load_state_dict({"state": state, "param_groups": groups})
    _inner(schedule, "scheduler").load_state_dict(restored.record["schedule"])


def restore_random(restored: Restored) -> None:
    """This process's random generators."""
    rank = distributed.rank()
    mine = {
        name.partition("/")[2]: t for name, t in restored.of("random").items() if name.partition("/")[0] == str(rank)
    }
    python, gauss = restored.record["random"][rank]
    random.setstate((3, tuple(mine["python"].tolist()), None if python is None else float(python)))
    words_, (place, has_gauss) = mine["numpy"][:-2].numpy(), mine["numpy"][-2:].tolist()
    numpy.random.set_state(("MT19937", words_.astype(numpy.uint32), place, has_gauss, float(gauss)))
    torch.set_rng_state(mine["torch"])
    if torch.cuda.is_available() and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"])


def _random_state() -> tuple[dict[str, Tensor], tuple[str | None, str]]:
    """(tensors, the two floats that Python and numpy keep), of this process."""
    _, words_, python = random.getstate()
    _, array, place, has_gauss, gauss = cast(tuple[str, Any, int, int, float], numpy.random.get_state())
    found = {
        "python": torch.tensor(words_),
        "numpy": torch.tensor([*array.tolist(), place, has_gauss]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found, (None if python is None else repr(python), repr(gauss))


class Buffers:
    """Which buffers of a model are no longer what they were, such as the running averages of a BatchNorm.

    Told by their bytes: a kernel that writes into a buffer does not always count up its version.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = {name: _digest(buffer) for name, buffer in model.named_buffers()}

    def changed(self) -> dict[str, Tensor]:
        """Name -> buffer."""
        return {name: b for name, b in self.model.named_buffers() if self.before.get(name) != _digest(b)}


def _digest(tensor: Tensor) -> bytes:
    """sha256 of its bytes."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(raw)).digest()  # type: ignore[arg-type]


def fingerprint(model: nn.Module) -> str:
    """sha256 of names, shapes and bytes of all parameters and buffers, and of which parameters train."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode())
        digest.update(_digest(tensor))
    return digest.hexdigest()


def words(score: tuple[float, ...]) -> list[str]:
    """A score in JSON, which has no infinity: exact."""
    return [repr(float(value)) for value in score]


def numbers(score: list[str]) -> tuple[float, ...]:
    """The other way."""
    return tuple(float(value) for value in score)


def _inner(wrapped: Any, name: str = "optimizer") -> Any:
    """accelerate's wrappers hold what they wrap under its own name."""
    return getattr(wrapped, name, wrapped)


def _file(step: int) -> str:
    return f"{PASSING}{step:08}.safetensors"


def trainer_state(restored: Restored, folder: Path) -> str:
    """The folder from which the Trainer reads what it wants to know itself: its own state, in JSON."""
    (folder / "trainer_state.json").write_text(json.dumps(restored.record["trainer"]))
    return str(folder)
