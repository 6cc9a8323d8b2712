"""compare_rewards.py measures what it says: how far a model has moved, and how many answers are right."""

import json

import pytest
import torch

from benchmarks.compare_rewards import answers_of, divergence, held_out
from common.cli import ROOT
from model.transformer import CausalLM, ModelConfig
from model.weights import load_tokenizer, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models of other weights, and two prompts. The first model answers one of them right."""
    folder, tokenizer = tmp_path_factory.mktemp("compared"), load_tokenizer(ROOT / "model" / "tokenizer")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = CausalLM(ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=1, intermediate_size=48))
        model.lm_head.weight.data.mul_(3)
        save_model(model, folder / str(seed), tokenizer, training={"stage": "full_sft"})
    prompts, records = folder / "prompts.jsonl", [{"prompt": "Name one.", "answers": ["?"]}]
    prompts.write_text(json.dumps(records[0]) + "\n", encoding="utf-8")
    (_, _, said), = answers_of(folder / "0", prompts, temperature=0)
    records = [{"prompt": "Name one.", "answers": [said]}, {"prompt": "Name two.", "answers": ["not said"]}]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def test_the_divergence_is_zero_from_itself_and_above_zero_from_another_model(folder):
    prompts = folder / "prompts.jsonl"
    assert divergence(folder / "0", folder / "0", prompts) == pytest.approx(0, abs=1e-6)
    assert divergence(folder / "0", folder / "1", prompts) > 0.01


def test_right_answers_are_counted(folder):
    assert held_out(folder / "0", folder / "prompts.jsonl") == 0.5
