"""The verbs. `import quantailor as qt` offers them; the shell's commands call them.

model = qt.quantize("path/to/model", "w4a16-g32", data="calib.txt")
model = qt.train(model, data="train.txt", steps=200)
qt.save(model, "out"); print(qt.check("out"))
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import quantailor
from quantailor import ptq
from quantailor.cost.size import bits_per_weight, num_weights, weight_file_bytes
from quantailor.data.encode import encode, start_token
from quantailor.data.examples import Examples
from quantailor.data.loading import Data, load_examples, overlap, split
from quantailor.errors import QualityGateFailed, UntrustedInput, UsageError
from quantailor.evaluate.adequacy import Adequacy, Solve, examine
from quantailor.evaluate.classification import ClassificationResult
from quantailor.evaluate.lm import LMResult
from quantailor.evaluate.parity import Parity, compare
from quantailor.evaluate.run import evaluate as measure
from quantailor.export import folder as folders
from quantailor.export.streamed import packer, write_streamed
from quantailor.models.loading import (
    NotInParts,
    Skeleton,
    Task,
    device_of,
    load_float,
    load_tokenizer,
    open_skeleton,
    task_of,
)
from quantailor.models.prepare import FAKE_QUANT, State, pack_model, planned, prepare, state_of, unpack_model
from quantailor.models.structure import modules_of
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.numerics.measures import relative_max_difference
from quantailor.progress import Progress
from quantailor.ptq import distributed
from quantailor.ptq.cache import DEFAULT_BYTES as DEFAULT_CACHE_BYTES
from quantailor.ptq.chain import Chain
from quantailor.ptq.defaults import one_pass
from quantailor.ptq.driver import calibrate, methods_of, round_without_data
from quantailor.ptq.statistics import Statistics
from quantailor.ptq.stream import PARTS, stream, why_not_in_parts
from quantailor.qat.settings import Settings
from quantailor.qat.train import TrainReport
from quantailor.qat.train import train as run_training
from quantailor.recipe import Recipe, Rule
from quantailor.report.markdown import fit_page
from quantailor.search.ladder import Goal, Ladder
from quantailor.spec import QuantSpec, Scheme
from quantailor.store.jsonio import write_json
from quantailor.store.manifest import NAME as MANIFEST
from quantailor.store.manifest import hash_folder, write_manifest
from quantailor.store.publish import DiskFull, check_room, is_disk_full, new_folder
from quantailor.store.untrusted import scan_model_folder
from quantailor.store.work import Work, work_folder

Result = LMResult | ClassificationResult


@dataclass
class Model:
    """A model with its tokenizer and its task, on its way from float to packed.

    `parent` names the folder it came from and its hash; `training` is the report of the last `train`; `details` is
    what a loaded folder's receipt tells of both, kept while the model stays as it was loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    parent: dict[str, str] = field(default_factory=dict)
    training: TrainReport | None = None
    notes: list[str] = field(default_factory=list)
    probe: dict[str, Tensor] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> State | None:
        """What was quantized and how; None while the model is float."""
        return state_of(self.model)

    @property
    def is_packed(self) -> bool:
        """Whether it holds integers only."""
        return self.state is not None and not any(True for _ in modules_of(self.model, FAKE_QUANT))


def load(path: str | Path, *, task: Task | None = None, num_labels: int | None = None, verify: bool = True) -> Model:
    """A model folder, float or quantized by quantailor. `verify=False` skips the hashes of a huge quantized one.

    Raises: UntrustedInput for a folder that cannot be trusted or is not whole; UsageError where the task does not fit.
    """
    path = Path(path)
    if not path.exists() and path.parent.is_dir():
        folders.recover(path)  # a writer may have been killed between its two renames
    if not (path / folders.RECEIPT).exists():
        plain = load_float(path, task, num_labels)
        parent = {"folder": path.name, "hash": hash_folder(path)}
        return Model(plain.model, plain.tokenizer, plain.task, parent, notes=list(plain.notes))
    loaded = folders.read_folder(path, verify_hashes=verify)
    stored, details = folders.stored_probe(path, loaded.model.config), loaded.receipt.get("details")
    return Model(
        loaded.model,
        loaded.tokenizer,
        loaded.task,
        {"folder": path.name},
        notes=list(loaded.state.notes),
        probe=stored[0] if stored else None,
        details=details if isinstance(details, dict) else {},
    )


def as_model(model: str | Path | Model, *, task: Task | None = None, num_labels: int | None = None) -> Model:
    """What every verb takes: a folder, or a model in memory."""
    return model if isinstance(model, Model) else load(model, task=task, num_labels=num_labels)


