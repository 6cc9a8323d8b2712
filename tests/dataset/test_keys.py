"""A key that changes what a record means is obeyed, or named: each under the names that people give it."""

import json

import pytest

from common.errors import DataError
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.messages import NothingToLearn, learnt_messages, to_messages

ASK, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}


def chat(answer: dict = ANSWER, **record) -> dict:
    return {"messages": [ASK, answer], **record}


def learnt(record: dict) -> list[str]:
    messages, _ = learnt_messages(record)
    return [m["content"] for m in messages if m["role"] == "assistant" and m.get("trained", True)]


def notes_on(record: dict) -> list[str]:
    notes = []
    learnt_messages(record, notes.append)
    return notes


# ---------------------------------------------------------------- what is learnt


@pytest.mark.parametrize("flag", [
    {"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"train": False}, {"train": "false"}, {"loss": 0},
    {"loss": False}, {"trainable": False}, {"training": False}, {"train_on_turn": False}, {"learn": False},
    {"loss_weight": 0}, {"loss_mask": 0}, {"masked": True}, {"mask": 1}, {"weight": 0, "train": False},
])  # fmt: skip
def test_a_flagged_answer_is_not_learnt(flag):
    wrong = {"role": "assistant", "content": "WRONG", **flag}
    assert learnt({"messages": [ASK, wrong, ASK, ANSWER]}) == ["A"]
    assert learnt({"messages": [ASK, {**wrong, **dict.fromkeys(flag)}, ASK, ANSWER]}) == ["WRONG", "A"]
    with pytest.raises(NothingToLearn):
        learnt({"messages": [ASK, wrong]})
    with pytest.raises(NothingToLearn):
        learnt(chat(**flag))  # on the record: all of its answers


@pytest.mark.parametrize("flag", [{"weight": 1}, {"train": True}, {"loss": "1"}, {"masked": False}])
def test_an_answer_that_is_flagged_as_learnt_is_learnt(flag):
    assert learnt(chat({**ANSWER, **flag})) == ["A"] and notes_on(chat({**ANSWER, **flag})) == []


def test_the_flags_reach_the_labels(tokenizer, tmp_path):
    """Each of the cases that were reported: the right answer is learnt, the wrong one read but not learnt."""
    def record(flag, on):
        return [{"role": "user", "content": "Capital of Peru?"},
                {"role": "assistant", "content": "WRONG: Quito", **flag},
                {"role": "user", "content": "Are you sure?"},
                {"role": "assistant", "content": "Lima.", **on}]  # fmt: skip

    records = [{"messages": record({"weight": 0}, {"weight": 1})},
               {"messages": record({"train": False}, {"train": True})},
               {"messages": record({"loss": 0}, {"loss": 1})},
               {"messages": record({"trainable": False}, {})}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    dataset = SFTDataset(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "cache")
    assert len(dataset) == 4 and dataset.cache.meta["notes"] == []
    for ids, labels in dataset:
        assert "WRONG: Quito" in tokenizer.decode(ids)
        assert tokenizer.decode(labels[labels != -100]) == "Lima.<|im_end|>"


def test_flags_that_can_not_be_obeyed_are_named_or_refused():
    assert "'weight' is neither 0 nor 1" in notes_on(chat({**ANSWER, "weight": 0.5}))[0]
    assert "only answers are" in notes_on({"messages": [{**ASK, "train": True}, ANSWER]})[0]
    assert "'train_detail'" in notes_on(chat({**ANSWER, "train_detail": [{"begin_offset": 0}]}))[0]
    with pytest.raises(DataError, match="weight and train contradict"):
        learnt(chat({**ANSWER, "weight": 0, "train": True}))


def test_mask_history_leaves_the_last_answer():
    turns = [ASK, {"role": "assistant", "content": "old"}, ASK, ANSWER]
    assert learnt({"messages": turns}) == ["old", "A"]
    assert learnt({"messages": turns, "mask_history": True}) == ["A"]
    assert learnt({"messages": turns, "mask_history": False}) == ["old", "A"]
    assert "'mask_history'" in notes_on({"messages": turns, "mask_history": "perhaps"})[0]


# ---------------------------------------------------------------- Alpaca


def test_history_comes_first_and_is_learnt():
    record = {"instruction": "And its river?", "input": "", "output": "The Rimac.", "system": "Be brief.",
              "history": [["What is the capital of Peru?", "Lima."]]}  # fmt: skip
    messages, _ = to_messages(record)
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Be brief."), ("user", "What is the capital of Peru?"), ("assistant", "Lima."),
        ("user", "And its river?"), ("assistant", "The Rimac.")]  # fmt: skip
    assert learnt(record) == ["Lima.", "The Rimac."]
    assert learnt({**record, "mask_history": True}) == ["The Rimac."]
    assert to_messages({**record, "history": json.dumps(record["history"])})[0] == messages  # a CSV cell
    assert to_messages({**record, "history": messages[1:3]})[0] == messages
    with pytest.raises(DataError, match="history is not"):
        to_messages({**record, "history": [["one"]]})


@pytest.mark.parametrize("record, question, answer", [
    ({"instruction": "Hi", "input": None, "output": "Hello."}, "Hi", "Hello."),
    ({"instruction": "Add", "input": float("nan"), "output": "3"}, "Add", "3"),
    ({"instruction": "Add one and one", "input": "", "output": 2}, "Add one and one", "2"),
    ({"instruction": "", "input": "1 + 1", "output": 2.5}, "1 + 1", "2.5"),
    ({"instruction": 7, "input": 8, "output": "x"}, "7\n8", "x"),
])  # fmt: skip
def test_cells_of_tables_are_text(record, question, answer):
    assert [m["content"] for m in to_messages(record)[0]] == [question, answer]


# ---------------------------------------------------------------- names of keys


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_text_of_the_record(name):
    assert to_messages(chat(**{name: "S"}))[0][0] == {"role": "system", "content": "S"}
    own = {"messages": [{"role": "system", "content": "Own"}, ASK, ANSWER], name: "S"}
    assert to_messages(own)[0][0]["content"] == "Own" and "another system message" in notes_on(own)[0]
    assert notes_on({**own, name: "Own"}) == []
    with pytest.raises(DataError, match="say different things"):
        to_messages(chat(system="S", **{"system_prompt": "T"}))


def test_roles_of_others():
    for names in ("developer user assistant", "system human gpt", "system user model"):
        turns = [{"role": role, "content": "x"} for role in names.split()]
        assert [m["role"] for m in to_messages({"messages": turns})[0]] == ["system", "user", "assistant"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_reasoning_under_its_names(name):
    assert to_messages(chat({**ANSWER, name: "Hm."}))[0][1] == {**ANSWER, "reasoning_content": "Hm."}
    with pytest.raises(DataError, match="different things"):
        to_messages(chat({**ANSWER, "reasoning_content": "Hm.", "thoughts": "Oh."}))
    same = {**ANSWER, "reasoning_content": "Hm.", "thoughts": "Hm."}
    assert to_messages(chat(same))[0][1] == {**ANSWER, "reasoning_content": "Hm."}


def test_reasoning_in_the_content_and_beside_it():
    content = "<think>\nHm.\n</think>\n\nA"
    message = {"role": "assistant", "content": content, "reasoning_content": "Hm."}
    assert to_messages(chat(message))[0][1] == {"role": "assistant", "content": content}
    with pytest.raises(DataError, match="one reasoning in its content and another"):
        to_messages(chat({**message, "reasoning_content": "Oh."}))


@pytest.mark.parametrize("answer, content, note", [
    # What a server returns where its prompt ends in <think>
    ({"content": "Hm.\n</think>\n\nA"}, "Hm.\n</think>\n\nA", "a </think> and no <think>"),
    ({"content": "\nHm.</think>A", "reasoning": "Hm."}, "\nHm.</think>A", "a </think> and no <think>"),
    ({"content": "<think>Hm."}, "<think>Hm.", "that is not closed"),
    ({"content": "<think>Hm.</think>A"}, "<think>Hm.</think>A", None),
])  # fmt: skip
def test_a_thought_of_which_one_sign_is_missing_is_named(tokenizer, answer, content, note):
    record = chat({"role": "assistant", **answer})
    assert learnt_messages(record)[0][1] == {"role": "assistant", "content": content}
    assert note in notes_on(record)[0] if note else notes_on(record) == []
    to_messages(record, pytest.fail)  # a request to a server may go on with such an answer


def test_signs_of_a_thought_beside_a_content():
    for beside in ("<think>\nHm.\n</think>", "Hm.</think>", "<think>Hm."):
        assert to_messages(chat({**ANSWER, "reasoning_content": beside}))[0][1]["reasoning_content"] == "Hm."
    assert to_messages(chat({**ANSWER, "reasoning_content": " \n"}))[0][1] == ANSWER
    assert to_messages(chat({**ANSWER, "reasoning_content": " Hm."}))[0][1]["reasoning_content"] == " Hm."
    with pytest.raises(DataError, match="has a <think> or </think> within"):
        to_messages(chat({**ANSWER, "reasoning_content": "Hm.</think>A</think>"}))


@pytest.mark.parametrize("token", ["</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>",
                                   "<eos>", "<｜end▁of▁sentence｜>"])  # fmt: skip
def test_a_control_token_in_a_text_is_named(tokenizer, tmp_path, token):
    """Files made for one model hold its tokens as letters, which another would learn to spell."""
    for record in (chat({**ANSWER, "content": f"A{token}"}),
                   {"instruction": f"{token}Q", "output": "A"}):
        assert notes_on(record)[0].startswith(f"{token!r} is spelled in a message, and read as text")
        to_messages(record, pytest.fail)  # a person may type it to a server
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"One{token}Two"}), encoding="utf-8")
    documents = PretrainDataset(tmp_path / "a.jsonl", tokenizer, split_documents=True, cache_dir=tmp_path)
    assert [tokenizer.decode(ids) for ids, _ in documents] == ["One<|endoftext|>", "Two<|endoftext|>"]
    for text in ("a<b and c>d", "x |> y <| z", "[1] <s", "<script>", "<think>\nHm.\n</think>\n\nA"):
        assert notes_on(chat({**ANSWER, "content": text})) == []


