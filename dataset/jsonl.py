"""Records out of data files of any size, with a line number for every complaint.

Formats: .jsonl (one JSON object a line; also what any other ending is read as), .json (an array of objects,
objects one after the other, or JSONL under another name), .csv (first row: the field names), each also as
.gz, and .parquet (needs pyarrow). Files are streamed: memory does not grow with their size.

A user's file is never trusted to be right. What cannot be read becomes one line such as `data.jsonl:17: not
valid JSON (Expecting ',' delimiter, column 9)`: counted, the first few shown, skipped, or fatal when strict.
"""

import csv
import gzip
import io
import json
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

BOM = b"\xef\xbb\xbf"  # the byte order mark that Windows editors put before UTF-8
MAX_LINE = 16 << 20  # bytes of one record: tokenising 16 MiB at once takes about 2 GB of memory
MAX_READ_AGAIN = 64 * MAX_LINE  # bytes of a .csv file that wrong quotes may make us read twice


class DataError(ValueError):
    """A mistake in the user's data, told in one line: what is wrong, where, what to do."""


class Report:
    """Counts what is wrong with the data, shows the first few of each kind on stderr; fatal when strict."""

    def __init__(self, strict: bool = False, shown: int = 3):
        self.strict, self.shown = strict, shown
        self.counts: dict[str, int] = {}  # kind of problem -> how many
        self.examples: list[str] = []  # the lines that were shown
        self.first: dict[str, str] = {}  # path -> its first problem

    def add(self, path, line: int | None, reason: str, kind: str = "bad lines skipped"):
        """Raises DataError when strict."""
        message = f"{path}:{line}: {reason}" if line else f"{path}: {reason}"
        if self.strict:
            raise DataError(f"{message} (fatal with --strict)")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(str(path), message)
        if self.counts[kind] <= self.shown:
            self.examples.append(message)
            print(f"warning: {message}", file=sys.stderr)

    def summary(self) -> str:
        """Such as "bad lines skipped: 12, samples over 512 tokens cut: 3"; empty when all was well."""
        return ", ".join(f"{kind}: {count:,}" for kind, count in self.counts.items())


Record = tuple[str, int, dict]  # (path, line number, record)


def read_records(paths, strict: bool = False, report: Report | None = None) -> Iterator[Record]:
    """Yields (path, line_number, record) for every record of one file or several, in order.

    Problems go to `report`, which then also decides what is fatal; without one they are shown here, with a
    summary at the end. Raises DataError for a file that is missing, empty, unreadable or without any record.
    """
    paths = check_paths(paths)  # all of them first: not an hour later, when the second file's turn comes
    own_report = report is None
    report = Report(strict) if own_report else report
    for path in paths:
        any_record = False
        for line, record in _read_file(path, report):
            any_record = True
            yield path, line, record
        if not any_record:
            raise nothing_usable(path, report)
    if own_report and report.counts:
        print(f"warning: {report.summary()}", file=sys.stderr)


def nothing_usable(path: str, report: Report) -> DataError:
    first = report.first.get(path, "it holds only blank lines").removeprefix(f"{path}:")
    first = f"line {first}" if first[:1].isdigit() else first
    return DataError(f"{path}: no usable record in it (first problem: {first.strip()})")


def check_paths(paths) -> list[str]:
    """One path or several, as a list of strings. Raises DataError for what is missing, no file or empty."""
    paths = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not paths:
        raise DataError("no data file was given")
    for path in paths:
        try:
            found = Path(path).stat()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise DataError(f"{path}: {reason}") from None
        if stat.S_ISDIR(found.st_mode):
            raise DataError(f"{path}: is a folder; give the data files in it")
        if not stat.S_ISREG(found.st_mode):  # opening a pipe may wait for ever; /dev/zero never ends
            raise DataError(f"{path}: is a pipe or a device; save what it gives as a file first")
        if found.st_size == 0:
            raise DataError(f"{path}: the file is empty")
    return paths


