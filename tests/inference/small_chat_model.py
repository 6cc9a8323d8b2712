"""What the tests of a talking model share: tiny models with the real tokenizer, and files of records."""

import json
from pathlib import Path

import torch

from model.lora import apply_lora, lora_parameters, save_lora
from model.transformer import CausalLM, ModelConfig
from model.weights import load_tokenizer, save_model

ROOT = Path(__file__).resolve().parents[2]


def make_home(folder: Path) -> Path:
    """A chat model, the same weights as a base model, and two adapters that change every answer."""
    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    torch.manual_seed(0)
    # The initial weights are large enough that answers differ with what was asked.
    model = CausalLM(ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1, intermediate_size=64, max_position_embeddings=128,
                                 initializer_range=0.3, vocab_size=len(tokenizer)))
    for name, stage in (("chat", "full_sft"), ("base", "pretrain")):
        training = {"stage": stage, "arguments": {"max_seq_len": 64}}
        save_model(model, folder / name, tokenizer, training=training)
    apply_lora(model, rank=4)
    for name in ("lora_a", "lora_b"):
        for parameter in lora_parameters(model):
            torch.nn.init.normal_(parameter, std=0.5)
        save_lora(model, folder / name)
    return folder


def write(path: Path, *records: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def turns(*texts: str, **more) -> dict:
    """A record with these texts, of the user and the assistant by turns."""
    roles = ("user", "assistant")
    return {"conversations": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)], **more}
