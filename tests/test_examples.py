"""Every example runs, and so does the Python block of the README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: list[str], folder: Path) -> str:
    result = subprocess.run([sys.executable, *code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("quickstart", [], "'equal': True"),
        ("mixed_by_rule", [], "with rules: perplexity"),
        ("rescue_two_bits", ["6"], "QAT"),
        ("cnn_w8a8", [], "w8a8-static: 9"),
        ("inside_block", [], "'equal': True"),
        ("auto_qat", ["out"], "\nfeasible: w4a16-g32"),
        ("nas", ["out", "4"], "(at most 900,000)"),
        ("hybrid", [], "activation ranges trained: 5 steps, perplexity"),
        ("partial", [], "upper half trained perplexity"),
        ("cnn_qat", [], "'equal': True"),
        ("probe", [], "forecast of 100 steps"),
        ("new_task", [], "tune quantized - restore"),
        ("watched", ["4"], "ended by"),
        ("export_everywhere", [], "layers, the same integers"),
        ("lora_qat", ["6"], "inside the rounding: merging moves logits by 0.0"),
        ("progressive", ["6"], "w4a16-g32 nats a token"),
        ("ternary", ["out", "3"], "'equal': True"),
        ("binary", ["3"], "binaryconnect: perplexity"),
        ("distill", ["2"], "attention scores: perplexity"),
    ],
)
def test_example(name, arguments, expected, tmp_path):
    assert expected in run([str(ROOT / "examples" / f"{name}.py"), *arguments], tmp_path)


def blocks_of(page: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found, f"{page} shows no Python"
    return found


def test_readme_block(tmp_path):
    block = blocks_of("README.md")[0]
    (tmp_path / "block.py").write_text(block.replace("steps=100", "steps=4"), encoding="utf-8")
    assert "True" in run(["block.py"], tmp_path)


def code_of(block: str) -> str:
    """Without comments and without what it prints in words."""
    tree = ast.parse(block)
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print":
            call.args = [a for a in call.args if not isinstance(a, ast.Constant)]
    return ast.dump(tree)


def test_both_readmes_show_the_same_code():
    english, chinese = (list(map(code_of, blocks_of(page))) for page in ("README.md", "README.zh-CN.md"))
    assert english == chinese


def test_all_examples_are_run():
    run = {"quickstart", "mixed_by_rule", "rescue_two_bits", "cnn_w8a8", "inside_block", "auto_qat", "nas"}
    run |= {"hybrid", "partial", "cnn_qat", "probe", "new_task", "watched", "export_everywhere"}
    run |= {"lora_qat"}
    run |= {"progressive", "ternary", "binary", "distill"}
    assert {p.stem for p in (ROOT / "examples").glob("*.py")} == run