@pytest.mark.parametrize("calls", [
    {"tool_calls": [CALL]},
    {"tool_calls": json.dumps([CALL])},
    {"tool_calls": CALL},
    {"tool_calls": [json.dumps(CALL)]},
    {"tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
    {"tool_calls": [{"function": "weather", "parameters": {"city": "Oslo"}}]},
    {"tool_calls": {"name": ["weather"], "arguments": [{"city": "Oslo"}]}},
    {"function_call": CALL},
    {"tool_calls": None, "function_call": CALL},
    *({"tool_calls": [{"name": "weather", name: {"city": "Oslo"}}]}
      for name in ("parameters", "input", "args", "kwargs")),
    {"content": [{"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Oslo"}}]},
])  # fmt: skip
def test_tool_calls_in_every_writing(calls):
    record = {"messages": [ASK, {"role": "assistant", "content": "", **calls},
                           {"role": "tool", "name": "weather", "content": "3 C"}, ANSWER]}  # fmt: skip
    assert to_messages(record)[0][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert notes_on(record) == []


def test_a_call_as_text_keeps_its_text_and_absent_arguments_are_none():
    def arguments_of(**call):
        return to_messages(chat({"role": "assistant", "tool_calls": [{"name": "f", **call}]}))[0][1][
            "tool_calls"][0]["arguments"]  # fmt: skip

    assert arguments_of(arguments='{"a":1}') == '{"a":1}' and arguments_of(arguments="{'a': 1}") == {"a": 1}
    assert arguments_of() == arguments_of(arguments="") == arguments_of(arguments=None) == {}
    assert arguments_of(arguments="null") == {} and arguments_of(arguments="[1]") == "[1]"
    assert arguments_of(arguments=json.dumps('{"a": "\\"b"}')) == '{"a": "\\"b"}'  # JSON text of JSON text
    assert arguments_of(arguments={"a": '{"b": 1}'}) == {"a": '{"b": 1}'}
    for wrong in ({"a": float("nan")}, '{"a": [-Infinity]}'):
        with pytest.raises(DataError, match="NaN and infinity are not valid JSON"):
            arguments_of(arguments=wrong)
    with pytest.raises(DataError, match="different things"):
        arguments_of(arguments={"a": 1}, parameters={"a": 2})
    with pytest.raises(DataError, match="other ones beside it"):
        to_messages(chat({"role": "function_call", "content": json.dumps(CALL), "tool_calls": [CALL]}))
    for wrong in (0, False, 5, ["f"]):
        with pytest.raises(DataError):
            to_messages(chat({**ANSWER, "function_call": wrong}))
    with pytest.raises(DataError, match="other ones beside it"):
        spelled = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
        to_messages(chat({"role": "assistant", "content": spelled, "tool_calls": [CALL]}))
    assert "'foo' of a tool call" in notes_on(chat({**ANSWER, "tool_calls": [{"name": "f", "foo": 1}]}))[0]


def test_function_call_beside_text_and_in_a_turn_of_its_own():
    call = {"name": "clock", "arguments": "{}"}
    message = {"role": "assistant", "content": "Let me look.", "function_call": call}
    assert to_messages(chat(message))[0][1] == {
        "role": "assistant", "content": "Let me look.", "tool_calls": [call]}  # fmt: skip
    turns = [{"from": "human", "value": "Q"}, {"from": "function_call", "value": json.dumps(CALL)},
             {"from": "observation", "value": "3 C"}, {"from": "gpt", "value": "A"}]  # fmt: skip
    assert to_messages({"conversations": turns})[0][1]["tool_calls"] == [CALL]


def test_calls_in_turns_of_their_own_belong_to_the_answer_before_them():
    """As ms-swift has them: several calls at once, perhaps after words, before the first result comes."""
    def turns(*flags):
        calls = [{"role": "tool_call", "content": json.dumps({**CALL, "name": name})} for name in "ab"]
        calls = [call | flag for call, flag in zip(calls, flags, strict=True)]
        result = {"role": "tool_response", "content": "3 C"}
        return [ASK, {**ANSWER, "content": "I look."}, *calls, result, result, ANSWER]

    messages, _ = to_messages({"messages": turns({}, {})})
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1] == {"role": "assistant", "content": "I look.",
                           "tool_calls": [{**CALL, "name": "a"}, {**CALL, "name": "b"}]}  # fmt: skip
    assert notes_on({"messages": turns({}, {})}) == []
    alone = turns({"loss": False}, {"loss": False})
    assert learnt({"messages": [ASK, *alone[2:]]}) == ["A"]
    with pytest.raises(DataError, match="message 3 goes on with the answer before it, and is marked unlike"):
        to_messages({"messages": alone})
    assert "each is a turn of its own" in notes_on({"messages": [ASK, ANSWER, ANSWER]})[0]


