"""A record of any known format -> messages and tools, for dataset/chat.py. A reader may skip this file.

Other projects write conversations in other ways. Here is what they write, and what can be wrong in it.
dataset/keys.py has the names that a key may have.
"""

import re

from common.errors import DataError
from dataset.json_records import is_conversation, parse_cell, parse_field, rows_of
from dataset.keys import (
    ALPACA,
    FLAGS,
    HISTORY_FLAG,
    NAMES,
    Note,
    is_empty,
    is_learnt,
    name_unknown,
    no_note,
    read_flag,
    value_of,
)
from dataset.records import keys_of
from dataset.tool_calls import read_calls, read_tools, without_filled_nulls

# The roles that the data may name -> those that we know.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant", "model": "assistant",
         "function_call": "assistant", "tool_call": "assistant",
         "tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool",
         "ipython": "tool"}  # fmt: skip
# The keys that are read in a message of each role. (A tool's name is not part of the prompt format.)
MESSAGE_KEYS = {role: {*NAMES["role"], *NAMES["content"], *FLAGS, "name"} for role in ROLES.values()}
MESSAGE_KEYS["assistant"] |= {*NAMES["calls"], *NAMES["reasoning"]}
MESSAGE_KEYS["system"] |= {*NAMES["tools"]}
CALL_ROLES = ("function_call", "tool_call")  # LLaMA-Factory's: the content is the call
NO_ANSWER = ("", "无")  # as the last answer: MiniMind's prompts for reinforcement learning end so
TEXT_PARTS, THOUGHT_PARTS = ("text", "input_text", "output_text"), ("thinking", "reasoning")
CALL_PARTS = ("tool_use", "tool_call", "function_call")
# Control tokens of many models, as letters in a text. Files that were made for one project have them there.
SPELLED = re.compile(r"<[|｜][\w▁]{1,40}[|｜]>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>")


class NothingToLearn(DataError):
    """A record is right, but no word in it is to be learnt."""


