"""lm-evaluation-harness on a model in memory, with task files of this machine; nothing is fetched.

Tasks are scored as the harness scores them everywhere (its own `HFLM`, with our model inside), start tokens included:
a tokenizer that puts one before each text has it twice. One task is ours: the
perplexity of a text over the very windows that `evaluate_lm` cuts, so that both can be held against each other: the
first token of a window is context, all others are scored, and nats are divided by tokens.
Source: Gao et al., The Language Model Evaluation Harness, v0.4, https://zenodo.org/records/12608602
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval
import lm_eval.evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantailor.data.streams import LMWindows
from quantailor.errors import UntrustedInput, UsageError
from quantailor.evaluate.measuring import measuring
from quantailor.evaluate.result import jsonable

WINDOWS = "windows"  # the name of our own task
_BOOTSTRAP = 1000  # draws, for the metrics whose standard error has no formula


@dataclass(frozen=True)
class HarnessResult:
    """`tasks`: task -> metric -> (value, its standard error or None), in the harness's names; `versions` of the tasks.

    `num_documents`: how many of each task were scored.
    """

    tasks: dict[str, dict[str, tuple[float, float | None]]]
    num_documents: dict[str, int]
    versions: dict[str, str]
    harness: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for task, metrics in self.tasks.items():
            for metric, (value, error) in metrics.items():
                spread = "" if error is None else f" ± {error:.4f}"
                lines.append(f"{task:24} {metric:28} {value:.4f}{spread}   ({self.num_documents[task]:,} documents)")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """With "metric", "value" and "interval" (95 %) of the first metric, as every evaluation has them."""
        task, metrics = next(iter(self.tasks.items()))
        metric, (value, error) = next(iter(metrics.items()))
        interval = (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)
        tasks = {
            name: {metric: {"value": v, "standard_error": e} for metric, (v, e) in found.items()}
            for name, found in self.tasks.items()
        }
        rest = {"num_documents": self.num_documents, "versions": self.versions, "harness": self.harness}
        first = {"metric": f"{task}/{metric}", "value": value, "interval": interval}
        return jsonable({**first, "tasks": tasks, **rest, "notes": self.notes})


class HarnessLM(HFLM):
    """The harness's own wrapper around our model. A document that brings `input_ids` is scored on exactly these: the
    first is context, and no text is encoded."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        if not all("input_ids" in request.doc for request in requests):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        rows = [request.doc["input_ids"] for request in requests]
        encoded = [(("", str(number)), list(row[:1]), list(row[1:])) for number, row in enumerate(rows)]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    windows: LMWindows | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> HarnessResult:
    """Run `tasks`: names that the task files below `include_path` define, or `windows`, for which text is given.

    Task files are programs: their templates and functions run.
    Raises: UsageError for a name that is not there, or windows without text; UntrustedInput where a task's files or
    data cannot be used, or are not on this machine.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path), include_defaults=False)
    if unknown := [name for name in tasks if name != WINDOWS and name not in manager.all_tasks]:
        there = ", ".join(sorted(manager.all_tasks)) or "none"
        raise UsageError(
            f"task {unknown[0]!r} is in no task file of {include_path or 'yours: name a folder of them'}; "
            f"there are: {there}; and {WINDOWS}, for text"
        )
    if (WINDOWS in tasks) != (windows is not None):
        raise UsageError(
            f"the task {WINDOWS!r} and a text (data) to cut into windows go together; give both or neither"
        )
    chosen = [_windows_task(windows) if name == WINDOWS and windows is not None else name for name in tasks]
    with measuring(model), _offline_and_quiet():
        wrapped = HarnessLM(model, tokenizer, batch_size)
        try:
            found = lm_eval.simple_evaluate(
                wrapped,
                tasks=chosen,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, datasets.exceptions.DatasetsError) as error:
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise UntrustedInput(
                f"task {', '.join(tasks)} does not run: {type(error).__name__}: {first}; its data must lie on this "
                "machine, as data_files of a task file"
            ) from error
    assert found is not None
    return _result(found)


def _windows_task(windows: LMWindows) -> dict[str, Any]:
    """A task of the harness whose documents are windows of tokens."""
    rows = {"input_ids": windows.input_ids.tolist()}
    return {
        "task": WINDOWS,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_dict(rows)},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "",
        "doc_to_target": "",
        "process_results": _nats,
        "metric_list": [
            {"metric": "token_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        ],
        "metadata": {"version": 1},
    }


def _nats(document: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    ((log_likelihood, _is_greedy),) = results
    return {"token_perplexity": (log_likelihood, len(document["input_ids"]) - 1)}


def _result(found: dict[str, Any]) -> HarnessResult:
    tasks: dict[str, dict[str, tuple[float, float | None]]] = {}
    for task, values in found["results"].items():
        tasks[task] = {}
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else key
            tasks[task][name] = (float(value), None if error is None or isinstance(error, str) else float(error))
    return HarnessResult(
        tasks={task: metrics for task, metrics in tasks.items() if metrics},
        num_documents={task: int(n["effective"]) for task, n in found["n-samples"].items()},
        versions={task: str(version) for task, version in found["versions"].items()},
        harness=lm_eval.__version__,
    )


@contextlib.contextmanager
def _offline_and_quiet() -> Iterator[None]:
    """Nothing is fetched, whatever a task asks for; what the harness has to say of itself on the way is left out."""
    places: list[tuple[Any, str, Any]] = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_HUB_OFFLINE", True),
        (lm_eval.evaluator, "get_git_commit_hash", lambda: None),  # of whatever folder it is called in
    ]
    before = [getattr(module, name) for module, name, _ in places]
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for module, name, value in places:
        setattr(module, name, value)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            yield
    finally:
        for (module, name, _), value in zip(places, before):
            setattr(module, name, value)
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
