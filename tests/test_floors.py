"""The house stands: imports go down only, and importing does no work. Read from the source, so nothing is run."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import quantailor

PACKAGE = Path(quantailor.__file__).parent
FLOORS = (
    ("__init__", "environment", "errors", "spec", "points", "recipe", "progress", "processes"),
    ("numerics", "store"),
    ("kernels", "observers"),
    ("nn",),
    ("models", "data"),
    ("ptq", "qat", "cost", "evaluate"),
    ("searching", "formats", "pages"),
    ("verbs", "hf"),
    ("api",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Imports inside functions, beside those of cli/: each with the reason.
INNER_IMPORTS = {
    "quantailor.__init__": "the verbs are looked up on first use, so that importing the package costs nothing",
    "quantailor.data.sources": "datasets is an extra, and slow to import",
    "quantailor.formats.engines": "onnxruntime and openvino are extras",
    "quantailor.formats.gguf": "gguf is an extra",
    "quantailor.kernels.triton.library": "triton is an extra, and slow to import",
    "quantailor.searching.shared_study": "optuna is an extra",
    "quantailor.verbs.harness": "lm-eval is an extra, and slow to import",
    "quantailor.verbs.exporting": "onnx and onnxruntime are an extra",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str:
    """`quantailor.ptq.gptq` -> `ptq`: what stands on a floor."""
    return [*module.split("."), "__init__"][1]


def imported(tree: ast.AST) -> list[tuple[str, int]]:
    """(module of ours, line) of each import, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative"
            # `from quantailor.formats import layout` imports the module; `from quantailor.spec import Int` a name
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in full]
        found += [(name, node.lineno) for name in names if name.split(".")[0] == "quantailor"]
    return found


def test_every_module_stands_on_a_floor():
    assert {part_of(name) for name in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_to_lower_floors_or_stay_in_the_package(name):
    mine = part_of(name)
    for other, line in imported(MODULES[name]):
        theirs = part_of(other)
        allowed = FLOOR[theirs] < FLOOR[mine] or theirs == mine or FLOOR[mine] == 0 == FLOOR[theirs]
        assert allowed, f"{name}, line {line}: {other} stands on floor {FLOOR[theirs]}, {mine} on {FLOOR[mine]}"


def test_no_two_modules_import_each_other_in_a_circle():
    edges = {name: {other for other, _ in imported(tree) if other != name} for name, tree in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_no_star_and_none_inside_a_function(name):
    tree = MODULES[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{name}, line {node.lineno}"
    if part_of(name) in ("cli", "__main__") or name in INNER_IMPORTS:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = [n.lineno for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inner, f"{name}, line {inner[0]}: an import inside a function"


def test_the_listed_exceptions_are_still_needed():
    for name in INNER_IMPORTS:
        functions = [n for n in ast.walk(MODULES[name]) if isinstance(n, ast.FunctionDef)]
        assert any(isinstance(n, ast.Import | ast.ImportFrom) for f in functions for n in ast.walk(f)), name


# Kernels cannot be written down without Triton; kernels/triton/library.py, which asks for it, can be imported anywhere.
NEED_TRITON = [n for n in MODULES if n.startswith("quantailor.kernels.triton.") and not n.endswith(".library")]

STATE = """
import logging, os, random, sys, warnings
import rich.console, rich.progress, typer  # what they do on import is theirs
def state():
    root = logging.getLogger()
    return dict(os.environ), random.getstate(), root.level, list(root.handlers), list(warnings.filters), os.getcwd()
before = state()
import {module}
assert state() == before, "importing changed the environment, the seed, logging or warnings"
print(*(name for name in ("torch", "transformers", "numpy") if name in sys.modules))
"""


@pytest.mark.parametrize("module", ["quantailor", "quantailor.spec", "quantailor.recipe", "quantailor.cli.main"])
def test_importing_these_does_no_work_and_needs_no_torch(module):
    result = subprocess.run([sys.executable, "-c", STATE.format(module=module)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


OURS = """
import logging, os, sys, warnings
import torch, transformers, accelerate, datasets, peft  # what they do on import is theirs
import transformers.trainer, transformers.quantizers
import rich, typer
try:
    import lm_eval.evaluator, lm_eval.models.huggingface, lm_eval.tasks
except ImportError:
    pass  # an extra
def state():
    loggers = {n: (l.level, len(l.handlers)) for n, l in logging.root.manager.loggerDict.items() if hasattr(l, "level")}
    ours = {n: v for n, v in loggers.items() if n.startswith("quantailor")}
    root = logging.getLogger()
    verbosity = transformers.utils.logging.get_verbosity()
    return (dict(os.environ), torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
            torch.is_grad_enabled(), root.level, len(root.handlers), ours, verbosity, torch.get_default_device())
before = state()
import importlib
for name in %r:
    importlib.import_module(name)
after = state()
assert after == before, [(a, b) for a, b in zip(after, before) if a != b]
assert "quantailor" not in transformers.models.auto.configuration_auto.CONFIG_MAPPING or "quantailor.hf" in sys.modules
"""


def test_importing_all_of_it_changes_nothing():
    """No seed, threads, default type, environment or logging: neither by one module nor by all together."""
    absent = NEED_TRITON if find_spec("triton") is None else []
    names = [name for name in MODULES if part_of(name) not in ("__init__", "__main__") and name not in absent]
    result = subprocess.run([sys.executable, "-c", OURS % (names,)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
