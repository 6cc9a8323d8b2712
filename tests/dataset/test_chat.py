"""The prompt format: its text and mask, its equality with the jinja template, no text turned control."""

import copy
import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import DataError
from dataset import chat

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|pad|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "加 two", "parameters": {"a": 1}}},
    {"name": "tell", "parameters": {}},
]


def supervised(tokenizer, messages, tools=None):
    ids, mask = chat.encode_chat(tokenizer, messages, tools)
    assert len(ids) == len(mask)
    return tokenizer.decode([index for index, on in zip(ids, mask, strict=True) if on])


def control_ids(tokenizer):
    return set(tokenizer.backend_tokenizer.get_added_tokens_decoder())


def test_layout_and_mask(tokenizer):
    messages = [{"role": "system", "content": "Be kind."}, USER, ASSISTANT]
    ids, mask = chat.encode_chat(tokenizer, messages)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    assert supervised(tokenizer, messages) == "Hello!<|im_end|>"
    first = mask.index(1)
    assert tokenizer.decode(ids[:first]).endswith("assistant\n") and mask[-1] == 0
    assert chat.encode_chat(tokenizer, [USER])[1] == [0] * len(chat.encode_chat(tokenizer, [USER])[0])


@pytest.mark.parametrize(
    "answer", ["Hello!", " \n spaced", "\n\nstarts with line ends", "你好", "a\u2028b\x00\r\n "]
)
def test_prompt_of_generation_is_the_beginning_of_training(tokenizer, answer):
    """At prompt time the model must see exactly the ids that preceded the answer in training."""
    prompt, _ = chat.encode_chat(tokenizer, [USER], add_generation_prompt=True)
    ids, mask = chat.encode_chat(tokenizer, [USER, {"role": "assistant", "content": answer}])
    assert ids[: mask.index(1)] == prompt
    assert supervised(tokenizer, [USER, {"role": "assistant", "content": answer}]) == answer + "<|im_end|>"


CONVERSATIONS = [
    ([USER, ASSISTANT], None),
    ([{"role": "system", "content": "You are 小草. "}, USER, ASSISTANT, USER, ASSISTANT, USER], None),
    ([USER, ASSISTANT], TOOLS),
    ([{"role": "system", "content": "S."}, USER, ASSISTANT], TOOLS),
    (
        [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "add", "arguments": {"a": "二"}}}],
            },
            {"role": "tool", "content": '{"sum": 3}.'},
            ASSISTANT,
        ],
        TOOLS,
    ),
    (
        [
            USER,
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [{"name": "add", "arguments": '{"a":1}'}, {"name": "tell", "arguments": {}}],
            },
            {"role": "tool", "content": "ok"},
            {"role": "tool", "content": "two"},
            ASSISTANT,
        ],
        TOOLS,
    ),
    ([USER, {"role": "assistant", "content": "4.", "reasoning_content": "2 and 2\nis 4."}], None),
    (
        [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour <tool_call>x</tool_call>"}],
        None,
    ),
]


@pytest.mark.parametrize("messages, tools", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True])
def test_equals_the_template_of_transformers(tokenizer, messages, tools, prompt):
    ids, mask = chat.encode_chat(tokenizer, messages, tools, add_generation_prompt=prompt)
    theirs = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        add_generation_prompt=prompt,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert tokenizer.decode(ids) == tokenizer.decode(theirs["input_ids"])
    assert ids == theirs["input_ids"]
    assert mask == theirs["assistant_masks"]


def test_what_the_assistant_writes_is_supervised(tokenizer):
    for messages, tools in CONVERSATIONS:
        said = "".join(chat.assistant_text(m) + "<|im_end|>" for m in messages if m["role"] == "assistant")
        assert supervised(tokenizer, messages, tools) == said
    thinking = [USER, {"role": "assistant", "content": "4.", "reasoning_content": "2 + 2"}]
    assert supervised(tokenizer, thinking) == "<think>\n2 + 2\n</think>\n\n4.<|im_end|>"


text = st.one_of(
    st.text(max_size=20),
    st.lists(
        st.sampled_from(
            [
                *CONTROL,
                "<|im",
                "_start|>",
                "assistant\n",
                "<",
                ">",
                "\n",
                " ",
                "|",
                "<|im_end|",
                "你",
                "\U0001f431",
                "<|im_start|>assistant\n",
            ]
        ),
        max_size=6,
    ).map("".join),
)


@settings(max_examples=200, deadline=None)
@example("".join(CONTROL))
@given(text)
def test_no_text_becomes_a_control_token_and_all_text_returns(tokenizer, words):
    ids = chat.encode_text(tokenizer, words)
    assert not control_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids) == words


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), text), min_size=1, max_size=5), text
)
def test_supervised_is_exactly_what_the_assistant_said(tokenizer, turns, system):
    messages = [{"role": "system", "content": system}] + [
        {"role": role, "content": words} for role, words in turns
    ]
    said = "".join(words + "<|im_end|>" for role, words in turns if role == "assistant")
    assert supervised(tokenizer, messages) == said
    ids, mask = chat.encode_chat(tokenizer, messages)
    # control tokens: two for each turn, two more for a tool's, and what an assistant may write
    allowed = [
        tokenizer.convert_tokens_to_ids(token)
        for token in ("<think>", "</think>", "<tool_call>", "</tool_call>")
    ]
    control = [(index, on) for index, on in zip(ids, mask, strict=True) if index in control_ids(tokenizer)]
    frame = [index for index, on in control if index not in allowed]
    assert len(frame) == 2 * len(messages) + 2 * sum(role == "tool" for role, _ in turns)
    assert all(on for index, on in control if index in allowed)


def test_half_a_surrogate_pair_from_a_terminal(tokenizer):
    assert tokenizer.decode(chat.encode_text(tokenizer, "a\udce4b")) == "a?b"


def test_tokenizer_without_the_tokens_of_chat_or_without_a_backend():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(DataError, match="no <|im_start|> token"):
        chat.encode_chat(bare, [USER, ASSISTANT])
    assert len(chat.encode_text(bare, "abc")) == 3
    # tokens added later are noticed, and <think>, which this tokenizer lacks, is spelled out
    bare.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert len(chat.encode_text(bare, "<|im_end|>")) == 10
    assert (
        sum(chat.encode_chat(bare, [USER, {"role": "assistant", "content": "<think>"}])[1])
        == len("<think>") + 1
    )
    with pytest.raises(DataError, match="fast"):
        slow = type("Slow", (), {"__len__": lambda self: 1, "chat_template": None})
        chat.encode_text(slow(), "x")


def test_control_tokens_that_are_also_merges_can_not_be_reached():
    """Llama 2's BPE can build "</s>" out of ordinary pieces; our copy of a tokenizer never does."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["<", "/", "s", ">", "</", "s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "/"), ("s", ">"), ("</", "s>")]))
    assert backend.encode("</s>").ids == [6]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert chat.encode_text(tokenizer, "</s>") == [4, 5]


def test_tokenizer_stays_copyable_and_saveable(tokenizer, tmp_path):
    chat.encode_text(tokenizer, "x")
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert chat.encode_text(other, "Hi <|im_end|>") == chat.encode_text(tokenizer, "Hi <|im_end|>")
    tokenizer.save_pretrained(tmp_path)
    assert "_plain_encoder" not in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")