def examples_for(model: Model, data: Data | Examples, *, context: int = 256, limit: int | None = None) -> Examples:
    """Data read for this model's tokenizer and task. `context` is cut to what the model can take."""
    if isinstance(data, Examples):
        return data
    positions = getattr(model.model.config, "max_position_embeddings", None)
    longest = min(context, positions) if isinstance(positions, int) else context
    names = None
    if model.task == "classification":
        ordered = tuple(str(name) for _, name in sorted((model.model.config.id2label or {}).items()))
        names = None if all(name.startswith("LABEL_") for name in ordered) else ordered
    examples = load_examples(data, model.tokenizer, model.task, context=longest, limit=limit, label_names=names)
    _check_tokens(examples, model)
    return examples


def _check_tokens(examples: Examples, model: Model) -> None:
    """Raises: UntrustedInput if the tokenizer gives numbers that the model has no embedding for."""
    highest = max(int(batch["input_ids"].max()) for batch in examples.batches(1024))
    if highest >= model.model.config.vocab_size:
        raise UntrustedInput(
            f"the tokenizer gives token {highest}, and the model knows {model.model.config.vocab_size}: it is another "
            "model's; put the right tokenizer files into the model's folder"
        )


def recipe_for(
    scheme: str | Scheme, rules: Sequence[Rule] = (), *, method: str | None = None, ragged: bool = True
) -> Recipe:
    """A recipe from what the commands take. Raises: UsageError for an unknown scheme or method."""
    parsed = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
    for name in (method, *(rule.method for rule in rules)):
        if name is not None:
            ptq.method(name)
    if not ragged:
        parsed = parsed.with_ragged(False)
        rules = [
            dataclasses.replace(r, action=r.action.with_ragged(False)) if isinstance(r.action, Scheme) else r
            for r in rules
        ]
    return Recipe(parsed, tuple(rules), method or one_pass(parsed))


