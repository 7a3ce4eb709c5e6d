"""Calibration adequacy against its definitions, against simulations with known answers, and on real text."""

import itertools
import json
import math
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from quantailor import api, ptq
from quantailor.data import python_docs
from quantailor.data.batching import PadCollator, RecordDataset, drawn_rows
from quantailor.data.examples import Examples
from quantailor.errors import UsageError
from quantailor.evaluate import adequacy, bootstrap
from quantailor.evaluate.adequacy import (
    Adequacy,
    Domain,
    Precision,
    examine,
    halvings,
    importance_half_width,
    shortfall,
    two_samples,
)
from quantailor.evaluate.inputs import LayerInputs, fold_numbers, gather, weight_of
from quantailor.spec import Scheme
from quantailor.verbs.judging import _solver
from tests.models import zoo


def solver(scheme="w4a16-g32", method="gptq"):
    return _solver(Scheme.parse(scheme), ptq.method(method))


def records(*lengths, seed=0):
    """Rows of random tokens, of which the first two are a prompt."""
    draw = random.Random(seed)
    rows = [[draw.randrange(3, zoo.VOCABULARY) for _ in range(length)] for length in lengths]
    dataset = RecordDataset([{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows])
    return Examples("lm", dataset, PadCollator(0), "the rows")


# ------------------------------------------------------------------------------------------------ gathering


@pytest.mark.parametrize("batch_size", [1, 3, 99])
@pytest.mark.parametrize("make", [zoo.llama, zoo.gpt2])
def test_what_is_gathered_is_that_of_each_row_alone(make, batch_size):
    model, examples = make(), records(5, 9, 4, 12, 3, 7, 8)
    rows = [4, 1, 6, 0, 3]
    found = gather(model, examples, rows, max_hessians=99, more_rows=[2, 5], batch_size=batch_size)

    assert sorted(found.rows.tolist()) == sorted(rows) and found.num_folds == 4
    assert found.num_tokens == 3 + 9 + 8 + 5 + 12
    names = [name for name in found.layers if ".0." in name]
    assert len(names) == 4, "one layer for each tensor that goes in: q, k and v share theirs"
    for name, layer in found.layers.items():
        kept: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0]))
        squares, hessian = torch.zeros_like(layer.squares), torch.zeros_like(layer.hessian)
        logs = []
        for row, fold in zip(found.rows.tolist(), found.folds.tolist()):
            with torch.no_grad():
                model(input_ids=torch.tensor([examples.dataset[row]["input_ids"]]))
            x = kept.pop()
            squares[fold] += x.square().sum(0)
            hessian[fold] += x.T @ x
            mean = x.double().square().mean(0)
            logs.append((mean + 1e-6 * mean.mean()).log())
        handle.remove()
        torch.testing.assert_close(layer.squares, squares, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.hessian, hessian, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.weight, weight_of(model.get_submodule(name)))
        apart = torch.cdist(layer.sketch, layer.sketch).square()
        expected = torch.cdist(torch.stack(logs), torch.stack(logs)).square() / layer.squares.shape[1]
        torch.testing.assert_close(apart, expected, rtol=1e-3, atol=1e-5)  # as long as the row: nothing is lost
    lengths = [len(examples.dataset[row]["input_ids"]) for row in found.rows.tolist()]
    for fold in range(found.num_folds):
        of_fold = sum(n for n, f in zip(lengths, found.folds.tolist()) if f == fold)
        assert all(layer.num_inputs[fold] == of_fold for layer in found.layers.values())


def test_losses_and_expected_losses_are_those_of_the_definition():
    model, examples = zoo.llama(), records(5, 9, 4)
    found = gather(model, examples, [2, 0, 1], max_hessians=0, more_rows=[])
    sums = np.zeros(3)
    for place, row in enumerate(found.rows.tolist()):
        ids = torch.tensor(examples.dataset[row]["input_ids"])
        with torch.no_grad():
            log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        nats = [-float(log_probs[t - 1, ids[t]]) for t in range(2, len(ids))]
        entropy = [-float((log_probs[t - 1].exp() * log_probs[t - 1]).sum()) for t in range(2, len(ids))]
        assert found.nats[place] == pytest.approx(sum(nats), rel=1e-4)
        assert found.expected_nats[place] == pytest.approx(sum(entropy), rel=1e-4)
        assert found.num_scored[place] == len(nats)
        sums[row] = sum(nats)
    assert found.sums == pytest.approx(sums, rel=1e-4) and found.counts.tolist() == [3, 7, 2]
    assert all(layer.hessian is None for layer in found.layers.values())


