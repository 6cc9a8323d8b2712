"""Rows: every document once, whole, in a row that fits."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from dataset import packing
from dataset.packing import Order, pack_rows, single_rows


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
    monkeypatch.setattr(packing, "MAX_NUMBERS_IN_TABLE", table)
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
    monkeypatch.setattr(packing, "MAX_NUMBERS_IN_TABLE", 0)
    numbers = np.asarray(Order(100_000, 7))
    counts, _, _ = np.histogram2d(np.arange(100_000), numbers, bins=10)
    assert abs(counts - 1000).max() < 150  # five standard deviations of about 30
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02
    assert (abs(np.diff(numbers)) < 10).mean() < 0.001
    other = np.asarray(Order(100_000, 8))
    assert (numbers == other).mean() < 0.001 and abs(np.corrcoef(numbers, other)[0, 1]) < 0.02


@pytest.mark.parametrize("samples", [None, Order(5000, 3)[1000:], np.arange(0, 5000, 2)])
def test_long_packings_are_kept_on_disk(tmp_path, monkeypatch, samples):
    monkeypatch.setattr(packing, "SAMPLES_PACKED_TOGETHER", 700)
    lengths = np.random.default_rng(0).integers(1, 60, 5000).astype(np.int32)
    count = 5000 if samples is None else len(samples)
    chosen = lengths if samples is None else lengths[np.asarray(samples)]
    rows = pack_rows(lengths, 64, 7, samples, cache_dir=tmp_path)
    assert sorted(sample for row in rows for sample in row) == list(range(count))
    assert all(0 < chosen[row].sum() <= 64 for row in rows) and chosen.sum() / (64 * len(rows)) > 0.9
    (folder,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(packing, "best_fit", None)  # the second start packs nothing
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


def test_a_document_longer_than_the_row():
    with pytest.raises(DataError, match="9 tokens does not fit a row of 8"):
        pack_rows([1, 9], 8, seed=0)
