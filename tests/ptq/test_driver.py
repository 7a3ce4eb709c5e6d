"""The driver against the slow way: a plain float model, whole forward passes for every layer by itself."""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from quantailor import ptq
from quantailor.errors import UntrustedInput
from quantailor.models.experts import split_experts
from quantailor.models.prepare import FAKE_QUANT, pack_model, prepare
from quantailor.models.structure import modules_of
from quantailor.nn.fake_quant import FakeQuantEmbedding
from quantailor.numerics import grids
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.observers.ranges import make_observer
from quantailor.progress import Progress
from quantailor.ptq import METHODS
from quantailor.ptq.driver import calibrate
from quantailor.ptq.gptq import GPTQ
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics, rows_of
from quantailor.recipe import Keep, Recipe, Rule
from quantailor.spec import Scheme
from tests.models import zoo

W3 = Scheme.parse("w3a16-g32")


def linears_of(model):
    """The model with GPT-2's Conv1D as the Linears they are: the slow way needs no special case."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight, linear.bias = nn.Parameter(child.weight.detach().T.contiguous()), child.bias
                setattr(parent, name, linear)
    return model


def running_order(model, names, batches):
    order = []
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: order.append(n) if n not in order else None)
        for n in names
    ]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return order


@torch.no_grad()
def slowly(model, recipe, batches, method, together=()):
    """{name: integers}: for each layer in running order, whole passes of a plain model whose earlier layers already
    hold dequantized weights. `together`: endings of names that are solved on the statistics of the first of them."""
    model = linears_of(copy.deepcopy(model)).eval()
    split_experts(model)
    schemes = recipe.assign(model).quantized
    embeddings = [n for n in schemes if isinstance(model.get_submodule(n), nn.Embedding)]
    order = embeddings + [n for n in running_order(model, schemes, batches) if n not in embeddings]
    result, by_weight = {}, {}
    for name in order:
        module, spec = model.get_submodule(name), schemes[name].weight
        if id(module.weight) in by_weight:  # tied: solved already
            result[name] = result[by_weight[id(module.weight)]]
            continue
        by_weight[id(module.weight)] = name
        if name in embeddings:
            statistics = None
        elif not name.endswith(together[1:]):
            statistics = gather(model, module, batches)
        weight = module.weight.flatten(1).clone()
        solution = method.solve(weight, statistics, spec)
        groups = to_groups(solution.q, spec.group_size)
        w_hat = grids.decode(groups, solution.scale, solution.zero_point, spec.grid)
        module.weight.copy_(from_groups(w_hat, weight.shape[1]).view_as(module.weight))
        result[name] = solution.q
    return result


def gather(model, module, batches):
    statistics = Statistics.empty(
        module.weight.flatten(1).shape[1], getattr(module, "groups", 1) == 1, torch.device("cpu")
    )
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in batches:
        inputs.clear()
        model(**batch)
        mask = batch.get("attention_mask")
        for x in inputs:
            if isinstance(module, nn.Conv2d):
                x = rows_of(x, module, None)  # held against the convolution itself in test_statistics.py
            elif mask is not None and x.dim() == 3:
                x = torch.stack([x[b, t] for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]])
            statistics.add(x.flatten(0, -2))
    handle.remove()
    return statistics


def integers(model):
    return {n: m.weight_quantizer.integers(m.weight_ON) for n, m in modules_of(model, FAKE_QUANT) if m.weight_quantizer}


def check(model, batches, method=None, scheme=W3, rules=(), names=None):
    """Calibrates a copy of `model` and holds every integer against the slow way."""
    method, recipe = method or GPTQ(), Recipe(scheme, tuple(rules))
    prepared = copy.deepcopy(model)
    prepare(prepared, recipe)
    state = calibrate(prepared, batches, lambda _: method)
    found, expected = integers(prepared), slowly(model, recipe, batches, method)
    assert set(found) <= set(expected) == set(state.layers) == (names or set(expected))
    for name, q in found.items():
        assert torch.equal(q, expected[name]), name
    return prepared, state


def batches_of(*rows, **options):
    return [zoo.tokens(*row, **options) for row in rows]


@pytest.mark.parametrize("method", [GPTQ(), GPTQ(act_order=False, block_size=7), RTN()], ids=str)
@pytest.mark.parametrize("scheme", ["w3a16-g32", "w4a16-asym", "w2a16-g32-balanced", "nf4", "w1.58a16"])
def test_every_integer_of_a_llama(tiny_lm, scheme, method):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    check(model, batches_of((12, 5, 9), (3, 17), (20,)), method, Scheme.parse(scheme))


@pytest.mark.parametrize("scheme", ["w3a16-g32", "w4a16-g7-asym", "w4a16"])
def test_every_integer_of_a_bert_with_padding(tiny_bert, scheme):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    check(model, batches_of((12, 5, 9, 1), (3, 17), padded_to=20), scheme=Scheme.parse(scheme))


@pytest.mark.parametrize("make", [zoo.gpt2, zoo.masked_bert, zoo.qwen3_moe, lambda: zoo.llama(layers=4)])
def test_every_integer_of_other_models(make):
    check(make(), batches_of((12, 5, 9), (3, 17)))


def test_blocks_that_are_kept_still_run():
    keep = Rule(Keep("kept"), pattern="model.layers.1.*"), Rule(Keep("kept"), pattern="model.layers.3.*")
    _, state = check(zoo.llama(layers=5), batches_of((9, 4), (6,)), rules=keep)
    assert len(state.layers) == 21 and not any("do not just feed" in note for note in state.notes)
    first = Rule(Keep("kept"), pattern="model.layers.0.*"), Rule(Keep("kept"), pattern="*.layers.1.mlp.*")
    check(zoo.llama(layers=3), batches_of((9, 4), (6,)), rules=first)


@pytest.mark.parametrize("tie", [False, True])
def test_embedding_and_head_by_a_rule(tie):
    rules = Rule(W3, pattern="lm_head"), Rule(W3, module_type="Embedding")
    prepared, state = check(zoo.llama(tie=tie), batches_of((9, 4), (6,)), rules=rules)
    told = [note for note in state.notes if note.startswith("model.embed_tokens: rtn instead of the method asked for")]
    assert len(told) == 1
    assert state.layers["lm_head"].get("tied_to") == ("model.embed_tokens" if tie else None)
    inputs = zoo.tokens(5, 3)
    with torch.no_grad():
        logits = prepared(**inputs).logits
        assert torch.equal(pack_model(prepared)(**inputs).logits, logits)


def test_layers_before_and_after_the_blocks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            part = lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))  # noqa: E731
            self.head = nn.Linear(16, 5)  # first in the tree, last to run
            self.blocks = nn.ModuleList(part() for _ in range(3))
            self.stem, self.side, self.unused = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(self.side(x).tanh() + x)

    model, rules = Model().eval(), (Rule(W3, pattern="*"),)
    batches = [{"x": torch.randn(n, 10)} for n in (30, 7)]
    names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    prepared = copy.deepcopy(model)
    prepare(prepared, Recipe(W3, rules))
    state = calibrate(prepared, batches, lambda _: GPTQ())
    expected = slowly(model, Recipe(W3, rules), batches, GPTQ())
    assert set(state.layers) == names and set(expected) == names - {"unused"}
    found = integers(prepared)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert "unused: no calibration data reached it; rounded to nearest without data" in state.notes
    assert "fallback" in state.layers["unused"]


def test_blocks_that_do_not_feed_one_another_are_calibrated_whole():
    """Pooling between two stages; a decoder beside its encoder; one layer that runs three times."""

    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            part = lambda n: nn.Sequential(nn.Linear(n, 12), nn.ReLU(), nn.Linear(12, n))  # noqa: E731
            self.first, self.second = (
                nn.ModuleList(part(16) for _ in range(2)),
                nn.ModuleList(part(8) for _ in range(2)),
            )

        def forward(self, x):
            for block in self.first:
                x = block(x)
            x = x.unflatten(-1, (8, 2)).mean(-1)
            for block in self.second:
                x = block(x)
            return x

    inputs = zoo.tokens(9, 4)
    for model, batches in (
        (Stages().eval(), [{"x": torch.randn(n, 16)} for n in (30, 7)]),
        (zoo.t5(), [{**inputs, "decoder_input_ids": inputs["input_ids"]}]),
        (zoo.albert(), batches_of((12, 5, 9), (3, 17))),
    ):
        if isinstance(model, Stages):
            _, state = check(model, batches)
        else:
            prepared = copy.deepcopy(model)
            prepare(prepared, Recipe(W3))
            state = calibrate(prepared, batches, lambda _: GPTQ())
            # A layer that runs again is fed by its mates: theirs is one problem, solved on one set of statistics.
            expected, found = slowly(model, Recipe(W3), batches, GPTQ(), ("query", "key", "value")), integers(prepared)
            same = {name for name in found if torch.equal(found[name], expected[name])}
            assert same == set(found) == set(expected)
        assert any(
            "do not just feed one another: each layer was calibrated by passes of the whole" in n for n in state.notes
        )


def test_the_modules_of_a_cnn_and_an_mlp():
    batches = [{"pixel_values": torch.randn(n, 3, 12, 12)} for n in (4, 1, 3)]
    _, state = check(zoo.cnn(), batches, scheme=Scheme.parse("w4a16"))
    assert "no calibration data" in state.layers["depthwise"]["fallback"]  # grouped: one X^T X a group is not kept
    check(zoo.cnn(), batches, RTN(), scheme=Scheme.parse("w4a16"))
    check(zoo.mlp(), [{"input": torch.randn(n, 20)} for n in (40, 3)])


class Experts(nn.Module):
    """One expert sees the second batch alone, one sees nothing."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("always", "seldom", "never")})

    def forward(self, x):
        y = self.experts["always"](x)
        chosen = x[:, 0] > 3
        return y + self.experts["seldom"](x[chosen]).sum() if chosen.any() else y


