import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantailor.errors import UntrustedInput, UsageError
from quantailor.models.loading import device_of, load_float, load_tokenizer, task_of


@pytest.fixture
def copy(tmp_path):
    def made(folder, tensors=None, **config):
        new = tmp_path / "model"
        shutil.copytree(folder, new)
        path = new / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        if tensors is not None:
            weights = load_file(new / "model.safetensors")
            tensors(weights)
            save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        return new

    return made


def test_what_a_folder_holds(tiny_lm, tiny_bert):
    lm, classifier = load_float(tiny_lm), load_float(tiny_bert)
    assert (lm.task, classifier.task) == ("lm", "classification") and not lm.notes and not classifier.notes
    assert not lm.model.training and {p.dtype for p in lm.model.parameters()} == {torch.float32}
    stored = load_file(tiny_lm / "model.safetensors")
    loaded = lm.model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
    assert lm.tokenizer("hello")["input_ids"][0] == 1
    assert device_of(lm.model).type == device_of(nn.ReLU()).type == "cpu"


@pytest.mark.parametrize(
    "architectures, task",
    [
        (["LlamaForCausalLM"], "lm"),
        (["GPT2LMHeadModel"], "lm"),
        (["BertForSequenceClassification"], "classification"),
        (["BertModel"], None),
        (None, None),
    ],
)
def test_the_task_is_in_the_config(architectures, task):
    assert task_of({"architectures": architectures}) == task


def test_half_precision_stays_half_precision(tiny_lm, copy):
    folder = copy(tiny_lm, lambda w: w.update({k: v.bfloat16() for k, v in w.items()}), dtype="bfloat16")
    assert {p.dtype for p in load_float(folder).model.parameters()} == {torch.bfloat16}


def test_a_bare_encoder_gets_a_head(minilm):
    loaded = load_float(minilm, task="classification", num_labels=3)
    assert loaded.model.config.num_labels == 3 and loaded.model.classifier.weight.shape[0] == 3
    assert loaded.notes == ("a bare encoder: new head classifier.bias, classifier.weight starts from random weights",)
    with pytest.raises(UsageError, match="is a bare encoder without a head; fine-tune it first: quantailor train"):
        load_float(minilm)


def test_another_task_than_the_model_s_is_refused(tiny_lm, tiny_bert):
    with pytest.raises(UsageError, match="is made for lm, not for classification; use data of that kind"):
        load_float(tiny_lm, task="classification")
    with pytest.raises(UsageError, match="is made for classification, not for lm"):
        load_float(tiny_bert, task="lm")


def remove(name):
    return lambda weights: weights.pop(name)


NORM, PROJECTION = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "damage, told",
    [
        (remove(NORM), f"lacks tensor {NORM}, against its config.json; use a whole checkpoint of one model"),
        (lambda w: [w.pop(NORM), w.pop(PROJECTION)], f"lacks tensor {PROJECTION} and 1 more"),
        (lambda w: w.update(extra=torch.zeros(2)), "has tensor extra, against its config.json"),
        (lambda w: w[PROJECTION][0].fill_(torch.nan), PROJECTION),
        (lambda w: w[PROJECTION][0].fill_(torch.inf), PROJECTION),
        (lambda w: w.update({NORM: torch.ones(7)}), NORM),
    ],
    ids=["missing", "two missing", "unexpected", "nan", "inf", "misshapen"],
)
def test_a_damaged_folder_is_refused_by_name(tiny_lm, copy, damage, told):
    folder = copy(tiny_lm, damage)
    with pytest.raises(UntrustedInput) as error:
        load_float(folder)
    assert told in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_quantized_folder_is_refused(tiny_lm, copy):
    folder = copy(tiny_lm, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UsageError, match=r"is quantized already \(gptq\); start from its float parent"):
        load_float(folder)


def test_a_folder_without_a_tokenizer_is_refused(tiny_lm, copy):
    folder = copy(tiny_lm)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UntrustedInput, match=r"has no tokenizer that loads .* save it beside the model"):
        load_tokenizer(folder)
