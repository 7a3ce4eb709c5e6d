"""Two processes with half of the samples each end with the integers of one process with all of them."""

import copy

import pytest
import torch

from quantailor import api, ptq
from quantailor.errors import UsageError
from quantailor.models.prepare import FAKE_QUANT, prepare
from quantailor.models.structure import modules_of
from quantailor.observers.ranges import make_observer
from quantailor.ptq import distributed
from quantailor.ptq.driver import calibrate
from quantailor.ptq.statistics import Statistics
from quantailor.recipe import Recipe
from quantailor.spec import Int, Scheme
from tests.formats.making import bytes_of, texts
from tests.models import zoo
from tests.processes import in_processes


def solved(model, scheme, batches, method):
    """(integers, scales, scales of activations, reports) of a calibrated copy."""
    prepared = copy.deepcopy(model)
    prepare(prepared, Recipe(Scheme.parse(scheme)))
    state = calibrate(prepared, batches, lambda _: ptq.method(method))
    layers = dict(modules_of(prepared, FAKE_QUANT))
    q = {n: m.weight_quantizer.integers(m.weight_ON) for n, m in layers.items()}
    scales = {n: m.weight_quantizer.scale.detach() for n, m in layers.items()}
    inputs = {n: m.input_quantizer.scale.detach() for n, m in layers.items() if m.input_quantizer}
    return q, scales, inputs, state.layers


@pytest.mark.parametrize(
    ("make", "scheme", "method", "share"),
    [
        (zoo.llama, "w4a16", "rtn", 1.0),
        (zoo.llama, "w4a16-g32", "gptq", 0.999),  # sums of halves differ from the whole sum in the last bits
        (zoo.bert, "w8a8-static", "rtn", 1.0),
        (zoo.bert, "w8a8-static", "gptq", 0.97),  # steps of 8 bits are 16 times finer: more values lie near a tie
        (zoo.qwen3_moe, "w4a16-g8", "qronos", 0.999),
    ],
)
def test_two_processes_find_the_integers_of_one(tmp_path, make, scheme, method, share):
    model, batches = make(), [zoo.tokens(12, 5, 9), zoo.tokens(3, 17), zoo.tokens(20), zoo.tokens(7, 7, 8)]
    alone = solved(model, scheme, batches, method)
    both = in_processes(tmp_path, lambda _: solved(model, scheme, batches, method))
    for part in range(3):
        assert both[0][part].keys() == both[1][part].keys() == alone[part].keys()
        assert all(torch.equal(both[0][part][n], both[1][part][n]) for n in alone[part])
    equal = sum(int((both[0][0][n] == alone[0][n]).sum()) for n in alone[0])
    assert equal >= share * sum(q.numel() for q in alone[0].values())
    for n, scale in alone[2].items():
        torch.testing.assert_close(both[0][2][n], scale, rtol=1e-4, atol=0)
    assert both[0][3] == both[1][3]
    assert {n: r.get("rows") for n, r in both[0][3].items()} == {n: r.get("rows") for n, r in alone[3].items()}


def test_a_method_that_sees_only_its_share_ends_alike_everywhere(tmp_path):
    model, batches = zoo.llama(layers=1), [zoo.tokens(12, 5), zoo.tokens(3, 17)]

    class Moves:
        """Refines by what this process alone sees."""

        needs_hessian, needs_float_path = False, True
        solve = ptq.METHODS["rtn"].solve

        def refine(self, block, layers, runs, targets, masks):
            for module in layers.values():
                module.weight_quantizer.base_scale *= 1 + float(targets[0].abs().mean())
            return {name: {"moved": float(targets[0].abs().mean())} for name in layers}

    def work(_):
        prepared = copy.deepcopy(model)
        prepare(prepared, Recipe(Scheme.parse("w4a16")))
        state = calibrate(prepared, batches, lambda _: Moves())
        return {n: m.weight_quantizer.scale.detach() for n, m in modules_of(prepared, FAKE_QUANT)}, state.layers

    (scales, reports), (others, their_reports) = in_processes(tmp_path, work)
    assert all(torch.equal(scales[n], others[n]) for n in scales) and reports == their_reports
    assert all("moved" in report for report in reports.values())


