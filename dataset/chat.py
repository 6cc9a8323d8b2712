r"""The one definition of the prompt format: messages -> token ids and loss mask.

ChatML, as the datasets, every script and chat use it; the template in tokenizer_config.json says the same. A
tokenizer whose template says something else comes from another model: see dataset/foreign_chat.py.

    <|im_start|>system\n{content}<|im_end|>\n         only when there is a system message or a list of tools
    <|im_start|>user\n{content}<|im_end|>\n
    <|im_start|>assistant\n{content}<|im_end|>\n      {content}<|im_end|> is what the model learns to write

Control tokens come from here alone. Everything that people wrote is encoded by a copy of the tokenizer that
knows no control tokens, so "<|im_end|>" typed by a user stays eight harmless pieces of text. The one
exception is what the model itself must learn to write: <think>, </think>, <tool_call>, </tool_call> in an
assistant's message.

A conversation is rendered as pieces (text, is_control, is_supervised), each encoded apart from its
neighbours. The header "assistant\n" is a piece of its own, so the prompt of a generation ends in exactly the
ids of training:

    [..., ("<|im_start|>", True, False), ("assistant\n", False, False),
          ("Hello!", False, True), ("<|im_end|>", True, True), ("\n", False, False)]
"""

import json
import re

from tokenizers import Tokenizer

from dataset.foreign_chat import CannotEncode, ForeignTemplate, unknown_id
from dataset.jsonl import DECODER, DataError, check_unicode, keys_of

START, END = "<|im_start|>", "<|im_end|>"
MODEL_WRITES = re.compile(r"(</?think>|</?tool_call>)")  # control tokens that an assistant's text may contain
TOOLS_PREAMBLE = "You may call these tools by name, with JSON arguments:\n<tools>\n"

ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip

Piece = tuple[str, bool, bool]  # (text, is a control token, is supervised)


# records -> messages


def to_messages(record: dict) -> tuple[list[dict], list | None]:
    """The messages and the tools (None: none) of a record in any format that we accept.

    {"conversations": [...]} or {"messages": [...]} with role/content or from/value (human, gpt), optionally
    "system" and "tools" (a list, or a JSON string of one); {"instruction", "input", "output"}. Messages come
    back with the keys role (system, user, assistant, tool) and content, plus tool_calls and reasoning_content
    where there are any. Raises DataError (path and line are not its job) for another format or wrong roles.
    """
    turns = record.get("conversations")
    turns = record.get("messages") if turns is None else turns
    if turns is None and "instruction" in record and "output" in record:
        turns = [{"role": "user", "content": _join_instruction(record)},
                 {"role": "assistant", "content": record["output"]}]  # fmt: skip
    if turns is None:
        raise DataError(f"no conversations, messages or instruction and output in it, but {keys_of(record)}")
    if isinstance(turns, str):  # a CSV cell
        turns = parse_json(turns, "the conversation")
    if not isinstance(turns, list) or not turns:
        raise DataError("the conversation is not a list of messages")

    messages = [_to_message(turn, f"message {number}") for number, turn in enumerate(turns, 1)]
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise DataError("system is not text")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if any(message["role"] == "system" for message in messages[1:]):
        raise DataError("a system message that is not the first message")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("a conversation with no assistant message")
    return messages, _to_tools(record.get("tools"))


def _join_instruction(record: dict) -> str:
    parts = [record["instruction"], record.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise DataError("instruction and input must be text")
    return "\n".join(part for part in parts if part)


def _to_message(turn: object, name: str) -> dict:
    if not isinstance(turn, dict):
        raise DataError(f"{name} is not an object with role and content")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{name} has the role {str(role)[:30]!r}; known are system, user, assistant, tool")
    content, calls = turn.get("content", turn.get("value")), turn.get("tool_calls") or []
    if role == "function_call":  # LLaMA-Factory's spelling: the call is the content
        calls = parse_json(content, name) if isinstance(content, str) else content
        content, calls = "", calls if isinstance(calls, list) else [calls]
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):  # OpenAI's parts
        if all(isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"the content of {name} is not text")
    message = {"role": ROLES[role], "content": content}
    if message["role"] == "assistant":
        if calls:
            message["tool_calls"] = _to_calls(calls, name)
        if thinking := turn.get("reasoning_content"):
            if not isinstance(thinking, str):
                raise DataError(f"the reasoning_content of {name} is not text")
            message["reasoning_content"] = thinking
        if not content and len(message) == 2:
            raise DataError(f"{name}: the assistant says nothing")
    return message


