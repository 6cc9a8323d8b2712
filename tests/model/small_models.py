"""What the tests of adapters share: a small model of ours and transformers' own with the same weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from model.transformer import CausalLM, ModelConfig

SHAPE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, rms_norm_eps=1e-6, max_position_embeddings=64, tie_word_embeddings=True)
IDS = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(0))


def ours(seed=0, **changes):
    torch.manual_seed(seed)
    return CausalLM(ModelConfig(**{**SHAPE, "rope_theta": 1e4, **changes})).eval()


def twins(qk_norm=False):
    """Our model and transformers' with the same weights."""
    torch.manual_seed(3)
    cls, config = (Qwen3ForCausalLM, Qwen3Config) if qk_norm else (LlamaForCausalLM, LlamaConfig)
    reference = cls(config(**SHAPE, head_dim=8)).eval()
    model = ours(qk_norm=qk_norm)
    model.load_state_dict(reference.state_dict())
    return model, reference


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max().item() < tolerance
