"""A MobileNetV2 from float folder to packed integers: trained, saved, proved, read again."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quantailor import api
from quantailor.errors import UntrustedInput, UsageError
from quantailor.formats import folder as folders
from quantailor.models.prepare import FAKE_QUANT
from quantailor.store.jsonio import read_json, write_json
from tests.cli.shell import shell
from tests.models.vision import mobilenet, squares


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model, its images as files, and a W8A8 made of it by training."""
    place = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    mobilenet().save_pretrained(place / "model")
    for name, count, seed in (("train", 96, 1), ("valid", 32, 2)):
        pixels, labels = squares(count, seed)
        save_file({"pixel_values": pixels, "labels": labels}, place / f"{name}.safetensors")
    return place


SETTINGS = api.Settings(steps=4, batch_size=16, evaluations=1, kl_weight=0.0, task_weight=1.0, learning_rate=1e-3)


@pytest.fixture(scope="module")
def trained(folder):
    return api.train(
        folder / "model",
        folder / "train.safetensors",
        eval_data=folder / "valid.safetensors",
        scheme="w8a8-static",
        method="rtn",
        samples=16,
        settings=SETTINGS,
    )


def test_convolutions_are_folded_trained_saved_and_proved(folder, trained, tmp_path):
    state = trained.state
    layers = [m for m in trained.model.modules() if isinstance(m, FAKE_QUANT)]
    assert trained.training.best <= trained.training.start and len(layers) == 48
    assert len(state.folded) == 48 and "48 norms were folded into the convolutions before them" in state.notes
    assert sum(isinstance(m, nn.BatchNorm2d) for m in trained.model.modules()) == 4, "those of kept convolutions"
    depthwise = [m for m in layers if m.groups > 1]
    assert len(depthwise) == 16 and all(m.weight_quantizer.scale.shape == (m.groups, 1, 1) for m in depthwise)

    api.save(trained, tmp_path / "out")
    parity = api.check(tmp_path / "out")
    assert parity.equal and parity.layers == 48 and parity.max_logit_difference <= 1e-5
    again = api.load(tmp_path / "out")
    held = api.examples_for(again, folder / "valid.safetensors")
    assert again.task == "images" and again.state.folded == state.folded
    assert api.evaluate(again, held).log_probs.sub(api.evaluate(trained, held).log_probs).abs().max() <= 1e-4


def test_a_packed_one_trains_further(folder, trained, tmp_path):
    api.save(trained, tmp_path / "out")
    more = api.train(tmp_path / "out", folder / "train.safetensors", teacher=None, settings=SETTINGS)
    assert more.training.best <= more.training.start and more.state.folded == trained.state.folded


@pytest.mark.parametrize("name", ["config.json", "quantailor.json"])
def test_a_folder_that_disagrees_about_its_norms_is_refused(trained, tmp_path, name):
    api.save(trained, tmp_path / "out")
    path = tmp_path / "out" / name
    content = read_json(path)
    (content["quantization_config"] if name == "config.json" else content)["folded"].pop()
    write_json(path, content)
    with pytest.raises(UntrustedInput, match="tell different things of folded norms"):
        folders.read_folder(tmp_path / "out", verify_hashes=False)


def test_norms_can_be_kept_and_without_data_there_are_images_to_prove_on(folder):
    kept = api.quantize(folder / "model", "w8a16", method="rtn", fold=False)
    folded = api.quantize(folder / "model", "w8a16", method="rtn")
    assert kept.state.folded == [] and len(folded.state.folded) == 48
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        a, b = kept.model(**images).logits, folded.model(**images).logits
    assert 0 < float((a - b).norm() / a.norm()) < 0.05, "the same network, rounded a little differently"


def test_the_shell_takes_images(folder, tmp_path):
    data = folder / "train.safetensors"
    options = ("--scheme", "w8a8", "--method", "rtn", "--samples", 8, "--out", tmp_path / "out", "--quiet", "--json")
    ran = shell("quantize", folder / "model", "--data", data, *options)
    assert ran.status == 0, ran.err
    assert shell("check", tmp_path / "out", "--json").document["equal"] is True
    measured = shell("eval", tmp_path / "out", "--data", folder / "valid.safetensors", "--json").document
    assert measured["metric"] == "accuracy" and measured["num_rows"] == 32
    wrong = shell("generate", tmp_path / "out", "--prompt", "hello")
    assert wrong.status == 2


def test_text_is_no_image(folder):
    with pytest.raises(UntrustedInput, match="holds no images"):
        api.quantize(folder / "model", "w8a8", data=["some text"])
    with pytest.raises(UsageError, match="limit=0"):
        api.evaluate(folder / "model", folder / "valid.safetensors", limit=0)


def test_what_is_about_tokens_says_so(folder, trained, tmp_path):
    with pytest.raises(UsageError, match="holds images, and only rows of tokens can be looked at"):
        api.adequacy(folder / "model", folder / "train.safetensors", samples=4)
    with pytest.raises(UsageError, match="onnx: the model takes images, and the ONNX export traces tokens"):
        api.export(trained, tmp_path / "out", ("onnx",))
