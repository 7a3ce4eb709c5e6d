"""`evaluate_tasks`: a model, float or packed, on tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quantailor.data.loading import Data
from quantailor.errors import UntrustedInput, UsageError
from quantailor.verbs.model import Model, as_model, examples_for

if TYPE_CHECKING:
    from quantailor.evaluate.harness import HarnessResult


def evaluate_tasks(
    model: str | Path | Model,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    data: Data | None = None,
    context: int = 256,
    limit: int | None = None,
    batch_size: int = 8,
) -> HarnessResult:
    """A language model on `tasks`, which the task files (.yaml) below `include_path` define; nothing is fetched.

    The task `windows` is the perplexity of `data` over the windows that `evaluate` cuts, scored by the harness.
    Task files are programs: use ones that you trust.
    Raises: UsageError without the `eval` extra, for a model or a task that does not fit; UntrustedInput where a task's
    files or data are not on this machine.
    """
    if find_spec("lm_eval") is None:
        raise UsageError("tasks need the package lm-eval; install it with: pip install 'quantailor[eval]'")
    from quantailor.evaluate import harness

    if not tasks:
        raise UsageError("name a task")
    if include_path is not None and not Path(include_path).is_dir():
        raise UntrustedInput(f"{include_path} is no folder; name one that holds task files (.yaml)")
    ready = as_model(model)
    if ready.task != "lm":
        raise UsageError(f"tasks are for language models, and this one is made for {ready.task}; use --data")
    windows = None
    if data is not None:
        windows = examples_for(ready, data, context=context).windows
        if windows is None:
            raise UsageError(f"the task {harness.WINDOWS!r} takes plain text; these are records")
    return harness.evaluate_tasks(
        ready.model,
        ready.tokenizer,
        list(dict.fromkeys(tasks)),
        include_path=None if include_path is None else Path(include_path),
        windows=windows,
        limit=limit,
        batch_size=batch_size,
    )
