"""What a scheme gets where no method is named."""

import pytest

from quantailor import ptq
from quantailor.ptq.defaults import one_pass, rungs
from quantailor.spec import KNOWN_SCHEMES, Scheme


@pytest.mark.parametrize("name", KNOWN_SCHEMES)
def test_every_scheme_has_methods_that_exist(name):
    scheme = Scheme.parse(name)
    chains = [ptq.method(text) for text in (*rungs(scheme), one_pass(scheme))]
    assert not chains[0].needs_hessian, "the first rung is the cheap one"
    smoothed = {"smoothquant" in chain.name for chain in chains[1:]}
    assert smoothed <= {scheme.input is not None and scheme.weight is not None}


def test_descent_is_left_out_where_nothing_can_be_rounded_the_other_way():
    assert rungs(Scheme.parse("nf4"))[-1] == "qronos"
    assert rungs(Scheme.parse("w4a16-g32"))[-1] == "blockap"
