"""The search over architectures in a scripted world, and tau against scipy."""

import random
from types import SimpleNamespace

import pytest
from scipy.stats import kendalltau

from quantailor.errors import UsageError
from quantailor.searching.nas import kendall_tau, search
from quantailor.searching.supernet import ArchitectureSpace

SPACE = ArchitectureSpace(depth=(1, 2, 3), width=(8, 16), heads=(2, 4), ffn=(10, 20, 30), bits=(4, 3, 2))
NET = SimpleNamespace(space=SPACE)


def size(one):
    return one.depth * one.width * (one.heads + one.ffn) * one.bits


def score(one):
    return 10 - size(one) ** 0.5 / 10 + (1.0 if one.bits == 2 else 0.0)


def test_the_best_within_the_bytes_is_found():
    asked = []
    found = search(NET, lambda one: asked.append(one) or score(one), size, 2000, 60, seed=1)
    assert len(asked) == len(set(asked)) == len(found) == 60
    assert all(c.size_bytes == size(c.architecture) <= 2000 and c.score == score(c.architecture) for c in found)
    assert found == sorted(found, key=lambda c: c.score)
    every = [one for one in {SPACE.drawn(random.Random(i)) for i in range(5000)} if size(one) <= 2000]
    assert found[0].score <= sorted(map(score, every))[2], "among the best three of all"


def test_the_whole_of_a_small_space_is_scored_once():
    tiny = SimpleNamespace(space=ArchitectureSpace(depth=(1, 2), width=(8,), heads=(2,), ffn=(10,), bits=(4,)))
    assert len(search(tiny, score, size, 1e9, 50)) == 2


def test_what_cannot_be():
    with pytest.raises(UsageError, match="the smallest network of the space takes 192 bytes"):
        search(NET, score, size, 100, 5)
    with pytest.raises(UsageError, match="candidates=0"):
        search(NET, score, size, 1e9, 0)


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("count", [2, 3, 12, 40])
def test_tau_is_scipys(count, levels):
    draw = random.Random(count * levels)
    for _ in range(10):
        a, b = ([draw.randrange(levels) for _ in range(count)] for _ in range(2))
        assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic, nan_ok=True)
    with pytest.raises(ValueError, match="no two rankings"):
        kendall_tau([1], [1])
