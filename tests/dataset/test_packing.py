"""Rows: every document once, whole, in a row that fits. The cache: complete or absent."""

import json
import os
import pickle
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import packing
from dataset.jsonl import DataError
from dataset.packing import (
    CacheWriter,
    Order,
    TokenCache,
    fingerprint,
    open_cache,
    pack_rows,
    single_rows,
    stamps,
)


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


@pytest.mark.parametrize("table", [1 << 20, 0])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 17, 256, 257])
def test_an_order_has_every_number_once(monkeypatch, size, table):
    """With and without a table: a long order, which is computed, is a permutation as well."""
    monkeypatch.setattr(packing, "TABLE", table)
    order = Order(size, [3, 1])
    assert len(order) == size and sorted(order) == list(range(size)) == sorted(np.asarray(order).tolist())
    assert list(order) == list(Order(size, [3, 1])) == np.asarray(order).tolist()
    assert [order[i] for i in range(size)] == order[list(range(size))].tolist()
    assert size < 17 or list(order) != list(Order(size, [3, 2])) and list(order) != list(range(size))
    assert list(Order(size)) == list(range(size))
    part = order[size // 3 :]
    assert list(part) == list(order)[size // 3 :] and len(part[1:3]) == max(0, min(3, len(part)) - 1)
    assert np.array_equal(np.arange(size)[part], np.asarray(part))
    with pytest.raises(IndexError):
        part[len(part)]


def test_a_computed_order_is_as_random_as_a_table(monkeypatch):
    """Neighbours end up far apart, and every tenth of the places holds every tenth of the numbers alike."""
    monkeypatch.setattr(packing, "TABLE", 0)
    numbers = np.asarray(Order(100_000, 7))
    counts, _, _ = np.histogram2d(np.arange(100_000), numbers, bins=10)
    assert abs(counts - 1000).max() < 150  # five standard deviations of about 30
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02
    assert (abs(np.diff(numbers)) < 10).mean() < 0.001
    other = np.asarray(Order(100_000, 8))
    assert (numbers == other).mean() < 0.001 and abs(np.corrcoef(numbers, other)[0, 1]) < 0.02


@pytest.mark.parametrize("samples", [None, Order(5000, 3)[1000:], np.arange(0, 5000, 2)])
def test_long_packings_are_kept_on_disk(tmp_path, monkeypatch, samples):
    monkeypatch.setattr(packing, "CHUNK", 700)
    lengths = np.random.default_rng(0).integers(1, 60, 5000).astype(np.int32)
    count = 5000 if samples is None else len(samples)
    chosen = lengths if samples is None else lengths[np.asarray(samples)]
    rows = pack_rows(lengths, 64, 7, samples, cache_dir=tmp_path)
    assert sorted(sample for row in rows for sample in row) == list(range(count))
    assert all(0 < chosen[row].sum() <= 64 for row in rows) and chosen.sum() / (64 * len(rows)) > 0.9
    (folder,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_pack", None)  # the second start packs nothing
        again = pack_rows(lengths, 64, 7, samples, cache_dir=tmp_path)
        assert list(again) == list(rows) == list(pickle.loads(pickle.dumps(rows)))
        assert len(pickle.dumps(rows)) < 500
    other = [(lengths, 64, 8, samples), (lengths, 65, 7, samples), (lengths[::-1].copy(), 64, 7, samples),
             (lengths, 64, 7, Order(5000, 4)[1000:]), (lengths, 64, 7, np.arange(1, 5000, 2))]  # fmt: skip
    for number, changed in enumerate(other, 2):
        pack_rows(*changed, cache_dir=tmp_path)
        assert len(list(tmp_path.iterdir())) == number
    with pytest.raises(DataError, match="does not fit"):
        pack_rows(lengths, 8, 7, samples, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == number


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is read from /proc")
def test_pages_that_were_read_are_given_back(tmp_path):
    """Else reading 100 MB of tokens in random order would count as 100 MB of this process's memory."""
    def resident():  # MB of mapped files
        return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

    with CacheWriter(tmp_path / "c", {"tokens": "uint16", "offsets": "int64"}) as writer:
        writer.write("tokens", np.zeros(50 << 20))
        writer.write("offsets", [0])
    cache = TokenCache(tmp_path / "c")
    before, most = resident(), 0.0
    for start in np.random.default_rng(0).integers(0, 50 << 20, 5000):
        assert cache.tokens[start : start + 100].sum() == 0
        cache.was_read()
        most = max(most, resident() - before)
    assert most < 40


def test_a_document_longer_than_the_row():
    with pytest.raises(DataError, match="9 tokens does not fit a row of 8"):
        pack_rows([1, 9], 8, seed=0)


PLAIN = {name: dtype for name, dtype in TokenCache.ARRAYS.items() if name != "mask"}


def write_cache(folder, samples=((1, 2, 3), (70_000, 5)), masked=True):
    with CacheWriter(folder, {n: t for n, t in TokenCache.ARRAYS.items() if masked or n != "mask"}) as writer:
        for ids in samples:
            writer.add(np.array(ids), np.ones(len(ids)) if masked else None, len(ids), 10 * len(ids), 7)
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
            writer.add(np.array([1]), None, 0, 0, 1)
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
        writer.add(np.array([1]), None, 0, 0, 1)
        write_cache(tmp_path / "c")  # the other one is done first
    assert len(TokenCache(tmp_path / "c")) == 2  # its result stays
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_killed_runs_left_is_removed_after_a_day(tmp_path):
    for name, age in [("tmp-old", 2 * 86400), ("tmp-young", 60)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "offsets.bin").write_bytes(b"")
        os.utime(tmp_path / name / "offsets.bin", (time.time() - age,) * 2)
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


def test_a_change_with_the_old_date_put_back_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    os.utime(path, ns=(10, 10))
    before = stamps([path])
    time.sleep(0.02)  # the system's clock for files has ticks
    path.write_text("new")
    os.utime(path, ns=(10, 10))
    after = stamps([path])
    assert after[0][:3] == before[0][:3] and after != before
