"""Small texts, small models and folders made of them, for the tests of whatever is saved and read again."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from quantailor import api
from quantailor.recipe import Keep, Rule
from quantailor.spec import Scheme
from quantailor.store.manifest import write_manifest

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog", "who", "was", "very", "happy", "to", "see"]
GOOD, BAD = ["good", "fine", "nice", "warm"], ["bad", "poor", "cold", "grim"]


def texts(count: int, seed: int, num_words: int = 60) -> list[str]:
    """Documents that differ."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(num_words)) for _ in range(count)]


def records(count: int, seed: int, names: Sequence[Any] = (0, 1)) -> list[dict[str, Any]]:
    """Texts of good and of bad words, with the label that tells which."""
    draw = random.Random(seed)
    kinds = [draw.randrange(2) for _ in range(count)]
    return [
        {"text": " ".join(draw.choice((GOOD, BAD)[kind]) for _ in range(draw.randint(2, 6))), "label": names[kind]}
        for kind in kinds
    ]


def write_corpus(folder: Path) -> Path:
    """train.txt, valid.txt, classes.jsonl and valid.jsonl in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n<|endoftext|>\n".join(texts(40, seed=1)))
    (folder / "valid.txt").write_text("\n<|endoftext|>\n".join(texts(25, seed=2)))
    write_records(folder / "classes.jsonl", records(60, seed=3))
    write_records(folder / "valid.jsonl", records(40, seed=4))
    return folder


def write_records(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rule(pattern: str, action: str) -> Rule:
    return Rule(Keep("asked for") if action == "keep" else Scheme.parse(action), pattern=pattern)


def quantized(
    model: api.Model, scheme: str, rules: Sequence[Rule] = (), *, ragged: bool = True, method: str = "gptq"
) -> api.Model:
    """The simulated model, calibrated on a little text of the right kind."""
    data = texts(12, seed=5) if model.task == "lm" else records(24, seed=5)
    return api.quantize(model, scheme, data=data, samples=8, context=64, rules=rules, ragged=ragged, method=method)


def saved(model: api.Model, out: Path, **options: Any) -> Path:
    return api.save(model, out, **options)


def trained(folder: Path, out: Path) -> Path:
    """The model of `folder` taught the words of `texts` in a second, so that few bits cost it something.

    Perplexity 3.8; w8a8 loses nothing, w2a16-g32 some 3 %, w1.58a8 doubles it.
    """
    settings = api.Settings(steps=60, batch_size=16, evaluations=1, learning_rate=3e-3)
    model = api.train(
        folder, texts(120, seed=11), scheme="float", eval_data=texts(10, seed=12), settings=settings, context=48
    )
    return api.save(model, out)


def bytes_of(folder: Path) -> dict[str, str]:
    """Name -> sha256 of everything below `folder`, hidden or not."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights_in(folder: Path) -> Path:
    """The one weight file of a saved folder."""
    (path,) = (p for p in folder.glob("*.safetensors") if p.name != "parity.safetensors")
    return path


def edited(
    source: Path,
    out: Path,
    *,
    tensors: Callable[[dict[str, Any]], Any] | None = None,
    probe: Callable[[dict[str, Any]], Any] | None = None,
    receipt: Callable[[dict[str, Any]], Any] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
    manifest: bool = True,
) -> Path:
    """A copy of `source` with parts of it changed in place; `manifest` makes the hashes agree again."""
    shutil.copytree(source, out)
    for change, path in ((tensors, weights_in(out)), (probe, out / "parity.safetensors")):
        if change is not None:
            held = load_file(path)
            change(held)
            save_file(held, path, metadata={"format": "pt"})
    for change, path in ((receipt, out / "quantailor.json"), (config, out / "config.json")):
        if change is not None:
            value = json.loads(path.read_text())
            change(value)
            path.write_text(json.dumps(value))
    if manifest:
        (out / "MANIFEST.json").unlink()
        write_manifest(out, kind="quantized model", details={})
    return out


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    """An edit: set what `path` leads to."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[Any], None]:
    """An edit: remove what `path` leads to."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change
