import numpy as np
import pytest

from quantailor.errors import UsageError
from quantailor.evaluate.metrics import accuracy, f1, matthews, pearson, spearman


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


def fixtures():
    """Classes and scores of many shapes: few and many rows, ties, skew, one class, more classes than rows."""
    rng = np.random.default_rng(7)
    for num_rows in (2, 3, 10, 101, 1000):
        for num_labels in (2, 3, 7):
            labels = rng.integers(num_labels, size=num_rows)
            guesses = rng.integers(num_labels, size=num_rows)
            yield np.where(rng.random(num_rows) < 0.7, labels, guesses), labels, num_labels


def test_equal_to_scikit_learn():
    """What GLUE's own scripts call, but for classes that are neither predicted nor there."""
    theirs = pytest.importorskip("sklearn.metrics")
    for predictions, labels, num_labels in fixtures():
        assert abs(accuracy(predictions, labels) - theirs.accuracy_score(labels, predictions)) < 1e-9
        average = {"average": "binary"} if num_labels == 2 else {"average": "macro"}
        assert abs(f1(predictions, labels, num_labels) - theirs.f1_score(labels, predictions, **average)) < 1e-9
        assert abs(matthews(predictions, labels) - theirs.matthews_corrcoef(labels, predictions)) < 1e-9


@pytest.mark.parametrize("num_rows", [2, 3, 10, 1500])
@pytest.mark.parametrize("ties", [False, True])
def test_correlations_equal_scipy(num_rows, ties):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(num_rows)
    labels = rng.normal(size=num_rows) * 3 + 100
    predictions = labels * 0.2 + rng.normal(size=num_rows) - 5
    if ties and num_rows > 3:
        labels, predictions = labels.round(), predictions.round()
    assert abs(pearson(predictions, labels) - stats.pearsonr(predictions, labels).statistic) < 1e-9
    assert abs(spearman(predictions, labels) - stats.spearmanr(predictions, labels).statistic) < 1e-9


def test_correlations_by_hand():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 5.0])
    # deviations -1.5 -.5 .5 1.5 and -1.75 .25 -.75 2.25: products 5.5, squares 5 and 8.75; ranks 1 3 2 4
    assert pearson(x, y) == pytest.approx(5.5 / (5 * 8.75) ** 0.5, abs=1e-12)
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15), abs=1e-12)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.75**0.5, abs=1e-12)


def test_no_correlation_without_two_different_finite_scores():
    for bad in (np.ones(3), np.array([1.0, np.nan, 2.0]), np.array([1.0, np.inf, 2.0])):
        assert np.isnan(pearson(bad, np.arange(3.0))) and np.isnan(spearman(np.arange(3.0), bad))
