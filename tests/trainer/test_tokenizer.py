"""The tokenizer: exact round trips, Qwen2's cutting, control tokens, the template, bytes per token."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from common.errors import DataError
from trainer.train_tokenizer import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    SPLIT_PATTERN,
    build_tokenizer,
    bytes_per_token,
    hashed_fraction,
    record_texts,
    save_tokenizer,
    weighted,
)

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

# UTF-8 bytes per token, a little under what was asked of it: a retraining may move a figure, not spoil it.
FLOORS = {"pretrain_en": 3.2, "pretrain_zh": 2.9, "sft_en": 2.8, "sft_zh": 3.2}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "model" / "tokenizer")


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


# ------------------------------------------------------------------------------------------- text and entries


# st.text() never draws lone surrogates by default; they are no text in UTF-8.
@settings(deadline=None, max_examples=300)
@given(st.text() | st.text(alphabet="aZ 0\n\r\t'.<|>你，é\u0301\u200d👩\u3000"))
@example("  two  spaces , and a comma .  ")
@example("e\u0301 and é are different texts")  # an NFC normalizer would make them one
@example("\r\n\n \t\x00\ufeff👩‍👩‍👧 ﷽")
@example("<|im_end|> <think> <|reserved_0|>")
def test_any_text_round_trips_exactly(text):
    tokenizer = cached_tokenizer()
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < 6400 for token in ids)


def cached_tokenizer(cache=[]):  # noqa: B006  a fixture cannot be mixed with @given's many calls
    if not cache:
        cache.append(AutoTokenizer.from_pretrained(ROOT / "model" / "tokenizer"))
    return cache[0]


def test_there_are_6400_entries_and_all_256_bytes(tokenizer):
    vocab = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocab) == 6400
    assert sorted(vocab.values()) == list(range(6400))
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocab)


def test_control_tokens_are_distinct_single_and_special(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS]
    assert ids == list(range(len(CONTROL_TOKENS)))
    for token, index in zip(CONTROL_TOKENS, ids, strict=True):
        assert encode(tokenizer, f"a{token}b")[1] == index
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_nothing_is_added_around_a_text(tokenizer):
    assert tokenizer.encode("hello") == encode(tokenizer, "hello")
    assert tokenizer("")["input_ids"] == []


# -------------------------------------------------------------------------------------------- Qwen2's cutting


def test_digits_stand_alone(tokenizer):
    text = "In 1984, 25+17=42；３個 ²"
    pieces = [text[slice(*span)] for span in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    for piece in pieces:
        if any(character.isnumeric() for character in piece):
            assert len(piece) == 1


def test_text_is_cut_as_qwen2_cuts_it(tokenizer):
    from transformers import Qwen2Tokenizer

    def pieces(splitter, text):
        return [piece for piece, _ in splitter.pre_tokenize_str(text)]

    qwen2 = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    ours = tokenizer.backend_tokenizer.pre_tokenizer
    splitter = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    cut = ["I", "'ll", " go", ",", " 小猫", " ", "1", "2", "\n\n", " ", " x"]
    assert pieces(splitter, "".join(cut)) == cut
    for text in ("I'LL see  3.14 cats\t\n\n", "你好，world！ 100%", "f(x):\r\n    y_1", "e\u0301\u3000。\n"):
        assert pieces(ours, text) == pieces(qwen2, text)


# ----------------------------------------------------------------------------------------------- the template

TOOL = {"type": "function", "function": {"name": "weather", "description": "查天气 <it's fine>"}}
CALL = {"name": "weather", "arguments": {"city": "北京", "note": "it's <b>"}}
TOOL_JSON, CALL_JSON = json.dumps(TOOL, ensure_ascii=False), json.dumps(CALL, ensure_ascii=False)
CALL_BLOCK = f"<tool_call>\n{CALL_JSON}\n</tool_call>"
TOOLS_INTRO = "You may call these tools by name, with JSON arguments:\n<tools>\n"
USER_HI, ASSISTANT = "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant\n"


def user(content="Hi"):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


# name: (messages, options of apply_chat_template, the text it gives, the parts that are supervised)
CONVERSATIONS = {
    "plain": (
        [user(), assistant("Hello! 你好")],
        {},
        f"{USER_HI}{ASSISTANT}Hello! 你好<|im_end|>\n",
        ["Hello! 你好<|im_end|>"],
    ),
    "system, two turns, spaces kept, an empty answer": (
        [{"role": "system", "content": "Be kind."}, user(" 1 "), assistant(" 2\n"), user(), assistant("")],
        {},
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n 1 <|im_end|>\n"
        f"{ASSISTANT} 2\n<|im_end|>\n{USER_HI}{ASSISTANT}<|im_end|>\n",
        [" 2\n<|im_end|>", "<|im_end|>"],
    ),
    "thinking": (
        [user(), assistant("4", reasoning_content="easy")],
        {},
        f"{USER_HI}{ASSISTANT}<think>\neasy\n</think>\n\n4<|im_end|>\n",
        ["<think>\neasy\n</think>\n\n4<|im_end|>"],
    ),
    "tools after a system message": (
        [
            {"role": "system", "content": "Be brief."},
            user(),
            assistant("Let me see.", tool_calls=[{"function": CALL}, CALL]),
            {"role": "tool", "content": '{"sun": true}'},
            assistant("晴"),
        ],
        {"tools": [TOOL, TOOL]},
        f"<|im_start|>system\nBe brief.\n\n{TOOLS_INTRO}{TOOL_JSON}\n{TOOL_JSON}\n</tools><|im_end|>\n"
        f"{USER_HI}{ASSISTANT}Let me see.\n{CALL_BLOCK}\n{CALL_BLOCK}<|im_end|>\n"
        '<|im_start|>user\n<tool_response>\n{"sun": true}\n</tool_response><|im_end|>\n'
        f"{ASSISTANT}晴<|im_end|>\n",
        [f"Let me see.\n{CALL_BLOCK}\n{CALL_BLOCK}<|im_end|>", "晴<|im_end|>"],
    ),
    "tools without a system message, a call without words": (
        [user(), assistant(None, tool_calls=[CALL])],
        {"tools": [TOOL]},
        f"<|im_start|>system\n{TOOLS_INTRO}{TOOL_JSON}\n</tools><|im_end|>\n{USER_HI}"
        f"{ASSISTANT}{CALL_BLOCK}<|im_end|>\n",
        [f"{CALL_BLOCK}<|im_end|>"],
    ),
    "content in parts, and the role developer": (
        [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, "kind."]},
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
        ],
        {},
        f"<|im_start|>system\nBe kind.<|im_end|>\n{USER_HI}{ASSISTANT}4<|im_end|>\n",
        ["4<|im_end|>"],
    ),
    "tools after a developer's message in parts": (
        [{"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}, user()],
        {"tools": [TOOL], "add_generation_prompt": True},
        f"<|im_start|>system\nBe kind.\n\n{TOOLS_INTRO}{TOOL_JSON}\n</tools><|im_end|>\n{USER_HI}{ASSISTANT}",
        [],
    ),
    "thinking under the names of transformers and of vLLM": (
        [user(), assistant("4", thinking="easy"), user(), assistant("5", reasoning="hard")],
        {},
        f"{USER_HI}{ASSISTANT}<think>\neasy\n</think>\n\n4<|im_end|>\n"
        f"{USER_HI}{ASSISTANT}<think>\nhard\n</think>\n\n5<|im_end|>\n",
        ["<think>\neasy\n</think>\n\n4<|im_end|>", "<think>\nhard\n</think>\n\n5<|im_end|>"],
    ),
    "the start of an answer": ([user()], {"add_generation_prompt": True}, USER_HI + ASSISTANT, []),
    "the start of an answer without thinking": (
        [user()],
        {"add_generation_prompt": True, "enable_thinking": False},
        f"{USER_HI}{ASSISTANT}<think>\n\n</think>\n\n",
        [],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_template_text_and_assistant_mask(tokenizer, name):
    messages, options, text, supervised = CONVERSATIONS[name]
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == text
    masked = {"return_dict": True, "return_assistant_tokens_mask": True}
    output = tokenizer.apply_chat_template(messages, **masked, **options)
    assert output["input_ids"] == encode(tokenizer, text)
    assert tokenizer.decode(output["input_ids"]) == text
    assert masked_spans(tokenizer, output["input_ids"], output["assistant_masks"]) == supervised


def test_a_picture_is_refused_and_not_dropped(tokenizer):
    picture = {"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "Hi"}]}
    with pytest.raises(Exception, match="this model reads text"):
        tokenizer.apply_chat_template([picture], tokenize=False)


@pytest.mark.parametrize("answer", [
    {"content": "Hello"},
    {"content": "4", "thinking": "easy"},
    {"content": "Let me see.", "tool_calls": [CALL, CALL]},
    {"tool_calls": [CALL], "thinking": "a < b\n\nso"}])
def test_transformers_finds_thinking_and_calls_in_an_answer(tokenizer, answer):
    """parse_response is the inverse of the template, as far as the words are not empty."""
    calls = [{"type": "function", "function": call} for call in answer.get("tool_calls", [])]
    message = {"role": "assistant"} | answer | ({"tool_calls": calls} if calls else {})
    prompt = tokenizer.apply_chat_template([user()], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user(), message], tokenize=False)
    assert whole.startswith(prompt)
    text = whole.removeprefix(prompt)
    assert tokenizer.parse_response(text, prefix=prompt) == message
    assert tokenizer.parse_response(encode(tokenizer, text), prefix=encode(tokenizer, prompt)) == message
    assert tokenizer.parse_response(text.removesuffix("<|im_end|>\n"), prefix=prompt) == message  # cut off


def masked_spans(tokenizer, ids, mask):
    """The decoded runs of ids whose mask is 1, in order."""
    spans, run = [], []
    for token, masked in zip([*ids, None], [*mask, 0], strict=True):
        if masked:
            run.append(token)
        elif run:
            spans.append(tokenizer.decode(run))
            run = []
    return spans


# --------------------------------------------------------------------------------------- how tightly it packs


@pytest.mark.parametrize("name", FLOORS)
def test_bytes_per_token_on_text_it_never_saw(tokenizer, name):
    path = SHARED_DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name}: the shared data is not beside this checkout")
    with open(path, encoding="utf-8") as file:
        records = [record_texts(json.loads(line)) for line in file]
    held_out = [text for texts in records if hashed_fraction(texts) < 0.05 for text in texts]
    assert held_out
    assert bytes_per_token(tokenizer.backend_tokenizer, held_out) > FLOORS[name]


# ------------------------------------------------------------------------------------------------- the script


def test_record_texts_reads_every_format():
    assert record_texts({"text": "a"}) == ["a"]
    assert record_texts({"conversations": [{"role": "user", "content": "a"}], "family": "sums"}) == ["a"]
    assert record_texts({"conversations": [{"from": "gpt", "value": "b"}]}) == ["b"]
    assert record_texts({"instruction": "a", "input": "", "output": "b"}) == ["a", "b"]
    assert record_texts({"text": "a", "n": 3, "none": None, "url": "https://x"}) == ["a"]
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    record = {"tools": [{"name": "f"}], "messages": [{"role": "user", "content": "x"}, call]}
    texts = record_texts(record)  # as the prompt format writes them, without the control tokens
    assert texts[1:] == ["x", '\n{"name": "f", "arguments": {"a": 1}}\n'] and '{"name": "f"}' in texts[0]
    with pytest.raises(DataError):
        record_texts({"url": "https://x"})


def test_weights_repeat_whole_records_and_a_hashed_rest():
    records = [[f"record {i}"] for i in range(2000)]
    twice_and_a_half = list(weighted(records, 2.5))
    assert 4850 < len(twice_and_a_half) < 5150
    assert twice_and_a_half == list(weighted(records, 2.5))
    assert list(weighted(records, 0)) == []


def test_training_writes_what_transformers_loads(tmp_path):
    texts = ["the little fox and the little owl. 小狐狸和小猫头鹰。"] * 50
    save_tokenizer(build_tokenizer(texts, vocab_size=300), tmp_path)
    assert b"\r" not in (tmp_path / "tokenizer.json").read_bytes()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 300
    assert loaded.chat_template == CHAT_TEMPLATE
    assert len(encode(loaded, " little")) < len(" little")


def run_script(*arguments):
    command = [sys.executable, ROOT / "trainer" / "train_tokenizer.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def test_script_trains_reports_and_holds_out(tmp_path):
    data = tmp_path / "words.jsonl"
    texts = [f"{i} small birds and one grey owl sing in a garden. 花园里有{i}只小鸟。" for i in range(99)]
    lines = [json.dumps({"text": text}) for text in texts]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    out = tmp_path / "out"
    result = run_script("--data_path", data, "--out_dir", out, "--vocab_size", "320", "--weights", "1.5")
    assert result.returncode == 0, result.stderr
    assert "bytes per token on" in result.stdout
    assert len(AutoTokenizer.from_pretrained(out)) == 320


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_path", "no_such_file.jsonl"], "no_such_file.jsonl"),
        (["--data_path", "a.jsonl", "--weights", "1", "2"], "each file of --data_path, which are 1"),
        (["--weights", "1"], "each file of --data_path, which are 0"),
        (["--data_path", "a.jsonl", "--vocab_size", "100"], "--vocab_size must be at least 272"),
        (["--data_path", "a.jsonl", "--eval_fraction", "1"], "--eval_fraction"),
    ],
)
def test_script_says_what_is_wrong_and_writes_nothing(tmp_path, arguments, message):
    result = run_script(*arguments, "--out_dir", tmp_path / "out")
    assert result.returncode == 2
    assert message in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_an_error(tmp_path):
    data = tmp_path / "short.jsonl"
    data.write_text('{"text": "hello"}\n', encoding="utf-8", newline="\n")
    result = run_script("--data_path", data, "--out_dir", tmp_path / "out", "--eval_fraction", "0")
    assert result.returncode == 2
    assert "give only 2" in result.stderr and "--vocab_size" in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_is_fast_and_grouped():
    start = time.perf_counter()
    result = run_script("--help")
    assert time.perf_counter() - start < 1.5
    assert all(part in result.stdout for part in ("\ndata:", "\nthe tokenizer:", "default: 6400"))
