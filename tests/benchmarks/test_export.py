"""benchmarks/export.py counts what it says: tensors with other bytes, and where answers part."""

import torch

from benchmarks import export
from common.cli import ROOT
from model.gguf import write_model
from model.transformer import CausalLM, ModelConfig
from model.weights import load_tokenizer


def test_tensors_with_other_bytes_are_counted_and_one_is_named(tmp_path):
    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1, intermediate_size=32))
    for name in ("a", "b"):
        write_model(model, tokenizer, tmp_path / name, "F16", "x", [2])
        model.model.norm.weight.data[0] = 2
    assert export.same_bytes(tmp_path / "a", tmp_path / "a") == "11/11"
    assert export.same_bytes(tmp_path / "a", tmp_path / "b") == "10/11 (output_norm.weight)"


def test_the_gap_is_how_much_likelier_our_token_was():
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1, intermediate_size=32, initializer_range=1)).eval()
    said, logits, gap = export.ours(model, [1, 2, 3], [19], 4)
    assert len(logits) == 3 and said[0] == logits[-1].argmax()
    assert gap(0, said[0]) == 0 and gap(0, (said[0] + 1) % 20) > 0


def test_half_of_the_texts_are_hostile_and_all_can_be_written(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "A fox."}\n' * 30, encoding="utf-8")
    args = export.parse_args(["--llama_cpp", "x", "--texts", str(tmp_path / "t.jsonl"), "--num_texts", "40"])
    texts = export.texts_of(args)
    assert len(texts) == 40 and texts[:20] == ["A fox."] * 20 and len(set(texts[20:])) == 20
    assert all(text.encode("utf-8") for text in texts)


def test_without_the_source_of_llama_cpp(tmp_path, refused):
    refused(export, ["--llama_cpp", tmp_path], "there is no convert_hf_to_gguf.py")
