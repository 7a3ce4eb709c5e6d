"""Activations come back as they were put, wherever they lie; memory stays below the bound, and files go again."""

import pytest
import torch

from quantailor.ptq.cache import Cache, StoredCall


@pytest.mark.parametrize("bound", [0, 100, 260, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_was_put_comes_back(tmp_path, bound, dtype):
    tensors = [(torch.randn(2, n, 3) * 4).to(dtype) for n in (4, 1, 7, 0)]
    cache = Cache(tmp_path / "cache", bound)
    row = cache.keep(iter(tensors), [f"t{i}" for i in range(4)], [None] * 4)
    assert len(row) == 4
    for found, tensor in zip(row, tensors):
        assert torch.equal(found, tensor) and found.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(row[1:3], tensors[1:3]))
    sizes = [t.numel() * t.element_size() for t in tensors]
    held = 0
    for size in sizes:  # those that come first, while there is room
        held += size if held + size <= bound else 0
    assert cache.used == cache.peak == held <= bound
    row.drop()
    assert (cache.used == 0 and not (tmp_path / "cache").exists()) or list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(KeyError):
        cache.get("t0")


def test_room_that_is_free_again_is_used(tmp_path):
    cache = Cache(tmp_path / "cache", 100)
    cache.put("a", torch.zeros(20))
    cache.put("b", torch.zeros(20))
    assert cache.used == 80 and (tmp_path / "cache" / "b.safetensors").exists()
    cache.drop("a")
    cache.put("c", torch.ones(25))
    assert cache.used == 100 and not (tmp_path / "cache" / "c.safetensors").exists()


def test_a_view_is_held_without_what_it_looks_into(tmp_path):
    whole = torch.randn(1000)
    cache = Cache(tmp_path / "cache", 10**6)
    cache.put("part", whole[:10])
    assert cache.get("part").untyped_storage().nbytes() == 40
    whole[0] = 9.0
    assert cache.get("part")[0] != 9.0


@pytest.mark.parametrize("bound", [0, 10**6])
def test_durable_files_outlive_the_cache(tmp_path, bound):
    path, tensor = tmp_path / "state.safetensors", torch.randn(5)
    cache = Cache(tmp_path / "cache", bound)
    cache.put("x", tensor, path)
    assert torch.equal(cache.get("x"), tensor)
    cache.drop("x")
    later = Cache(tmp_path / "cache", bound)
    later.open("x", path)
    assert torch.equal(later.get("x"), tensor)


@pytest.mark.parametrize("bound", [0, 10**6])
def test_a_call_is_kept_with_each_tensor_once(tmp_path, bound):
    cache, keys = Cache(tmp_path / "cache", bound), {}
    mask, cos, sin = torch.ones(2, 3), torch.randn(3, 4), torch.randn(3, 4)
    given = [[mask, None], {"position_embeddings": (cos, sin), "flag": True, "nested": {"mask": mask}}]
    calls = [StoredCall(cache, given, keys, f"call-{number}") for number in range(2)]
    assert len(keys) == 3
    for call in calls:
        args, kwargs = call()
        assert torch.equal(args[0], mask) and args[1] is None and kwargs["flag"] is True
        assert isinstance(kwargs["position_embeddings"], tuple)
        assert torch.equal(kwargs["position_embeddings"][1], sin) and torch.equal(kwargs["nested"]["mask"], mask)
