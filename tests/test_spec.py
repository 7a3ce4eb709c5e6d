import dataclasses
import json
import math

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
    why_not_convolution,
)

OTHERS = [
    *("w2a16-balanced", "w3a2-g7", "w5a16-g96-asym", "w8a8-asym-static", "w1a16", "w1.58a16-g64", "w4a1", "w6a6-g1"),
    *("w8a8-static-histogram", "w8a8-static-ema", "w4a8-g32-asym-static-minmax", "w8a4-static-percentile99.9"),
    *("w8a8-outliers4.5", "w4a8-g32-asym-outliers", "w1.58a8-outliers12", "w4a8-ag16-asym", "w2a4-g7-ag7-balanced"),
]


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
        (
            "w8a8-outliers",
            QuantSpec(Int(8), PerChannel()),
            QuantSpec(Int(8), PerToken(), dynamic=True, range="minmax", outliers=6.0),
        ),
        (
            "w4a8-g32-ag32",
            QuantSpec(Int(4), PerGroup(32)),
            QuantSpec(Int(8), PerGroup(32), dynamic=True, range="minmax"),
        ),
        ("w8a8-static-mse", QuantSpec(Int(8), PerChannel()), QuantSpec(Int(8), PerTensor())),
        ("w8a8-static-kl", QuantSpec(Int(8), PerChannel()), QuantSpec(Int(8), PerTensor(), range="kl")),
        (
            "w8a8-static-percentile",
            QuantSpec(Int(8), PerChannel()),
            QuantSpec(Int(8), PerTensor(), range="percentile", percentile=99.99),
        ),
        (
            "w8a8-static-percentile99.5",
            QuantSpec(Int(8), PerChannel()),
            QuantSpec(Int(8), PerTensor(), range="percentile", percentile=99.5),
        ),
    ],
)
def test_what_a_string_means(text, weight, activations):
    assert Scheme.parse(text) == Scheme(weight, activations)


def test_other_names_of_the_same():
    for text in ("llm.int8", "LLM.int8()", "w8a8-outliers6", "w8a8-outliers6.0"):
        assert str(Scheme.parse(text)) == "w8a8-outliers"
    assert str(Scheme.parse("w8a8-static-percentile99.99")) == "w8a8-static-percentile"


