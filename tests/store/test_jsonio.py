"""JSON: limits before the parser, and nothing written that another parser refuses."""

import os
import random
import time

import pytest

from quantailor.errors import UntrustedInput
from quantailor.store.jsonio import depth_of, read_json, without_strings, write_json


def refused(path, **limits) -> str:
    with pytest.raises(UntrustedInput) as error:
        read_json(path, **limits)
    assert error.value.exit_code == 3 and "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_a_value_comes_back_with_its_keys_in_order(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"语言": "中文 é \u2028"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value and list(read_json(tmp_path / "a.json")) == ["b", "a"]
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n "b": [\n  1,') and text.endswith("}\n") and "中文" in text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_lacks_is_named_and_the_old_file_stays(tmp_path, bad):
    write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(
        ValueError, match=r"^runs\.1\.loss = -?(nan|inf) is not finite, .*; store None or a string instead$"
    ):
        write_json(tmp_path / "a.json", {"runs": [{"loss": 1.0}, {"loss": bad}]})
    assert read_json(tmp_path / "a.json") == {"loss": 1.0} and os.listdir(tmp_path) == ["a.json"]


def test_what_published_configs_hold_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"time_step_limit": [0.0, Infinity], "a": 1, "a": 2}')
    assert read_json(tmp_path / "a.json") == {"time_step_limit": [0.0, float("inf")], "a": 2}


def test_size_and_depth_are_limited_to_the_byte_and_the_level(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 64 + "]" * 64)
    assert read_json(path, max_bytes=128) is not None
    assert "is larger than 0.000127 MB" in refused(path, max_bytes=127)
    path.write_text('{"a":' * 65 + "1" + "}" * 65)
    assert "nests deeper than 64 levels, the limit; use the original file" in refused(path)
    path.write_text('"' + "[" * 1000 + '\\"' + "[" * 1000 + '"')
    assert len(read_json(path)) == 2001  # brackets in a text are none


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"[" * 5_000_000,
        b'"' + b'\\"' * 2_000_000,  # an open string, of what could each open one
        b'"' + b'\\"' * 2_000_000 + b"\\",
        b'"' * 4_000_001,
        b"]" * 100 + b"[" * 100_000,
        b'["' + b"\\" * 3_000_001,
        b"[" + b"9" * 10_000 + b"]",
    ],
    ids=lambda raw: f"{raw[:6]!r}x{len(raw)}",
)
def test_bombs_are_refused_at_once(tmp_path, raw):
    (tmp_path / "a.json").write_bytes(raw)
    start = time.perf_counter()
    refused(tmp_path / "a.json")
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("raw", [b"", b"{", b'{"a": 1,}', b"\xff\xfe", b"\xef\xbb\xbf{}", b"nul", b"{} {}", b"\0" * 9])
def test_what_is_no_json_is_refused(tmp_path, raw):
    (tmp_path / "a.json").write_bytes(raw)
    assert "is not JSON (" in refused(tmp_path / "a.json") and "; download or copy it again" in refused(
        tmp_path / "a.json"
    )


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    assert "cannot be opened (No such file or directory)" in refused(tmp_path / "a.json")
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file; put the file itself there" in refused(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{}")
    assert read_json(tmp_path / "link") == {}
    assert "cannot be opened" in refused(tmp_path / "link", follow=False)


def depth_by_definition(text: str) -> int:
    """One character at a time."""
    depth = deepest = 0
    inside = escaped = False
    for c in text:
        if inside:
            inside = escaped or c != '"'
            escaped = c == "\\" and not escaped
        elif c == '"':
            inside = True
        elif c in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "]}":
            depth -= 1
    return deepest


def test_depth_matches_its_definition():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice('[]{}"\\a,\n') for _ in range(rng.randrange(30)))
        assert depth_of(without_strings(text.encode()), 10**6) == depth_by_definition(text), text