@pytest.mark.parametrize("parts, message", [
    ([{"type": "text", "text": "A"}], {"content": "A"}),
    (["A", {"type": "output_text", "text": "B"}], {"content": "AB"}),
    ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A"}],
     {"content": "A", "reasoning_content": "hm"}),
    ([{"type": "text", "text": "A", "image_url": None}], {"content": "A"}),
])  # fmt: skip
def test_parts_of_a_content(parts, message):
    found = to_messages(chat({"role": "assistant", "content": parts}))[0][1]
    assert found == {"role": "assistant", **message}


def test_keys_of_parts():
    def notes(**more):
        return notes_on(chat({"role": "assistant", "content": [{"type": "text", "text": "A"}, more]}))

    assert notes(type="text", text="B", cache_control={"type": "ephemeral"}) == []
    assert notes(type="text", text="B", foo=1) == ["the key 'foo' of a part is not used"]
    assert notes(type="thinking", thinking="hm", text="B") == ["the key 'text' of a part is not used"]
    asked = {"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}
    with pytest.raises(DataError, match="message 1 is not text: it has a part of the type 'thinking'"):
        to_messages({"messages": [asked, ANSWER]})


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video", "file", "tool_result"])
def test_a_part_that_is_no_text_is_named(kind):
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}]
    with pytest.raises(DataError, match=f"message 1 is not text: it has a part of the type '{kind}'"):
        to_messages({"messages": [{"role": "user", "content": parts}, ANSWER]})


