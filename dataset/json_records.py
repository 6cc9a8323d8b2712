"""Records in JSON files: one a line, in an array, in columns, in a sequence. A reader may skip this file.

The content decides how a file is read, and not its name. A file is JSONL if one of its first lines is a whole
object or a whole list of messages; a bad line then costs that line. Any other file is read as values, one
after the other or in an array. A value that cannot be read ends where its brackets close, or where a value
that begins with the same key follows, whichever comes first. So it costs that value alone.

    {"text": "one"}                                     a record
    [{"role": "user", ...}, ...]                        a record: a conversation
    [{"text": "one"}, {"text": "two"}]                  records, also in a file named .jsonl
    {"data": [{"text": "one"}, ...]}                    records in the only list of a wrapper
    {"text": {"0": "one", "1": "two"}}                  records in columns, as pandas writes them
"""

import ast
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from functools import partial

from common.errors import DataError
from dataset.keys import NAMES, NO_MEANING, RECORD_KEYS

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows editors put these bytes before UTF-8
MAX_RECORD_BYTES = 16 << 20  # (characters in .json, .csv); to tokenise 16 MiB at once takes 2 GB of memory
MAX_PYTHON_CHARACTERS = 1 << 17  # of a Python literal in a cell; Python's own parser is slow and takes memory
HEAD_BYTES = 1 << 18  # from which the form of a file is guessed
JSON_BUFFER_CHARACTERS = 1 << 18  # of a .json file, read at once
JSON_TYPES = {list: "list", str: "string", bool: "boolean", type(None): "null"}
JSON_GAP = re.compile(r"[ \t\r\n,\ufeff]*")  # what may stand between two values
JSON_BRACKETS = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[\[{]|[\]}]')  # or a whole string, which a line end closes
CONVERSATION_BEGINS = re.compile(r'\[\s*\{\s*"(role|from|content|value)"\s*:')
OPENING = re.compile(r'([\[{\s]{1,20})("[^"\\\n]*")')  # the brackets and the first key of a value
NOT_ASCII = re.compile(rb"[\x80-\xff]")
CHINESE = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")


class Stop(Exception):
    """(line, reason): nothing after this line of the file can be understood."""


def head_of(file) -> bytes:
    """The beginning of a file, which is then read from its beginning again. Raises Stop for UTF-16."""
    head = b""
    try:
        while len(head) < HEAD_BYTES and (more := file.read1(HEAD_BYTES)):
            head += more
    except (EOFError, zlib.error, gzip.BadGzipFile):
        pass  # Damaged further on: what comes before is still read, and the damage then reported.
    file.seek(0)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:2] and head.strip(b"\0"):
        raise Stop(1, "the file is UTF-16; save it as UTF-8")
    return head.removeprefix(BYTE_ORDER_MARK)


def lines_of(file) -> Iterator[tuple[int, bytes | DataError]]:
    """(number, bytes) of each line. Only \\n ends a line: str.splitlines would also cut a text at U+2028.

    If a file has no \\n but \\r, as old Macs wrote it, then \\r ends a line.
    """
    head, end, readline = head_of(file), b"\n", file.readline
    if b"\r" in head and b"\n" not in head:
        end, readline = b"\r", partial(_read_mac_line, io.TextIOWrapper(file, "latin-1", newline="\r"))
    for number, line in enumerate(iter(lambda: readline(MAX_RECORD_BYTES + 1), b""), 1):
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(end):
                line = readline(MAX_RECORD_BYTES)
            line = DataError(too_long("line"))
        yield number, line


def _read_mac_line(file, size: int) -> bytes:
    return file.readline(size).encode("latin-1")  # which keeps every byte


def too_long(what: str) -> str:
    return f"the {what} is longer than {MAX_RECORD_BYTES >> 20} MiB; cut it into several records"


# --- text -> value ------------------------------------------------------------------------------------------


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


def parse_cell(text: str) -> object:
    """The JSON value in a text, or the Python literal: pandas writes lists as [{'role': 'user', ...}].

    A DataError where there is neither.
    """
    value = parse_json(text)
    if not isinstance(value, DataError) or "'" not in text or len(text) > MAX_PYTHON_CHARACTERS:
        return value
    try:
        # JSON has no sets and no bytes. With them this raises TypeError.
        return parse_json(json.dumps(ast.literal_eval(text.strip())))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return value


def parse_field(text: str, where: str) -> object:
    """`parse_cell` of a field of a record. Raises DataError, which says where the text stands."""
    value = parse_cell(text)
    if isinstance(value, DataError):
        raise DataError(f"{where}: {value}")
    return value


def reason_of(error: Exception) -> str:
    """What an error says, in one line for a person."""
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        place = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
        return f"not valid UTF-8 ({place}){looks_like(error.object)}"
    if isinstance(error, UnicodeEncodeError):
        if "\udc80" <= error.object[error.start] <= "\udcff":  # a byte that was no UTF-8
            return f"not valid UTF-8{looks_like(error.object.encode('utf-8', 'surrogateescape'))}"
        return "holds half of a surrogate pair, which is no character"
    return str(error).split("\n")[0]  # such as an integer of 5,000 digits


