"""Reads data files of any size, and complains with a line number. A reader may skip this file.

Formats: .jsonl (one JSON object a line; a file with an unknown ending is taken for one), .json (an array of
objects, objects one after the other, or JSONL under another name), .csv (first row: the field names), each
also as .gz, and .parquet (needs pyarrow). Files are streamed: memory does not grow with their size.

A person's file is never trusted to be right. Where a record cannot be read, one line says why, such as
`data.jsonl:17: not valid JSON (Expecting ',' delimiter, column 9)`. The record is skipped and counted, and
the first few of these lines are shown; with strict the first one is fatal.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows editors put these bytes before UTF-8
MAX_RECORD_BYTES = 16 << 20  # (characters in .json, .csv); to tokenise 16 MiB at once takes 2 GB of memory
MAX_CHARACTERS_READ_AGAIN = 64 * MAX_RECORD_BYTES  # of a .csv file, because of wrong quotes
JSON_BUFFER_CHARACTERS = 1 << 18  # of a .json file, read at once
JSON_TYPES = {list: "list", str: "string", bool: "boolean", type(None): "null"}
JSON_GAP = re.compile(r"[ \t\r\n,]*")  # what may stand between two values


class Report:
    """Counts what is wrong with the data, shows the first few of each kind on stderr; fatal when strict."""

    def __init__(self, strict: bool = False, shown: int = 3):
        self.strict, self.shown = strict, shown
        self.counts: dict[str, int] = {}  # kind of problem -> how many
        self.examples: list[str] = []  # the lines that were shown
        self.first: dict[str, str] = {}  # path -> the first problem with that file

    def add(self, path, line: int | None, reason: str, kind: str = "bad lines skipped"):
        """Raises DataError when strict."""
        message = f"{path}:{line}: {reason}" if line else f"{path}: {reason}"
        if self.strict:
            raise DataError(f"{message} (fatal with --strict)")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(str(path), f"line {line}: {reason}" if line else reason)
        if self.counts[kind] <= self.shown:
            self.examples.append(message)
            print(f"warning: {message}", file=sys.stderr)

    def summary(self) -> str:
        """Such as "bad lines skipped: 12, samples over 512 tokens cut: 3"; empty when all was well."""
        return ", ".join(f"{kind}: {count:,}" for kind, count in self.counts.items())


def read_records(paths, strict=False, report: Report | None = None) -> Iterator[tuple[str, int, dict]]:
    """Yields (path, line number, record) for every record of one file or several, in order.

    Problems go to `report`, which then also decides what is fatal. Without a report they are shown here, and
    a summary at the end. Raises DataError for a file that is missing, empty, unreadable or without a record.
    """
    paths = check_paths(paths)  # All files are checked now: the turn of the second may come in an hour.
    own_report = Report(strict)  # stays empty where another one is given
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
    return paths


class _Stop(Exception):
    """(line, reason): nothing after this line of the file can be understood."""


def _read_file(path: str, report: Report) -> Iterator[tuple[int, dict]]:
    """(line, record) of one file. An error that ends the reading is reported; the records before it are kept.

    The functions below yield (line, value). Where a value cannot be read they yield a DataError in its place.
    """
    opened = gzip.open if path.lower().endswith(".gz") else open
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    line = None
    read = {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}.get(suffix, _read_jsonl)
    try:
        with opened(path, "rb") as file:
            for line, record in read(file):
                if isinstance(record, DataError):
                    report.add(path, line, str(record))
                elif not isinstance(record, dict):
                    kind = JSON_TYPES.get(type(record), "number")
                    report.add(path, line, f"a JSON {kind} where an object {{...}} is expected")
                else:
                    yield line, record
    except (EOFError, zlib.error, gzip.BadGzipFile):
        report.add(path, line, "the gzip file is damaged or ends early; nothing after this line was read")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or reason_of(error)})") from None
    except _Stop as stop:
        report.add(path, stop.args[0], f"{stop.args[1]}; nothing after this line was read")


def _lines(file) -> Iterator[tuple[int, bytes | DataError]]:
    """(number, bytes) of each line. Only \\n ends a line: str.splitlines would also cut a text at U+2028."""
    lines = iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b"")
    for number, line in enumerate(lines, 1):
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise _Stop(1, "the file is UTF-16; save it as UTF-8")
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_RECORD_BYTES)
            line = DataError(_too_long("line"))
        yield number, line


# --- JSON ---------------------------------------------------------------------------------------------------


def _read_jsonl(file) -> Iterator[tuple[int, object]]:
    for number, line in _lines(file):
        if isinstance(line, DataError):
            yield number, line
        elif line.strip():  # a blank line is no mistake
            yield number, parse_json(line)


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Of two equal keys json would keep the last one, but nobody knows which one was meant."""
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:20]!r} twice in one object")
        result[key] = value
    return result


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str | bytes) -> object:
    """The JSON value in a text, or a DataError that says why there is none."""
    try:
        if isinstance(text, bytes):  # If `cat` joined several files, each may have brought a byte order mark.
            text = text.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
        value = DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # perhaps half a character (\ud83d): no tokenizer knows it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        return DataError(reason_of(error))


