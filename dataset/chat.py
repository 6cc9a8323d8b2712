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
from pathlib import Path

from common.errors import DataError
from dataset.encoder import Piece, PlainEncoder
from dataset.foreign_chat import MODEL_WRITES, ForeignTemplate
from dataset.messages import ROLES

START, END = "<|im_start|>", "<|im_end|>"
TOOLS_PREAMBLE = "You may call these tools by name, with JSON arguments:\n<tools>\n"

# --- messages -> pieces -------------------------------------------------------------------------------------


def write_chat(tokenizer, messages: list[dict], tools=None, add_generation_prompt=False,
               thinking=False) -> list[Piece]:
    """A conversation as pieces, in our format or in that of the tokenizer's template. Raises DataError.

    thinking: whether a foreign template that has a switch for it lets the answer begin with a thought.
    """
    for message in messages:  # An unknown role is refused: it might contain control tokens.
        if message["role"] not in ROLES.values():
            raise DataError(f"the role {str(message['role'])[:30]!r} is not system, user, assistant or tool")
    encoder = plain_encoder(tokenizer)
    template = encoder.template
    words_alone = not tools and all(message.keys() <= {"role", "content", "trained"} for message in messages)
    if template and not (template.writes_words_like_us and words_alone):
        return template.pieces(messages, tools, add_generation_prompt, thinking)
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


def plain_encoder(tokenizer) -> PlainEncoder:
    """The tokenizer's PlainEncoder, which is kept on the tokenizer.

    A new one is made if tokens or the chat template have changed. Its attribute `template` is what writes
    prompts in another format than ours, or None.
    """
    state = (len(tokenizer), tokenizer.chat_template)
    kept_state, encoder = getattr(tokenizer, "_plain_encoder", (None, None))
    if kept_state != state:
        encoder, conversations = PlainEncoder(tokenizer), (WORDS, WORDS_AND_MORE)
        words, more = [writes_our_format(tokenizer, *conversation) for conversation in conversations]
        foreign = tokenizer.chat_template and not (words and more)
        encoder.template = ForeignTemplate(tokenizer, encoder, words) if foreign else None
        tokenizer._plain_encoder = (state, encoder)
    return encoder


def encode_pieces(tokenizer, conversations: list[list[Piece]]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each conversation. All of them go to the tokenizer as one batch.

    Raises DataError where the tokenizer lacks <|im_start|> or <|im_end|> and has no template of its own.
    """
    encoder = plain_encoder(tokenizer)
    for token in (START, END):
        if not encoder.template and token not in encoder.control:
            raise DataError(f"the tokenizer has no {token} token, which chat needs (model/tokenizer has it)")
    return encoder.encode_pieces(conversations, cut_answers=encoder.template is None)


def encode_chat(tokenizer, messages, tools=None, add_generation_prompt=False) -> tuple[list[int], list[int]]:
    """Messages -> (ids, mask), mask 1 on the assistant's words and their <|im_end|>. Raises DataError."""
    pieces = write_chat(tokenizer, messages, tools, add_generation_prompt)
    return encode_pieces(tokenizer, [pieces])[0]


def encode_continuation(tokenizer, before: str, after: str = "") -> tuple[list[int], list[int]]:
    """Plain text -> (ids, mask), none of them a control token, but for the one that begins every text.

    mask: 1 on the tokens of `after`. Both parts are encoded as one text.
    """
    encoder = plain_encoder(tokenizer)
    ids, mask = encoder.encode_pieces([[(before, False, False), (after, False, True)]])[0]
    return encoder.start + ids, [0] * len(encoder.start) + mask


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


USER, ANSWER = {"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "\nYo "}
SYSTEM, CALL = {"role": "system", "content": "Be"}, {"name": "go", "arguments": {"to": "a"}}
# Conversations that show how a template writes: messages, tools, and whether a prompt for an answer follows.
WORDS = [([USER, ANSWER, USER], None, True), ([SYSTEM, USER, ANSWER], None, False)]
WORDS_AND_MORE = [([USER, {**ANSWER, "tool_calls": [CALL]}, {"role": "tool", "content": "ok"}, ANSWER],
                   [{"name": "go"}], False),
                  ([USER, {**ANSWER, "reasoning_content": "Hm"}, USER, ANSWER], None, False)]  # fmt: skip


def ensure_template(tokenizer) -> None:
    """Gives our chat template to a tokenizer that has none, but the control tokens that ours needs.

    Such a model is trained with our format. With the template the format is saved and used, too.
    """
    if not tokenizer.chat_template and {START, END} <= plain_encoder(tokenizer).control.keys():
        tokenizer.chat_template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def writes_our_format(tokenizer, *conversations) -> bool:
    """Whether the tokenizer's template writes these conversations as `chat_pieces` does."""
    for messages, tools, prompt in conversations:
        try:
            theirs = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
                                                   add_generation_prompt=prompt)
        except Exception:  # a template may refuse a system message, for example
            return False
        if theirs != "".join(text for text, _, _ in chat_pieces(messages, tools, prompt)):
            return False
    return True