def looks_like(data: bytes) -> str:
    """A guess at the encoding of what is not UTF-8, to end a complaint with. Empty if there is none."""
    not_ascii = len(NOT_ASCII.findall(data))
    still_utf8 = len(NOT_ASCII.findall(data.decode("utf-8", "ignore").encode("utf-8")))
    if still_utf8 > not_ascii / 2:  # a damaged text in UTF-8, which may look like GBK, too
        return ""
    try:
        is_chinese = len(CHINESE.findall(data.decode("gb18030"))) > 1
    except UnicodeDecodeError:
        return ""
    return "; it looks like GBK: save the file as UTF-8" if is_chinese else ""


# --- value -> records ---------------------------------------------------------------------------------------


def is_conversation(value: object) -> bool:
    """Whether it is a list of messages."""
    return (isinstance(value, list) and bool(value)
            and all(isinstance(item, dict) and any(name in item for name in NAMES["role"]) for item in value))


def rows_of(columns: dict[str, list]) -> list[dict] | None:
    """{"a": [1, 2], "b": [3, 4]} -> [{"a": 1, "b": 3}, {"a": 2, "b": 4}]. None for anything else."""
    lists = list(columns.values())
    if not lists or not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def without_nulls(value: object, only: str | None = None) -> object:
    """The value without the keys that hold null, at any depth. only: the one key that is left out so.

    Where objects of different keys become rows of one table, each gets the keys of all, filled with null.
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner, only) for key, inner in value.items()
                if inner is not None or only not in (None, key)}
    return [without_nulls(inner, only) for inner in value] if isinstance(value, list) else value


def records_in(value: object) -> list:
    """The records that a JSON value holds, each a dict, or a DataError in its place."""
    if is_conversation(value):
        return [{"messages": value}]
    if isinstance(value, list) and value and all(isinstance(item, dict | list) for item in value):
        return [{"messages": item} if is_conversation(item) else _as_record(item) for item in value]
    return _rows_in(value) if isinstance(value, dict) else [_as_record(value)]


def _as_record(value: object) -> dict | DataError:
    if isinstance(value, dict | DataError):
        return value
    return DataError(f"a JSON {JSON_TYPES.get(type(value), 'number')} where an object {{...}} is expected")


def _rows_in(value: dict) -> list:
    """The records of an object: itself, or the rows of a table that was saved as one object."""
    columns = list(value.values())
    if columns and all(isinstance(column, dict) and column for column in columns):
        if all(map(str.isdigit, value)):  # {"0": {"text": "one"}, ...}: pandas, orient="index"
            return columns
        rows = columns[0].keys()  # orient="columns", which is what pandas does unless told otherwise
        if all(map(str.isdigit, rows)) and all(column.keys() == rows for column in columns):
            return rows_of({name: list(column.values()) for name, column in value.items()})
    names, rows = value.get("columns"), value.get("data")
    if value.keys() <= {"columns", "index", "data"} and isinstance(names, list) and isinstance(rows, list):
        if rows and all(isinstance(name, str) for name in names):  # orient="split"
            return [dict(zip(names, row, strict=True)) if isinstance(row, list) and len(row) == len(names)
                    else DataError("a row that does not fit the columns") for row in rows]  # fmt: skip
    if isinstance(value.get("text", value.get("instruction")), list) and (rows := rows_of(value)):
        return rows  # orient="list"
    wrapped = [key for key in value if key not in NO_MEANING]
    inner = value[wrapped[0]] if len(wrapped) == 1 and wrapped[0] not in RECORD_KEYS else None
    is_wrapper = isinstance(inner, list) and inner and not is_conversation(inner)
    return records_in(inner) if is_wrapper else [value]


# --- files --------------------------------------------------------------------------------------------------


def read_json(file) -> Iterator[tuple[int, dict | DataError]]:
    """(line, record or what is wrong with it) for each record of a JSON file of any form. Raises Stop."""
    values = _read_lines if _is_jsonl(head_of(file)) else _read_values
    for number, value in values(file):
        for record in records_in(value):
            yield number, record


def _is_jsonl(head: bytes) -> bool:
    """Whether a file that begins so has a record on each line."""
    first = None  # the first line that is neither blank nor a comment
    for line in head.splitlines():  # of bytes: at \n and \r alone
        if not line.strip() or line.startswith((b"//", b"#")):
            continue
        first = line if first is None else first
        if first.strip() == b"[":
            return False
        value = parse_json(line) if line.startswith((b"{", b"[")) else None
        # In an array of one element a line the last element has no comma after it, and is a whole object.
        if isinstance(value, dict) and value and first.startswith(b"{") or is_conversation(value):
            return True
    return first is None or not first.lstrip().startswith((b"{", b"["))


def _read_lines(file) -> Iterator[tuple[int, object]]:
    for number, line in lines_of(file):
        if isinstance(line, DataError):
            yield number, line
        elif line.strip():  # a blank line is no mistake
            yield number, parse_json(line)


def _read_values(file) -> Iterator[tuple[int, object]]:
    """Values one after the other, or in an array, or in several arrays."""
    # A wrong byte spoils its value, and not the file.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    source, in_array = _JSONSource(text), False
    while character := source.next_character():
        if in_array and character == "]":
            in_array = False
            source.move_to(source.position + 1)
        elif not in_array and character == "[" and not source.conversation_begins():
            in_array = True
            source.move_to(source.position + 1)
        else:
            yield source.line, source.next_value()
    if in_array:
        raise Stop(source.line, "the JSON array is not closed: the file seems cut off")


class _JSONSource:
    """The JSON values in a text file, one after the other, each decoded out of a small buffer."""

    def __init__(self, file):
        self.file, self.buffer = file, ""
        self.position, self.line = 0, 1  # of the next character: its place in the buffer, its line
        self.opening = None  # how the last value that could be read began

    def move_to(self, position: int):
        self.line += self.buffer.count("\n", self.position, position)
        self.position = position

    def read_more(self) -> bool:
        """Replaces what is used of the buffer by new text. False at the end of the file. Raises Stop."""
        rest = self.buffer[self.position :]
        if len(rest) >= MAX_RECORD_BYTES:
            raise Stop(self.line, too_long("value, or what follows an error in it,"))
        new = self.file.read(max(JSON_BUFFER_CHARACTERS, len(rest)))
        self.buffer, self.position = rest + new, 0
        return bool(new)

    def next_character(self) -> str:
        """The first character after blanks and commas, which are passed over; "" at the end of the file."""
        while True:
            self.move_to(JSON_GAP.match(self.buffer, self.position).end())
            if self.position < len(self.buffer) or not self.read_more():
                return self.buffer[self.position : self.position + 1]

    def conversation_begins(self) -> bool:
        """Whether the list that begins here is one of messages."""
        if len(self.buffer) - self.position < 100:  # room for "[{" and a key
            self.read_more()
        return bool(CONVERSATION_BEGINS.match(self.buffer, self.position))

    def next_value(self) -> object:
        """The value that begins here, or a DataError that says why it cannot be used. Raises Stop."""
        while True:
            try:
                _, end = DECODER.raw_decode(self.buffer, self.position)
                break
            except (ValueError, RecursionError) as error:
                # Perhaps the value only goes on beyond the buffer. Then we read on, twice as far each time.
                if not self._goes_on(error) or not self.read_more():
                    reason = reason_of(error)
                    self._skip_value(reason)
                    return DataError(reason)
        text = self.buffer[self.position : end]
        self.opening = opening_of(text, 0, len(text))
        self.move_to(end)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return DataError(reason_of(error))
        return parse_json(text)

    def _goes_on(self, error: Exception) -> bool:
        """Whether the error may only mean that the buffer ends within the value."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        near_the_end = error.pos > len(self.buffer) - 12  # where half a word or half a \\ud83d may stand
        return near_the_end or error.msg.startswith("Unterminated string")

    def _skip_value(self, reason: str):
        """Moves behind a value that cannot be read. Raises Stop where its end is not found."""
        line, reach = self.line, 1 << 12
        while (end := end_of_value(self.buffer, self.position, self.position + reach, self.opening)) is None:
            if self.position + reach >= len(self.buffer) and not self.read_more():
                raise Stop(line, reason)
            reach *= 2
        self.move_to(end)


