"""Reads data files of any size, and complains with a line number. A reader may skip this file.

Formats: JSON in every usual form (dataset/json_records.py; a file with an unknown ending is taken for JSON),
.csv and .tsv (first row: the field names), each also as .gz, and .parquet (dataset/tables.py; needs pyarrow).
Files are streamed: memory does not grow with their size.

A person's file is never trusted to be right. Where a record cannot be read, one line says why, such as
`data.jsonl:17: not valid JSON (Expecting ',' delimiter, column 9)`. The record is skipped and counted, and
the first few of these lines are shown; with strict the first one is fatal.
"""

import gzip
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.files import kind_unlike_name
from dataset.json_records import Stop, read_json, reason_of
from dataset.tables import read_csv, read_parquet

BAD_LINE, NOTHING_TO_LEARN = "bad lines skipped", "records with nothing to learn skipped"
OTHER_FORMATS = (".xlsx", ".xls", ".ods", ".arrow", ".feather", ".zip", ".bz2", ".xz", ".zst", ".tar", ".db")
MAX_NOTES = 40  # of different ones; a hostile file may have a new key in every record


class Report:
    """Counts what is wrong with the data, shows the first few of each kind on stderr; fatal when strict.

    It also counts notes: what is not wrong, but not used as its author may have meant it.
    """

    def __init__(self, strict: bool = False, shown: int = 3):
        self.strict, self.shown = strict, shown
        self.counts: dict[str, int] = {}  # kind of problem -> how many
        self.examples: list[str] = []  # the lines that were shown
        self.first: dict[str, str] = {}  # path -> the first problem with that file
        self.usable, self.unusable = Counter(), Counter()  # path -> how many of its records
        self.notes: dict[str, list] = {}  # note -> [where it was made first, in how many records]

    def add(self, path, line: int | None, reason: str, kind: str = BAD_LINE):
        """Raises DataError when strict."""
        message = f"{path}:{line}: {reason}" if line else f"{path}: {reason}"
        if self.strict:
            raise DataError(f"{message} (fatal with --strict)")
        self.first.setdefault(str(path), f"line {line}: {reason}" if line else reason)
        self.unusable[str(path)] += kind in (BAD_LINE, NOTHING_TO_LEARN)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= self.shown:
            self.examples.append(message)
            print(f"warning: {message}", file=sys.stderr)

    def note(self, path, line: int, text: str):
        """Counts a note, once for each record that it concerns."""
        if text not in self.notes and len(self.notes) >= MAX_NOTES:
            text = "something else was not used, as above"
        self.notes.setdefault(text, [f"{path}:{line}", 0])[1] += 1

    def note_lines(self) -> list[str]:
        """Such as "data.jsonl:3: the key 'foo' of a message is not used (in 12 records)"."""
        return [f"{first}: {text} (in {count:,} record{'s' * (count > 1)})"
                for text, (first, count) in self.notes.items()]  # fmt: skip

    def summary(self) -> str:
        """Such as "bad lines skipped: 12, samples over 512 tokens cut: 3"; empty when all was well."""
        return ", ".join(f"{kind}: {count:,}" for kind, count in self.counts.items())

    def refusal(self, path: str) -> str | None:
        """Why a file should not be used: most of its records are unusable. None if most are usable.

        Then it may be another file than was meant, or in another form, and the rest is no fair part of it.
        """
        usable, unusable = self.usable[path], self.unusable[path]
        if unusable <= usable:
            return None
        return (f"{path}: {unusable:,} of {unusable + usable:,} records cannot be used "
                f"(first problem: {self.first[path]})")


def read_records(paths, report: Report | None = None) -> Iterator[tuple[str, int, dict]]:
    """Yields (path, line number, record) for every record of one file or several, in order.

    Problems go to `report`, which then also decides what is fatal. Without a report they are shown here, and
    a summary at the end. Raises DataError for a file that is missing, empty, unreadable or without a record.
    """
    paths = check_paths(paths)  # All files are checked now: the turn of the second may come in an hour.
    own_report = Report()  # stays empty where another one is given
    report = own_report if report is None else report
    for path in paths:
        any_record = False
        for line, record in _read_file(path, report):
            any_record = True
            yield path, line, record
        if not any_record:
            raise nothing_usable(path, report)
    if own_report.counts:
        print(f"warning: {own_report.summary()}", file=sys.stderr)


def nothing_usable(path: str, report: Report) -> DataError:
    first = report.first.get(path, "it holds only blank lines")
    return DataError(f"{path}: no usable record in it (first problem: {first})")


def check_paths(paths) -> list[str]:
    """One path or several, as a list of strings. Raises DataError for what is missing, no file or empty."""
    paths = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not paths:
        raise DataError("no data file was given")
    for path in paths:
        file = Path(path)
        try:
            size = file.stat().st_size
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise DataError(f"{path}: {reason}") from None
        if file.is_dir():
            raise DataError(f"{path}: is a folder; give the data files in it")
        if not file.is_file():  # opening a pipe may wait for ever; /dev/zero never ends
            raise DataError(f"{path}: is a pipe or a device; save what it gives as a file first")
        if size == 0:
            raise DataError(f"{path}: the file is empty")
        if what := kind_unlike_name(file):
            raise DataError(f"{path}: is {what}")
    return paths


def _read_file(path: str, report: Report) -> Iterator[tuple[int, dict]]:
    """(line, record) of one file. An error that ends the reading is reported; the records before it are kept.

    The functions that read yield (line, record). Where one cannot be read, a DataError is in its place.
    """
    opened = gzip.open if path.lower().endswith(".gz") else open
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if suffix in OTHER_FORMATS:
        raise DataError(f"{path}: {suffix} files are not read; save it as .jsonl, .csv or .parquet")
    line = None
    read = {".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}.get(suffix, read_json)
    try:
        with opened(path, "rb") as file:
            for line, record in read(file):
                if isinstance(record, DataError):
                    report.add(path, line, str(record))
                else:
                    yield line, record
    except (EOFError, zlib.error, gzip.BadGzipFile):
        report.add(path, line, "the gzip file is damaged or ends early; nothing after this line was read")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or reason_of(error)})") from None
    except Stop as stop:
        report.add(path, stop.args[0], f"{stop.args[1]}; nothing after this line was read")


def keys_of(record: dict) -> str:
    """For a complaint: "the keys 'id', 'question'", in one short line whatever the keys are."""
    if not record:
        return "nothing"
    keys = [repr(str(key)[:20]) for key in record]
    return f"the keys {', '.join(keys[:6])}" + (", ..." if len(keys) > 6 else "")
