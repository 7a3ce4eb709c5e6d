"""The built-in text, against small standard libraries made up here and against the real one; and the shipped model."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantailor
from quantailor.data.python_docs import MIN_CHARACTERS, documents, split
from quantailor.errors import UntrustedInput

DEMO = Path(quantailor.__file__).parent / "assets" / "demo"


@pytest.fixture(scope="module")
def texts():
    return documents()


def long(name):
    """A text just long enough to be kept."""
    return name.ljust(MIN_CHARACTERS - 1, ".") + "!"


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_topics_come_first_then_docstrings_by_file_and_line(tmp_path):
    source = (
        f'"""{long("module")}"""\n'
        f'class A:\n    """{long("class")}"""\n    def f(self):\n        """{long("method")}"""\n'
        f'async def g():\n    """{long("coroutine")}\n\n        indented\n    """\n'
    )
    write(
        tmp_path,
        {
            "b.py": source,
            "a/z.py": f'"""{long("in a folder")}"""',
            "pydoc_data/topics.py": f"# made\ntopics = {{'Y': {long('topic Y')!r}, 'B': {long('topic B')!r}}}",
        },
    )
    names = ["topic Y", "topic B", "in a folder", "module", "class", "method"]
    assert documents(tmp_path) == [long(name) for name in names] + [long("coroutine") + "\n\nindented"]


def test_short_and_repeated_texts_are_dropped(tmp_path):
    short = long("short")[1:]
    write(tmp_path, {"a.py": f'"""{long("same")}"""', "b.py": f'"""  {long("same")}"""', "c.py": f'"""{short}"""'})
    assert documents(tmp_path) == [long("same")]


@pytest.mark.parametrize("folder", ["test", "a/tests", "idlelib", "site-packages/x", "lib2to3", "turtledemo"])
def test_folders_that_are_no_library_are_skipped(tmp_path, folder):
    write(tmp_path, {"a.py": f'"""{long("kept")}"""', f"{folder}/b.py": f'"""{long("skipped")}"""'})
    assert documents(tmp_path) == [long("kept")]


@pytest.mark.parametrize("damage", [b"print 'Python 2'", b"\0", b"# coding: no-such\n", b"'\xff'"])
def test_a_file_that_cannot_be_parsed_costs_only_itself(tmp_path, damage):
    write(tmp_path, {"a.py": damage, "pydoc_data/topics.py": damage, "b.py": f'"""{long("kept")}"""'})
    (tmp_path / "c.py").mkdir()  # unreadable for every user, root too
    (tmp_path / "d.py").symlink_to("nowhere")
    assert documents(tmp_path) == [long("kept")]


def test_a_python_without_sources_says_so_in_one_line(tmp_path):
    with pytest.raises(UntrustedInput, match="no Python documentation in") as raised:
        documents(tmp_path / "missing")
    assert "\n" not in str(raised.value)


def test_every_process_finds_the_same_and_runs_none_of_it(texts):
    code = (
        "import hashlib, sys\n"
        "from quantailor.data.python_docs import documents\n"
        "before = set(sys.modules)\n"
        "print(hashlib.sha256(repr(documents()).encode()).hexdigest())\n"
        "print(*set(sys.modules) - before)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    digest, imported = run.stdout.splitlines()
    assert digest == hashlib.sha256(repr(texts).encode()).hexdigest()
    assert run.stderr == ""
    assert len(imported.split()) < 50  # what ast, sysconfig and codecs need; the library has hundreds of modules
    assert not {"antigravity", "this", "turtle", "asyncio", "pydoc_data.topics"} & set(imported.split())
    assert not {"antigravity", "this"} & sys.modules.keys()


def test_split_is_a_partition_about_nine_to_one(texts):
    train, valid = split(texts)
    assert len(set(texts)) == len(texts) > 500
    assert set(train) | set(valid) == set(texts)
    assert not set(train) & set(valid)
    assert 0.85 < len(train) / len(texts) < 0.95
    assert 0.8 < sum(map(len, train)) / sum(map(len, texts)) < 0.97


def test_the_side_of_a_text_depends_on_its_first_line_alone(texts):
    edited = [f"  {line} \nChanged in version 3.99." for line in (text.partition("\n")[0] for text in texts[::3])]
    valid = {text.partition("\n")[0].strip() for text in split(texts)[1]}
    expected = [text for text in edited if text.partition("\n")[0].strip() in valid]
    assert split(edited)[1] == expected
    assert 0 < len(expected) < len(edited)


def test_the_demo_model_is_small_and_names_no_place_on_a_disk():
    files = [path for path in DEMO.iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "train_log.json", "README.md"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) < 8_000_000
    for path in files:
        assert not any(place in path.read_bytes() for place in (b"/root", b"/home", b"/tmp", b"/Users", b"/work"))


def test_the_demo_model_is_as_good_as_its_log_says(texts):
    log = json.loads((DEMO / "train_log.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO), AutoTokenizer.from_pretrained(DEMO)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    with safe_open(DEMO / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118

    ids = tokenizer("Return the größte.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Return the größte."

    stream = []
    for text in split(texts)[1]:
        stream += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    windows = torch.tensor(stream[: len(stream) // 256 * 256]).view(-1, 256)[::2]  # every second: of all kinds of text
    assert windows.numel() > 15_000
    with torch.no_grad():
        logits = torch.cat([model(input_ids=chunk[:, :-1]).logits for chunk in windows.split(16)])
    perplexity = math.exp(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
    assert perplexity == pytest.approx(log["result"]["perplexity"], rel=0.1)
    assert f"**Perplexity {log['result']['perplexity']:.2f}**" in (DEMO / "README.md").read_text()
