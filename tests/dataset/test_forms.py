"""Files of every form that people have: all of their records are read, or what is wrong is named.

One bad element costs itself alone, in JSON of any form; and a file of which most is unusable is refused.
"""

import json
from pathlib import Path

import pytest

from common.errors import DataError
from dataset.json_records import end_of_value, parse_cell
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.messages import to_messages
from dataset.records import Report, read_records

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, it's me"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def read(path) -> tuple[list[tuple[int, dict]], list[str]]:
    """The records with their lines, and the complaints."""
    report = Report(shown=1000)
    records = [(line, record) for _, line, record in read_records(path, report=report)]
    return records, [example.removeprefix(f"{path}:") for example in report.examples]


def texts_of(path) -> tuple[list[str], list[str]]:
    records, complaints = read(path)
    return [record["text"] for _, record in records], complaints


# ---------------------------------------------------------------- JSON


CHATS = [{"messages": [{"role": "user", "content": f"What is {n} + 1?"},
                       {"role": "assistant", "content": str(n + 1)}]} for n in range(20)]  # fmt: skip
LAYOUTS = {
    "one_line": json.dumps(CHATS),
    "one_element_a_line": "[\n" + ",\n".join(map(json.dumps, CHATS)) + "\n]\n",
    "first_on_the_bracket's_line": "[" + ",\n".join(map(json.dumps, CHATS)) + "]",
    "indented": json.dumps(CHATS, indent=2),
    "not_indented": json.dumps(CHATS, indent=0),
    "lines": "\n".join(map(json.dumps, CHATS)),
    "sequence": "\n".join(json.dumps(chat, indent=1) for chat in CHATS),
    "an_array_a_line": "\n".join(json.dumps(CHATS[n : n + 5]) for n in range(0, 20, 5)),
    "conversations_a_line": "\n".join(json.dumps(chat["messages"]) for chat in CHATS),
    "a_list_of_lists": json.dumps([chat["messages"] for chat in CHATS], indent=1),
    "lists_a_line_in_a_list": "[\n" + ",\n".join(json.dumps(chat["messages"]) for chat in CHATS) + "\n]",
    "wrapped": json.dumps({"version": "1.0", "data": CHATS}),
    "wrapped_and_indented": json.dumps({"data": CHATS}, indent=2),
    "columns": json.dumps({"messages": {str(n): chat["messages"] for n, chat in enumerate(CHATS)}}),
    "index": json.dumps({str(n): chat for n, chat in enumerate(CHATS)}),
    "split": json.dumps({"columns": ["messages"], "index": list(range(20)),
                         "data": [[chat["messages"]] for chat in CHATS]}),
}  # fmt: skip


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_json_gives_all_records(tmp_path, layout, ending):
    records, complaints = read(write(tmp_path / f"a.{ending}", LAYOUTS[layout]))
    assert [record for _, record in records] == CHATS and complaints == []


def test_columns_of_strings(tmp_path):
    columns = {"instruction": ["A", "B"], "output": ["x", "y"]}
    rows = [{"instruction": "A", "output": "x"}, {"instruction": "B", "output": "y"}]
    numbered = {key: dict(enumerate(column)) for key, column in columns.items()}
    for name, value in (("a", columns), ("b", numbered)):
        records, _ = read(write(tmp_path / f"{name}.json", json.dumps(value)))
        assert [record for _, record in records] == rows
    pair = {"chosen": CHAT, "rejected": CHAT}  # two lists of the same length, and one record
    assert read(write(tmp_path / "c.json", json.dumps(pair)))[0] == [(1, pair)]


def test_a_wrapper_with_keys_that_mean_something_is_none(tmp_path):
    record = {"system": "Be brief.", "dialog": CHATS}
    assert read(write(tmp_path / "a.json", json.dumps(record)))[0] == [(1, record)]


@pytest.mark.parametrize("value", [
    {"columns": [[1]], "data": [[2]]}, {"columns": ["a"], "data": []}, {"columns": ["a"], "data": [[1, 2]]},
    {"columns": ["a"], "data": [["b"]], "system": "S"}, {"text": []}, {"text": [], "x": []}, {"0": {}},
    {"a": {"0": 1}, "b": {"1": 2}}, {"data": []}, {"data": [1]}, {"data": [[]]}, [[]], [[], {}], [{}], {},
])  # fmt: skip
def test_odd_tables_are_a_record_or_a_complaint(tmp_path, value):
    good = {"text": "one"}
    found, complaints = read(write(tmp_path / "a.jsonl", f"{json.dumps(good)}\n{json.dumps(value)}\n"))
    assert found[0] == (1, good) and len(found) + len(complaints) >= 2


