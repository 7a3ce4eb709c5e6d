"""A model that was never whole in memory gives the folder that `quantize` and `save` write, to the last byte."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from quantailor import api
from quantailor.errors import UsageError
from quantailor.progress import Progress, go_on, stop_with
from quantailor.ptq import stream as streams
from quantailor.store.publish import DiskFull
from tests.formats.conftest import _llama
from tests.formats.making import bytes_of, records, rule, texts

KILLS = 10


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_lm, tiny_bert, gpt2_folder, tied, half, stories260k):
    """Model folders by name; `deep` has five small blocks."""
    made = {"llama": tiny_lm, "bert": tiny_bert, "gpt2": gpt2_folder, "stories": stories260k}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5}
    made["deep"] = _llama(tmp_path_factory.mktemp("deep"), tiny_lm, **small)
    for name, model in (("tied", tied), ("half", half)):
        made[name] = api.save(model, tmp_path_factory.mktemp("float") / name)
    return made


class Lines(Progress):
    """Keeps what was said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def both_ways(folder, tmp_path, scheme, *, task="lm", cache_bytes=2**30, **options):
    data = texts(12, seed=5) if task == "lm" else records(24, seed=5)
    options = {"data": data, "samples": 20, "context": 48, **options}
    done = api.quantize_folder(folder, scheme, tmp_path / "parts", cache_bytes=cache_bytes, **options)
    if options["data"] is None:
        options = {k: v for k, v in options.items() if k not in ("samples", "context")}
    api.save(api.quantize(folder, scheme, **options), tmp_path / "whole")
    assert done.in_memory_because is None and sorted(p.name for p in tmp_path.iterdir()) == ["parts", "whole"]
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert api.check(tmp_path / "parts").equal
    return done


@pytest.mark.parametrize(
    ("model", "scheme", "method"),
    [
        ("llama", "w4a16-g32", "rtn"),
        ("llama", "w3a16-g32", "gptq"),
        ("llama", "w8a8-static", "gptq"),
        ("llama", "nf4-dq", "rtn"),
        ("bert", "w4a16-g8-asym", "gptq"),
        ("bert", "w8a8", "qronos"),
        ("gpt2", "w4a16-g32", "gptq"),
        ("gpt2", "w4a16-g32", "qronos"),
        ("tied", "w2a16-g32", "qronos"),
        ("half", "w4a16-g32", "gptq"),
        ("stories", "w4a16-g32", "qronos"),
    ],
)
def test_the_same_bytes_as_from_memory(folder_of, tmp_path, model, scheme, method):
    task = "classification" if model == "bert" else "lm"
    done = both_ways(folder_of[model], tmp_path, scheme, method=method, task=task, cache_bytes=0)
    assert {report["method"] for report in done.state.layers.values()} == {method}


@pytest.mark.parametrize(
    ("model", "rules"),
    [
        ("llama", [("lm_head", "w8a16")]),
        ("llama", [("model.embed_tokens", "w4a16-g32")]),
        ("half", [("lm_head", "w4a16-g32"), ("model.embed_tokens", "w4a16-g32")]),
        ("tied", [("lm_head", "w8a16"), ("model.embed_tokens", "w8a16")]),
        ("deep", [("model.layers.1.*", "keep"), ("model.layers.4.*", "keep"), ("*.down_proj", "w8a16:rtn")]),
        ("deep", [("model.layers.[0123].*", "keep"), ("lm_head", "w8a16"), ("model.embed_tokens", "w8a16")]),
    ],
)
def test_rules_for_what_stands_outside_and_for_whole_blocks(folder_of, tmp_path, model, rules):
    rules = [
        rule(pattern, action)
        if ":" not in action
        else api.Rule(rule(pattern, action[:5]).action, pattern, method="rtn")
        for pattern, action in rules
    ]
    both_ways(folder_of[model], tmp_path, "w4a16-g32", method="qronos", rules=rules)


def test_without_data(folder_of, tmp_path):
    done = both_ways(
        folder_of["stories"], tmp_path, "w8a8", method="rtn", data=None, rules=[rule("lm_head", "w8a8")][:0]
    )
    assert done.state.notes[-1] == "quantized without data: every input channel counted alike"
    with pytest.raises(UsageError, match="needs calibration data"):
        api.quantize_folder(folder_of["deep"], "w8a8", tmp_path / "none", method="gptq")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "whole"]