def test_a_layer_that_only_some_batches_reach():
    batches = [
        {"x": torch.randn(20, 16).clamp(max=2.9)},
        {"x": torch.randn(30, 16).index_fill(0, torch.arange(9), 4.0)},
    ]
    model = Experts().eval()
    prepare(prepared := copy.deepcopy(model), Recipe(W3))
    state = calibrate(prepared, batches, lambda _: GPTQ())
    found, expected = integers(prepared), slowly(model, Recipe(W3), batches, GPTQ())
    assert set(expected) == {"experts.always", "experts.seldom"}
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert state.layers["experts.seldom"]["rows"] == 9
    assert state.notes.count("experts.never: no calibration data reached it; rounded to nearest without data") == 1


class Routed(nn.Module):
    """A block whose experts see only the tokens that the gate sends them."""

    def __init__(self):
        super().__init__()
        self.experts, self.gate = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 3)

    def forward(self, x):
        chosen, y = self.gate(x).argmax(-1), x.clone()
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                y[chosen == number] += expert(x[chosen == number])
        return y


@pytest.mark.parametrize("method", METHODS)
def test_every_method_copes_with_experts(method):
    """A token may go to another expert in the float model: its rows have no partner there."""
    layers = nn.ModuleDict({"layers": nn.ModuleList(Routed() for _ in range(2))})
    layers.forward = lambda x: layers["layers"][1](layers["layers"][0](x))
    batches = [{"x": torch.randn(n, 16)} for n in (1, 20, 2)]
    prepare(layers, Recipe(W3))
    state = calibrate(layers, batches, lambda _: ptq.method(method))
    assert set(state.layers) == set(integers(layers)) and len(state.layers) == 8
    rounds_by = {"awq": "clip"}.get(method, "rtn")  # a part that finds no integers
    solver = method if hasattr(METHODS[method], "solve") else rounds_by
    assert {state.layers[f"layers.{i}.gate"]["method"] for i in range(2)} == {solver}
    assert all(report["method"] in METHODS for report in state.layers.values())
    assert torch.isfinite(layers(batches[1]["x"])).all()


