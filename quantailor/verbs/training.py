"""QAT: `train`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from quantailor.data.examples import Examples
from quantailor.data.loading import Data
from quantailor.environment import environment
from quantailor.errors import UsageError
from quantailor.evaluate.classification import ClassificationResult
from quantailor.evaluate.lm import LMResult
from quantailor.evaluate.run import evaluate as measure
from quantailor.models.adapt import active, adapters
from quantailor.models.prepare import unpack_model
from quantailor.nn.lora import LoRA
from quantailor.progress import Progress
from quantailor.qat import distributed, panel
from quantailor.qat.best import Score
from quantailor.qat.checkpoint import KEPT, fingerprint
from quantailor.qat.low_bits import FOLLOWS
from quantailor.qat.recording import NAME as RECORDING
from quantailor.qat.recording import Listener
from quantailor.qat.settings import Settings
from quantailor.qat.stages import Stage
from quantailor.qat.stopping import parse_goal
from quantailor.qat.tensorboard import Scalars
from quantailor.qat.train import repeatable
from quantailor.qat.train import train as run_training
from quantailor.recipe import Rule
from quantailor.spec import Scheme
from quantailor.store.lock import locked
from quantailor.store.publish import DiskFull, is_disk_full, new_folder
from quantailor.store.work import Work, work_folder
from quantailor.verbs.adapters import TRAINED, adapter_details, fill_adapter, fill_base, merge_notes
from quantailor.verbs.lora_training import (
    adapter_rates,
    base_for_adapter,
    begun,
    continued,
    for_adapter,
    method_before,
    size_of_adapter,
)
from quantailor.verbs.model import (
    Model,
    fill,
    probe_of,
    refuse_questions,
)
from quantailor.verbs.progressive import run_stages
from quantailor.verbs.quantizing import PointsLike, quantize, recipe_for
from quantailor.verbs.scratch import random_start
from quantailor.verbs.training_inputs import for_choosing, for_training, teacher_of


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
    points: PointsLike = None,
    ragged: bool = True,
    stages: Sequence[Stage | Scheme | str | float] = (),
    from_scratch: bool = False,
    progress: Progress | None = None,
    work: str | Path | None = None,
    lora: LoRA | int | None = None,
    until: str | None = None,
    tensorboard: str | Path | None = None,
) -> Model:
    """QAT: from PTQ (done first if the model is float) to the best iterate of training; never worse than its start.

    `scheme` "float" trains without quantization: the task fine-tune of a bare encoder, and the control. `teacher`
    "self" is the float model itself, None leaves only the task's loss. Without `eval_data` a tenth of `data` is held
    out to choose the best iterate. `stages` instead of a scheme: one after the other (qat/stages.py), each from the
    float weights that the one before trained, with the same teacher. `from_scratch`: from random weights drawn by the
    seed, which teach nothing; `model` may then be a folder with a config alone. `work` is a folder for checkpoints:
    after a kill the same call goes on behind the last one (PTQ is done again, to the same integers), and the weights
    are those of a run that was never stopped.
    It is removed once training is done. `until` is a goal that ends training, such as "recovery>=0.5": the one in
    `settings`, for short. `tensorboard`: a folder for scalars of what is recorded, which is turned on.
    Where torch.distributed is initialised, every process calls this.

    `lora` (a rank, or more of it) trains an adapter inside the rounding on a packed base (verbs/lora_training.py); the
    model that comes back holds both, and `save` merges them exactly.
    Raises: UsageError, UntrustedInput as the parts do; Busy if another process trains in `work`.
    """
    settings = settings or Settings()
    if until is not None:
        settings = dataclasses.replace(settings, until=until)
    if tensorboard is not None:
        settings = dataclasses.replace(settings, record=True)
    place = None if work is None else Path(work)
    if stages and scheme is not None:
        raise UsageError(f"stages name their schemes; leave the scheme {scheme} out, or the stages")
    if stages and tensorboard is not None:
        raise UsageError("tensorboard shows one run, and stages are several; leave one of the two out")
    if stages and points:
        raise UsageError(
            "stages hand float weights on, and points have scales of their own; train points by themselves"
        )
    moves = {
        "stages": bool(stages),
        "from_scratch": from_scratch,
        "blend": bool(settings.blend),
        f"gradient={settings.gradient!r}": settings.gradient in (*FOLLOWS, "binaryconnect"),
    }
    if lora is not None and any(moves.values()):
        what = next(name for name, asked in moves.items() if asked)
        raise UsageError(
            f"an adapter trains on weights that stay, and {what} is about weights that move; leave one out"
        )
    with repeatable(settings):
        if from_scratch:
            model = random_start(model, settings.seed)
        if stages:
            chain = [stage if isinstance(stage, Stage) else Stage(stage) for stage in stages]
            return _in_stages(
                model, data, chain, eval_data, teacher, settings, method, samples, context, rules, ragged, progress,
                place, from_scratch,
            )  # fmt: skip
        return _train(
            model,
            data,
            scheme,
            eval_data,
            teacher,
            settings,
            method,
            samples,
            context,
            rules,
            points,
            ragged,
            progress,
            place,
            lora,
            None if tensorboard is None else Path(tensorboard),
            from_scratch,
        )


def train_folder(
    model: str | Path | Model,
    data: Data | Examples,
    out: str | Path,
    *,
    overwrite: bool = False,
    format: str | None = None,
    inputs: Sequence[Path] = (),
    adapter_out: str | Path | None = None,
    base_out: str | Path | None = None,
    **options: Any,
) -> Model:
    """`train` and `save`, with the checkpoints in a hidden folder beside `out`: the same call goes on after a kill.

    `options`: those of `train`, `work` aside. `inputs`: paths that `out` must not touch. `adapter_out`, `base_out`:
    folders for the adapter alone and for the base it belongs to. Where torch.distributed is initialised, every process
    calls this and the first one writes.
    """
    out = Path(out)
    with ExitStack() as stack:
        place = None
        if distributed.rank() == 0:
            place = stack.enter_context(new_folder(out, overwrite=overwrite, inputs=inputs))
            beside = {
                write: stack.enter_context(new_folder(Path(path), overwrite=overwrite, inputs=inputs))
                for write, path in ((fill_adapter, adapter_out), (fill_base, base_out))
                if path is not None
            }
        trained = train(model, data, work=work_folder(out), **options)
        if place is not None:
            for write, folder in beside.items():
                write(folder, trained)
            fill(place, trained, format, adapter_details(trained))
    return trained


def _train(
    model: str | Path | Model,
    data: Data | Examples,
    scheme: str | Scheme | None,
    eval_data: Data | Examples | None,
    teacher: str | Path | Model | None,
    settings: Settings,
    method: str | None,
    samples: int,
    context: int,
    rules: Sequence[Rule],
    points: PointsLike,
    ragged: bool,
    progress: Progress | None,
    folder: Path | None,
    lora: LoRA | int | None,
    tensorboard: Path | None,
    from_scratch: bool = False,
) -> Model:
    settings = for_adapter(settings, lora)
    parsed = scheme if isinstance(scheme, Scheme) or scheme is None else Scheme.parse(scheme)
    source, train_data, new_head = for_training(
        model if lora is None else base_for_adapter(model), data, context, settings.seed
    )
    refuse_questions(source)
    if source.state is None and parsed is None:
        raise UsageError("the model is float: name a scheme to train for, or `float` for a plain fine-tune")
    if points and (parsed is None or parsed.is_float):
        raise UsageError("points go with a scheme that quantizes weights; w8a16 is the nearest to float")
    if source.state is not None and parsed is not None:
        raise UsageError(
            f"the model is quantized already ({source.state.scheme}); leave the scheme out to train it further"
        )
    train_data, held_out, data_notes = for_choosing(source, train_data, eval_data, context, settings.seed)
    notes = [*source.notes, *data_notes]
    is_float = parsed is not None and parsed.is_float and not rules
    if (new_head or from_scratch) and teacher == "self" and not is_float:
        teacher = None
        notes.append(_TEACHES_NOTHING.format("head is new" if new_head else "weights are random"))
    if from_scratch and settings.blend is None:  # it is there so that trained weights do not jump
        settings = dataclasses.replace(settings, blend=0.0)
    reference = None if is_float else teacher_of(source, teacher)
    if reference is None:  # no distance to keep: the task's own loss is all there is
        settings = dataclasses.replace(settings, kl_weight=0.0, task_weight=settings.task_weight or 1.0)
    if is_float:
        if lora is not None:
            raise UsageError("an adapter inside the rounding needs a grid, and scheme float has none; leave lora out")
        started = dataclasses.replace(source, model=copy.deepcopy(source.model))
    elif source.state is not None and (lora is not None or adapters(source.model)):
        started = continued(source, lora, settings.seed)
    elif source.state is None:
        assert parsed is not None
        # Scales that follow the weights make nothing of a solver's integers, and random weights have nothing to solve.
        plain = method is None and (from_scratch or settings.gradient in (*FOLLOWS, "binaryconnect"))
        if plain and parsed.input is not None and not parsed.input.dynamic:
            raise UsageError(
                f"{parsed} has static activation scales, which are found by PTQ on data; name a --method for it, such "
                "as rtn, or a scheme whose activations are dynamic"
            )
        started = quantize(
            source,
            parsed,
            method="rtn" if plain else method_before(lora, method),
            data=None if plain else train_data,
            samples=samples,
            rules=rules,
            points=points,
            ragged=ragged,
            seed=settings.seed,
            progress=progress,
        )
    else:
        started = dataclasses.replace(source, model=copy.deepcopy(source.model))
        unpack_model(started.model)
    if lora is not None and source.state is None:
        started = begun(started, source, lora, settings.seed)
    if (named := active(started.model)) is not None:
        settings = adapter_rates(settings, started.model)
        notes += [note for note in started.notes if note not in notes]
        notes.append(f"adapter {named}: {size_of_adapter(started.model, named)}")
        if progress is not None:
            progress.say(notes[-1])

    def score(candidate: Any) -> tuple[float, ...]:
        result = measure(candidate, held_out)
        if isinstance(result, ClassificationResult):
            return -result.value, result.mean_loss
        return (result.nats_per_token,) if isinstance(result, LMResult) else (-result.value,)

    floating = _floating_score(source, reference, settings, score)
    with ExitStack() as stack:
        work = None
        if folder is not None and distributed.rank() == 0:
            stack.enter_context(locked(folder))
            config = _config(started, reference, train_data, held_out, settings)
            config |= {"adapter": adapter_details(started)} if active(started.model) else {}
            work = stack.enter_context(_working(folder, config, progress))
            if work.fresh_because:
                notes.append(
                    f"unfinished work was found and not continued: {work.fresh_because}; training started afresh"
                )
        listeners: list[Listener] = []
        if progress is not None:
            shown = progress
            listeners.append(lambda recording: shown.rows(panel.rows(recording)))
        if tensorboard is not None and distributed.rank() == 0:
            listeners.append(stack.enter_context(Scalars(tensorboard)))
        report = run_training(
            started.model,
            train_data,
            score,
            settings,
            teacher=reference.model if reference else None,
            progress=progress,
            work=work,
            saves=folder is not None,
            floating=floating,
            listeners=listeners,
        )
    if started.state is not None:
        started.state.notes += report.notes
        if report.improved:
            started.state.method += "+qat" if active(started.model) is None else TRAINED
        notes += merge_notes(started.model)
    return dataclasses.replace(
        started, training=report, notes=notes + report.notes, probe=probe_of(held_out), details={}
    )


_TEACHES_NOTHING = "the {}, so the float model teaches nothing: trained on the task's own loss"


def _in_stages(
    model: str | Path | Model,
    data: Data | Examples,
    stages: Sequence[Stage],
    eval_data: Data | Examples | None,
    teacher: str | Path | Model | None,
    settings: Settings,
    method: str | None,
    samples: int,
    context: int,
    rules: Sequence[Rule],
    ragged: bool,
    progress: Progress | None,
    folder: Path | None,
    from_scratch: bool,
) -> Model:
    source, train_data, new_head = for_training(model, data, context, settings.seed)
    if source.state is not None:
        raise UsageError(f"the model is quantized already ({source.state.scheme}); stages start from its float parent")
    for stage in stages:  # every stage's mistakes before the first one's hours
        recipe_for(stage.parsed, rules, method=method, ragged=ragged).assign(source.model)
        stage.settings(settings)
    train_data, held_out, notes = for_choosing(source, train_data, eval_data, context, settings.seed)
    if (new_head or from_scratch) and teacher == "self":
        teacher = None
        notes.append(_TEACHES_NOTHING.format("head is new" if new_head else "weights are random"))
    reference = teacher_of(source, teacher)

    def one(current: Model, stage: Stage, place: Path | None) -> Model:
        return _train(
            current,
            train_data,
            stage.parsed,
            held_out,
            reference,
            stage.settings(settings),
            method,
            samples,
            context,
            rules,
            None,
            ragged,
            progress,
            place,
            lora=None,
            tensorboard=None,
            from_scratch=from_scratch and current is source,
        )

    config = _config(source, reference, train_data, held_out, settings)
    config["ptq"] = repr((method, samples, rules, ragged, from_scratch))
    trained = run_stages(source, stages, one, config=config, work=folder, progress=progress)
    return dataclasses.replace(trained, notes=[*notes, *trained.notes])


@contextmanager
def _working(folder: Path, config: dict[str, Any], progress: Progress | None) -> Iterator[Work]:
    """The checkpoints of this very run, or none yet. They go when it is done, or failed before the first of them."""
    work = Work(folder, config, states=KEPT, others=(RECORDING,))
    if work.fresh_because and progress is not None:
        progress.say(f"the unfinished training in {folder} is not continued: {work.fresh_because}; starting afresh")
    if work.records and progress is not None:
        progress.say(f"going on behind step {work.records[-1]['step']}")
    try:
        yield work
    except BaseException as error:
        if not work.records or isinstance(error, DiskFull) or is_disk_full(error):
            work.remove()
        raise
    work.remove()


def _config(
    started: Model, reference: Model | None, train_data: Examples, held_out: Examples, settings: Settings
) -> dict[str, Any]:
    """What a run is. Another model, other integers of PTQ, data, settings, versions or processes are another run."""
    versions = {name: value for name, value in environment().items() if name != "threads"}
    points = [p for p in started.state.inventory.points if p.spec] if started.state else []
    return {
        "start": fingerprint(started.model),
        "teacher": fingerprint(reference.model) if reference else None,
        "training data": train_data.fingerprint,
        "evaluation data": held_out.fingerprint,
        **({"points": [p.to_json() for p in points]} if points else {}),
        "task": started.task,
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name != "checkpoint_every"},
        "processes": distributed.world(),
        "versions": versions,
    }


def _floating_score(
    source: Model, reference: Model | None, settings: Settings, score: Callable[[Any], Score]
) -> Score | None:
    """What the float model scores, where the goal is to win back a share of what was lost against it."""
    if settings.until is None or parse_goal(settings.until).metric != "recovery":
        return None
    if source.state is None:
        return score(source.model)
    if reference is None:
        raise UsageError(
            f"until={settings.until!r} is reckoned from the float model, and this one is quantized; name the float "
            "folder as teacher, or use another goal"
        )
    return score(reference.model)
