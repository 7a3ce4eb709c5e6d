"""Whatever is wrong with a model, the data or the options: one line, the right status, and no harm done.

Every command here is told to replace the result of an earlier run, which must survive.
"""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.shell import Ran, shell, untouched
from tests.formats.making import drop, put, write_records


def refused(earlier, command: str, *args: object, status: int, told: str) -> Ran:
    """The command fails with this status and one line that holds `told`; `--json` says the same on stdout."""
    with untouched(earlier):
        ran = shell(command, *args, "--out", earlier, "--overwrite", "--quiet")
        as_json = shell(command, *args, "--out", earlier, "--overwrite", "--quiet", "--json")
    assert told in ran.error and ran.out == "" and ran.status == status
    assert as_json.document == {"error": ran.error.removeprefix("quantailor: "), "exit_code": status}
    assert as_json.status == status and as_json.error == ran.error
    return ran


@pytest.fixture
def broken(tmp_path, tiny_lm):
    """broken(...) -> a copy of the tiny Llama with something done to it."""

    def make(*, weights=None, config=None, files=None):
        folder = shutil.copytree(tiny_lm, tmp_path / "broken")
        if weights is not None:
            tensors = load_file(folder / "model.safetensors")
            weights(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            value = json.loads((folder / "config.json").read_text())
            config(value)
            (folder / "config.json").write_text(json.dumps(value))
        if files is not None:
            files(folder)
        return folder

    return make


def set_value(name, value):
    return lambda tensors: tensors[name].view(-1).__setitem__(3, value)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupt_header(folder):
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[10:14] = b"\xff\xfe{{"
    path.write_bytes(raw)


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_that_leads_out(name):
    def change(folder):
        shutil.copy(folder / "model.safetensors", folder.parent / "secret.safetensors")
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))

    return change


def link_that_leads_out(folder):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "secret.safetensors")


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