def quantize(
    model: str | Path | Model,
    scheme: str | Scheme,
    *,
    method: str | None = None,
    data: Data | Examples | None = None,
    samples: int = 128,
    context: int = 256,
    rules: Sequence[Rule] = (),
    ragged: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Model:
    """Post-training quantization with one method: the given model is left as it is, a simulated one comes back.

    `method`: one of `ptq.METHODS`, or a chain such as `smoothquant+gptq`; None: what ptq/defaults.py has for the
    scheme. `data`: calibration samples (`samples` rows are drawn); without data only what needs none (RTN, HQQ), on
    dynamic or weight-only schemes.
    Raises: UsageError, UntrustedInput as the parts do.
    """
    source = as_model(model)
    if source.state is not None:
        raise UsageError("the model is quantized already; start from its float parent")
    recipe = _recipe_for_ptq(scheme, rules, method or ("rtn" if data is None else None), ragged, seed)
    copied = dataclasses.replace(source, model=copy.deepcopy(source.model), notes=list(source.notes))
    state = prepare(copied.model, recipe)
    state.method = recipe.method
    chain = methods_of(state, recipe.method)
    if data is None:
        _check_without_data(state, chain)
        round_without_data(modules_of(copied.model, FAKE_QUANT), state, chain)
        state.notes.append(_WITHOUT_DATA)
        return copied
    examples = examples_for(copied, data, context=context)
    batches, notes = _drawn(examples, samples, seed)
    calibrate(copied.model, batches, chain, progress)
    state.notes += notes
    copied.probe = probe_of(examples)
    return copied


_WITHOUT_DATA = "quantized without data: every input channel counted alike"


def _recipe_for_ptq(scheme: str | Scheme, rules: Sequence[Rule], method: str | None, ragged: bool, seed: int) -> Recipe:
    if not 0 <= seed < 2**31:
        raise UsageError(f"seed={seed} must be 0 or more and below 2^31")
    recipe = recipe_for(scheme, rules, method=method, ragged=ragged)
    if recipe.scheme.is_float and not rules:
        raise UsageError("scheme float quantizes nothing; use `train` with it, or another scheme")
    return recipe


def _check_without_data(state: State, chain: Callable[[str], Chain]) -> None:
    """Raises: UsageError if a method or a static range needs data."""
    static = state.scheme.input is not None and not state.scheme.input.dynamic
    if any(chain(e.name).needs_data for e in state.inventory if e.scheme) or static:
        raise UsageError(
            f"{state.method} at {state.scheme} needs calibration data; give --data, "
            "or use --method rtn with a scheme without static ranges"
        )


def _drawn(examples: Examples, samples: int, seed: int) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Calibration batches, and what the receipt says of them."""
    batches, notes = examples.calibration_batches(samples, seed=seed)
    return batches, [f"calibration data: {note}" for note in (*examples.notes, *notes)]


@dataclass(frozen=True)
class QuantizedFolder:
    """What `quantize_folder` saved. `in_memory_because`: None where it worked block by block."""

    out: Path
    state: State
    num_weights: int
    in_memory_because: str | None = None


def quantize_folder(
    folder: str | Path,
    scheme: str | Scheme,
    out: str | Path,
    *,
    method: str | None = None,
    data: Data | Examples | None = None,
    samples: int = 128,
    context: int = 256,
    rules: Sequence[Rule] = (),
    ragged: bool = True,
    seed: int = 0,
    format: str | None = None,
    overwrite: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    device: str = "cpu",
    progress: Progress | None = None,
) -> QuantizedFolder:
    """`quantize` and `save` for a folder that may be larger than memory: one block's weights are there at a time.

    The same bytes as those two would write. Activations between blocks take `cache_bytes` of memory at most, then
    disk. After a kill the same call goes on behind the last finished block. Where torch.distributed is initialised,
    every process calls this, works on its share of the samples, and the first one writes.
    A model that cannot be taken apart is quantized in memory, and its receipt says why.
    Raises: as `quantize` and `save`; DiskFull, before any work, where the disk of `out` is too small.
    """
    folder, out = Path(folder), Path(out)
    if not folder.exists() and folder.parent.is_dir():
        folders.recover(folder)  # a writer may have been killed between its two renames
    if (folder / folders.RECEIPT).exists():
        raise UsageError("the model is quantized already; start from its float parent")
    recipe = _recipe_for_ptq(scheme, rules, method or ("rtn" if data is None else None), ragged, seed)
    options: dict[str, Any] = {"method": method, "samples": samples, "context": context, "seed": seed}
    with ExitStack() as stack:
        place = None
        if distributed.rank() == 0:
            place = stack.enter_context(new_folder(out, overwrite=overwrite, inputs=[folder]))
        distributed.barrier()
        work: Work | None = None
        try:
            skeleton = open_skeleton(folder)
            weights = num_weights(skeleton.model)
            state = planned(skeleton.model, recipe)
            state.method = recipe.method
            chain = methods_of(state, recipe.method)
            if reason := why_not_in_parts(skeleton, state, chain):
                raise NotInParts(reason)
            format_, _ = folders.choose_format(state.inventory, format)
            shell = Model(skeleton.model, skeleton.tokenizer, skeleton.task)
            batches: list[dict[str, Tensor]] = []
            notes, probe = [_WITHOUT_DATA], default_probe(shell)
            if data is None:
                _check_without_data(state, chain)
            else:
                examples = examples_for(shell, data, context=context)
                batches, notes = _drawn(examples, samples, seed)
                probe = probe_of(examples)
            parent = {"folder": folder.name, "hash": hash_folder(folder)}
            config = {
                "model": parent["hash"],
                "recipe": repr(recipe),
                "format": format_,
                "data": _fingerprint([*batches, probe]),
                "processes": distributed.world(),
                "device": device,
                "versions": {k: v for k, v in environment().items() if k not in ("threads", "device")},
            }
            work = _work_for(out, config, progress)
            _check_room(out, skeleton, state, batches, chain, work)
            packed = stream(
                skeleton,
                state,
                batches,
                chain,
                work,
                packer(state, format_),
                probe=probe,
                cache_bytes=cache_bytes,
                device=torch.device(device),
                progress=progress,
            )
            state.notes += notes
            if place is not None:
                write_streamed(
                    place,
                    skeleton,
                    state,
                    packed,
                    work.path(PARTS),
                    format=format,
                    probe=probe,
                    details={"parent": parent, "training": None},
                )
            result = QuantizedFolder(out, state, weights)
        except NotInParts as error:
            model = quantize(folder, scheme, data=data, rules=rules, ragged=ragged, progress=progress, **options)
            assert model.state is not None
            model.state.notes.append(f"the whole model was held in memory: {error}")
            weights = num_weights(model.model)
            if place is not None:
                _fill(place, model, format)
            result = QuantizedFolder(out, model.state, weights, str(error))
        except BaseException as error:
            if work is not None and (not work.records or isinstance(error, DiskFull) or is_disk_full(error)):
                work.remove()
            raise
    if distributed.rank() == 0:
        shutil.rmtree(work_folder(out), ignore_errors=True)
    distributed.barrier()
    return result


def _work_for(out: Path, config: dict[str, Any], progress: Progress | None) -> Work:
    """The work folder of this process: the first's is beside `out`, the others' lie in it."""
    world, rank = distributed.world(), distributed.rank()
    folder = work_folder(out)
    work = None
    for turn in range(world):
        if turn == rank:
            work = Work(folder / f"process-{rank}" if rank else folder, config, states=2 if world > 1 else 1)
        if turn == 0:
            distributed.barrier()
    assert work is not None
    if work.fresh_because and progress is not None:
        progress.say(f"the unfinished work in {work.folder} is not continued: {work.fresh_because}; starting afresh")
    return work


def _fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """sha256 of all tensors of some batches, in hexadecimal."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_room(
    out: Path,
    skeleton: Skeleton,
    state: State,
    batches: Sequence[Mapping[str, Tensor]],
    chain: Callable[[str], Chain],
    work: Work,
) -> None:
    """Raises: DiskFull unless the disk of `out` has room for the packed model, twice for a while, and for the hidden
    states before and after a block."""
    quantized = {name: scheme.weight for name, scheme in state.inventory.quantized.items()}
    size = 0.0
    places = set()
    for name, fact in skeleton.facts.items():
        if (fact.file, fact.start) in places:
            continue
        places.add((fact.file, fact.start))
        spec = quantized.get(name.removesuffix(".weight"))
        size += fact.num_bytes if spec is None else _packed_bytes(spec, prod(fact.shape), fact.shape[0])
    width = getattr(skeleton.model.config, "hidden_size", 0) * skeleton.dtype.itemsize
    rows = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    paths = 2 if any(chain(name).needs_float_path for name in quantized) else 1
    needed = int(2 * size + 2 * paths * rows * width)
    there = sum(path.stat().st_size for path in work.folder.rglob("*") if path.is_file())
    check_room(out, needed - there)


