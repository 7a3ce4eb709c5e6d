"""Models, data and earlier results for the commands."""

import os
import shutil
from pathlib import Path

import pytest

from quantailor import api
from tests.formats.making import quantized, saved, trained, write_corpus


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Only a power failure can tell."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """train.txt and valid.txt, classes.jsonl and valid.jsonl."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def w8a8(tmp_path_factory, tiny_lm) -> Path:
    """The tiny Llama at w8a8, in compressed-tensors layout."""
    return saved(quantized(api.load(tiny_lm), "w8a8"), tmp_path_factory.mktemp("saved") / "w8a8")


@pytest.fixture(scope="session")
def w4(tmp_path_factory, tiny_lm) -> Path:
    """The tiny Llama at w4a16-g32, in our own layout."""
    return saved(quantized(api.load(tiny_lm), "w4a16-g32"), tmp_path_factory.mktemp("saved") / "w4")


@pytest.fixture(scope="session")
def encoder(tiny_bert, tmp_path_factory) -> Path:
    """A BERT without a head."""
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("encoder")
    BertForSequenceClassification.from_pretrained(tiny_bert).bert.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert / name, folder / name)
    return folder


@pytest.fixture
def earlier(tmp_path, w4) -> Path:
    """The result of an earlier run, in a folder of its own."""
    (tmp_path / "results").mkdir()
    return Path(shutil.copytree(w4, tmp_path / "results" / "earlier"))


@pytest.fixture(scope="session")
def trained_lm(tmp_path_factory, tiny_lm) -> Path:
    """The tiny Llama, taught the words of the corpus: few bits cost it something."""
    return trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model")