def _read_file(path: str, report: Report) -> Iterator[tuple[int, dict]]:
    """(line, record) of one file. What stops the reading half-way is reported; what came before is kept."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    gzipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if gzipped else suffixes)[-1:]
    line = None
    try:
        if kind == [".parquet"]:
            reader = _read_parquet(path)
        else:
            reader = {(".json",): _read_json, (".csv",): _read_csv}.get(tuple(kind), _read_jsonl)
            file = gzip.open(path, "rb") if gzipped else open(path, "rb")
            reader = reader(file)
        for line, record in reader:
            if isinstance(record, DataError):
                report.add(path, line, str(record))
            elif not isinstance(record, dict):
                report.add(path, line, f"a JSON {_json_type(record)} where an object {{...}} is expected")
            else:
                yield line, record
    except (EOFError, zlib.error, gzip.BadGzipFile):
        report.add(path, line, "the gzip file is damaged or ends early; nothing after this line was read")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or _reason(error)})") from None
    except _Stop as error:
        report.add(path, error.line, f"{error}; nothing after this line was read")


class _Stop(Exception):
    """The rest of the file cannot be made sense of."""

    def __init__(self, line: int, reason: str):
        super().__init__(reason)
        self.line = line


def _read_jsonl(file) -> Iterator[tuple[int, object]]:
    with file:
        for line, raw in _lines(file):
            if isinstance(raw, DataError):
                yield line, raw
            elif raw.strip():  # blank lines are nobody's mistake
                yield line, _parse(raw)


def _lines(file) -> Iterator[tuple[int, object]]:
    """(number, bytes). Only \\n ends a line: str.splitlines would also cut at U+2028 inside a JSON string."""
    line = 0
    while raw := file.readline(MAX_LINE + 1):
        line += 1
        if line == 1:
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise _Stop(1, "the file is UTF-16; save it as UTF-8")
            raw = raw.removeprefix(BOM)
        if len(raw) > MAX_LINE:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE)
            raw = DataError(_too_long("line"))
        yield line, raw


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. json would keep the last of two equal keys: which one was meant, nobody knows."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:20]!r} twice in one object")
    return result


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(raw: bytes) -> object:
    """The JSON value of a line, or a DataError that says why there is none."""
    try:
        # Each file that `cat` joined may have brought its own byte order mark.
        record = DECODER.decode(raw.removeprefix(BOM).decode("utf-8"))
        if b"\\ud" in raw or b"\\uD" in raw:
            check_unicode(record)
        return record
    except UnicodeDecodeError as error:
        return DataError(f"not valid UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1})")
    except (ValueError, RecursionError) as error:
        return DataError(_reason(error))


def check_unicode(value: object):
    """Raises ValueError where JSON spelled half a character ("\\ud83d" alone): no tokenizer can encode it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None


def _too_long(what: str) -> str:
    return f"the {what} is longer than {MAX_LINE >> 20} MiB; cut it into several records"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    return str(error).split("\n")[0]  # such as an integer of 5,000 digits


def keys_of(record: dict) -> str:
    """For a complaint: "the keys 'id', 'question'", in one short line whatever the keys are."""
    keys = [repr(str(key)[:20]) for key in record]
    return f"the keys {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}" if keys else "nothing"


def _json_type(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _read_json(file) -> Iterator[tuple[int, object]]:
    """A .json file: JSONL when its first line is a whole object, else an array or a sequence of values."""
    with file:
        _, first = next(_lines(file), (1, b""))
        file.seek(0)
        if isinstance(first, bytes) and first.lstrip().startswith(b"{") and isinstance(_parse(first), dict):
            yield from _read_jsonl(file)
        else:
            yield from _json_values(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))


_GAP = re.compile(r"[ \t\r\n,]*")


