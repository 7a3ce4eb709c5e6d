"""The shell's entry: help at once, clean ends, statuses by the table."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import quantailor
from quantailor import errors
from quantailor.cli import main
from tests.cli.shell import Ran, shell

COMMANDS = [command.name for command in main.app.registered_commands]
HEAVY = {"torch", "transformers", "numpy", "safetensors", "accelerate", "tokenizers", "datasets"}
PROBE = """
import json, sys
sys.argv = ["quantailor", *sys.argv[1:]]
from quantailor.cli.main import run
try:
    run()
except SystemExit as stop:
    print(json.dumps({"status": stop.code, "loaded": sorted(sys.modules)}), file=sys.stderr)
"""


def cold(*args: str) -> tuple[Ran, set[str], float]:
    """A command in a fresh interpreter: what came of it, the packages it loaded, its seconds of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run([sys.executable, "-c", PROBE, *args], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    told = json.loads(ran.stderr.splitlines()[-1])
    status = told["status"] or 0
    return Ran(status, ran.stdout, ran.stderr), {name.split(".")[0] for name in told["loaded"]}, seconds


def test_help_is_there_at_once_and_loads_nothing_heavy():
    runs = [cold("--help") for _ in range(3)]
    ran, loaded, _ = runs[0]

    assert ran.status == 0 and all(name in ran.out for name in COMMANDS)
    assert not loaded & HEAVY
    assert min(seconds for _, _, seconds in runs) < 0.5


@pytest.mark.parametrize("args", [("fit", "--help"), ("schemes",), ("--version",), ("fit", "nothing")])
def test_what_needs_no_model_loads_nothing_heavy(args):
    assert not cold(*args)[1] & HEAVY


def test_the_commands_are_those_of_the_design():
    assert [
        *(
            "plan",
            "fit",
            "quantize",
            "train",
            "watch",
            "probe",
            "retask",
            "eval",
            "check",
            "merge",
            "export",
            "convert",
            "report",
        ),
        *("search", "nas", "sensitivity", "inventory", "generate", "bench", "calibration", "schemes", "demo"),
    ] == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(name):
    ran = shell(name, "--help")
    assert ran.status == 0 and ran.err == ""
    examples = [line.split("Example:")[1].split() for line in ran.out.splitlines() if "Example:" in line]
    assert len(examples) == 1 and examples[0][:2] == ["quantailor", name]
    assert "--json" in ran.out, "every command prints a result"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_in_an_example_exists(name):
    text = re.sub(r"-\n\s+", "-", shell(name, "--help").out)  # lines are broken at hyphens too
    command = typer.main.get_command(main.app).commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in text.split("Example:")[1].split()[:20] if word.startswith("--")} - {"--help"} <= known


def test_version():
    assert shell("--version").out == f"quantailor {quantailor.__version__}\n"


def test_the_package_runs_as_a_module():
    """As `torchrun -m quantailor` starts it."""
    ran = subprocess.run([sys.executable, "-m", "quantailor", "--version"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stdout == f"quantailor {quantailor.__version__}\n"


def test_no_command_shows_the_help():
    ran = shell()
    assert ran.status == 2 and "Usage: " in ran.err and all(name in ran.err for name in COMMANDS)


def test_the_installed_script_answers(tmp_path):
    script = Path(sys.executable).with_name("quantailor")
    if not script.exists():
        script = Path(shutil.which("quantailor") or pytest.skip("quantailor is not installed as a script"))
    ran = subprocess.run(
        [script, "check", tmp_path / "nothing", "--json"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )

    assert ran.returncode == 3 and ran.stderr.count("\n") == 1
    document = json.loads(ran.stdout)
    assert document["exit_code"] == 3 and ran.stderr == f"quantailor: {document['error']}\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.QuantailorError("a\nb"), 1),
        (errors.UsageError("a\nb"), 2),
        (errors.UntrustedInput("a\nb"), 3),
        (errors.Infeasible("a\nb"), 4),
        (errors.QualityGateFailed("a\nb"), 5),
        (KeyboardInterrupt(), 130),
        (main._Terminated(), 143),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 1),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_statuses_are_those_of_the_table(monkeypatch, tmp_path, error, status, as_json):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("quantailor.api.check", fail)
    ran = shell("check", tmp_path, *(["--json"] if as_json else []))

    assert ran.status == status and len(ran.error.splitlines()) == 1
    if as_json:
        assert ran.document == {"error": ran.error.removeprefix("quantailor: "), "exit_code": status}
    else:
        assert ran.out == ""


@pytest.mark.parametrize("bug", [ZeroDivisionError("a bug"), RuntimeError("a bug"), OSError("a bug")])
def test_a_bug_shows_its_traceback(monkeypatch, tmp_path, bug):
    def fail(*_, **__):
        raise bug

    monkeypatch.setattr("quantailor.api.check", fail)
    with pytest.raises(type(bug), match="a bug"):
        shell("check", tmp_path)


def test_a_reader_that_goes_away_is_no_bug():
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, "schemes"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)

    assert "Traceback" not in ran.stderr.split('{"status"')[0]
