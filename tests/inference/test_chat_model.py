"""ChatModel: text to tokens and back, adapters, answers in batches and in pieces."""

import json
import shutil

import pytest
import torch

from common.errors import ModelError
from dataset.chat import encode_text
from dataset.replies import MARKS
from inference.chat_model import ChatModel, Sampling, checked_end_tokens
from model.lora import apply_lora, lora_parameters, save_lora
from model.transformer import CausalLM, ModelConfig
from model.weights import load_tokenizer, save_model

GREEDY = Sampling(temperature=0, max_new_tokens=8)


def ask(chat_model, text="Hi", sampling=GREEDY):
    ids = chat_model.encode([{"role": "user", "content": text}])
    return "".join(piece.text for piece in chat_model.stream(ids, sampling))


def test_loading_and_answering_print_nothing(home, capsys):
    chat_model = ChatModel(home / "chat", ["lora_a", "lora_b"])
    assert chat_model.switch("lora_b") is None  # loaded already
    assert ask(chat_model)
    assert capsys.readouterr() == ("", "")
    a, b = home / "lora_a", home / "lora_b"
    assert [report.split(",")[0] for report in chat_model.reports] == [f"{b}: 14/14 layers matched",
                                                                       f"{a}: 14/14 layers matched"]


def test_the_first_adapter_is_on(home):
    first = ChatModel(home / "chat", ["lora_a", "lora_b", "lora_a"])
    assert first.adapter == home / "lora_a" and first.adapted_layers == 14
    assert ask(first) == ask(ChatModel(home / "chat", [str(home / "lora_a")]))
    assert ask(first) != ask(ChatModel(home / "chat"))
    assert first.names() == ["lora_a", "lora_b"]


def test_a_report_comes_with_what_is_loaded(home):
    chat_model = ChatModel(home / "chat")
    assert (chat_model.reports, chat_model.adapter, chat_model.adapted_layers) == ([], None, 0)
    a, b = home / "lora_a", home / "lora_b"
    assert chat_model.switch("lora_a").startswith(f"{a}: 14/14 layers matched, updates")
    assert chat_model.switch({"lora_a": 0.5, "lora_b": -1}).startswith(f"0.5 {a} + -1 {b}: 14/14 layers")
    assert chat_model.switch("lora_b") is None and chat_model.adapted_layers == 14
    assert chat_model.switch(None) is None and chat_model.adapted_layers == 0 and chat_model.adapter is None