BAD_ELEMENTS = [
    '{"text": two}', '{"text": "two"', '{"text": "two}', '{"text: "two"}', '{"text": "a "quoted" word"}',
    '{"text": "two",}', "{'text': 'two'}", '{"text": "two" "x": 1}', '{"text": "\\q"}', '{"text": ["two"}',
    '{"text": "two", "text": "2"}', '{"text": "\\ud83d"}', '{"text": two, "x": [{}]}', '["two"]', "17",
    "oops", "// two",
]  # fmt: skip


@pytest.mark.parametrize("glue", [",", ", ", ",\n", ",\n  "])
@pytest.mark.parametrize("bad", BAD_ELEMENTS)
def test_a_bad_element_of_an_array_costs_itself_alone(tmp_path, bad, glue):
    elements = ['{"text": "one"}', bad, '{"text": "three"}', '{"text": "four", "n": [1, 2]}']
    for name, file in (("a.json", f"[{glue.join(elements)}]"), ("b.jsonl", f"[\n{glue.join(elements)}\n]")):
        if bad == "// two" and "\n" not in glue:
            continue  # A comment goes to the end of its line.
        texts, complaints = texts_of(write(tmp_path / name, file))
        assert texts == ["one", "three", "four"] and len(complaints) == 1


def test_a_bad_conversation_of_an_array_costs_itself_alone(tmp_path):
    good = json.dumps(CHATS[0])
    without_quotes = good.replace('"user"', "user", 1), good.replace('"What', "What"), good.replace("?", '"')
    for bad in (*without_quotes, good[:-3]):
        records, complaints = read(write(tmp_path / "a.json", f"[{good},{bad},{good},{good}]"))
        assert [record for _, record in records] == [CHATS[0]] * 3 and len(complaints) == 1


@pytest.mark.parametrize("name, content, complaint", [
    ("blank_first.json", '\n{"text": "one"}\n{"text": oops}\n{"text": "two"}\n', "3: not valid"),
    ("blank_first.jsonl", '\n{"text": "one"}\n{"text": oops}\n{"text": "two"}\n', "3: not valid"),
    ("comment.json", '// exported 2026\n{"text": "one"}\n{"text": "two"}\n', "1: not valid JSON"),
    ("comment.jsonl", '# exported 2026\n{"text": "one"}\n{"text": "two"}\n', "1: not valid JSON"),
    ("comment_array.json", '// exported\n[\n{"text": "one"},\n{"text": "two"}\n]', "1: not valid"),
    ("first_bad.json", '{"text": "broken\n{"text": "one"}\n{"text": "two"}\n', "1: not valid"),
    ("first_bad.jsonl", '{"text": "broken\n{"text": "one"}\n{"text": "two"}\n', "1: not valid"),
    ("trailing_comma.json", '[{"text": "one"},{"text": "two"},]', None),
    ("not_closed.json", '[{"text": "one"},{"text": "two"}', "1: the JSON array is not closed"),
    ("wrong_byte.json", b'[{"text": "one"},{"text": "\xff"},{"text": "two"}]', "1: not valid UTF-8"),
    ("mac.jsonl", '{"text": "one"}\r{"text": }\r{"text": "two"}', "2: not valid JSON"),
])  # fmt: skip
def test_one_bad_line_costs_one_record(tmp_path, name, content, complaint):
    found, complaints = texts_of(write(tmp_path / name, content))
    assert found == ["one", "two"] and len(complaints) == bool(complaint)
    assert not complaint or complaints[0].startswith(complaint)


def test_bad_elements_of_a_long_array_take_little_time(tmp_path, monkeypatch):
    """Each of them is looked for only as far as it goes. Reading to the end for each would take minutes."""
    elements = ['{"text": "one", "more": "' + "x" * 200 + '"}', '{"text": "tw}', '{"text": tw}'] * 5_000
    report = Report(shown=0)
    path = write(tmp_path / "a.json", "[" + ",".join(elements) + "]")
    assert sum(1 for _ in read_records(path, report=report)) == 5_000
    assert report.unusable[str(path)] == 10_000


