"""What commands print: with --json exactly one document with the keys that callers rely on, else a line for people."""

import json

import pytest

from quantailor import api, demo
from quantailor.kernels.native import library as native
from quantailor.store.manifest import verify
from tests.cli.shell import Ran, shell, untouched
from tests.formats.making import bytes_of, edited, texts

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def fit(tmp_path, trained_lm, corpus):
    """fit(...) -> what came of a fit of the trained model into `tmp_path / "out"`."""

    def run(*args) -> Ran:
        data = ("--data", corpus / "train.txt", "--eval-data", corpus / "valid.txt", "--samples", 8, "--context", 32)
        return shell("fit", trained_lm, *data, "--out", tmp_path / "out", "--steps", 8, "--batch-size", 4, *args)

    return run


# ------------------------------------------------------------------------------------------------ eval


def test_eval_of_a_language_model(tiny_lm, corpus):
    ran = shell("eval", tiny_lm, "--data", corpus / "valid.txt", "--context", 64, "--json")
    document = ran.document

    assert ran.status == 0 and document["metric"] == "perplexity"
    low, high = document["interval"]
    assert low < document["value"] < high
    assert {"num_tokens", "context", "stride", "source", "fingerprint"} <= document.keys()
    assert document["context"] == 64 and document["source"].endswith("valid.txt")


def test_eval_of_a_classifier(tiny_bert, corpus):
    document = shell("eval", tiny_bert, "--data", corpus / "valid.jsonl", "--task", "classification", "--json").document

    assert document["metric"] == "accuracy" and 0 <= document["value"] <= 1 and len(document["interval"]) == 2


def test_eval_against_a_reference(tiny_lm, w8a8, corpus):
    args = ("eval", w8a8, "--data", corpus / "valid.txt", "--reference", tiny_lm, "--context", 64)
    document = shell(*args, "--json").document
    assert 0 <= document["kl"] < 0.1 and 0.8 < document["top1_agreement"] <= 1

    ran = shell(*args, "--quiet")
    assert ran.out.startswith("perplexity ") and "KL " in ran.out and ran.err == ""


def test_eval_of_only_the_first_rows(tiny_bert, corpus):
    args = ("eval", tiny_bert, "--data", corpus / "valid.jsonl", "--json")
    assert shell(*args).document["num_rows"] == 40 and shell(*args, "--limit", 7).document["num_rows"] == 7


# ------------------------------------------------------------------------------------------------ check


def test_check_of_a_sound_folder(w8a8, w4):
    for folder in (w8a8, w4):
        with untouched(folder):
            ran = shell("check", folder, "--json")
        document = ran.document
        assert ran.status == 0 and ran.err == ""
        assert document["equal"] is True and document["layers"] == 14 and document["differing"] == []
        assert document["max_logit_difference"] == 0 and document["integers_compared"] == 90_624
        assert "14 layers, 90,624 integers: all equal" in shell("check", folder).out


def test_check_of_a_planted_error(w4, tmp_path):
    def plant(tensors):
        tensors[f"{Q_PROJ}.packed.scale"].view(-1)[0] *= 1.5

    planted = edited(w4, tmp_path / "planted", tensors=plant)
    ran = shell("check", planted, "--json")
    document = ran.document
    assert ran.status == 5 and f"packed and simulated differ, first in {Q_PROJ}" in ran.error
    assert document["equal"] is False and document["differing"] == [{"layer": Q_PROJ, "what": "scales"}]

    ran = shell("check", planted)
    assert ran.status == 5 and f"{Q_PROJ}: scales differ" in ran.out and "NOT all equal" in ran.out

    ran = shell("check", edited(w4, tmp_path / "unsigned", tensors=plant, manifest=False), "--json")
    assert ran.status == 3 and "has changed" in ran.error and ran.document["exit_code"] == 3


def test_check_where_nothing_is_finite_still_prints_json(w8a8, tmp_path):
    def overflow(tensors):
        tensors["model.norm.weight"].fill_(3e38)
        tensors["lm_head.weight"].fill_(3e38)

    ran = shell("check", edited(w8a8, tmp_path / "planted", tensors=overflow), "--json")
    assert ran.status == 5 and ran.document["equal"] is False and ran.document["max_logit_difference"] is None