def _too_long(what: str) -> str:
    return f"the {what} is longer than {MAX_RECORD_BYTES >> 20} MiB; cut it into several records"


def reason_of(error: Exception) -> str:
    """What an error says, in one line for a person."""
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x} at column {error.start + 1})"
    if isinstance(error, UnicodeEncodeError):
        return "holds half of a surrogate pair, which is no character"
    if isinstance(error, csv.Error):
        return f"not valid CSV ({str(error).split(' - ')[0]}): a quote not closed, or not doubled in a cell"
    return str(error).split("\n")[0]  # such as an integer of 5,000 digits


def keys_of(record: dict) -> str:
    """For a complaint: "the keys 'id', 'question'", in one short line whatever the keys are."""
    if not record:
        return "nothing"
    keys = [repr(str(key)[:20]) for key in record]
    return f"the keys {', '.join(keys[:6])}" + (", ..." if len(keys) > 6 else "")


def _read_json(file) -> Iterator[tuple[int, object]]:
    """A .json file: JSONL when its first line is a whole object, else an array or a sequence of values."""
    _, first = next(_lines(file), (1, b""))
    file.seek(0)
    if isinstance(first, bytes) and first.lstrip().startswith(b"{") and isinstance(parse_json(first), dict):
        yield from _read_jsonl(file)
        return
    source = _JSONSource(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    in_array = source.next_character() == "["
    if in_array:
        source.move_to(source.position + 1)
    while character := source.next_character():
        if in_array and character == "]":
            in_array = False
            source.move_to(source.position + 1)
        else:
            yield source.line, source.next_value()
    if in_array:
        raise _Stop(source.line, "the JSON array is not closed: the file seems cut off")


class _JSONSource:
    """The JSON values in a text file, one after the other, each decoded out of a small buffer."""

    def __init__(self, file):
        self.file, self.buffer = file, ""
        self.position, self.line = 0, 1  # of the next character: its place in the buffer, its line

    def move_to(self, position: int):
        self.line += self.buffer.count("\n", self.position, position)
        self.position = position

    def read_more(self) -> bool:
        """Replaces what is used of the buffer by new text. False at the end of the file. Raises _Stop."""
        rest = self.buffer[self.position :]
        if len(rest) >= MAX_RECORD_BYTES:
            raise _Stop(self.line, _too_long("value, or what follows an error in it,"))
        try:
            new = self.file.read(max(JSON_BUFFER_CHARACTERS, len(rest)))
        except UnicodeDecodeError:
            raise _Stop(self.line, "not valid UTF-8 somewhere after this") from None
        self.buffer, self.position = rest + new, 0
        return bool(new)

    def next_character(self) -> str:
        """The first character after blanks and commas, which are passed over; "" at the end of the file."""
        while True:
            self.move_to(JSON_GAP.match(self.buffer, self.position).end())
            if self.position < len(self.buffer) or not self.read_more():
                return self.buffer[self.position : self.position + 1]

    def next_value(self) -> object:
        """The value that begins here, or a DataError that says why it cannot be used. Raises _Stop."""
        while True:
            try:
                _, end = DECODER.raw_decode(self.buffer, self.position)
                break
            except (ValueError, RecursionError) as error:
                # Perhaps the value only goes on beyond the buffer. Then we read on, twice as far each time.
                if not isinstance(error, json.JSONDecodeError) or not self.read_more():
                    raise _Stop(self.line, reason_of(error)) from None
        text = self.buffer[self.position : end]
        self.move_to(end)
        return parse_json(text)


# --- CSV and Parquet ----------------------------------------------------------------------------------------


def _read_csv(file) -> Iterator[tuple[int, object]]:
    rows = _csv_rows(file)
    line, _, names = next(rows, (1, 1, []))  # Without these names nothing can be made of the other rows.
    if isinstance(names, DataError):
        raise _Stop(line, str(names))
    if len(set(names)) < len(names):
        raise _Stop(line, "two columns of the same name")
    for line, last_line, row in rows:
        if isinstance(row, DataError):
            yield line, row
        elif len(row) == len(names):
            yield line, dict(zip(names, row, strict=True))
        else:
            more_or_fewer = "more" if len(row) > len(names) else "fewer"
            end = f" (its last line is {last_line})" if last_line > line else ""
            yield line, DataError(f"{more_or_fewer} fields than the first row has names{end}")


def _csv_rows(file) -> Iterator[tuple[int, int, list[str] | DataError]]:
    """(first line, last line, fields or what is wrong with them) of each row that is not blank.

    Where a quote is not closed, csv.reader makes one row of all lines up to some later quote, or up to the
    end. Such a row costs us its first line alone: the others are read again, as rows of their own.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines, first, read_again = _CSVLines(file), 1, 0  # read_again: characters so far
    while True:
        lines.row, lines.characters = [], 0
        try:
            fields = next(csv.reader(lines, strict=True))
            "".join(fields).encode("utf-8")
        except StopIteration:
            return
        except UnicodeEncodeError:
            fields = DataError("not valid UTF-8")
        except (DataError, csv.Error) as error:
            fields = DataError(reason_of(error))
            read_again += lines.characters
            lines.again += reversed(lines.row[1:])
            del lines.row[1:]
        if fields:
            yield first, first + len(lines.row) - 1, fields
        # Each of the rows that are read again may have 16 MiB, and every line may begin one.
        if read_again > MAX_CHARACTERS_READ_AGAIN:
            raise _Stop(first, "too many quotes that are not closed")
        first += len(lines.row)


class _CSVLines(Iterator):
    """The lines of a .csv file for csv.reader. It keeps those of the present row, which can be read again."""

    def __init__(self, file):
        self.lines, self.row, self.characters = _lines(file), [], 0  # characters: of the row so far
        self.again = []  # lines to be read again, the next one last

    def __next__(self) -> str:
        line = self.again.pop() if self.again else next(self.lines)[1]
        if isinstance(line, bytes):  # A wrong byte spoils its row, and not the file.
            line = line.decode("utf-8", "surrogateescape")
        self.row.append(line)
        if isinstance(line, DataError):  # The line is too long.
            raise line
        self.characters += len(line)
        if self.characters > MAX_RECORD_BYTES:
            raise DataError(_too_long("row") + ", or close its quote")
        return line


def _read_parquet(file) -> Iterator[tuple[int, object]]:
    """Rows of a Parquet file, numbered from 1."""
    try:
        import pyarrow.parquet  # not in requirements.txt: 40 MB for a format that few need
    except ImportError:
        raise DataError(f"{file.name}: .parquet needs `pip install pyarrow`; or convert to .jsonl") from None
    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                row += 1
                # A prompt cannot hold pictures and dates. Here they become None, for later they would fail.
                yield row, json.loads(json.dumps(record, default=lambda value: None))
    except (ValueError, NotImplementedError) as error:  # pyarrow's own errors are ValueErrors
        raise _Stop(row + 1, f"not valid Parquet ({reason_of(error)})") from None