def test_the_end_of_a_value_that_can_not_be_read():
    assert end_of_value('{"a": b}, {"a": 1}', 0, 100) == len('{"a": b}')
    assert end_of_value('{"a": "b}, {"a": 1}', 0, 100) == len('{"a": "b}, ')
    assert end_of_value('{"a": "b}, {"c": 1}', 0, 100) is None
    assert end_of_value('{"a": [{"b": }, {"b": 1}]}, {"a": 1}', 0, 100) == len('{"a": [{"b": }, {"b": 1}]}')
    assert end_of_value("oops, {", 0, 100) == len("oops")


# ---------------------------------------------------------------- tables


ROW = {"instruction": "A; B", "input": "", "output": "x\ny"}


@pytest.mark.parametrize("name, content", [
    ("semicolon.csv", 'instruction;input;output\n"A; B";;"x\ny"\n'),
    ("comma.csv", 'instruction,input,output\nA; B,,"x\ny"\n'),
    ("tabs.tsv", 'instruction\tinput\toutput\nA; B\t\t"x\ny"\n'),
    ("tabs.csv", 'instruction\tinput\toutput\nA; B\t\t"x\ny"\n'),
    ("bar.csv", 'instruction|input|output\nA; B||"x\ny"\n'),
    ("sep.csv", 'sep=,\r\ninstruction,input,output\r\nA; B,,"x\ny"\r\n'),
    ("sep2.csv", '\ufeffsep=;\ninstruction;input;output\n"A; B";;"x\ny"\n'),
    ("spaces.csv", 'instruction, input, output\nA; B,,"x\ny"\n'),
    ("bom.csv", '\ufeffinstruction,input,output\nA; B,,"x\ny"\n'),
])  # fmt: skip
def test_tables_of_every_kind(tmp_path, name, content):
    records, complaints = read(write(tmp_path / name, content))
    assert [record for _, record in records] == [ROW] and complaints == []


@pytest.mark.parametrize("sep", ['"', "\r", "a", "", "\0", "é"])
def test_odd_separators_give_a_complaint(tmp_path, sep):
    with pytest.raises(DataError, match="no usable record"):
        texts_of(write(tmp_path / "a.csv", f"sep={sep}\r\ntext,n\nA,1,\n"))


@pytest.mark.parametrize("name", ["a.xlsx", "a.arrow", "a.jsonl.zip"])
def test_formats_that_are_not_read_are_named(tmp_path, name):
    with pytest.raises(DataError, match="files are not read; save it as"):
        read(write(tmp_path / name, b"PK\x03\x04"))


def test_a_table_of_an_old_mac(tmp_path):
    records, _ = read(write(tmp_path / "a.csv", b"instruction,output\rA,x\rB,y"))
    assert records == [(2, {"instruction": "A", "output": "x"}), (3, {"instruction": "B", "output": "y"})]


def test_cells_with_json_and_with_python_literals(tmp_path):
    for cell in (json.dumps(CHAT), repr(CHAT)):
        quoted = '"' + cell.replace('"', '""') + '"'
        path = write(tmp_path / "a.csv", f",messages\n0,{quoted}\n")
        notes = []
        chats = [to_messages(record, notes.append) for _, record in read(path)[0]]
        assert chats == [(CHAT, None)] and notes == []


@pytest.mark.parametrize("text", ["{1, '2'}", "[b'a']", "[" * 99 + "'", "f('x')", "['a'] * 10**9", "[1, 'a'"])
def test_no_code_is_run_for_a_cell(text):
    assert isinstance(parse_cell(text), DataError)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_gbk_is_named(tmp_path, name):
    records = [{"text": "你好，世界"}, {"text": "好的"}]
    if name == "a.csv":
        content = "text\n" + "\n".join(record["text"] for record in records)
    else:
        content = json.dumps(records, ensure_ascii=False, indent=1) if name == "a.json" else "\n".join(
            json.dumps(record, ensure_ascii=False) for record in records)  # fmt: skip
    with pytest.raises(DataError, match="it looks like GBK: save the file as UTF-8"):
        read(write(tmp_path / name, content.encode("gbk")))
    for encoding in ("utf-16", "utf-16-le"):
        with pytest.raises(DataError, match="UTF-16"):
            read(write(tmp_path / name, content.encode(encoding)))
    damaged = ("好的，世界" * 9).encode()[:-1]  # UTF-8 that was cut off is no GBK
    with pytest.raises(DataError) as error:
        read(write(tmp_path / "b.jsonl", b'{"text": "' + damaged + b'"}'))
    assert "not valid UTF-8" in str(error.value) and "GBK" not in str(error.value)