UP_PROJ = "model.layers.1.mlp.up_proj.weight"
MODELS = {
    "nan": ({"weights": set_value(UP_PROJ, math.nan)}, 3, f"nan in tensor {UP_PROJ} at element 3"),
    "inf": ({"weights": set_value(UP_PROJ, math.inf)}, 3, f"inf in tensor {UP_PROJ} at element 3"),
    "truncated": ({"files": truncate}, 3, "model.safetensors"),
    "corrupt": ({"files": corrupt_header}, 3, "model.safetensors"),
    "empty weights": ({"files": write("model.safetensors", "")}, 3, "model.safetensors"),
    "pickle": ({"files": only_pickle}, 3, "pytorch_model.bin is a pickle, which can run code"),
    "index leads out": ({"files": index_that_leads_out("../secret.safetensors")}, 3, "is not the plain name"),
    "index leads far out": ({"files": index_that_leads_out("/etc/passwd")}, 3, "is not the plain name"),
    "link leads out": ({"files": link_that_leads_out}, 3, "is a symbolic link"),
    "tensor missing": ({"weights": drop("model.norm.weight")}, 3, "lacks tensor model.norm.weight"),
    "tensor too many": ({"weights": put(torch.ones(2), "more.weight")}, 3, "has tensor more.weight"),
    "wrong shape": ({"weights": put(torch.ones(3), "model.norm.weight")}, 3, "model.norm.weight is [3], and"),
    "vocabulary too large": ({"config": put(10**7, "vocab_size")}, 3, "embed_tokens.weight is [303, 64]"),
    "no config": ({"files": remove("config.json")}, 3, "has no config.json"),
    "config is no JSON": ({"files": write("config.json", "{")}, 3, "config.json is not JSON"),
    "config is a list": ({"files": write("config.json", "[]")}, 3, "config.json"),
    "code of its own": ({"config": put({"AutoConfig": "evil.Evil"}, "auto_map")}, 3, "auto_map, which runs Python"),
    "a million layers": ({"config": put(10**6, "num_hidden_layers")}, 3, "num_hidden_layers = 1000000"),
    "unknown type": ({"config": put("nothing", "model_type")}, 3, "model type `nothing`"),
    "architectures no list": ({"config": put(5, "architectures")}, 2, "without a head"),
    "no tokenizer": ({"files": remove("tokenizer.json", "tokenizer_config.json")}, 3, "has no tokenizer that loads"),
    "tokenizer damaged": ({"files": write("tokenizer.json", '{"x": 1}')}, 3, "has no tokenizer that loads"),
    "quantized by others": ({"config": put({"quant_method": "gptq"}, "quantization_config")}, 2, "already (gptq)"),
    "quantized somehow": ({"config": put(5, "quantization_config")}, 2, "is quantized already"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_is_refused(broken, corpus, earlier, name):
    damage, status, told = MODELS[name]
    folder = broken(**damage)
    refused(earlier, "quantize", folder, "--scheme", "w8a8", "--data", corpus / "train.txt", status=status, told=told)


@pytest.mark.parametrize("command", ["fit", "quantize", "train"])
def test_a_model_that_is_not_there_is_refused_by_every_command(corpus, earlier, tmp_path, command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, told in (
        ("nothing", "cannot be read (No such file"),
        ("empty", "is empty"),
        ("file", "is a file, not a folder"),
    ):
        args = (tmp_path / name, "--scheme", "w8a8", "--data", corpus / "train.txt")
        refused(earlier, command, *args, status=3, told=told)


def test_commands_that_write_nothing_refuse_alike(tmp_path, corpus):
    gone = tmp_path / "nothing"
    for args in (("eval", gone, "--data", corpus / "train.txt"), ("check", gone), ("generate", gone)):
        ran = shell(*args)
        assert ran.status == 3 and "cannot be read" in ran.error and ran.out == ""
        assert shell(*args, "--json").document["exit_code"] == 3
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_is_refused(broken, corpus, earlier):
    def cut(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:100].clone()

    folder = broken(weights=cut, config=put(100, "vocab_size"))
    args = (folder, "--scheme", "w8a8", "--data", corpus / "train.txt")
    refused(earlier, "quantize", *args, status=3, told="and the model knows 100")


@pytest.mark.parametrize("command", ["fit", "quantize"])
def test_a_quantized_model_is_not_quantized_again(corpus, earlier, w8a8, w4, command):
    for folder in (w8a8, w4):
        args = (folder, "--scheme", "w4a16-g32", "--data", corpus / "train.txt")
        refused(earlier, command, *args, status=2, told="quantized already; start from its float parent")


def test_a_bare_encoder_is_sent_to_train(corpus, earlier, encoder, tmp_path):
    told = f"fine-tune it first: quantailor train {encoder} --scheme float --data TRAIN.jsonl --out DIR"
    data = ("--data", corpus / "classes.jsonl")
    for command in ("fit", "quantize"):
        refused(earlier, command, encoder, "--scheme", "w8a8", *data, status=2, told=told)
    assert told in shell("eval", encoder, *data).error

    args = (encoder, "--scheme", "float", "--data", corpus / "train.txt")
    refused(earlier, "train", *args, status=2, told="can be given a head for classification; the data is for lm")
    one = write_records(tmp_path / "one.jsonl", [{"text": f"a {i}", "label": "good"} for i in range(20)])
    refused(earlier, "train", encoder, "--scheme", "float", "--data", one, status=3, told="has the one class 'good'")


DATA = {
    "gone": (None, "", "does not exist"),
    "empty": (".txt", "", "holds no records"),
    "blank": (".txt", " \n \n", "holds no records"),
    "header only": (".csv", "text\n", "holds no records"),
    "no such column": (".jsonl", '{"x": 1}\n', "has 'x'; task 'lm' needs text"),
    "a number for a text": (".jsonl", '{"text": "a b c"}\n{"text": 5}\n', "record 2: 'text' is int, not a string"),
    "no JSON": (".jsonl", '{"text": "a b c"}\nnonsense\n', ":2: not JSON"),
    "unknown kind": (".pdf", "x", "ends in '.pdf'"),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("command", ["fit", "quantize", "train"])
def test_bad_data_is_refused(tiny_lm, earlier, tmp_path, command, name):
    suffix, text, told = DATA[name]
    path = tmp_path / f"data{suffix or '.txt'}"
    if suffix is not None:
        path.write_text(text)
    refused(earlier, command, tiny_lm, "--scheme", "w8a8", "--data", path, status=3, told=told)


def test_data_of_another_task_is_refused(tiny_bert, earlier, corpus, tmp_path):
    args = (tiny_bert, "--scheme", "w8a8", "--data")
    refused(earlier, "quantize", *args, corpus / "train.txt", status=3, told="task 'classification' needs label")
    three = write_records(tmp_path / "three.jsonl", [{"text": f"a {i}", "label": i % 3} for i in range(30)])
    refused(earlier, "fit", *args, three, status=2, told="the model has 2 classes")


OPTIONS = {
    "unknown scheme": (("--scheme", "w4a16g32"), "unknown scheme 'w4a16g32'; did you mean w4a16-g32, w3a16-g32"),
    "nf5": (("--scheme", "nf5"), "NF4 is 4 bits by definition"),
    "no scheme": (("--scheme", ""), "unknown scheme ''; did you mean"),
    "float": (("--scheme", "float"), "scheme float"),
    "group of none": (("--scheme", "w4a16-g0"), "group size 0 must be at least 1"),
    "rule hits nothing": (("--rule", "*.nothing=w8a16"), "a rule matches nothing: name '*.nothing'; names look like"),
    "rule hits what cannot be": (("--rule", "*norm*=w8a16"), "a rule hits only what cannot be quantized"),
    "rule without action": (("--rule", "*.q_proj"), "--rule '*.q_proj' is not PATTERN=SCHEME or PATTERN=keep"),
    "rule without pattern": (("--rule", "=w8a16"), "--rule '=w8a16' is not PATTERN=SCHEME"),
    "rule of unknown scheme": (("--rule", "*.q_proj=w9"), "unknown scheme 'w9'"),
    "no ragged group": (("--scheme", "w4a16-g32", "--no-ragged"), "group_size=32 does not divide in_features=172"),
    "no ragged group by rule": (("--no-ragged", "--rule", "*.down_proj=w4a16-g64"), "group_size=64 does not divide"),
    "format unknown": (("--format", "gguf"), "format 'gguf' is none of compressed-tensors, quantailor"),
    "format too narrow": (("--scheme", "nf4", "--format", "compressed-tensors"), "compressed-tensors cannot hold this"),
    "context": (("--context", "1"), "context=1 leaves no token to predict"),
    "seed below": (("--seed", "-1"), "seed=-1 must be 0 or more"),
    "seed above": (("--seed", 2**40), "must be 0 or more and below 2^31"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("command", ["fit", "quantize"])
def test_a_bad_option_is_a_usage_error(tiny_lm, earlier, corpus, command, name):
    options, told = OPTIONS[name]
    options = options if "--scheme" in options else ("--scheme", "w8a8", *options)
    fast = ("--samples", 4, *(() if "--context" in options else ("--context", 32)))
    refused(earlier, command, tiny_lm, "--data", corpus / "train.txt", *fast, *options, status=2, told=told)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--tolerance", "much"), "'much' is no share; write 2% or 0.02"),
        (("--tolerance", "nan"), "tolerance=nan"),
        (("--tolerance", "200%"), "tolerance=2.0 must be 0 or more and below 1"),
        (("--minutes", "0"), "minutes=0.0"),
        (("--minutes", "inf"), "minutes=inf"),
        (("--minutes", "nan"), "minutes=nan"),
        (("--learning-rate", "0"), "learning_rate=0.0 must lie between 0 and 10"),
        (("--learning-rate", "nan"), "learning_rate=nan must lie between"),
    ],
)
def test_a_bad_goal_is_a_usage_error(tiny_lm, earlier, corpus, option, told):
    refused(earlier, "fit", tiny_lm, "--data", corpus / "train.txt", "--scheme", "w8a8", *option, status=2, told=told)


def test_mistakes_in_train(tiny_lm, tiny_bert, earlier, corpus, w8a8):
    data = ("--data", corpus / "train.txt", "--context", 32)
    for args, told in (
        ((tiny_lm,), "the model is float: name a scheme"),
        ((w8a8, "--scheme", "w8a8"), "leave the scheme out to train it further"),
        ((w8a8,), "teacher='self' needs the float model"),
        ((tiny_lm, "--scheme", "w8a8", "--teacher", tiny_bert), "use a teacher of its own kind"),
        ((tiny_lm, "--scheme", "w8a8", "--method", "gpqt"), "'gpqt' is none of rtn, gptq"),
        ((tiny_lm, "--scheme", "w8a8", "--scale-learning-rate", "-1"), "scale_learning_rate=-1.0 must lie between"),
    ):
        refused(earlier, "train", *args, *data, status=2, told=told)


def test_mistakes_in_eval(tiny_lm, tiny_bert, corpus):
    for args, told in (
        (
            (tiny_bert, "--data", corpus / "valid.jsonl", "--task", "ner"),
            "task 'ner' is none of lm, classification, qa",
        ),
        (
            (tiny_lm, "--data", corpus / "valid.txt", "--task", "classification"),
            "is made for lm, not for classification",
        ),
        ((tiny_lm, "--data", corpus / "valid.txt", "--reference", tiny_bert), "use a reference of its own kind"),
    ):
        ran = shell("eval", *args, "--quiet")
        assert ran.status == 2 and told in ran.error and ran.out == ""


@pytest.mark.parametrize("command", ["fit", "quantize", "train"])
def test_an_existing_place_is_left_alone(tiny_lm, corpus, tmp_path, earlier, command):
    args = (command, tiny_lm, "--scheme", "w8a8", "--data", corpus / "train.txt", "--context", 32, "--quiet")
    with untouched(earlier):
        ran = shell(*args, "--out", earlier)
        assert ran.status == 2 and "exists; choose another --out or pass --overwrite" in ran.error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with untouched(tmp_path / "mine"):
        ran = shell(*args, "--out", tmp_path / "mine", "--overwrite")
        assert ran.status == 2 and "quantailor did not write it and will not delete it" in ran.error


@pytest.mark.parametrize("command", ["fit", "quantize", "train"])
def test_the_input_is_never_the_output(tiny_lm, corpus, tmp_path, command):
    folder = shutil.copytree(tiny_lm, tmp_path / "in" / "model")
    os.symlink(folder, tmp_path / "alias")
    args = (
        command,
        folder,
        "--scheme",
        "w8a8",
        "--data",
        corpus / "train.txt",
        "--context",
        32,
        "--quiet",
        "--overwrite",
    )
    with untouched(folder):
        for out, told in (
            (folder, "is the input"),
            (tmp_path / "alias", "is the input"),
            (folder / "sub", "lies inside the input"),
            (folder.parent, "contains the input"),
        ):
            ran = shell(*args, "--out", out)
            assert ran.status == 2 and told in ran.error


def test_a_place_that_cannot_be_written(tiny_lm, corpus, tmp_path):
    (tmp_path / "file").write_text("x")
    ran = shell(
        "fit",
        tiny_lm,
        "--scheme",
        "w8a8",
        "--data",
        corpus / "train.txt",
        "--out",
        tmp_path / "file" / "out",
        "--quiet",
    )
    assert ran.status == 2 and "cannot write" in ran.error


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("nothing",), "No such command 'nothing'"),
        (("fit",), "Missing argument"),
        (("fit", "model"), "Missing option"),
        (("quantize", "model", "--bogus"), "No such option: --bogus"),
        (("quantize", "model", "--samples", "0"), "--samples"),
        (("quantize", "model", "--samples", "many"), "--samples"),
        (("fit", "model", "--steps", "1"), "--steps"),
    ],
)
def test_what_typer_refuses(args, told):
    ran = shell(*args)
    assert ran.status == 2 and told in ran.err and ran.out == "" and "Traceback" not in ran.err

    ran = shell(*args, "--json")
    assert ran.status == 2 and told in ran.document["error"] and ran.document["exit_code"] == 2
