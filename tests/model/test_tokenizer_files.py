"""What a model from elsewhere brings along is handed on: ends, sampling, tokenizer, templates."""

import json
import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from common.errors import ModelError
from inference.chat_model import ChatModel
from model.tokenizer_files import OWN_TOKENIZER, load_tokenizer, vocabulary_size, write_tokenizer
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, save_model

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 16}
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ message.content }}<|eot_id|>{% endfor %}"
NAMED = {"default": TEMPLATE, "tool_use": "{{ tools }}", "../../outside": "{{ messages }}"}


def make_tokenizer(control: list[str], **settings):
    """A tokenizer over bytes. Its control tokens have the ids 0, 1, 2, ... in their order."""
    tokens = [*control, *pre_tokenizers.ByteLevel.alphabet()]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(control)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """As Llama 3: three tokens end an answer, one of them in config.json alone; files for others."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer(LLAMA, bos_token=LLAMA[0], eos_token=LLAMA[2], chat_template=NAMED["default"])
    config = LlamaConfig(**SHAPE, vocab_size=300, bos_token_id=0, eos_token_id=[1, 3])
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    settings = read(folder / "tokenizer_config.json")
    settings["chat_template"] = [{"name": name, "template": text} for name, text in NAMED.items()]
    settings["extra_special_tokens"] = ["<|eom_id|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(b"\x00\x01 what llama.cpp reads")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|eot_id|>"}', encoding="utf-8")
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 0, "eos_token_id": [1, 2], "do_sample": true, "temperature": 0.6, "top_p": 0.9}',
        encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """As Qwen2: one end in config.json, two and the sampling in generation_config.json; no bos in use."""
    folder = tmp_path_factory.mktemp("qwen")
    config = Qwen2Config(**SHAPE, vocab_size=300, bos_token_id=0, eos_token_id=2, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer(QWEN, eos_token=QWEN[2], pad_token=QWEN[0]).save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 0, "pad_token_id": 0, "do_sample": true, "eos_token_id": [2, 0], "top_k": 20, '
        '"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "transformers_version": "4.37.0"}',
        encoding="utf-8")
    return folder


def hand_on(folder, target):
    """What every stage and merge_lora.py do with a model that they read."""
    save_model(load_model(folder), target, load_tokenizer(folder))
    return target


def test_every_end_of_an_answer_is_handed_on(llama, tmp_path):
    assert ChatModel(llama).stop_ids == [1, 2, 3]
    saved = hand_on(hand_on(llama, tmp_path / "once"), tmp_path / "twice")
    assert ChatModel(saved).stop_ids == [1, 2, 3]
    theirs = AutoModelForCausalLM.from_pretrained(saved)
    assert sorted(theirs.generation_config.eos_token_id) == sorted(theirs.config.eos_token_id) == [1, 2, 3]
    assert theirs.generation_config.bos_token_id == theirs.config.bos_token_id == 0
    # transformers' own generation ends at each of them
    for end in (1, 2, 3):
        with torch.no_grad():
            theirs.lm_head.weight.zero_()
            theirs.lm_head.weight[end] = 1.0
            theirs.model.norm.weight.fill_(1.0)
            theirs.model.embed_tokens.weight.fill_(1.0)
        answer = theirs.generate(torch.tensor([[9, 9]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert answer[0].tolist() == [9, 9, end]


def test_the_sampling_is_handed_on_and_our_own_models_get_ours(qwen, tmp_path):
    saved, before = hand_on(qwen, tmp_path / "saved"), read(qwen / "generation_config.json")
    assert read(saved / "generation_config.json") == before
    assert GenerationConfig.from_pretrained(saved).to_diff_dict() == GenerationConfig.from_pretrained(
        qwen).to_diff_dict()
    assert read(saved / "config.json")["eos_token_id"] == [2, 0]
    save_model(CausalLM(ModelConfig(**SHAPE)), tmp_path / "new", load_tokenizer(OWN_TOKENIZER))
    assert read(tmp_path / "new" / "generation_config.json") == {
        "bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 3,
        "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}


def test_a_model_without_sampling_gets_none(llama, tmp_path):
    folder = hand_on(llama, tmp_path / "plain")
    (folder / "generation_config.json").unlink()
    saved = read(hand_on(folder, tmp_path / "saved") / "generation_config.json")
    assert saved == {"bos_token_id": 0, "eos_token_id": [1, 2, 3], "pad_token_id": None}


def test_the_files_of_a_tokenizer_are_handed_on(llama, tmp_path):
    saved = hand_on(llama, tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json"):
        assert (saved / name).read_bytes() == (llama / name).read_bytes()
    settings, before = read(saved / "tokenizer_config.json"), read(llama / "tokenizer_config.json")
    assert settings["chat_template"] == before["chat_template"]
    assert (saved / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    assert [path.name for path in (saved / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]
    assert not (tmp_path / "outside.jinja").exists() and not (tmp_path.parent / "outside.jinja").exists()
    ours, theirs = AutoTokenizer.from_pretrained(saved), AutoTokenizer.from_pretrained(llama)
    assert theirs.chat_template == NAMED
    assert ours.chat_template == {name: NAMED[name] for name in ("default", "tool_use")}
    assert ours.get_vocab() == theirs.get_vocab() and ours.special_tokens_map == theirs.special_tokens_map


def test_no_setting_of_transformers_5_alone_is_written(llama, tmp_path):
    assert read(llama / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"  # it was there
    made = make_tokenizer(QWEN, eos_token=QWEN[2], additional_special_tokens=["<|im_start|>"])
    folders = [hand_on(llama, tmp_path / "handed_on"), tmp_path / "made"]
    save_model(CausalLM(ModelConfig(**SHAPE)), folders[1], made)
    for folder in folders:
        settings = read(folder / "tokenizer_config.json")
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not settings.keys() & {"backend", "is_local", "local_files_only", "extra_special_tokens"}
        assert "token_type_ids" not in settings["model_input_names"]
    # a list that version 4 would take for a dict, under the name that both versions know
    assert read(folders[0] / "tokenizer_config.json")["additional_special_tokens"] == ["<|eom_id|>"]
    assert AutoTokenizer.from_pretrained(folders[1]).convert_tokens_to_ids("<|im_start|>") == 1


def test_what_was_changed_in_memory_is_saved_changed(llama, tmp_path):
    tokenizer = load_tokenizer(llama)
    tokenizer.add_tokens(["frog"])
    write(tokenizer, tmp_path / "token")
    assert AutoTokenizer.from_pretrained(tmp_path / "token").tokenize("a frog") == ["a", "Ġ", "frog"]
    tokenizer = load_tokenizer(llama)
    tokenizer.pad_token = "<|eom_id|>"
    write(tokenizer, tmp_path / "purpose")
    assert AutoTokenizer.from_pretrained(tmp_path / "purpose").pad_token == "<|eom_id|>"
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = "{{ 1 }}"
    write(tokenizer, tmp_path / "template")
    again = AutoTokenizer.from_pretrained(tmp_path / "template")
    assert again.chat_template == "{{ 1 }}" and again.get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "template" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def write(tokenizer, folder):
    folder.mkdir()
    write_tokenizer(tokenizer, folder)


def test_files_of_the_tokenizer_that_was_there_before_go(llama, qwen, tmp_path):
    hand_on(llama, tmp_path / "saved")
    hand_on(qwen, tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir() if path.is_file()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"}
    assert load_tokenizer(tmp_path / "saved").chat_template is None
    save_model(load_model(qwen), tmp_path / "saved")  # without a tokenizer the one that is there stays
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
def test_others_may_read_all_files_of_a_model(llama, tmp_path):
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in hand_on(llama, tmp_path / "saved").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_a_vocabulary_with_holes(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 5}, "a"))
    backend.add_special_tokens(["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    assert vocabulary_size(tokenizer) == 1 + max(tokenizer.get_vocab().values()) > len(tokenizer)


def test_a_pth_file_has_our_own_tokenizer(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    assert load_tokenizer(tmp_path / "x.pth").get_vocab() == load_tokenizer(OWN_TOKENIZER).get_vocab()
    with pytest.raises(ModelError, match="tokenizer.json is missing"):
        load_tokenizer(tmp_path)


def test_the_tokenizer_of_our_models_is_the_one_in_the_repository(tmp_path):
    """Its bos token is only named, for programs that need one. Nothing puts it before a text."""
    save_model(CausalLM(ModelConfig(**SHAPE)), tmp_path, load_tokenizer(OWN_TOKENIZER))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (OWN_TOKENIZER / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos_token == "<|endoftext|>" and tokenizer("a").input_ids == tokenizer.encode(
        "a", add_special_tokens=False)
    plain = ChatModel(tmp_path, plain=True)
    assert plain.encode([{"role": "user", "content": "a"}]) == tokenizer("a").input_ids
