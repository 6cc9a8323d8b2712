r"""What a model wrote -> a message: `chat.assistant_text` the other way round. A reader may skip this file.

    <think>\nRivers are long.\n</think>\n\nThe Rhine.
        {"role": "assistant", "reasoning_content": "Rivers are long.", "content": "The Rhine."}
    <tool_call>\n{"name": "clock", "arguments": {"zone": "Oslo"}}\n</tool_call>
        {"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": {"zone": "Oslo"}}]}

Four marks part the text: <think>, </think>, <tool_call> and </tool_call>. Where a tokenizer has a token for
a mark, this token alone is the mark, and the same letters in other tokens are ordinary words. Where it has
none, the letters are the mark.
"""

import re

from dataset.chat import assistant_text, plain_encoder
from dataset.json_records import parse_json

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
PART_AFTER = {"<think>": "reasoning", "<tool_call>": "call"}  # after the other two marks: content


def mark_ids(tokenizer) -> dict[int, str]:
    """The tokens of a tokenizer that are marks: {id: mark}."""
    return {index: token for token, index in tokenizer.get_added_vocab().items() if token in MARKS}


class Reply:
    """Sorts what a model writes into its parts, while the text arrives: reasoning, content, call.

    text: all that was written, marks included. parts: (name of the part, its text), in order.
    """

    def __init__(self, spelled=(), in_thought: bool = False):
        """spelled: the marks that stand as letters in the text. in_thought: the prompt ended in <think>."""
        self.text, self.parts = "", [("reasoning" if in_thought else "content", "")]
        self.spelled = re.compile("|".join(spelled) or r"(?!)")
        self.beginnings = {mark[:length] for mark in spelled for length in range(1, len(mark))}
        self.held = ""  # the last letters, where they may be the beginning of a mark

    @property
    def part(self) -> str:
        """The name of the part that is being written."""
        return self.parts[-1][0]

    def add_mark(self, mark: str) -> None:
        """Takes a mark, after which the next part begins."""
        self.end()
        self.text += mark
        self.parts.append((PART_AFTER.get(mark, "content"), ""))

    def add(self, text: str) -> list[tuple[str, str]]:
        """Takes more text. Returns what can be shown of it now: (name of the part, text), in order."""
        shown, text, self.held = [], self.held + text, ""
        while found := self.spelled.search(text):
            shown.append(self._put(text[:found.start()]))
            self.add_mark(found[0])
            text = text[found.end():]
        length = max((len(beginning) for beginning in self.beginnings if text.endswith(beginning)), default=0)
        shown.append(self._put(text[:len(text) - length]))
        self.held = text[len(text) - length:]
        return [piece for piece in shown if piece[1]]

    def end(self) -> list[tuple[str, str]]:
        """What `add` held back at the end of the text, which then is no mark."""
        held, self.held = self.held, ""
        return [self._put(held)] if held else []

    def _put(self, text: str) -> tuple[str, str]:
        part, before = self.parts[-1]
        self.text, self.parts[-1] = self.text + text, (part, before + text)
        return part, text

    def message(self) -> dict:
        """The message: role, content, and reasoning_content and tool_calls where there are any.

        A call that is no JSON object of a name and arguments stays in the content, as it was written.
        """
        thought, content, calls = "", "", []
        for part, text in self.parts:
            call = parse_call(text) if part == "call" else None
            if call:
                calls.append(call)
            elif part == "call":
                content += f"<tool_call>{text}</tool_call>"
            elif part == "reasoning":
                thought += text
            else:
                content += text
        if len(self.parts) > 1:  # the line breaks that assistant_text writes between the parts
            content = content.strip("\n")
        message = {"role": "assistant", "content": content}
        if thought := thought.strip("\n"):
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        return message

    def turn(self, tokenizer) -> dict:
        """The message as a part of the next prompt, in which its ids are those that the model wrote."""
        message = self.message()
        if assistant_text(message) == self.text or plain_encoder(tokenizer).template:
            return message
        return {"role": "assistant", "content": self.text}  # other line breaks, or an answer that was cut off


def read_message(message: dict) -> dict:
    """A message of a record, whose content may hold thinking and tool calls as text, with these apart."""
    reply = Reply(MARKS)
    reply.add(assistant_text(message))
    reply.end()
    return reply.message()


def ends_in_thought(message: dict) -> bool:
    """Whether the beginning of an answer ends in the middle of its thinking."""
    reply = Reply(MARKS)
    reply.add(assistant_text(message))
    return reply.part == "reasoning"


def parse_call(text: str) -> dict | None:
    """The text of a tool call -> {"name", "arguments"}, or None where it is no such object."""
    call = parse_json(text)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    if call.keys() - {"name", "arguments"}:  # another kind of object
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # JSON inside of JSON, as OpenAI writes it
        value = parse_json(arguments)
        arguments = value if isinstance(value, dict) else arguments
    return {"name": call["name"], "arguments": arguments}
