"""`quantailor sensitivity` as a shell sees it."""

import pytest

from quantailor.cli import main, options
from quantailor.cli.sensitivity import sensitivity
from tests.cli.shell import shell


@pytest.fixture(autouse=True)
def registered():
    if all(c.name != "sensitivity" for c in main.app.registered_commands):
        main.app.command("sensitivity")(sensitivity)


@pytest.fixture
def args(trained_lm, corpus):
    return ("sensitivity", trained_lm, "--data", corpus / "train.txt", "--samples", 8, "--context", 32, "--bits", "4,2")


def test_the_document_is_one_and_the_rules_file_is_what_rule_takes(args, tmp_path):
    rules = tmp_path / "rules.txt"
    extra = ("--average-bits", 4.2, "--choices", "w2a16-g32,w4a16-g32,w3a16-g32", "--save-rules", rules, "--json")
    ran = shell(*args, *extra)
    document = ran.document
    assert ran.status == 0 and document["bits"] == [4, 2] and document["rules_file"] == str(rules)
    assert document["mixed"]["average_bits"] <= 4.2 and {r["role"] for r in document["recommendation"]} >= {"o", "head"}
    read = options.rules(rules.read_text().splitlines())
    assert [f"{r.pattern}={r.action}" for r in read] == document["mixed"]["rules"] and len(read) == 14


def test_without_a_budget_the_rules_are_the_recommendation(args, tmp_path):
    rules = tmp_path / "rules.txt"
    document = shell(*args, "--tolerance", 5, "--save-rules", rules, "--json", "--quiet").document
    assert {r["bits"] for r in document["recommendation"]} == {2} and "mixed" not in document
    assert {line.split("=")[1] for line in rules.read_text().splitlines()} == {"w2a16-g32"}


def test_the_picture(args):
    ran = shell(*args, "--quiet", "--untied", "--how", "fisher")
    lines = ran.out.splitlines()
    assert ran.status == 0 and ran.err == "" and lines[0].startswith("KL from float, nats a position")
    assert "4 bits" in lines[1] and "2 bits" in lines[1]
    row = next(line for line in lines if line.startswith("model.layers.1.self_attn.v_proj"))
    assert row.split()[1] == "q/k/v" and 0 < float(row.split()[2]) < float(row.split()[3])
    assert next(line for line in lines if line.startswith("model.layers.0 ")).split()[1:] == ["scores", "-", "-"]
    assert any(line.startswith("all together") for line in lines) and any("fisher with gptq" in line for line in lines)
    assert all(line.isprintable() for line in lines), "no colour codes in a pipe"


@pytest.mark.parametrize(
    ("extra", "status", "message"),
    [
        (("--bits", "x"), 2, "--bits 'x'"),
        (("--bits", "9"), 2, "w9"),
        (("--how", "guess"), 2, "guess"),
        (("--choices", "w4a16"), 2, "--average-bits"),
        (("--tolerance", "0"), 2, "tolerance=0"),
        (("--average-bits", "0"), 2, "below the least"),
        (("--method", "magic"), 2, "magic"),
        (("--data", "none.txt"), 3, "none.txt does not exist"),
    ],
)
def test_mistakes(args, extra, status, message):
    ran = shell(*args, "--quiet", *extra)
    assert ran.status == status and message in ran.error and ran.out == ""


def test_a_file_that_exists_is_left_alone(args, tmp_path):
    (tmp_path / "mine").write_text("mine")
    ran = shell(*args, "--save-rules", tmp_path / "mine")
    assert ran.status == 2 and "left alone" in ran.error and (tmp_path / "mine").read_text() == "mine"
