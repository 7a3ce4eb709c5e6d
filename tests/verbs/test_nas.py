"""`nas` on a tiny model, and from the shell."""

import json

import pytest

from quantailor import api
from quantailor.errors import UsageError
from quantailor.searching.latency import size_bytes
from quantailor.verbs.nas import NAS
from tests.cli.shell import shell
from tests.formats.making import texts, trained, write_corpus

SPACE = {"depth": (1, 2), "width": (64,), "heads": (2, 4), "ffn": (96, 172), "bits": (4, 2)}
FAST = api.Settings(steps=4, batch_size=4, evaluations=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_lm):
    return trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model")


def searched(model, out, **options):
    base = {"space": SPACE, "eval_data": texts(25, seed=2), "supernet_steps": 3, "candidates": 4, "settings": FAST}
    return api.nas(
        model, texts(60, seed=1), out=out, samples=8, context=48, **{"max_bytes": 200_000, **base, **options}
    )


def test_the_winner_is_smaller_fits_and_is_what_was_saved(folder, tmp_path):
    found = searched(folder, tmp_path / "out")
    data = json.loads((tmp_path / "out" / NAS).read_text())
    assert data == json.loads(json.dumps(found.data)) and len(data["candidates"]) == 4
    assert [c["score"] for c in data["candidates"]] == sorted(c["score"] for c in data["candidates"])
    saved = api.load(tmp_path / "out")
    config, winner = saved.model.config, data["winner"]
    assert (config.num_hidden_layers, config.num_attention_heads) == (winner["depth"], winner["heads"])
    assert (
        size_bytes(saved.model) == winner["size_bytes"] <= 200_000
        and str(saved.state.scheme) == f"w{winner['bits']}a16-g32"
    )
    again = api.evaluate(saved, texts(25, seed=2), context=48).value
    assert again == pytest.approx(data["final"]["value"], rel=1e-5) and api.check(tmp_path / "out").equal
    assert str(found.architecture) in found.text() and len(data["supernet"]["losses"]) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_bytes": 1000}, "over max_bytes=1,000"),
        ({"max_bytes": 0}, "max_bytes=0 must be above 0"),
        ({"space": {**SPACE, "width": (128,)}}, "more than the model's 64"),
        ({"space": {**SPACE, "heads": (3,)}}, "multiples of 2"),
    ],
)
def test_what_is_refused(folder, tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        searched(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_classifiers_are_refused(tiny_bert, tmp_path):
    with pytest.raises(UsageError, match="for decoders only"):
        searched(tiny_bert, tmp_path / "out")


def test_from_the_shell(folder, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    given = (
        "nas",
        folder,
        "--data",
        corpus / "train.txt",
        "--max-bytes",
        200_000,
        "--out",
        tmp_path / "out",
        "--quiet",
    )
    wrong = shell(*given, "--space", "rows=4")
    assert wrong.status == 2 and "the names are depth" in wrong.error
    assert shell(*given, "--space", "depth=two").status == 2
    few = ("--supernet-steps", 1, "--candidates", 1, "--steps", 1, "--batch-size", 2, "--samples", 4, "--context", 32)
    ran = shell(*given, *few, "--space", "depth=1", "--space", "ffn=96", "--space", "bits=4", "--json")
    assert ran.status == 0 and ran.document["winner"]["depth"] == 1
