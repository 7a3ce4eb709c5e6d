"""`quantailor search` as a shell sees it."""

import pytest

from tests.cli.shell import shell


@pytest.fixture
def args(trained_lm, corpus):
    given = ("--eval-data", corpus / "valid.txt", "--samples", 8, "--context", 32, "--batch-size", 4, "--quiet")
    space = ("bits=4", "group=32", "scales=learned", "learning_rate=1", "steps=2", "frozen=0")
    spaces = [part for text in space for part in ("--space", text)]
    return ("search", trained_lm, "--data", corpus / "train.txt", *given, *spaces)


def test_feasible_prints_one_document(args, tmp_path):
    ran = shell(*args, "--accuracy", "50%", "--max-bytes", 10**9, "--minutes", 5, "--out", tmp_path / "o", "--json")
    assert ran.status == 0 and ran.document["verdict"] == "feasible" and len(ran.document["trials"]) == 1


def test_infeasible_is_status_4_after_its_result(args, tmp_path):
    budgets = ("--accuracy", "1.001", "--latency", 1, "--bandwidth", 50, "--hours", 0.1)
    ran = shell(*args, *budgets, "--out", tmp_path / "o")
    assert ran.status == 4 and "Pareto front of 1 trials" in ran.out and "closest is w4a16-g32" in ran.error
    assert (tmp_path / "o" / "search.json").exists()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--hours", 1, "--minutes", 2), "give one of the two"),
        (("--space", "depth=4"), "the names are bits"),
        (("--latency", 1, "--max-bytes", 5), "a search has one"),
    ],
)
def test_mistakes_are_one_line(args, tmp_path, extra, said):
    ran = shell(*args, *extra, "--out", tmp_path / "o")
    assert ran.status == 2 and said in ran.error and not (tmp_path / "o").exists()