def test_the_bound_of_the_cache_changes_nothing(folder_of, tmp_path):
    options = {"method": "qronos", "data": texts(12, seed=5), "samples": 40, "context": 32}
    for bound in (0, 20_000, 2**30):
        api.quantize_folder(folder_of["llama"], "w4a16-g32", tmp_path / str(bound), cache_bytes=bound, **options)
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "20000") == bytes_of(tmp_path / str(2**30))


def test_one_block_at_a_time(folder_of, tmp_path, monkeypatch):
    """Whenever a block is solved its weights are there, and no weight outside of it is."""
    seen = []
    solve = streams._Stream.solve_block

    def watched(self, prefix, block, *args):
        weights = {n for n, p in self.model.named_parameters() if n.endswith(("weight", "bias"))}
        seen.append((prefix, weights - {n for n, p in self.model.named_parameters() if p.is_meta}))
        return solve(self, prefix, block, *args)

    monkeypatch.setattr(streams._Stream, "solve_block", watched)
    rules = [rule("lm_head", "w8a16"), rule("model.embed_tokens", "w8a16")]
    options = {"data": texts(12, seed=5), "samples": 8, "context": 32, "rules": rules}
    for name, stays in (("llama", set()), ("tied", {"model.embed_tokens.weight"})):  # that one is wanted for the head
        seen.clear()
        api.quantize_folder(folder_of[name], "w4a16-g32", tmp_path / name, **options)
        assert [prefix for prefix, _ in seen] == ["model.layers.0", "model.layers.1"]
        for prefix, there in seen:
            assert len({n for n in there if n.startswith(f"{prefix}.")}) == 9
            assert {n for n in there if not n.startswith(f"{prefix}.")} == stays


def test_models_that_cannot_be_taken_apart_are_quantized_in_memory_and_say_so(tmp_path, tiny_bert, tiny_lm):
    from transformers import AutoTokenizer

    from tests.models import zoo

    for name, make, tokenizer, task, reason in (
        ("albert", zoo.albert, tiny_bert, "classification", "do not just feed one another"),
    ):
        model = make()
        model.resize_token_embeddings(400)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / name)
        data = texts(6, seed=5) if task == "lm" else records(8, seed=5)
        out = tmp_path / f"{name}-out"
        done = api.quantize_folder(tmp_path / name, "w4a16-g8", out, data=data, samples=4, context=32)
        assert done.in_memory_because and reason in done.in_memory_because
        (note,) = [n for n in json.loads((out / "quantailor.json").read_text())["notes"] if "in memory" in n]
        assert note == f"the whole model was held in memory: {done.in_memory_because}"
        assert api.check(out).equal
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


OPTIONS = {"method": "qronos", "samples": 12, "context": 48, "cache_bytes": 10_000}


def quantize_deep(folder, out, progress=None, **changes):
    options = {**OPTIONS, "data": texts(12, seed=5), **changes}
    return api.quantize_folder(folder, "w4a16-g16", out, progress=progress, **options)