# ------------------------------------------------------------------------------------------------ quantize, train


def test_quantize(tiny_lm, corpus, tmp_path):
    args = (
        "quantize",
        tiny_lm,
        "--scheme",
        "w4a16-g32",
        "--data",
        corpus / "train.txt",
        "--samples",
        8,
        "--context",
        64,
    )
    ran = shell(*args, "--out", tmp_path / "out", "--json", "--rule", "*.o_proj=keep")
    document = ran.document

    verify(tmp_path / "out")
    assert ran.status == 0 and document["out"] == str(tmp_path / "out") and document["scheme"] == "w4a16-g32"
    assert document["method"] == "qronos" and 0 < document["coverage"] < 1
    assert document["size_bytes"] == (tmp_path / "out" / "quantailor.safetensors").stat().st_size
    kept = {e["name"]: e["reason"] for e in document["inventory"] if e["scheme"] is None}
    assert kept[f"{Q_PROJ.replace('q_proj', 'o_proj')}"] == "rule: *.o_proj=keep"
    assert "2 layers have a shorter last group" in " ".join(document["notes"])
    assert "note: " in ran.err and "of all weights quantized" in ran.err

    ran = shell(*args, "--out", tmp_path / "out", "--overwrite", "--quiet")
    assert (
        ran.status == 0 and ran.err == "" and ran.out.startswith("w4a16-g32 by qronos: ") and ran.out.count("\n") == 1
    )


def test_quantize_without_data(tiny_lm, tmp_path):
    ran = shell("quantize", tiny_lm, "--scheme", "w8a8", "--method", "rtn", "--out", tmp_path / "out", "--json")
    assert ran.status == 0 and ran.document["method"] == "rtn" and api.check(tmp_path / "out").equal


def test_train(trained_lm, corpus, tmp_path):
    data = ("--data", corpus / "train.txt", "--eval-data", corpus / "valid.txt", "--context", 32, "--samples", 8)
    args = ("train", trained_lm, "--scheme", "w2a16-g32", *data, "--steps", 6, "--batch-size", 4)
    ran = shell(*args, "--out", tmp_path / "out", "--json")
    document = ran.document

    assert ran.status == 0 and document["steps"] == 6 and document["scheme"] == "w2a16-g32"
    assert document["best"] <= document["start"] and document["improved"] == (document["best_step"] > 0)
    assert api.check(tmp_path / "out").equal
    assert shell(*args, "--out", tmp_path / "again", "--quiet").status == 0
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out"), "the same seed gives the same bytes"


def test_train_of_a_bare_encoder(encoder, corpus, tmp_path):
    args = ("train", encoder, "--scheme", "float", "--data", corpus / "classes.jsonl", "--steps", 3, "--json")
    ran = shell(*args, "--out", tmp_path / "out")

    assert ran.status == 0 and ran.document["scheme"] == "float"
    assert (
        "a bare encoder: new head classifier.bias, classifier.weight starts from random weights"
        in ran.document["notes"]
    )
    assert shell("eval", tmp_path / "out", "--data", corpus / "valid.jsonl", "--json").document["metric"] == "accuracy"


def test_train_further_with_and_without_a_teacher(w4, tiny_lm, corpus, tmp_path):
    args = ("train", w4, "--data", corpus / "train.txt", "--steps", 1, "--context", 32, "--json")
    for number, teacher in enumerate(("none", tiny_lm)):
        ran = shell(*args, "--teacher", teacher, "--out", tmp_path / str(number))
        assert ran.status == 0 and ran.document["scheme"] == "w4a16-g32"
        assert api.check(tmp_path / str(number)).equal


# ------------------------------------------------------------------------------------------------ fit


