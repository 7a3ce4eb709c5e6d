"""Curves of known ends are forecast; what cannot be known widens the interval."""

import numpy as np
import pytest

from quantailor.errors import UsageError
from quantailor.evaluate.forecast import forecast

STEPS = list(range(0, 61, 5))


def curve(kind, noise=0.0, seed=0):
    draw = np.random.default_rng(seed)
    if kind == "power":
        values = [1.5 + 2.0 * (1 + t) ** -0.7 for t in [*STEPS, 400]]
    else:
        values = [1.5 + 2.0 * np.exp(-t / 12) for t in [*STEPS, 400]]
    return [(t, v + noise * draw.normal()) for t, v in zip(STEPS, values)], values[-1]


@pytest.mark.parametrize("kind", ["power", "exponential"])
def test_the_family_that_made_the_curve_finds_its_end(kind):
    looks, end = curve(kind)
    found = forecast(looks, 400)
    assert found.fits[kind] == pytest.approx(end, abs=0.02)
    assert found.interval[0] <= end + 0.02 and end - 0.02 <= found.interval[1]


def test_one_fit_by_the_slow_way():
    """Every shape of both families by least squares, one at a time."""
    looks, _ = curve("power", noise=0.05, seed=3)
    t, s = (np.array(part, dtype=float) for part in zip(*looks))
    for name, shapes, basis in (
        ("power", np.geomspace(0.1, 3.0, 120), lambda x, p: (1 + x) ** -p),
        ("exponential", np.geomspace(3.0, 300.0, 120), lambda x, tau: np.exp(-x / tau)),
    ):
        best = None
        for shape in shapes:
            columns = np.stack([np.ones_like(t), basis(t, shape)], 1)
            (a, b), *_ = np.linalg.lstsq(columns, s, rcond=None)
            if b < 0:
                a, b = s.mean(), 0.0
            error = ((a + b * basis(t, shape) - s) ** 2).sum()
            if best is None or error < best[0]:
                best = (error, a + b * basis(400.0, shape))
        assert forecast(looks, 400).fits[name] == pytest.approx(best[1], abs=1e-6)


def test_intervals_widen_with_noise_and_with_distance_and_cover():
    quiet, loud = (forecast(curve("power", noise)[0], 400).interval for noise in (0.005, 0.1))
    assert loud[1] - loud[0] > quiet[1] - quiet[0]
    near, far = (forecast(curve("power", 0.02)[0], at).interval for at in (60, 4000))
    assert far[1] - far[0] > near[1] - near[0]
    held = 0
    for seed in range(20):
        for kind in ("power", "exponential"):
            looks, end = curve(kind, 0.03, seed)
            low, high = forecast(looks, 400, seed=seed).interval
            held += low <= end <= high
    assert held >= 34, held  # of 40 at 90 %: below that, one such count in a hundred


def test_a_rising_score_is_forecast_flat():
    found = forecast([(t, 1.0 + 0.01 * t) for t in STEPS], 400)
    assert 1.0 <= found.fits["power"] <= 1.6 and found.fits["power"] == pytest.approx(1.3, abs=1e-9)


def test_too_few_looks_and_steps_behind_are_refused():
    with pytest.raises(UsageError, match=r"3 looks, .* too few"):
        forecast([(0, 1.0), (1, 0.9), (2, 0.8)], 9)
    with pytest.raises(UsageError, match="step 10 lies within the 60 steps"):
        forecast(curve("power")[0], 10)
    with pytest.raises(UsageError, match="not all finite"):
        forecast([(t, float("inf")) for t in STEPS], 400)