def test_parquet_of_pandas_pyarrow_and_datasets(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def found(**columns):
        parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
        return [record for _, record in read(tmp_path / "a.parquet")[0]]

    assert found(text=pa.array(["one"], pa.large_string())) == [{"text": "one"}]
    assert found(text=pa.array([b"one"], pa.binary())) == [{"text": "one"}]
    assert found(text=pa.array(["one", "one"]).dictionary_encode()) == [{"text": "one"}] * 2
    assert found(text=["one"], image=pa.array([b"\xff\xd8"])) == [{"text": "one", "image": {"bytes": 2}}]
    assert to_messages(found(messages=[json.dumps(CHAT)])[0]) == (CHAT, None)
    columns = {"role": ["user", "assistant"], "content": [turn["content"] for turn in CHAT]}
    assert to_messages(found(messages=[columns])[0]) == (CHAT, None)
    calls = [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "add", "arguments": {"a": 1}}]
    chats = [[CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls]
    for record, call in zip(found(messages=chats), calls, strict=True):
        messages, _ = to_messages(record, pytest.fail)
        assert messages[1]["tool_calls"] == [call]  # without the arguments of the other one


def test_the_cases_that_were_reported():
    """Each file of these folders gives the records that its name says."""
    if not CASES.exists():
        pytest.skip(f"no {CASES}: the shared cases are not beside this checkout")
    for path in sorted((CASES / "array_in_jsonl").iterdir()):
        assert [record for _, record in read(path)[0]] == CHATS
    counts = {"array_named.jsonl": 2, "blank_first.json": 2, "blank_first.jsonl": 2, "comment.json": 2,
              "comment.jsonl": 2, "first_bad.json": 3, "first_bad.jsonl": 3, "one_bad_element.json": 3,
              "trailing_comma.json": 2}  # fmt: skip
    for name, count in counts.items():
        assert len(texts_of(CASES / "json_first_line" / name)[0]) == count
    for path in sorted((CASES / "parquet_hf").iterdir()):
        if path.suffix == ".parquet":
            pytest.importorskip("pyarrow")
        if path.name == "gbk.csv":
            with pytest.raises(DataError, match="GBK"):
                read(path)
            continue
        for _, record in read(path)[0]:
            assert isinstance(record.get("text"), str) or to_messages(record, pytest.fail)


# ---------------------------------------------------------------- control tokens in texts, and unusable files


def test_control_tokens_in_a_text_are_named_and_may_divide_it(tokenizer, tmp_path):
    record = {"text": "<|im_start|>河流？莱茵河。<|im_end|> <|im_start|>天空？蓝色。<|im_end|>"}
    path = write(tmp_path / "a.jsonl", json.dumps(record) + '\n{"text": "plain"}\n')
    whole = PretrainDataset(path, tokenizer, cache_dir=tmp_path / "cache")
    assert len(whole) == 2 and tokenizer.decode(whole[0][0]) == record["text"] + "<|endoftext|>"
    note, = whole.cache.meta["notes"]
    assert "a.jsonl:1: control tokens are spelled" in note and "--split_documents" in note
    split = PretrainDataset(path, tokenizer, split_documents=True, cache_dir=tmp_path / "cache")
    assert [tokenizer.decode(ids) for ids, _ in split] == [
        f"{text}<|endoftext|>" for text in ("河流？莱茵河。", "天空？蓝色。", "plain")]  # fmt: skip
    assert split.cache.meta["notes"] == [] and split.where(1) == f"{path}:1" and split.where(2) == f"{path}:2"


@pytest.mark.parametrize("bad", ["# Seedling", '{"text": ""}', '{"messages": []}'])
def test_a_file_of_which_most_is_unusable_is_refused(tokenizer, tmp_path, bad):
    good, path = json.dumps({"messages": CHAT}), tmp_path / "a.md"

    def make(num_good, num_bad, **settings):
        write(path, "\n".join([good] * num_good + [bad] * num_bad))
        return SFTDataset(path, tokenizer, cache_dir=tmp_path / "cache", **settings)

    assert len(make(2, 2)) == 2  # half of it may be bad
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match="a.md: 3 of 5 records cannot be used .*: line 3: ") as error:
            make(2, 3)
        assert "--allow_unusable" in str(error.value)
    assert len(make(2, 3, allow_unusable=True)) == 2
