"""Folders as others load them: stock transformers, with and without `import quantailor.hf`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantailor import api
from quantailor.errors import UntrustedInput
from quantailor.formats import plugin
from quantailor.nn.activation_quantizer import quantize_activation
from quantailor.nn.packed import QuantLinear
from quantailor.spec import Scheme
from quantailor.store.paths import is_plain_name

COMPRESSED = {
    "w8a8": ("llama", "w8a8", {}),
    "w8a16": ("llama", "w8a16", {}),
    "w4a16-g4": ("llama", "w4a16-g4", {"ragged": False}),
    "w4a16-g32, w8a16": ("llama", "w4a16-g32", {"rules": (("*.down_proj", "w8a16"),), "ragged": False}),
    "w2a16-g32": ("llama", "w2a16-g32", {"rules": (("*.down_proj", "keep"),)}),
    "tied": ("tied", "w4a16-g4", {"ragged": False}),
    "bert": ("bert", "w8a16", {}),
    "bert w8a8": ("bert", "w8a8", {}),
    "w8a8-static": ("llama", "w8a8-static", {}),
    "bert w8a8-static": ("bert", "w8a8-static", {}),
}
OWN = {
    "ragged": ("llama", "w4a16-g32", {}),
    "nf4-dq": ("llama", "nf4-dq", {}),
    "w3a16-asym": ("llama", "w3a16-asym", {}),
    "w4a8-static": ("llama", "w4a8-static", {}),
    "w1.58a8": ("llama", "w1.58a8", {}),
    "w8a8-outliers": ("llama", "w8a8-outliers2", {}),
    "w4a8-g32-ag32": ("llama", "w4a8-g32-ag32", {}),
    "gpt2 outliers": ("gpt2", "w8a8-outliers2", {}),
    "tied": ("tied", "w4a16-g32", {"rules": (("model.embed_tokens", "w8a16"), ("lm_head", "w8a16"))}),
    "half": ("half", "w4a16-g32", {"rules": (("model.embed_tokens", "w8a16"), ("lm_head", "w8a16"))}),
    "gpt2": ("gpt2", "w8a8", {}),
    "bert": ("bert", "w4a8-g16", {}),
}


@pytest.fixture(scope="module")
def strangers(saved_as, tmp_path_factory) -> dict:
    """One process for all: its imports cost more than its work."""
    pytest.importorskip("compressed_tensors")
    folders = {
        (kind, name): str(saved_as(model, scheme, **options)[1])
        for kind, cases in (("stock", COMPRESSED), ("own", OWN))
        for name, (model, scheme, options) in cases.items()
    }
    compressed = [path for (kind, _), path in folders.items() if kind == "stock"]
    own = [path for (kind, _), path in folders.items() if kind == "own"]
    script = Path(__file__).with_name("strangers.py")
    run = subprocess.run(
        [sys.executable, script, *compressed, "--", *own],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    names = {path: key for key, path in folders.items()}
    for part in ("stock", "refused", "plugin"):
        told[part] = {names[path][1]: value for path, value in told[part].items()}
    return told


@pytest.mark.parametrize("name", COMPRESSED)
def test_stock_transformers_computes_what_was_simulated(strangers, name):
    """With activations quantized too, one rounds a tie another way now and then, which is worth one step of a token."""
    assert strangers["stock"][name] <= (2e-2 if "a8" in name else 1e-5)


def test_the_stranger_never_had_quantailor(strangers):
    assert strangers["quantailor_imported"] is False


@pytest.mark.parametrize("name", OWN)
def test_our_own_layout_does_not_load_without_the_import(strangers, name):
    """It would be random weights and exit 0."""
    by_auto, by_class = strangers["refused"][name]
    assert by_auto is not None and by_class is not None
    assert "quantailor" in by_auto, "what is missing is named"


@pytest.mark.parametrize("name", OWN)
def test_our_own_layout_loads_after_the_import_bit_for_bit(strangers, name):
    assert strangers["plugin"][name] == 0


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        *(("llama", f"w8a8-static{method}") for method in ("-minmax", "-percentile", "-percentile99", "-kl")),
        *(("llama", f"w4a8-g32{rest}") for rest in ("-ag32", "-asym-outliers2")),
        *(("llama", text) for text in ("w8a8-outliers2", "llm.int8", "w8a8-ag24")),
        *((model, "w8a8-outliers2") for model in ("gpt2", "half", "bert")),
    ],
)
def test_what_is_read_back_computes_what_was_simulated(saved_as, model, scheme):
    """In the process that saved, to the last bit: the folder's proof, and other text in `eval` and `train` mode."""
    simulated, folder = saved_as(model, scheme)
    parity = api.check(folder)
    assert parity.equal and parity.max_logit_difference == 0.0 and max(parity.per_layer.values()) == 0.0
    loaded = api.load(folder)
    assert loaded.state.scheme == simulated.state.scheme and str(loaded.state.scheme) == str(Scheme.parse(scheme))
    ids = torch.randint(3, 80, (3, 20))
    if scheme.endswith("outliers2"):
        taken = outliers_taken(loaded.model, ids)
        assert 0 < taken < 1  # some columns were out, not all
    for training in (False, True)[: 2 if model in ("llama", "half") else 1]:  # the others have dropout
        with torch.no_grad():
            logits = [m.model.train(training)(ids).logits for m in (simulated, loaded)]
        assert torch.equal(*logits)
    simulated.model.eval()


def outliers_taken(model, ids):
    """The share of input columns that a call keeps in float."""
    shares = []

    def hook(module, args):
        found = quantize_activation(args[0], module.scheme.input, None)
        shares.append(len(found.columns) / found.q.shape[-1])

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, QuantLinear)]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return sum(shares) / len(shares)


def test_registering_twice_does_nothing():
    plugin.register()
    known = dict(plugin.CONFIG_MAPPING._extra_content)
    plugin.register()
    assert dict(plugin.CONFIG_MAPPING._extra_content) == known and "quantailor" in known


def test_the_weights_file_name_cannot_lead_out_of_the_folder():
    inner = {"model_type": "llama"}
    sound = {"quantailor_config": inner, "quantization_config": {}}
    for name in ("../x.safetensors", "/etc/x.safetensors", "model.safetensors", ["a"], None):
        with pytest.raises(UntrustedInput, match="names weights"):
            plugin.unwrapped({**sound, "weights_file": name})
    assert is_plain_name(plugin.unwrapped(sound)["transformers_weights"])


def test_a_module_of_another_kind_or_no_module_at_all_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    scheme = plugin.to_json(plugin.Scheme.parse("w8a16"))
    layer = {"scheme": 0, "kind": "Linear", "shape": [4, 4], "bias": True}
    for name, settings, told in (
        ("1", layer, "which this model does not have"),
        ("0", {**layer, "kind": "Embedding"}, "as a Embedding, and the model has a Linear"),
        ("0", {**layer, "shape": [4]}, "quantization_config is damaged"),
    ):
        with pytest.raises(UntrustedInput, match=told):
            plugin.install_packed(model, plugin.QuantailorConfig(schemes=[scheme], layers={name: settings}))