@pytest.mark.parametrize("method", ["minmax", "ema", "percentile", "mse"])
def test_merged_ranges_are_those_of_all_batches_in_turn(tmp_path, method):
    batches = [torch.randn(50, 8) * size for size in (1.0, 3.7, 0.2, 9.3, 2.2)]

    class Quantizer:
        observer = make_observer(method, Int(8))

    def work(rank):
        quantizer = Quantizer()
        quantizer.observer = make_observer(method, Int(8))
        distributed.start_ranges([quantizer])
        mine = distributed.share(batches)
        for number, batch in enumerate(mine):
            if number == 0 and rank > 0:
                distributed.same_bins([quantizer])
            quantizer.observer.observe(batch)
            if number == 0 and rank == 0:
                distributed.same_bins([quantizer])
        distributed.merge_ranges([quantizer])
        return quantizer.observer.range(), quantizer.observer.batches

    alone = make_observer(method, Int(8))
    for batch in batches:
        alone.observe(batch)
    for found, seen in in_processes(tmp_path, work):
        assert seen == alone.batches == 5
        assert torch.equal(torch.stack(found), torch.stack(alone.range()))


def test_sums_means_and_what_one_process_lacks(tmp_path):
    x = torch.randn(10, 6)

    def work(rank):
        statistics = Statistics.empty(6, True, torch.device("cpu"), crossed=True)
        statistics.add(x[rank::2], x[rank::2] + 1)
        if rank:
            statistics.cross = None
            statistics.add(torch.full((2, 6), torch.nan))
        statistics.share()
        gradient = torch.full((3,), float(rank))
        distributed.mean_([gradient, None])
        return statistics, gradient, distributed.from_rank(rank, 1), distributed.from_all(rank)

    for statistics, gradient, source, everyone in in_processes(tmp_path, work):
        torch.testing.assert_close(statistics.hessian, x.T @ x)
        torch.testing.assert_close(statistics.diagonal, x.square().sum(0))
        assert (statistics.num_rows, statistics.rejected, statistics.batches) == (10, 1, 3)
        assert statistics.cross is None
        assert gradient.tolist() == [0.5] * 3 and source == 1 and everyone == [0, 1]


def test_one_process_alone_is_left_as_it_is():
    tensor = torch.ones(3)
    distributed.mean_([tensor, None])
    distributed.sum_([tensor])
    assert tensor.tolist() == [1, 1, 1] and distributed.share([1, 2, 3]) == [1, 2, 3]
    assert distributed.from_rank("x") == "x" and distributed.from_all("x") == ["x"]
    assert (distributed.world(), distributed.rank(), distributed.join()) == (1, 0, False)


def test_fewer_batches_than_processes(tmp_path):
    def work(_):
        with pytest.raises(UsageError, match="1 calibration batches for 2 processes"):
            distributed.share([zoo.tokens(3)])

    in_processes(tmp_path, work)


def test_a_folder_by_two_processes(tmp_path, tiny_lm):
    """The first writes; the folder is sound, and continues nothing of a single process."""
    options = {"method": "rtn", "data": texts(12, seed=5), "samples": 40, "context": 32}
    api.quantize_folder(tiny_lm, "w4a16-g32", tmp_path / "alone", **options)

    def work(_):
        api.quantize_folder(tiny_lm, "w4a16-g32", tmp_path / "out", **options)

    in_processes(tmp_path, work)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["alone", "out"]
    assert api.check(tmp_path / "out").equal
    weights = "model.safetensors" if (tmp_path / "alone" / "model.safetensors").exists() else "quantailor.safetensors"
    assert bytes_of(tmp_path / "out")[weights] == bytes_of(tmp_path / "alone")[weights]
