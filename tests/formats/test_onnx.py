"""Whole models: traced, written, read again, executed at shapes that were not traced."""

import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from quantailor import api
from quantailor.errors import QualityGateFailed, QuantailorError, UsageError
from quantailor.formats import onnx as writer
from quantailor.formats import onnx_check, onnx_trace
from quantailor.formats.onnx_check import SESSION, differing, outputs, read_layers, session
from quantailor.formats.receipt import ExportReceipt
from quantailor.models.prepare import PACKED, pack_model, prepare_layers
from quantailor.nn.packed import QuantEmbedding
from quantailor.recipe import Keep, Rule
from quantailor.spec import Scheme
from quantailor.verbs.model import default_probe

MODELS = {
    "llama at 4 bits in groups": ("llama", "w4a16-g32", ()),
    "llama, 8 bits on both sides": ("llama", "w8a8", ()),
    "llama, mixed": ("llama", "w4a16-g32", (("*.down_proj", "w8a16"), ("*.q_proj", "nf4"))),
    "bert, static scales": ("bert", "w8a8-static", ()),
    "gpt2 at 2 bits": ("gpt2", "w2a16-g32", ()),
    "bfloat16, tied tables": ("half", "w8a16", (("*embed_tokens", "w4a16-g32"), ("lm_head", "w4a16-g32"))),
    "tied and kept": ("tied", "w8a16", ()),
}


@pytest.fixture(scope="module")
def written(saved_as, tmp_path_factory):
    """written(name) -> (packed model, its folder's receipt, the folder), each made once."""
    made: dict[str, tuple[api.Model, ExportReceipt, Path]] = {}

    def make(name: str):
        if name not in made:
            model, scheme, rules = MODELS[name]
            packed = api.load(saved_as(model, scheme, rules=rules)[1])
            folder = tmp_path_factory.mktemp("onnx")
            receipt = writer.write(folder, packed.model, packed.tokenizer, packed.probe or default_probe(packed))
            made[name] = packed, receipt, folder
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_receipt_tells_of_equal_integers_and_outputs(name, written):
    packed, receipt, folder = written(name)
    layers = [m for m in packed.model.modules() if isinstance(m, PACKED)]
    assert receipt.integers_equal and receipt.differences == {} and receipt.refused is None
    assert receipt.layers == len(layers) == len(packed.state.inventory.quantized)
    rounded = any(m.scheme.input is not None for m in layers)
    assert receipt.max_logit_difference <= (2e-2 if rounded else 5e-6)
    assert (folder / "model.onnx").is_file() and set(receipt.files) == {p.name for p in folder.iterdir()}
    json.dumps(receipt.to_json(), allow_nan=False)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_read_anew_holds_our_integers(name, written):
    packed, _, folder = written(name)
    proto = onnx.load(folder / "model.onnx")
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [21]
    assert {entry.domain for entry in proto.opset_import} == {""}
    found = read_layers(proto)
    assert differing(found, packed.model) == {}
    assert set(found) == set(packed.state.inventory.quantized)
    total = sum(held.q.numel() for held in found.values())
    assert total == sum(m.packed.integers().numel() for m in packed.model.modules() if isinstance(m, PACKED))


@pytest.mark.parametrize("name", MODELS)
def test_no_weight_lies_in_the_file_in_float(name, written):
    packed, _, folder = written(name)
    proto = onnx.load(folder / "model.onnx")
    sizes = {m.packed.out_features * m.packed.in_features for m in packed.model.modules() if isinstance(m, PACKED)}
    kept = {tuple(p.shape) for p in packed.model.parameters()}
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) in sizes:
            assert tuple(tensor.dims) in kept, tensor.name
    integers = sum(
        (n.packed.out_features * n.packed.in_features * (4 if n.packed.spec.grid.bits <= 4 else 8)) // 8
        for n in {id(m.packed): m for m in packed.model.modules() if isinstance(m, PACKED)}.values()
    )
    floats = 4 * sum(p.numel() for p in packed.model.parameters())
    scales = sum(4 * len(m.packed.scales().flatten()) for m in packed.model.modules() if isinstance(m, PACKED))
    layers = len(packed.state.inventory.quantized)
    assert (folder / "model.onnx").stat().st_size < integers + floats + scales + 60_000 + 4_000 * layers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 33), (5, 2)])
