"""The verbs, called from Python as a user would."""

import copy
import dataclasses
import json
import math
import os
import shutil

import pytest
import torch

import quantailor as qt
from quantailor import api
from quantailor.data.loading import load_examples
from quantailor.errors import QualityGateFailed, UntrustedInput, UsageError
from quantailor.store.manifest import verify
from quantailor.verbs import fitting
from tests.formats.making import bytes_of, edited, quantized, records, rule, saved, texts

Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
FAST = api.Settings(steps=4, batch_size=4, evaluations=2)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return api.load(tiny_lm)


@pytest.fixture(scope="module")
def classifier(tiny_bert):
    return api.load(tiny_bert)


@pytest.fixture(scope="module")
def encoder(tiny_bert, tmp_path_factory):
    """The folder of a BERT without a head."""
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("encoder")
    BertForSequenceClassification.from_pretrained(tiny_bert).bert.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def folder_of(lm, tmp_path_factory):
    made = {}

    def make(scheme):
        if scheme not in made:
            made[scheme] = saved(quantized(lm, scheme), tmp_path_factory.mktemp("saved") / "model")
        return made[scheme]

    return make


def state(model: api.Model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ check


def xor(name):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[7] ^= 1

    return change


def times(name, factor, index=0):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[index] *= factor

    return change


PLANTED = [
    ("w8a8", times(f"{DOWN}.weight_scale", 1.01), DOWN, "scales"),
    ("w8a8", xor(f"{DOWN}.weight"), DOWN, "integers"),
    ("w4a16-g32", times(f"{Q_PROJ}.packed.scale", 1.01), Q_PROJ, "scales"),
    ("w4a16-g32", xor(f"{DOWN}.packed.words"), DOWN, "integers"),
    ("w3a16-asym", xor(f"{DOWN}.packed.zero_point"), DOWN, "zero points"),
    ("nf4-dq", xor(f"{DOWN}.packed.scale_codes"), DOWN, "scales"),
    ("w8a8-static", times(f"{DOWN}.input_scale", 1.01), DOWN, "input scale"),
]


@pytest.mark.parametrize(("scheme", "change", "layer", "what"), PLANTED)
def test_check_finds_a_planted_error_and_names_its_layer(folder_of, tmp_path, scheme, change, layer, what):
    planted = edited(folder_of(scheme), tmp_path / "planted", tensors=change)
    parity = qt.check(planted)

    assert not parity.equal and parity.differing == {layer: what}

    with pytest.raises(UntrustedInput, match=r"has changed: its sha256 is not the one in MANIFEST\.json"):
        qt.check(edited(folder_of(scheme), tmp_path / "unsigned", tensors=change, manifest=False))


def test_check_finds_a_changed_float_tensor_by_the_logits_of_that_day(folder_of, tmp_path):
    planted = edited(folder_of("w8a8"), tmp_path / "planted", tensors=times("model.norm.weight", 3.0))
    parity = qt.check(planted)

    assert parity.differing == {} and not parity.equal and parity.max_logit_difference > parity.tolerance


def test_check_finds_logits_that_are_not_finite(folder_of, tmp_path):
    def overflow(tensors):
        tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
        tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], 3e38)

    parity = qt.check(edited(folder_of("w8a8"), tmp_path / "planted", tensors=overflow))
    assert not parity.equal and parity.max_logit_difference == math.inf


def test_check_of_every_sound_folder_is_equal(folder_of):
    for scheme in dict.fromkeys(case[0] for case in PLANTED):
        parity = qt.check(folder_of(scheme))
        assert parity.equal and parity.layers == 14 and parity.integers == 90_624, scheme


def test_check_works_without_the_probe(folder_of, tmp_path):
    shutil.copytree(folder_of("w8a8"), tmp_path / "bare")
    (tmp_path / "bare" / "parity.safetensors").unlink()

    assert qt.check(edited(tmp_path / "bare", tmp_path / "signed")).equal


# ------------------------------------------------------------------------------------------------ load, save


