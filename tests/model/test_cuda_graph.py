"""The step that a CUDA graph records, run unrecorded on a CPU, against the ordinary forward pass."""

from contextlib import contextmanager, nullcontext
from copy import deepcopy

import pytest
import torch

from common.errors import ModelError
from model.cuda_graph import STEPS_BEFORE, RecordedStep, record_decoding
from model.generate import KVCache, generate
from model.lora import apply_lora, lora_parameters
from model.transformer import CausalLM, ModelConfig

SHAPES = {"grouped": {}, "no groups": {"num_key_value_heads": 4}, "qk_norm": {"qk_norm": True},
          "biases": {"attention_bias": True}, "own head": {"tie_word_embeddings": False},
          "window": {"sliding_window": 5}}


def small(**changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
             "intermediate_size": 96, "initializer_range": 0.2}
    return CausalLM(ModelConfig(**shape | changes)).eval()


def recorded(model):
    """A copy of the model that decodes by the step. (record_decoding leaves a model on a CPU alone.)"""
    copy = deepcopy(model)
    copy.one_token = RecordedStep(copy)
    return copy


def ids(rows=2, length=14):
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def step_by_step(model, tokens, begin=6, start=None, unused=0.0):
    """Logits (B, T - begin, V) after each token from `begin` on. The cache is never full."""
    assert model.one_token.get_ready(len(tokens))
    rows, length = tokens.shape
    cache = KVCache(model.config, rows, length + 3, dtype=torch.float32, start=start)
    cache.k.fill_(unused), cache.v.fill_(unused)
    model(tokens[:, :begin], cache=cache)
    steps = [model.one_token(tokens[:, t], cache).clone() for t in range(begin, length)]
    assert cache.length == length
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_forward_pass(shape):
    model = small(**SHAPES[shape])
    with torch.no_grad():
        expected = model(ids()).logits[:, 6:]
    torch.testing.assert_close(step_by_step(recorded(model), ids()), expected, rtol=1e-5, atol=2e-5)


def test_what_lies_in_unused_places_does_not_matter():
    model = recorded(small())
    assert torch.equal(step_by_step(model, ids(), unused=7.0), step_by_step(model, ids()))


def test_left_padded_rows_are_themselves_alone():
    model = recorded(small())
    batch = step_by_step(model, ids(), start=torch.tensor([0, 4]))
    alone = step_by_step(model, ids()[1:, 4:], begin=2)
    torch.testing.assert_close(batch[1:], alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("lengths", [None, [8, 3]])
def test_generate_writes_the_same(lengths):
    model = small()
    settings = {"max_new_tokens": 20, "temperature": 0, "eos_token_id": 5, "prompt_lengths": lengths}
    expected = list(generate(model, ids(length=8), **settings))
    found = list(generate(recorded(model), ids(length=8), **settings))
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_an_adapter_that_comes_later_is_seen():
    model = recorded(small())
    apply_lora(model, rank=4)
    before = step_by_step(model, ids())
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    after = step_by_step(model, ids())
    assert not torch.allclose(before, after, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(after, model(ids()).logits[:, 6:], rtol=1e-5, atol=2e-5)


def test_recording_and_replaying(monkeypatch):
    """CUDA is played by objects that note what is called, and whose replay computes the recorded step."""
    model, called, caches = recorded(small()), [], []
    expected = step_by_step(model, ids())
    step = model.one_token

    def watched(cache):
        caches.append(cache)
        return RecordedStep.step(step, cache)

    class Stream:
        def wait_stream(self, other):
            called.append("wait")

    class Graph:
        def replay(self):
            called.append("replay")
            step.logits.copy_(RecordedStep.step(step, caches[0]))

    @contextmanager
    def record(graph):
        called.append("record")
        yield

    monkeypatch.setattr(step, "step", watched)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for name, value in {"Stream": Stream, "current_stream": Stream, "stream": nullcontext,
                        "CUDAGraph": Graph, "graph": record}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = step_by_step(model, ids())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert called == ["wait", "wait", "record", *["replay"] * 8]  # one recording for eight tokens
    assert len(caches) == STEPS_BEFORE + 1


def test_a_full_cache_is_refused():
    model, cache = recorded(small()), KVCache(small().config, 1, 4, dtype=torch.float32)
    cache.length = 4
    with pytest.raises(ModelError, match="holds 4 tokens"):
        model.one_token(torch.tensor([1]), cache)


def test_a_model_on_a_cpu_stays_as_it_is():
    assert record_decoding(small()).one_token is None
