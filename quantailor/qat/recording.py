"""The recording of a run as a file: JSON lines with a schema version, safe under kill -9, strictly read.

    {"kind": "head", "format": "quantailor recording", "version": 1, "steps": 400, "every": 10, "layers": [...], "norms": [...]}
    {"kind": "measure", "step": 10, "loss": 0.31, "gradient": 1.2, "rate": 0.002, "tokens": 20480, "layers": {"error": [...]}, "norms": {...}}
    {"kind": "look", "step": 50, "score": [0.74], "loss": 0.33, "levels": [[...], null]}
    {"kind": "alarm", "step": 60, "alarm": "rate", "where": "...", "others": 3, "value": 0.4, "limit": 0.25, "action": "told"}
    {"kind": "end", "step": 400, "why": ""}

In `layers` and `norms` each measure is a list in the order of the head's names; null where there is no such number or
it is not finite. No time and no machine is in it, so equal runs have equal bytes, interrupted or not.

A line is appended whole, by one call. A run that is killed leaves whole lines and at most one torn one, which counts as
not written; a checkpoint knows how many lines belong to it and their sha256, and what came after is written again.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantailor.errors import UntrustedInput
from quantailor.qat.recorder import LAYER_MEASURES, NORM_MEASURES, Table
from quantailor.store.jsonio import depth_of, without_strings
from quantailor.store.paths import open_regular, shown
from quantailor.store.publish import DiskFull, is_disk_full, write_atomic

NAME = "recording.jsonl"
FORMAT, VERSION = "quantailor recording", 1
KINDS = ("loss", "rate", "scale", "norm", "range", "error", "clip", "gradient")  # of alarms: alarms.py
ACTIONS = ("told", "lowered", "went back", "stopped")
_LINE_BYTES, _FILE_BYTES, _DEPTH = 50_000_000, 1_000_000_000, 5


@dataclass(frozen=True)
class Head:
    """`steps` of the whole run, of which each `every`th is measured."""

    steps: int
    every: int
    layers: tuple[str, ...]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """What one step did. `loss`: mean over the steps since the measure before; `gradient`: its norm before clipping;
    `rate`: learning rate of the weights; `tokens` seen so far."""

    step: int
    loss: float | None
    gradient: float | None
    rate: float | None
    tokens: int
    layers: Table
    norms: Table


@dataclass(frozen=True)
class Look:
    """An evaluation on held-out data. `score`: lower is better, compared left to right; `loss`: of training, mean since
    the look before; `levels`: of each layer the share of weights on each level of its grid."""

    step: int
    score: tuple[float | None, ...]
    loss: float | None
    levels: tuple[tuple[float, ...] | None, ...] = ()


@dataclass(frozen=True)
class Alarm:
    """`where`: the layer or norm it is worst in, "" for the whole model; `others`: in how many more."""

    step: int
    alarm: str
    where: str
    others: int
    value: float | None
    limit: float
    action: str = "told"


@dataclass(frozen=True)
class End:
    """`why` a rule ended the run early; "" where all steps were made."""

    step: int
    why: str


Line = Measure | Look | Alarm | End
_KINDS: dict[str, type[Any]] = {"measure": Measure, "look": Look, "alarm": Alarm, "end": End}


@dataclass
class Recording:
    head: Head
    lines: list[Line] = field(default_factory=list)

    @property
    def measures(self) -> list[Measure]:
        return [line for line in self.lines if isinstance(line, Measure)]

    @property
    def looks(self) -> list[Look]:
        return [line for line in self.lines if isinstance(line, Look)]

    @property
    def alarms(self) -> list[Alarm]:
        return [line for line in self.lines if isinstance(line, Alarm)]

    @property
    def end(self) -> End | None:
        last = self.lines[-1] if self.lines else None
        return last if isinstance(last, End) else None

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return b"".join(_to_bytes(line) for line in (self.head, *self.lines))


Listener = Callable[[Recording], None]


def rounded(value: float) -> float | None:
    """To five digits, as the file has it; None unless it is finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def rounded_table(table: Table) -> Table:
    return {name: [None if v is None else rounded(v) for v in column] for name, column in table.items()}


