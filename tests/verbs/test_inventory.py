"""Points from the recipe to the saved folder: inventory, save, load, check, training, exports."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantailor as qt
import quantailor.hf
from quantailor.errors import QuantailorError, UntrustedInput, UsageError
from quantailor.formats.folder import read_folder
from quantailor.models.points import points_of
from quantailor.points import Points
from tests.formats.making import edited, put, records, texts

POINTS = {
    "scores": "a8",
    "norm": "a8-static",
    "gelu": "a8-learned",
    "residual": "a8-learned",
    "embedding": "a8",
    "output": "a8-static",
}


def quantized(folder, points, scheme="w8a8", **options):
    data = records(24, seed=5) if "bert" in str(folder) else texts(12, seed=5)
    return qt.quantize(folder, scheme, data=data, samples=8, context=48, points=points, method="rtn", **options)


def test_a_bert_block_with_every_point(tiny_bert):
    report = qt.inventory(tiny_bert, "w8a8", points=dict.fromkeys(POINTS, "a8"))
    for block in (0, 1):
        found = report.counts(block)
        assert found["weight"] == 6
        assert found["output"] == 6
        assert found["scores"] == 1
        assert found["norm"] == 2
        assert found["gelu"] == 1
        assert found["residual"] == 2
        assert found["input"] == 6
        assert found["kv"] == found["embedding"] == found["probabilities"] == 0
    assert report.counts(None)["embedding"] == 1
    kept = [line for line in report.lines if line.spec is None]
    assert kept
    assert all(line.reason for line in kept)
    document = json.loads(json.dumps(report.to_json()))
    assert document["blocks"][0] == {"blocks": [0, 1], "type": "BertLayer", "quantized": report.counts(0)}
    assert len(document["lines"]) == len(report.lines)
    for words in ("6 weights", "6 linear outputs", "1 score ", "2 norms", "1 GELU ", "2 residual adds"):
        assert words in str(report)


def test_it_tells_of_a_folder_what_was_done_and_refuses_a_second_recipe(tiny_bert, tmp_path):
    qt.save(quantized(tiny_bert, {"norm": "a8"}), tmp_path / "out")
    report = qt.inventory(tmp_path / "out")
    assert (report.scheme, report.points) == ("w8a8", "norm=a8")
    assert report.counts(0)["norm"] == 2
    with pytest.raises(UsageError, match="quantized already"):
        qt.inventory(tmp_path / "out", "w8a8")
    with pytest.raises(UsageError, match="name the scheme"):
        qt.inventory(tiny_bert)


def test_a_bare_encoder_is_looked_at_with_a_head(minilm):
    assert qt.inventory(minilm, "w8a8", points={"gelu": "a8"}).counts(5)["gelu"] == 1


@pytest.fixture(scope="module")
def folder(tiny_lm, tmp_path_factory):
    """A saved Llama with every point, and the simulated model's logits on some tokens."""
    model = quantized(tiny_lm, {**POINTS, "kv": "a8-static"})
    out = qt.save(model, tmp_path_factory.mktemp("points") / "out")
    ids = torch.arange(3, 33).reshape(2, 15)
    with torch.no_grad():
        return out, ids, model.model(ids).logits


def test_saved_is_simulated_and_reads_back(folder):
    out, ids, expected = folder
    parity = qt.check(out)
    assert parity.equal
    assert parity.max_logit_difference == 0.0
    assert (parity.layers, parity.points) == (14, 2 * (1 + 2 + 2 + 1 + 2) + 1)
    loaded = qt.load(out)
    assert loaded.is_packed
    assert loaded.state.inventory.points
    stock = AutoModelForCausalLM.from_pretrained(out)
    for model in (loaded.model, stock):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
    assert json.loads((out / "quantailor.json").read_text())["format"] == "quantailor"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["version"] == 2
    again = qt.save(loaded, out.parent / "again")
    assert qt.check(again).equal


def test_a_wrong_scale_does_not_pass(folder, tmp_path):
    out, _, _ = folder
    name = "model.layers.1.input_layernorm.output_point.scale"
    bad = edited(out, tmp_path / "bad", tensors=lambda held: held[name].mul_(1.01))
    parity = qt.check(bad)
    assert not parity.equal
    assert parity.differing == {name.removesuffix(".scale"): "scale"}