def _to_calls(calls: object, name: str) -> list[dict]:
    """Tool calls as [{"name", "arguments"}]; arguments is an object, or JSON text (as OpenAI writes it)."""
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise DataError(f"{name}: a tool call without a name")
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            parse_json(arguments, f"the arguments of the tool call in {name}")
        result.append({"name": call["name"], "arguments": arguments})
    return result


def _to_tools(tools: object) -> list | None:
    if isinstance(tools, str):
        tools = parse_json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("tools is not a list of objects")
    return tools


def parse_json(text: str, what: str) -> object:
    """JSON inside a field. Raises DataError."""
    try:
        value = DECODER.decode(text)
        check_unicode(value)
        return value
    except json.JSONDecodeError as error:
        raise DataError(f"{what} is not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a key twice, half a surrogate pair, nested too deeply
        raise DataError(f"{what} is JSON that cannot be used ({str(error).split(chr(10))[0]})") from None


# messages -> pieces


def chat_pieces(messages: list[dict], tools: list | None, add_generation_prompt: bool) -> list[Piece]:
    """A conversation as pieces (text, is_control, is_supervised), in order."""
    pieces = []

    def turn(role: str, body: list[Piece], supervised: bool = False):
        pieces.extend([(START, True, False), (role + "\n", False, False)])
        pieces.extend(body)
        pieces.extend([(END, True, supervised), ("\n", False, False)])

    if tools:
        has_system = bool(messages) and messages[0]["role"] == "system"
        system = messages[0]["content"] if has_system else ""
        messages = messages[1:] if has_system else messages
        system += "\n\n" * bool(system) + TOOLS_PREAMBLE + "".join(_dump(tool) + "\n" for tool in tools)
        turn("system", [(system + "</tools>", False, False)])
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            parts = MODEL_WRITES.split(_assistant_text(message))  # text and control tokens alternate
            turn(role, [(part, index % 2 == 1, True) for index, part in enumerate(parts)], supervised=True)
        elif role == "tool":
            opened, closed = ("<tool_response>", True, False), ("</tool_response>", True, False)
            turn("user", [opened, (f"\n{content}\n", False, False), closed])
        else:
            turn(role, [(content, False, False)])
    if add_generation_prompt:
        pieces.extend([(START, True, False), ("assistant\n", False, False)])
    return pieces


def _assistant_text(message: dict) -> str:
    """What the assistant writes: its thinking, its words, its tool calls."""
    thinking, content = message.get("reasoning_content"), message["content"] or ""
    text = f"<think>\n{thinking}\n</think>\n\n{content}" if thinking else content
    for index, call in enumerate(message.get("tool_calls") or []):
        call = call.get("function", call)
        arguments = call.get("arguments", {})
        arguments = arguments if isinstance(arguments, str) else _dump(arguments)
        text += "\n" * bool(content or index)
        text += f'<tool_call>\n{{"name": {_dump(call["name"])}, "arguments": {arguments}}}\n</tool_call>'
    return text


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# pieces -> ids


class PlainEncoder:
    """The tokenizer without its control tokens, and the control tokens apart.

    `encode_batch` can't return the id of a control token whatever the text says: the copy has no added
    tokens, and no merge of its BPE ends in one.
    """

    def __init__(self, tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError("the tokenizer has no tokenizer.json (a 'fast' tokenizer is needed)")
        self.control = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        self.config = json.loads(backend.to_str())
        self.config.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        if merges := self.config["model"].get("merges"):  # Llama 2 spells "</s>" as an ordinary merge, too
            self.config["model"]["merges"] = [pair for pair in merges if "".join(pair) not in self.control]
        self.backend = Tokenizer.from_str(json.dumps(self.config))
        self.unknown = unknown_id(self.config["model"], self.backend)
        self.forbidden = {*self.control.values(), self.unknown}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Texts -> ids, on all cores. Raises CannotEncode, and DataError if one gave a control token."""
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # half a surrogate pair, as a terminal may deliver it
            return self.encode_batch([text.encode("utf-8", "replace").decode("utf-8") for text in texts])
        except Exception as error:  # tokenizers has no other kind
            raise CannotEncode(error) from None
        batch = [encoding.ids for encoding in encodings]
        if not all(self.forbidden.isdisjoint(ids) for ids in batch):
            if any(self.unknown in ids for ids in batch):
                raise CannotEncode
            raise DataError("this tokenizer gives control tokens for ordinary text: it cannot be used safely")
        return batch


def plain_encoder(tokenizer) -> PlainEncoder:
    """The tokenizer's PlainEncoder, made once and kept on it; made anew when tokens were added since."""
    size = len(tokenizer)
    kept = getattr(tokenizer, "_plain_encoder", None)
    if kept is None or kept[0] != size:
        kept = tokenizer._plain_encoder = (size, PlainEncoder(tokenizer))
    return kept[1]


def foreign_template(tokenizer) -> ForeignTemplate | None:
    """The tokenizer's chat template where it writes another format than ours; made once and kept on it."""
    kept = getattr(tokenizer, "_foreign_template", None)
    if kept is None or kept[0] != (len(tokenizer), tokenizer.chat_template):
        plain_encoder(tokenizer)  # raises where it has no backend that tells offsets
        foreign = tokenizer.chat_template and not _writes_our_format(tokenizer)
        template = ForeignTemplate(tokenizer) if foreign else None
        kept = tokenizer._foreign_template = ((len(tokenizer), tokenizer.chat_template), template)
    return kept[1]


def _writes_our_format(tokenizer) -> bool:
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    try:
        return all("".join(text for text, _, _ in chat_pieces(messages, None, prompt))
                   == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                   for messages, prompt in (([user, assistant, user], True),
                                            ([{"role": "system", "content": "Be"}, user, assistant], False)))
    except Exception:  # it raises for a system message, say
        return False


def write_chat(tokenizer, messages: list[dict], tools: list | None = None,
               add_generation_prompt: bool = False) -> list[Piece]:  # fmt: skip
    """A conversation as pieces: in our format, or the tokenizer's own template's. Raises DataError."""
    for message in messages:  # a template would write any role as it is, control tokens in it included
        if message["role"] not in ROLES.values():
            raise DataError(f"the role {str(message['role'])[:30]!r} is not system, user, assistant or tool")
    if template := foreign_template(tokenizer):
        return template.pieces(tokenizer, messages, tools, add_generation_prompt)
    return chat_pieces(messages, tools, add_generation_prompt)


def encode_pieces(tokenizer, conversations: list[list[Piece]]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each conversation; all their texts go to the tokenizer as one batch.

    Raises DataError when the tokenizer has no <|im_start|> and <|im_end|>, and no template of its own.
    """
    encoder = plain_encoder(tokenizer)
    if template := foreign_template(tokenizer):
        return template.encode(conversations)
    for token in (START, END):
        if token not in encoder.control:
            raise DataError(f"the tokenizer has no {token} token, which chat needs (model/tokenizer has it)")
    # a control token that the tokenizer lacks (a foreign one without <think>) is spelled out as text
    texts = list({text for pieces in conversations for text, control, _ in pieces
                  if not (control and text in encoder.control)})  # fmt: skip
    ids_of = dict(zip(texts, encoder.encode_batch(texts), strict=True))
    result = []
    for pieces in conversations:
        ids, mask = [], []
        for text, control, supervised in pieces:
            piece = [encoder.control[text]] if control and text in encoder.control else ids_of[text]
            ids += piece
            mask += [int(supervised)] * len(piece)
        result.append((ids, mask))
    return result


def encode_chat(tokenizer, messages: list[dict], tools: list | None = None,
                add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:  # fmt: skip
    """Messages -> (ids, mask), mask 1 on the assistant's words and their <|im_end|>. Raises DataError."""
    return encode_pieces(tokenizer, [write_chat(tokenizer, messages, tools, add_generation_prompt)])[0]


def encode_text(tokenizer, text: str) -> list[int]:
    """Plain text -> ids, none of them a control token."""
    return plain_encoder(tokenizer).encode_batch([text])[0]