def test_the_package_offers_the_verbs_and_nothing_else():
    assert set(qt.__all__) >= {"fit", "quantize", "train", "eval", "check", "generate", "load", "save", "pack"}
    assert all(getattr(qt, name) is not None for name in qt.__all__)
    assert qt.eval is api.evaluate
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it offers Goal, Keep"):
        _ = qt.nothing


def test_load_tells_where_a_model_came_from(tiny_lm, lm):
    assert lm.task == "lm" and lm.state is None and not lm.is_packed
    assert lm.parent["folder"] == tiny_lm.name and len(lm.parent["hash"]) == 64


def test_a_bare_encoder_is_refused_with_the_way_out(encoder):
    with pytest.raises(
        UsageError, match=r"bare encoder without a head; fine-tune it first: quantailor train .*--scheme float"
    ):
        qt.load(encoder)


def test_save_refuses_a_place_that_is_taken(lm, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        qt.save(lm, tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds no MANIFEST\.json"):
        qt.save(lm, tmp_path / "out", overwrite=True)
    assert bytes_of(tmp_path / "out").keys() == {"mine.txt"}


def test_pack_gives_the_same_logits_and_leaves_the_simulated_model(lm):
    simulated = quantized(lm, "w4a16-g32")
    before = state(simulated)
    packed = qt.pack(simulated)

    assert packed.is_packed and not simulated.is_packed and same(before, state(simulated))
    with torch.inference_mode():
        assert torch.equal(packed.model(**simulated.probe).logits, simulated.model(**simulated.probe).logits)
    with pytest.raises(UsageError, match="the model is float; quantize it first"):
        qt.pack(lm)


# ------------------------------------------------------------------------------------------------ quantize


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_leaves_the_given_model_as_it_is(lm, method):
    before = state(lm)
    quantized(lm, "w2a16-g32", method=method)

    assert same(before, state(lm)) and lm.state is None
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


def test_quantize_without_data_is_rtn_on_what_needs_none(lm, tmp_path):
    simulated = qt.quantize(lm, "w8a8", method="rtn")
    assert "quantized without data: every input channel counted alike" in simulated.state.notes
    assert qt.check(saved(simulated, tmp_path / "out")).equal

    with pytest.raises(UsageError, match=r"gptq at w8a8 needs calibration data; give --data, or use --method rtn"):
        qt.quantize(lm, "w8a8", method="gptq")
    with pytest.raises(UsageError, match=r"smoothquant\+rtn at w8a8 needs calibration data"):
        qt.quantize(lm, "w8a8", method="smoothquant+rtn")
    assert qt.quantize(lm, "w8a8").state.method == "rtn"
    with pytest.raises(UsageError, match="rtn at w8a8-static needs calibration data"):
        qt.quantize(lm, "w8a8-static", method="rtn")


def test_quantize_draws_its_samples_by_the_seed(lm):
    def digest(seed):
        return qt.quantize(lm, "w4a16-g32", data=texts(30, 1), samples=4, context=32, seed=seed)

    first, again, other = (state(digest(seed)) for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scheme": "w4a16g32"}, r"unknown scheme 'w4a16g32'; did you mean w4a16-g32"),
        ({"scheme": "float"}, "scheme float quantizes nothing"),
        ({"scheme": "w8a8", "method": "gpqt"}, "method 'gpqt': 'gpqt' is none of rtn, gptq"),
        ({"scheme": "w8a8", "seed": -1}, "seed=-1"),
        ({"scheme": "w8a8", "seed": 2**70}, "seed="),
        ({"scheme": "w8a8", "samples": 0}, "limit=0"),
        ({"scheme": "w8a8", "context": 1}, "context=1 leaves no token"),
        ({"scheme": "w8a8", "rules": [rule("nothing.*", "keep")]}, r"a rule matches nothing: name 'nothing\.\*'"),
        ({"scheme": "w4a16-g32", "ragged": False}, "group_size=32 does not divide in_features=172"),
        (
            {"scheme": "w8a8", "rules": [rule("*.down_proj", "w4a16-g32")], "ragged": False},
            "group_size=32 does not divide",
        ),
    ],
)
def test_mistakes_in_quantize_are_usage_errors(lm, options, told):
    scheme = options.pop("scheme")
    with pytest.raises(UsageError, match=told):
        qt.quantize(lm, scheme, data=texts(4, 1), **{"samples": 4, "context": 32, **options})


def test_a_scheme_object_that_refuses_ragged_groups_is_taken_at_its_word(lm):
    from quantailor.spec import Scheme

    strict = Scheme.parse("w4a16-g32").with_ragged(False)
    with pytest.raises(UsageError, match="group_size=32 does not divide in_features=172"):
        qt.quantize(lm, strict, data=texts(4, 1), samples=4, context=32)


def test_what_is_quantized_is_not_quantized_again(folder_of, lm):
    with pytest.raises(UsageError, match="quantized already; start from its float parent"):
        qt.quantize(folder_of("w8a8"), "w4a16-g32", data=texts(4, 1))
    with pytest.raises(UsageError, match="quantized already; start from its float parent"):
        qt.quantize(quantized(lm, "w8a8"), "w4a16-g32", data=texts(4, 1))


# ------------------------------------------------------------------------------------------------ data against model


def test_a_tokenizer_of_another_model_is_refused(lm):
    small = copy.deepcopy(lm.model)
    small.resize_token_embeddings(100)
    alien = dataclasses.replace(lm, model=small)
    with pytest.raises(UntrustedInput, match=r"the tokenizer gives token \d+, and the model knows 100"):
        qt.eval(alien, texts(4, 1), context=32)


def test_data_for_another_task_is_refused(lm, classifier):
    with pytest.raises(UntrustedInput, match="needs label"):
        qt.eval(classifier, texts(4, 1))
    with pytest.raises(UsageError, match="the model has 2 classes"):
        qt.eval(classifier, [{"text": f"word {i}", "label": i % 3} for i in range(9)])


def test_a_reference_or_teacher_of_another_kind_is_refused(lm, classifier):
    small = copy.deepcopy(lm.model)
    small.resize_token_embeddings(290)
    other = dataclasses.replace(lm, model=small)
    for wrong in (classifier, other):
        with pytest.raises(UsageError, match=r"the reference for .* outputs; use a reference of its own kind"):
            qt.eval(lm, texts(4, 1), reference=wrong, context=32)
        with pytest.raises(UsageError, match="the teacher for"):
            qt.train(lm, texts(8, 1), scheme="w8a8", teacher=wrong, settings=FAST, context=32)


def test_context_is_cut_to_what_the_model_can_take(classifier, lm):
    long = [{"text": "good " * 200, "label": i % 2} for i in range(6)]
    assert qt.eval(classifier, long, context=1000).num_rows == 6
    assert qt.eval(lm, texts(20, 1), context=10_000).context == 256


def test_eval_against_a_reference_gives_kl_and_agreement(lm, folder_of):
    result = qt.eval(folder_of("w8a8"), texts(8, 1), reference=lm, context=64)

    assert 0 < result.kl < 0.1 and 0.8 < result.top1_agreement <= 1
    assert qt.eval(lm, texts(8, 1), reference=lm, context=64).kl < 1e-9


# ------------------------------------------------------------------------------------------------ generate


def test_generate_continues_the_prompt(lm, folder_of):
    assert qt.generate(lm, "the cat", max_new_tokens=3).startswith("the cat")
    assert qt.generate(folder_of("w8a8"), "the cat", max_new_tokens=3).startswith("the cat")


def test_generate_opens_a_text_as_training_does(lm):
    """With the start token: the first new token is the likeliest one after it and the prompt."""
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer("the cat", add_special_tokens=False)["input_ids"]]])
    with torch.inference_mode():
        likeliest = lm.model(input_ids=ids).logits[0, -1].argmax()
    expected = lm.tokenizer.decode([*ids[0], likeliest], skip_special_tokens=True)
    assert qt.generate(lm, "the cat", max_new_tokens=1) == expected