def test_damaged_points_are_refused(folder, tmp_path):
    out, _, _ = folder
    cases = {
        "negative": {"tensors": lambda held: held["model.layers.0.self_attn.key_point.scale"].neg_()},
        "lost": {"tensors": lambda held: held.pop("model.layers.0.self_attn.key_point.scale")},
        "fewer": {"config": lambda c: c["quantization_config"]["points"].pop()},
        "elsewhere": {"config": put("model.layers.7.score_point", "quantization_config", "points", 0, "name")},
        "no slot": {"config": put("model.layers.0.self_attn.other", "quantization_config", "points", 0, "name")},
        "bits": {"receipt": lambda r: r["points"][0]["spec"].update(extra=1)},
        "later": {"config": put(3, "quantization_config", "version")},
    }  # fmt: skip
    for name, change in cases.items():
        with pytest.raises(UntrustedInput):
            read_folder(edited(out, tmp_path / name, **change))


def test_training_moves_learned_scales_and_leaves_static_ones(tiny_bert, tmp_path):
    start = quantized(tiny_bert, POINTS)
    before = {name: point.scale.clone() for name, point in points_of(start.model) if not point.spec.dynamic}
    settings = qt.Settings(steps=8, batch_size=8, evaluations=2, scale_learning_rate=0.01, learning_rate=1e-3)
    data = records(8, seed=5)  # learned by heart, so that it improves on any processor
    trained = qt.train(start, data, eval_data=data, teacher=None, settings=settings)
    points = dict(points_of(trained.model))
    assert trained.training.improved
    for name, scale in before.items():
        assert torch.equal(points[name].scale, scale) != points[name].point.learned, name
    outputs = [m.output_quantizer for m in trained.model.modules() if getattr(m, "output_quantizer", None) is not None]
    assert outputs
    assert not any(q.log_scale.requires_grad for q in outputs)
    assert qt.check(qt.save(trained, tmp_path / "out")).equal
    # and from the folder on: the packed points become ones that train
    more = qt.train(tmp_path / "out", data, teacher=None, settings=qt.Settings(steps=2, batch_size=8))
    assert {p.point.learned for _, p in points_of(more.model) if not p.spec.dynamic} == {True, False}
    with pytest.raises(UsageError, match="learn by LSQ"):
        qt.train(start, data, teacher=None, settings=qt.Settings(steps=2, gradient="ste"))


def test_a_checkpointed_step_has_the_same_gradients(tiny_lm):
    """Recomputing a block in backward goes through its points again."""
    model = quantized(tiny_lm, {**POINTS, "kv": "a8"}).model.train()
    ids = torch.arange(3, 33).reshape(2, 15)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("residual_points" in name for name in found[0])
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_what_points_cannot_go_with(tiny_bert, folder, tmp_path):
    out, _, _ = folder
    with pytest.raises(UsageError, match="quantizes weights"):
        qt.quantize(tiny_bert, "float", points={"norm": "a8"})
    with pytest.raises(UsageError, match="quantizes weights"):
        qt.train(tiny_bert, records(24, seed=1), scheme="float", points={"norm": "a8"})
    with pytest.raises(UsageError, match="quantized point inside a block"):
        qt.save(quantized(tiny_bert, {"norm": "a8"}), tmp_path / "ct", format="compressed-tensors")
    with pytest.raises(UsageError, match="GGUF has no place for"):
        qt.export(out, tmp_path / "export", ["gguf"])


def test_a_scale_that_was_never_calibrated_is_not_saved(tiny_bert, tmp_path):
    model = quantized(tiny_bert, {"norm": "a8-static"})
    points_of(model.model)[0][1].calibrated.fill_(False)
    with pytest.raises(QuantailorError, match="never calibrated"):
        qt.save(model, tmp_path / "out")


def test_a_folder_with_points_is_quantized_in_memory(tiny_bert, tmp_path):
    done = qt.quantize_folder(tiny_bert, "w8a8", tmp_path / "out", points={"scores": "a8"}, method="rtn")
    assert "watching" in done.in_memory_because
    assert qt.check(done.out).points == 2


def test_points_objects_are_offered():
    assert qt.Points is Points


def test_fit_takes_points(tiny_bert, tmp_path):
    goal = qt.Goal(tolerance=0.9, minutes=2.0, calibration=8, methods=("rtn",))
    data, held_out = records(24, seed=5), records(40, seed=6)
    result = qt.fit(
        tiny_bert, data, "w8a8", tmp_path / "out", eval_data=held_out, goal=goal, points={"norm": "a8-static"}
    )
    assert result.verdict == "ptq"
    assert result.data["check"]["points"] == 4
    assert qt.inventory(tmp_path / "out").counts(1)["norm"] == 2