def _packed_bytes(spec: QuantSpec, num_weights: int, rows: int) -> float:
    scales = num_weights / spec.group_size if spec.group_size else rows
    return num_weights * spec.grid.bits / 8 + 5 * scales


def quantize_module(
    module: nn.Module,
    scheme: str | Scheme,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    method: str | None = None,
    rules: Sequence[Rule] = (),
    ragged: bool = True,
    progress: Progress | None = None,
) -> nn.Module:
    """PTQ of any `nn.Module` with Linear, Conv1D, Conv2d or Embedding layers; a simulated copy comes back.

    `batches`: keyword arguments of `module.forward`, one mapping a call. `pack_module` makes integers of the result;
    `quantailor_state` on it is the inventory. Raises: UsageError, UntrustedInput as the parts do.
    """
    recipe = recipe_for(scheme, rules, method=method, ragged=ragged)
    copied = copy.deepcopy(module)
    state = prepare(copied, recipe)
    state.method = recipe.method
    calibrate(copied, batches, methods_of(state, recipe.method), progress)
    return copied


def pack_module(module: nn.Module) -> nn.Module:
    """The packed twin of what `quantize_module` returned: integers only. The given module is left as it is."""
    return pack_model(copy.deepcopy(module))


def train(
    model: str | Path | Model,
    data: Data | Examples,
    *,
    scheme: str | Scheme | None = None,
    eval_data: Data | Examples | None = None,
    teacher: str | Path | Model | None = "self",
    settings: Settings | None = None,
    method: str | None = None,
    samples: int = 128,
    context: int = 256,
    rules: Sequence[Rule] = (),
    ragged: bool = True,
    progress: Progress | None = None,
) -> Model:
    """QAT: from PTQ (done first if the model is float) to the best iterate of training; never worse than its start.

    `scheme` "float" trains without quantization: the task fine-tune of a bare encoder, and the control. `teacher`
    "self" is the float model itself, None leaves only the task's loss. Without `eval_data` a tenth of `data` is held
    out to choose the best iterate. Raises: UsageError, UntrustedInput as the parts do.
    """
    settings = settings or Settings()
    parsed = scheme if isinstance(scheme, Scheme) or scheme is None else Scheme.parse(scheme)
    source, train_data, new_head = _for_training(model, data, context, settings.seed)
    if source.state is None and parsed is None:
        raise UsageError("the model is float: name a scheme to train for, or `float` for a plain fine-tune")
    if source.state is not None and parsed is not None:
        raise UsageError(
            f"the model is quantized already ({source.state.scheme}); leave the scheme out to train it further"
        )
    notes = list(source.notes) + [f"training data: {note}" for note in train_data.notes]
    if eval_data is None:
        train_data, held_out = split(train_data, 0.1, settings.seed)
        notes.append(
            f"no evaluation data: {len(held_out)} rows of the training data are held out to choose the best iterate"
        )
    else:
        held_out = examples_for(source, eval_data, context=context)
        if shared := overlap(train_data, held_out):
            notes.append(f"{shared} rows are in both the training and the evaluation data")
    is_float = parsed is not None and parsed.is_float and not rules
    if new_head and teacher == "self" and not is_float:
        teacher = None
        notes.append("the head is new, so the float model teaches nothing: trained on the task's own loss")
    reference = None if is_float else _teacher(source, teacher)
    if reference is None:  # no distance to keep: the task's own loss is all there is
        settings = dataclasses.replace(settings, kl_weight=0.0, task_weight=settings.task_weight or 1.0)
    if is_float:
        started = dataclasses.replace(source, model=copy.deepcopy(source.model))
    elif source.state is None:
        assert parsed is not None
        started = quantize(
            source,
            parsed,
            method=method,
            data=train_data,
            samples=samples,
            rules=rules,
            ragged=ragged,
            seed=settings.seed,
            progress=progress,
        )
    else:
        started = dataclasses.replace(source, model=copy.deepcopy(source.model))
        unpack_model(started.model)

    def score(candidate: Any) -> tuple[float, ...]:
        result = measure(candidate, held_out)
        return (
            (-result.value, result.mean_loss) if isinstance(result, ClassificationResult) else (result.nats_per_token,)
        )

    report = run_training(
        started.model, train_data, score, settings, teacher=reference.model if reference else None, progress=progress
    )
    if started.state is not None:
        started.state.notes += report.notes
        if report.improved:
            started.state.method += "+qat"
    return dataclasses.replace(
        started, training=report, notes=notes + report.notes, probe=probe_of(held_out), details={}
    )