def test_mistakes_in_generate(lm, classifier):
    for model, prompt, count, told in (
        (classifier, "a", 3, "only a language model generates text"),
        (lm, "", 3, "the prompt has no tokens"),
        (lm, "a", 0, "max_new_tokens=0 generates nothing"),
        (lm, "a", 300, "256 positions; ask for fewer"),
        (lm, "the \udcff", 3, "not UTF-8"),
    ):
        with pytest.raises(UsageError, match=told):
            qt.generate(model, prompt, max_new_tokens=count)


# ------------------------------------------------------------------------------------------------ train


def test_train_gives_a_bare_encoder_a_head_with_the_labels_names(encoder, tmp_path):
    rows, held_out = (records(count, seed, names=("fine", "poor")) for count, seed in ((200, 1), (60, 5)))
    settings = api.Settings(steps=150, batch_size=8, evaluations=5, learning_rate=3e-3)
    trained = qt.train(encoder, rows, scheme="float", eval_data=held_out, settings=settings)

    assert trained.training.improved and trained.state is None
    assert trained.model.config.id2label == {0: "fine", 1: "poor"}
    folder = saved(trained, tmp_path / "classifier")
    verify(folder)
    loaded = qt.load(folder)
    assert loaded.model.config.id2label == {0: "fine", 1: "poor"}
    by_name = qt.eval(loaded, records(100, seed=2, names=("fine", "poor")))
    assert by_name.accuracy > 0.7 and by_name.accuracy == qt.eval(loaded, records(100, seed=2)).accuracy


