"""GGUF: what gguf's own reader and transformers read of our files, what we read, and what is refused."""

import dataclasses
import math
import struct
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import ModelError
from model.gguf import gguf_name, our_name, to_halves, to_neighbours, write_adapter, write_model
from model.gguf_file import read_gguf
from model.gguf_tokenizer import portable_template, read_tokenizer
from model.lora import LoRA, apply_lora, load_lora, lora_parameters, merge_lora, read_lora, save_lora
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, load_tokenizer, save_model

ROOT = Path(__file__).resolve().parents[2]
SHAPE = dict(vocab_size=6400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64,
             initializer_range=0.1, rope_theta=1e4)
FAMILIES = {"llama": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True, "head_dim": 32}}
SCALINGS = [{"rope_type": "linear", "factor": 4.0},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}]
TEXTS = ["Hello, world! it's 12345", "你好，世界。", "<think>x</think><|im_end|>\n\n  a\t",
         "e\u0301 é 😀\r\n", " "]
IDS = torch.randint(0, 6400, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "model" / "tokenizer")


def a_model(**changes) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**{**SHAPE, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # not 0 and 1, so that a lost one is noticed
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model


def written(model, tokenizer, path: Path, kind="F32") -> Path:
    write_model(model, tokenizer, path, kind, "name", [2, 0])
    return path


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


# --- names and rows -----------------------------------------------------------------------------------------


def test_names_go_there_and_back():
    for family in FAMILIES.values():
        for name in a_model(**family, tie_word_embeddings=False).state_dict():
            assert our_name(gguf_name(name)) == name
    assert gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    for other in ("blk.x.ffn_up.weight", "blk.00.ffn_up.weight", "blk.\u0663.ffn_up.weight"):
        assert our_name(other) == other  # one tensor of ours has one name there


def test_rows_of_a_head_by_hand():
    rows = torch.arange(8.0)[:, None]  # two heads of four: the pairs are (0, 2), (1, 3), and (4, 6), (5, 7)
    assert to_neighbours(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(to_halves(to_neighbours(rows, 2), 2), rows)
    assert to_neighbours(rows, None) is rows


# --- what others read of our files --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_model(family, tokenizer, tmp_path):
    # transformers takes 128 for granted as the width of Qwen3's heads, whatever the file says.
    model = a_model(**FAMILIES[family] | ({"head_dim": 128} if family == "qwen3" else {}))
    written(model, tokenizer, tmp_path / "x.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32).eval()
    assert (logits(model) - logits(theirs)).abs().max() < 1e-4


def test_transformers_reads_the_same_tokens(tokenizer, tmp_path):
    written(a_model(qk_norm=True), tokenizer, tmp_path / "x.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in TEXTS[:2]:  # it normalises (NFC), and what it does around special tokens is its own
        assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_ggufs_own_reader_finds_each_field_and_tensor(tokenizer, tmp_path):
    model = a_model(tie_word_embeddings=False)
    file = gguf.GGUFReader(written(model, tokenizer, tmp_path / "x.gguf"))
    fields = {name: field.contents() for name, field in file.fields.items()}
    expected = {"general.architecture": "llama", "general.file_type": 0, "llama.block_count": 2,
                "llama.context_length": 64, "llama.embedding_length": 64, "llama.feed_forward_length": 96,
                "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
                "llama.rope.dimension_count": 16, "llama.rope.freq_base": 1e4, "llama.vocab_size": 6400,
                "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
                "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 2,
                "tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.padding_token_id": 3,
                "tokenizer.ggml.add_bos_token": False}
    assert expected.items() <= fields.items()
    assert fields["tokenizer.ggml.tokens"] == sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    control, printed, normal = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.NORMAL
    assert (kinds["<|im_end|>"], kinds["<think>"], kinds["a"]) == (control, printed, normal)
    assert "generation %" not in fields["tokenizer.chat_template"]  # a tag of Hugging Face's alone
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    q = model.model.layers[0].self_attn.q_proj.weight.detach()
    # The rule of llama.cpp's converter, written anew: (heads, halves, pairs) -> (heads, pairs, halves).
    assert np.array_equal(tensors["blk.0.attn_q.weight"],
                          q.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64).numpy())
    assert np.array_equal(tensors["output.weight"], model.lm_head.weight.detach().numpy())
    assert len(tensors) == len(model.state_dict())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_stored_values_are_ggufs_own(kind, tokenizer, tmp_path):
    model = a_model(qk_norm=True, intermediate_size=40)  # rows of 40 can't be cut into blocks of 32
    path = written(model, tokenizer, tmp_path / "x.gguf", kind)
    file = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    loaded = load_model(path).state_dict()
    for name, ours in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        tensor = file[gguf_name(name)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values.reshape(ours.shape), loaded[name].numpy()), name
        again = gguf.quants.quantize(ours.numpy(), tensor.tensor_type)
        assert np.array_equal(again.view(np.uint8), tensor.data.view(np.uint8)), name
    kinds = {name: tensor.tensor_type.name for name, tensor in file.items()}
    assert kinds["blk.0.attn_norm.weight"] == "F32" and kinds["blk.0.ffn_up.weight"] == kind
    assert kinds["blk.0.ffn_down.weight"] == (kind if "F" in kind else "F16")
    assert kinds["token_embd.weight"] == ("Q8_0" if kind == "Q4_0" else kind)


# --- and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [*FAMILIES.values(), {"tie_word_embeddings": False},
                                     {"sliding_window": 32, "max_position_embeddings": 32},
                                     *({"rope_scaling": scaling} for scaling in SCALINGS)], ids=str)
def test_our_own_float32_file_gives_the_same_bits_and_the_same_config(changes, tokenizer, tmp_path):
    model = a_model(**changes)
    back = load_model(written(model, tokenizer, tmp_path / "x.gguf"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    assert dataclasses.replace(back.config, initializer_range=0.1) == model.config
    assert torch.equal(logits(model), logits(back))
    assert back.generation_config["eos_token_id"] == [2, 0]


def test_the_factors_of_llama3_are_those_of_its_formula(tokenizer, tmp_path):
    scaling = SCALINGS[1]
    path = written(a_model(rope_scaling=scaling), tokenizer, tmp_path / "x.gguf")
    factors = read_gguf(path)[1]["rope_freqs.weight"].numbers().tolist()
    for pair, factor in enumerate(factors):
        wavelength = 2 * math.pi * 1e4 ** (2 * pair / 16)
        smooth = min(1, max(0, (32 / wavelength - 1) / (4 - 1)))
        assert factor == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-5)
    assert factors[0] == 1 and factors[-1] == 8


@pytest.mark.parametrize("changes, part", [
    ({"rope_scaling": SCALINGS[1], "qk_norm": True}, "llama3"),
    ({"sliding_window": 8, "full_attention_every": 2}, "sliding window of 8 in some layers only"),
    ({"rope_scaling": SCALINGS[2] | {"beta_fast": 16}}, "beta_fast"),
    ({"rope_scaling": SCALINGS[2] | {"truncate": False}}, "truncate")], ids=str)
def test_what_the_format_cannot_say_is_refused_by_name(changes, part, tokenizer, tmp_path):
    with pytest.raises(ModelError, match=part):
        written(a_model(**changes), tokenizer, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_yarns_factor_of_attention_comes_back(tokenizer, tmp_path):
    model = a_model(rope_scaling=SCALINGS[2] | {"attention_factor": 1.0})
    path = written(model, tokenizer, tmp_path / "x.gguf")
    assert read_gguf(path)[0]["llama.rope.scaling.attn_factor"] == pytest.approx(1 / (0.1 * math.log(4) + 1))
    assert torch.allclose(logits(load_model(path)), logits(model), atol=1e-5)


def test_weights_that_are_no_numbers_are_not_written(tokenizer, tmp_path):
    model = a_model()
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(ModelError, match="NaN"):
        written(model, tokenizer, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


# --- strangers' files ---------------------------------------------------------------------------------------


def changed(path: Path, tokenizer, change) -> Path:
    """A small model's file; change(writer, name, array) may add another tensor instead, and return True."""
    model = a_model(qk_norm=True)
    original = gguf.GGUFWriter.add_tensor

    def add(writer, name, array, **options):
        if not change(lambda *given: original(writer, *given), name, array):
            original(writer, name, array, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        return written(model, tokenizer, path)


def test_every_tensor_must_be_there_known_and_of_its_shape(tokenizer, tmp_path):
    path = tmp_path / "x.gguf"
    cases = {"has no model.layers.1.mlp.up": lambda add, name, array: name == "blk.1.ffn_up.weight",
             "unknown blk.0.ffn_sub_norm.weight": lambda add, name, array: name == "output_norm.weight" and (
                 add("blk.0.ffn_sub_norm.weight", array)),
             "the config asks for": lambda add, name, array: name == "blk.1.ffn_up.weight" and (
                 add(name, array[:-1]) or True)}
    for part, change in cases.items():
        with pytest.raises(ModelError, match=part):
            load_model(changed(path, tokenizer, change))


def test_a_file_that_is_cut_off_anywhere_is_refused_in_one_line(tokenizer, tmp_path):
    content = written(a_model(num_hidden_layers=1), tokenizer, tmp_path / "x.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    size = len(content)
    for length in (0, 3, 4, 10, 23, 24, 60, 500, 5000, size // 4, size - 33, size - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(ModelError) as error:
            load_model(cut)
        assert "cut.gguf" in str(error.value) and "\n" not in str(error.value), length


def head(*parts) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + b"".join(
        struct.pack("<Q", part) if isinstance(part, int) else part for part in parts)


TEXT = struct.pack("<Q", 1) + b"a"
HOSTILE = {
    "a text longer than the file": head(0, 1, 2**60),
    "more fields than bytes": head(0, 2**62),
    "more tensors than bytes": head(2**62, 0),
    "a list of 2^60 bytes": head(0, 1, TEXT, struct.pack("<IIQ", 9, 0, 2**60)),
    "a list of 2^60 texts": head(0, 1, TEXT, struct.pack("<IIQ", 9, 8, 2**60)),
    "a list of lists": head(0, 1, TEXT, struct.pack("<IIQ", 9, 9, 1)),
    "an unknown type": head(0, 1, TEXT, struct.pack("<I", 77)),
    "a tensor of 2^40 numbers": head(1, 0, TEXT, struct.pack("<IQIQ", 1, 2**40, 0, 0)),
    "a tensor of no dimension": head(1, 0, TEXT, struct.pack("<IIQ", 0, 0, 0), b"\0" * 64),
    "a tensor of an unknown type": head(1, 0, TEXT, struct.pack("<IQIQ", 1, 32, 999, 0), b"\0" * 512),
    "a field twice": head(0, 2, (TEXT + struct.pack("<IB", 0, 1)) * 2, b"\0" * 64),
    "no UTF-8": head(0, 1, struct.pack("<Q", 1) + b"\xff", struct.pack("<IB", 0, 1), b"\0" * 64),
    "another version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "no GGUF at all": b"PK\3\4" + b"\0" * 100,
    "tensors that lie over each other": head(
        40, 0, b"".join(struct.pack("<Q", 1) + bytes([97 + i]) + struct.pack("<IQIQ", 1, 64, 0, 0)
                        for i in range(26)), b"".join(struct.pack("<Q", 2) + b"b" + bytes([97 + i])
                        + struct.pack("<IQIQ", 1, 64, 0, 0) for i in range(14)), b"\0" * 300),
    "two tensors over each other": head(
        2, 0, TEXT, struct.pack("<IQIQ", 1, 64, 0, 0), struct.pack("<Q", 1) + b"b",
        struct.pack("<IQIQ", 1, 64, 0, 224), b"\0" * 1000),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n",
    "a part of several": head(0, 1, struct.pack("<Q", 11) + b"split.count", struct.pack("<IH", 2, 3)),
}
SAID = {"big-endian": "big-endian", "two tensors over each other": "b lies over a",
        "a pointer of Git LFS": "git lfs pull", "a part of several": "one part of 3: join them"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_and_at_once(name, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name] + b"\0" * 8)
    began = time.monotonic()
    for read in (load_model, load_tokenizer):
        with pytest.raises(ModelError) as error:
            read(path)
        assert "x.gguf" in str(error.value) and "\n" not in str(error.value)
        assert SAID.get(name, "") in str(error.value)
    assert time.monotonic() - began < 2


def test_flipped_bytes_in_the_head_never_give_a_traceback(tokenizer, tmp_path):
    content = written(a_model(num_hidden_layers=1, hidden_size=32, intermediate_size=32), tokenizer,
                      tmp_path / "x.gguf").read_bytes()
    generator = torch.Generator().manual_seed(1)
    places = torch.randint(0, 1000, (40,), generator=generator).tolist()
    descriptions = content.index(b"blk.0.attn_norm.weight")  # of the tensors: their names, shapes, places
    places += (descriptions + torch.randint(0, 500, (40,), generator=generator)).tolist()
    for number, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << number % 8
        (tmp_path / "y.gguf").write_bytes(damaged)
        try:
            load_model(tmp_path / "y.gguf")
        except ModelError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("fields, part", [
    ({"general.architecture": "gemma"}, "gemma"), ({"general.type": "adapter"}, "adapter"),
    ({"qwen3.expert_count": 8}, "expert_count is 8: not supported"),
    ({"qwen3.block_count": None}, "block_count is missing"),
    ({"qwen3.attention.head_count": [4, 2]}, "not one number"),
    ({"qwen3.rope.dimension_count": 4}, "rope.dimension_count"),
    ({"qwen3.rope.scaling.type": "longrope"}, "longrope"), ({"qwen3.attention.causal": False}, "causal"),
    ({"qwen3.vocab_size": 6401}, "vocab_size is 6401"), ({"qwen3.rope.scaling.factor": -2.0}, "positive"),
    ({"qwen3.attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50"),
    ({"qwen3.rope.scaling.yarn_beta_fast": 64.0}, "yarn_beta_fast is 64")])
def test_what_our_model_cannot_compute_is_refused_by_name(fields, part, tokenizer, tmp_path, monkeypatch):
    from model import gguf as module

    found, tensors = read_gguf(written(a_model(qk_norm=True), tokenizer, tmp_path / "x.gguf"))
    monkeypatch.setattr(module, "read_gguf", lambda path: (found | fields, tensors))
    with pytest.raises(ModelError, match=part):
        load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize("field, value, part", [
    ("tokenizer.ggml.merges", None, "no merges"), ("tokenizer.ggml.merges", 5, "no merges"),
    ("tokenizer.ggml.tokens", ["a"] * 6400, "are the same text"),
    ("tokenizer.ggml.eot_token_id", 9999, "beyond the 6400"),
    ("tokenizer.ggml.eos_token_id", True, "eos_token_id is 'True'"),
    ("tokenizer.chat_template", 5, "no text"), ("tokenizer.seedling.normalizer", "NFKC", "NFKC")])
def test_a_tokenizer_that_contradicts_itself_is_refused_by_name(field, value, part, tokenizer, tmp_path,
                                                               monkeypatch):
    from model import gguf_tokenizer as module

    found, tensors = read_gguf(written(a_model(), tokenizer, tmp_path / "x.gguf"))
    monkeypatch.setattr(module, "read_gguf", lambda path: (found | {field: value}, tensors))
    with pytest.raises(ModelError, match=part):
        load_tokenizer(tmp_path / "x.gguf")


def test_without_the_package_one_line_names_what_to_install(tokenizer, tmp_path, monkeypatch):
    path = written(a_model(), tokenizer, tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for read in (load_model, load_tokenizer, lambda path: written(a_model(), tokenizer, path)):
        with pytest.raises(ModelError, match="pip install -r requirements-export.txt"):
            read(path)


# --- tokenizers ---------------------------------------------------------------------------------------------


def test_our_tokenizer_comes_back(tokenizer, tmp_path):
    back = load_tokenizer(written(a_model(), tokenizer, tmp_path / "x.gguf"))
    assert back.get_vocab() == tokenizer.get_vocab()
    assert [back(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(back, name) == getattr(tokenizer, name)
    ids = tokenizer("<think>a</think> 你好 é<|im_end|>")["input_ids"]
    # Marks of a thought are shown, and the end of an answer is not.
    assert back.decode(ids, skip_special_tokens=True) == "<think>a</think> 你好 é"


TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo", "reasoning_content": "Hm", "tool_calls": [
            {"function": {"name": "go", "arguments": {"to": "a"}}}]}, {"role": "user", "content": "?"}]


def test_the_portable_template_writes_the_same_text(tokenizer, tmp_path):
    text = (ROOT / "dataset" / "chat_template.jinja").read_text(encoding="utf-8")
    assert "generation %}" in text and "generation %}" not in portable_template(text)
    for talk in (TALK, TALK[:2], TALK[1:2]):
        for ask in (True, False):
            both = [tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False,
                                                  add_generation_prompt=ask)
                    for template in (text, portable_template(text))]
            assert both[0] == both[1]


def rules():
    from model.gguf_tokenizer import RULES
    makers = {"bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
              "gpt2 bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
              "digits": lambda: pre_tokenizers.Digits(individual_digits=True)}
    return {name: pre_tokenizers.Sequence([
        makers[step]() if step in makers else pre_tokenizers.Split(Regex(step), "isolated")
        for step in steps]) for name, steps in RULES.items()}


@pytest.mark.parametrize("rule", ["qwen2", "smollm", "gpt-2"])
def test_each_rule_is_named_and_comes_back(rule, tmp_path):
    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    tokenizer.backend_tokenizer.pre_tokenizer = rules()[rule]
    path = written(a_model(), tokenizer, tmp_path / "x.gguf")
    assert read_gguf(path)[0]["tokenizer.ggml.pre"] == rule
    back = read_tokenizer(path)
    for text in TEXTS:
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("step", [
    pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"), pre_tokenizers.Whitespace(),
    pre_tokenizers.ByteLevel(add_prefix_space=True), rules()["llama-bpe"]], ids=str)
def test_a_rule_that_llama_cpp_has_not_is_refused(step, tmp_path):
    """The last one is Llama 3's rule without its ignore_merges, which is another rule."""
    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    tokenizer.backend_tokenizer.pre_tokenizer = step
    with pytest.raises(ModelError, match="a GGUF file can't say"):
        written(a_model(), tokenizer, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_of_sentencepiece_by_hand(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("<0xE4>", 0, 6), ("<0xBD>", 0, 6),
              ("<0xA0>", 0, 6), ("▁", -9, 1), ("a", -9, 1), ("b", -9, 1), ("▁a", -2, 1), ("ab", -1, 1),
              ("▁ab", -3, 1)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([float(score) for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    for name, token in (("unknown", 0), ("bos", 1), ("eos", 2)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = read_tokenizer(tmp_path / "x.gguf")
    # "ab" has the highest score, so it is merged first, and then "▁" with "ab".
    assert tokenizer("ab aab")["input_ids"] == [1, 11, 9, 10]
    assert tokenizer("你")["input_ids"] == [1, 6, 3, 4, 5]  # no token has it, so its bytes stand for it
    assert tokenizer.decode([11, 9, 10, 3, 4, 5, 2], skip_special_tokens=True) == "ab aab你"


# --- adapters -----------------------------------------------------------------------------------------------


def adapted(model, tmp_path, **settings) -> Path:
    apply_lora(model, **{"rank": 4, "alpha": 16} | settings)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    save_lora(model, tmp_path / "lora")
    return tmp_path / "lora"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_alone_changes_the_model_in_the_same_way(family, rslora, tmp_path):
    model = a_model(**FAMILIES[family])
    folder = adapted(model, tmp_path, rslora=rslora)
    base = a_model(**FAMILIES[family])
    write_adapter(base, read_lora(base, folder), tmp_path / "a.gguf", "F32", "a")
    load_lora(base, tmp_path / "a.gguf")
    assert (logits(model) - logits(base)).abs().max() < 1e-4
    file = gguf.GGUFReader(tmp_path / "a.gguf")
    assert file.fields["general.type"].contents() == "adapter"
    assert file.fields["adapter.lora.alpha"].contents() == (32 if rslora else 16)  # llama.cpp: alpha / rank
    shapes = {tensor.name: tensor.data.shape for tensor in file.tensors}
    assert shapes["blk.1.ffn_up.weight.lora_a"] == (4, 64) and shapes["blk.1.ffn_up.weight.lora_b"] == (96, 4)


def test_layers_with_an_alpha_of_their_own_are_folded_into_b(tmp_path):
    model = a_model()
    loras = {"model.layers.0.mlp.up_proj": LoRA(64, 96, 4, alpha=4), "lm_head": LoRA(64, 6400, 2, alpha=7)}
    for lora in loras.values():
        torch.nn.init.normal_(lora.B.weight)
    with pytest.raises(ModelError, match="merge_lora.py"):  # the head is the embedding, too
        write_adapter(model, loras, tmp_path / "a.gguf", "F32", "a")
    model = a_model(tie_word_embeddings=False)
    write_adapter(model, loras, tmp_path / "a.gguf", "F32", "a")
    for name, lora in read_lora(model, tmp_path / "a.gguf").items():
        b, a = loras[name].factors()
        update = lora.scaling * lora.B.weight @ lora.A.weight
        assert torch.allclose(update, loras[name].scaling * b @ a, atol=1e-5)


def test_a_merged_adapter_is_in_the_file_and_an_unmerged_one_is_refused(tokenizer, tmp_path):
    model = a_model()
    adapted(model, tmp_path)
    with pytest.raises(ModelError, match="merge adapters"):
        written(model, tokenizer, tmp_path / "x.gguf")
    expected = logits(model)
    merge_lora(model)
    from model.adapters import remove_lora
    remove_lora(model, keep_merged=True)
    assert (logits(load_model(written(model, tokenizer, tmp_path / "x.gguf"))) - expected).abs().max() < 1e-4


def test_a_gguf_model_is_saved_as_a_folder_that_transformers_opens(tokenizer, tmp_path):
    path = written(a_model(qk_norm=True), tokenizer, tmp_path / "x.gguf", "Q8_0")
    model = load_model(path)
    save_model(model, tmp_path / "folder", load_tokenizer(path))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert (logits(model) - logits(theirs)).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "folder")(TEXTS[0])["input_ids"] == \
        tokenizer(TEXTS[0])["input_ids"]


def test_what_is_dequantized_is_said_in_one_line(tokenizer, tmp_path, capsys):
    for kind, said in (("F16", 0), ("Q4_0", 1)):
        load_model(written(a_model(), tokenizer, tmp_path / "x.gguf", kind))
        error = capsys.readouterr().err
        assert error.count("\n") == said and ("Q4_0, Q8_0" in error) == bool(said)
