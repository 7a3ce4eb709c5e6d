import csv
import gzip
import json

import pytest

from quantailor.data import sources
from quantailor.data.sources import read_records
from quantailor.errors import UntrustedInput, UsageError


def written(folder, name, content):
    """A file of that name; text is written as UTF-8, and packed where the name asks for it."""
    raw = content if isinstance(content, bytes) else content.encode("utf-8")
    path = folder / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


ROWS = [{"text": "One, “two”.", "label": "0"}, {"text": "三\tquarters", "label": "1"}]
FORMS = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "b.jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),  # blank line, no line end at the end
    "a.json": json.dumps(ROWS, indent=1),
    "a.csv": 'text,label\n"One, “two”.",0\n三\tquarters,1\n',
    "b.csv": 'text,label\n\n"One, “two”.",0\n三\tquarters,1',
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_the_same_records(tmp_path, name, mark, line_end, packed):
    path = written(tmp_path, name + packed, mark + FORMS[name].replace("\n", line_end))
    assert read_records(path) == ROWS
    assert read_records(str(path), limit=1) == ROWS[:1]
    assert read_records(path, limit=99) == ROWS


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_documents_stand_between_separator_lines(tmp_path, mark, line_end, packed):
    text = "\nOne.\nTwo.\n<|endoftext|>\n\n \n<|endoftext|>\nThree <|endoftext|> four.\n<|endoftext|>\n"
    path = written(tmp_path, "a.txt" + packed, mark + text.replace("\n", line_end))
    assert read_records(path) == [{"text": "One.\nTwo."}, {"text": "Three <|endoftext|> four."}]
    assert read_records(path, limit=1) == [{"text": "One.\nTwo."}]


def test_text_without_separators_is_one_document(tmp_path):
    assert read_records(written(tmp_path, "a.txt", "\n = Title = \n\nMore.\n")) == [{"text": " = Title = \n\nMore."}]


def test_a_tab_separated_field_may_hold_quotes(tmp_path):
    path = written(tmp_path, "a.tsv", 'sentence\tlabel\n"open quote\t1\na, b\t0\n')
    assert read_records(path) == [{"sentence": '"open quote', "label": "1"}, {"sentence": "a, b", "label": "0"}]


def test_quoted_fields_may_be_long_and_hold_line_ends(tmp_path):
    long = "word " * 100_000
    before = csv.field_size_limit(131_072)  # Python's own
    assert read_records(written(tmp_path, "a.csv", f'text\n"{long}\nend"\n')) == [{"text": f"{long}\nend"}]
    assert csv.field_size_limit(before) == 131_072


