"""The metrics of GLUE, from predicted and true classes or scores.

A predicted class of -1 stands for "none" (logits that are not finite): it is wrong, whatever the label.
Sources: F1 and its macro average as in GLUE (Wang et al. 2019, arXiv:1804.07461); Matthews correlation of more than
two classes after Gorodkin 2004, R_K, which for two classes is the usual one.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantailor.errors import UsageError

Classes = NDArray[np.int64]
Scores = NDArray[np.float64]


def accuracy(predictions: Classes, labels: Classes) -> float:
    """The share of rows predicted right, 0 to 1. Shapes: both int [num_rows]. Raises: UsageError, as all here do,
    for empty arrays or different lengths.
    """
    _check(predictions, labels)
    return float((predictions == labels).mean())


def f1(predictions: Classes, labels: Classes, num_labels: int) -> float:
    """2 TP / (2 TP + FP + FN), 0 to 1: of class 1 where there are two, else the mean over the classes (macro).

    A class that is neither predicted nor there counts in no mean; the F1 of a single class without a hit is 0.
    """
    _check(predictions, labels)
    if num_labels <= 2:
        return _f1_of(1, predictions, labels)
    seen = np.union1d(predictions, labels)
    return float(np.mean([_f1_of(number, predictions, labels) for number in seen[seen >= 0]]))


def matthews(predictions: Classes, labels: Classes) -> float:
    """The correlation of predicted and true classes, -1 to 1; 0 where either is the same class throughout.

    R_K = (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2)), with c rows right out of s, and class
    k predicted p_k and true t_k times.
    """
    _check(predictions, labels)
    classes, codes = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    predicted = np.bincount(codes[: len(labels)], minlength=len(classes)).astype(float)
    true = np.bincount(codes[len(labels) :], minlength=len(classes)).astype(float)
    num_rows, num_right = float(len(labels)), float((predictions == labels).sum())
    product = (num_rows**2 - predicted @ predicted) * (num_rows**2 - true @ true)
    return float((num_right * num_rows - predicted @ true) / np.sqrt(product)) if product > 0 else 0.0


def pearson(predictions: Scores, labels: Scores) -> float:
    """The linear correlation of predicted and true scores, -1 to 1; nan where either is the same throughout or not
    finite. Shapes: both float [num_rows], at least two.
    """
    _check(predictions, labels)
    x, y = (np.asarray(values, dtype=np.float64) for values in (predictions, labels))
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1.0, 1.0))


def spearman(predictions: Scores, labels: Scores) -> float:
    """The correlation of the ranks, equal scores sharing the mean of theirs. As `pearson` otherwise."""
    _check(predictions, labels)
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        return math.nan
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: Scores) -> Scores:
    """From 1; equal values get the mean of the ranks that they take up."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[codes]


def _f1_of(number: int, predictions: Classes, labels: Classes) -> float:
    hits = int(((predictions == number) & (labels == number)).sum())
    named = int((predictions == number).sum()) + int((labels == number).sum())
    return 2 * hits / named if named else 0.0


def _check(predictions: NDArray[Any], labels: NDArray[Any]) -> None:
    if len(predictions) != len(labels) or len(labels) == 0:
        raise UsageError(f"{len(predictions)} predictions for {len(labels)} labels; one each is needed, at least one")