def test_an_adapter_that_was_trained_with_another_template_is_named(home, tmp_path):
    template = ChatModel(home / "chat").tokenizer.chat_template
    for name, text in (("same", template), ("other", "{{ messages }}")):
        shutil.copytree(home / "lora_a", tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(text, encoding="utf-8", newline="")
    shutil.copytree(home / "lora_a", tmp_path / "old")
    settings = json.dumps({"chat_template": "{{ messages }}"})
    (tmp_path / "old" / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    chat_model = ChatModel(home / "chat")
    for name, is_named in (("same", False), ("other", True), ("old", True)):
        report = chat_model.switch(str(tmp_path / name))
        assert (f"{tmp_path / name} holds another chat template" in report) == is_named


def test_a_switch_that_fails_leaves_the_adapter_on(home):
    chat_model = ChatModel(home / "chat", [str(home / "lora_a")])
    ids = torch.tensor([[5, 6, 7]])
    before = chat_model.model(ids).logits
    with pytest.raises(ModelError):
        chat_model.switch("missing")
    assert chat_model.adapter == home / "lora_a" and torch.equal(chat_model.model(ids).logits, before)
    chat_model.switch(None)
    assert not torch.equal(chat_model.model(ids).logits, before)


def test_streaming_shows_no_half_characters(home, monkeypatch):
    """The streamed text is the decoded text, and no piece of it ends in the mark of a broken character."""
    chat_model = ChatModel(home / "chat")
    text = "你好，龘靐！ a 🦊 fox"
    ids = chat_model.tokenizer(text)["input_ids"]
    assert any("\ufffd" in chat_model.decode([i]) for i in ids)  # some characters are split over tokens

    def stream(ids):
        monkeypatch.setattr(chat_model, "generate", lambda *_: iter(torch.tensor(ids)[:, None]))
        return list(chat_model.stream([1], Sampling()))

    pieces = stream([*ids, chat_model.stop_ids[0], 7])
    assert "".join(piece.text for piece in pieces) == text
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert pieces[-1].num_tokens == len(ids)  # tokens without the one that ends the answer
    # An answer that ends anywhere: nothing is lost.
    assert "".join(piece.text for piece in stream(ids[:-6])) == chat_model.decode(ids[:-6])


def test_a_batch_gives_the_answers_of_its_rows(home):
    chat_model = ChatModel(home / "chat")
    texts = ("a", "你好", "a longer question")
    prompts = [chat_model.encode([{"role": "user", "content": text}]) for text in texts]
    together = torch.stack(list(chat_model.generate(prompts, GREEDY)), dim=1)  # (B, steps)
    for prompt, row in zip(prompts, together, strict=True):
        alone = torch.cat(list(chat_model.generate([prompt], GREEDY)))
        assert torch.equal(row[:len(alone)], alone)


def test_an_answer_ends_where_the_model_does(home):
    chat_model = ChatModel(home / "chat")
    assert chat_model.max_positions == 128 and chat_model.context == 64
    assert len(list(chat_model.generate([[5] * 126], GREEDY))) <= 2
    with pytest.raises(ModelError, match="a prompt of 128 tokens"):
        chat_model.generate([[5], [5] * 128], GREEDY)


def test_a_model_from_elsewhere_keeps_its_context_after_our_fine_tuning(home, tmp_path):
    shutil.copytree(home / "chat", tmp_path / "tuned")
    training = {"stage": "full_sft", "tokens_seen": None, "arguments": {"max_seq_len": 64}}
    (tmp_path / "tuned" / "training.json").write_text(json.dumps(training), encoding="utf-8")
    assert ChatModel(tmp_path / "tuned").context == 128
    assert ChatModel(home / "chat").context == 64  # it grew here, in rows of 64


def test_settings_of_the_model_that_are_not_used_are_named(home, tmp_path):
    shutil.copytree(home / "chat", tmp_path / "m")
    neutral = {"num_beams": 1, "min_p": None, "min_length": 0, "stop_strings": [], "top_k": 5}
    for more, reports in (({}, []), ({"min_p": 0.1, "num_beams": 4, "stop_strings": ["#"]}, [
            "generation_config.json sets min_p, num_beams, stop_strings, which is not used here"])):
        (tmp_path / "m" / "generation_config.json").write_text(json.dumps(neutral | more), encoding="utf-8")
        chat_model = ChatModel(tmp_path / "m")
        assert chat_model.reports == reports and chat_model.sampling.top_k == 5


def test_a_base_model_is_plain_unless_it_has_an_adapter(home):
    message = [{"role": "user", "content": "Hi"}]
    base, chat_model = ChatModel(home / "base"), ChatModel(home / "chat")
    assert base.plain and not chat_model.plain
    assert base.encode(message) == ChatModel(home / "chat", plain=True).encode(message)
    assert base.encode(message) != chat_model.encode(message)
    assert base.encode([{"role": "user", "content": ""}]) == base.stop_ids[:1]
    assert ChatModel(home / "base", ["lora_a"]).encode(message) == chat_model.encode(message)


def test_weights_have_the_asked_type(home):
    weight = ChatModel(home / "chat", device="cpu", dtype="bfloat16").model.model.embed_tokens.weight
    assert weight.dtype == torch.bfloat16
    assert ChatModel(home / "chat", device="cpu").model.model.embed_tokens.weight.dtype == torch.float32


def test_a_pth_file_and_its_lora_answer_as_the_folder_does(home, tmp_path):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, qk_norm=True,
                                 num_key_value_heads=1, intermediate_size=64, initializer_range=0.3))
    tokenizer = load_tokenizer(home / "chat")
    save_model(model, tmp_path / "sft", tokenizer)
    torch.save(model.state_dict(), tmp_path / "sft_32.pth")
    apply_lora(model, rank=2)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.5)
    save_lora(model, tmp_path / "lora_x")
    save_lora(model, tmp_path / "lora_x.pth")
    folder = ChatModel(tmp_path / "sft", ["lora_x"])
    assert ask(folder) != ask(ChatModel(tmp_path / "sft"))
    for name in (tmp_path / "lora_x.pth", "lora_x.pth"):  # the name of a file beside the model
        chat_model = ChatModel(tmp_path / "sft_32.pth", [name], tokenizer=home / "chat")
        assert ask(chat_model) == ask(folder) and chat_model.stop_ids == folder.stop_ids
        assert len(chat_model.reports) == 1
    without = ChatModel(tmp_path / "sft_32.pth")
    assert without.tokenizer.get_vocab() == folder.tokenizer.get_vocab()
    assert without.reports == [f"{without.path} holds no tokenizer, so it gets Seedling's own; "
                               "--tokenizer names another"]


