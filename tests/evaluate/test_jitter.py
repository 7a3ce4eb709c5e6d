import torch

from quantailor import api
from quantailor.evaluate.jitter import own_jitter


def test_rounded_activations_turn_last_bits_into_steps(tiny_lm):
    ids = torch.randint(3, 300, (2, 40))
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = {}
    for scheme in ("w8a16", "w8a8"):
        model = api.pack(api.quantize(tiny_lm, scheme, method="rtn")).model
        with torch.no_grad():
            before = model(**probe).logits
        found[scheme] = own_jitter(model, probe)
        assert own_jitter(model, probe) == found[scheme], "the same each time"
        with torch.no_grad():
            assert torch.equal(model(**probe).logits, before), "and the model is left as it was"
    assert 0 < found["w8a16"] < 1e-5 < found["w8a8"] < 5e-2


def test_padding_counts_for_nothing(tiny_bert, tiny_lm):
    bert = api.load(tiny_bert).model
    ids = torch.randint(3, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    assert 0 < own_jitter(bert, {"input_ids": ids, "attention_mask": mask}) < 1e-4
    lm = api.load(tiny_lm).model
    lm.lm_head.register_forward_hook(lambda _m, _a, out: out.masked_fill(mask[..., None] == 0, float("nan")))
    assert own_jitter(lm, {"input_ids": ids, "attention_mask": mask}) < 1e-5
