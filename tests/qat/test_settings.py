"""Settings out of range are refused; rates come from the table."""

import math

import pytest

from quantailor.errors import UsageError
from quantailor.qat.settings import LEARNING_RATES, Settings, learning_rates


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-3},
        {"learning_rate": 10.0},
        {"learning_rate": math.nan},
        {"scale_learning_rate": math.inf},
        {"kl_weight": -1.0},
        {"task_weight": -1.0},
        {"kl_weight": 0.0},
        {"seed": -1},
        {"seed": 2**31},
    ],
)
def test_what_is_out_of_range_is_refused_by_name(bad):
    with pytest.raises(UsageError, match=f"{next(iter(bad))}=") as error:
        Settings(**bad)
    assert error.value.exit_code == 2


def test_only_one_of_the_losses_must_count():
    assert Settings(kl_weight=0.0, task_weight=1.0).task_weight == 1.0


@pytest.mark.parametrize("bits", LEARNING_RATES)
def test_the_table_holds_at_a_million_parameters_and_falls_with_size(bits):
    assert learning_rates(Settings(), bits, 1_000_000) == pytest.approx(LEARNING_RATES[bits])
    small, large = (learning_rates(Settings(), bits, size)[0] for size in (10**6, 10**9))
    assert large / small == pytest.approx(1000**-0.65)


def test_every_number_of_bits_has_a_rate_and_fewer_bits_a_higher_one():
    assert set(LEARNING_RATES) == set(range(9))
    rates = [LEARNING_RATES[bits][0] for bits in range(1, 9)]
    assert rates == sorted(rates, reverse=True)


def test_what_is_given_is_taken():
    assert learning_rates(Settings(learning_rate=0.1, scale_learning_rate=0.2), 4, 10**9) == (0.1, 0.2)
