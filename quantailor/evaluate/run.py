"""The front door of `evaluate/`: the measurement that the examples' task asks for."""

from torch import nn

from quantailor.data.examples import Examples
from quantailor.data.squad import QAExamples
from quantailor.errors import UsageError
from quantailor.evaluate.classification import ClassificationResult, evaluate_classification
from quantailor.evaluate.lm import LMResult, Reference, evaluate_lm
from quantailor.evaluate.measuring import Progress
from quantailor.evaluate.qa import QAResult, evaluate_qa


def evaluate(
    model: nn.Module,
    examples: Examples,
    reference: nn.Module | Reference | ClassificationResult | QAResult | None = None,
    limit: int | None = None,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> LMResult | ClassificationResult | QAResult:
    """Measure `model` on the first `limit` rows (windows or records; all by default), against `reference` if given.

    A `Reference`, `ClassificationResult` or `QAResult` must have been made on the same rows: `reference_for` does so.
    Raises: UsageError for a reference of another task; otherwise as the two measurements.
    """
    rows = examples if limit is None else examples.take(limit)
    if isinstance(rows, QAExamples):
        if isinstance(reference, Reference | ClassificationResult):
            raise UsageError("the reference is of another task; the examples are questions: give a model or a QAResult")
        return evaluate_qa(model, rows, batch_size=batch_size or 32, reference=reference, progress=progress)
    if isinstance(reference, QAResult):
        raise UsageError("the reference answers questions, the examples hold none; give another one")
    if rows.task == "lm":
        if isinstance(reference, ClassificationResult):
            raise UsageError("the reference is of a classifier, the examples are of a language model; give another one")
        return evaluate_lm(model, rows, batch_size=batch_size or 16, reference=reference, progress=progress)
    if isinstance(reference, Reference):
        raise UsageError("the reference is of a language model, the examples are of a classifier; give another one")
    return evaluate_classification(model, rows, batch_size=batch_size or 32, reference=reference, progress=progress)


def reference_for(
    model: nn.Module,
    examples: Examples,
    limit: int | None = None,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Reference | ClassificationResult | QAResult:
    """What `evaluate(..., reference=)` takes in place of the float model, so that the model runs only once.

    Its own figures: `.result` of a `Reference`, the `ClassificationResult` itself.
    """
    rows = examples if limit is None else examples.take(limit)
    if isinstance(rows, QAExamples):
        return evaluate_qa(model, rows, batch_size=batch_size or 32, progress=progress)
    if rows.task == "lm":
        return Reference.of(model, rows, batch_size=batch_size or 16, progress=progress)
    return evaluate_classification(model, rows, batch_size=batch_size or 32, progress=progress)
