"""`quantailor inventory`, and `--point` of the commands that quantize, as a shell sees them."""

import pytest

from quantailor.cli import options
from quantailor.errors import UsageError
from tests.cli.shell import shell

ALL = [f"--point={name}=a8" for name in ("scores", "norm", "gelu", "residual", "embedding", "output")]


def test_every_point_of_a_bert_block_is_counted(tiny_bert):
    found = shell("inventory", tiny_bert, "--scheme", "w8a8", *ALL, "--json").document["blocks"]
    assert len(found) == 1 and found[0]["blocks"] == [0, 1]
    counts = found[0]["quantized"]
    assert {k: counts[k] for k in ("weight", "output", "scores", "norm", "gelu", "residual")} == {
        "weight": 6, "output": 6, "scores": 1, "norm": 2, "gelu": 1, "residual": 2,
    }  # fmt: skip
    ran = shell("inventory", tiny_bert, "--scheme", "w8a8", *ALL)
    assert ran.status == 0 and "1 GELU" in ran.out and "softmax stays in float" in ran.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scheme", "w8a8", "--point", "norm"], "--point 'norm' is not NAME=SPEC"),
        (["--scheme", "w8a8", "--point", "norms=a8"], "unknown point 'norms'; did you mean norm?"),
        (["--scheme", "w8a8", "--point", "norm=8"], "the form is a<2-8>"),
        (["--scheme", "w8a8", "--point", "kv=a8"], "keeps no cache of keys and values"),
        (["--point", "norm=a8"], "name the scheme"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(tiny_bert, arguments, says):
    ran = shell("inventory", tiny_bert, *arguments)
    assert ran.status == 2 and says in ran.error


def test_quantize_takes_points(tiny_bert, corpus, tmp_path):
    points = ("--point", "norm=a8-static", "--point", "scores=a8")
    given = ("--data", corpus / "classes.jsonl", "--samples", 8, "--method", "rtn", "--quiet", "--json")
    ran = shell("quantize", tiny_bert, "--scheme", "w8a8", *points, *given, "--out", tmp_path / "out")
    assert ran.status == 0, ran.err
    checked = shell("check", tmp_path / "out", "--json").document
    assert checked["equal"] and checked["points"] == 6


def test_points_by_name():
    assert options.points(["norm=a8", "kv=a4-static"]) == {"norm": "a8", "kv": "a4-static"}
    with pytest.raises(UsageError, match="given twice"):
        options.points(["norm=a8", "norm=a4"])
