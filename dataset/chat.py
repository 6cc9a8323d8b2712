r"""The one definition of the prompt format: messages -> token ids and loss mask.

The format is ChatML. The datasets, every script and the chat use this file, and the template in
tokenizer_config.json writes the same. A model from elsewhere brings a tokenizer with another template: see
dataset/foreign_chat.py.

    <|im_start|>system\n{content}<|im_end|>\n         only when there is a system message or a list of tools
    <|im_start|>user\n{content}<|im_end|>\n
    <|im_start|>assistant\n{content}<|im_end|>\n      {content}<|im_end|> is what the model learns to write

Control tokens such as <|im_end|> come from this file alone. The words of people are encoded by a copy of the
tokenizer that knows no control tokens, so "<|im_end|>" typed by a user is encoded as harmless ordinary
text. In the assistant's messages there is an exception: <think>, </think>, <tool_call> and </tool_call>
become control tokens there, because the model itself must learn to write them.

A conversation is written as pieces (text, is_control, is_supervised), and each piece is encoded apart from
its neighbours, so no token reaches over the border of two pieces. The header "assistant\n" is a piece of its
own. Therefore the ids of a prompt are exactly those that came before the answer in training:

    [..., ("<|im_start|>", True, False), ("assistant\n", False, False),
          ("Hello!", False, True), ("<|im_end|>", True, True), ("\n", False, False)]
"""

import json
import re
from functools import cached_property

from tokenizers import Tokenizer

from common.errors import DataError
from common.files import one_line
from dataset.foreign_chat import HAS_NO_TOKEN, CannotEncode, ForeignTemplate, Piece, unknown_id
from dataset.messages import ROLES

START, END = "<|im_start|>", "<|im_end|>"
MODEL_WRITES = re.compile(r"(</?think>|</?tool_call>)")  # control tokens that an assistant's text may contain
TOOLS_PREAMBLE = "You may call these tools by name, with JSON arguments:\n<tools>\n"

# --- messages -> pieces -------------------------------------------------------------------------------------


def write_chat(tokenizer, messages: list[dict], tools=None, add_generation_prompt=False) -> list[Piece]:
    """A conversation as pieces, in our format or in that of the tokenizer's template. Raises DataError."""
    for message in messages:  # An unknown role is refused: it might contain control tokens.
        if message["role"] not in ROLES.values():
            raise DataError(f"the role {str(message['role'])[:30]!r} is not system, user, assistant or tool")
    if template := plain_encoder(tokenizer).template:
        return template.pieces(tokenizer, messages, tools, add_generation_prompt)
    return chat_pieces(messages, tools, add_generation_prompt)


def chat_pieces(messages: list[dict], tools: list | None, add_generation_prompt: bool) -> list[Piece]:
    """A conversation as pieces (text, is_control, is_supervised), in order."""
    if tools:
        system = TOOLS_PREAMBLE + "".join(to_json(tool) + "\n" for tool in tools) + "</tools>"
        if messages and messages[0]["role"] == "system":
            if messages[0]["content"]:
                system = messages[0]["content"] + "\n\n" + system
            messages = messages[1:]
        messages = [{"role": "system", "content": system}, *messages]
    pieces = []
    for message in messages:
        role, content = message["role"], message["content"]
        is_supervised = role == "assistant" and message.get("trained", True)
        if role == "assistant":
            # `split` also returns what it splits at: text at even places, control tokens at odd ones.
            parts = MODEL_WRITES.split(assistant_text(message))
            body = [(part, index % 2 == 1, is_supervised) for index, part in enumerate(parts)]
        elif role == "tool":
            role = "user"  # ChatML has no header for tools, so a result comes as a message of the user
            body = [("<tool_response>", True, False), (f"\n{content}\n", False, False),
                    ("</tool_response>", True, False)]  # fmt: skip
        else:
            body = [(content, False, False)]
        pieces += [(START, True, False), (role + "\n", False, False), *body,
                   (END, True, is_supervised), ("\n", False, False)]  # fmt: skip
    if add_generation_prompt:
        pieces += [(START, True, False), ("assistant\n", False, False)]
    return pieces


def assistant_text(message: dict) -> str:
    """What the assistant writes: its thinking, its words, its tool calls."""
    thinking, content = message.get("reasoning_content"), message["content"] or ""
    text = f"<think>\n{thinking}\n</think>\n\n{content}" if thinking else content
    for index, call in enumerate(message.get("tool_calls") or []):
        call = call.get("function", call)  # OpenAI's records have one more level than others
        arguments = call.get("arguments", {})
        arguments = arguments if isinstance(arguments, str) else to_json(arguments)
        if content or index > 0:
            text += "\n"
        call = '{"name": ' + to_json(call["name"]) + ', "arguments": ' + arguments + "}"
        text += f"<tool_call>\n{call}\n</tool_call>"
    return text


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- pieces -> ids ------------------------------------------------------------------------------------------


