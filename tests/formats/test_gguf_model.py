"""Anyone's file as a model: what llama.cpp's own quantizer made, and what a stranger got wrong."""

import numpy as np
import pytest
import torch

from quantailor.errors import UntrustedInput
from quantailor.evaluate.parity import differing, digests
from quantailor.formats import gguf
from quantailor.formats.gguf_model import read_gguf
from quantailor.formats.gguf_reader import open_gguf
from tests.formats.gguf_oracle import row_order, tiny
from tests.formats.test_gguf import CONFIGS, PROBE, logits

library = pytest.importorskip("gguf", reason="the gguf extra is not installed")


def rewritten(source, out, *, entries=None, tensors=None, drop=()):
    """A copy of a file by the public package, with metadata and tensors changed: name -> (array, type) or a change."""
    file, writer = library.GGUFReader(source), library.GGUFWriter(out, "llama")
    held = open_gguf(source).metadata
    for key, value in ({**held, **(entries or {})}).items():
        if key == "general.architecture" or value is None:
            continue
        gguf._add(writer, key, value.tolist() if isinstance(value, np.ndarray) else value)
    for tensor in file.tensors:
        if tensor.name in drop:
            continue
        data, kind = np.array(tensor.data), tensor.tensor_type
        if tensors and tensor.name in tensors:
            data, kind = tensors[tensor.name](data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    for name, (data, kind) in ((n, v) for n, v in (tensors or {}).items() if isinstance(v, tuple)):
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def quantized_by_them(kind):
    def change(data, _):
        values = data.reshape(data.shape)
        return library.quants.quantize(np.ascontiguousarray(values), kind), kind

    return change


@pytest.fixture
def sound(tmp_path):
    gguf.write(tiny(CONFIGS["llama"], "w4a16-g32"), tmp_path / "sound.gguf")
    return tmp_path / "sound.gguf"


@pytest.fixture
def plain(tmp_path):
    gguf.write(tiny(CONFIGS["llama"]), tmp_path / "plain.gguf")
    return tmp_path / "plain.gguf"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_what_the_public_package_quantized_keeps_its_integers(tmp_path, plain, kind):
    names = [name for name in open_gguf(plain).tensors if "blk" in name and "norm" not in name]
    changes = dict.fromkeys(names, quantized_by_them(library.GGMLQuantizationType[kind]))
    path = rewritten(plain, tmp_path / "theirs.gguf", tensors=changes)
    held = read_gguf(path)
    assert (
        held.notes == () and str(held.model.quantailor_state.scheme) == {"Q8_0": "w8a16-g32", "Q4_0": "w4a16-g32"}[kind]
    )
    theirs = {
        tensor.name: library.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in library.GGUFReader(path).tensors
    }
    order = row_order(4, 16)
    for layer in range(2):
        block = held.model.model.layers[layer]
        up = torch.from_numpy(theirs[f"blk.{layer}.ffn_up.weight"].copy())
        assert torch.equal(block.mlp.up_proj.packed.dequantize(), up)
        q = torch.from_numpy(theirs[f"blk.{layer}.attn_q.weight"].copy())
        assert torch.equal(block.self_attn.q_proj.packed.dequantize()[order], q)
    assert torch.isfinite(logits(held.model)).all()


def test_offsets_between_steps_keep_the_layer_in_float_and_say_so(tmp_path, plain):
    change = {"blk.0.ffn_up.weight": quantized_by_them(library.GGMLQuantizationType.Q4_1)}
    path = rewritten(plain, tmp_path / "theirs.gguf", tensors=change)
    held = read_gguf(path)
    (note,) = held.notes
    assert note.startswith("blk.0.ffn_up.weight: kept in float, with exactly the file's values") and "offsets" in note
    tensor = next(t for t in library.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    exact = torch.from_numpy(library.quants.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(held.model.model.layers[0].mlp.up_proj.weight, exact)


def test_a_float_file_is_a_float_model(plain):
    held = read_gguf(plain)
    assert getattr(held.model, "quantailor_state", None) is None
    assert torch.equal(logits(held.model), logits(tiny(CONFIGS["llama"])))


def test_a_second_way_round_changes_nothing(tmp_path, sound):
    first = read_gguf(sound).model
    receipt = gguf.write(first, tmp_path / "again.gguf", probe=PROBE)
    assert receipt.max_scale_difference == 0 and receipt.max_logit_difference == 0
    assert differing(digests(first), digests(read_gguf(tmp_path / "again.gguf").model)) == {}
    kept = {name: info.kind for name, info in open_gguf(sound).tensors.items()}
    assert kept == {name: info.kind for name, info in open_gguf(tmp_path / "again.gguf").tensors.items()}


def flat(data, kind):
    return data.reshape(-1), kind


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"llama.block_count": 2**31}, "block_count is 2147483648"),
        ({"llama.block_count": 2000}, "promises 2000 blocks"),
        ({"llama.block_count": 3}, "lacks tensor blk.2"),
        ({"llama.block_count": 1}, "has tensor blk.1"),
        ({"llama.block_count": "2"}, "block_count is 2"),
        ({"llama.embedding_length": 128}, "config.json makes it"),
        ({"llama.embedding_length": 0}, "embedding_length is 0"),
        ({"llama.feed_forward_length": 97}, "config.json makes it"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count": 3}, "no multiple"),
        ({"llama.attention.head_count": 8}, "config.json makes it"),
        ({"llama.attention.head_count_kv": 4}, "config.json makes it"),
        ({"llama.attention.key_length": 15}, "unequal or odd"),
        ({"llama.attention.value_length": 8}, "unequal or odd"),
        ({"llama.rope.dimension_count": 8}, "a part of each head"),
        ({"llama.rope.scaling.type": "yarn"}, "scaled by 'yarn'"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base is nan"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0"),
        ({"llama.context_length": None}, "context_length is None"),
        ({"quantailor.feed_forward_length": 90}, "is not zero"),
        ({"quantailor.feed_forward_length": 1}, "against a padded one"),
        ({"quantailor.feed_forward_length": 2**31}, "against a padded one"),
        ({"tokenizer.ggml.eos_token_id": 50}, "none of 50 tokens"),
        ({"tokenizer.ggml.model": "gpt2"}, "no tokens and an embedding of 50"),
    ],
)
def test_metadata_that_contradicts_the_tensors_is_refused(tmp_path, sound, entries, why):
    path = rewritten(sound, tmp_path / "bad.gguf", entries=entries)
    with pytest.raises(UntrustedInput, match=why) as caught:
        read_gguf(path)
    assert "bad.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_another_architecture_is_refused(tmp_path, sound):
    raw = sound.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1)
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(UntrustedInput, match="architecture is 'mamba'"):
        read_gguf(tmp_path / "bad.gguf")


