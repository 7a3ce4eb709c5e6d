"""report.md says what report.json says, and nothing in it can break out of its place."""

import copy
import json
import re

import pytest

from quantailor.pages.markdown import fit_page

DATA = {
    "verdict": "hybrid",
    "metric": "perplexity",
    "float": {"value": 10.0},
    "final": {"name": "hybrid", "value": 10.1, "loss": 0.01},
    "tolerance": 0.02,
    "scheme": "w4a16-g32",
    "method": "gptq+qat",
    "steps": [
        {"name": "float", "value": 10.0, "reason": "measured", "seconds": 1.04, "loss": 0.0, "change_interval": None},
        {"name": "gptq", "value": 11.0, "reason": "cheap", "seconds": 2.0, "loss": 0.1, "change_interval": [0.5, 1.5]},
        {"name": "hybrid", "value": 10.1, "reason": "short", "seconds": 6.0, "loss": 0.01, "change_interval": [-1, 1]},
    ],
    "size_bytes": 1_234_567,
    "bits_per_weight": 4.5,
    "float_size_bytes": 9_876_543,
    "float_bits_per_weight": 32.0,
    "recovery": 0.9,
    "recovery_control": 0.75,
    "check": {"equal": True, "layers": 14, "integers_compared": 90_624, "max_logit_difference": 1.5e-7},
    "notes": ["2 layers have a shorter last group"],
    "inventory": [
        {"name": "", "type": "Whole", "scheme": None, "reason": "kept"},
        {"name": "model.layers.0.q_proj", "type": "Linear", "scheme": "w4a16-g32", "reason": "in a repeated block"},
        {"name": "lm_head", "type": "Linear", "scheme": None, "reason": "output head: kept"},
    ],
    "command": "quantailor fit ./model --scheme w4a16-g32",
    "environment": {"torch": "2.13", "threads": "1"},
}  # fmt: skip


DATA["inventory"][1]["report"] = {"output_error": 0.0123}


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head; an escaped border is none."""
    part = page.split(heading, 1)[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_everything_a_reader_needs_is_there():
    page = fit_page(DATA)

    assert "**hybrid**: PTQ lost too much; a short QAT from there meets the tolerance." in page
    assert "perplexity 10.0000 in float, 10.1000 at w4a16-g32 (+1.00%, tolerance 2.00%)" in page
    assert rows(page, "# quantailor fit") == [
        ["float", "10.0000", "", "", "1.0", "measured"],
        ["gptq", "11.0000", "+10.00%", "+0.5000 to +1.5000", "2.0", "cheap"],
        ["hybrid", "10.1000", "+1.00%", "-1.0000 to +1.0000", "6.0", "short"],
    ]
    assert rows(page, "## Size") == [["float", "9,876,543", "32.00"], ["w4a16-g32", "1,234,567", "4.50"]]
    assert "Training took back 90% of what PTQ had lost" in page and "for as many steps: 75%" in page
    assert "**equal**. 14 layers, 90,624 integers, largest logit difference 1.5e-07" in page
    assert "- 2 layers have a shorter last group" in page
    assert rows(page, "## What was done to each module") == [
        ["(the model)", "Whole", "float", "kept", ""],
        ["model.layers.0.q_proj", "Linear", "w4a16-g32", "in a repeated block", "0.0123"],
        ["lm_head", "Linear", "float", "output head: kept", ""],
    ]
    assert "```\nquantailor fit ./model --scheme w4a16-g32\n```" in page
    assert rows(page, "## Again") == [["torch", "2.13"], ["threads", "1"]]


@pytest.mark.parametrize("verdict", ["ptq", "hybrid", "qat", "infeasible"])
def test_every_verdict_is_explained(verdict):
    page = fit_page({**DATA, "verdict": verdict})
    assert f"**{verdict}**: " in page


def test_a_failed_proof_shouts():
    assert "**NOT EQUAL**" in fit_page({**DATA, "check": {**DATA["check"], "equal": False}})


HOSTILE = [
    "a|b",
    "a\\|b",
    "a\\",
    "<script>alert(1)</script>",
    "</td><img src=x onerror=alert(1)>",
    "two\nlines\r\n| a | b |",
    "`` ` ``` code",
    "![pixel](http://example.org/p.png)",
    "[click](javascript:alert(1))",
    "a\u2028b\x00",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_strangers_chose_stay_in_their_cell(name):
    data = copy.deepcopy(DATA)
    data["inventory"][1]["name"] = data["inventory"][1]["type"] = data["inventory"][1]["reason"] = name
    data["steps"][1]["reason"] = name
    data["notes"] = [name]
    data["environment"][name] = name
    data["scheme"] = name
    page, plain = fit_page(data), fit_page(DATA)

    assert page.count("\n") == plain.count("\n") + 1, "one line more: the new one under environment"
    assert [len(row) for row in rows(page, "## What was done")] == [5, 5, 5]
    assert [len(row) for row in rows(page, "# quantailor fit")] == [6, 6, 6]
    assert "<" not in page and page.count("`") == plain.count("`")
    assert not re.search(r"(?<!\\)[\[\]!]", page)


def test_a_command_cannot_close_its_fence():
    page = fit_page({**DATA, "command": "quantailor fit 'a\n```\n# owned\n'"})
    assert page.count("```") == 2 and "\n# owned" not in page


def test_figures_that_are_not_finite():
    data = copy.deepcopy(DATA)
    for value in (float("inf"), None):
        data["steps"][1]["value"] = data["steps"][1]["loss"] = data["final"]["value"] = data["final"]["loss"] = value
        data["steps"][1]["change_interval"] = None
        page = fit_page(data)
        assert rows(page, "# quantailor fit")[1][1:3] == ["not finite", "not finite"]
        assert "not finite at w4a16-g32 (not finite, tolerance 2.00%)" in page


def test_what_may_be_missing_is_left_out():
    page = fit_page({**DATA, "recovery": None, "recovery_control": None, "notes": []})
    assert "took back" not in page and "## Notes" not in page


def test_it_is_made_from_plain_json():
    assert fit_page(json.loads(json.dumps(DATA))) == fit_page(DATA)