def test_kill_9_at_any_moment_then_the_same_again_gives_the_same_bytes(folder_of, tmp_path):
    folder, draw = folder_of["deep"], random.Random(0)
    start = time.monotonic()
    quantize_deep(folder, tmp_path / "uninterrupted")
    whole, seconds = bytes_of(tmp_path / "uninterrupted"), time.monotonic() - start
    went_on = 0
    for kill in range(KILLS):
        out = tmp_path / f"out-{kill}"
        pid = os.fork()
        if pid == 0:
            try:
                quantize_deep(folder, out)
            finally:
                os._exit(99)
        time.sleep(draw.uniform(0.05, 1.0) * seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if out.exists():  # it was faster than the kill
            assert bytes_of(out) == whole
            continue
        again = Lines()
        quantize_deep(folder, out, again)
        assert bytes_of(out) == whole, f"kill {kill}"
        went_on += any("going on after block" in line for line in again.lines)
    assert went_on >= KILLS // 3, "some of the kills must have come after a finished block"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


class StopAfter(Lines):
    """Raises at the n-th layer."""

    def __init__(self, layers, error):
        super().__init__()
        self.left, self.error = layers, error

    def task(self, title, total):
        return self

    def __enter__(self):
        return self.advance

    def __exit__(self, *_):
        return None

    def advance(self, steps):
        self.left -= steps
        if self.left <= 0:
            raise self.error


def stopped(folder, out, layers=20, error=None, **changes):
    with pytest.raises(BaseException, match=r"^here$"):
        quantize_deep(folder, out, StopAfter(layers, error or RuntimeError("here")), **changes)


def test_unfinished_work_is_continued_only_where_nothing_changed(folder_of, tmp_path):
    folder, out = folder_of["deep"], tmp_path / "out"
    work = tmp_path / ".out.work"
    quantize_deep(folder, tmp_path / "whole")
    for change, told in (
        ({}, "going on after block 2 of 5, which an earlier run finished"),
        ({"method": "gptq"}, "it was begun with another recipe; starting afresh"),
        ({"data": texts(12, seed=6)}, "it was begun with another data; starting afresh"),
        ({"format": "quantailor"}, "it was begun with another format; starting afresh"),
    ):
        stopped(folder, out)
        assert work.is_dir() and not out.exists()
        lines = Lines()
        quantize_deep(folder, out, lines, **change)
        assert any(told in line for line in lines.lines), lines.lines
        assert not work.exists()
        assert (bytes_of(out) == bytes_of(tmp_path / "whole")) == (not change)
        api.check(out)
        shutil.rmtree(out)


@pytest.mark.parametrize("victim", ["block-00000.safetensors", "block-00001.safetensors", "state-", "step-00001.json"])
def test_a_finished_block_is_believed_only_if_its_hash_is_right(folder_of, tmp_path, victim):
    folder, out = folder_of["deep"], tmp_path / "out"
    quantize_deep(folder, tmp_path / "whole")
    stopped(folder, out)
    path = next(p for p in sorted((tmp_path / ".out.work").iterdir()) if p.name.startswith(victim))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    lines = Lines()
    quantize_deep(folder, out, lines)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert not any("after block 2" in line for line in lines.lines), "it was damaged"


def test_a_first_signal_waits_for_the_block_and_a_second_does_not(folder_of, tmp_path):
    folder, out = folder_of["deep"], tmp_path / "out"
    for signals, finished in ((1, 3), (2, 2)):

        class Signalled(StopAfter):
            def advance(self, steps, signals=signals):
                self.left -= steps
                if self.left == 0:
                    for _ in range(signals):
                        if stop_with(KeyboardInterrupt("here")):
                            raise KeyboardInterrupt("here")

        lines = Signalled(17, None)  # in the middle of the third block of five, of seven layers each
        try:
            with pytest.raises(KeyboardInterrupt, match="here"):
                quantize_deep(folder, out, lines)
        finally:
            go_on()
        assert lines.lines[-1] == f"block {finished} of 5 is finished; the same command goes on there"
        assert not out.exists()
        shutil.rmtree(tmp_path / ".out.work")


def test_too_small_a_disk_is_said_before_any_work(folder_of, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5_000, 5_000))
    with pytest.raises(DiskFull, match=r"takes about 0\.00 GB and its disk has 0\.00 GB free"):
        quantize_deep(folder_of["deep"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_shards_and_their_index(folder_of, tmp_path, monkeypatch):
    from quantailor.formats import streamed
    from quantailor.store import tensors

    whole = quantize_deep(folder_of["deep"], tmp_path / "one").out
    monkeypatch.setattr(
        streamed, "write_model_tensors", lambda f, t: tensors.write_model_tensors(f, t, shard_bytes=20_000)
    )
    parts = quantize_deep(folder_of["deep"], tmp_path / "many").out
    own = quantize_deep(folder_of["deep"], tmp_path / "own", format="quantailor").out
    assert len(list(parts.glob("model-*-of-*.safetensors"))) > 2
    assert len(list(own.glob("quantailor-*-of-*.safetensors"))) > 2
    one, many, ours = (api.load(path).model.state_dict() for path in (whole, parts, own))
    assert one.keys() == many.keys() == ours.keys()
    assert all(torch.equal(one[name], many[name]) and torch.equal(one[name], ours[name]) for name in one)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(parts).config.quantization_config is not None