def test_a_new_head_is_drawn_by_the_seed(encoder):
    def head(seed):
        settings = dataclasses.replace(FAST, steps=1, seed=seed, learning_rate=1e-9)
        return qt.train(encoder, records(40, 1), scheme="float", settings=settings).model.classifier.weight

    first, again, other = (head(seed).detach() for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-4)


def test_what_a_bare_encoder_cannot_be_trained_on(encoder):
    with pytest.raises(UsageError, match="can be given a head for classification; the data is for lm"):
        qt.train(encoder, texts(8, 1), scheme="float", settings=FAST)
    with pytest.raises(UntrustedInput, match="has the one class 'good'"):
        qt.train(encoder, [{"text": f"a {i}", "label": "good"} for i in range(20)], scheme="float", settings=FAST)


def test_records_longer_than_a_bare_encoder_are_cut(encoder):
    rows = [{"text": f"good {i} " * 60, "label": i % 2} for i in range(20)]
    settings = dataclasses.replace(FAST, steps=1)
    assert qt.train(encoder, rows, scheme="float", settings=settings, context=512).training.steps == 1


def test_train_from_float_starts_with_ptq_and_leaves_the_model(lm, tmp_path):
    before = state(lm)
    trained = qt.train(
        lm, texts(30, 1), scheme="w2a16-g32", eval_data=texts(10, 2), settings=FAST, samples=8, context=64
    )

    assert same(before, state(lm)) and all(p.requires_grad for p in lm.model.parameters())
    assert trained.training.best <= trained.training.start
    assert trained.state.method == ("qronos+qat" if trained.training.improved else "qronos")
    folder = saved(trained, tmp_path / "out")
    assert qt.check(folder).equal
    told = json.loads((folder / "quantailor.json").read_text())["details"]["training"]
    assert told["steps"] == 4 and told["curve"][0][0] == 0 and told["learning_rate"] == trained.training.learning_rate


def test_mistakes_in_train(lm, folder_of):
    for options, told in (
        ({"model": lm}, "the model is float: name a scheme"),
        ({"model": folder_of("w8a8"), "scheme": "w8a8"}, r"quantized already \(w8a8\); leave the scheme out"),
        ({"model": folder_of("w8a8")}, "teacher='self' needs the float model"),
    ):
        with pytest.raises(UsageError, match=told):
            qt.train(options.pop("model"), texts(8, 1), settings=FAST, context=32, **options)


def test_train_tells_what_data_it_held_out_and_what_is_shared(lm):
    rows = texts(30, 1)
    trained = qt.train(lm, rows, scheme="w8a8", settings=FAST, samples=4, context=32)
    assert any("rows of the training data are held out" in note for note in trained.notes)

    trained = qt.train(lm, rows, scheme="w8a8", eval_data=rows[:5], settings=FAST, samples=4, context=32)
    assert any("rows are in both the training and the evaluation data" in note for note in trained.notes)


