"""Images in, batches out; whatever is wrong with them is named."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quantailor.data.images import load_images
from quantailor.data.splitting import overlap, split
from quantailor.errors import UntrustedInput, UsageError
from quantailor.store.processor import ImageProcessor
from tests.models.vision import squares

PLAIN = ImageProcessor()


def test_every_form_gives_the_same_rows(tmp_path):
    pixels, labels = squares(6, 0)
    records = [{"pixel_values": image, "label": int(label)} for image, label in zip(pixels, labels)]
    save_file({"pixel_values": pixels, "labels": labels}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", pixel_values=pixels.numpy(), labels=labels.numpy())
    nested = [{"pixel_values": r["pixel_values"].tolist(), "label": r["label"]} for r in records]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, nested)))
    given = [load_images(data, PLAIN, channels=3) for data in (records, tmp_path / "a.safetensors", tmp_path / "a.npz")]
    assert len({e.fingerprint for e in given}) == 1 and given[0].notes == ("bytes divided by 255",)
    batch = next(given[0].batches(4))
    assert batch["pixel_values"].shape == (4, 3, 32, 32) and torch.equal(batch["labels"], labels[:4])
    assert torch.equal(batch["pixel_values"], pixels[:4].float() / 255)
    from_text = load_images(tmp_path / "a.jsonl", PLAIN, channels=3)
    assert torch.equal(from_text.dataset[5]["pixel_values"], pixels[5].float()), "no bytes: numbers as they are"


def test_bytes_are_normalised_as_the_folder_says_and_floats_are_not(tmp_path):
    config = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "size": 7}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    processor = ImageProcessor.read(tmp_path)
    pixels, _ = squares(2, 1)
    records = [{"pixel_values": image, "label": 0} for image in pixels] + [{"pixel_values": pixels[0] + 1, "label": 1}]
    found = load_images(records, processor, channels=3).dataset[1]["pixel_values"]
    expected = (float(pixels[1, 2, 3, 4]) / 255 - 0.3) / 0.2
    assert float(found[2, 3, 4]) == pytest.approx(expected, abs=1e-6)
    floats = [{**r, "pixel_values": r["pixel_values"].float()} for r in records]
    assert torch.equal(load_images(floats, processor, channels=3).dataset[1]["pixel_values"], pixels[1].float())
    (tmp_path / "out").mkdir()
    processor.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == config


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([], "holds no images; give .safetensors or .npz"),
        ([{"text": "a", "label": 1}], "holds no images"),
        ([{"pixel_values": np.zeros((1, 4, 4)), "label": 0}], r"are \[1, 1, 4, 4\]; \[images, 3, height, width\]"),
        ([{"pixel_values": np.full((3, 4, 4), np.nan), "label": 0}], "hold NaN or Inf"),
        ([{"pixel_values": np.zeros((3, 4, n)), "label": 0} for n in (4, 5)], "are no arrays of one shape"),
        ([{"pixel_values": np.zeros((3, 4, 4)), "label": -1}], "label -1 is no class"),
    ],
)
def test_what_is_wrong_is_named(records, told):
    with pytest.raises(UntrustedInput, match=told):
        load_images(records, PLAIN, channels=3)


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no")
    save_file({"pixel_values": torch.zeros(2, 3, 4, 4)}, tmp_path / "b.safetensors")
    save_file({"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(3)}, tmp_path / "c.safetensors")
    for name, told in (
        ("a.npz", "cannot be read as"),
        ("b.safetensors", "'labels'"),
        ("c.safetensors", "one number an image"),
        ("d.npz", "does not exist"),
    ):
        with pytest.raises(UntrustedInput, match=told):
            load_images(tmp_path / name, PLAIN, channels=3)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0]}')
    with pytest.raises(UntrustedInput, match="image_std must be as many numbers, the latter above 0"):
        ImageProcessor.read(tmp_path)
    with pytest.raises(UsageError, match="limit=0 leaves no images"):
        load_images([], PLAIN, channels=3, limit=0)


def test_images_are_split_and_compared_as_records_are():
    pixels, labels = squares(20, 3)
    records = [{"pixel_values": image, "label": int(label)} for image, label in zip(pixels, labels)]
    rest, held = split(load_images(records, PLAIN, channels=3), 0.2, seed=1)
    assert (len(rest), len(held)) == (16, 4) and overlap(rest, held) == 0 and overlap(rest, rest) == 16
    assert rest.notes_on([0, 1], 2) == []
