import json

import pytest

from quantailor.cost.skeleton import num_parameters, skeleton
from quantailor.errors import UntrustedInput, UsageError
from tests.cost.configs import CONFIGS, folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_is_built_without_weights(tmp_path, kind):
    found = skeleton(folder(tmp_path, kind))

    assert all(p.is_meta for p in found.model.parameters()) and num_parameters(found.model) > 1000
    again = skeleton(tmp_path / kind / "config.json")
    assert num_parameters(again.model) == num_parameters(found.model)
    assert found.kind == {"bert": "classification", "mobilenet": "image"}.get(kind, "lm")


def edited(tmp_path, **changes):
    path = folder(tmp_path, "llama") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"auto_map": {"AutoModel": "evil.py"}}, UntrustedInput, "auto_map"),
        ({"num_hidden_layers": 10**9}, UntrustedInput, "num_hidden_layers"),
        ({"model_type": "no-such-thing"}, UntrustedInput, "no-such-thing"),
        ({"model_type": None}, UntrustedInput, "model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, UsageError, "gptq"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, UsageError, "LlamaForQuestionAnswering"),
        ({"num_attention_heads": 0}, UntrustedInput, "does not build"),
    ],
)
def test_a_hostile_or_strange_config_is_one_clear_line(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        skeleton(edited(tmp_path, **changes))


def test_a_folder_without_config(tmp_path):
    with pytest.raises(UntrustedInput, match=r"config\.json"):
        skeleton(tmp_path)
