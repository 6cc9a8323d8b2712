"""The tools of a record, and its tool calls, in all the ways they are written. A reader may skip this file.

A tool call comes back as {"name", "arguments"}, as dataset/chat.py writes it. Others write it as OpenAI does,
with one more level and the arguments as text; with other names for its keys; or the whole list as text.
"""

import json

from common.errors import DataError
from dataset.json_records import parse_field, parse_json, rows_of, without_nulls
from dataset.keys import NAMES, Note, is_empty, name_unknown, value_of


def read_tools(tools: object) -> list | None:
    """The tools as a list of objects; None where there are none. Raises DataError."""
    if isinstance(tools, str):
        tools = parse_field(tools, "tools") if tools.strip() else None
    if isinstance(tools, dict) and ("name" in tools or "function" in tools):
        tools = [tools]
    if isinstance(tools, list):
        tools = [parse_field(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
    if is_empty(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("tools is not a list of objects")
    return [_with_schema(tool) for tool in tools]


def _with_schema(tool: dict) -> dict:
    """The tool, with its parameters as an object. Tables have them as JSON text: each tool has other ones."""
    for key in ("function", "parameters"):
        value = parse_json(tool[key]) if isinstance(tool.get(key), str) else tool.get(key)
        if isinstance(value, dict):
            tool = {**tool, key: _with_schema(value) if key == "function" else value}
    return tool


def read_calls(calls: object, name: str, note: Note) -> list[dict]:
    """Tool calls as [{"name", "arguments"}]; arguments is an object, or JSON text (as OpenAI writes it)."""
    calls, result = parse_field(calls, f"the tool calls of {name}") if isinstance(calls, str) else calls, []
    if isinstance(calls, dict):
        calls = rows_of(calls) or [calls]
    for call in calls if isinstance(calls, list) else [calls]:
        call = parse_field(call, f"a tool call of {name}") if isinstance(call, str) else call
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, str) and function.lstrip().startswith("{"):
            function = parse_field(function, f"a tool call of {name}")
        known = {*NAMES["name"], *NAMES["arguments"]}
        if isinstance(function, dict) and function:  # OpenAI's calls have one more level than others
            name_unknown(call, {"function"}, "tool call", note)
            call = function
        elif isinstance(function, str):  # {"function": "add", "arguments": ...}
            if value_of(call, "name") not in (None, function):
                raise DataError(f"{name}: a tool call with a name and another function")
            call, known = {"name": function} | call, {*known, "function"}
        if not isinstance(call, dict) or not isinstance(value_of(call, "name"), str):
            raise DataError(f"{name}: a tool call without a name")
        name_unknown(call, known, "tool call", note)
        arguments = _arguments(value_of(call, "arguments"), f"the arguments of the tool call in {name}")
        result.append({"name": value_of(call, "name"), "arguments": arguments})
    return result


def _arguments(arguments: object, where: str) -> object:
    """An object, or JSON text of one as it was written. where: for complaints. Raises DataError."""
    value = arguments
    if isinstance(arguments, str) and arguments.strip():
        value = parse_field(arguments, where)
        if isinstance(value, str) and isinstance(inner := parse_json(value), dict):
            arguments, value = value, inner  # JSON text of JSON text, as some servers write it
        elif isinstance(parse_json(arguments), DataError):  # a literal of Python
            arguments = value
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise DataError(f"{where}: NaN and infinity are not valid JSON") from None
    return {} if value is None or isinstance(value, str) and not value.strip() else arguments


def without_filled_nulls(messages: list[dict], tools: list | None, note: Note) -> list | None:
    """Returns the tools without nulls, and takes the nulls out of the arguments of the calls.

    In a file that the library datasets wrote, every call has the arguments of all calls, and null for those
    that are not its own. A null stays only where the tool itself has an argument of that name. What is taken
    out is noted, unless it is an argument's default.
    """
    declared = {}  # tool -> its arguments
    for tool in tools or []:
        tool = tool.get("function", tool)
        schema = tool.get("parameters") if isinstance(tool, dict) else None
        properties = schema.get("properties") if isinstance(schema, dict) else None
        if isinstance(properties, dict) and isinstance(tool.get("name"), str):
            declared[tool["name"]] = {key for key, value in properties.items() if value is not None}
    for call in [call for message in messages for call in message.get("tool_calls", [])]:
        if isinstance(call["arguments"], dict):
            own = declared.get(call["name"], ())
            kept = {key: without_nulls(value) for key, value in call["arguments"].items()
                    if value is not None or key in own}  # fmt: skip
            if kept != call["arguments"]:
                call["arguments"] = kept
                note("a null among the arguments of a tool call is left out, as if a table had filled it in")
    cleaned = without_nulls(tools)
    # A schema that pydantic made says "default": null of what may be left out, which says nothing more.
    if cleaned != without_nulls(tools, only="default"):
        note("a null in the tools is left out, as if a table had filled it in")
    return cleaned
