"""Files are written whole or not at all, whatever ends the writing; and what is left behind is cleaned up."""

import os
import time

import pytest

from common import files
from common.errors import ModelError
from common.files import read_json_if_there, remove, temporary_path, write_whole, writing


class Killed(BaseException):
    """Nothing in our code catches it."""


def fill(folder, content: str, names=("a.bin", "sub/b.bin", "last.json", "end.json")):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def content_of(folder) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
            for path in folder.rglob("*") if path.is_file()}


def write_folder(path, content: str):
    with writing(path, last=("last.json", "end.json")) as temporary:
        temporary.mkdir()
        fill(temporary, content)


def test_a_new_folder_appears_in_one_rename(tmp_path, monkeypatch):
    seen = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append(sorted(os.listdir(tmp_path))), rename(a, b)))
    write_folder(tmp_path / "new", "1")
    assert seen == [[".new.writing"]] and set(content_of(tmp_path / "new").values()) == {"1"}
    assert os.listdir(tmp_path) == ["new"]


def test_a_folder_that_exists_keeps_its_other_files(tmp_path):
    fill(tmp_path / "x", "old")
    (tmp_path / "x" / "mine.txt").write_text("mine", encoding="utf-8")
    write_folder(tmp_path / "x", "new")
    found = content_of(tmp_path / "x")
    assert found.pop("mine.txt") == "mine" and set(found.values()) == {"new"} and len(found) == 4


@pytest.mark.parametrize("moved", range(4))
def test_a_kill_between_two_moves_never_leaves_a_complete_mixture(tmp_path, monkeypatch, moved):
    """last.json says that the folder is complete: it is removed first, and comes back after the others."""
    fill(tmp_path / "x", "old")
    calls, replace = iter(range(100)), os.replace

    def die(a, b):
        if next(calls) == moved:
            raise Killed
        replace(a, b)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed):
        write_folder(tmp_path / "x", "new")
    monkeypatch.undo()
    found = content_of(tmp_path / "x")
    if "last.json" in found:
        assert {found[name] for name in ("a.bin", "sub/b.bin", "last.json")} == {"new"}
    write_folder(tmp_path / "x", "newer")  # what the killed process left is no obstacle
    assert set(content_of(tmp_path / "x").values()) == {"newer"} and os.listdir(tmp_path) == ["x"]


def test_a_block_that_raises_changes_nothing(tmp_path):
    write_whole(tmp_path / "a.json", "1")
    with pytest.raises(ValueError), writing(tmp_path / "a.json") as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise ValueError
    assert content_of(tmp_path) == {"a.json": "1"}


def test_one_file_is_replaced_and_its_folder_made(tmp_path):
    write_whole(tmp_path / "deep" / "a.txt", "猫\n")
    write_whole(tmp_path / "deep" / "a.txt", b"two\n")
    assert content_of(tmp_path) == {"deep/a.txt": "two\n"}


def test_writers_at_the_same_time_do_not_meet(tmp_path):
    with writing(tmp_path / "a", shared=True) as one, writing(tmp_path / "a", shared=True) as two:
        assert one != two
        one.write_text("one", encoding="utf-8")
        two.write_text("two", encoding="utf-8")
    assert content_of(tmp_path) == {"a": "one"}  # the one that ended last


def test_leftovers_are_removed_after_a_day(tmp_path):
    old, young = tmp_path / ".a.01234567.writing", tmp_path / ".b.89abcdef.writing"
    for folder in (old, young):
        folder.mkdir()
        (folder / "part").write_text("x", encoding="utf-8")
    long_ago = time.time() - files.DAY - 60
    for path in (old / "part", old):
        os.utime(path, (long_ago, long_ago))
    temporary_path(tmp_path / "c", shared=True)
    assert not old.exists() and young.exists()


def test_removing_is_complete_and_never_fails(tmp_path):
    fill(tmp_path / "x", "1")
    fill(tmp_path / ".x.dropped", "1")  # a removal that was interrupted
    for _ in range(2):
        remove(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_json_that_may_be_missing(tmp_path):
    assert read_json_if_there(tmp_path / "none.json") == {}
    write_whole(tmp_path / "a.json", '{"a": 1}')
    assert read_json_if_there(tmp_path / "a.json") == {"a": 1}


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask_whoever_made_the_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        with writing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            os.close(os.open(temporary / "private", os.O_CREAT | os.O_WRONLY, 0o600))
        with writing(tmp_path / "file") as temporary:
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        with writing(tmp_path / "empty") as temporary:
            temporary.mkdir()
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for path in (tmp_path / "folder" / "private", tmp_path / "file"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json",
                                  "generation_config.json"])  # fmt: skip
def test_a_file_of_a_model_that_is_only_a_pointer(tmp_path, name):
    """`git clone` without LFS leaves such files; a download from a page behind a login leaves HTML."""
    from model.tokenizer_files import load_tokenizer
    from model.transformer import CausalLM, ModelConfig
    from model.weights import load_model, save_model

    save_model(CausalLM(ModelConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)),
               tmp_path / "m")  # fmt: skip
    reader = load_tokenizer if name == "tokenizer.json" else load_model
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content, words in ((pointer, "git lfs pull"), ("<html>Sign in</html>", "is a web page")):
        (tmp_path / "m" / name).write_text(content, encoding="utf-8")
        with pytest.raises(ModelError, match=f"{name} is .*") as caught:
            reader(tmp_path / "m")
        assert words in str(caught.value) and "\n" not in str(caught.value)