class PlainEncoder:
    """A copy of the tokenizer that knows no control tokens, and beside it a table of these tokens.

    The copy has no added tokens. Byte-pair encoding (BPE) builds long tokens out of short ones by a list of
    pairs to merge. A pair that merges into a control token is taken off the list. `encode_batch` also checks
    its result.
    """

    def __init__(self, tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError("the tokenizer has no tokenizer.json (a 'fast' tokenizer is needed)")
        self.tokenizer = tokenizer
        self.control = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        self.config = json.loads(backend.to_str())
        self.config.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        if merges := self.config["model"].get("merges"):  # Llama 2 has merges that build "</s>" from letters
            self.config["model"]["merges"] = [pair for pair in merges if "".join(pair) not in self.control]
        self.backend = Tokenizer.from_str(json.dumps(self.config))
        self.unknown = unknown_id(self.config["model"], self.backend)
        self.forbidden = {*self.control.values(), self.unknown}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Texts -> ids, on all cores.

        Raises CannotEncode for a text with an unknown character, and DataError if the result has a control
        token in it.
        """
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # an invalid character, as from a wrongly set terminal
            return self.encode_batch([text.encode("utf-8", "replace").decode("utf-8") for text in texts])
        except Exception as error:  # the library raises plain Exceptions
            raise CannotEncode(f"{HAS_NO_TOKEN} ({one_line(error)})") from None
        batch = [encoding.ids for encoding in encodings]
        for ids in batch:
            if not self.forbidden.isdisjoint(ids):
                if self.unknown in ids:
                    raise CannotEncode(HAS_NO_TOKEN)
                raise DataError("this tokenizer makes control tokens of ordinary text, which is not safe")
        return batch

    @cached_property
    def template(self) -> ForeignTemplate | None:
        """The tokenizer's chat template if it writes another format than ours."""
        is_foreign = self.tokenizer.chat_template and not writes_our_format(self.tokenizer)
        return ForeignTemplate(self.tokenizer) if is_foreign else None


def plain_encoder(tokenizer) -> PlainEncoder:
    """The tokenizer's PlainEncoder, which is kept on the tokenizer.

    A new one is made if tokens or the chat template have changed.
    """
    state = (len(tokenizer), tokenizer.chat_template)
    kept_state, encoder = getattr(tokenizer, "_plain_encoder", (None, None))
    if kept_state != state:
        encoder = PlainEncoder(tokenizer)
        tokenizer._plain_encoder = (state, encoder)
    return encoder


def encode_pieces(tokenizer, conversations: list[list[Piece]]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each conversation. The texts of all conversations go to the tokenizer as one batch.

    Raises DataError where the tokenizer lacks <|im_start|> or <|im_end|> and has no template of its own.
    """
    encoder = plain_encoder(tokenizer)
    if encoder.template:
        return encoder.template.encode(conversations)
    for token in (START, END):
        if token not in encoder.control:
            raise DataError(f"the tokenizer has no {token} token, which chat needs (model/tokenizer has it)")
    ids_of = {(text, True): [index] for text, index in encoder.control.items()}  # (text, is_control) -> ids
    pieces = {(text, control) for conversation in conversations for text, control, _ in conversation}
    # What is left are texts. (<think> is left, too, if this tokenizer has no such token.)
    left = [piece for piece in pieces if piece not in ids_of]
    ids_of.update(zip(left, encoder.encode_batch([text for text, _ in left]), strict=True))
    result = []
    for conversation in conversations:
        ids, mask = [], []
        for text, control, supervised in conversation:
            new_ids = ids_of[text, control]
            ids += new_ids
            mask += [int(supervised)] * len(new_ids)
        result.append((ids, mask))
    return result


def encode_chat(tokenizer, messages, tools=None, add_generation_prompt=False) -> tuple[list[int], list[int]]:
    """Messages -> (ids, mask), mask 1 on the assistant's words and their <|im_end|>. Raises DataError."""
    return encode_pieces(tokenizer, [write_chat(tokenizer, messages, tools, add_generation_prompt)])[0]


def encode_text(tokenizer, text: str) -> list[int]:
    """Plain text -> ids, none of them a control token."""
    return plain_encoder(tokenizer).encode_batch([text])[0]


def end_of_text(tokenizer) -> int:
    """The control token that ends a pretraining document. Raises DataError where the tokenizer has none."""
    end = plain_encoder(tokenizer).control.get("<|endoftext|>", tokenizer.eos_token_id)
    if end is None:
        raise DataError("the tokenizer has neither <|endoftext|> nor an eos token to end a document with")
    return end


# --- models from elsewhere ----------------------------------------------------------------------------------


def writes_our_format(tokenizer) -> bool:
    """Whether the tokenizer's template writes two short conversations as `chat_pieces` does."""
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    system = {"role": "system", "content": "Be"}
    for messages, prompt in (([user, assistant, user], True), ([system, user, assistant], False)):
        try:
            theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception:  # a template may refuse a system message, for example
            return False
        if theirs != "".join(text for text, _, _ in chat_pieces(messages, None, prompt)):
            return False
    return True
