"""The cache: complete or absent, named after all that it depends on, and cheap to map."""

import json
import os
import pickle
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.cli import explain
from common.errors import DataError
from dataset import chat, token_cache
from dataset.token_cache import CacheWriter, TokenCache, cache_key, file_stamps, open_cache, token_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is read from /proc")
def test_pages_that_were_read_are_given_back(tmp_path):
    """Else reading 100 MB of tokens in random order would count as 100 MB of this process's memory."""
    def resident():  # MB of mapped files
        return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

    with CacheWriter(tmp_path / "c", {"tokens": "uint16", "offsets": "int64"}) as writer:
        writer.write(tokens=np.zeros(50 << 20), offsets=[0])
    cache = TokenCache(tmp_path / "c")
    before, most = resident(), 0.0
    for start in np.random.default_rng(0).integers(0, 50 << 20, 5000):
        assert cache.tokens[start : start + 100].sum() == 0
        cache.count_read()
        most = max(most, resident() - before)
    assert most < 40


PLAIN = {name: dtype for name, dtype in TokenCache.ARRAYS.items() if name != "mask"}


def add(writer, ids):
    """Writes one sample, as `build_cache` does."""
    mask = {"mask": np.ones(len(ids))} if "mask" in writer.dtypes else {}
    writer.write(tokens=ids, **mask, offsets=[writer.sizes["tokens"] + len(ids)], lengths=[len(ids)],
                 num_targets=[len(ids)], num_bytes=[10 * len(ids)], lines=[7])


def write_cache(folder, samples=((1, 2, 3), (70_000, 5)), masked=True):
    with CacheWriter(folder, TokenCache.ARRAYS if masked else PLAIN) as writer:
        writer.write(offsets=[0])
        for ids in samples:
            add(writer, np.array(ids))
        writer.meta = {"note": "小"}
    return TokenCache(folder)


@pytest.mark.parametrize("masked", [True, False])
def test_cache_round_trip_and_pickle(tmp_path, masked):
    written = write_cache(tmp_path / "c", masked=masked)
    for cache in (written, pickle.loads(pickle.dumps(written))):
        assert len(cache) == 2 and cache.meta["note"] == "小"
        assert cache.tokens.tolist() == [1, 2, 3, 70_000, 5] and cache.offsets.tolist() == [0, 3, 5]
        assert cache.lengths.tolist() == [3, 2] and cache.lengths.dtype == np.int32
        assert cache.num_targets.dtype == np.int32 and cache.num_bytes.dtype == np.int64
        assert (cache.mask is not None) == masked
    assert len(pickle.dumps(cache)) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_cache_is_complete_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with CacheWriter(tmp_path / "c", PLAIN) as writer:
            add(writer, np.array([1]))
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [] and open_cache(tmp_path / "c") is None


@pytest.mark.parametrize("damage", ["short", "missing", "meta", "foreign"])
def test_damaged_cache_is_written_again(tmp_path, damage):
    folder = tmp_path / "c"
    write_cache(folder)
    if damage == "short":
        (folder / "tokens.bin").write_bytes(b"12")
    elif damage == "missing":
        (folder / "mask.bin").unlink()
    else:
        (folder / "meta.json").write_text("{" if damage == "meta" else json.dumps({"arrays": {"tokens": 5}}))
    assert open_cache(folder) is None
    assert len(write_cache(folder)) == 2


def test_two_writers_of_the_same_cache(tmp_path):
    with CacheWriter(tmp_path / "c", PLAIN) as writer:
        add(writer, np.array([1]))
        write_cache(tmp_path / "c")  # the other one is done first
    assert len(TokenCache(tmp_path / "c")) == 2  # its result stays
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_killed_runs_left_is_removed_after_a_day(tmp_path):
    with pytest.raises(DataError, match="killed"):
        with CacheWriter(tmp_path / "c", PLAIN) as writer:
            for number, age in enumerate([2 * 86400, 60]):
                left = writer.temporary.with_name(f".c.{number}2345678.writing")
                left.mkdir()
                (left / "offsets.bin").write_bytes(b"")
                for path in (left / "offsets.bin", left):
                    os.utime(path, (time.time() - age,) * 2)
            raise DataError("killed")
    write_cache(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "c"]


