"""lm-evaluation-harness on packed models, with task files made on the spot."""

import json
import math

import pytest
import torch

from quantailor import api
from quantailor.errors import UntrustedInput, UsageError
from tests.cli.shell import shell
from tests.formats.making import write_corpus

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def packed(tiny_lm):
    return api.pack(api.quantize(tiny_lm, "w4a16-g32", method="rtn"))


@pytest.fixture(scope="module")
def folder(packed, tmp_path_factory):
    return api.save(packed, tmp_path_factory.mktemp("harness") / "w4")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    write_corpus(corpus := tmp_path_factory.mktemp("corpus"))
    return corpus / "valid.txt"


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """A task of choices and one of whole texts, with their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{n} cats and", "choices": [" a dog", " the bird", " x"], "gold": n % 3} for n in range(9)]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"Story {n} of cats."}) + "\n" for n in range(5)))
    for name, rest in {
        "choices": [
            "output_type: multiple_choice", 'doc_to_text: "{{question}}"', "doc_to_choice: choices",
            "doc_to_target: gold", "metric_list:", "  - metric: acc",
        ],
        "texts": [
            "output_type: loglikelihood_rolling", 'doc_to_text: ""', 'doc_to_target: "{{text}}"', "metric_list:",
            "  - metric: byte_perplexity",
        ],
    }.items():  # fmt: skip
        lines = [f"task: {name}_here", "dataset_path: json", "dataset_kwargs:", "  data_files:"]
        lines += [f"    test: {folder / name}.jsonl", "test_split: test", *rest]
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    (folder / "far.yaml").write_text(
        "task: far\ndataset_path: someone/somewhere\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    )
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Tables that `datasets` makes of files go away with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("context", [16, 100])
def test_perplexity_equals_ours_on_the_same_windows(packed, valid, context):
    ours = api.evaluate(packed, valid, context=context)
    theirs = api.evaluate_tasks(packed, ["windows"], data=valid, context=context)
    value, _ = theirs.tasks["windows"]["token_perplexity"]
    assert abs(value / ours.perplexity - 1) < 1e-6
    assert theirs.num_documents["windows"] * (context - 1) == ours.num_tokens


@torch.inference_mode()
def log_likelihood(model, tokens, first):
    """Sum of log p of tokens from `first` on, one call a token: the slow way."""
    total = 0.0
    for place in range(first, len(tokens)):
        logits = model(input_ids=torch.tensor([tokens[:place]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[tokens[place]])
    return total


def test_tasks_of_files_are_scored_as_they_say(packed, task_files, tmp_path):
    result = api.evaluate_tasks(packed, ["choices_here", "texts_here"], include_path=task_files)
    rows = [json.loads(line) for line in (task_files / "choices.jsonl").read_text().splitlines()]
    encode = lambda text: packed.tokenizer(text)["input_ids"]  # noqa: E731
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            whole, asked = encode(row["question"] + choice), encode(row["question"])
            scores.append(log_likelihood(packed.model, whole, len(asked)))
        right += scores.index(max(scores)) == row["gold"]
    assert result.tasks["choices_here"]["acc"][0] == pytest.approx(right / len(rows), abs=1e-9)
    texts = [json.loads(line)["text"] for line in (task_files / "texts.jsonl").read_text().splitlines()]
    # the harness puts its own start token before the one that the tokenizer puts, and scores that
    nats = -sum(log_likelihood(packed.model, [packed.tokenizer.bos_token_id, *encode(text)], 1) for text in texts)
    expected = math.exp(nats / sum(len(text.encode()) for text in texts))
    assert result.tasks["texts_here"]["byte_perplexity"][0] == pytest.approx(expected, rel=1e-6)


def test_the_command_prints_one_document(folder, task_files):
    ran = shell("eval", folder, "--tasks", "choices_here", "--include-path", task_files, "--limit", 3, "--json")
    assert ran.status == 0, ran.err
    told = ran.document
    assert told["metric"] == "choices_here/acc" and 0 <= told["value"] <= 1
    assert told["num_documents"] == {"choices_here": 3} and len(told["interval"]) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--tasks", "nowhere", "--include-path", "TASKS"], 2, "'nowhere' is in no task file"),
        (["--tasks", "far", "--include-path", "TASKS"], 3, "its data must lie on this machine"),
        (["--tasks", "windows"], 2, "go together"),
        (["--tasks", "choices_here", "--include-path", "TASKS/none"], 3, "is no folder"),
        (["--tasks", "choices_here", "--include-path", "TASKS", "--data", "VALID"], 2, "go together"),
        (["--tasks", "x", "--task", "lm"], 2, "goes without --task"),
        (["--include-path", "TASKS", "--data", "VALID"], 2, "is for --tasks"),
        ([], 2, "name what to measure on"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line(folder, task_files, valid, arguments, status, told):
    words = [a.replace("TASKS", str(task_files)).replace("VALID", str(valid)) for a in arguments]
    ran = shell("eval", folder, *words)
    assert ran.status == status and told in ran.error


def test_a_classifier_or_no_task_is_refused(tiny_bert, packed):
    with pytest.raises(UsageError, match="are for language models"):
        api.evaluate_tasks(tiny_bert, ["windows"], data=["x"])
    with pytest.raises(UsageError, match="name a task"):
        api.evaluate_tasks(packed, [])


def test_without_the_extra_it_says_what_to_install(packed, monkeypatch):
    monkeypatch.setattr("quantailor.verbs.harness.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'quantailor\[eval\]'"):
        api.evaluate_tasks(packed, ["windows"], data=["x"])


def test_a_task_file_that_is_damaged_is_refused(packed, tmp_path):
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\noutput_type: nonsense\n")
    with pytest.raises(UntrustedInput, match="broken does not run"):
        api.evaluate_tasks(packed, ["broken"], include_path=tmp_path)
