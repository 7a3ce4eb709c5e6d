"""The command by itself: its text, its document, its mistakes."""

import json

import pytest
import typer
from typer.testing import CliRunner

from quantailor.cli import options
from quantailor.cli.plan import plan
from quantailor.errors import UntrustedInput, UsageError
from tests.cost.configs import folder

app = typer.Typer()
app.command()(plan)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "shown", False)
    model = folder(tmp_path, "llama")

    def run(*args):
        given = [str(a) for a in (model, "--scheme", "w8a8", "--hardware", "4xA100", *args)]
        return CliRunner().invoke(app, given)

    return run


def test_text_for_people(shell):
    ran = shell("--data", "5000", "--price", "1.5")
    assert ran.exit_code == 0, ran.output
    for way in ("ptq", "hybrid", "qat", "lora-qat", "progressive", "scratch"):
        assert f" {way} " in ran.output
    assert (
        "price 1.5 an hour" in ran.output
        and "decision: ptq" in ran.output
        and "next: quantailor quantize" in ran.output
    )
    assert "rests on" in ran.output and "assumed" in ran.output and "gradients" in ran.output


def test_json_is_one_document(shell):
    ran = shell("--data", "5000", "--json", "--why-not", "scratch")
    document = json.loads(ran.stdout)
    assert {"ways", "decision", "storage", "kernels", "checklist", "command", "hardware"} <= document.keys()
    assert "ParetoQ" in document["asked"]["because"]
    assert document["ways"]["qat"]["memory"].keys() >= {
        "weights",
        "activations",
        "gradients",
        "optimizer",
        "quantizer",
        "cache",
    }


def test_why_not_in_text(shell):
    assert "why not qat: PTQ is expected to meet" in shell("--data", "500", "--why-not", "qat").output


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("--hardware", "abacus"), UsageError), (("--data", "/no/such/file.txt"), UntrustedInput),
        (("--why-not", "magic"), UsageError), (("--tolerance", "x"), UsageError), (("--rule", "x"), UsageError),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(shell, args, error):
    ran = shell(*args)
    assert isinstance(ran.exception, error) and len(str(ran.exception).splitlines()) == 1