def test_any_batch_and_length_and_left_padding(name, shape, written):
    packed, _, folder = written(name)
    torch.manual_seed(1)
    ids = torch.randint(3, packed.model.config.vocab_size, shape)
    mask = torch.ones_like(ids)
    if shape == (3, 33):
        mask[1, :5] = 0
    running = session(folder / "model.onnx", SESSION)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    (theirs,) = outputs(running, given, ["logits"])
    with torch.no_grad():
        ours = writer._in_float32(packed.model)[0](input_ids=ids, attention_mask=mask).logits
    assert theirs.shape == ours.shape
    if ours.dim() == 3:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    rounded = "8 bits on both sides" in name or "static" in name
    assert (theirs - ours).abs().max() <= (5e-2 if rounded else 1e-5) * ours.abs().max()


def test_inputs_are_those_of_the_tokenizer_and_axes_have_names(written):
    for name, inputs in (("bert, static scales", [*onnx_trace.INPUTS]), ("gpt2 at 2 bits", [*onnx_trace.INPUTS[:2]])):
        graph = onnx.load(written(name)[2] / "model.onnx").graph
        assert [value.name for value in graph.input] == inputs
        for value in graph.input:
            assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
        assert [value.name for value in graph.output] == ["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_this_machine_is_in_the_file(name, written):
    data = (written(name)[2] / "model.onnx").read_bytes()
    for text in (b"site-packages", b".py", str(Path.home()).encode() + b"/", b"stack_trace"):
        assert text not in data, text


@pytest.mark.parametrize("name, quantized", [("tied and kept", False), ("bfloat16, tied tables", True)])
def test_the_tables_of_a_tied_model_are_there_once(name, quantized, written):
    packed, _, folder = written(name)
    assert isinstance(packed.model.get_input_embeddings(), QuantEmbedding) is quantized
    size = packed.model.config.vocab_size * packed.model.config.hidden_size
    held = onnx.load(folder / "model.onnx").graph.initializer
    assert [t.name for t in held if math.prod(t.dims) == size] == ["model.embed_tokens.weight"]


def test_notes_say_what_a_reader_has_to_know(written):
    def notes(name: str) -> str:
        return "\n".join(written(name)[1].notes)

    assert "qdq_matmulnbits_accuracy_level" in notes("llama at 4 bits in groups")
    assert "no cache of keys and values" in notes("gpt2 at 2 bits")
    assert "cache" not in notes("bert, static scales")
    assert "1 layers have a shorter last group" not in notes("gpt2 at 2 bits"), "32 and 128 inputs"
    assert "2 layers have a shorter last group" in notes("llama at 4 bits in groups"), (
        "172 inputs of the down projections"
    )
    assert "of fewer than 4 bits take 4 bits a weight" in notes("gpt2 at 2 bits")
    assert "multiply integers" in notes("llama, 8 bits on both sides")
    assert "integers of quantized inputs" in notes("llama, 8 bits on both sides")
    assert "NF4" in notes("llama, mixed")
    assert "computes in float32, where the folder says bfloat16" in notes("bfloat16, tied tables")
    for name in MODELS:
        assert "each layer alone, on the inputs that ours gets, differs by at most" in notes(name)


def test_the_setting_that_exactness_needs_stands_in_the_file(written):
    proto = onnx.load(written("llama at 4 bits in groups")[2] / "model.onnx")
    held = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(held["quantailor.session"]) == SESSION


def test_the_default_setting_really_is_worse(written):
    """What the note warns of."""
    packed, receipt, folder = written("llama at 4 bits in groups")
    by_default = onnx_check.logit_difference(session(folder / "model.onnx", {}), packed.model, packed.probe)
    assert by_default > 100 * receipt.max_logit_difference


def test_the_same_model_gives_the_same_bytes(written, tmp_path):
    packed, _, folder = written("bert, static scales")
    writer.write(tmp_path, packed.model, packed.tokenizer, packed.probe)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_float_model_is_refused(classifier, tmp_path):
    with pytest.raises(UsageError, match="no layer of this model is quantized"):
        writer.write(tmp_path, classifier.model, classifier.tokenizer, default_probe(classifier))


def test_a_convolution_is_refused_by_name(classifier):
    import copy

    model = copy.deepcopy(classifier.model)
    model.patches = nn.Conv2d(3, 4, 2)
    prepare_layers(model, {"patches": Scheme.parse("w8a16")})
    pack_model(model)
    with pytest.raises(UsageError, match=r"patches \(w8a16\) is a convolution.*keep it by a rule"):
        onnx_trace.trace(model, default_probe(classifier))


def test_what_cannot_be_traced_is_refused_in_one_line(classifier, monkeypatch, tmp_path):
    model = api.quantize(classifier, "w8a16", method="rtn", rules=[Rule(Keep("asked for"), pattern="classifier")])
    packed = api.pack(model)
    monkeypatch.setattr(type(packed.model), "forward", lambda *_a, **_k: 1 / 0)
    with pytest.raises(UsageError, match=r"cannot trace BertForSequenceClassification: .*; export hf") as refused:
        writer.write(tmp_path, packed.model, packed.tokenizer, default_probe(packed))
    assert "\n" not in str(refused.value)


@pytest.fixture
def bert_w4(saved_as, traced_bert, monkeypatch):
    """The classifier at 4 bits; its graph is traced once."""
    monkeypatch.setattr(writer, "trace", lambda *_, **_options: onnx.ModelProto.FromString(traced_bert))
    return api.load(saved_as("bert", "w4a16-g32")[1])


@pytest.fixture(scope="module")
def traced_bert(saved_as) -> bytes:
    packed = api.load(saved_as("bert", "w4a16-g32")[1])
    probe = writer._all_inputs(packed.model, packed.tokenizer, packed.probe)
    return onnx_trace.trace(packed.model, writer._example(packed.model, probe)).SerializeToString()


@pytest.mark.parametrize(
    "name, found, message",
    [
        (
            "differing",
            {"bert.pooler.dense": "integers"},
            "bert.pooler.dense: integers in the ONNX file are not the model's",
        ),
        ("layer_difference", {"bert.pooler.dense": 0.5}, "bert.pooler.dense differs by 5.0e-01 in ONNX Runtime"),
        ("layer_difference", {"bert.pooler.dense": float("nan")}, "bert.pooler.dense differs by nan"),
        ("logit_difference", 2e-4, "logits differ by 2.0e-04 in ONNX Runtime, 0.0001 is allowed where only weights"),
    ],
)
def test_a_file_that_is_not_the_model_is_an_error(name, found, message, bert_w4, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_check, name, lambda *_: found)
    with pytest.raises(QualityGateFailed, match=message):
        writer.write(tmp_path, bert_w4.model, bert_w4.tokenizer, bert_w4.probe)


def test_a_file_that_is_too_large_is_an_error(bert_w4, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_SLACK", -10_000_000)
    with pytest.raises(QuantailorError, match=r"model.onnx takes [\d,]+ bytes where its tensors explain"):
        writer.write(tmp_path, bert_w4.model, bert_w4.tokenizer, bert_w4.probe)


def test_the_model_is_left_as_it_was(bert_w4, tmp_path):
    modules, names = list(bert_w4.model.modules()), set(bert_w4.model.state_dict())
    writer.write(tmp_path, bert_w4.model, bert_w4.tokenizer, bert_w4.probe)
    assert list(bert_w4.model.modules()) == modules and set(bert_w4.model.state_dict()) == names


def test_large_models_keep_their_weights_beside_the_graph(bert_w4, tmp_path):
    receipt = writer.write(tmp_path, bert_w4.model, bert_w4.tokenizer, bert_w4.probe, external_above=10_000)
    assert "model.onnx.data" in receipt.files and receipt.integers_equal and receipt.max_logit_difference < 1e-4
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert len(proto.SerializeToString()) < (tmp_path / "model.onnx.data").stat().st_size
    assert differing(read_layers(proto, tmp_path), bert_w4.model) == {}


@pytest.mark.parametrize(("scheme", "most"), [("w4a16-g32", 1e-5), ("w8a8", 0.05)])
def test_experts_are_traced_in_a_form_that_onnx_has(tiny_lm, tmp_path, scheme, most):
    """Quantized experts are layers like any others, and each runs on every token."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=64, **sizes, **heads
    )
    torch.manual_seed(0)
    model = api.Model(Qwen3MoeForCausalLM(config).eval(), tokenizer, "lm")
    packed = api.pack(api.quantize(model, scheme, method="rtn"))
    before = packed.model.config._experts_implementation
    receipt = writer.write(tmp_path, packed.model, tokenizer, default_probe(packed))
    assert receipt.integers_equal and receipt.layers == 16 and receipt.max_logit_difference < most
    assert scheme == "w4a16-g32" or any("12 layers not compared" in note for note in receipt.notes)
    assert any(note.startswith("every expert runs on every token") for note in receipt.notes)
    assert packed.model.config._experts_implementation == before


def test_a_real_llama(stories260k, tmp_path):
    """The smallest real one; bench/export_table.py has all of them."""
    packed = api.pack(api.quantize(stories260k, "w4a16-g32", method="rtn"))
    receipt = writer.write(tmp_path, packed.model, packed.tokenizer, default_probe(packed))
    assert receipt.layers == 35 and receipt.integers_equal and receipt.max_logit_difference < 1e-5
    assert (tmp_path / "model.onnx").stat().st_size < 340_000, "1.04 MB in float32"