class Tape:
    """A recording while it is made: in memory, and where there is a `path` in its file. `listeners` are
    given the recording behind each new line.

    Raises: DiskFull where there is no room for a line.
    """

    def __init__(self, head: Head, path: Path | None = None, listeners: Sequence[Listener] = ()) -> None:
        self.recording, self.path, self.listeners = Recording(head), path, listeners
        self._digest = hashlib.sha256(_to_bytes(head))
        if path is not None:
            write_atomic(path, _to_bytes(head))

    def add(self, line: Line) -> None:
        self.recording.lines.append(line)
        raw = _to_bytes(line)
        self._digest.update(raw)
        if self.path is not None:
            _append(self.path, raw)
        for listener in self.listeners:
            listener(self.recording)

    def mark(self) -> dict[str, Any]:
        """For a checkpoint: what belongs to it, on the disk."""
        if self.path is not None:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return {"lines": len(self.recording.lines), "sha256": self._digest.hexdigest()}

    def go_on(self, found: Recording | None, mark: dict[str, Any]) -> bool:
        """Take up `found`, cut where `mark` was made; False, and nothing is taken up, if it is not what was marked."""
        if found is None or found.head != self.recording.head:
            return False
        kept = Recording(found.head, found.lines[: mark["lines"]])
        raw = kept.to_bytes()
        digest = hashlib.sha256(raw)
        if digest.hexdigest() != mark["sha256"]:
            return False
        self.recording, self._digest = kept, digest
        if self.path is not None:
            write_atomic(self.path, raw)
        return True


def read(path: Path, *, finished: bool = True) -> Recording:
    """The recording in `path`, a file that a stranger may have written. `finished=False`: of a run in progress or
    killed, whose last line may be torn and is then left out.

    Raises: UntrustedInput naming the line, unless every one is what this version writes.
    """
    recording: Recording | None = None
    step = 0
    for number, raw, whole in _raw_lines(path):
        if not whole and not finished:
            break
        try:
            if not whole:
                raise ValueError("it does not end")
            value = _parsed(raw)
            if recording is None:
                recording = Recording(_head(value))
                continue
            line = _line(value, recording.head)
            if recording.end is not None:
                raise ValueError("it comes after the end")
            if line.step < step or line.step > recording.head.steps:
                raise ValueError(f"step {line.step} is out of order")
        except (ValueError, RecursionError) as error:
            raise UntrustedInput(
                f"{shown(path)}, line {number}: {shown(error)}; the file is damaged or not a recording of quantailor's"
            ) from error
        step = line.step
        recording.lines.append(line)
    if recording is None:
        raise UntrustedInput(f"{shown(path)} is empty, so it is no recording")
    if finished and recording.end is None:
        raise UntrustedInput(f"{shown(path)} has no end: it was cut off, or its run still goes on")
    return recording


# ------------------------------------------------------------------------------------------------ bytes