def _json_values(file) -> Iterator[tuple[int, object]]:
    """The values of a JSON array, or of a sequence of values, each decoded out of a small buffer."""
    decode = DECODER.raw_decode
    step = small_step = 1 << 18
    text, at, line = "", 0, 1
    in_array, more = None, True  # nothing known yet; the file may hold more text

    def fill():
        nonlocal text, at, more
        try:
            new = file.read(step)
        except UnicodeDecodeError:
            raise _Stop(line, "not valid UTF-8 somewhere after this") from None
        text, at, more = text[at:] + new, 0, bool(new)

    while True:
        end = _GAP.match(text, at).end()
        line += text.count("\n", at, end)
        at = end
        if at == len(text):
            if not more:
                break
            fill()
        elif in_array is None and text[at] == "[":
            in_array, at = True, at + 1
        elif in_array and text[at] == "]":
            in_array, at = False, at + 1
        else:
            in_array = bool(in_array)
            try:
                value, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                # perhaps the value only goes on beyond the buffer: read on, in growing steps
                if more and isinstance(error, json.JSONDecodeError):
                    if len(text) - at < MAX_LINE:
                        step *= 2
                        fill()
                        continue
                    raise _Stop(line, _too_long("value, or what follows an error in it,")) from None
                raise _Stop(line, _reason(error)) from None
            try:
                check_unicode(value)
            except (ValueError, RecursionError) as error:
                value = DataError(_reason(error))
            yield line, value
            line += text.count("\n", at, end)
            at, step = end, small_step
    if in_array:
        raise _Stop(line, "the JSON array is not closed: the file seems cut off")


def _read_csv(file) -> Iterator[tuple[int, object]]:
    names = None
    with file:
        for line, last, row in _csv_rows(file):
            if names is None:  # the first row; without it nothing can be made of the others
                if isinstance(row, DataError):
                    raise _Stop(line, str(row))
                if len(set(row)) < len(row):
                    raise _Stop(line, "two columns of the same name")
                names = row
            elif isinstance(row, DataError):
                yield line, row
            elif len(row) != len(names):
                reason = f"{'more' if len(row) > len(names) else 'fewer'} fields than the first row has names"
                yield line, DataError(reason + f" (its last line is {last})" * (last > line))
            else:
                yield line, dict(zip(names, row, strict=True))


def _csv_rows(file) -> Iterator[tuple[int, int, list[str] | DataError]]:
    """(first line, last line, fields or what is wrong with them) of each row that is not blank.

    A quote that nobody closed makes one row of all that follows, up to some later quote or the end. So a row
    with wrong quotes costs its first line alone: those after it are read again, as rows of their own.
    """
    csv.field_size_limit(MAX_LINE)
    lines, again, read_again = _lines(file), [], 0  # again: the lines to be read again, the next one last
    row, size = [], 0  # the (number, text) of the lines of this row, and their length

    def texts():
        nonlocal size
        while line := again.pop() if again else next(lines, None):
            row.append(line)
            number, text = line
            if isinstance(text, DataError):  # too long a line
                raise text
            if isinstance(text, bytes):  # a wrong byte shall spoil its row, not the file
                text = text.decode("utf-8", "surrogateescape")
                row[-1] = number, text
            size += len(text)
            if size > MAX_LINE:
                raise DataError(_too_long("row") + ", or close its quote")
            yield text

    while True:
        try:
            for fields in csv.reader(texts(), strict=True):
                try:
                    "".join(fields).encode("utf-8")
                except UnicodeEncodeError:
                    fields = DataError("not valid UTF-8")
                if fields:
                    yield row[0][0], row[-1][0], fields
                row, size = [], 0
            return
        except (csv.Error, DataError) as error:
            reason = str(error).split(" - ")[0]
            if isinstance(error, csv.Error):
                reason = f"not valid CSV ({reason}): a quote not closed, or one in a cell not written twice"
            yield row[0][0], row[-1][0], DataError(reason)
            again += row[:0:-1]
            read_again += size
            if read_again > MAX_READ_AGAIN:  # each such row may be 16 MiB, and every line may begin one
                raise _Stop(row[0][0], "too many quotes that are not closed") from None
            row, size = [], 0


def _read_parquet(path: str) -> Iterator[tuple[int, object]]:
    """Rows of a Parquet file, numbered from 1."""
    try:
        import pyarrow.parquet  # not in requirements.txt: 40 MB for a format that few need
    except ImportError:
        raise DataError(f"{path}: .parquet needs `pip install pyarrow`; or convert to .jsonl") from None
    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                row += 1
                # Pictures and dates are nothing that a prompt can hold; left in, they would fail in it later.
                yield row, json.loads(json.dumps(record, default=lambda value: None))
    except (ValueError, NotImplementedError) as error:  # pyarrow's own errors are ValueErrors
        raise _Stop(row + 1, f"not valid Parquet ({_reason(error)})") from None
