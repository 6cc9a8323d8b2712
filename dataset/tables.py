"""Records in tables: CSV, TSV and Parquet. A reader may skip this file.

What stands between the cells of a row is found in the first row: a comma, a semicolon (as Excel writes in
many countries), a tab or a bar. An unnamed column and pandas' row numbers are columns like others.
"""

import csv
import json
import re
from collections.abc import Iterator

from common.errors import DataError
from dataset.json_records import MAX_RECORD_BYTES, Stop, head_of, lines_of, reason_of, too_long, without_nulls

MAX_CHARACTERS_READ_AGAIN = 64 * MAX_RECORD_BYTES  # of a .csv file, because of wrong quotes
NOT_A_NUMBER = ("nan", "NaN")  # what pandas writes for an empty cell of a table that was turned into text
SEP_LINE = re.compile(rb"sep=([,;|:\t])[\r\n]+")  # Excel's first line: what stands between the cells


def read_csv(file) -> Iterator[tuple[int, object]]:
    """(line, record or what is wrong with it) for each row of a .csv or .tsv file. Raises Stop."""
    head = head_of(file)
    sep_line = SEP_LINE.match(head)
    first_row = head[sep_line.end() if sep_line else 0:].splitlines()[:1]
    common = max(b",", b";", b"\t", b"|", key=b"".join(first_row).count)  # of two equals the first
    rows = _csv_rows(file, (sep_line[1] if sep_line else common).decode("latin-1"))
    if sep_line:
        next(rows)
    line, _, names = next(rows, (1, 1, []))  # Without these names nothing can be made of the other rows.
    if isinstance(names, DataError):
        raise Stop(line, str(names))
    names = [name.strip() for name in names]
    if len(set(names)) < len(names):
        raise Stop(line, "two columns of the same name")
    for line, last_line, row in rows:
        if isinstance(row, DataError):
            yield line, row
        elif len(row) == len(names):
            cells = ("" if cell in NOT_A_NUMBER else cell for cell in row)
            yield line, dict(zip(names, cells, strict=True))
        else:
            more_or_fewer = "more" if len(row) > len(names) else "fewer"
            end = f" (its last line is {last_line})" if last_line > line else ""
            yield line, DataError(f"{more_or_fewer} fields than the first row has names{end}")


def _csv_rows(file, delimiter: str) -> Iterator[tuple[int, int, list[str] | DataError]]:
    """(first line, last line, fields or what is wrong with them) of each row that is not blank.

    Where a quote is not closed, csv.reader makes one row of all lines up to some later quote, or up to the
    end. Such a row costs us its first line alone: the others are read again, as rows of their own.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines, first, read_again = _CSVLines(file), 1, 0  # read_again: characters so far
    while True:
        lines.row, lines.characters = [], 0
        try:
            fields = next(csv.reader(lines, delimiter=delimiter, strict=True))
            "".join(fields).encode("utf-8")
        except StopIteration:
            return
        except UnicodeEncodeError as error:
            fields = DataError(reason_of(error))
        except (DataError, csv.Error) as error:
            fields = DataError(_reason_of_csv(error))
            read_again += lines.characters
            lines.again += reversed(lines.row[1:])
            del lines.row[1:]
        if fields:
            yield first, first + len(lines.row) - 1, fields
        # Each of the rows that are read again may have 16 MiB, and every line may begin one.
        if read_again > MAX_CHARACTERS_READ_AGAIN:
            raise Stop(first, "too many quotes that are not closed")
        first += len(lines.row)


def _reason_of_csv(error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    return f"not valid CSV ({str(error).split(' - ')[0]}): a quote not closed, or not doubled in a cell"


class _CSVLines(Iterator):
    """The lines of a .csv file for csv.reader. It keeps those of the present row, which can be read again."""

    def __init__(self, file):
        self.lines, self.row, self.characters = lines_of(file), [], 0  # characters: of the row so far
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
            raise DataError(too_long("row") + ", or close its quote")
        return line


def read_parquet(file) -> Iterator[tuple[int, object]]:
    """(number, record) of the rows of a Parquet file, numbered from 1. Raises Stop.

    Keys that hold null are left out at every depth: in a table each object has the keys of all objects.
    """
    try:
        import pyarrow.parquet  # not in requirements.txt: 40 MB for a format that few need
    except ImportError:
        raise DataError(f"{file.name}: .parquet needs `pip install pyarrow`; or convert to .jsonl") from None
    row = 0
    try:
        # Unless told so, pyarrow holds a whole group of rows, and some files of many gigabytes are one group.
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        for batch in table.iter_batches(batch_size=1024):
            for record in batch.to_pylist(maps_as_pydicts="strict"):
                row += 1
                yield row, without_nulls(json.loads(json.dumps(record, default=_as_json)))
    except (ValueError, KeyError, NotImplementedError) as error:  # pyarrow's own errors are ValueErrors
        raise Stop(row + 1, f"not valid Parquet ({reason_of(error)})") from None


def _as_json(value: object) -> object:
    """What JSON does not know: bytes, which may be text or a picture; dates; decimal numbers."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"bytes": len(value)}  # This is no text, so a complaint about it can be made.
