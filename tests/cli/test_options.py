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


def test_conditions_stand_in_place_of_a_name_or_beside_it():
    texts = ["size<5000=keep", "type:Conv2d=w8a8", "*.mlp.*&type:Linear&size>100&size<900=w4a16:rtn"]
    by_size, by_type, all_of_them = rules(texts)
    assert (by_size.pattern, by_size.fewer_than, by_size.action) == (None, 5000, Keep("rule: size<5000=keep"))
    assert (by_type.pattern, by_type.module_type, by_type.more_than) == (None, "Conv2d", None)
    assert (all_of_them.pattern, all_of_them.module_type, all_of_them.method) == ("*.mlp.*", "Linear", "rtn")
    assert (all_of_them.more_than, all_of_them.fewer_than) == (100, 900)


@pytest.mark.parametrize("text", ["size<=5=keep", "size>many=keep", "a&b=keep", "type:=keep", "size>1&size>2=keep"])
def test_other_conditions_are_refused(text):
    with pytest.raises(UsageError, match="is no condition, or comes twice; use a name, type:Linear, size>100000"):
        rules([text])


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


def test_rules_can_stand_in_a_file(tmp_path):
    """As `sensitivity --save-rules` writes them, among others and in order."""
    file = tmp_path / "rules.txt"
    file.write_text("*.q_proj=w8a16\n\n*.k_proj=keep\n")
    assert rules(["a=keep", f"@{file}", "b=keep"]) == rules(["a=keep", "*.q_proj=w8a16", "*.k_proj=keep", "b=keep"])


def test_a_file_of_rules_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary", "."):
        with pytest.raises(UsageError, match="names a file that cannot be read"):
            rules([f"@{tmp_path / name}"])
