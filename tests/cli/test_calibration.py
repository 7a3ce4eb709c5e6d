"""`quantailor calibration` as a shell sees it."""

import pytest

from tests.cli.shell import shell


@pytest.fixture
def args(trained_lm, corpus):
    return ("calibration", trained_lm, "--data", corpus / "train.txt", "--samples", 24, "--context", 32)


def test_the_document(args, corpus):
    ran = shell(*args, "--eval-data", corpus / "valid.txt", "--json")
    document = ran.document
    assert ran.status == 0 and document["rows"] == document["rows_seen"] == 24
    assert document["tokens_seen"] == 24 * 32 and document["verdict"] in ("enough", "more would help")
    assert document["shortfall"] == pytest.approx(document["rows_needed"] * 0.05 / 24, rel=0.1)
    assert document["domain"]["against"] == str(corpus / "valid.txt") and not document["domain"]["flagged"]
    assert document["precision"]["num_units"] == 25 and document["precision"]["unit"] == "document"
    assert {layer["name"].rsplit(".", 1)[-1] for layer in document["layers"]} == {
        *("q_proj", "o_proj", "gate_proj", "down_proj"),
    }
    assert shell(*args, "--eval-data", corpus / "valid.txt", "--json", "--quiet").document == {
        **document,
        "seconds": pytest.approx(document["seconds"], abs=60),
    }


def test_the_lines(args, corpus):
    ran = shell(*args, "--quiet")
    lines = ran.out.splitlines()
    assert ran.status == 0 and ran.err == ""
    assert lines[0].startswith(f"24 calibration rows of {corpus / 'train.txt'}: ")
    assert lines[1].startswith("layers solved (gptq) on 24 rows err some ")
    assert "of the calibration data; " in lines[3] and lines[3].endswith("(95 %)")
    assert lines[4].startswith("loss ") and lines[4].endswith("the kind of text it knows")


def test_text_of_another_kind(args, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n<|endoftext|>\n".join(f"{i} ### Zx9Q; {'kJ7 @%' * (i % 5 + 9)} {i * 7919}" for i in range(60)))
    foreign = [other if argument == args[3] else argument for argument in args]
    document = shell(*foreign, "--eval-data", args[3], "--json").document
    assert document["verdict"] == "wrong domain" and len(document["domain"]["reasons"]) == 2
    document = shell(*foreign, "--json").document
    assert document["verdict"] == "wrong domain" and "where the model expects" in document["domain"]["reasons"][0]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--samples", 0), 2, "samples"),
        (("--scheme", "float"), 2, "leaves weights in float"),
        (("--scheme", "w9"), 2, "unknown scheme"),
        (("--method", "magic"), 2, "'magic' is none of"),
        (("--eval-data", "none.txt"), 3, "none.txt does not exist"),
        (("--context", 1), 2, "context=1"),
        (("--seed", -1), 2, "seed=-1"),
    ],
)
def test_mistakes_are_told_in_one_line(args, options, status, message):
    ran = shell(*args, *options, "--json")
    assert ran.status == status and message in ran.document["error"]


def test_a_quantized_model_is_refused(w4, corpus):
    ran = shell("calibration", w4, "--data", corpus / "train.txt")
    assert ran.status == 2 and "judge calibration data with its float parent" in ran.error