def to_messages(record: dict, note: Note = no_note, side: str | None = None,
                as_written: bool = False) -> tuple[list[dict], list | None]:
    """The messages and the tools (None: none) of a record in any format that we accept.

    {"conversations": [...]} or {"messages": [...]} with role/content or from/value (human, gpt), optionally
    "system" and "tools" (a list, or a JSON string of one); {"instruction", "input", "output"}, before which
    the questions and answers of "history" come, which are learnt, too; {"chosen", "rejected"}, a preference
    pair, also with "prompt". side: which conversation of a pair is meant, "chosen" or "rejected"; None means
    "chosen", with a note that the other side is not used. Messages come back with the keys role (system,
    user, assistant, tool) and content, plus tool_calls and reasoning_content where there are any, and
    trained=False on an answer that the record says must not be learnt. A last answer that is empty is left
    out, and so the messages are a prompt.

    as_written: the conversation comes from a request and not from a file. So a null was meant, and an answer
    may be empty: the model had nothing to say, or was stopped before it said anything.

    note(text) is called for what is not used as its author may have meant it. Raises DataError for another
    format or wrong roles; the caller adds path and line.
    """
    turns, known = _turns_of(record, note, side)
    if not isinstance(turns, list) or not turns:
        raise DataError("the conversation is not a list of messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        message = _to_message(turn, f"message {number}", note)
        follows_answer = messages and messages[-1]["role"] == "assistant"
        if follows_answer and value_of(turn, "role") in CALL_ROLES:
            _join_calls(messages[-1], message, number)
        else:
            messages.append(message)
    if not as_written:
        _leave_out_empty_answers(messages, note)
    _add_system(messages, record, note)
    tools = _tools_of(record, turns[0])
    if not as_written:
        tools = without_filled_nulls(messages, tools, note)
    _obey_flags(record, messages, note)
    known = {*known, *NAMES["system"], *NAMES["tools"], *FLAGS, HISTORY_FLAG}
    name_unknown(record, known, "record", note)
    return messages, tools


def learnt_messages(record: dict, note: Note = no_note) -> tuple[list[dict], list | None]:
    """`to_messages` of a record to learn from. Raises NothingToLearn where it has no answer for that."""
    messages, tools = to_messages(record, note)
    check_words(messages, note)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise NothingToLearn("a conversation with no assistant message, or with an empty one: a prompt")
    if not any(message.get("trained", True) for message in answers):
        raise NothingToLearn("a conversation whose every answer is marked as not to be learnt")
    return messages, tools


def check_words(messages: list[dict], note: Note) -> None:
    """Notes what looks wrong in words that are to be learnt.

    In a request to a server all of this is right: a person may write what they like, and an answer that goes
    on may begin anywhere.
    """
    before = None
    for message in messages:
        content = message["content"]
        if found := SPELLED.search(content):
            note(f"{found[0][:20]!r} is spelled in a message, and read as text: the format has tokens for it")
        if message["role"] == before == "assistant":
            note("an answer follows another answer: each is a turn of its own")
        before = message["role"]
        if message["role"] != "assistant":
            continue
        if "</think>" in content and "<think>" not in content.partition("</think>")[0]:
            # A server returns such an answer where the prompt ends in <think>.
            note("an answer has a </think> and no <think> before it: is the beginning of a thought missing?")
        elif content.count("<think>") != content.count("</think>"):
            note("an answer has a <think> that is not closed")


# --- record -> turns ----------------------------------------------------------------------------------------


def _turns_of(record: dict, note: Note, side: str | None) -> tuple[object, set[str]]:
    """The turns of a record as its author wrote them, and the keys that were read for them."""
    turns, known = value_of(record, "conversation"), {*NAMES["conversation"]}
    answer, prompt = (messages_in(record.get(key)) for key in (side or "chosen", "prompt"))
    is_pair = not is_empty(answer)
    if turns is None and "instruction" in record and ("output" in record or is_pair):
        if not all(is_empty(record.get(key)) for key in ALPACA):
            known = {*ALPACA} - ({"output"} if is_pair else set())
            turns = _alpaca_turns(record, "output" in known)
    elif turns is None and is_pair and not is_empty(prompt):
        known = {"prompt"}
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    turns = parse_field(turns, "the conversation") if isinstance(turns, str) else turns
    if isinstance(turns, dict):  # {"role": [...], "content": [...]}: datasets writes lists of objects so
        turns = rows_of(turns) or turns
    if is_pair:
        whole = _with_answer(turns, answer, side or "chosen")
        is_used = is_empty(turns) or isinstance(turns, list) and whole[: len(turns)] == turns
        turns = whole
        if not is_used and side != "rejected":  # of both sides the chosen one alone says it
            unused = [repr(key) for key in record if key in known and not is_empty(record[key])]
            note(f"{' and '.join(unused)} beside a whole conversation in 'chosen' is not used")
        if side is None:
            note("a preference pair: the chosen answer is learnt, the rejected one is not used")
        known |= {"chosen", "rejected"}
    if turns is None:
        raise DataError(f"no conversations, messages or instruction and output in it, but {keys_of(record)}")
    return turns, known


def _alpaca_turns(record: dict, with_output: bool) -> list:
    """The history of a record, its question, and (with_output) its answer."""
    turns = []
    history = [] if is_empty(record.get("history")) else record["history"]
    history = parse_field(history, "history") if isinstance(history, str) else history
    for turn in history if isinstance(history, list) else [history]:
        if isinstance(turn, list) and len(turn) == 2:
            turns += [{"role": "user", "content": _text(turn[0], "a question of history")},
                      {"role": "assistant", "content": _text(turn[1], "an answer of history")}]  # fmt: skip
        elif isinstance(turn, dict):
            turns.append(turn)  # a message
        else:
            raise DataError("history is not a list of [question, answer]")
    parts = [_text(record.get(key), key) for key in ("instruction", "input")]
    turns.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    if with_output:
        turns.append({"role": "assistant", "content": _text(record["output"], "output")})
    return turns


def _with_answer(turns: list | None, answer: object, side: str) -> list:
    """The conversation with one side's answer: a text, a message, the last messages, or all of them."""
    if isinstance(answer, str):
        if not turns:
            raise DataError(f"{side} is a text, and there is no prompt before it")
        answer = {"role": "assistant", "content": answer}
    last = answer if isinstance(answer, list) else [answer]
    if _role_of(last[0]) != "assistant" or not isinstance(turns, list) or not turns:
        return last
    if _role_of(turns[-1]) == "assistant":
        raise DataError(f"a {side} answer to a conversation that ends with another answer")
    return [*turns, *last]


def _role_of(turn: object) -> str | None:
    role = value_of(turn, "role") if isinstance(turn, dict) else None
    return ROLES.get(role) if isinstance(role, str) else None


def _text(value: object, name: str) -> str:
    """A cell as text. Tables hold numbers, and NaN where a cell is empty."""
    if is_empty(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{name} must be text")
    return str(value)


# --- turn -> message ----------------------------------------------------------------------------------------


def _to_message(turn: object, name: str, note: Note) -> dict:
    """One message. name: "message 3", for complaints."""
    if not isinstance(turn, dict):
        raise DataError(f"{name} is not an object with role and content")
    role = value_of(turn, "role")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{name} has the role {str(role)[:30]!r}; known are system, user, assistant, tool")
    message, content = {"role": ROLES[role]}, value_of(turn, "content")
    trained = is_learnt(turn, note)
    if message["role"] == "assistant":
        calls = value_of(turn, "calls")
        if role in CALL_ROLES and content is not None:
            if calls not in (None, content):
                raise DataError(f"{name} has tool calls in its content and other ones beside it")
            content, calls = "", content
        message |= _answer(content, calls, value_of(turn, "reasoning"), name, note)
        if trained is False:
            message["trained"] = False
    else:
        if trained:
            note(f"a message of the {message['role']} is marked as to be learnt: only answers are")
        is_absent = content is None and (message["role"] == "system" or "" in map(turn.get, NAMES["content"]))
        message["content"] = "" if is_absent else _content(content, name, note)[0]
    name_unknown(turn, MESSAGE_KEYS[message["role"]], "message", note)
    return message


def _join_calls(answer: dict, calls: dict, number: int) -> None:
    """Adds the calls of a turn of their own to the answer just before it: both are one turn of the model."""
    if answer.get("trained", True) != calls.get("trained", True) or "reasoning_content" in calls:
        raise DataError(f"message {number} goes on with the answer before it, and is marked unlike it")
    answer["tool_calls"] = answer.get("tool_calls", []) + calls.get("tool_calls", [])


def _answer(content: object, calls: object, reasoning: object, name: str, note: Note) -> dict:
    """The content, tool_calls and reasoning_content of an assistant's message."""
    content, thoughts, more_calls = _content("" if content is None else content, name, note, True)
    if calls and "<tool_call>" in content:
        raise DataError(f"{name} has tool calls in its content and other ones beside it")
    if reasoning is None:
        reasoning = "".join(thoughts)
    elif not isinstance(reasoning, str):
        raise DataError(f"the reasoning_content of {name} is not text")
    elif thoughts:
        raise DataError(f"{name} has its reasoning among its parts and beside them")
    reasoning = _thought(reasoning, name)
    if reasoning and ("</think>" in content or content.lstrip().startswith("<think>")):
        written = content.lstrip().removeprefix("<think>").partition("</think>")[0]
        if written.strip() != reasoning.strip():
            raise DataError(f"{name} has one reasoning in its content and another one beside it")
        reasoning = ""
    message = {"content": content}
    if calls is not None or more_calls:
        calls = [] if calls is None else read_calls(calls, name, note)
        message["tool_calls"] = calls + read_calls(more_calls, name, note)
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def _thought(reasoning: str, name: str) -> str:
    """The reasoning beside a content, without the signs around it; "" where it is blank."""
    words = reasoning.strip()
    inner = words.removeprefix("<think>").removesuffix("</think>")
    if "<think>" in inner or "</think>" in inner:
        raise DataError(f"the reasoning_content of {name} has a <think> or </think> within")
    return inner.strip() if inner != words or not words else reasoning


def _content(content, name: str, note: Note, is_answer: bool = False) -> tuple[str, list[str], list]:
    """The text of a content, which may be a list of parts; and of an answer also its thoughts and calls."""
    texts, thoughts, calls = [], [], []
    if isinstance(content, dict) and "type" in content:
        content = [content]
    for part in content if isinstance(content, list) else [content]:
        part = {"text": part} if isinstance(part, str) else part
        kind = (part.get("type") or "text") if isinstance(part, dict) else None
        if is_answer and kind in CALL_PARTS:
            calls.append(part)
            continue
        text, names = None, NAMES["reasoning"]
        if is_answer and kind in THOUGHT_PARTS:
            text = value_of(part, "reasoning")
        if text is None and kind in (*TEXT_PARTS, *THOUGHT_PARTS):
            text, names = part.get("text"), ("text",)
        if not isinstance(text, str) or kind in THOUGHT_PARTS and not is_answer:
            has = f": it has a part of the type {str(kind)[:20]!r}" if kind else ""
            raise DataError(f"the content of {name} is not text{has}")
        (thoughts if kind in THOUGHT_PARTS else texts).append(text)
        name_unknown(part, {"type", *names}, "part", note)
    return "".join(texts), thoughts, calls


# --- what concerns the whole conversation -------------------------------------------------------------------


def _leave_out_empty_answers(messages: list[dict], note: Note) -> None:
    """Removes the last answer if it is empty. Raises DataError for an empty one before it."""
    for number, message in enumerate(messages, 1):
        says = message.get("tool_calls") or message.get("reasoning_content")
        if message["role"] != "assistant" or says or message["content"].strip() not in NO_ANSWER:
            continue
        if number == len(messages):
            messages.pop()
            note("the content of the last answer is empty, or 无: the conversation is a prompt")
        elif not message["content"].strip():
            raise DataError(f"message {number}: the assistant says nothing")
    if not messages:
        raise DataError("the conversation is not a list of messages that say something")


def _add_system(messages: list[dict], record: dict, note: Note) -> None:
    """Puts the system message of the record before its messages, unless they have one of their own."""
    system = value_of(record, "system")
    if system is not None and not isinstance(system, str):
        raise DataError("system is not text")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    elif system and not messages[0]["content"]:
        messages[0]["content"] = system
    elif system and messages[0]["content"] != system:
        name = next(name for name in NAMES["system"] if record.get(name) == system)
        note(f"{name!r} of the record is not used: its conversation has another system message")
    if "system" in [message["role"] for message in messages[1:]]:
        raise DataError("a system message that is not the first message")


def _tools_of(record: dict, first_turn: dict) -> list | None:
    """The tools of a record, or of its system message. Raises DataError where both have some, and differ."""
    places = [record] + [first_turn] * (_role_of(first_turn) == "system")
    found = [read_tools(value_of(place, "tools")) for place in places]
    if all(found) and found[0] != found[-1]:
        raise DataError("the tools of the record and those of its system message differ")
    return found[0] or found[-1]


def _obey_flags(record: dict, messages: list[dict], note: Note) -> None:
    """Marks the answers that the record, as a whole, says must not be learnt."""
    answers = [message for message in messages if message["role"] == "assistant"]
    unlearnt = answers[:-1] if read_flag(record, HISTORY_FLAG, note) else []
    if is_learnt(record, note) is False:
        unlearnt = answers
    for message in unlearnt:
        message["trained"] = False


def messages_in(value: object) -> object:
    """The list of messages that a cell holds as JSON text; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        messages = parse_cell(value)
        return messages if is_conversation(messages) else value
    return value
