"""The compiled step against CausalLM.forward: the same logits, by few programs for all shapes."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import model.compiled_step
from common.errors import UsageError
from model.adapters import Adapters
from model.batch import Batch, Row
from model.compiled_step import COMPILERS, compile_step
from model.generate import KVCache, generate
from model.int8 import quantize_int8
from model.lora import apply_lora, lora_parameters, save_lora
from model.transformer import CausalLM, ModelConfig

needs_a_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")


def small(**changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
             "intermediate_size": 64, "initializer_range": 0.2}
    return CausalLM(ModelConfig(**shape | changes)).eval()


def ids(rows, length=14):
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def count(monkeypatch):
    """Compiles to plain PyTorch, which is quick, and counts the programs."""
    monkeypatch.setattr(model.compiled_step, "COMPILERS", ("python3", "python"))
    counter = CompileCounterWithBackend("aot_eager")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda f, options=None, **rest: compile(f, backend=counter, **rest))
    torch._dynamo.reset()
    return counter


@torch.no_grad()
def check(compiled, rows, start=None, **tolerance):
    """Steps after 6 tokens against the forward pass without a cache."""
    tokens = ids(rows)
    assert compiled.one_token.get_ready(rows)
    cache = KVCache(compiled.config, rows, 14 + rows, dtype=torch.float32, start=start)
    compiled(tokens[:, :6], cache=cache)
    found = torch.stack([compiled.one_token(tokens[:, t], cache) for t in range(6, 14)], dim=1)
    assert cache.length == 14
    for row in range(rows):
        first = 0 if start is None else int(start[row])
        expected = compiled(tokens[row:row + 1, first:]).logits[0, 6 - first:]
        torch.testing.assert_close(found[row], expected, **{"rtol": 1e-4, "atol": 1e-4} | tolerance)


@pytest.mark.parametrize("shape", [
    {"attention_bias": True},
    {"qk_norm": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
], ids=["Qwen2", "Qwen3 with a window"])
def test_two_programs_serve_all_lengths_and_batches(shape, count):
    compiled = compile_step(small(**shape))
    for rows, start in ((1, None), (2, None), (5, None), (1, None), (3, torch.tensor([0, 4, 2]))):
        check(compiled, rows, start)
    assert count.frame_count <= 3  # the first one may know a length that is not to be the only one


def test_rows_that_join_and_leave(count):
    def texts(of):
        batch = Batch(of, Adapters(of), max_rows=4, max_tokens=4 * 300)
        rows = [Row(ids(1, length)[0].tolist(), 3 + length, seed=length) for length in (3, 9, 5)]
        for row in rows:
            batch.add([row])
            batch.step()
        while batch.rows:
            batch.step()
        return [row.tokens for row in rows]

    assert texts(compile_step(small())) == texts(small())


def test_int8_and_adapters(count, tmp_path):
    check(compile_step(quantize_int8(small())), 2, rtol=0.05, atol=0.1)
    adapted = small()
    apply_lora(adapted, rank=2)
    for parameter in lora_parameters(adapted):
        nn.init.normal_(parameter, std=0.3)
    save_lora(adapted, tmp_path / "a")
    check(compile_step(adapted), 2)
    compiled = compile_step(small())
    adapters = Adapters(compiled)
    adapters.load(tmp_path / "a")
    adapters.use("a")
    check(compiled, 2)
    adapters.use(None)
    check(compiled, 2)
    adapters.use_rows(["a", None])
    assert not compiled.one_token.get_ready(2)  # the ordinary forward pass serves them


def test_it_is_refused_where_it_cannot_be(monkeypatch):
    with pytest.raises(UsageError, match="not for bfloat16 on cpu"):
        compile_step(small().bfloat16())
    monkeypatch.setattr(model.compiled_step, "COMPILERS", ("no_such_compiler",))
    with pytest.raises(UsageError, match="needs a C\\+\\+ compiler, one of no_such_compiler"):
        compile_step(small())


@needs_a_compiler
def test_compiled_by_the_real_compiler():
    plain, compiled = small(num_hidden_layers=1), compile_step(small(num_hidden_layers=1))
    greedy = {"max_new_tokens": 12, "temperature": 0}
    expected = list(generate(plain, ids(3), **greedy))
    assert all(map(torch.equal, generate(compiled, ids(3), **greedy), expected))
