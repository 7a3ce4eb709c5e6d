import pytest

from quantailor.cost.size import num_weights, weight_file_bytes
from quantailor.cost.skeleton import skeleton
from quantailor.cost.storage import of_parameters, storage, weight_bytes
from quantailor.recipe import Recipe
from quantailor.spec import Scheme
from tests.cost.configs import folder


def test_a_hundred_billion_parameters():
    assert [of_parameters(100e9, bits)[0] for bits in (32, 8, 4)] == [400e9, 100e9, 50e9]
    assert of_parameters(100e9, 4, 128) == (50e9, 100e9 / 128 * 2)


@pytest.mark.parametrize(
    ("scheme", "rows", "length", "integers", "scales"),
    [
        ("w8a8", 10, 30, 300, 20),  # a scale a row, 2 bytes each
        ("w4a16-g32", 10, 40, 200, 40),  # two groups a row, the last one shorter
        ("w4a16-g32-asym", 10, 64, 320, 40 + 10),  # zero points of 4 bits
        ("w1.58a8", 8, 32, 64, 16),
        ("nf4-dq", 64, 64, 2048, 64 + 4 + 4),  # 8-bit scales, a float32 for 256 of them, and their mean
    ],
)
def test_bytes_of_one_weight_by_hand(scheme, rows, length, integers, scales):
    assert weight_bytes(Scheme.parse(scheme).weight, rows, length) == (integers, scales)


def test_a_tied_weight_counts_once_and_biases_stay_float(tmp_path):
    found = skeleton(folder(tmp_path, "llama", tie=True))
    disk = storage(Recipe(Scheme.parse("w8a8")).assign(found.model), 4)
    assert disk.num_weights == sum(p.numel() for p in found.model.parameters())
    assert disk.integers == 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96)
    assert disk.total == disk.integers + disk.scales + disk.floats < disk.float_bytes


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_the_plan_of_a_folder_is_what_the_folder_then_weighs(tiny_lm, tmp_path, scheme):
    from quantailor import api

    model = api.load(tiny_lm)
    found = skeleton(tiny_lm)
    disk = storage(Recipe(Scheme.parse(scheme)).assign(found.model), 4)
    out = api.save(api.quantize(model, scheme), tmp_path / "out")

    assert disk.num_weights == num_weights(model.model)
    assert weight_file_bytes(out) == pytest.approx(disk.total, rel=0.08)  # scales may be float32 there, and a header