def test_fit_where_ptq_is_enough(fit, tmp_path):
    ran = fit("--scheme", "w8a8", "--tolerance", "2%", "--json")
    document = ran.document

    assert ran.status == 0 and document["verdict"] == "ptq" and document["out"] == str(tmp_path / "out")
    assert [step["name"] for step in document["steps"]] == ["float", "rtn"]
    assert all({"name", "value", "reason", "seconds"} <= step.keys() for step in document["steps"])
    assert document["float"]["value"] == document["steps"][0]["value"]
    assert document["final"]["value"] == document["steps"][-1]["value"] and document["final"]["name"] == "rtn"
    assert document["size_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert document["bits_per_weight"] == pytest.approx(8 * document["size_bytes"] / document["num_weights"])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == document
    assert document["check"]["equal"] and api.check(tmp_path / "out").equal


def test_fit_where_nothing_is_enough_saves_the_best_and_says_so(fit, tmp_path):
    ran = fit("--scheme", "w1.58a8", "--tolerance", "0", "--json", "--quiet")
    document = ran.document

    assert ran.status == 4 and document["verdict"] == "infeasible"
    assert "no way that was tried stays within 0.00%" in ran.error and "the best is saved" in ran.error
    verify(tmp_path / "out")
    assert api.check(tmp_path / "out").equal
    values = {step["name"]: step["value"] for step in document["steps"]}
    assert list(values)[:4] == ["float", "rtn", "smoothquant+qronos", "smoothquant+blockap"] and list(values)[-2:] == [
        "hybrid",
        "qat",
    ]
    assert document["final"]["value"] == min(values[name] for name in list(values)[1:])


def test_fit_for_people(fit, tmp_path):
    ran = fit("--scheme", "w8a8")

    assert ran.status == 0 and ran.out.count("\n") == 1 and ran.out.startswith("ptq: perplexity ")
    assert "parity equal" in ran.out and str(tmp_path / "out" / "report.md") in ran.out
    lines = ran.err.splitlines()
    assert [line.split()[0] for line in lines] == ["float", "rtn"] and " perplexity " in lines[0]


def test_fit_again_gives_the_same_weights(fit, tmp_path):
    weights = []
    for _ in range(2):
        ran = fit("--scheme", "w1.58a8", "--tolerance", "50%", "--steps", 4, "--quiet", "--overwrite")
        assert ran.status in (0, 4)
        weights.append(bytes_of(tmp_path / "out")["quantailor.safetensors"])
    assert weights[0] == weights[1]


# ------------------------------------------------------------------------------------------------ the rest


def test_generate(tiny_lm, w8a8):
    for folder in (tiny_lm, w8a8):
        document = shell("generate", folder, "--prompt", "the cat", "--max-new-tokens", 4, "--json").document
        assert document["text"].startswith("the cat") and document["prompt"] == "the cat"
        assert shell("generate", folder, "--prompt", "the cat", "--max-new-tokens", 4).out == document["text"] + "\n"


def test_generate_says_what_it_runs_on_without_native_code(tiny_lm, tmp_path, monkeypatch):
    api.save(
        api.quantize(tiny_lm, "w4a16-g32", data=texts(8, seed=1), samples=4, context=32, method="rtn"), tmp_path / "w4"
    )
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "no C compiler was found")
    ran = shell("generate", tmp_path / "w4", "--prompt", "the cat", "--max-new-tokens", 2)
    assert ran.status == 0 and "layers of w4a16-g32 run on float blocks: no C compiler was found" in ran.err
    assert shell("generate", tmp_path / "w4", "--prompt", "the cat", "--max-new-tokens", 2, "--reference").err == ""


def test_schemes():
    document = shell("schemes", "--json").document["schemes"]
    lines = shell("schemes").out.splitlines()

    assert [line.split()[0] for line in lines[: len(document)]] == list(document)
    assert [line.split()[0] for line in lines[len(document) :]] == ["form:", "ranges", "alias:"]


def test_demo_shows_a_table_of_three_fits(monkeypatch, tmp_path):
    """A short one, on other text: the figures of the real one are not the question here."""
    monkeypatch.setattr(demo, "SCHEMES", ("w8a8",))
    monkeypatch.setattr(demo.python_docs, "documents", lambda: texts(60, seed=1))
    ran = shell("demo", "--out", tmp_path / "kept", "--json")

    assert ran.status == 0 and [row["verdict"] for row in ran.document["rows"]] == ["ptq"]
    assert api.check(tmp_path / "kept" / "w8a8").equal
    table = demo.table(ran.document).splitlines()
    assert table[0].split() == ["scheme", "float", "PTQ", "QAT", "verdict", "bytes", "bits/weight", "parity"]
    assert table[2].split()[0] == "w8a8" and table[2].split()[-1] == "equal"
