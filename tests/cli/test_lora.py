"""`train --lora` and `merge` as a shell sees them."""

import json

import pytest

import quantailor as qt
from quantailor.cli.plan import adapter
from quantailor.errors import UsageError
from quantailor.evaluate.parity import digests
from tests.cli.shell import shell


def train(model, corpus, out, *more):
    few = ("--steps", 3, "--batch-size", 4, "--context", 32, "--samples", 8, "--method", "rtn", "--quiet")
    data = ("--data", corpus / "train.txt", "--eval-data", corpus / "valid.txt")
    return shell("train", model, *data, "--out", out, *few, *more)


def test_a_run_its_adapter_its_base_and_the_merge(tiny_lm, corpus, tmp_path):
    out, adapter, base = (tmp_path / n for n in ("out", "adapter", "base"))
    lora = ("--lora", 4, "--lora-alpha", 6, "--lora-targets", "q_proj,v_proj", "--learning-rate", 0.02)
    ran = train(
        tiny_lm, corpus, out, "--scheme", "w4a16-g32", *lora, "--adapter-out", adapter, "--base-out", base, "--json"
    )
    assert ran.status == 0, ran.err
    document = ran.document
    assert document["trainable"] == 2 * 4 * (64 + 64) + 2 * 4 * (64 + 32)
    assert document["adapter_out"] == str(adapter) and document["base_out"] == str(base)
    assert any("trainable of" in note and "%" in note for note in document["notes"])
    assert shell("check", out, "--json").document["equal"] and shell("check", base, "--json").document["equal"]
    merged = shell("merge", base, adapter, "--out", tmp_path / "merged", "--json")
    assert merged.status == 0 and merged.document["exact"], merged.err
    assert digests(qt.load(tmp_path / "merged").model) == digests(qt.load(out).model)

    again = train(base, corpus, tmp_path / "again", "--lora", 2, "--teacher", "none", "--adapter-out", tmp_path / "two")
    assert again.status == 0, again.err
    wrong = shell("merge", out, adapter, "--out", tmp_path / "wrong")
    assert wrong.status == 2 and "another base" in wrong.error and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lora", 0), "r=0"),
        (("--lora", 4, "--lora-dropout", 1.5), "lora_dropout=1.5"),
        (("--lora", 4, "--lora-targets", "q_prj"), "'q_prj'"),
        (("--lora", 4, "--lora-init", "pissa"), "init='pissa'"),
        (("--lora-alpha", 4), "--lora-alpha is about an adapter"),
        (("--lora", 4, "--adapter-out", "adapter"), "add --base-out"),
        (("--lora", 4, "--cage", 1), "cage"),
    ],
)
def test_a_mistake_is_one_line(tiny_lm, corpus, tmp_path, options, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = train(tiny_lm, corpus, tmp_path / "out", "--scheme", "w4a16-g32", *options)
    assert ran.status == 2 and words in ran.error and not (tmp_path / "out").exists()


def test_a_plan_counts_what_an_adapter_trains(tmp_path):
    """Llama-2-7B's config: r = 64 on q and v is 33.6 M, 0.50 %. No weight is made."""
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 32, **sizes}
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    document, line = adapter(tmp_path / "config.json", 64, "q_proj,v_proj")
    assert document == {"rank": 64, "trainable": 33_554_432, "total": 6_738_415_616 + 33_554_432, "layers": 64}
    assert "33.6 M trainable of 6.77 B parameters (0.50%)" in line
    with pytest.raises(UsageError, match="'q_prj'"):
        adapter(tmp_path / "config.json", 64, "q_prj")
