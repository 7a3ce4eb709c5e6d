"""Tensors one at a time: read as they were written, and written as safetensors itself writes them, to the byte."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantailor.errors import UntrustedInput
from quantailor.store.header import read_header
from quantailor.store.tensors import DTYPES, read_tensor, write_model_tensors, write_tensors


@pytest.fixture
def every_type(tmp_path):
    shapes = (("b", (3, 2)), ("a", (5,)), ("é", ()), ('q"', (0, 2)))
    tensors = {f"{n}.{i}": (torch.randn(s) * 3).to(t) for i, t in enumerate(DTYPES.values()) for n, s in shapes}
    save_file(tensors, tmp_path / "given.safetensors", metadata={"format": "pt"})
    return tensors, tmp_path / "given.safetensors"


def test_the_same_bytes_as_safetensors_writes(every_type, tmp_path):
    _, given = every_type
    write_tensors(tmp_path / "copy.safetensors", dict(reversed(read_header(given).items())))
    assert (tmp_path / "copy.safetensors").read_bytes() == given.read_bytes()


def test_reading_one_tensor(every_type):
    tensors, given = every_type
    facts = read_header(given)
    assert facts.keys() == tensors.keys()
    for name, fact in facts.items():
        found = read_tensor(fact)
        assert found.dtype == tensors[name].dtype and found.shape == tensors[name].shape
        assert (
            found.numpy(force=True).tobytes() == tensors[name].numpy(force=True).tobytes()
            if (found.dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2))
            else torch.equal(found.float(), tensors[name].float())
        )


def test_shards_hold_every_tensor_once(every_type, tmp_path):
    tensors, given = every_type
    (tmp_path / "out").mkdir()
    write_model_tensors(tmp_path / "out", read_header(given), shard_bytes=64)
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    found = [name for shard in shards for name in load_file(shard)]
    assert len(shards) > 3 and sorted(found) == sorted(tensors)


def test_a_file_cut_short_after_its_header_was_read(every_type):
    _, given = every_type
    facts = read_header(given)
    given.write_bytes(given.read_bytes()[:-1])
    last = max((f for f in facts.values() if f.num_bytes), key=lambda fact: fact.start)
    with pytest.raises(UntrustedInput, match="was cut short"):
        read_tensor(last)
