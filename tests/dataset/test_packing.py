"""Rows: every document once, whole, in a row that fits. The cache: complete or absent."""

import json
import os
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.jsonl import DataError
from dataset.packing import CacheWriter, TokenCache, fingerprint, open_cache, pack_rows, single_rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=200), st.integers(0, 1000))
def test_every_document_once_whole_and_no_row_too_long(lengths, seed):
    rows = pack_rows(np.array(lengths, dtype=np.int32), 64, seed)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    sums = [sum(lengths[sample] for sample in row) for row in rows]
    assert all(0 < total <= 64 for total in sums)
    # best-fit opens a row only when none has room: two rows that fit together can't both stay half empty
    assert len(sums) < 2 or sorted(sums)[0] + sorted(sums)[1] > 64


def test_rows_behave_like_a_list():
    rows = pack_rows([3, 3, 3], 7, seed=0)
    assert len(rows) == 2 and rows[-1] == rows[1] and isinstance(rows[0], list)
    with pytest.raises(IndexError):
        rows[2]
    assert len(pack_rows([], 8, seed=0)) == 0
    assert sorted(single_rows(4, seed=1)) == [[0], [1], [2], [3]]
    assert list(single_rows(100, seed=1)) != list(single_rows(100, seed=2))


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    lengths = np.random.default_rng(0).integers(1, 50, 1000)
    assert list(pack_rows(lengths, 64, 7)) == list(pack_rows(lengths, 64, 7))
    assert list(pack_rows(lengths, 64, 7)) != list(pack_rows(lengths, 64, 8))


def test_utilisation():
    lengths = np.clip(np.random.default_rng(0).lognormal(3.5, 0.8, 20_000), 2, 256).astype(np.int32)
    rows = pack_rows(lengths, 256, seed=0)
    assert lengths.sum() / (len(rows) * 256) > 0.98
    # and rows are in random order: the first hundred are no fuller than the last
    fill = [lengths[row].sum() for row in rows]
    assert abs(np.mean(fill[:100]) - np.mean(fill[-100:])) < 8


def test_a_document_longer_than_the_row():
    with pytest.raises(DataError, match="9 tokens does not fit a row of 8"):
        pack_rows([1, 9], 8, seed=0)


def write_cache(folder, samples=((1, 2, 3), (70_000, 5)), masked=True):
    with CacheWriter(folder, "uint32", with_mask=masked) as writer:
        for ids in samples:
            writer.add(np.array(ids), np.ones(len(ids)) if masked else None, len(ids), 10 * len(ids))
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
        with CacheWriter(tmp_path / "c", "uint16", with_mask=False) as writer:
            writer.add(np.array([1]), None, 0, 0)
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
    with CacheWriter(tmp_path / "c", "uint16", with_mask=False) as writer:
        writer.add(np.array([1]), None, 0, 0)
        write_cache(tmp_path / "c")  # the other one is done first
    assert len(TokenCache(tmp_path / "c")) == 2  # its result stays
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_killed_runs_left_is_removed_after_a_day(tmp_path):
    for name, age in [("tmp-old", 2 * 86400), ("tmp-young", 60)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").write_bytes(b"")
        os.utime(tmp_path / name / "tokens.bin", (time.time() - age,) * 2)
    write_cache(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "tmp-young"]


def test_a_cache_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write the token cache"):
        write_cache(tmp_path / "file" / "c")


def test_fingerprint_follows_path_size_time_and_settings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("a")
    os.utime(path, ns=(10, 10))
    seen = {fingerprint([str(path)], max_length=8), fingerprint([str(path)], max_length=9)}
    os.utime(path, ns=(10, 11))
    seen.add(fingerprint([str(path)], max_length=8))
    path.write_text("ab")
    os.utime(path, ns=(10, 11))
    seen.add(fingerprint([str(path)], max_length=8))
    seen.add(fingerprint([str(path.rename(tmp_path / "b.jsonl"))], max_length=8))
    assert len(seen) == 5
