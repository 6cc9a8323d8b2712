"""A record of any known format -> messages and tools, for dataset/chat.py. A reader may skip this file.

Other projects write conversations in other ways. Here is what they write, and what can be wrong in it.
"""

from common.errors import DataError
from dataset.records import keys_of, parse_json

# The roles that the data may name -> those that we know.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool"}  # fmt: skip


def to_messages(record: dict) -> tuple[list[dict], list | None]:
    """The messages and the tools (None: none) of a record in any format that we accept.

    {"conversations": [...]} or {"messages": [...]} with role/content or from/value (human, gpt), optionally
    "system" and "tools" (a list, or a JSON string of one); {"instruction", "input", "output"}. Messages come
    back with the keys role (system, user, assistant, tool) and content, plus tool_calls and reasoning_content
    where there are any. Raises DataError for another format or wrong roles; the caller adds path and line.
    """
    turns = record.get("conversations")
    turns = record.get("messages") if turns is None else turns
    if turns is None and "instruction" in record and "output" in record:
        parts = [record["instruction"], record.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise DataError("instruction and input must be text")
        question = "\n".join(part for part in parts if part)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    if turns is None:
        raise DataError(f"no conversations, messages or instruction and output in it, but {keys_of(record)}")
    if isinstance(turns, str):  # a CSV cell
        turns = _parse(turns, "the conversation")
    if not isinstance(turns, list) or not turns:
        raise DataError("the conversation is not a list of messages")

    messages = [_to_message(turn, f"message {number}") for number, turn in enumerate(turns, 1)]
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise DataError("system is not text")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise DataError("a system message that is not the first message")
    if "assistant" not in roles:
        raise DataError("a conversation with no assistant message")
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _parse(tools, "tools") if tools.strip() else None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError("tools is not a list of objects")
    return messages, tools or None


def _to_message(turn: object, name: str) -> dict:
    """One message. name: "message 3", for complaints."""
    if not isinstance(turn, dict):
        raise DataError(f"{name} is not an object with role and content")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{name} has the role {str(role)[:30]!r}; known are system, user, assistant, tool")
    content = turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls") or []
    if role == "function_call":  # LLaMA-Factory's spelling: the call is the content
        calls = _parse(content, name) if isinstance(content, str) else content
        content = ""
    if not isinstance(calls, list):
        calls = [calls]
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content]  # OpenAI's parts of a content
        if all(isinstance(text, str) for text in texts):
            content = "".join(texts)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"the content of {name} is not text")
    message = {"role": ROLES[role], "content": content}
    if message["role"] != "assistant":
        return message
    if calls:
        message["tool_calls"] = _to_calls(calls, name)
    if thinking := turn.get("reasoning_content"):
        if not isinstance(thinking, str):
            raise DataError(f"the reasoning_content of {name} is not text")
        message["reasoning_content"] = thinking
    if not (content or calls or thinking):
        raise DataError(f"{name}: the assistant says nothing")
    return message


def _to_calls(calls: list, name: str) -> list[dict]:
    """Tool calls as [{"name", "arguments"}]; arguments is an object, or JSON text (as OpenAI writes it)."""
    result = []
    for call in calls:
        call = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise DataError(f"{name}: a tool call without a name")
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            _parse(arguments, f"the arguments of the tool call in {name}")
        result.append({"name": call["name"], "arguments": arguments})
    return result


def _parse(text: str, where: str) -> object:
    """The JSON value in a field. Raises DataError."""
    value = parse_json(text)
    if isinstance(value, DataError):
        raise DataError(f"{where}: {value}")
    return value