@dataclass
class Spy:
    """A method that keeps the statistics it was given."""

    inner: object = field(default_factory=RTN)
    needs_hessian: bool = True
    needs_float_path: bool = False
    seen: list = field(default_factory=list)

    def solve(self, weight, statistics, spec):
        self.seen.append(statistics)
        return self.inner.solve(weight, None, spec)  # integers that do not depend on the data


def statistics_by_layer(model, batches, scheme=W3):
    prepare(model := copy.deepcopy(model), Recipe(scheme))
    spy = Spy()
    state = calibrate(model, batches, lambda _: spy)
    return dict(zip(state.layers, spy.seen)), model


@pytest.mark.parametrize("make", [zoo.llama, zoo.bert, zoo.gpt2])
def test_padding_adds_nothing(make):
    model, padded = make(), zoo.tokens(12, 5, 9, 1, padded_to=16)
    alone = [
        {"input_ids": ids[: mask.sum()][None], "attention_mask": mask[: mask.sum()][None]}
        for ids, mask in zip(padded["input_ids"], padded["attention_mask"])
    ]
    together, _ = statistics_by_layer(model, [padded])
    apart, _ = statistics_by_layer(model, alone)
    assert together.keys() == apart.keys() and len(together) >= 8
    for name in together:
        a, b = together[name], apart[name]
        assert a.num_rows == b.num_rows == 27, name
        size = float(b.hessian.abs().max())
        torch.testing.assert_close(a.hessian, b.hessian, rtol=1e-3, atol=1e-4 * size)