BROKEN = {  # name: (content, what the message must say)
    "empty.txt": ("", "no records"),
    "blank.txt": (" \n<|endoftext|>\n\n", "no records"),
    "empty.jsonl": ("", "no records"),
    "empty.json": (" ", "no records"),
    "list.json": ("[]", "no records"),
    "header.csv": ("text,label\n", "no records"),
    "mark.jsonl": ("\ufeff", "no records"),
    "bad.jsonl": ('{"text": "a"}\n{"text": }\n', "bad.jsonl:2: not JSON at column 10"),
    "bad.json": ('[\n{"text": "a"},\n{"text" "b"}]', "bad.json:3: not JSON at column 9"),
    "number.jsonl": ('{"text": "a"}\n\n3\n', "number.jsonl:3: a number where an object is needed"),
    "items.json": ('[{"text": "a"}, ["b"]]', "item 2 is a list"),
    "object.json": ('{"data": []}', "an object where a list of objects is needed"),
    "deep.jsonl": ("[" * 100_000, "deep.jsonl:1: JSON that cannot be read"),
    "digits.jsonl": ("1" * 5000, "digits.jsonl:1: JSON that cannot be read"),
    "latin.txt": (b"fine\ncaf\xe9\n", "latin.txt:2: byte 4 of the line is not UTF-8"),
    "latin.jsonl": (b'{"text": "\xff"}\n', "latin.jsonl:1: byte 11"),
    "wide.csv": ("text,label\n".encode("utf-16"), "it looks like UTF-16"),
    "cut.jsonl.gz": (None, "cannot be read"),
    "plain.jsonl.gz": (None, "cannot be read"),
    "fields.csv": ("text,label\na,1\nb,c,1\n", "fields.csv:3: 3 fields under a header of 2"),
    "fewer.tsv": ("text\tlabel\na\n", "fewer.tsv:2: 1 fields under a header of 2"),
    "quote.csv": ('text,label\na,1\n"b,1\n', "quote.csv:3: not a readable table"),
    "twice.csv": ("text,text\na,b\n", "column 'text' stands there twice"),
    "table.parquet": ("PAR1", "ends in '.parquet'"),
    "noending": ("text", "ends in 'nothing'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_one_line(tmp_path, name):
    content, message = BROKEN[name]
    if content is not None:
        path = written(tmp_path, name, content)
    else:
        path = tmp_path / name
        packed = gzip.compress(json.dumps({"text": "a" * 1000}).encode())
        path.write_bytes(packed[:-12] if name.startswith("cut") else b'{"text": "not packed"}')
    with pytest.raises(UntrustedInput) as caught:
        read_records(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_and_files_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 30)
    path = written(tmp_path, "a.jsonl", '{"text": "a"}\n' * 3)
    assert len(read_records(path, limit=2)) == 2  # what is not read is not counted
    with pytest.raises(UntrustedInput, match=r"a\.jsonl:3: over 30 bytes"):
        read_records(path)


def test_a_line_of_50_mb_is_refused_as_json_and_read_as_text(tmp_path):
    line = "a" * 50_000_000
    with pytest.raises(UntrustedInput, match=r"long\.jsonl:2: the line is over 10,000,000 bytes"):
        read_records(written(tmp_path, "long.jsonl", '{"text": "a"}\n{"text": "' + line + '"}\n'))
    assert len(read_records(written(tmp_path, "long.txt", line))[0]["text"]) == len(line)


def test_missing_files_and_plain_folders_are_refused(tmp_path):
    with pytest.raises(UntrustedInput, match=r"none\.txt does not exist"):
        read_records(tmp_path / "none.txt")
    with pytest.raises(UntrustedInput, match="a folder without a saved data set"):
        read_records(tmp_path)
    with pytest.raises(UntrustedInput, match="no regular file"):
        (tmp_path / "odd.txt").symlink_to("/dev/zero")
        read_records(tmp_path / "odd.txt")


def test_options_out_of_range_are_usage_errors(tmp_path):
    path = written(tmp_path, "a.txt", "text")
    with pytest.raises(UsageError, match="limit=0"):
        read_records(path, limit=0)
    with pytest.raises(UsageError, match="split='train'"):
        read_records(path, split="train")


def test_data_set_folders(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the data extra is not installed")
    single = datasets.Dataset.from_list(ROWS)
    single.save_to_disk(tmp_path / "single")
    assert read_records(tmp_path / "single") == ROWS
    assert read_records(tmp_path / "single", limit=1) == ROWS[:1]
    with pytest.raises(UsageError, match="without splits"):
        read_records(tmp_path / "single", split="train")

    datasets.DatasetDict(train=single, test=single.select([1])).save_to_disk(tmp_path / "both")
    assert read_records(tmp_path / "both") == ROWS
    assert read_records(tmp_path / "both", split="test") == ROWS[1:]
    with pytest.raises(UsageError, match="no split 'dev'; choose one of: train, test"):
        read_records(tmp_path / "both", split="dev")
    datasets.DatasetDict(test=single).save_to_disk(tmp_path / "test_only")
    with pytest.raises(UsageError, match="no split 'train'; choose one of: test"):
        read_records(tmp_path / "test_only")

    for file in (tmp_path / "single").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UntrustedInput, match="cannot be read as a data set"):
        read_records(tmp_path / "single")
    (tmp_path / "single" / "state.json").write_text("{")
    with pytest.raises(UntrustedInput, match="cannot be read as a data set"):
        read_records(tmp_path / "single")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UsageError, match=r"pip install quantailor\[data\]"):
        read_records(tmp_path)


def test_the_real_files(data_dir):
    assert len(read_records(data_dir / "text/tinystories/valid.txt")) == 356
    assert len(read_records(data_dir / "text/tinystories/train.txt")) == 2316
    assert len(read_records(data_dir / "text/wikitext2/valid.txt")) == 1
    assert len(read_records(data_dir / "tasks/sst2/dev.jsonl")) == 872
    assert len(read_records(data_dir / "tasks/alpaca/train.json")) == 4498
