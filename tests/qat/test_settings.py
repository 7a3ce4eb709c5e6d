"""Settings out of range are refused; rates come from the table."""

import math

import pytest

from quantailor.errors import UsageError
from quantailor.qat.settings import DEFAULTS, Settings, learning_rates, resolved


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
        {"batch_size": 0},
        {"accumulate": 0},
        {"checkpoint_every": 0},
        {"warmup": 1.5},
        {"final_rate": -0.1},
        {"freeze_ranges": math.nan},
        {"freeze_oscillating": 2.0},
        {"freeze_lower": 1.0},
        {"average": -1.0},
        {"layer_decay": 0.0},
        {"layer_decay": 1.1},
        {"cage": -1.0},
        {"cage": math.inf},
        {"clip_decay": math.nan},
        {"trains": "none"},
        {"gradient": "sgd"},
        {"precision": "float8"},
        {"optimizer": "sgd"},
        {"parallel": "tp"},
        {"gradient": "ste", "trains": "scales"},
        {"cage": 1.0, "trains": "scales"},
        {"freeze_oscillating": 0.5, "trains": "scales"},
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


@pytest.mark.parametrize("bits", DEFAULTS)
def test_the_table_holds_at_a_million_parameters_and_falls_with_size(bits):
    assert learning_rates(Settings(), bits, 1_000_000) == pytest.approx(DEFAULTS[bits][:2])
    small, large = (learning_rates(Settings(), bits, size)[0] for size in (10**6, 10**9))
    assert large / small == pytest.approx(1000**-0.65)


def test_every_number_of_bits_has_a_rate_and_fewer_bits_a_higher_one():
    assert set(DEFAULTS) == set(range(9))
    rates = [DEFAULTS[bits].learning_rate for bits in range(1, 9)]
    assert rates == sorted(rates, reverse=True)


def test_what_is_given_is_taken():
    assert learning_rates(Settings(learning_rate=0.1, scale_learning_rate=0.2), 4, 10**9) == (0.1, 0.2)


@pytest.mark.parametrize("bits", DEFAULTS)
def test_steps_and_warm_up_come_from_the_table_unless_given(bits):
    found = resolved(Settings(), bits)
    assert (found.steps, found.warmup) == (DEFAULTS[bits].steps, DEFAULTS[bits].warmup)
    given = resolved(Settings(steps=3, warmup=0.0), bits)
    assert (given.steps, given.warmup) == (3, 0.0) and resolved(found, bits) == found


def test_scales_that_train_alone_go_faster():
    together, alone = (learning_rates(Settings(trains=t), 4, 10**6)[1] for t in ("all", "scales"))
    assert alone > together
    assert learning_rates(Settings(trains="scales", scale_learning_rate=0.1), 4, 10**6)[1] == 0.1
