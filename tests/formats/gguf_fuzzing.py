"""A process that reads many mutated GGUF files: JSON job on stdin, JSON result on stdout. See test_gguf_reader.py."""

import json
import random
import resource
import signal
import struct
import sys
import time
from pathlib import Path

import torch

from quantailor.errors import UntrustedInput
from quantailor.formats import gguf
from quantailor.formats.gguf_blocks import Blocks
from quantailor.formats.gguf_model import read_gguf
from quantailor.formats.gguf_reader import open_gguf
from quantailor.models.loading import load_float
from quantailor.models.prepare import pack_model, prepare
from quantailor.recipe import Recipe
from quantailor.spec import Scheme

EXTREME = (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def mutated(raw: bytes, header: int, draw: random.Random, part: str) -> bytes:
    """One to three changes to the header, or to the data behind it."""
    low, high = (0, header) if part == "header" else (header, len(raw))
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(low, max(low + 1, min(high, len(raw)) - 8))
        match draw.randrange(6):
            case 0:
                raw = raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :]
            case 1:
                raw = raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :]
            case 2:
                raw = raw[:at] + struct.pack("<Q", draw.choice(EXTREME)) + raw[at + 8 :]
            case 3:
                raw = raw[:at] + struct.pack("<I", draw.choice(EXTREME) & 0xFFFFFFFF) + raw[at + 4 :]
            case 4 if part == "header":
                raw = raw[:at] + raw[at + draw.randint(1, 16) :]
            case 5 if part == "header":
                raw = raw[:at] + raw[at : at + draw.randint(1, 64)] + raw[at:]
            case _:
                raw = raw[: draw.randrange(at, len(raw) + 1)] if draw.random() < 0.2 else raw
    return raw


def contents(path: Path) -> dict[str, list[torch.Tensor]]:
    file = open_gguf(path)
    result = {}
    for name in file.tensors:
        value = file.read(name)
        result[name] = [value.q, value.scale] if isinstance(value, Blocks) else [value]
    return result


def main() -> None:
    job = json.load(sys.stdin)
    folder = Path(job["folder"])
    torch.set_num_threads(1)
    plain = load_float(Path(job["model"]))
    prepare(plain.model, Recipe(Scheme.parse("w4a16-g32")))
    pack_model(plain.model)
    gguf.write(plain.model, folder / "sound.gguf", tokenizer=plain.tokenizer)
    original = contents(folder / "sound.gguf")
    read_gguf(folder / "sound.gguf")
    raw = (folder / "sound.gguf").read_bytes()
    header = min(info.start for info in open_gguf(folder / "sound.gguf").tensors.values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang is a death
    outcome: dict = {"files": 0, "refused": 0, "taken": 0, "unchanged": 0, "wrong": [], "slowest_s": 0.0}
    path = folder / "mutated.gguf"
    for seed in range(job["count"]):
        changed = mutated(raw, header, random.Random(f"{job['part']} {seed}"), job["part"])
        outcome["files"] += 1
        outcome["unchanged"] += changed == raw
        path.write_bytes(changed)
        signal.alarm(5)
        start = time.monotonic()
        try:
            read_gguf(path)
            outcome["taken"] += 1
            found = contents(path)
            same = found.keys() == original.keys() and all(
                torch.equal(a, b) for name in found for a, b in zip(found[name], original[name])
            )
            if job["part"] == "header" and not same:
                outcome["wrong"].append(f"seed {seed}: taken with other tensors")
        except UntrustedInput as error:
            outcome["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 700 or str(path.name) not in str(error):
                outcome["wrong"].append(f"seed {seed}: {error!r}")
        except Exception as error:
            outcome["wrong"].append(f"seed {seed}: {type(error).__name__}: {error}")
        signal.alarm(0)
        outcome["slowest_s"] = max(outcome["slowest_s"], time.monotonic() - start)
    outcome["grown_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
