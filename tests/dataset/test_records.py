"""Every format gives the same records; every kind of bad file gives one clear line and never a traceback."""

import csv
import datetime
import gzip
import io
import json
import os
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from dataset import json_records, tables
from dataset.records import Report, read_records

RECORDS = [{"text": "one\u2028still one"}, {"text": "二 \U0001f431"}, {"text": 'quote " comma , \n line'}]


def write(path, content):
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def read(path, report=None):
    return [(line, record) for _, line, record in read_records(path, report)]


def set_max_record_bytes(monkeypatch, size):
    for module in (json_records, tables):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", size)


def as_csv():
    out = io.StringIO()
    writer = csv.DictWriter(out, ["text"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(RECORDS)
    return out.getvalue()


LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
CONTENTS = {
    "a.jsonl": (LINES, [1, 2, 3]),
    "a.txt": (LINES, [1, 2, 3]),
    "a.json": (json.dumps(RECORDS), [1, 1, 1]),
    "indented.json": (json.dumps(RECORDS, indent=2), [2, 5, 8]),
    "lines.json": (LINES, [1, 2, 3]),
    "sequence.json": ("\n\n".join(json.dumps(record, indent=1) for record in RECORDS), [1, 5, 9]),
    "a.csv": (as_csv(), [2, 3, 4]),  # the last row takes two lines
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_formats(tmp_path, name, bom, zipped):
    text, lines = CONTENTS[name]
    path = write(tmp_path / (name + ".gz" * zipped), "\ufeff" * bom + text)
    assert read(path, Report(strict=True)) == list(zip(lines, RECORDS, strict=True))


def test_windows_line_ends_and_blank_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert read(path, Report(strict=True)) == [(1, {"text": "a"}), (4, {"text": "b"})]


def test_byte_order_marks_of_files_that_were_joined(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\ufeff{"text": "b\ufeff"}\n')
    assert read(path, Report(strict=True)) == [(1, {"text": "a"}), (2, {"text": "b\ufeff"})]


def test_only_a_line_feed_ends_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d"
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False))
    assert read(path, Report(strict=True)) == [(1, {"text": text})]


def test_pipes_and_devices_are_refused_without_being_opened(tmp_path):
    """Opening a pipe that nobody writes to waits for ever, and /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/zero"):
        with pytest.raises(DataError, match="is a pipe or a device"):
            read(path)


def test_links_in_a_circle_and_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="a.jsonl: cannot be read") as error:
        read(tmp_path / "a.jsonl")
    assert "\n" not in str(error.value)

    def refused(*args):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "c.jsonl", "{}")
    monkeypatch.setattr("builtins.open", refused)  # root, who may run the tests, may read everything
    with pytest.raises(DataError, match="c.jsonl: cannot be read .Permission denied"):
        read(path)


def test_many_files_in_order(tmp_path):
    a, b = write(tmp_path / "a.jsonl", '{"x": 1}'), write(tmp_path / "b.json", '[{"x": 2}]')
    assert [record["x"] for _, _, record in read_records([b, a])] == [2, 1]


BAD_LINES = [
    (b'{"text": "a"', "not valid JSON"),
    (b"plain words", "not valid JSON"),
    (b'["a"]', "a JSON list where an object"),
    (b"null", "a JSON null where an object"),
    (b"17", "a JSON number where an object"),
    (b'{"text": "\xff"}', "not valid UTF-8 (byte 0xff at column 11)"),
    (b'{"text": "\x00"}', "not valid JSON"),
    (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"text": ' + b"9" * 5000 + b"}", "integer string conversion"),
    (b'{"text": "a", "text": "b"}', "the key 'text' twice in one object"),
    (b'{"a": [{"role": "user", "content": 1, "content": 2}]}', "the key 'content' twice"),
    ("{\"text\": \"猫".encode()[:-1] + b'"}', "not valid UTF-8 (byte 0xe7 at column 11)"),
    (b'{"text": "\xed\xa0\xbd"}', "not valid UTF-8 (byte 0xed"),  # half a surrogate pair, as bytes
    (b"\0" * 4096, "not valid JSON"),  # what a machine that lost power leaves in a file
    (b'{"text": "a"}\r{"text": "b"}', "not valid JSON (Extra data"),  # line ends of old Macs
    (b'{"a":' * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize("bad, reason", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line_is_shown_counted_and_skipped(tmp_path, capsys, bad, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + bad + b'\n{"text": "b"}\n')
    assert [line for line, _ in read(path)] == [1, 3]
    shown, summary = capsys.readouterr().err.splitlines()
    assert shown.startswith(f"warning: {path}:2: ") and reason in shown
    assert summary == "warning: bad lines skipped: 1"
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*--strict"):
        read(path, Report(strict=True))


def test_only_the_first_three_are_shown(tmp_path, capsys):
    read(write(tmp_path / "a.jsonl", "{}\n" + "?\n" * 2000))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[-1] == "warning: bad lines skipped: 2,000"


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "the file is empty"),
        ("\n \n", "blank lines"),
        ("no\njson\n", "a.jsonl: no usable record in it (first problem: line 1: not valid JSON"),
        ("\ufeff{}".encode("utf-16"), "UTF-16"),
    ],
)
def test_file_without_a_record(tmp_path, content, reason):
    with pytest.raises(DataError) as error:
        read(write(tmp_path / "a.jsonl", content))
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_folder_are_found_before_anything_is_read(tmp_path):
    good = write(tmp_path / "a.jsonl", "{}")
    for bad, reason in [
        (tmp_path / "b.jsonl", "no such file"),
        (tmp_path, "is a folder"),
        ("a\0b", "cannot be read"),
    ]:
        with pytest.raises(DataError, match=reason):
            next(read_records([good, bad]))
    with pytest.raises(DataError, match="no data file"):
        read([])


def test_line_longer_than_the_limit(tmp_path, monkeypatch, capsys):
    set_max_record_bytes(monkeypatch, 1 << 20)
    path = write(tmp_path / "a.jsonl", '{"x": 1}\n{"x": "' + "a" * (3 << 20) + '"}\n{"x": 2}\n')
    assert [line for line, _ in read(path)] == [1, 3]
    assert "a.jsonl:2: the line is longer than 1 MiB" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.jsonl"])
def test_a_bomb_fills_no_memory(tmp_path, monkeypatch, name):
    """A line of 100 MiB, which gzip makes a file of 100 kB, is told in one line and never held whole."""
    set_max_record_bytes(monkeypatch, 1 << 20)
    path = tmp_path / name
    with (gzip.open if name.endswith("gz") else open)(path, "wb") as file:
        file.write(b"text\n" if "csv" in name else b'{"text": "a"}\n')
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"a" * (1 << 20))
    tracemalloc.start()
    report = Report()
    try:
        list(read_records(path, report=report))
    except DataError as error:
        assert "csv" in name and "longer than 1 MiB" in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(report.counts.values()) == 1 and "longer than 1 MiB" in report.examples[0]
    assert peak < 24 << 20


def test_files_cut_off_keep_what_came_before(tmp_path, capsys):
    lines = "".join(json.dumps({"text": f"{i} " * 50}) + "\n" for i in range(2000))
    whole = gzip.compress(lines.encode(), mtime=0)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    assert 100 < len(read(path)) < 2000
    assert "ends early" in capsys.readouterr().err
    path.write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="gzip file is damaged"):
        read(path)

    path = write(tmp_path / "a.json", '[{"x": 1},\n{"x": 2},\n')
    assert [line for line, _ in read(path)] == [1, 2]
    assert "not closed" in capsys.readouterr().err
    path = write(tmp_path / "a.json", '[{"x": 1},\n{"x": 2},\n{"x": }]')
    assert [line for line, _ in read(path)] == [1, 2]
    assert "a.json:3: not valid JSON" in capsys.readouterr().err


def test_csv_rows_of_the_wrong_width(tmp_path, capsys):
    path = write(tmp_path / "a.csv", b"text,n\na,1\nb\nc,2,3\n\xff,4\nd,5\n")
    assert [record["text"] for _, record in read(path)] == ["a", "d"]
    err = capsys.readouterr().err
    assert "a.csv:3: fewer" in err and "a.csv:4: more" in err and "a.csv:5: not valid UTF-8" in err


def test_csv_cells_without_a_value(tmp_path):
    """pandas writes nan where a table was turned into text before. Other words may be what the cell says."""
    rows = "text,note\nnan,a\nNaN,b\nNone,c\nnull,d\nnan bread,e\nNAN,f\n"
    records = [record for _, record in read(write(tmp_path / "a.csv", rows))]
    assert [record["text"] for record in records] == ["", "", "None", "null", "nan bread", "NAN"]


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS.*git lfs pull"),
    (b"<!DOCTYPE html>\n<html></html>", "a web page"),
    (gzip.compress(b'{"text": "a"}', mtime=0), "packed with gzip: its name must end in .gz"),
    (b"PAR1\x15\x04", "a Parquet file: its name must end in .parquet"),
    (b"(\xb5/\xfd\x04\x00", "packed with Zstandard: unpack it first"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, words):
    write(tmp_path / "good.jsonl", '{"text": "a"}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: is .*{words}"):
        next(read_records([tmp_path / "good.jsonl", tmp_path / name]))  # before the first is read


def test_csv_with_two_columns_of_one_name(tmp_path):
    with pytest.raises(DataError, match="a.csv.*1: two columns of the same name"):
        read(write(tmp_path / "a.csv", "text,n,text\na,1,b\n"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read(write(tmp_path / "a.parquet", b"PAR1"))


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert [record for _, record in read(tmp_path / "a.parquet")] == RECORDS
    with pytest.raises(DataError, match="not valid Parquet"):
        read(write(tmp_path / "b.parquet", b"PAR1 nonsense"))
    # Bytes may be text. What is no text never looks like one, and a date beside a text does no harm.
    odd = {"text": b"a", "messages": [{"content": b"\xff"}], "date": datetime.date(2000, 1, 1), "n": 1.5}
    parquet.write_table(pyarrow.Table.from_pylist([odd]), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet") == [
        (1, {"text": "a", "messages": [{"content": {"bytes": 1}}], "date": "2000-01-01", "n": 1.5})
    ]
    # A map, as Spark writes objects, is an object, and no list of pairs.
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    maps = pyarrow.table({"a": pyarrow.array([[("city", "Oslo"), ("no", None)]], kind)})
    parquet.write_table(maps, tmp_path / "e.parquet")
    assert read(tmp_path / "e.parquet") == [(1, {"a": {"city": "Oslo"}})]
    whole = (tmp_path / "a.parquet").read_bytes()
    for cut in range(0, len(whole), 97):
        with pytest.raises(DataError) as error:
            read(write(tmp_path / "d.parquet", whole[: max(1, cut)]))
        assert "\n" not in str(error.value)
    for at in range(0, len(whole), 29):  # a flipped bit may go unnoticed, but gives no traceback
        try:
            read(write(tmp_path / "d.parquet", whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :]))
        except DataError as error:
            assert "\n" not in str(error)


def test_memory_does_not_grow_with_a_table_of_one_group_of_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    table = pyarrow.table({"text": [f"{i} " * 150 for i in range(20_000)]})  # about 17 MB
    parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    next(read_records(tmp_path / "a.parquet"))  # imports what it needs
    tracemalloc.start()
    assert sum(1 for _ in read_records(tmp_path / "a.parquet")) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.parquet").stat().st_size > 15e6 and peak < 8e6


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    records = [{"text": f"{i} " * 1000} for i in range(4000)]  # about 20 MB
    path = write(
        tmp_path / name,
        json.dumps(records, indent=0)
        if name == "a.json"
        else "".join(json.dumps(record) + "\n" for record in records),
    )
    del records
    tracemalloc.start()
    count = sum(1 for _ in read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000 and peak < 6 << 20


def test_a_report_is_shared_by_the_caller(tmp_path, capsys):
    report = Report()
    assert len(read(write(tmp_path / "a.jsonl", "{}\n?\n"), report=report)) == 1
    report.add("a", 7, "no text")
    assert report.summary() == "bad lines skipped: 2"
    assert len(capsys.readouterr().err.splitlines()) == 2  # the caller tells the summary


FRAGMENTS = st.sampled_from(
    [
        b'{"a": 1}',
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b'"',
        b"\n",
        b"\r",
        b"\\u",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\x00",
        "\u2028".encode(),
        b"1e999",
        b"-",
        b'{"a":"\\ud800"}',
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["jsonl", "json", "csv", "jsonl.gz", "json.gz", "csv.gz"]),
    st.one_of(st.binary(max_size=60), st.lists(FRAGMENTS, max_size=12).map(b"".join)),
    st.booleans(),
)
def test_no_bytes_give_a_traceback(tmp_path_factory, suffix, content, cut):
    folder = tmp_path_factory.getbasetemp()
    path = folder / f"fuzz.{suffix}"
    if suffix.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
        content = content[:-9] if cut else content
    path.write_bytes(content)
    try:
        assert all(isinstance(record, dict) for _, record in read(path))
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)


# --- CSV and its quotes


def test_an_unclosed_quote_costs_its_own_line_alone(tmp_path):
    """The csv module makes one row of all that follows; here every other line is read, or counted."""
    rows = [f'{i},"good, {i}"' for i in range(2, 40)]
    for at in (0, 5, 37):
        for spoilt in ('9,"not closed', '"9,not closed', '9,"not ""closed', '9,"said "so" and so"', '"'):
            lines = [*rows[:at], spoilt, *rows[at + 1 :]]
            report = Report()
            path = write(tmp_path / "a.csv", "n,text\n" + "\n".join(lines) + "\n")
            found = [(line, record["text"]) for _, line, record in read_records(path, report=report)]
            assert found == [(i, f"good, {i}") for i in range(2, 40) if i != at + 2]
            assert report.counts == {"bad lines skipped": 1}
            assert report.examples[0].startswith(f"{path}:{at + 2}: ") and "quote" in report.examples[0]


def test_lines_without_quotes_after_an_unclosed_one_are_read(tmp_path, capsys):
    path = write(tmp_path / "a.csv", 'text\na\n"b\n\nc\n"two\nlines"\nd\n')
    found = [(line, record["text"]) for line, record in read(path)]
    assert found == [(2, "a"), (5, "c"), (6, "two\nlines"), (8, "d")]
    assert "a.csv:3: not valid CSV" in capsys.readouterr().err


def test_rows_of_several_lines_and_of_the_wrong_width_name_both_ends(tmp_path, capsys):
    path = write(tmp_path / "a.csv", 'text,n\n"a\n\nb",1,2\nc,3\n')
    assert read(path) == [(5, {"text": "c", "n": "3"})]
    assert "a.csv:2: more fields than the first row has names (its last line is 4)" in capsys.readouterr().err


def test_a_first_row_with_wrong_quotes(tmp_path):
    with pytest.raises(DataError, match="a.csv.*1: not valid CSV .*quote"):
        read(write(tmp_path / "a.csv", '"text,n\na,1\nb,2\n'))


def test_unclosed_quotes_in_a_long_file_take_little_memory_and_time(tmp_path, monkeypatch):
    """Each of these lines begins a row that ends nowhere: reading all of them again each time is bounded."""
    set_max_record_bytes(monkeypatch, 1 << 16)
    path = write(tmp_path / "a.csv", "text\n" + 'a,"' + "b" * 200 + "\n" + "plain\n" * 50_000)
    report = Report()
    tracemalloc.start()
    assert sum(1 for _ in read_records(path, report=report)) == 50_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.counts == {"bad lines skipped": 1} and "64 KiB" not in report.examples[0]
    assert "longer than" in report.examples[0] and "quote" in report.examples[0] and peak < 8 << 20
    monkeypatch.setattr(tables, "MAX_CHARACTERS_READ_AGAIN", 1 << 20)
    path = write(tmp_path / "b.csv", "text\nfirst\n" + 'x","\n' * 20_000)
    report = Report(shown=100)
    assert len(list(read_records(path, report=report))) == 1
    assert "too many quotes that are not closed; nothing after this line was read" in report.examples[-1]
    assert 10 < len(report.examples) < 40


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.text('ab",\n\r é'), min_size=2, max_size=2), min_size=1, max_size=6))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "written.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["a", "b"], *rows])
    assert [list(record.values()) for _, record in read(path, Report(strict=True))] == rows


def test_a_long_cell_is_read(tmp_path):
    """Longer than the 131,072 characters that the csv module allows unless told otherwise."""
    csv.field_size_limit(1 << 17)
    words = "word\n" * 50_000
    assert read(write(tmp_path / "a.csv", f'text\n"{words}"\n')) == [(2, {"text": words})]