def _for_training(
    model: str | Path | Model, data: Data | Examples, context: int, seed: int
) -> tuple[Model, Examples, bool]:
    """The model, its data, and whether it was a bare encoder: that gets a head for these classes, drawn by `seed`."""
    if isinstance(model, Model):
        return model, examples_for(model, data, context=context), False
    folder = Path(model)
    if isinstance(data, Examples) or not folder.exists() or (folder / folders.RECEIPT).exists():
        loaded = load(folder)
        return loaded, examples_for(loaded, data, context=context), False
    config = scan_model_folder(folder).config
    if task_of(config) is not None:
        loaded = load(folder)
        return loaded, examples_for(loaded, data, context=context), False
    longest = min(context, config.get("max_position_embeddings") or context)
    examples = load_examples(data, load_tokenizer(folder), context=longest)
    if examples.task != "classification":
        raise UsageError(
            f"{folder} is a bare encoder, which can be given a head for classification; the data is for {examples.task}"
        )
    if examples.num_labels < 2:
        raise UntrustedInput(
            f"{examples.source} has the one class {examples.label_names[0]!r}; a head needs two to choose from"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = load(folder, task="classification", num_labels=examples.num_labels)
    loaded.model.config.id2label = dict(enumerate(examples.label_names))
    loaded.model.config.label2id = {name: i for i, name in enumerate(examples.label_names)}
    return loaded, examples, True


def _teacher(source: Model, teacher: str | Path | Model | None) -> Model | None:
    if teacher is None:
        return None
    if teacher != "self":
        other = as_model(teacher)
        _check_comparable(source, other, "teacher")
        return other
    if source.state is not None:
        raise UsageError(
            "teacher='self' needs the float model, and this one is quantized; name the float folder as teacher, or None"
        )
    return dataclasses.replace(source, model=copy.deepcopy(source.model))


def _check_comparable(model: Model, other: Model, role: str) -> None:
    """Raises: UsageError unless both give logits over the same tokens or classes."""
    outputs = [
        f"{m.task}, {m.model.config.vocab_size if m.task == 'lm' else m.model.config.num_labels} outputs"
        for m in (model, other)
    ]
    if outputs[0] != outputs[1]:
        raise UsageError(f"the model is for {outputs[0]}, the {role} for {outputs[1]}; use a {role} of its own kind")


def probe_of(examples: Examples, rows: int = 2, length: int = 64) -> dict[str, Tensor]:
    """A few tokens of the data on which parity is shown, now and at every later `check`."""
    batch = next(iter(examples.batches(rows, limit=rows)))
    return {name: value[:, :length].contiguous() for name, value in batch.items() if name != "labels"}


def default_probe(model: Model) -> dict[str, Tensor]:
    """Tokens to compare on where no data is at hand: the vocabulary's own ids, spread evenly."""
    vocab = int(model.model.config.vocab_size)
    ids = torch.linspace(0, vocab - 1, 64).long().reshape(2, 32)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def adequacy(
    model: str | Path | Model,
    data: Data | Examples,
    *,
    eval_data: Data | Examples | None = None,
    scheme: str | Scheme = "w4a16-g32",
    method: str = "gptq",
    samples: int = 128,
    context: int = 256,
    seed: int = 0,
    at_most: int | None = None,
    progress: Progress | None = None,
) -> Adequacy:
    """Whether the calibration rows that `quantize` would draw are enough for `scheme`, and of the right kind.

    `eval_data`: what the quantized model will be measured on; without it the model's own expectations are all there is
    to compare with. `at_most` looks at so many rows only, and extrapolates. Nothing is quantized.
    Raises: UsageError, UntrustedInput as the parts do.
    """
    source = as_model(model)
    if source.state is not None:
        raise UsageError("the model is quantized already; judge calibration data with its float parent")
    if not 0 <= seed < 2**31:
        raise UsageError(f"seed={seed} must be 0 or more and below 2^31")
    solve = _solver(scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme), ptq.method(method))
    calibration = examples_for(source, data, context=context)
    evaluation = None if eval_data is None else examples_for(source, eval_data, context=context)
    with (progress or Progress()).counted("looking at rows") as report:
        return examine(
            source.model,
            calibration,
            evaluation=evaluation,
            solve=solve,
            solver=method,
            samples=samples,
            seed=seed,
            at_most=at_most,
            progress=report,
            **({} if at_most is None else {"splits": 2, "max_layers": 2}),
        )


