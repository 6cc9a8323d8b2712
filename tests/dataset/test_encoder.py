"""Ids are those of the whole text, in every kind of tokenizer, and no text becomes a control token."""

import json

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from common.errors import DataError
from dataset import chat
from dataset.lm_dataset import PretrainDataset

TEXTS = ["Hi there", "What colour is the sky?", "  Blue \n", "蓝色 😀 é ｱ", "def f(x):\n\treturn 1", "x" * 9]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level(normalizer=None, split=None):
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if split:
        to_bytes = pre_tokenizers.ByteLevel(False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return backend, trainers.BpeTrainer(vocab_size=400, show_progress=False,
                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(normalizer=None, pre_tokenizer=None):
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    return backend, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *BYTES], show_progress=False)


LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
DIGITS = pre_tokenizers.Split(r" ?\w+|\n+|[^\w\s]+| +", "isolated")
Metaspace = pre_tokenizers.Metaspace
MAKERS = {
    "GPT-2": lambda: byte_level(),
    "Llama 3, Qwen2": lambda: byte_level(normalizers.NFC(), DIGITS),
    "DeepSeek, lower case": lambda: byte_level(normalizers.Lowercase()),
    "Llama 2, legacy": lambda: sentencepiece(LEGACY),
    "Llama 2, not legacy": lambda: sentencepiece(None, Metaspace(prepend_scheme="first", split=False)),
    "a space before each text": lambda: sentencepiece(None, Metaspace(prepend_scheme="always")),
    "Gemma": lambda: sentencepiece(normalizers.Replace(" ", "▁")),
    "T5": lambda: (Tokenizer(models.Unigram()), trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)),
}  # fmt: skip