# ------------------------------------------------------------------------------------------------ fit


GOAL = api.Goal(tolerance=0.5, minutes=5, calibration=8, short_steps=2, long_steps=4, settings=FAST)


def test_fit_writes_a_whole_folder_with_its_report(lm, tmp_path):
    out = tmp_path / "out"
    result = qt.fit(lm, texts(30, 1), "w4a16-g32", out, eval_data=texts(10, 2), goal=GOAL, context=64)

    verify(out)
    assert result.meets and result.verdict == "ptq" and result.out == out
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(json.dumps(result.to_json()))
    assert report["check"]["equal"] and qt.check(out).equal
    assert report["size_bytes"] == (out / "quantailor.safetensors").stat().st_size
    assert report["bits_per_weight"] == pytest.approx(8 * report["size_bytes"] / report["num_weights"])
    assert report["steps"][0]["name"] == "float"
    assert {e["name"] for e in report["inventory"]} == {e.name for e in qt.load(out).state.inventory}
    assert report["command"] == "quantailor.fit(...) from Python" and report["environment"]["torch"]
    assert (out / "report.md").read_text().startswith("# quantailor fit")


def test_fit_of_a_classifier(classifier, tmp_path):
    result = qt.fit(classifier, records(60, 1), "w8a8", tmp_path / "out", goal=GOAL)

    assert result.data["metric"] == "accuracy" and result.data["check"]["equal"]
    assert any("held out of the training data" in note for note in result.data["notes"])


def test_fit_that_fails_its_own_check_saves_nothing(lm, tmp_path, monkeypatch):
    sound = api.check

    def broken(path):
        return dataclasses.replace(sound(path), differing={Q_PROJ: "integers"})

    monkeypatch.setattr(fitting, "check", broken)
    with pytest.raises(QualityGateFailed, match=f"the packed model is not the simulated one \\({Q_PROJ}\\)"):
        qt.fit(lm, texts(30, 1), "w8a8", tmp_path / "out", goal=GOAL, context=64)
    assert list(tmp_path.iterdir()) == []


def test_fit_refuses_before_it_measures(lm, folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "Ladder", lambda *a: pytest.fail("refused before any work"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    for model, scheme, out, options, told in (
        (lm, "float", "out", {}, "scheme float is the control"),
        (lm, "w9a9", "out", {}, "unknown scheme 'w9a9'"),
        (folder_of("w8a8"), "w8a8", "out", {}, "quantized already"),
        (lm, "w8a8", "taken", {}, "exists"),
        (lm, "w8a8", "out", {"rules": [rule("nothing", "keep")]}, "a rule matches nothing"),
        (lm, "w4a16-g32", "out", {"ragged": False}, "does not divide"),
    ):
        with pytest.raises(UsageError, match=told):
            qt.fit(model, texts(30, 1), scheme, tmp_path / out, goal=GOAL, context=64, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance": -0.1},
        {"tolerance": 1.0},
        {"tolerance": math.nan},
        {"minutes": 0},
        {"minutes": math.inf},
        {"minutes": math.nan},
    ],
)
def test_a_goal_out_of_range_is_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        api.Goal(**options)


def test_the_command_in_the_report_can_be_pasted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/quantailor", "fit", "my model", "--rule", "*.q_proj=keep"])
    assert fitting._command() == "quantailor fit 'my model' --rule '*.q_proj=keep'"


def test_examples_can_be_given_instead_of_paths(lm, tmp_path):
    held = load_examples(texts(10, 2), lm.tokenizer, "lm", context=64)
    train = load_examples(texts(30, 1), lm.tokenizer, "lm", context=64)
    assert qt.fit(lm, train, "w8a8", tmp_path / "out", eval_data=held, goal=GOAL).meets
    assert qt.eval(tmp_path / "out", held).fingerprint == held.fingerprint