def _solver(scheme: Scheme, method: Chain) -> Solve:
    """`method`'s answer for one weight and one X^T X, back on real numbers; a float path counts as unchanged."""
    spec = scheme.weight
    if spec is None:
        raise UsageError(f"scheme {scheme} leaves weights in float, and nothing is calibrated for them; name another")

    def solve(weight_ON: Tensor, hessian_NN: Tensor, num_rows: int) -> Tensor:
        statistics = Statistics(hessian_NN.diagonal().clone(), hessian_NN, hessian_NN, num_rows)
        found = method.solve(weight_ON, statistics, spec)
        quantizer = WeightQuantizer(spec, weight_ON.shape[0], weight_ON.shape[1], weight_ON.device)
        quantizer.set_scale(found.scale, found.zero_point)
        return quantizer.dequantize(found.q).detach()

    return solve


def evaluate(
    model: str | Path | Model,
    data: Data | Examples,
    *,
    reference: str | Path | Model | None = None,
    context: int = 256,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Perplexity of a language model or accuracy of a classifier, with a 95 % interval; against `reference` also KL
    and agreement. Raises: UsageError, UntrustedInput as the parts do."""
    ready = as_model(model)
    examples = examples_for(ready, data, context=context)
    other = as_model(reference) if reference is not None else None
    if other is not None:
        _check_comparable(ready, other, "reference")
    bar = progress or Progress()
    with bar.counted("evaluating") as report:
        return measure(ready.model, examples, reference=other.model if other else None, limit=limit, progress=report)


def pack(model: Model) -> Model:
    """The packed twin: integers only. The given model is left as it is."""
    if model.state is None:
        raise UsageError("the model is float; quantize it first")
    packed = copy.deepcopy(model.model)
    pack_model(packed)
    return dataclasses.replace(model, model=packed)


def save(
    model: Model, out: str | Path, *, overwrite: bool = False, format: str | None = None, inputs: Sequence[Path] = ()
) -> Path:
    """Write a model folder, whole or not at all: packed if it is quantized, else float. The model stays as it is.

    `format`: `compressed-tensors` or `quantailor`; by default the first where the scheme can be said in it.
    Raises: UsageError if `out` exists or the format cannot hold the scheme; QuantailorError if the disk is full.
    """
    out = Path(out)
    with new_folder(out, overwrite=overwrite, inputs=inputs) as folder:
        _fill(folder, model, format)
    return out


def _fill(folder: Path, model: Model, format: str | None, details: dict[str, Any] | None = None) -> None:
    if model.state is None:
        model.model.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        write_manifest(folder, kind="float model", details={"parent": model.parent, **(details or {})})
        return
    folders.write_folder(
        folder,
        model.model,
        model.tokenizer,
        format=format,
        probe=model.probe or default_probe(model),
        details={
            "parent": model.parent,
            "training": _training_json(model.training),
            **model.details,
            **(details or {}),
        },
    )


def _training_json(report: TrainReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    return {
        **{k: v for k, v in vars(report).items() if k != "curve"},
        "curve": [[s, *score] for s, score in report.curve],
    }


def check(path: str | Path) -> Parity:
    """Prove that a saved folder serves what was trained.

    Every layer's integers and scales are held against the digests that the simulated model had when it was packed;
    then both executions of the folder run on the probe, layer by layer, and the simulated model's own logits of that
    day are compared as well.
    """
    loaded = folders.read_folder(Path(path))
    simulated = unpack_model(copy.deepcopy(loaded.model))
    stored = folders.stored_probe(Path(path), loaded.model.config)
    probe = stored[0] if stored else default_probe(Model(loaded.model, loaded.tokenizer, loaded.task))
    parity = compare(simulated, loaded.model, probe, expected=folders.expected_digests(loaded.receipt))
    if stored is None:
        return parity
    now, then = folders.last_logits(loaded.model, probe), stored[1]
    if now.shape != then.shape:
        raise UntrustedInput(f"{path}: the logits kept with the probe have another shape; use a sound copy")
    difference = relative_max_difference(now, then)
    top1 = bool((now.argmax(-1) == then.argmax(-1)).all())
    return dataclasses.replace(
        parity, max_logit_difference=max(parity.max_logit_difference, difference), top1_equal=parity.top1_equal and top1
    )


def generate(model: str | Path | Model, prompt: str, *, max_new_tokens: int = 64) -> str:
    """Greedy text from a language model: the prompt and what follows it."""
    ready = as_model(model)
    if ready.task != "lm":
        raise UsageError("only a language model generates text; this one classifies")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens} generates nothing; use 1 or more")
    if not prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in prompt):
        raise UsageError("the prompt is not UTF-8; give valid text")
    tokens = next(encode([prompt], ready.tokenizer))
    if not tokens:
        raise UsageError("the prompt has no tokens; give some text")
    ids = torch.tensor([*start_token(ready.tokenizer), *tokens])[None]  # as documents open in training and measuring
    positions = getattr(ready.model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and ids.shape[1] + max_new_tokens > positions:
        raise UsageError(
            f"{ids.shape[1]} tokens of prompt and max_new_tokens={max_new_tokens} are more than the model's "
            f"{positions} positions; ask for fewer"
        )
    pad = ready.tokenizer.pad_token_id if ready.tokenizer.pad_token_id is not None else ready.tokenizer.eos_token_id
    ids = ids.to(device_of(ready.model))
    with torch.inference_mode():
        output = ready.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
    return str(ready.tokenizer.decode(output[0], skip_special_tokens=True))


@dataclass(frozen=True)
class FitResult:
    """What `fit` found and saved. `data` is report.json; `meets` says whether the tolerance was met."""

    verdict: str
    data: dict[str, Any]
    out: Path

    @property
    def meets(self) -> bool:
        return self.verdict != "infeasible"

    def to_json(self) -> dict[str, Any]:
        return self.data


def fit(
    model: str | Path | Model,
    data: Data | Examples,
    scheme: str | Scheme,
    out: str | Path,
    *,
    eval_data: Data | Examples | None = None,
    goal: Goal | None = None,
    rules: Sequence[Rule] = (),
    ragged: bool = True,
    context: int = 256,
    overwrite: bool = False,
    format: str | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """The main job: the cheapest way from a float model to `scheme` that stays within the tolerance; packed, checked,
    saved with its inventory, report.json and report.md.

    Where nothing meets the tolerance in time, the best that was found is saved and the verdict is `infeasible`.
    Raises: UsageError, UntrustedInput as the parts do; QualityGateFailed if the packed model is not the simulated one.
    """
    goal = goal or Goal()
    recipe = recipe_for(scheme, rules, ragged=ragged)
    if recipe.scheme.is_float and not rules:
        raise UsageError("scheme float is the control, not a goal; name one with fewer bits, such as w4a16-g32")
    inputs = [Path(p) for p in (model, data, eval_data) if isinstance(p, str | Path)]
    with new_folder(Path(out), overwrite=overwrite, inputs=inputs) as folder:
        source = as_model(model)
        if source.state is not None:
            raise UsageError("the model is quantized already; start from its float parent")
        folders.choose_format(recipe.assign(source.model), format)  # the user's mistakes: before anything is measured
        train_data, held_out, notes = _data_for_fit(source, data, eval_data, context, goal)
        notes += _on_calibration(source, recipe, train_data, held_out, goal)
        outcome = Ladder(source.model, recipe, train_data, held_out, goal, progress).climb()
        best = dataclasses.replace(source, model=outcome.model, probe=probe_of(held_out))  # type: ignore[arg-type]
        assert best.state is not None
        _fill(folder, best, format, {"verdict": outcome.verdict, "seed": goal.settings.seed})
        parity = check(folder)
        weights = num_weights(source.model)
        float_bytes = sum(p.numel() * p.element_size() for p in source.model.parameters())
        report: dict[str, Any] = {
            "verdict": outcome.verdict,
            "metric": outcome.final.result.metric,
            "float": {"value": outcome.float.value},
            "final": {"name": outcome.final.name, "value": outcome.final.value, "loss": outcome.final.loss},
            "tolerance": goal.tolerance,
            "scheme": str(recipe.scheme),
            "method": best.state.method,
            "steps": [step.to_json() for step in outcome.steps],
            "size_bytes": weight_file_bytes(folder),
            "bits_per_weight": bits_per_weight(folder, weights),
            "float_size_bytes": float_bytes,
            "float_bits_per_weight": 8 * float_bytes / weights,
            "num_weights": weights,
            "coverage": best.state.inventory.coverage,
            "recovery": outcome.recovery if outcome.final.training else None,
            "recovery_control": outcome.recovery_control,
            "check": parity.to_json(),
            "notes": [*notes, *outcome.notes, *best.state.notes],
            "inventory": [
                {**e.to_json(), **({"report": r} if (r := best.state.layers.get(e.name)) else {})}
                for e in best.state.inventory
            ],
            "seed": goal.settings.seed,
            "command": _command(),
            "environment": environment(),
            "out": str(out),
        }
        if not parity.equal:
            layer = next(iter(parity.differing), "no single layer")
            raise QualityGateFailed(
                f"the packed model is not the simulated one ({layer}); nothing was saved: report this as a bug"
            )
        write_json(folder / "report.json", _finite(report))
        (folder / "report.md").write_text(fit_page(report), encoding="utf-8")
        (folder / MANIFEST).unlink()
        write_manifest(
            folder, kind="quantized model", details={"scheme": str(recipe.scheme), "verdict": outcome.verdict}
        )
    return FitResult(outcome.verdict, _finite(report), Path(out))


def _on_calibration(source: Model, recipe: Recipe, data: Examples, held_out: Examples, goal: Goal) -> list[str]:
    """What the receipt says of the calibration data, from a quick look."""
    if recipe.scheme.weight is None:
        return []
    try:
        found = adequacy(
            source,
            data,
            eval_data=held_out,
            scheme=recipe.scheme,
            samples=goal.calibration,
            seed=goal.settings.seed,
            at_most=32,
        )
    except UsageError as error:  # such as a model without Linears: `fit` itself may well go on
        return [f"whether the calibration data is enough was not looked at: {error}"]
    return found.for_receipt()


def _data_for_fit(
    source: Model, data: Data | Examples, eval_data: Data | Examples | None, context: int, goal: Goal
) -> tuple[Examples, Examples, list[str]]:
    train_data = examples_for(source, data, context=context)
    notes = [f"training data: {note}" for note in train_data.notes] + list(source.notes)
    if eval_data is None:
        train_data, held_out = split(train_data, 0.1, goal.settings.seed)
        notes.append(f"no evaluation data: measured on {len(held_out)} rows held out of the training data")
        return train_data, held_out, notes
    held_out = examples_for(source, eval_data, context=context)
    notes += [f"evaluation data: {note}" for note in held_out.notes]
    if shared := overlap(train_data, held_out):
        notes.append(f"{shared} rows are in both the training and the evaluation data: figures may flatter")
    return train_data, held_out, notes


def _finite(value: Any) -> Any:
    """JSON knows no infinity: such a number becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _command() -> str:
    if not sys.argv or not sys.argv[0].endswith("quantailor"):
        return "quantailor.fit(...) from Python"
    return shlex.join(["quantailor", *sys.argv[1:]])


def _processor() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def environment() -> dict[str, str]:
    """What a figure depends on: versions, machine, threads."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "quantailor": quantailor.__version__,
        "python": platform.python_version(),
        **versions,
        "system": platform.system(),
        "device": device,
        "threads": str(torch.get_num_threads()),
    }