def test_layers_that_share_an_input_share_its_statistics():
    seen, _ = statistics_by_layer(zoo.llama(), batches_of((9, 4)))
    short = {name.removeprefix("model.layers.0."): s for name, s in seen.items() if "layers.0." in name}
    attention = [short[f"self_attn.{n}_proj"] for n in "qkv"]
    assert attention[0] is attention[1] is attention[2] and short["mlp.gate_proj"] is short["mlp.up_proj"]
    assert len({id(s) for s in short.values()}) == 4  # q/k/v, o, gate/up, down


@pytest.mark.parametrize("make", [zoo.llama, zoo.bert])
@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a8-g32-static"])
def test_static_input_scales_are_those_of_real_tokens_on_the_quantized_prefix(make, scheme):
    """A slow walk over the prepared model: everything solved is on, the layer at hand is observed, the rest is off."""
    model, batches = make(), batches_of((12, 5, 9), (3, 17))
    method, scheme = RTN(), Scheme.parse(scheme)
    _, calibrated = statistics_by_layer(model, batches, scheme)
    prepare(slow := copy.deepcopy(model), Recipe(scheme))
    layers = dict(modules_of(slow, FAKE_QUANT))
    order = running_order(slow, layers, batches[:1])
    switch(layers.values(), False)
    for name in order:
        layer, observer, inputs = layers[name], make_observer(scheme.input.range, scheme.input.grid), []
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # noqa: B023
        with torch.no_grad():
            for batch in batches:
                slow(**batch)
                x, mask = inputs.pop(), batch["attention_mask"].bool()
                observer.observe(x[mask])
        handle.remove()
        # A layer's input does not depend on whether its unit mates are solved already.
        layer.input_quantizer.set_scale(observer.scale_zero_point(scheme.input.grid)[0])
        solution = method.solve(layer.weight_ON, None, scheme.weight)
        with torch.no_grad():
            layer.weight_quantizer.set_scale(solution.scale, solution.zero_point)
            w_hat = layer.weight_quantizer.dequantize(solution.q)
            layer.weight.copy_(w_hat)
        switch([layer], True)
        found = dict(modules_of(calibrated, FAKE_QUANT))[name]
        assert torch.equal(found.input_quantizer.scale, layer.input_quantizer.scale), name
        assert found.input_quantizer.calibrated and found.input_quantizer.observer is None
        assert found.input_quantizer.mask is None
        assert torch.equal(found.weight_quantizer.integers(found.weight_ON), solution.q), name


def switch(layers, on):
    for layer in layers:
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None:
                quantizer.enabled = on


def test_empty_data_is_an_error():
    prepare(model := zoo.llama(), Recipe(W3))
    with pytest.raises(UntrustedInput, match="calibration data is empty; give at least one sample"):
        calibrate(model, [], lambda _: GPTQ())


@pytest.mark.parametrize("scheme", ["w3a16-g32", "w8a8-static"])
def test_a_batch_of_padding_alone_adds_nothing(scheme):
    model, scheme, good = zoo.llama(), Scheme.parse(scheme), zoo.tokens(9, 4, 1)
    padding = {"input_ids": torch.zeros(2, 6, dtype=torch.long), "attention_mask": torch.zeros(2, 6, dtype=torch.long)}
    found = []
    for batches in ([good], [good, padding]):
        prepare(one := copy.deepcopy(model), Recipe(scheme))
        calibrate(one, batches, lambda _: GPTQ())
        found.append({n: (q, one.get_submodule(n).input_quantizer) for n, q in integers(one).items()})
    for name, (q, quantizer) in found[0].items():
        assert torch.equal(q, found[1][name][0]), name
        assert quantizer is None or quantizer.spec.dynamic or quantizer.scale == found[1][name][1].scale


@pytest.mark.parametrize("make", [zoo.llama, zoo.bert, zoo.gpt2])
def test_one_token_is_enough_to_run(make):
    model = make()
    prepare(model, Recipe(Scheme.parse("w4a8-g32-static")))
    state = calibrate(model, [zoo.tokens(1)], lambda _: GPTQ())
    assert {report["rows"] for report in state.layers.values()} == {1}
    assert torch.isfinite(model(**zoo.tokens(7, 3)).logits).all()


