"""The logits that a folder keeps for `check`: computed where `check` computes, wherever the model is."""

import pytest
import torch

from quantailor import api
from quantailor.formats import folder as folder_module
from tests.formats.making import quantized


def test_the_logits_that_are_kept_are_the_cpu_s(lm, monkeypatch):
    """A grid turns a last bit that another device rounds otherwise into a whole step, and `check` runs on the CPU."""
    model, there = lm.model, []
    monkeypatch.setattr(folder_module, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(type(model), "to", lambda self, device: there.append(str(device)) or self)
    probe = {"input_ids": torch.tensor([[1, 2, 3]])}
    with torch.inference_mode():
        expected = model(**probe).logits.float()[:, -4:]
    assert torch.equal(folder_module.last_logits(model, probe), expected)
    assert there == ["cpu", "cuda"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
def test_a_model_on_a_gpu_is_saved_with_its_proof(lm, scheme, tmp_path):
    model = quantized(lm, scheme)
    model.model.cuda()
    api.save(model, tmp_path / "out")
    assert api.check(tmp_path / "out").equal and next(model.model.parameters()).is_cuda
