"""`quantailor convert` as a shell sees it."""

from tests.cli.shell import shell, untouched
from tests.formats import foreign_making as make


def test_one_document_or_lines(tmp_path, tiny_lm):
    theirs = make.write(tmp_path / "theirs", tiny_lm, *make.gptq(symmetric=True))[0]
    ran = shell("convert", theirs, tmp_path / "own", "--to", "own", "--json")
    assert ran.status == 0 and ran.err == ""
    assert ran.document["format"] == "own" and ran.document["integers_equal"] and ran.document["layers"] == 14

    ran = shell("convert", tmp_path / "own", tmp_path / "hf", "--to", "hf")
    lines = ran.out.splitlines()
    assert lines[0] == "hf: 14 layers, the same integers in all; logits differ by 0 of the largest"
    assert lines[-1] == f"saved to {tmp_path / 'hf'}"


def test_a_layer_that_does_not_fit_is_status_2_and_leaves_nothing(tmp_path, tiny_lm):
    theirs = make.write(tmp_path / "theirs", tiny_lm, *make.awq())[0]
    with untouched(tmp_path):
        ran = shell("convert", theirs, tmp_path / "hf", "--to", "hf", "--json")
    assert ran.status == 2 and "self_attn.q_proj: its grid" in ran.error and "--to own" in ran.error