def test_a_batch_that_breaks_the_model_is_left_out_or_stops_it():
    model = zoo.mlp()
    good, bad = {"input": torch.randn(5, 20)}, {"input": torch.full((2, 20), math.inf)}
    prepare(one := copy.deepcopy(model), Recipe(W3))
    with pytest.raises(UntrustedInput, match=r"^0: 1 of 3 calibration batches held NaN or Inf inputs"):
        calibrate(one, [good, bad, good], lambda _: GPTQ())
    prepare(few := copy.deepcopy(model), Recipe(W3))
    calibrate(few, [good] * 100 + [bad], lambda _: GPTQ())
    prepare(none := copy.deepcopy(model), Recipe(W3))
    calibrate(none, [good] * 100, lambda _: GPTQ())
    found, expected = integers(few), integers(none)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_the_report_of_a_layer():
    model, batches = zoo.llama(), batches_of((12, 5, 9))
    prepare(prepared := copy.deepcopy(model), Recipe(W3))
    state = calibrate(prepared, batches, lambda _: GPTQ())
    name = "model.layers.0.self_attn.q_proj"
    report, layer = state.layers[name], prepared.get_submodule(name)
    w, w_hat = model.get_submodule(name).weight.detach(), layer.fake_weight().detach()
    rows = []
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
        prepared(**batches[0])
        handle.remove()
        x = rows[0][batches[0]["attention_mask"].bool()].double()
        expected = float(((w_hat - w).double() @ x.T).norm() / (w.double() @ x.T).norm())
    assert report["rows"] == 26 and report["method"] == "gptq"
    assert report["output_error"] == pytest.approx(expected, rel=1e-3)
    assert report["weight_error"] == pytest.approx(float((w_hat - w).norm() / w.norm()), rel=1e-5)


def test_each_layer_may_have_its_own_method():
    model, batches = zoo.llama(), batches_of((12, 5, 9))
    prepare(model, Recipe(W3))
    methods = {True: RTN(), False: GPTQ()}
    state = calibrate(model, batches, lambda name: methods["mlp" in name])
    assert {name: r["method"] for name, r in state.layers.items()} == {
        name: "rtn" if "mlp" in name else "gptq" for name in state.layers
    }


def test_the_model_is_left_as_it_was_but_for_its_grids():
    model = zoo.llama().train()
    prepare(model, Recipe(Scheme.parse("w4a8-g32-static")))
    state = calibrate(model, batches_of((7, 3)), lambda _: GPTQ())
    assert model.training
    for _, module in modules_of(model, FAKE_QUANT):
        assert module.weight_quantizer.enabled and module.input_quantizer.enabled
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any(isinstance(m, FakeQuantEmbedding) for m in model.modules())
    assert len(state.layers) == 14


def test_progress_counts_every_layer():
    steps = []

    class Counting(Progress):
        def task(self, title, total):
            steps.append((title, total))
            return _Advance(steps)

    class _Advance:
        def __init__(self, steps):
            self.steps = steps

        def __enter__(self):
            return self.steps.append

        def __exit__(self, *_):
            return None

    rules = Rule(W3, pattern="lm_head"), Rule(W3, module_type="Embedding")
    prepare(model := zoo.llama(), Recipe(W3, rules))
    calibrate(model, batches_of((7, 3)), lambda _: GPTQ(), Counting())
    assert steps[0] == ("calibrating", 16) and sum(steps[1:]) == 16


def test_the_float_path_goes_on_through_blocks_that_ask_for_nothing():
    """A kept block, and one whose method has no use for it, stand before one that pairs rows with the float model's."""
    model, batches, crossing, plain = zoo.llama(layers=4), batches_of((9, 4), (6,)), Spy(needs_float_path=True), Spy()
    keep = Rule(Keep("kept"), pattern="model.layers.1.*")
    prepare(prepared := copy.deepcopy(model), Recipe(W3, (keep,)))
    calibrate(prepared, batches, lambda name: crossing if name.startswith("model.layers.3.") else plain)
    name, pairs = "model.layers.3.self_attn.q_proj", []
    for one in (prepared, model):
        rows = []
        handle = one.get_submodule(name).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                one(**batch)
                rows[-1] = rows[-1][batch["attention_mask"].bool()]
        handle.remove()
        pairs.append(torch.cat(rows))
    size = float(crossing.seen[0].cross.abs().max())
    torch.testing.assert_close(crossing.seen[0].cross, pairs[0].T @ pairs[1], rtol=1e-4, atol=1e-5 * size)
    assert not torch.allclose(pairs[0].T @ pairs[0], pairs[0].T @ pairs[1], rtol=1e-2), "the two paths differ here"
    assert all(statistics.cross is None for statistics in plain.seen)
