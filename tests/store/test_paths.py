"""Which names and links may be opened."""

import os

import pytest

from quantailor.errors import UntrustedInput
from quantailor.store.paths import check_file, check_folder, hub_blobs, is_plain_name, open_regular, shown, walk_files


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "模型.json", "a b", "~", "a.."]
)
def test_plain_names(name):
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "../a", "/a", "a/", "a/b", "a\\b", "a\0", "a\n", "a\u202eb", "a\ud800", "..\\a"]
)
def test_names_that_lead_elsewhere_or_lie_about_it(name):
    assert not is_plain_name(name)


def test_shown_is_one_short_printable_line():
    for text in ("a\nb", "\x1b[31mred", "\u202egnp.exe", "x" * 10**6, "\ud800", "é", "中"):
        assert shown(text).isprintable() and len(shown(text)) < 1000
    assert shown("é 中") == "é 中"


def test_walk_is_sorted_skips_what_tools_hide(tmp_path):
    deep = tmp_path / "deep"
    deep.mkdir()
    for name in ("b", "a", ".gitattributes"):
        (tmp_path / name).write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("")
    (tmp_path / "link").symlink_to(deep)
    for _ in range(300):
        deep = deep / "d"
        os.mkdir(deep)
    assert [path.name for path in walk_files(tmp_path)] == ["a", "b", "link"]


def test_a_folder_must_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("none", r"none cannot be read \(No such file or directory\); give the path .*hf download"),
        ("file", r"file is a file, not a folder; give the folder it lies in$"),
        ("empty", r"empty is empty; give the folder that holds config.json and \*.safetensors$"),
        ("x" * 300, r"cannot be read \(File name too long\)"),
    ]:
        with pytest.raises(UntrustedInput, match=message) as error:
            check_folder(tmp_path / name)
        assert error.value.exit_code == 3


def test_links_lead_into_the_cache_or_are_asked_for(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (blobs / "abc", tmp_path / "secret"):
        path.write_text("text")
    (snapshot / "good").symlink_to("../../blobs/abc")
    (snapshot / "bad").symlink_to("../../../secret")
    (snapshot / "twice").symlink_to("../../blobs/out")
    (blobs / "out").symlink_to(tmp_path / "secret")
    (snapshot / "gone").symlink_to("../../blobs/gone")
    assert hub_blobs(snapshot) == blobs and hub_blobs(tmp_path) is None
    check_file(snapshot / "good", blobs=blobs)
    for name in ("bad", "twice"):
        with pytest.raises(
            UntrustedInput, match=rf"{name} is a symbolic link to .*/secret, outside.*; put the file itself"
        ):
            check_file(snapshot / name, blobs=blobs)
        check_file(snapshot / name, follow_symlinks=True)
    with pytest.raises(UntrustedInput, match=r"good is a symbolic link to .*pass --follow-symlinks if you trust it"):
        check_file(snapshot / "good")
    with pytest.raises(UntrustedInput, match=r"gone is missing"):
        check_file(snapshot / "gone", blobs=blobs)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_devices_and_folders_are_no_files(tmp_path, make):
    make(tmp_path / "a")
    for look in (lambda path: check_file(path, follow_symlinks=True), open_regular):
        with pytest.raises(UntrustedInput, match=r"a is not a regular file; put the file itself there, or remove it$"):
            look(tmp_path / "a")
