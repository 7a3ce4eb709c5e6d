import dataclasses
import json

import pytest

from quantailor.errors import UsageError
from quantailor.spec import (
    KNOWN_SCHEMES,
    NF4,
    Balanced,
    Binary,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    Scheme,
    Ternary,
    from_json,
    to_json,
)

OTHERS = ["w2a16-balanced", "w3a2-g7", "w5a16-g96-asym", "w8a8-asym-static", "w1a16", "w1.58a16-g64", "w4a1", "w6a6-g1"]


@pytest.mark.parametrize("text", [*KNOWN_SCHEMES, *OTHERS])
def test_string_and_json_round_trip(text):
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    assert Scheme.parse(f"  {text.upper()} ") == scheme
    assert from_json(json.loads(json.dumps(to_json(scheme)))) == scheme


@pytest.mark.parametrize("bits", range(2, 9))
def test_limits_of_the_integer_grids(bits):
    """Two's complement, the same without its lowest level, and unsigned."""
    n = 2**bits
    assert (Int(bits).qmin, Int(bits).qmax) == (-n // 2, n // 2 - 1)
    assert (Int(bits, narrow=True).qmin, Int(bits, narrow=True).qmax) == (1 - n // 2, n // 2 - 1)
    assert (Int(bits, symmetric=False).qmin, Int(bits, symmetric=False).qmax) == (0, n - 1)


@pytest.mark.parametrize(
    "text, weight, activations",
    [
        ("float", None, None),
        ("w8a8", QuantSpec(Int(8), PerChannel()), QuantSpec(Int(8), PerToken(), dynamic=True, range="minmax")),
        ("w8a8-static", QuantSpec(Int(8), PerChannel()), QuantSpec(Int(8), PerTensor())),
        ("w4a16-g128-asym", QuantSpec(Int(4, symmetric=False), PerGroup(128)), None),
        ("w2a16-g32-balanced", QuantSpec(Balanced(2), PerGroup(32)), None),
        ("nf4", QuantSpec(NF4(), PerGroup(64), range="minmax"), None),
        ("nf4-dq", QuantSpec(NF4(double_quant=True), PerGroup(64), range="minmax"), None),
        ("w1.58a16", QuantSpec(Ternary(), PerChannel()), None),
        (
            "w1a1",
            QuantSpec(Binary(), PerChannel()),
            QuantSpec(Binary(), PerToken(), dynamic=True, range="minmax"),
        ),
    ],
)
def test_what_a_string_means(text, weight, activations):
    assert Scheme.parse(text) == Scheme(weight, activations)


@pytest.mark.parametrize(
    "text, nearest",
    [
        ("w4a16g32", "w4a16-g32"),
        ("w4a16-g32-balanced", "w2a16-g32-balanced"),  # four balanced bits do not exist
        ("nf4-qd", "nf4-dq"),
        ("w1.58a8-asym", "w1.58a8"),
        ("w9a8", "w8a8"),
        ("w0a8", "w8a8"),
        ("w4a16-static", "w4a16"),  # static what?
        ("w1a1-static", "w1a1"),
        ("int4", "nf4"),
        ("", "float"),
    ],
)
def test_an_unknown_string_names_the_nearest(text, nearest):
    with pytest.raises(UsageError) as error:
        Scheme.parse(text)
    told = str(error.value)
    assert told.startswith(f"unknown scheme {text!r}; did you mean ")
    assert nearest in told.partition("?")[0].removeprefix(f"unknown scheme {text!r}").replace(",", "").split()
    assert "The form is w<2-8>a<2-8|16>" in told and error.value.exit_code == 2


def test_a_scheme_without_a_string_shows_as_json():
    per_tensor = Scheme(weight=QuantSpec(Int(4), PerTensor()))
    assert str(per_tensor) == str(to_json(per_tensor))
    assert str(Scheme.parse("w4a16-g32").with_ragged(False)) == "w4a16-g32 (no ragged group)"


def test_ragged_is_of_groups_alone():
    assert Scheme.parse("w8a8").with_ragged(False) == Scheme.parse("w8a8")
    scheme = Scheme.parse("w4a16-g32")
    assert scheme.with_ragged(False).weight.granularity == PerGroup(32, ragged=False)
    assert scheme.with_ragged(False).with_ragged(True) == scheme


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Int(1), "bits=1: an integer grid has 2 to 8 bits; use Binary, Ternary or NF4 otherwise"),
        (lambda: Int(9), "bits=9"),
        (lambda: Int(4, symmetric=False, narrow=True), "narrow=True drops the lowest level of a symmetric grid"),
        (lambda: Balanced(3), "bits=3: the balanced grid is for 2 bits"),
        (lambda: PerGroup(0), "group size 0 must be at least 1; use 32, 64 or 128"),
        (lambda: Scheme.parse("w4a16-g0"), "group size 0 must be at least 1"),
        (lambda: QuantSpec(Int(8), PerToken()), "use dynamic=True, or PerTensor for a static one"),
        (lambda: QuantSpec(NF4(), PerChannel()), "NF4 is defined on blocks; use PerGroup(64)"),
        (lambda: QuantSpec(Int(8), PerChannel(), range="best"), "range='best' is none of minmax, ema, mse"),
    ],
)
def test_what_cannot_be_is_refused(make, told):
    with pytest.raises(UsageError) as error:
        make()
    assert told in str(error.value)


INT = {"is": "Int", "bits": 4}
SPEC = {"is": "QuantSpec", "grid": INT, "granularity": {"is": "PerChannel"}}


@pytest.mark.parametrize(
    "data, told",
    [
        ({"is": "Float"}, "unknown kind 'Float' in a spec; known are Int, NF4"),
        ({"bits": 4}, "unknown kind None"),
        ({"is": ["Int"]}, "unknown kind ['Int']"),
        ({**INT, "nbits": 4}, "unknown key 'nbits' in Int; it has bits, narrow, symmetric"),
        ({"is": "Ternary", "bits": 3}, "unknown key 'bits' in Ternary; it has none"),
        ({"is": "Int"}, "Int lacks its 'bits'"),
        ({**INT, "bits": "4"}, "Int has bits='4', which is of the wrong type"),
        ({**INT, "bits": 4.0}, "Int has bits=4.0"),
        ({**INT, "bits": True}, "Int has bits=True"),
        ({**INT, "bits": 40}, "bits=40: an integer grid has 2 to 8 bits"),
        ({**INT, "symmetric": "no"}, "Int has symmetric='no'"),
        ({**SPEC, "grid": {"is": "PerTensor"}}, "QuantSpec has grid={'is': 'PerTensor'}"),
        ({**SPEC, "range": ["mse"]}, "QuantSpec has range=['mse']"),
        ({"is": "Scheme", "weight": INT}, "Scheme has weight={'is': 'Int', 'bits': 4}"),
        ({"is": "Scheme", "weight": {**SPEC, "more": 1}}, "unknown key 'more' in QuantSpec"),
        ([SPEC], "is no spec; a spec is an object with its type under 'is'"),
        ("w4a16", "'w4a16' is no spec"),
    ],
)
def test_json_that_says_something_else_is_refused(data, told):
    with pytest.raises(UsageError) as error:
        from_json(data)
    assert told in str(error.value)


def test_json_leaves_out_what_has_a_default():
    assert from_json(SPEC) == QuantSpec(Int(4), PerChannel())
    assert from_json(None) is None


def test_schemes_are_frozen_and_serve_as_keys():
    scheme = Scheme.parse("w4a16-g32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.input = None
    assert len({scheme, Scheme.parse("w4a16-g32"), Scheme.parse("w4a16-g64")}) == 2