def test_keys_without_meaning_and_unknown_keys(tokenizer, tmp_path):
    plain = chat(id=7, source="web", score=0.5, url="x", timestamp=1, category="talk")
    assert notes_on(plain) == [] == notes_on(chat(foo=None, bar="", baz=[]))
    lines = [plain, chat(foo=1), chat({**ANSWER, "foo": 2}), chat(foo=3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    dataset = SFTDataset(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "cache")
    assert dataset.cache.meta["notes"] == [
        f"{tmp_path / 'a.jsonl'}:2: the key 'foo' of a record is not used (in 2 records)",
        f"{tmp_path / 'a.jsonl'}:3: the key 'foo' of a message is not used (in 1 record)"]  # fmt: skip


def test_notes_are_repeated_at_every_start_and_bounded(tokenizer, tmp_path, capsys):
    lines = [chat(**{f"key{n}": 1}) for n in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for _ in range(2):
        SFTDataset(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "cache", strict=True)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 41 and "'key0'" in said[0] and "in 60 records" in said[-1]


def test_pretraining_names_what_it_does_not_use(tokenizer, tmp_path):
    lines = [{"text": "one", "url": "x", "weight": 1}, {"text": "two", "summary": "2"},
             {"text": "three", "train": False}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    dataset = PretrainDataset(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "cache")
    note, = dataset.cache.meta["notes"]
    assert len(dataset) == 2 and "'summary'" in note
    assert dataset.summary == "records with nothing to learn skipped: 1"


# ---------------------------------------------------------------- MiniMind's formats


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], TOOL])
def test_tools_of_a_system_message(name, tools):
    turns = [{"role": "system", "content": "# Tools", name: tools}, ASK, ANSWER]
    assert to_messages({"conversations": turns})[1] == [TOOL]
    assert to_messages({"conversations": turns, "tools": [TOOL]})[1] == [TOOL]
    with pytest.raises(DataError, match="differ"):
        to_messages({"conversations": turns, "tools": [{"name": "other"}]})


def test_parameters_of_tools_may_be_json_text():
    """A column of a table holds values of one type, and no two tools have the same parameters."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    flat, nested = {"name": "f", "parameters": schema}, {"type": "function", "function": {"name": "f"}}
    nested["function"]["parameters"] = schema
    as_text = {**nested, "function": {"name": "f", "parameters": json.dumps(schema)}}
    twice = {**nested, "function": json.dumps(as_text["function"])}
    for written in (as_text, twice, nested):
        assert to_messages(chat(tools=[written]))[1] == [nested]
    assert to_messages(chat(tools=[{**flat, "parameters": json.dumps(schema)}]))[1] == [flat]
    words = {"name": "f", "parameters": "the city", "description": '{"a": 1}'}
    assert to_messages(chat(tools=[words]))[1] == [words]


def test_a_system_message_of_tools_alone_and_empty_strings():
    absent = {"reasoning_content": "", "tools": "", "tool_calls": ""}
    turns = [{"role": "system", "tools": json.dumps([TOOL])}, {**ASK, **absent}, {**ANSWER, **absent}]
    record = {"conversations": turns, "gt": ["5"]}
    assert to_messages(record) == ([{"role": "system", "content": ""}, ASK, ANSWER], [TOOL])
    assert notes_on(record) == []


@pytest.mark.parametrize("content", ["", "无", " 无\n", None])
def test_a_prompt_is_no_answer(content):
    last = {"role": "assistant", "content": content}
    assert to_messages({"conversations": [ASK, last]}) == ([ASK], None)
    with pytest.raises(NothingToLearn, match="a prompt"):
        learnt({"conversations": [ASK, last]})
    longer = {"conversations": [ASK, ANSWER, ASK, last]}
    assert learnt(longer) == ["A"] and "the conversation is a prompt" in notes_on(longer)[0]


def test_prompts_are_counted_and_are_no_bad_lines(tokenizer, tmp_path, capsys):
    lines = [chat(), chat(), {"conversations": [ASK, {"role": "assistant", "content": "无"}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    dataset = SFTDataset(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "cache")
    assert len(dataset) == 2 and dataset.summary == "records with nothing to learn skipped: 1"
    assert "a.jsonl:3: a conversation with no assistant message" in capsys.readouterr().err
    with pytest.raises(DataError, match="a.jsonl:3: .*--strict"):
        SFTDataset(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "cache", strict=True)


@pytest.mark.parametrize("record", [
    {"chosen": [ASK, ANSWER], "rejected": [ASK, {**ANSWER, "content": "bad"}]},
    {"prompt": "Q", "chosen": "A", "rejected": "bad"},
    {"prompt": [ASK], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "bad"}]},
    {"conversations": [ASK], "chosen": ANSWER, "rejected": {**ANSWER, "content": "bad"}},
    {"instruction": "Q", "input": "", "chosen": "A", "rejected": "bad"},
    {"chosen": json.dumps([ASK, ANSWER]), "rejected": "[]"},
])  # fmt: skip
def test_of_a_pair_the_chosen_answer_is_learnt(record):
    assert to_messages(record) == ([ASK, ANSWER], None)
    assert len(notes := notes_on(record)) == 1 and "preference pair" in notes[0]


def test_a_prompt_beside_a_whole_chosen_conversation():
    pair = {"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}
    assert len(notes_on({**pair, "prompt": "Q"})) == 1  # says the same once more
    for key, other in (("prompt", "another"), ("messages", [ANSWER, ASK])):
        assert any(f"'{key}' beside a whole" in note for note in notes_on({**pair, key: other}))


def test_a_pair_beside_another_answer():
    pair = {"instruction": "Q", "output": "C", "chosen": "A", "rejected": "bad"}
    assert learnt(pair) == ["A"] and "the key 'output' of a record is not used" in notes_on(pair)
    assert learnt({**pair, "output": ""}) == ["A"] and len(notes_on({**pair, "output": ""})) == 1
    assert learnt({"messages": "[]", "chosen": ANSWER, "rejected": ANSWER}) == ["A"]
    with pytest.raises(DataError, match="ends with another answer"):
        to_messages(chat(chosen=ANSWER, rejected=ANSWER))


def test_a_chosen_answer_may_be_json_text():
    assert learnt({"prompt": "Q", "chosen": '{"a": 1}', "rejected": "x"}) == ['{"a": 1}']
    with pytest.raises(DataError, match="no prompt before it"):
        to_messages({"chosen": "A", "rejected": "bad"})


# ---------------------------------------------------------------- nulls that tables filled in


def test_nulls_that_a_table_filled_in_are_left_out():
    """datasets gives each call the arguments of all calls; a null stays where the tool has that argument."""
    filled = {"name": "weather", "arguments": {"city": "Oslo", "a": None, "at": {"x": 1, "y": None}}}
    record = chat({"role": "assistant", "tool_calls": [filled]})
    assert to_messages(record)[0][1]["tool_calls"][0]["arguments"] == {"city": "Oslo", "at": {"x": 1}}
    assert "a null among the arguments" in notes_on(record)[0]
    properties = {"city": {"type": "string"}, "unit": {"type": "string"}, "a": None}
    schema = {"type": "object", "properties": properties}
    meant = {"name": "weather", "arguments": {"city": "Oslo", "unit": None, "a": None}}
    tools = [{"name": "weather", "parameters": schema, "enum": None}]
    messages, tools = to_messages(chat({"role": "assistant", "tool_calls": [meant]}, tools=tools))
    assert messages[1]["tool_calls"][0]["arguments"] == {"city": "Oslo", "unit": None}
    assert list(tools[0]) == ["name", "parameters"]
    assert list(tools[0]["parameters"]["properties"]) == ["city", "unit"]
    tools[0]["parameters"]["properties"]["unit"]["default"] = None  # as pydantic writes it
    assert notes_on(chat(tools=tools)) == [] and to_messages(chat(tools=tools))[1] != tools
    tools[0]["parameters"]["properties"]["unit"]["const"] = None
    assert "a null in the tools" in notes_on(chat(tools=tools))[0]
    as_text = {"name": "weather", "arguments": '{"unit": null}'}  # no table fills a text
    assert to_messages(chat({"role": "assistant", "tool_calls": [as_text]}))[0][1]["tool_calls"] == [as_text]


# ---------------------------------------------------------------- against transformers


WRITTEN = [  # a record as others write it, and the messages and tools that transformers' template is given
    ({"conversations": [{"role": "system", "content": "# Tools", "tools": json.dumps([TOOL])},
                        {"role": "user", "content": "2 + 3?"},
                        {"role": "assistant", "tool_calls": '[{"name": "add", "arguments": {"a": 2}}]'},
                        {"role": "tool", "content": '{"sum": 5}'}, {"role": "assistant", "content": "5"}]},
     [{"role": "system", "content": "# Tools"}, {"role": "user", "content": "2 + 3?"},
      {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]},
      {"role": "tool", "content": '{"sum": 5}'}, {"role": "assistant", "content": "5"}], [TOOL]),
    ({"messages": [{"role": "developer", "content": "Be brief."}, ASK, {
        "role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, "A"], "weight": 1}]},
     [{"role": "system", "content": "Be brief."}, ASK,
      {"role": "assistant", "content": "A", "reasoning_content": "hm"}], None),
    ({"instruction": "B?", "input": "", "output": 2, "history": [["A?", "1"]], "system_prompt": "S"},
     [{"role": "system", "content": "S"}, {"role": "user", "content": "A?"},
      {"role": "assistant", "content": "1"}, {"role": "user", "content": "B?"},
      {"role": "assistant", "content": "2"}], None),
]  # fmt: skip


@pytest.mark.parametrize("record, messages, tools", WRITTEN)
def test_ids_and_labels_are_those_of_transformers(tokenizer, tmp_path, record, messages, tools):
    (tmp_path / "a.jsonl").write_text(json.dumps(record), encoding="utf-8")
    (ids, labels), = SFTDataset(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "cache")
    theirs = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True,
                                           return_assistant_tokens_mask=True)  # fmt: skip
    assert ids.tolist() == theirs["input_ids"]
    assert (labels != -100).tolist() == [bool(learnt) for learnt in theirs["assistant_masks"]]