@pytest.mark.parametrize(
    "text, nearest",
    [
        ("w4a16g32", "w4a16-g32"),
        ("nf4-qd", "nf4-dq"),
        ("w9a8", "w8a8"),
        ("w0a8", "w8a8"),
        ("w8a8-static-kl9", "w8a8-static-kl"),
        ("w8a8-outlier", "w8a8-outliers"),
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
    assert "The form is w<2-8|1.58|1>a<2-8|16|1>" in told and error.value.exit_code == 2


@pytest.mark.parametrize(
    "text, reason, way_out",
    [
        ("w4a16-g32-balanced", "the balanced grid is for 2 bits", "use w2a16-balanced, or leave -balanced out"),
        ("w1.58a8-asym", "ternary weights are -1, 0 and 1 times a scale", "leave -asym out, or use w2a8-asym"),
        ("w1a16-g32-asym", "binary weights are -1 and 1 times a scale", "leave -asym out, or use w2a16-g32-asym"),
        ("w1a8-balanced", "binary weights are -1 and 1", "leave -balanced out, or use w2a8-balanced"),
        ("w4a16-static", "a16 leaves activations in float", "use a8, or leave -static out"),
        ("w4a16-static-kl", "a16 leaves activations in float", "use a8, or leave -static out"),
        ("w8a16-outliers", "a16 leaves activations in float", "use a8, or leave -outliers out"),
        ("w4a16-g32-ag32", "a16 leaves activations in float", "use a8, or leave -ag32 out"),
        ("w1a1-static", "binary activations have the mean magnitude of each token", "leave -static out, or use a8"),
        ("w4a1-outliers", "binary activations have the mean", "leave -outliers out, or use a8"),
        ("w1a1-ag32", "binary activations have the mean", "leave -ag32 out, or use a8"),
        ("w8a8-static-outliers", "static scales are fixed beforehand, but outlier columns", "leave -static or -outl"),
        ("w8a8-ag32-static", "static scales are fixed beforehand, but the scales of groups", "leave -static or -ag32"),
        ("w8a8-ag32-outliers", "the rest of a row has one scale", "leave -ag32 or -outliers out"),
        *(
            (text, "NF4 is 4 bits by definition", "Use nf4 or nf4-dq for 4 bits, w8a16 or w8a8 for 8")
            for text in ("nf8", "nf2", "NF8-dq", "w8a8-nf4", "nf4a8", "nf4-w8", "w4a8-nf4", "int8-nf4", "nf4-8bit")
        ),
        ("load_in_8bit+nf4", "it has no 8-bit form", "w4a8-g32 for 4-bit weights with 8-bit activations"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_with_the_reason(text, reason, way_out):
    with pytest.raises(UsageError) as error:
        Scheme.parse(text)
    told = str(error.value)
    assert told.startswith(f"scheme {text.lower()!r} cannot be: ")
    assert 0 < told.index(reason) <= told.index(way_out)


def test_groups_of_weights_and_of_activations_are_of_one_size():
    for make in (
        lambda: Scheme.parse("w4a8-g32-ag64"),
        lambda: dataclasses.replace(Scheme.parse("w4a8-g32"), input=Scheme.parse("w8a8-ag64").input),
    ):
        with pytest.raises(UsageError) as error:
            make()
        assert "groups of 32 weights and of 64 activations do not meet" in str(error.value)
        assert "use -g32-ag32 or -g64-ag64, or leave one of the two out" in str(error.value)


def test_what_a_convolution_cannot_have():
    for text in ("w8a8", "w8a8-static-kl", "w4a16-g32", "float"):
        assert why_not_convolution(Scheme.parse(text)) is None
    assert "w8a8-outliers cannot be a convolution's: outlier columns" in why_not_convolution(Scheme.parse("llm.int8"))
    told = why_not_convolution(Scheme.parse("w8a8-ag64"))
    assert "groups of 64 inputs" in told and "give it w8a8 or w8a8-static by a rule, or keep it" in told


def test_a_scheme_without_a_string_shows_as_json():
    per_tensor = Scheme(weight=QuantSpec(Int(4), PerTensor()))
    assert str(per_tensor) == str(to_json(per_tensor))
    static_binary = Scheme(weight=QuantSpec(Int(4), PerChannel()), input=QuantSpec(Binary(), PerTensor()))
    assert str(static_binary) == str(to_json(static_binary))  # its string would be one that is refused
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
        (lambda: QuantSpec(Int(8), PerTensor(), range="percentile", percentile=50), "must lie in (50, 100]; 99.99 is"),
        (
            lambda: QuantSpec(Int(8), PerTensor(), percentile=99.0),
            "says nothing to range='mse'; use range='percentile'",
        ),
        (lambda: Scheme.parse("w8a8-static-percentile101"), "percentile=101.0 must lie in (50, 100]"),
        (lambda: Scheme.parse("w8a8-outliers0"), "outliers=0.0 must be a finite magnitude above 0; the paper's is 6.0"),
        (lambda: QuantSpec(Int(8), PerToken(), dynamic=True, outliers=math.nan), "outliers=nan must be a finite"),
        (lambda: QuantSpec(Int(8), PerTensor(), outliers=6.0), "use an integer grid, PerToken() and dynamic=True"),
        (lambda: QuantSpec(Int(8), PerGroup(8), dynamic=True, outliers=6.0), "rows that get one scale at each call"),
        (lambda: QuantSpec(Binary(), PerToken(), dynamic=True, outliers=6.0), "use an integer grid"),
        (lambda: Scheme(output=Scheme.parse("llm.int8").input), "outliers are columns of an input"),
        (lambda: Scheme(weight=Scheme.parse("llm.int8").input), "outliers are columns of an input"),
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
        ({"is": "NF4", "bits": 8}, "NF4 with bits=8 cannot be: NF4 is 4 bits by definition"),
        ({"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "load_in_8bit with nf4 cannot be: NF4 is 4 bits"),
        ({"load_in_8bit": True}, "'load_in_8bit' is an option of bitsandbytes, not of a spec: load_in_8bit is the sch"),
        ({"bnb_4bit_quant_type": "nf4"}, "load_in_4bit with nf4 is nf4, with bnb_4bit_use_double_quant nf4-dq"),
        ({**SPEC, "outliers": "6"}, "QuantSpec has outliers='6'"),
        ({**SPEC, "outliers": True}, "QuantSpec has outliers=True"),
        ({**SPEC, "outliers": -6.0}, "outliers=-6.0 must be a finite magnitude above 0"),
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
    plain, outliers = to_json(Scheme.parse("w8a8"))["input"], to_json(Scheme.parse("w8a8-outliers"))["input"]
    assert "outliers" not in plain and "percentile" not in plain  # readers of before know neither
    assert outliers == plain | {"outliers": 6.0} and from_json(plain | {"outliers": 6}).outliers == 6
    assert from_json(None) is None


def test_schemes_are_frozen_and_serve_as_keys():
    scheme = Scheme.parse("w4a16-g32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.input = None
    assert len({scheme, Scheme.parse("w4a16-g32"), Scheme.parse("w4a16-g64")}) == 2
