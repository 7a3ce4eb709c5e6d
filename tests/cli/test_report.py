"""`quantailor report` as a shell sees it."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from quantailor.cli.report import report
from quantailor.errors import UntrustedInput, UsageError
from tests.pages.making import FIT, Page

RUNNER = CliRunner()
APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(report)


def ran(*args):
    return RUNNER.invoke(APP, [str(a) for a in args])


def test_json_names_the_file_and_the_page_is_there(w4, tmp_path):
    result = ran(w4, "--out", tmp_path / "a.html", "--lang", "zh", "--receipts-only", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0 and set(document) == {"out", "size_bytes", "lang"}
    written = tmp_path / "a.html"
    assert document == {"out": str(written), "size_bytes": written.stat().st_size, "lang": "zh"}
    assert "每个模块及其理由" in Page(written.read_text(encoding="utf-8")).text


def test_a_line_for_people_with_everything_asked_for(w4, tiny_lm, tmp_path):
    layer = "model.layers.1.mlp.up_proj"
    args = ("--float", tiny_lm, "--layer", layer, "--prompt", "the dog", "--prompt", "a cat")
    result = ran(w4, "--out", tmp_path / "a.html", *args)
    text = Page((tmp_path / "a.html").read_text(encoding="utf-8")).text
    assert result.stdout.startswith(f"{tmp_path / 'a.html'}: ") and result.stdout.endswith("open it in a browser\n")
    assert f"Weights of {layer}" in text and "the dog" in text and "a cat" in text


def test_a_result_that_a_command_printed(tmp_path):
    (tmp_path / "fit.json").write_text(json.dumps(FIT))
    assert ran(tmp_path / "fit.json").exit_code == 0
    assert "PTQ and a short QAT" in Page((tmp_path / "fit.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("args", "kind", "says"),
    [
        (("--lang", "de"), UsageError, "none of en, zh"),
        (("--layer", "nowhere"), UsageError, "not quantized here"),
        (("--float", "missing"), UntrustedInput, "missing"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(w4, tmp_path, args, kind, says):
    result = ran(w4, "--out", tmp_path / "a.html", *args)
    assert isinstance(result.exception, kind) and says in str(result.exception) and "\n" not in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_report_is_replaced_only_when_asked(w4, tmp_path):
    args = (w4, "--out", tmp_path / "a.html", "--receipts-only")
    assert ran(*args).exit_code == 0
    assert isinstance(ran(*args).exception, UsageError)
    assert ran(*args, "--overwrite").exit_code == 0


def test_the_command_itself_is_light():
    """`quantailor --help` must not wait for torch or Jinja."""
    code = (
        "import sys, quantailor.cli.report; print([m for m in ('torch', 'jinja2', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
