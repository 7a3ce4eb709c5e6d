"""A process that reads many mutated model folders: JSON job on stdin, JSON result on stdout. See test_fuzzing.py.

Of a folder's files one is changed at a time: the header of its weights, its config.json (a receipt, a manifest), or the
weights' bytes behind the header. Memory is limited; five seconds of CPU on one file end the process.
"""

import json
import random
import resource
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import torch

from quantailor import api
from quantailor.errors import UntrustedInput, UsageError
from quantailor.formats import folder as folders
from quantailor.formats import foreign
from quantailor.models.loading import load_tokenizer
from tests.formats import foreign_making as make

EXTREME = (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 303}
TEXTS = (b"null", b"[]", b"{}", b"-1", b"1e400", b'"x"', b"true", b"99999999999", b'"../../x"')


def mutated(raw: bytes, draw: random.Random, low: int, high: int) -> bytes:
    """One to three changes to raw[low:high]."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(low, max(low + 1, min(high, len(raw)) - 8))
        match draw.randrange(7):
            case 0:
                raw = raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :]
            case 1:
                raw = raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :]
            case 2:
                raw = raw[:at] + struct.pack("<Q", draw.choice(EXTREME)) + raw[at + 8 :]
            case 3:
                raw = raw[:at] + raw[at + draw.randint(1, 16) :]
            case 4:
                raw = raw[:at] + raw[at : at + draw.randint(1, 64)] + raw[at:]
            case 5:
                raw = raw[: draw.randrange(at, len(raw) + 1)]
            case _:
                digits = [i for i in range(low, min(high, len(raw))) if raw[i : i + 1].isdigit()] or [at]
                at = draw.choice(digits)
                raw = raw[:at] + draw.choice((*TEXTS, b"7", b"00")) + raw[at + 1 :]
    return raw


def changed(files: dict[str, bytes], weights: str, draw: random.Random) -> tuple[str, str, bytes]:
    """(what was changed, file, its new bytes)."""
    raw = files[weights]
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    texts = [name for name in files if name.endswith(".json") and not name.startswith("tokenizer")]
    part = draw.choice(("header", "header", "text", "text", "payload"))
    if part == "text":
        name = draw.choice(texts)
        return part, name, mutated(files[name], draw, 0, len(files[name]))
    if part == "header":
        return part, weights, mutated(raw, draw, 0, header)
    at = draw.randrange(header, len(raw))
    return part, weights, raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :]


def source(kind: str, tokenizer: Path, out: Path) -> Path:
    """The sound folder of one kind of reader."""
    if kind in make.ALL:
        return make.write(out, tokenizer, *make.ALL[kind](), **SMALL)[0]
    their = make.write(out.with_name("their"), tokenizer, *make.compressed(), **SMALL)[0]
    return api.save(api.load(their), out, format="quantailor" if kind == "own" else "compressed-tensors")


def read(kind: str, folder: Path, verify: bool) -> dict[str, torch.Tensor]:
    model = foreign.read_foreign(folder).model if kind in make.ALL else None
    model = model if model is not None else folders.read_folder(folder, verify_hashes=verify).model
    return dict(model.state_dict())


def fuzz(root: Path, tokenizer_folder: Path, kind: str, verify: bool, count: int) -> dict:
    sound = source(kind, tokenizer_folder, root / "sound")
    files = {path.name: path.read_bytes() for path in sound.iterdir()}
    weights = next(name for name in files if name.endswith(".safetensors") and name != "parity.safetensors")
    original = read(kind, sound, True)
    folder = root / "mutated"
    shutil.copytree(sound, folder)
    outcome: dict = {"files": 0, "refused": 0, "taken": 0, "same": 0, "payload": 0, "wrong": [], "slowest_s": 0.0}
    for seed in range(count):
        part, name, raw = changed(files, weights, random.Random(f"{kind} {seed}"))
        if raw == files[name]:
            raw += b"}"
        outcome["files"] += 1
        outcome["payload"] += part == "payload"
        (folder / name).write_bytes(raw)
        signal.setitimer(signal.ITIMER_PROF, 5)
        start = time.process_time()
        try:
            found = read(kind, folder, verify)
            outcome["taken"] += 1
            same = found.keys() == original.keys() and all(torch.equal(found[k], original[k]) for k in found)
            outcome["same"] += same
            if part == "header" and not same:
                outcome["wrong"].append(f"seed {seed}: {name} taken with other tensors")
            if kind not in make.ALL and verify and not (name == "MANIFEST.json" and same):  # which tells of the others
                outcome["wrong"].append(f"seed {seed}: {name} ({part}) is not as it was saved, and was taken")
        except (UntrustedInput, UsageError) as error:
            outcome["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 800 or str(folder) not in str(error):
                outcome["wrong"].append(f"seed {seed}: {error!r}")
        except Exception as error:
            outcome["wrong"].append(f"seed {seed}: {name} ({part}): {type(error).__name__}: {error}"[:400])
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome["slowest_s"] = max(outcome["slowest_s"], time.process_time() - start)
        (folder / name).write_bytes(files[name])
    return outcome


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(Path(job["tokenizer"]))  # the files of a tokenizer stay as they are
    foreign.load_tokenizer = lambda folder: tokenizer  # type: ignore[assignment]
    folders.load_reader = lambda folder, task: tokenizer  # type: ignore[assignment]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a hang is a death
    result = {}
    for number, (kind, verify) in enumerate(job["kinds"]):
        root = Path(job["folder"]) / str(number)
        root.mkdir()
        result[f"{kind}{'' if verify else ', unverified'}"] = fuzz(
            root, Path(job["tokenizer"]), kind, verify, job["count"]
        )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"kinds": result, "grown_mb": grown}))


if __name__ == "__main__":
    main()
