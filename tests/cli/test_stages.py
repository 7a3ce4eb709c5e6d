"""`train` with stages, from scratch, and with what a teacher says, as a shell sees it."""

import json

from quantailor import api
from tests.cli.shell import shell

SHORT = ("--context", 32, "--samples", 4, "--batch-size", 4, "--quiet")


def test_a_ladder_from_the_shell(trained_lm, corpus, tmp_path):
    data = ("--data", corpus / "train.txt", "--eval-data", corpus / "valid.txt")
    stages = ("--stages", "4,1.58:bitnet", "--stage-steps", "2,", "--stage-rates", ",1e-3", "--steps", 3)
    ran = shell("train", trained_lm, *data, "--out", tmp_path / "out", *stages, *SHORT, "--json")
    assert ran.status == 0, ran.err
    first, second = ran.document["stages"]
    assert (first["scheme"], first["steps"]) == ("w4a16-g32", 2)
    assert (second["scheme"], second["steps"], second["learning_rate"]) == ("w1.58a16-g32", 3, 1e-3)
    receipt = json.loads((tmp_path / "out" / "quantailor.json").read_text())
    assert receipt["details"]["stages"] == ran.document["stages"]
    assert ran.document["scheme"] == "w1.58a16-g32" and api.check(tmp_path / "out").equal


def test_mistakes_are_one_line(trained_lm, corpus, tmp_path):
    rest = ("--data", corpus / "train.txt", "--out", tmp_path / "out", "--quiet")
    for options, told in (
        (("--stages", "8,4", "--scheme", "w2a16"), "stages name their schemes"),
        (("--stage-steps", "3", "--scheme", "w2a16"), "--stage-steps and --stage-rates belong to --stages"),
        (("--stages", "8,4", "--stage-steps", "3"), "has 1 places for 2 stages"),
        (("--scheme", "w2a16", "--gradient", "bitnet", "--steps", 1), "gradient='bitnet' is for weights like those of"),
        (("--scheme", "w2a16", "--teacher", "none", "--divergence", "jsd", "--steps", 1), "there is none"),
    ):
        ran = shell("train", trained_lm, *options, *rest)
        assert ran.status == 2 and told in ran.error and not (tmp_path / "out").exists()


def test_from_scratch_with_cakld_to_a_named_teacher(trained_lm, corpus, tmp_path):
    data = ("--data", corpus / "train.txt", "--eval-data", corpus / "valid.txt", "--out", tmp_path / "out")
    options = ("--from-scratch", "--teacher", trained_lm, "--divergence", "cakld", "--scheme", "w4a16-g32")
    ran = shell("train", trained_lm, *data, *options, "--steps", 2, *SHORT, "--json")
    assert ran.status == 0, ran.err
    assert any("random weights, drawn by seed 0" in n for n in ran.document["notes"])
    assert any(n.startswith("CAKLD: gamma = ") for n in ran.document["notes"])
