"""The benches' own attention against torch's, and what it leaves to torch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.bench.loaded import loaded


@pytest.fixture(scope="module")
def bench():
    module = loaded("attention")
    if module.library() is None:
        pytest.skip("no C compiler: the benches take torch's attention")
    return module


@pytest.mark.parametrize("tokens", [1, 7, 8, 33, 256])
def test_it_is_torch_s(bench, tokens):
    q, k, v = (torch.randn(2, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2))
    grad = torch.randn(2, 4, tokens, 8)
    found = []
    for run in (
        lambda: bench._Causal.apply(q, k, v, 8**-0.5),
        lambda: F.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True, scale=8**-0.5
        ),
    ):
        y = run()
        found.append([y.detach(), *torch.autograd.grad(y, (q, k, v), grad)])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("half", [(2,), (0, 1, 2)])
def test_what_is_not_float32_is_left_to_torch(bench, half, monkeypatch):
    """Within autocast values alone are bfloat16, half the bytes that the C code would take."""
    parts = [torch.randn(1, 2, 16, 8) for _ in range(3)]
    parts = [t.bfloat16() if i in half else t for i, t in enumerate(parts)]
    monkeypatch.setattr(bench, "sdpa_attention_forward", lambda *parts, **options: "torch's")
    monkeypatch.setattr(bench._Causal, "apply", lambda *parts: pytest.fail("the C code was called"))
    assert bench.attend(SimpleNamespace(), *parts, None) == "torch's"