def end_of_value(text: str, start: int, limit: int, opening: str | None = None) -> int | None:
    """Where a value ends that begins at `start` and cannot be read. None: not before `limit`.

    It ends where its brackets close, or where a value follows that begins like this one, or like the one
    before it (`opening`): a quote that is missing makes text of brackets, and brackets of text.
    """
    if text[start] not in "[{":  # a word, which ends where a value may begin
        found = re.compile(r"[,\n\]]").search(text, start + 1, limit)
        return found.start() if found else None
    end, depth = limit, 0
    for found in JSON_BRACKETS.finditer(text, start, limit):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == 0:
            end = found.end()
            break
    openings = {opening, opening_of(text, start, limit)} - {None}
    if openings:
        sibling = re.compile(rf"[,\n]\s*(?={'|'.join(sorted(openings))})")
        if found := sibling.search(text, start + 1, end):
            return found.end()
    return end if depth == 0 and end > start else None


def opening_of(text: str, start: int, limit: int) -> str | None:
    """A pattern for values that begin with the same brackets and key as this one; None if it has no key."""
    found = OPENING.match(text, start, limit)
    if not found:
        return None
    brackets = r"\s*".join(map(re.escape, "".join(found[1].split())))
    return rf"{brackets}\s*{re.escape(found[2])}\s*:"
