"""A method's name: which parts it is made of, in which order the driver asks them, and what is refused."""

from dataclasses import dataclass, field

import pytest
import torch

from quantailor import ptq
from quantailor.errors import UsageError
from quantailor.models.prepare import prepare
from quantailor.ptq.autoround import AutoRound
from quantailor.ptq.chain import as_chain, parse_method
from quantailor.ptq.driver import calibrate, methods_of
from quantailor.ptq.gptq import GPTQ
from quantailor.ptq.rtn import RTN
from quantailor.recipe import Recipe, Rule
from quantailor.spec import Scheme
from tests.models import zoo


@dataclass
class Talker:
    """Offers every hook but `solve`, and writes down when it is asked."""

    said: list = field(default_factory=list)
    needs_hessian: bool = False
    needs_float_path: bool = True

    def note(self, hook, layers):
        self.said.append((hook, sorted(layers)))
        return {name: {hook: True} for name in layers}

    def on_model(self, model, layers):
        return self.note("on_model", layers)

    def on_block(self, block, layers, runs, masks):
        assert all(not m.weight_quantizer.enabled for m in layers.values()), "the block is in float"
        return self.note("on_block", layers)

    def before(self, weight, statistics, spec):
        self.said.append(("before", []))
        return 2 * weight, {"before": True}

    def refine(self, block, layers, runs, targets, masks):
        return self.note("refine", layers)

    def finish(self, block, twin, layers, runs, float_runs, masks):
        torch.testing.assert_close(runs[0](), float_runs[0](), rtol=1e9, atol=1e9)  # both can be run
        return self.note("finish", layers)


def test_a_name_alone_is_that_method():
    chain = ptq.method("GPTQ")
    assert chain.name == "gptq" and chain.solver is ptq.METHODS["gptq"] and chain.needs_hessian


def test_a_chain_without_a_solver_rounds_to_nearest():
    chain = parse_method("talk", {"talk": Talker()})
    assert isinstance(chain.solver, RTN) and chain.needs_float_path and not chain.needs_hessian


def test_a_refiner_starts_from_the_solver_named_before_it():
    chain = ptq.method("gptq+autoround")
    assert isinstance(chain.solver, AutoRound) and isinstance(chain.solver.start, GPTQ)
    assert chain.parts[1] is chain.solver


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gptq+rtn", "gptq and rtn each find the integers"),
        ("gptq+gptq", "names 'gptq' twice"),
        ("gpqt", "'gpqt' is none of .*; did you mean gptq"),
        ("", "'' is none of"),
        ("gptq+", "'' is none of"),
    ],
)
def test_what_no_method_is_called(text, message):
    with pytest.raises(UsageError, match=message):
        ptq.method(text)


def test_hooks_are_asked_in_order_and_for_their_layers_only():
    model, talker = zoo.llama(), Talker()
    state = prepare(model, Recipe(Scheme.parse("w4a16-g32"), (Rule(Scheme.parse("w8a16"), "*.mlp.*", method="rtn"),)))
    chains = {True: as_chain(RTN()), False: parse_method("talk", {"talk": talker})}
    batch = {"input_ids": torch.randint(3, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    calibrate(model, [batch], lambda name: chains[".mlp." in name])
    attention = [[f"model.layers.{i}.self_attn.{p}_proj" for p in "koqv"] for i in range(2)]
    block = lambda i: [("on_block", attention[i]), *[("before", [])] * 4, ("refine", attention[i])]  # noqa: E731
    expected = [("on_model", sorted(attention[0] + attention[1]))]
    for i in range(2):
        expected += [*block(i), ("finish", attention[i])]
    assert talker.said == expected
    for name, report in state.layers.items():
        told = {"on_model", "on_block", "before", "refine", "finish"} <= set(report)
        assert told == (".mlp." not in name)


def test_a_rule_may_name_a_method():
    model = zoo.llama()
    scheme = Scheme.parse("w4a16-g32")
    recipe = Recipe(scheme, (Rule(scheme, "*.down_proj", method="rtn"),), "gptq")
    inventory = recipe.assign(model)
    assert inventory.method_of("model.layers.0.mlp.down_proj", "gptq") == "rtn"
    assert inventory.method_of("model.layers.0.mlp.up_proj", "gptq") == "gptq"
    state = prepare(model, recipe)
    of = methods_of(state, "gptq")
    assert of("model.layers.1.mlp.down_proj").name == "rtn" and of("model.layers.1.mlp.up_proj").name == "gptq"
