"""The second order of KL against KL itself, and the products against gradients written out."""

import pytest
import torch

from quantailor import ptq
from quantailor.models.roles import find_roles
from quantailor.searching.fisher import diagonal, products, second_order
from quantailor.searching.sensitivity import Study
from quantailor.searching.variants import rows
from quantailor.spec import Scheme
from tests.models import zoo

SCHEMES = [Scheme.parse("w8a16-g16"), Scheme.parse("w4a16-g16")]


def study(name, batches, roles=("q/k/v", "o", "ffn in", "ffn out"), schemes=SCHEMES):
    model = getattr(zoo, name)()
    found = Study(model, find_roles(model).of(*roles), schemes, ptq.method("rtn"), batches, batches)
    found.solve()
    return found


def batches(count, length=12):
    return [zoo.tokens(length, length, length, length) for _ in range(count)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_kl_where_the_change_is_small(name):
    s = study(name, batches(24), schemes=[Scheme.parse("w8a16-g16")])
    a, positions = products(s.model, s.held, s.variants, s.units, s.schemes, draws=6)
    estimated = second_order(a, positions)[:, 0]
    measured = torch.tensor([s.measured({u: s.schemes[0]}) for u in s.units], dtype=torch.float64)
    # 576 draws of a chi-square: a standard deviation of 6 %
    assert ((estimated / measured - 1).abs() < 0.35).all(), estimated / measured
    assert abs(float((estimated / measured).log().mean())) < 0.12


def test_a_classifier_has_one_position_a_row():
    s = study("bert", batches(30), schemes=[Scheme.parse("w8a16-g16")])
    a, positions = products(s.model, s.held, s.variants, s.units, s.schemes, draws=8)
    assert positions == 30 * 4 * 8 and a.shape == (30 * 4 * 8, len(s.units), 1)
    measured = torch.tensor([s.measured({u: s.schemes[0]}) for u in s.units], dtype=torch.float64)
    assert abs(float((second_order(a, positions)[:, 0] / measured).log().mean())) < 0.25


def by_weight_gradients(s, seed, draws):
    """<d log p(y) / dW, W_hat - W> with the gradient of the weight, one sequence after the other."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in s.held:
        log_probs = s.model(**batch).logits.float().log_softmax(-1)
        for _ in range(draws):
            y = torch.multinomial(log_probs.detach().exp().flatten(0, 1), 1, generator=generator).view(
                log_probs.shape[:2]
            )
            for row in range(len(y)):
                scored = log_probs[row].gather(-1, y[row, :, None])[:, 0] * batch["attention_mask"][row]
                line = []
                for unit in s.units:
                    weights = [s.model.get_submodule(n).weight for n in unit.layers]
                    gradients = torch.autograd.grad(scored.sum(), weights, retain_graph=True)
                    line.append(
                        [
                            sum(
                                float(
                                    (g * (s.variants.solved[n, c].weight(s.model.get_submodule(n)) - w.detach())).sum()
                                )
                                for n, w, g in zip(unit.layers, weights, gradients)
                            )
                            for c in s.schemes
                        ]
                    )
                found.append(line)
    return torch.tensor(found, dtype=torch.float64)


def test_the_products_are_those_of_the_weights_gradients():
    data = [zoo.tokens(9, 6, padded_to=9), zoo.tokens(8, 8)]
    roles = ("embedding", "q/k/v", "o", "ffn in", "ffn out", "norm", "head")
    s = study("llama", data, roles)
    a, positions = products(s.model, s.held, s.variants, s.units, s.schemes, draws=2, seed=3)
    assert positions == 2 * (9 + 6 + 8 + 8)
    assert torch.allclose(a, by_weight_gradients(s, 3, 2), rtol=1e-3, atol=1e-5)


def test_rows_one_by_one_where_a_layers_output_has_no_rows():
    """The table of positions of a BERT gives one row for all: the batch is taken apart, padding cut off."""
    data = [zoo.tokens(7, 5, padded_to=7)]
    s = study("masked_bert", data, ("embedding", "q/k/v"))
    a, positions = products(s.model, s.held, s.variants, s.units, s.schemes, draws=3)
    assert a.shape == (6, len(s.units), 2) and positions == 3 * 12 and (a.abs().sum(0) > 0).all()


def test_the_diagonal_by_definition():
    s = study("llama", [zoo.tokens(6)], ("o",))
    found = diagonal(s.model, s.held, s.variants, s.units, s.schemes, draws=1, seed=5)
    log_probs = s.model(**s.held[0]).logits.float().log_softmax(-1)
    y = torch.multinomial(log_probs.detach().exp()[0], 1, generator=torch.Generator().manual_seed(5))
    for i, unit in enumerate(s.units):
        module = s.model.get_submodule(unit.layers[0])
        (g,) = torch.autograd.grad(log_probs[0].gather(-1, y).sum(), [module.weight], retain_graph=True)
        for j, c in enumerate(s.schemes):
            delta = s.variants.solved[unit.layers[0], c].weight(module) - rows(module)
            assert float(found[i, j]) == pytest.approx(float((g * delta).square().sum()) / 12, rel=1e-3)


def test_the_model_is_left_as_it_was():
    s = study("llama", [zoo.tokens(6)])
    for p in list(s.model.parameters())[::2]:
        p.requires_grad_(False)
    before = [p.requires_grad for p in s.model.parameters()]
    products(s.model, s.held, s.variants, s.units, s.schemes, draws=1)
    assert [p.requires_grad for p in s.model.parameters()] == before
    assert not any(m._forward_hooks for m in s.model.modules()) and all(p.grad is None for p in s.model.parameters())