def _to_bytes(line: Head | Line) -> bytes:
    value = dataclasses.asdict(line)
    if isinstance(line, Head):
        value = {"kind": "head", "format": FORMAT, "version": VERSION, **value}
    else:
        value = {"kind": next(name for name, kind in _KINDS.items() if isinstance(line, kind)), **value}
    return (json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n").encode()


def _append(path: Path, raw: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        written = os.write(descriptor, raw)
        if written < len(raw):
            os.write(descriptor, raw[written:])
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(f"no room to write {shown(path)}; free some space and start the same run again") from error
        raise
    finally:
        os.close(descriptor)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(number from 1, the line, whether it has its end)."""
    total = 0
    with open_regular(path) as file:
        for number in range(1, 10**9):
            raw = file.readline(_LINE_BYTES + 1)
            if not raw:
                return
            total += len(raw)
            if len(raw) > _LINE_BYTES or total > _FILE_BYTES:
                raise UntrustedInput(f"{shown(path)}, line {number}: larger than any recording; the file is damaged")
            yield number, raw, raw.endswith(b"\n")


# ------------------------------------------------------------------------------------------------ strictness


def _parsed(raw: bytes) -> dict[str, Any]:
    if depth_of(without_strings(raw), _DEPTH) > _DEPTH:
        raise ValueError("it nests too deeply")
    value = json.loads(raw.decode("utf-8"), parse_constant=_refused)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON's")


def _head(value: dict[str, Any]) -> Head:
    if value.pop("kind", None) != "head" or value.pop("format", None) != FORMAT:
        raise ValueError("it is not the head of a recording")
    version = value.pop("version", None)
    if type(version) is int and version > VERSION:
        raise ValueError(f"version {version} is later than {VERSION}, the latest that this quantailor reads; upgrade")
    if version != VERSION:
        raise ValueError("it has no version")
    _check_keys(value, Head)
    names = {key: _strings(value[key]) for key in ("layers", "norms")}
    return Head(_whole(value["steps"], 1), _whole(value["every"], 1), **names)


def _line(value: dict[str, Any], head: Head) -> Line:
    kind = _KINDS.get(str(value.pop("kind", None)))
    if kind is None:
        raise ValueError("it is of no known kind")
    _check_keys(value, kind)
    step = _whole(value["step"], 0)
    if kind is Measure:
        layers = _table(value["layers"], LAYER_MEASURES, len(head.layers))
        norms = _table(value["norms"], NORM_MEASURES, len(head.norms))
        loss, gradient, rate = (_number(value[key]) for key in ("loss", "gradient", "rate"))
        return Measure(step, loss, gradient, rate, _whole(value["tokens"], 0), layers, norms)
    if kind is Look:
        levels = tuple(None if v is None else _shares(v) for v in _list(value["levels"], (0, len(head.layers))))
        return Look(step, tuple(map(_number, _list(value["score"], (1, 2)))), _number(value["loss"]), levels)
    if kind is Alarm:
        name, action = value["alarm"], value["action"]
        if name not in KINDS or action not in ACTIONS:
            raise ValueError("it is no alarm that this version knows")
        if value["where"] not in ("", *head.layers, *head.norms):
            raise ValueError("its alarm is about no layer of the run")
        limit = _number(value["limit"])
        if limit is None:
            raise ValueError("its alarm has no limit")
        return Alarm(step, name, value["where"], _whole(value["others"], 0), _number(value["value"]), limit, action)
    if not isinstance(value["why"], str):
        raise ValueError("its reason is no text")
    return End(step, value["why"])


def _check_keys(value: dict[str, Any], kind: type[Any]) -> None:
    wanted = {f.name for f in dataclasses.fields(kind)}
    if wrong := sorted(wanted ^ value.keys()):
        raise ValueError(f"{shown(wrong[0])} is {'missing' if wrong[0] in wanted else 'unknown'}")


def _whole(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError("a count is none")
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a number is none")
    return float(value)


def _list(value: Any, lengths: tuple[int, ...]) -> list[Any]:
    if not isinstance(value, list) or len(value) not in lengths:
        raise ValueError(f"a list has not {' or '.join(map(str, lengths))} entries")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value) or len(set(value)) != len(value):
        raise ValueError("names are none, or not different")
    return tuple(value)


def _shares(value: Any) -> tuple[float, ...]:
    numbers = [_number(v) for v in value] if isinstance(value, list) and 2 <= len(value) <= 16 else []
    if not numbers or any(v is None or not 0 <= v <= 1 for v in numbers):
        raise ValueError("shares of levels are none")
    return tuple(v for v in numbers if v is not None)


def _table(value: Any, names: tuple[str, ...], length: int) -> Table:
    if not isinstance(value, dict) or not value.keys() <= set(names):
        raise ValueError("it has a measure that this version does not know")
    return {name: [_number(v) for v in _list(column, (length,))] for name, column in value.items()}
