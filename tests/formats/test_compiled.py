"""Packed models under torch.compile and torch.export: one graph, the same outputs."""

import pytest
import torch

from quantailor import api
from tests.formats.making import quantized

SCHEMES = ["w8a8", "w4a16-g32", "w4a8-g32", "nf4"]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module", params=SCHEMES)
def packed(request, lm):
    return request.param, Logits(api.pack(quantized(lm, request.param, method="rtn")).model.eval())


def test_export_gives_one_graph_with_the_same_outputs(packed):
    _, model = packed
    ids = torch.randint(3, 80, (2, 9))
    program = torch.export.export(model, (ids,), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},))
    for shape in ((2, 9), (3, 17)):
        ids = torch.randint(3, 80, shape)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(ids), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compile_takes_the_whole_model_without_a_break(packed, backend):
    _, model = packed
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)  # fullgraph: a break would raise
    ids = torch.randint(3, 80, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids), rtol=0, atol=1e-5)
