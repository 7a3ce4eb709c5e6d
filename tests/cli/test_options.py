"""The small languages of the options."""

import json
import math

import pytest

from quantailor.cli.options import rules, share, show
from quantailor.errors import UsageError
from quantailor.recipe import Keep
from quantailor.spec import Scheme


def test_rules_keep_their_order():
    first, second = rules(["*.down_proj=w8a16", "model.layers.0.*=keep"])

    assert first.pattern == "*.down_proj" and first.action == Scheme.parse("w8a16")
    assert second.pattern == "model.layers.0.*" and second.action == Keep("rule: model.layers.0.*=keep")
    assert rules(None) == rules([]) == []


def test_a_pattern_may_hold_an_equals_sign():
    assert rules(["a=b=keep"])[0].pattern == "a=b"


@pytest.mark.parametrize("text", ["", "=", "*.q_proj", "*.q_proj=", "=keep"])
def test_other_forms_are_refused(text):
    with pytest.raises(UsageError, match="is not PATTERN=SCHEME or PATTERN=keep"):
        rules([text])


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.02", 0.02), ("0", 0.0), ("0%", 0.0), ("150%", 1.5)])
def test_shares(text, value):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "two", "2 percent", "2%%"])
def test_no_shares(text):
    with pytest.raises(UsageError, match=r"is no share; write 2% or 0\.02"):
        share(text)


def test_a_document_holds_only_what_json_knows(capsys):
    show({"a": math.inf, "b": [1.5, math.nan], "c": (-math.inf, "ü")}, "text", True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None],
        "c": [None, "ü"],
    }

    show({"a": 1}, "text", False)
    assert capsys.readouterr().out == "text\n"