def tokenizer_of(name: str, template=CHATML, ordinary=("ü",), **options) -> PreTrainedTokenizerFast:
    backend, trainer = MAKERS[name]()
    if name == "T5":
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator([*TEXTS, "user assistant system"] * 3, trainer)
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] == "<unk>"]
    backend = Tokenizer.from_str(json.dumps(raw))  # the bytes are ordinary pieces
    backend.add_special_tokens([AddedToken(token, normalized=False, **options) for token in CONTROL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>",
                                   chat_template=template)


def say(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CHATS = [say("Hi there", "Blue"), say("  Hi ", "x", "蓝色 😀", "the sky", system="Hi"), say("ü Hi", "aüb")]


@pytest.mark.parametrize("options", [{}, {"rstrip": True}, {"lstrip": True}])
@pytest.mark.parametrize("name", MAKERS)
def test_a_conversation_has_the_ids_of_transformers(name, options):
    tokenizer = tokenizer_of(name, **options)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for messages in CHATS[:2] if name == "T5" else CHATS:
        for prompt in (False, True):
            theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False,
                                                   add_generation_prompt=prompt)
            ids, mask = chat.encode_chat(tokenizer, messages, add_generation_prompt=prompt)
            assert ids == theirs
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert [index for index, on in zip(ids, mask, strict=True) if on].count(end) == len(answers)
        if not options:  # a prompt in use is what stood before the answer in training
            prompt, _ = chat.encode_chat(tokenizer, messages[:-1], add_generation_prompt=True)
            ids, mask = chat.encode_chat(tokenizer, messages)
            first = len(prompt)
            assert ids[:first] == prompt and mask[first] == 1 and not mask[first - 1]


@pytest.mark.parametrize("name", MAKERS)
def test_no_text_of_a_user_becomes_a_control_token(name):
    tokenizer = tokenizer_of(name)
    control = {tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    numbers = [index for index, text in enumerate(chat.plain_encoder(tokenizer).names.values())]
    for text in (*CONTROL, "a</s>b", "<|im_end|>\n<|im_start|>", *map(str, numbers), "<s", "＜s＞"):
        try:
            ids, _ = chat.encode_chat(tokenizer, say(text, "x"))
        except DataError as error:  # T5's kind has no token for a character that it has not seen
            assert "no token for a character" in str(error)
            continue
        assert [index for index in ids if index in control] == [
            tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>") * 2]
        assert not control & set(chat.encode_text(tokenizer, text))


@pytest.mark.parametrize("name", MAKERS)
def test_a_text_and_what_follows_it_have_the_ids_of_the_whole_text(name):
    tokenizer = tokenizer_of(name)
    for before, after in (("What colour is the sky?", " Blue"), ("蓝色", "😀"), ("x", "xxxx"), ("", "Hi")):
        ids, mask = chat.encode_continuation(tokenizer, before, after)
        assert ids == tokenizer(before + after, add_special_tokens=False)["input_ids"]
        # The mask begins where the ids first differ from those of the text before, or stand for more.
        alone = tokenizer(before, add_special_tokens=False)["input_ids"]
        assert mask == sorted(mask) and sum(mask) > 0 and sum(mask) >= len(ids) - len(alone)


def test_ordinary_added_words_are_used_and_control_tokens_of_any_kind_are_not():
    tokenizer = tokenizer_of("GPT-2", ordinary=("ü", "  ", "<table>", "<|EOT|>", "<think>", "[INST]"),
                             template="{{ '[INST]' }}" + CHATML)
    encoder, of = chat.plain_encoder(tokenizer), tokenizer.convert_tokens_to_ids
    assert set(encoder.control) == {*CONTROL, "<|EOT|>", "<think>", "[INST]"}
    assert set(encoder.ordinary) == {"ü", "  ", "<table>"}
    for text in ("aüb", "a  b", "<table>"):
        ids = chat.encode_text(tokenizer, text)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert of(text.strip("ab") or "  ") in ids
    for text in ("<|EOT|>", "<think>", "[INST]"):
        assert of(text) not in chat.encode_text(tokenizer, text)


@pytest.mark.parametrize("post_processor, start", [
    (None, []),
    (lambda begin, end: processors.TemplateProcessing("<s> $A </s>", special_tokens=[begin, end]), ["<s>"]),
    (lambda begin, end: processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(
        "<s> $A", special_tokens=[begin])]), ["<s>"]),
    (lambda begin, end: processors.RobertaProcessing(end, begin), ["<s>"]),
    (lambda begin, end: processors.ByteLevel(), []),
])  # fmt: skip
def test_a_text_begins_in_training_as_the_tokenizer_begins_it(tmp_path, post_processor, start):
    tokenizer = tokenizer_of("GPT-2")
    begin, end = ((token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>"))
    if post_processor:
        tokenizer.backend_tokenizer.post_processor = post_processor(begin, end)
    start = tokenizer.convert_tokens_to_ids(start)
    assert chat.plain_encoder(tokenizer).start == start == tokenizer("Hi")["input_ids"][:len(start)]
    (tmp_path / "a.jsonl").write_text('{"text": "Hi there"}\n', encoding="utf-8")
    ids, labels = PretrainDataset(tmp_path / "a.jsonl", tokenizer, 64, cache_dir=tmp_path / "cache")[0]
    words = chat.encode_text(tokenizer, "Hi there")
    assert ids.tolist() == [*start, *words, tokenizer.eos_token_id]
    assert labels.tolist() == [-100, *ids.tolist()[1:]]
    assert chat.encode_continuation(tokenizer, "Hi", " there")[0] == [*start, *words]


def test_a_model_without_a_template_gets_ours_if_it_has_the_tokens():
    tokenizer = tokenizer_of("Llama 2, legacy", template=None)
    chat.ensure_template(tokenizer)
    messages = say("Hi", "Blue")
    assert chat.encode_chat(tokenizer, messages)[0] == tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False)
    for template, tokens in (("{{ 0 }}", CONTROL), (None, ["<s>"])):  # it has one, or lacks the tokens
        other = tokenizer_of("GPT-2", template=template)
        if tokens != CONTROL:
            backend = Tokenizer(models.BPE({"<": 0}, []))
            other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
        chat.ensure_template(other)
        assert other.chat_template == template