def test_tensors_that_the_model_has_not_or_lacks_are_refused(tmp_path, sound):
    with pytest.raises(UntrustedInput, match=r"lacks tensor blk.1.attn_k.weight"):
        read_gguf(rewritten(sound, tmp_path / "a.gguf", drop=("blk.1.attn_k.weight",)))
    extra = {"blk.0.attn_q.bias": (np.zeros(64, np.float32), library.GGMLQuantizationType.F32)}
    with pytest.raises(UntrustedInput, match=r"lacks tensor blk.0.attn_k.bias"):
        read_gguf(rewritten(sound, tmp_path / "b.gguf", tensors=extra))
    extra = {"strange.weight": (np.zeros(64, np.float32), library.GGMLQuantizationType.F32)}
    with pytest.raises(UntrustedInput, match=r"has tensor strange.weight"):
        read_gguf(rewritten(sound, tmp_path / "c.gguf", tensors=extra))


def test_a_layer_of_a_type_that_is_not_read_is_named(tmp_path, plain):
    change = {"blk.0.ffn_up.weight": quantized_by_them(library.GGMLQuantizationType.Q5_0)}
    with pytest.raises(UntrustedInput, match=r"blk.0.ffn_up.weight as Q5_0, which is not read"):
        read_gguf(rewritten(plain, tmp_path / "a.gguf", tensors=change))


def test_a_norm_of_another_shape_is_refused(tmp_path, sound):
    change = {"output_norm.weight": lambda data, kind: (np.ones(32, np.float32), kind)}
    with pytest.raises(UntrustedInput, match=r"config.json makes it \[64\]"):
        read_gguf(rewritten(sound, tmp_path / "a.gguf", tensors=change))
