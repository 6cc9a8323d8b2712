"""The ways of a GPU on tensors that have shapes but no numbers: the device "meta", pretending to be CUDA.

Such tensors refuse two mistakes that a CPU forgives: an operation with a tensor that was made on the CPU, and
reading a number, for which a GPU would let the CPU wait. What numbers come out is tested elsewhere.
"""

import pytest
import torch

from model import attention, transformer
from model.cuda_graph import RecordedStep
from model.generate import KVCache
from model.lora import apply_lora, freeze_all_but_lora
from model.quantize import quantize_model
from model.transformer import CausalLM, ModelConfig
from trainer.optim import build_optimizers

META = torch.device("meta")
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
         "intermediate_size": 96}


@pytest.fixture(autouse=True)
def pretend(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)  # it does not know "meta"
    # flex_attention refuses the device, so it is replaced. Its mask is made.
    monkeypatch.setattr(attention, "flex_kernel", lambda device: lambda q, k, v, **named: q * v.mean())


def model(**changes):
    """In bfloat16, as autocast would have it."""
    return CausalLM(ModelConfig(**SHAPE | changes)).to(META).bfloat16()


def ids(length=1024):
    return torch.zeros(2, length, dtype=torch.long, device=META)


def step(model, **more):
    optimizers = build_optimizers(model, "muon", 1e-3, 0.1)
    output = model(ids(), ids(), **more)
    output.loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    assert norm.device == output.token_losses.device == META and output.token_losses.shape == (2, 1024)


def test_it_refuses_both_mistakes():
    with pytest.raises(RuntimeError):
        ids() + torch.ones(1024, dtype=torch.long)
    with pytest.raises(RuntimeError):
        ids().sum().item()


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True}, {"sliding_window": 100}, {"attention_bias": True}])
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_of_training(shape, packed):
    step(model(**shape), document_ids=ids() if packed else None)


def test_a_step_with_dense_masks_logits_computed_again_and_checkpointing(monkeypatch):
    monkeypatch.setattr(attention, "flex_kernel", lambda device: None)
    monkeypatch.setattr(transformer, "MAX_KEPT_LOGITS", 0)
    whole = model()
    whole.gradient_checkpointing = True
    step(whole, document_ids=ids())


@pytest.mark.parametrize("in_4_bits", [False, True])
def test_a_step_of_lora(in_4_bits, monkeypatch):
    monkeypatch.setattr("model.quantize.bitsandbytes_operators", lambda device: None)
    base = CausalLM(ModelConfig(**SHAPE))
    if in_4_bits:
        with monkeypatch.context() as on_cpu:
            on_cpu.setattr(torch.Tensor, "is_cuda", False)
            quantize_model(base)
    apply_lora(base, rank=4)
    freeze_all_but_lora(base)
    step(base.to(META))


@pytest.mark.parametrize("start", [None, [0, 4]])
@torch.no_grad()
def test_a_prompt_and_a_token(start):
    start = None if start is None else torch.tensor(start, device=META)
    answering, cache = model(sliding_window=50).eval(), KVCache(ModelConfig(**SHAPE), 2, 20, META,
                                                                torch.bfloat16, start)
    assert answering(ids(12), cache=cache).logits.device == META
    assert answering(ids(1), cache=cache).logits.shape == (2, 1, 97)
    recorded = RecordedStep(answering)
    recorded.ids, recorded.place = ids(1)[:, 0], torch.zeros(1, dtype=torch.long, device=META)
    assert recorded.step(cache).shape == (2, 97)