def test_long_inputs_are_sketched_without_bias(monkeypatch):
    """The squared distance of two sketches, over many seeds, is the mean squared difference of what they stand for."""
    model, examples = zoo.llama(), records(6, 9)
    name = "model.layers.1.mlp.down_proj"
    exact = gather(model, examples, [0, 1], max_hessians=0).layers[name].sketch
    monkeypatch.setattr("quantailor.evaluate.inputs.SKETCH", 8 * 16)
    short = [gather(model, examples, [0, 1], max_hessians=0, seed=seed).layers[name].sketch for seed in range(60)]
    assert exact.shape == (2, 44) and short[0].shape == (2, 16)
    found = np.array([float((s[0] - s[1]).square().sum()) for s in short])
    expected = float((exact[0] - exact[1]).square().sum())
    assert abs(found.mean() - expected) < 4 * found.std() / 60**0.5 and found.std() > 0


@pytest.mark.parametrize("num_clusters", [1, 2, 3, 8, 30])
def test_folds_are_even_and_keep_documents_whole(num_clusters):
    clusters = np.random.default_rng(0).integers(num_clusters, size=120)
    clusters[:num_clusters] = np.arange(num_clusters)
    folds = fold_numbers(clusters, seed=1)
    assert len(set(folds)) == max(1, min(8, num_clusters) // 2 * 2)
    assert all(len(set(folds[clusters == c])) == 1 for c in range(num_clusters))
    if num_clusters == 30:
        assert np.bincount(folds).max() - np.bincount(folds).min() <= np.bincount(clusters).max()
        assert not np.array_equal(folds, fold_numbers(clusters, seed=2))


@pytest.mark.parametrize(("num_folds", "expected"), [(0, 0), (2, 1), (4, 3), (8, 5)])
def test_halvings_are_halves_and_all_different(num_folds, expected):
    halves = halvings(num_folds, 5, seed=0)
    assert len(halves) == expected and all(int(half.sum()) == num_folds // 2 for half in halves)
    assert len({min(tuple(h.tolist()), tuple((~h).tolist())) for h in halves}) == expected


# ------------------------------------------------------------------------------------------------ enough


def inputs_of(cov, num_rows, seed, weight=None, folds=8):
    """A layer whose inputs are normal with covariance `cov` [N, N]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(folds, num_rows // folds, len(cov), generator=generator) @ torch.linalg.cholesky(cov).T
    hessian = x.transpose(1, 2) @ x
    counts = torch.full((folds,), num_rows / folds, dtype=torch.float64)
    return LayerInputs("layer", weight, x.double().square().sum(1), counts, hessian, torch.zeros(1))


def covariance(size, seed=0):
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) / size**0.5
    return mix @ mix.T + 0.1 * torch.eye(size)


def test_the_half_width_of_importance_is_the_mean_over_all_halvings():
    layer = inputs_of(covariance(5), 80, seed=0)
    layer.squares[:, 3] = 0  # a channel that is always 0 says nothing
    means = (layer.squares / layer.num_inputs[:, None])[:, [0, 1, 2, 4]]
    differences = []
    for half in itertools.combinations(range(8), 4):
        others = [i for i in range(8) if i not in half]
        differences.append((means[list(half)].mean(0) - means[others].mean(0)).square())
    variance = torch.stack(differences).mean(0) / 4
    expected = 1.96 * float((variance / means.mean(0).square()).mean().sqrt())
    assert importance_half_width(layer.squares, layer.num_inputs) == pytest.approx(expected, rel=1e-9)
    assert importance_half_width(layer.squares[:1], layer.num_inputs[:1]) is None


@pytest.mark.parametrize("num_rows", [64, 128, 256])
def test_the_half_width_of_importance_is_the_spread_over_redraws(num_rows):
    """Known covariance: predicted from one sample, found by drawing it 300 times; x^2 has variance 2 sigma^4."""
    cov = covariance(24)
    layers = [inputs_of(cov, num_rows, seed) for seed in range(300)]
    drawn = torch.stack([layer.squares.sum(0) / num_rows for layer in layers])
    found = 1.96 * float((drawn.var(0) / cov.diagonal().square()).mean().sqrt())
    assert found == pytest.approx(1.96 * (2 / num_rows) ** 0.5, rel=0.05), "so doubling the rows divides it by 1.41"
    for layer in layers[:20]:
        assert importance_half_width(layer.squares, layer.num_inputs) == pytest.approx(found, rel=0.3)


def test_the_shortfall_is_that_of_the_definition():
    weight, solve = torch.randn(6, 12), solver("w3a16")
    layer = inputs_of(covariance(12), 64, 0, weight)
    (half,) = halvings(8, 1, seed=3)
    error = {}
    for s, folds in (("a", half), ("b", ~half)):
        solution = solve(weight, layer.hessian[folds].sum(0), 32)
        for t, others in (("a", half), ("b", ~half)):
            d, hessian = (solution - weight).double(), layer.hessian[others].sum(0).double() / 32
            error[s + t] = sum(float(row @ hessian @ row) for row in d)
    own, cross = error["aa"] + error["bb"], error["ab"] + error["ba"]
    assert shortfall(layer, solve, half) == pytest.approx((cross - own) / (cross + own), rel=1e-3)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16"])
def test_the_shortfall_is_what_the_sample_costs(scheme):
    """Known covariance: solved on n rows against solved on the covariance itself, both measured on the covariance.

    Rounding is chaotic: two solutions of one weight differ by some 2 % in error whatever the data. Sums over 16 weights
    of 64 outputs bring that to half a per cent; what is compared are some 12 and 6 %.
    """
    cov, solve, num_weights = covariance(48), solver(scheme), 16
    weights = torch.randn(num_weights, 64, 48)
    best = sum(_true_error(solve, weight, cov * 1e6, cov) for weight in weights)
    means = {}
    for num_rows in (192, 384):
        layers = [inputs_of(cov, num_rows, seed, weight) for seed, weight in enumerate(weights)]
        means[num_rows] = np.mean([shortfall(layer, solve, halvings(8, 1, i)[0]) for i, layer in enumerate(layers)]) / 2
        cost = sum(_true_error(solve, layer.weight, layer.hessian.sum(0), cov) for layer in layers) / best - 1
        assert means[num_rows] == pytest.approx(cost, rel=0.3)
    assert means[192] / means[384] == pytest.approx(2, rel=0.2), "twice the rows: half the shortfall"


def _true_error(solve, weight, hessian, cov):
    d = solve(weight, hessian, 1000) - weight
    return float(((d @ cov) * d).sum())


def test_a_solver_that_looks_at_no_data_falls_short_of_nothing():
    weight = torch.randn(8, 16)
    layer = inputs_of(covariance(16), 256, 0, weight)
    found = [shortfall(layer, lambda w, h, n: w.round(), half) for half in halvings(8, 5, 0)]
    assert found == pytest.approx([0] * 5, abs=1e-6)
    assert shortfall(layer, lambda w, h, n: w, halvings(8, 1, 0)[0]) == 0.0, "no error at all"


@pytest.mark.parametrize("num_units", [50, 200])
def test_the_metric_is_as_good_as_it_says(num_units):
    """Units of unequal length: predicted from one sample, found by drawing it 400 times."""
    rng = np.random.default_rng(0)

    def drawn(count):
        counts = rng.integers(20, 400, size=count).astype(float)
        return counts * (2 + 0.3 * rng.standard_normal(count)) + 3 * rng.standard_normal(count), counts

    def predicted(count):
        sums, counts = drawn(count)
        low, high = bootstrap.interval(sums, counts, bootstrap.mean)
        return Precision("loss", sums.sum() / counts.sum(), (high - low) / 2, count, "document", "evaluation")

    means = [sums.sum() / counts.sum() for sums, counts in (drawn(num_units) for _ in range(400))]
    found = 1.96 * np.std(means)
    for _ in range(10):
        assert predicted(num_units).half_width == pytest.approx(found, rel=0.3)
    halved = [s.sum() / c.sum() for s, c in (drawn(2 * num_units) for _ in range(400))]
    assert predicted(num_units).with_units(2 * num_units) == pytest.approx(1.96 * np.std(halved), rel=0.3)


def test_a_precision_extrapolates_both_ways():
    here = Precision("loss", 1.5, 0.1, 64, "document", "evaluation")
    assert here.with_units(256) == pytest.approx(0.05) and here.units_for(0.05) == 256 and here.units_for(0.1) == 64
    assert str(here) == (
        "loss 1.5 is good to +-0.1 with these 64 documents of the evaluation data; 256 would give +-0.05 (95 %)"
    )


# ------------------------------------------------------------------------------------------------ the right kind


def test_two_samples_by_definition(monkeypatch):
    monkeypatch.setattr(adequacy, "PERMUTATIONS", 40)
    rng = np.random.default_rng(1)
    features, clusters = rng.standard_normal((12, 3)), np.array([0, 0, 1, 2, 2, 2, 7, 7, 8, 9, 9, 11])
    first = clusters < 5
    features[first] += 0.8
    names = sorted(set(clusters))
    dealing = np.random.default_rng(4)
    squared = []
    for number in range(41):
        start = np.array([name < 5 for name in names])
        mine = {n for n, is_first in zip(names, start if number == 0 else dealing.permutation(start)) if is_first}
        a, b = ([f for f, c in zip(features, clusters) if (c in mine) == want] for want in (True, False))
        squared.append(float(((np.mean(a, 0) - np.mean(b, 0)) ** 2).sum()))
    spread = sum(((part - part.mean(0)) ** 2).sum() for part in (features[first], features[~first])) / 10
    distance, p = two_samples(features, first, clusters, seed=4)
    assert p == pytest.approx((1 + sum(s >= squared[0] for s in squared[1:])) / 41)
    assert distance == pytest.approx(math.sqrt(max(0, squared[0] - np.mean(squared[1:])) / spread))


def test_false_alarms_come_as_often_as_designed(monkeypatch):
    """No difference, and rows of a document alike: p is below 5 % in 5 % of cases. Dealing single rows it is not."""
    monkeypatch.setattr(adequacy, "PERMUTATIONS", 99)
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(24), 5)
    by_document, by_row = [], []
    for _ in range(300):
        features = (rng.standard_normal((24, 4))[clusters] + 0.5 * rng.standard_normal((120, 4))) * [1, 1, 2, 0.1]
        by_document.append(two_samples(features, clusters < 12, clusters, seed=int(rng.integers(10**6)))[1])
        by_row.append(two_samples(features, clusters < 12, np.arange(120), seed=0)[1])
    assert 0.02 <= np.mean(np.array(by_document) <= 0.05) <= 0.09  # 5 % +- 3 standard errors of 300 cases
    assert np.mean(np.array(by_row) <= 0.05) > 0.4
    assert 0.4 < np.mean(by_document) < 0.6


@pytest.mark.parametrize("apart", [0.0, 0.5, 2.0])
def test_the_distance_is_in_spreads_of_a_row(apart):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((4000, 5)) * 3
    first = np.arange(4000) < 2000
    features[first, 0] += apart * 3 * 5**0.5
    distance, p = two_samples(features, first, np.arange(4000))
    assert distance == pytest.approx(apart, abs=0.08) and (p <= 0.01) == (apart > 0)


def test_one_sample_alone_tells_nothing():
    assert two_samples(np.ones((3, 2)), np.array([True] * 3), np.arange(3)) == (0.0, 1.0)


CONTEXT, ROWS = 128, 32


@pytest.fixture(scope="module")
def stories(stories260k):
    return api.load(stories260k)


@pytest.fixture(scope="module")
def valid(stories, data_dir):
    return api.examples_for(stories, data_dir / "text/tinystories/valid.txt", context=CONTEXT)


@pytest.fixture(scope="module")
def train(stories, data_dir):
    return api.examples_for(stories, data_dir / "text/tinystories/train.txt", context=CONTEXT, limit=500)


@pytest.fixture(scope="module", params=["shakespeare", "python docs", "random tokens"])
def foreign(request, stories, data_dir):
    if request.param == "shakespeare":
        data = [(data_dir / "text/tinyshakespeare/train.txt").read_text()[:30_000]]
    elif request.param == "python docs":
        data = python_docs.documents(Path(sysconfig.get_paths()["stdlib"]) / "asyncio")[:100]
    else:
        draw = random.Random(0)
        data = [stories.tokenizer.decode([draw.randrange(5, 512) for _ in range(150)]) for _ in range(60)]
    return api.examples_for(stories, data, context=CONTEXT)


def test_text_of_another_kind_is_flagged(stories, valid, foreign):
    found = examine(
        stories.model, foreign, evaluation=valid, solve=solver(), solver="gptq", samples=ROWS, at_most=ROWS, splits=1
    )
    assert found.verdict == "wrong domain" and len(found.domain.reasons) == 2, "by its loss, and by the layers' inputs"
    assert found.domain.distance > 0.8 and found.domain.nats > found.domain.other_nats + 2
    assert found.domain.excess > 0.05, "layers solved on it do worse on the stories"
    line = found.for_receipt()[-1]
    assert line.startswith(f"calibration data: not the kind of text of {valid.source}: loss ")
    assert line.endswith("there, against layers solved on rows of that")

    alone = examine(stories.model, foreign, samples=ROWS)
    assert alone.verdict == "wrong domain" and "where the model expects" in alone.domain.reasons[0]


@pytest.mark.parametrize("seed", range(4))
def test_text_of_the_same_kind_is_not_flagged(stories, valid, train, seed):
    found = examine(stories.model, train, evaluation=valid, samples=ROWS, at_most=ROWS, seed=seed)
    assert not found.domain.flagged and found.domain.distance < 0.35 and found.verdict == "not told"
    assert not any("calibration data" in line for line in found.for_receipt())
    if seed == 0:
        assert not examine(stories.model, train, samples=ROWS).domain.flagged


def test_halves_of_real_text_look_alike_as_often_as_designed(stories, valid, monkeypatch):
    """Documents of the evaluation text dealt into two sets, 60 times: p below 10 % in about 10 % of them."""
    monkeypatch.setattr(adequacy, "PERMUTATIONS", 199)
    found = gather(stories.model, valid, drawn_rows(len(valid), 48, seed=0), max_hessians=0)
    features = np.concatenate([layer.sketch.numpy() for layer in found.layers.values()], axis=1)
    names = np.unique(found.clusters)
    rng = np.random.default_rng(0)
    p = []
    for seed in range(60):
        mine = names[rng.permutation(len(names)) < len(names) // 2]
        p.append(two_samples(features, np.isin(found.clusters, mine), found.clusters, seed=seed)[1])
    assert np.mean(np.array(p) <= 0.1) <= 0.1 + 3 * (0.1 * 0.9 / 60) ** 0.5 and 0.35 < np.mean(p) < 0.65


# ------------------------------------------------------------------------------------------------ the verdict


def judged(of_half=0.02, **domain):
    calm = {"nats": 2.0, "other_nats": 2.1, "nats_p": 0.5, "distance": 0.1, "distance_p": 0.5}
    return Adequacy(
        num_rows=128,
        num_seen=32,
        num_tokens=900,
        layers=(),
        precision=Precision("loss", 2.0, 0.1, 32, "document", "evaluation"),
        domain=Domain("valid.txt", **{**calm, **domain}),
        seconds=1.0,
        solver="gptq",
        splits=np.array([of_half * 0.9, of_half * 1.1]),
    )


def test_the_verdict_and_how_many_rows_it_takes():
    few = judged(of_half=0.8)
    assert few.shortfall == pytest.approx(0.1), "0.8 at 16 rows, so 0.1 at 128"
    assert few.shortfall_range == pytest.approx((0.09, 0.11))
    assert few.verdict == "more would help" and few.rows_needed == 256
    assert "more would help, some 256 rows for 5%" in few.for_receipt()[0]
    enough = judged(of_half=0.4)
    assert enough.verdict == "enough" and enough.rows_needed == 128 and len(enough.for_receipt()) == 1


@pytest.mark.parametrize(
    ("domain", "flagged"),
    [
        ({"nats": 2.7, "nats_p": 0.001}, True),
        ({"nats": 2.7, "nats_p": 0.02}, False),  # could be chance
        ({"nats": 2.3, "nats_p": 0.001}, False),  # certain, and too small to matter
        ({"nats": 1.0, "nats_p": 0.001}, False),  # text that the model knows by heart
        ({"distance": 0.6, "distance_p": 0.001}, True),
        ({"distance": 0.4, "distance_p": 0.001}, False),
        ({"distance": 0.6, "distance_p": 0.02}, False),
        ({"nats_p": None, "nats": 2.8, "nats_low": 0.6}, True),
        ({"nats_p": None, "nats": 2.8, "nats_low": 0.4}, False),
    ],
)
def test_a_flag_needs_a_difference_that_is_certain_and_large(domain, flagged):
    assert judged(**domain).domain.flagged == flagged
    assert (judged(**domain).verdict == "wrong domain") == flagged


def test_what_was_cut_short_is_extrapolated(stories, train):
    """A quarter of the rows tells of all of them, within what halves of so few rows can tell."""
    whole = examine(stories.model, train, solve=solver(), solver="gptq", samples=32, max_layers=2, splits=2)
    part = examine(stories.model, train, solve=solver(), solver="gptq", samples=32, max_layers=2, splits=2, at_most=8)
    assert (whole.num_seen, part.num_seen, part.num_rows) == (32, 8, 32)
    assert 0 < whole.shortfall < 0.05 and part.shortfall == pytest.approx(whole.shortfall, rel=0.6)


def test_a_result_is_json_and_lines(stories, train):
    found = examine(stories.model, train, solve=solver(), solver="gptq", samples=8)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["verdict"] == "more would help" and document["rows"] == document["rows_seen"] == 8
    assert 8 < document["rows_needed"] < 64 and document["shortfall"] > document["enough_below"]
    assert document["tokens_seen"] == 8 * CONTEXT and len(document["layers"]) == 20
    assert sum(bool(layer["shortfall_of_half"]) for layer in document["layers"]) == 4
    assert document["precision"]["half_width_with_more"] == pytest.approx(document["precision"]["half_width"] / 2)
    lines = found.text().splitlines()
    assert lines[0].endswith("train.txt: more would help")
    assert f"splits of 8 in halves): more would help, some {found.rows_needed} rows for 5%" in lines[1]


def test_settings_out_of_range_are_refused(tiny_lm):
    model, rows = zoo.llama(), records(5, 9)
    for name in ("samples", "splits", "max_layers", "at_most"):
        with pytest.raises(UsageError, match=f"{name}=0 leaves nothing to look at"):
            examine(model, rows, **{name: 0})
    other = Examples("classification", RecordDataset([{"input_ids": [5], "labels": 0}]), PadCollator(0), "classes")
    with pytest.raises(UsageError, match="the rows is for lm, classes for classification"):
        examine(model, rows, evaluation=other)
    with pytest.raises(UsageError, match="leaves weights in float"):
        api.adequacy(tiny_lm, ["some text", "and more"], scheme="float")
    model.model.layers = torch.nn.ModuleList()
    model.lm_head = torch.nn.Identity()
    with pytest.raises(UsageError, match="LlamaForCausalLM has no Linear layer"):
        gather(model, rows, [0])


def test_one_document_and_too_few_rows_are_told():
    found = examine(zoo.llama(), records(9), solve=solver(), samples=4)
    assert found.shortfall is None and found.verdict == "not told"
    assert "one document cannot be cut into halves" in " ".join(found.notes)
    assert "4 rows were asked for, the rows has 1: each is used once" in found.notes


def test_the_verb_on_a_classifier(tiny_bert):
    texts = [{"text": "so good" if i % 2 else "very bad indeed", "label": i % 2} for i in range(40)]
    varied = [{"text": f"{row['text']} {i * 7919}", "label": row["label"]} for i, row in enumerate(texts)]
    found = api.adequacy(tiny_bert, varied, eval_data=varied[::-1], samples=16)
    assert found.precision.metric == "accuracy" and found.precision.num_units == 40
    assert found.shortfall is not None and not found.domain.flagged
    assert "40 documents or records are in both" in " ".join(found.notes)
