"""The walk of ptq/driver.py over a model that is never whole in memory: one block's weights at a time.

    capture   what stands before the blocks runs; the blocks are stubs that note their arguments and pass their input on
    blocks    each is loaded, solved, packed to a file, run once more for what the next one gets, and let go
    the rest  a head that a rule quantizes, and the probe's logits, on the last block's outputs

A finished block is a step of `Work`: its packed file, its reports, and the hidden states that the next block starts
from, to the bit, so interrupted work goes on as if it had never stopped. The solving is the driver's own: the integers
are those of a model in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.models.loading import NotInParts, Skeleton
from quantailor.models.memory import free, large_blocks_mapped
from quantailor.models.prepare import FAKE_QUANT, State, prepare_layers
from quantailor.models.structure import blocks, modules_of
from quantailor.nn.fake_quant import FakeQuantEmbedding
from quantailor.progress import Progress, finishing
from quantailor.ptq import distributed
from quantailor.ptq.cache import Cache, StoredCall
from quantailor.ptq.chain import Chain
from quantailor.ptq.driver import Batch, Calibration, round_without_data
from quantailor.ptq.method import OnModel
from quantailor.ptq.walk import Run, Stop, run_until_stop, split_call, without_cache
from quantailor.recipe import Entry
from quantailor.store.work import PASSING, Work

Packer = Callable[[nn.Module, str, Path], dict[str, Any]]  # module, its full name, file to fill -> its record
PARTS, CACHE = "parts", "cache"  # folders in that of the work


@dataclass
class Packed:
    """What is on disk in the end: a record and a file for each block and each quantized layer outside of them.

    `logits` of the probe; None without one.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    logits: Tensor | None = None


def why_not_in_parts(skeleton: Skeleton, state: State, methods: Callable[[str], Chain]) -> str | None:
    """What stands against working block by block, as far as names tell; None if nothing does."""
    found = blocks(skeleton.model)
    if not found[0][0]:
        return "it has no repeated blocks"
    owner = _owner_of({name for name, _ in found})
    by_place: dict[tuple[Path, int], set[str]] = {}
    for name, fact in skeleton.facts.items():
        by_place.setdefault((fact.file, fact.start), set()).add(owner(name))
    if any(len(owners) > 1 for owners in by_place.values()):
        return "a block shares a weight with another part of it"
    for entry in _quantized(state):
        if owner(entry.name) and entry.kind == "Embedding":
            return f"{entry.name} is an embedding inside a block"
        chain = methods(entry.name)
        if any(True for _ in chain.parts_with(OnModel)):
            return f"{chain.name} rewrites the whole model"
    return None