def test_a_cache_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write the token cache"):
        write_cache(tmp_path / "file" / "c")


def test_the_key_follows_path_size_time_and_settings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("a")
    os.utime(path, ns=(10, 10))
    seen = {cache_key([str(path)], max_length=8), cache_key([str(path)], max_length=9)}
    os.utime(path, ns=(10, 11))
    seen.add(cache_key([str(path)], max_length=8))
    path.write_text("ab")
    os.utime(path, ns=(10, 11))
    seen.add(cache_key([str(path)], max_length=8))
    seen.add(cache_key([str(path.rename(tmp_path / "b.jsonl"))], max_length=8))
    assert len(seen) == 5


def test_a_change_with_the_old_date_put_back_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    os.utime(path, ns=(10, 10))
    before = file_stamps([path])
    time.sleep(0.02)  # the system's clock for files has ticks
    path.write_text("new")
    os.utime(path, ns=(10, 10))
    after = file_stamps([path])
    assert after[0][:3] == before[0][:3] and after != before


def test_the_key_follows_the_code_that_tokenises():
    """Every file of dataset/ that takes part in the making of a sample is listed in MODULES."""
    folder, found, open_ends = Path(token_cache.__file__).parent, set(), ["lm_dataset", "preference"]
    while open_ends:
        name = open_ends.pop()
        found.add(name)
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        names = re.findall(r"^from dataset import (.+)$|^from dataset\.(\w+) import", text, re.M)
        open_ends += {one for many, single in names for one in (many or single).split(", ")} - found
    assert found == set(token_cache.MODULES)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full, a disk without room, is Linux's")
def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot write the token cache in .* .No space left") as caught:
        with CacheWriter(tmp_path / "c", PLAIN) as writer:
            writer.files["tokens"].close()
            writer.files["tokens"] = open("/dev/full", "wb")
            writer.write(tokens=np.zeros(1 << 20))
    assert list(tmp_path.iterdir()) == []
    code, line = explain(caught.value)
    assert code == 1 and line.startswith("error: cannot write the token cache")


def test_another_process_may_publish_at_the_very_same_moment(tmp_path, monkeypatch):
    real = token_cache.publish

    def late(temporary, folder):
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, "publish", real)
            write_cache(tmp_path / "c")
        raise OSError(39, "Directory not empty")  # as a rename raises then

    monkeypatch.setattr(token_cache, "publish", late)
    with CacheWriter(tmp_path / "c", PLAIN) as writer:
        add(writer, np.array([1]))
    assert len(TokenCache(tmp_path / "c")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_error_of_the_block_is_not_taken_for_one_of_the_disk(tmp_path):
    with pytest.raises(BrokenPipeError):
        with CacheWriter(tmp_path / "c", PLAIN):
            raise BrokenPipeError
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_looked_up_when_a_cache_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "CACHE_DIR", tmp_path)
    assert token_cache.cache_folder("sft", "key") == tmp_path / "sft-key"
    assert token_cache.cache_folder("sft", "key", tmp_path / "mine") == tmp_path / "mine" / "sft-key"


def test_token_bytes(tokenizer):
    sizes = token_bytes(tokenizer)
    text = "Hello, 世界! \U0001f431\n\x00 <|im_end|>"
    assert sizes[chat.encode_text(tokenizer, text)].sum() == len(text.encode())
    assert sizes[list(tokenizer.backend_tokenizer.get_added_tokens_decoder())].sum() == 0


def test_token_bytes_of_a_sentencepiece_vocabulary():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "<0x0A>": 1, "\u2581cat": 2, "猫": 3}, merges=[]))
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")).tolist() == [
        0,
        1,
        4,
        3,
    ]
