"""Mutated model folders, by fixed seeds, in a process with limited memory: no crash, no hang, one line each.

QUANTAILOR_FUZZ=500 is the whole run; a tenth of it is what every commit pays for. GGUF has its own (test_gguf_reader).
"""

import json
import os
import subprocess
import sys

import pytest

from tests.formats.foreign_making import ALL

COUNT = int(os.environ.get("QUANTAILOR_FUZZ", "50"))
OURS = ("own", "ours in compressed-tensors")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory, tiny_lm) -> dict:
    """One process for all kinds: its imports cost more than its work."""
    kinds = [*((kind, True) for kind in (*ALL, *OURS)), ("own", False)]
    job = {"folder": str(tmp_path_factory.mktemp("fuzz")), "tokenizer": str(tiny_lm), "kinds": kinds, "count": COUNT}
    run = subprocess.run(
        [sys.executable, "-m", "tests.formats.foreign_fuzzing"], input=json.dumps(job), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    print(json.dumps(result))
    assert result["grown_mb"] < 400
    return result["kinds"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*ALL, *OURS, "own, unverified"])
def test_every_file_is_refused_in_one_line_or_read(fuzzed, kind):
    """Where only the header of the weights was changed and the folder is taken, its tensors are the original's."""
    found = fuzzed[kind]
    assert found["files"] == COUNT and found["wrong"] == []
    assert found["slowest_s"] < 5 and found["refused"] >= COUNT // 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS)
def test_of_our_own_folders_every_change_is_found_by_the_manifest(fuzzed, kind):
    """But for one of the manifest's own notes, which changes nothing that is loaded."""
    found = fuzzed[kind]
    assert found["refused"] + found["same"] == COUNT and found["same"] <= COUNT // 20 + 1
    assert found["payload"] >= COUNT // 20