def test_some_token_must_end_an_answer(tmp_path):
    class Tokenizer:
        eos_token_id = None

        def get_vocab(self):
            return {"a": 0}

    model = CausalLM(ModelConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                 num_key_value_heads=1, intermediate_size=8, vocab_size=10))
    with pytest.raises(ModelError, match="no token .* ends an answer"):
        checked_end_tokens(model, Tokenizer(), tmp_path)
    model.generation_config = {"eos_token_id": [3, 1, 3]}
    assert checked_end_tokens(model, Tokenizer(), tmp_path) == [1, 3]
    for wrong in (10, -1, "a", [1, None, 2.5]):
        model.generation_config = {"eos_token_id": wrong}
        with pytest.raises(ModelError, match="is no token of the model"):
            checked_end_tokens(model, Tokenizer(), tmp_path)


# ---------------------------------------------------------------- thinking and tool calls


@pytest.fixture(scope="module")
def thinker(home, tmp_path_factory):
    """As Qwen3-Thinking: the marks are added tokens that are not special, and the prompt ends in <think>."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(home / "chat", folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings, added = (json.loads((folder / name).read_text(encoding="utf-8"))
                       for name in ("tokenizer_config.json", "tokenizer.json"))
    settings["chat_template"] = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")
    settings.pop("added_tokens_decoder", None)
    for token in added["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in MARKS
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(added), encoding="utf-8")
    return ChatModel(folder)


def said(chat_model, monkeypatch, prompt: list[int], text: str) -> list:
    """The pieces of an answer that the model gives, token by token."""
    ids = chat_model.tokenizer(text, add_special_tokens=False)["input_ids"] + chat_model.stop_ids[:1]
    monkeypatch.setattr(chat_model, "generate", lambda *_: iter(torch.tensor(ids)[:, None]))
    reply = chat_model.new_reply(prompt)
    pieces = list(chat_model.stream(prompt, Sampling(), reply))
    assert chat_model.read(prompt, ids[:-1]).message() == reply.message()  # as a whole and in pieces
    return [reply.message(), *("".join(piece.text for piece in pieces if piece.part == part).strip()
                               for part in ("reasoning", "content", "call"))]


CALL = '<tool_call>\n{"name": "cat", "arguments": {"猫": "🦊"}}\n</tool_call>'


def test_parts_of_an_answer(home, monkeypatch):
    chat_model = ChatModel(home / "chat")
    prompt = chat_model.encode([{"role": "user", "content": "Hi <think>"}])
    assert said(chat_model, monkeypatch, prompt, f"<think>\n猫 🦊 龘.\n</think>\n\nOne moment.\n{CALL}") == [
        {"role": "assistant", "content": "One moment.", "reasoning_content": "猫 🦊 龘.",
         "tool_calls": [{"name": "cat", "arguments": {"猫": "🦊"}}]},
        "猫 🦊 龘.", "One moment.", '{"name": "cat", "arguments": {"猫": "🦊"}}']


def test_marks_that_are_no_control_tokens_and_a_prompt_that_begins_the_thought(thinker, monkeypatch):
    assert thinker.marks and "<think>" in thinker.decode(list(thinker.marks))  # they would be shown as text
    prompt = thinker.encode([{"role": "user", "content": "Hi"}])
    message, thought, words, _ = said(thinker, monkeypatch, prompt, "Long.\n</think>\n\nThe Rhine.")
    assert (thought, words) == ("Long.", "The Rhine.")
    assert message == {"role": "assistant", "content": "The Rhine.", "reasoning_content": "Long."}
    assert said(thinker, monkeypatch, prompt, "It never en")[1:] == ["It never en", "", ""]


def test_the_letters_of_a_mark_in_ordinary_tokens_are_words(home):
    chat_model = ChatModel(home / "chat")
    ids = encode_text(chat_model.tokenizer, "<think> is a tag")
    assert not chat_model.marks.keys() & set(ids)
    assert chat_model.read([1], ids).message() == {"role": "assistant", "content": "<think> is a tag"}


def test_a_tokenizer_without_marks_spells_them(home, monkeypatch):
    chat_model = ChatModel(home / "chat")
    monkeypatch.setattr(chat_model, "marks", {})
    monkeypatch.setattr(chat_model, "tokenizer", Spelling(chat_model.tokenizer))
    text = f"<think>\nLong.\n</think>\n\nHi.\n{CALL}"
    message, thought, words, call = said(chat_model, monkeypatch, [1], text)
    assert (thought, words, message["content"]) == ("Long.", "Hi.", "Hi.") and "cat" in call


class Spelling:
    """A tokenizer that has no token for <think> and the others."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decode = tokenizer.decode

    def __call__(self, text, **options):
        return {"input_ids": encode_text(self.tokenizer, text)}


def test_a_base_model_knows_no_parts(home):
    base = ChatModel(home / "base")
    ids = base.tokenizer("<think>a</think>b")["input_ids"]
    assert base.read([1], ids).message() == {"role": "assistant", "content": "ab"}
