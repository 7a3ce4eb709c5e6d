import numpy as np
import pytest

from quantailor.errors import UsageError
from quantailor.evaluate.metrics import accuracy, f1, matthews


def f1_by_definition(predictions, labels, positive):
    hits = sum(p == positive and t == positive for p, t in zip(predictions, labels))
    named = sum(p == positive for p in predictions)
    there = sum(t == positive for t in labels)
    precision = hits / named if named else 0.0
    recall = hits / there if there else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def covariance_by_definition(a, b, classes):
    """Gorodkin 2004: the covariance of two assignments as indicator vectors."""
    return np.mean([sum(((a[i] == k) - np.mean(a == k)) * ((b[i] == k) - np.mean(b == k)) for k in classes)
                    for i in range(len(a))])  # fmt: skip


@pytest.mark.parametrize("num_labels", [2, 3, 5])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 50])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_match_their_definitions(num_labels, num_rows, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_labels, size=num_rows)
    predictions = np.where(rng.random(num_rows) < 0.6, labels, rng.integers(num_labels, size=num_rows))
    assert accuracy(predictions, labels) == sum(p == t for p, t in zip(predictions, labels)) / num_rows
    classes = [1] if num_labels == 2 else sorted({*predictions.tolist(), *labels.tolist()})
    expected = np.mean([f1_by_definition(predictions, labels, k) for k in classes])
    assert f1(predictions, labels, num_labels) == pytest.approx(expected, abs=1e-12)
    ab, aa, bb = (
        covariance_by_definition(*pair, range(num_labels))
        for pair in ((predictions, labels), (predictions, predictions), (labels, labels))
    )
    assert matthews(predictions, labels) == pytest.approx(ab / np.sqrt(aa * bb) if aa * bb > 1e-15 else 0.0, abs=1e-12)


def test_known_values():
    labels = np.array([1] * 100 + [0] * 100)
    predictions = np.array([1] * 90 + [0] * 10 + [1] * 20 + [0] * 80)  # TP 90, FN 10, FP 20, TN 80
    assert accuracy(predictions, labels) == 0.85
    assert f1(predictions, labels, 2) == pytest.approx(180 / 210)
    assert matthews(predictions, labels) == pytest.approx((90 * 80 - 20 * 10) / np.sqrt(110 * 100 * 100 * 90))
    # scikit-learn's documented examples for f1_score (macro) and matthews_corrcoef
    assert f1(np.array([0, 2, 1, 0, 0, 1]), np.array([0, 1, 2, 0, 1, 2]), 3) == pytest.approx(0.26666667)
    assert matthews(np.array([1, 0, 1, 1]), np.array([1, 1, 1, 0])) == pytest.approx(-1 / 3)


def test_one_class_throughout_has_no_correlation():
    assert matthews(np.zeros(5, int), np.array([0, 1, 0, 1, 0])) == 0.0
    assert f1(np.zeros(5, int), np.zeros(5, int), 2) == 0.0


def test_no_prediction_is_wrong():
    predictions, labels = np.array([-1, 1, 2, -1]), np.array([0, 1, 2, 1])
    assert accuracy(predictions, labels) == 0.5
    assert f1(predictions, labels, 3) == pytest.approx((0 + 2 / 3 + 1) / 3)  # -1 is no class of its own
    assert -1 < matthews(predictions, labels) < 1


def test_lengths_are_checked():
    for predictions, labels in ((np.array([1]), np.array([1, 0])), (np.array([]), np.array([]))):
        with pytest.raises(UsageError, match="one each is needed"):
            accuracy(predictions, labels)
