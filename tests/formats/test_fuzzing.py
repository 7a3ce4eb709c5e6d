"""Mutated model folders, by fixed seeds, in a process with limited memory: no crash, no hang, one line each.

QUANTAILOR_FUZZ=500 is the whole run; a tenth of it is what every commit pays for. GGUF has its own (test_gguf_reader).
"""

import json
import os
import subprocess
import sys

import pytest

COUNT = int(os.environ.get("QUANTAILOR_FUZZ", "50"))


def fuzzed(tmp_path, tiny_lm, kind: str, **job) -> dict:
    job = {"folder": str(tmp_path), "tokenizer": str(tiny_lm), "kind": kind, "count": COUNT, **job}
    run = subprocess.run(
        [sys.executable, "-m", "tests.formats.foreign_fuzzing"], input=json.dumps(job), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["files"] == COUNT and result["wrong"] == []
    assert result["slowest_s"] < 5 and result["grown_mb"] < 300, result
    print(kind, job.get("verify", ""), {k: v for k, v in result.items() if k != "wrong"})
    return result


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_others_folders_are_refused_in_one_line_or_read(tmp_path, tiny_lm, kind):
    """Where only the header of the weights was changed and the folder is taken, its tensors are the original's."""
    assert fuzzed(tmp_path, tiny_lm, kind)["refused"] >= COUNT // 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "ours in compressed-tensors"])
def test_of_our_own_folders_every_change_is_found_by_the_manifest(tmp_path, tiny_lm, kind):
    result = fuzzed(tmp_path, tiny_lm, kind)
    assert result["refused"] == COUNT and result["payload"] >= COUNT // 10


@pytest.mark.slow
def test_without_its_hashes_a_folder_of_ours_is_read_as_strictly(tmp_path, tiny_lm):
    assert fuzzed(tmp_path, tiny_lm, "own", verify=False)["refused"] >= COUNT // 3