@torch.no_grad()
def stream(
    skeleton: Skeleton,
    state: State,
    batches: Sequence[Batch],
    methods: Callable[[str], Chain],
    work: Work,
    pack: Packer,
    *,
    probe: Mapping[str, Tensor] | None = None,
    cache_bytes: int,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Solve what `state` says of the skeleton's model, block by block; without `batches`, from the weights alone.

    `pack` writes a part's tensors to a file. Steps that `work` has are not done again. `cache_bytes` bounds the
    activations held in memory; `device` is where blocks compute. Reports and notes go into `state`.
    Raises: NotInParts, before any block is solved, where the blocks do not just feed one another; else as `calibrate`.
    """
    bar = progress or Progress()
    with bar.task("calibrating", len(_quantized(state))) as advance, ExitStack() as stack:
        stack.enter_context(large_blocks_mapped())
        walk = _Stream(skeleton, state, batches, methods, work, pack, probe, cache_bytes, device, advance)
        stack.callback(walk.close)
        walk.before_the_blocks()
        count = len(work.records)
        while len(set(counts := distributed.from_all(count))) > 1:  # one process was killed a step earlier
            count = work.rewind(min(counts))
        if count:
            bar.say(f"going on after block {count} of {len(walk.blocks)}, which an earlier run finished")
        walk.take_up(count)
        for index in range(count, len(walk.blocks)):
            try:
                with finishing(f"block {index + 1} of {len(walk.blocks)}"):
                    walk.block(index)
            except BaseException as error:
                if not isinstance(error, Exception) and work.records:
                    bar.say(
                        f"block {len(work.records)} of {len(walk.blocks)} is finished; the same command goes on there"
                    )
                raise
        walk.after_the_blocks()
    return walk.packed


def _quantized(state: State) -> list[Entry]:
    return [entry for entry in state.inventory if entry.scheme is not None]


def _owner_of(prefixes: set[str]) -> Callable[[str], str]:
    """The block that a name lies in; "" outside of them."""

    def owner(name: str) -> str:
        parts = name.split(".")
        return next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in prefixes), "")

    return owner


class _Stream(Calibration):
    """The state of the walk. Batches are numbered from 0; the probe, where there is one, comes last."""

    def __init__(
        self,
        skeleton: Skeleton,
        state: State,
        batches: Sequence[Batch],
        methods: Callable[[str], Chain],
        work: Work,
        pack: Packer,
        probe: Mapping[str, Tensor] | None,
        cache_bytes: int,
        device: torch.device | None,
        advance: Callable[[int], None],
    ) -> None:
        self.skeleton, self.model, self.work, self.pack = skeleton, skeleton.model, work, pack
        self.device = device or torch.device("cpu")
        self.chains, self.has_data = methods, bool(batches)
        self.first = distributed.rank() == 0
        mine = distributed.share(batches) if batches else []
        self.batches = [{k: v.to(self.device) for k, v in b.items() if k != "labels"} for b in mine]
        super().__init__([b.get("attention_mask") for b in self.batches], methods, state, advance)
        self.carried = list(self.batches)
        if probe is not None and self.first:
            self.carried.append({k: v.to(self.device) for k, v in probe.items()})
        self.blocks = blocks(self.model)
        self.layers = _by_block(state, self.blocks)
        self.schemes = state.inventory.quantized
        shutil.rmtree(work.path(CACHE), ignore_errors=True)
        work.path(PARTS).mkdir(exist_ok=True)
        self.cache = Cache(work.path(CACHE), cache_bytes, self.device)
        self.calls: list[list[StoredCall]] = []
        self.as_tuple = False  # how the blocks give back what they made
        self.packed = Packed()
        inside = {id(module) for _, block in self.blocks for module in block.modules()}
        self.outside = [(n, m) for n, m in self.model.named_modules() if id(m) not in inside]
        self.stay: set[str] = set()  # outside layers whose grid a later one needs
        for _, block in self.blocks:
            block.forward = _pass_on

    def close(self) -> None:
        """Leave no trace on the skeleton."""
        for _, block in self.blocks:
            block.__dict__.pop("forward", None)
        shutil.rmtree(self.cache.folder, ignore_errors=True)

    # Before the blocks

    def before_the_blocks(self) -> None:
        """Solve embeddings that a rule quantizes, then note what each block is called with."""
        outside = [entry for entry in _quantized(self.state) if entry.name in self.layers[""]]
        early = [e.name for e in outside if e.kind == "Embedding"]
        places = {self._place(name) for name in early}
        early += [e.name for e in outside if e.name not in early and self._place(e.name) in places]
        self.late = [e.name for e in outside if e.name not in early]
        self.stay = {name for name in early if sum(self._place(n) == self._place(name) for n in early) > 1}
        self._prepare(early)
        for name in early:
            module: Any = self.model.get_submodule(name)
            if not self.has_data:
                round_without_data([(name, module)], self.state, self.chains)
                self.advance(1)
            elif isinstance(module, FakeQuantEmbedding):
                self.solve(name, module, None)
        self._capture()
        for name in early:
            module = self.model.get_submodule(name)
            if self.has_data and not isinstance(module, FakeQuantEmbedding):  # tied to one: solved with it
                self.solve(name, module, None)
            self._pack_outside(name, module)
            if name not in self.stay:
                module.weight_quantizer.enabled = False
        self._free_outside()

    def _place(self, name: str) -> tuple[Path, int]:
        fact = self.skeleton.facts[f"{name}.weight"]
        return fact.file, fact.start

    def _prepare(self, names: Iterable[str]) -> None:
        names = list(names)
        for name in names:
            self.skeleton.load(self.model.get_submodule(name), name, device=self.device)
        prepare_layers(self.model, {name: self.schemes[name] for name in names})

    def _pack_outside(self, name: str, module: nn.Module) -> None:
        if self.first:
            path = self.work.path(PARTS) / f"{len(self.packed.files):05}.safetensors"
            self.packed.records.append(self.pack(module, name, path))
            self.packed.files.append(path)

    def _capture(self) -> None:
        """Run every batch up to the last block; hidden states go into the cache, calls into `calls`.

        Raises: NotInParts unless the blocks run once each, in order, each on what the one before gave.
        """
        self._check_chain()
        with self._loading() as used:
            for number, batch in enumerate(self.carried):
                calls: list[StoredCall] = []
                keys: dict[int, str] = {}

                def note(index: int, hidden: Tensor, rest: list[Any], n=number, calls=calls, keys=keys) -> None:  # type: ignore[no-untyped-def]
                    if index == 0:
                        self.cache.put(f"hidden-0-{n}", hidden)
                    calls.append(StoredCall(self.cache, rest, keys, f"call-{n}"))
                    if index == len(self.blocks) - 1:
                        raise Stop

                self._pass(batch, note)
                self.calls.append(calls)
        if early := used & set(self.late):
            raise NotInParts(f"{min(early)} runs before the blocks and is quantized on data")

    def _check_chain(self) -> None:
        """A few tokens go through the whole model, the blocks being stubs; finds out what form their output has."""
        if not self.carried:  # no data, and the probe is another process's
            return
        few = {k: v[:1, :8] if v.dim() == 2 else v[:1] for k, v in self.carried[0].items()}
        for self.as_tuple in (False, True):
            try:
                with self._loading():
                    self._pass(few, lambda *_: None)
                return
            except (NotInParts, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                if self.as_tuple:
                    raise NotInParts(f"its blocks do not run apart from it: {error}") from error
            finally:
                self._free_outside()

    def _pass(self, batch: dict[str, Tensor], note: Callable[[int, Tensor, list[Any]], None]) -> None:
        """The model on a batch, up to where `note` (block's number, its input, its other arguments) raises Stop.

        Raises: NotInParts unless each block ran once, in order.
        """
        order: list[int] = []
        alive: list[Any] = []  # a tensor's id says which it is only while it lives

        def stub_for(index: int) -> Callable[..., Any]:
            def stub(*args: Any, **kwargs: Any) -> Any:
                hidden, rest = split_call(args, kwargs)
                if order != list(range(index)) or (order and hidden is not alive[0]):
                    raise NotInParts("its blocks do not just feed one another")
                order.append(index)
                alive.extend((hidden, rest))
                note(index, hidden, rest)
                return (hidden,) if self.as_tuple else hidden

            return stub

        for index, (_, block) in enumerate(self.blocks):
            block.forward = stub_for(index)
        try:
            run_until_stop(lambda: self.model(**without_cache(self.model, batch)))
        finally:
            for _, block in self.blocks:
                block.forward = _pass_on
        if len(order) != len(self.blocks):
            raise NotInParts("not every block runs in a pass")

    @contextmanager
    def _loading(self) -> Iterator[set[str]]:
        """While this lasts, what stands outside the blocks is loaded when it is first called. Yields what was."""
        used: set[str] = set()

        def hook_for(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, *_: Any) -> None:
                if name not in used:
                    used.add(name)
                    self.skeleton.load(module, name, deep=False, device=self.device)

            return hook

        outside = [(name, self.model.get_submodule(name)) for name, _ in self.outside]
        handles = [m.register_forward_pre_hook(hook_for(n)) for n, m in outside if _own_tensors(m)]
        try:
            yield used
        finally:
            for handle in handles:
                handle.remove()

    def _free_outside(self) -> None:
        for name, _ in self.outside:
            module = self.model.get_submodule(name)
            if name in self.stay:
                continue
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[own] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    # The blocks

    def take_up(self, count: int) -> None:
        """Start after the first `count` blocks, with what the work's records tell of them."""
        for record in self.work.records:
            self.state.layers |= record["layers"]
            self.state.notes += record["notes"]
            if self.first:
                self.packed.records.append(record["packed"])
                self.packed.files.append(self.work.path(record["file"]))
            self.advance(len(record["layers"]))
        self.hidden = self.cache.row(self._keys("hidden", count))
        needs = self.has_data and self._needs_float_path(count)
        self.float_hidden = self.cache.row(self._keys("float" if count else "hidden", count)) if needs else None
        if count:
            self.cache.row(self._keys("hidden", 0)).drop()
            for row in (self.hidden, self.float_hidden):
                for key in row.keys if row else ():
                    if (path := self._state(key)).exists():
                        self.cache.open(key, path)

    def _keys(self, kind: str, step: int) -> list[str]:
        count = len(self.carried) if kind == "hidden" else len(self.batches)
        return [f"{kind}-{step}-{number}" for number in range(count)]

    def _state(self, key: str) -> Path:
        return self.work.path(f"{PASSING}{key}.safetensors")

    def _needs_float_path(self, index: int) -> bool:
        """Whether the block of this number, or a later one, asks for the float model's activations."""
        return any(self.needs_float_path(self.layers[name]) for name, _ in self.blocks[index:])

    def block(self, index: int) -> None:
        """One step of the work."""
        name, block = self.blocks[index]
        del block.forward
        self.skeleton.load(block, name, device=self.device)
        prepare_layers(block, {n.removeprefix(f"{name}."): self.schemes[n] for n in self.layers[name]})
        noted, solved, final = len(self.state.notes), dict(self.solved), set(self.final)
        calls = [of_batch[index] for of_batch in self.calls]
        targets, keys = None, self._keys("float", index + 1)
        later = self.has_data and self._needs_float_path(index + 1)
        if self.has_data:
            files = [self._state(key) if later else None for key in keys]
            _, targets = self.solve_block(
                name,
                block,
                calls[: len(self.batches)],
                self.hidden[: len(self.batches)],
                self.float_hidden,
                lambda tensors: self.cache.keep(tensors, keys, files),
            )
        else:
            found = [(f"{name}.{n}", module) for n, module in modules_of(block, FAKE_QUANT)]
            round_without_data(found, self.state, self.chains)
            self.advance(len(found))
        written = self._go_on(index, block, calls)
        if targets is not None and self.float_hidden is not None:
            self.float_hidden.drop()
            self.float_hidden = self.cache.row(keys)
            if later:
                written += [self._state(key) for key in keys]
            else:
                self.float_hidden.drop()
                self.float_hidden = None
        record: dict[str, Any] = {
            "layers": {n: self.state.layers[n] for n in self.layers[name]},
            "notes": self.state.notes[noted:],
            "file": f"block-{index:05}.safetensors",
        }
        if self.first:
            path = self.work.path(record["file"])
            record["packed"] = self.pack(block, name, path)
            self.packed.records.append(record["packed"])
            self.packed.files.append(path)
            written.append(path)
        free(block)
        block.forward = _pass_on
        # A quantizer that is gone may leave its id to one of the next block's.
        self.solved, self.final = solved, final
        self.work.finish(record, written)
        distributed.barrier()

    def _go_on(self, index: int, block: nn.Module, calls: list[StoredCall]) -> list[Path]:
        """Replace the hidden states by what this block makes of them. Returns the files they are in."""
        last = index == len(self.blocks) - 1
        keys, written = self._keys("hidden", index + 1), []
        for number, (key, call) in enumerate(zip(keys, calls, strict=True)):
            if not last or self.late or number >= len(self.batches):  # else nobody asks for it
                self.cache.put(key, Run(block, self.hidden, number, call)(), self._state(key))
                written.append(self._state(key))
            self.cache.drop(self.hidden.keys[number])
        self.hidden = self.cache.row(keys)
        return written

    # After the blocks

    def after_the_blocks(self) -> None:
        """Solve quantized layers that come last, and run the probe to its end."""
        for of_batch in self.calls:
            of_batch.clear()
        self._prepare(self.late)
        late: dict[str, Any] = {name: self.model.get_submodule(name) for name in self.late}
        with self._loading():
            if self.has_data:
                runs = [lambda n=n, b=b: self._from_last_block(n, b) for n, b in enumerate(self.batches)]
                self.solve_units(late, runs)
            else:
                round_without_data(late.items(), self.state, self.chains)
                self.advance(len(late))
            for name, module in late.items():
                self._pack_outside(name, module)
            if len(self.carried) > len(self.batches):
                self.packed.logits = self._from_last_block(len(self.batches), self.carried[-1]).logits
        self.hidden.drop()

    def _from_last_block(self, number: int, batch: dict[str, Tensor]) -> Any:
        """The model's output on a batch whose last block has run already."""
        hidden = self.hidden[number]
        block = self.blocks[-1][1]
        block.forward = lambda *_, **__: (hidden,) if self.as_tuple else hidden
        for _, other in self.blocks[:-1]:
            other.forward = self._pass_on
        return self.model(**batch)

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        hidden = split_call(args, kwargs)[0]
        return (hidden,) if self.as_tuple else hidden


def _pass_on(*args: Any, **kwargs: Any) -> Any:
    return split_call(args, kwargs)[0]


def _own_tensors(module: nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _by_block(state: State, found: list[tuple[str, nn.Module]]) -> dict[str, list[str]]:
    """Quantized layers by the block they lie in; under "" those outside."""
    result: dict[str, list[str]] = {"": [], **{name: [] for name, _ in found}}
    owner = _owner_of({name for name, _ in found})
    for entry in _quantized(state):
        result[owner(entry.name)].append(entry.name)
    return result
