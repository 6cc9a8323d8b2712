"""CompiledStep against CausalLM.forward: both give the same logits."""

import os
import pickle
import platform
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from test_one_token import (
    SHAPES,
    adapted,
    check_that_a_step_of_an_optimizer_is_seen,
    ids,
    small,
    step_by_step,
)

from common.errors import ModelError, RunError, UsageError
from model import compiled_step
from model.adapters import Adapters, remove_lora, set_lora
from model.compiled_step import COMPILERS, compile_decoding
from model.generate import KVCache, generate
from model.int8 import Int8Linear, quantize_int8
from model.lora import apply_lora, cast_frozen, lora_parameters, merge_lora

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("shape", [*SHAPES, "odd sizes"])
def test_it_is_the_forward_pass(shape, rows):
    odd = {"hidden_size": 36, "intermediate_size": 90, "head_dim": 6, "attention_bias": True}
    model = small(**SHAPES.get(shape, odd))
    with torch.no_grad():
        expected = model(ids(rows)).logits[:, 6:]
    found = step_by_step(compile_decoding(model), ids(rows))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="these are x86's")
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx"])
def test_older_cpus_compute_the_same(without, monkeypatch):
    run = compiled_step.run
    monkeypatch.setattr(compiled_step, "run", lambda command: run([*command, without]))
    assert without != "-mno-avx" or compiled_step.load_library().block_size() == 16
    test_it_is_the_forward_pass("odd sizes", 8)
    test_int8_is_that_of_the_dequantized_weights(5)


@pytest.mark.parametrize("quantize", [lambda model: model, quantize_int8], ids=["float32", "int8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_is_the_same_to_the_bit_whatever_its_company_and_the_threads(threads, quantize):
    model, before = compile_decoding(quantize(small())), torch.get_num_threads()

    def from_the_first_token(tokens):  # the ordinary forward pass rounds as the company has it
        assert model.one_token.get_ready(len(tokens))
        cache = KVCache(model.config, *tokens.shape, dtype=torch.float32)
        return torch.stack([model.one_token(column, cache) for column in tokens.unbind(1)], dim=1)

    alone = [from_the_first_token(row[None])[0] for row in ids(8, 6)]
    try:
        torch.set_num_threads(threads)
        assert torch.equal(from_the_first_token(ids(8, 6)), torch.stack(alone))
    finally:
        torch.set_num_threads(before)


def test_left_padded_rows_are_themselves_alone():
    tokens, start = ids(5), torch.tensor([0, 4, 1, 5, 3])
    padded = step_by_step(compile_decoding(small()), tokens, start=start)
    for row, begin in enumerate(start.tolist()):
        alone = step_by_step(compile_decoding(small()), tokens[row:row + 1, begin:], 6 - begin)
        torch.testing.assert_close(padded[row], alone[0], rtol=1e-5, atol=5e-5)
    # Pads may go through the step, too, and the numbers of pads may be of another type.
    padded = step_by_step(compile_decoding(small()), tokens, begin=1, start=start.int())
    torch.testing.assert_close(padded[0], step_by_step(compile_decoding(small()), tokens[:1], 1)[0],
                               rtol=1e-5, atol=5e-5)
    assert padded.isfinite().all()


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_int8_is_that_of_the_dequantized_weights(rows):
    model = quantize_int8(small(attention_bias=True))
    exact = deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int8Linear):
            linear = torch.nn.Linear(layer.in_features, layer.out_features)
            linear.weight, linear.bias = torch.nn.Parameter(layer.dequantize()), layer.bias
            exact.set_submodule(name, linear)
    with torch.no_grad():
        expected = exact(ids(rows)).logits[:, 6:]
        compile_decoding(model)
        cache = KVCache(model.config, rows, 14, dtype=torch.float32)
        exact(ids(rows)[:, :6], cache=cache)
        model.one_token.get_ready(rows)
        found = torch.stack([model.one_token(ids(rows)[:, t], cache) for t in range(6, 14)], dim=1)
    # Where the CPU multiplies whole numbers, x is rounded to some 32,000 steps.
    tolerance = 5e-5 if model.one_token.library.group_size() == 1 else 3e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance)


def test_weights_that_change_are_seen():
    model, other = compile_decoding(small()), small(initializer_range=0.1)
    step_by_step(model, ids())
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        expected = other(ids()).logits[:, 6:]
    torch.testing.assert_close(step_by_step(model, ids()), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_what_an_optimizer_writes_is_seen(fused):
    check_that_a_step_of_an_optimizer_is_seen(compile_decoding(small()), fused)


def test_frozen_weights_of_16_bits_are_those_numbers_in_float32():
    model = compile_decoding(small(tie_word_embeddings=False, attention_bias=True).requires_grad_(False))
    step_by_step(model, ids())
    cast_frozen(model, torch.bfloat16)
    plain = deepcopy(model).float()
    model.one_token.get_ready(2)
    caches = [KVCache(model.config, 2, 14, dtype=torch.float32) for _ in range(2)]
    for column in ids().unbind(1):
        with torch.no_grad():
            expected = plain(column[:, None], cache=caches[0]).logits[:, 0]
        torch.testing.assert_close(model.one_token(column, caches[1]), expected, rtol=1e-5, atol=5e-5)


def test_memory_that_a_step_reads_is_not_freed_meanwhile(monkeypatch):
    """Another thread may change the weights and begin a text while C++ computes."""
    model = compile_decoding(small())
    apply_lora(model, rank=4)
    step_by_step(model, ids())
    step, library = model.one_token, model.one_token.library
    memory = [weakref.ref(tensor.untyped_storage()) for tensor in [*step.kept, *step.updates[2]]]

    class Meanwhile:
        def one_token(self, *arguments):
            model.double().float()  # all parameters get other memory
            with monkeypatch.context() as patched:
                patched.setattr(step, "library", library)
                step.get_ready(2)
            assert all(storage() is not None for storage in memory)
            return library.one_token(*arguments)

    monkeypatch.setattr(step, "library", Meanwhile())
    cache = KVCache(model.config, 2, 14, dtype=torch.float32)
    assert step(ids()[:, 0], cache).isfinite().all()


def test_a_model_can_be_pickled():
    model = compile_decoding(small())
    expected = step_by_step(model, ids())
    again = pickle.loads(pickle.dumps(model))
    assert again.one_token.model is again and torch.equal(step_by_step(again, ids()), expected)


@pytest.mark.parametrize(("quantize", "tolerance"), [
    (lambda model: model, {"rtol": 1e-5, "atol": 5e-5}), (quantize_int8, {"rtol": 0.05, "atol": 0.3}),
], ids=["float32", "int8"])
def test_adapters_on_off_mixed_merged_and_for_each_row(quantize, tolerance, tmp_path):
    model = compile_decoding(quantize(small()))
    adapters = Adapters(model)
    adapters.load(adapted(model, tmp_path / "a", 1))
    settings = {"rank": 3, "target_modules": ["v_proj", "down_proj"], "rslora": True}
    adapters.load(adapted(model, tmp_path / "b", 2, **settings))
    adapters.load(adapted(model, tmp_path / "c", 3, rank=20, target_modules=["k_proj", "up_proj", "lm_head"]))
    packed = None

    def check(rows=3):
        nonlocal packed
        with torch.no_grad():
            expected = model(ids(rows)).logits[:, 6:]
        torch.testing.assert_close(step_by_step(model, ids(rows)), expected, **tolerance)
        assert packed in (None, model.one_token.packed)  # an adapter changes no weights
        packed = model.one_token.packed
        return expected

    base = check()
    for what in ("a", "b", "c", {"a": 0.7, "c": -0.3}):
        adapters.use(what)
        assert not torch.allclose(check(), base, atol=0.1)
        check(1)
    adapters.use_rows(["a", None, {"b": 0.5, "c": 1.0}])
    rows = check()
    assert torch.allclose(rows[1], base[1], atol=1e-4) and not torch.allclose(rows[0], base[0], atol=0.1)
    with pytest.raises(ModelError, match="names for 3 rows, but the batch"):
        step_by_step(model, ids(2), begin=0)
    set_lora(model, False)
    assert torch.equal(check(), base)
    adapters.use("a")
    if quantize is not quantize_int8:
        packed = None
        merge_lora(model)
        check()
    adapters.use(None)
    packed = None
    assert torch.equal(check(), base)


def test_a_text_goes_on_with_the_adapter_that_it_began_with():
    """With PiSSA its tensors are made for the step alone, and it must keep them."""
    model = compile_decoding(small())
    torch.manual_seed(1)
    apply_lora(model, rank=4, init="pissa")
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = model(ids()).logits[:, 6:]
    torch.testing.assert_close(step_by_step(model, ids()), expected, rtol=1e-5, atol=5e-5)
    whole = [token.tolist() for token in generate(model, ids(), 8, temperature=0)]
    text = generate(model, ids(), 8, temperature=0)
    began = [next(text), next(text)]  # the first is written by the ordinary forward pass
    remove_lora(model)
    assert [token.tolist() for token in [*began, *text]] == whole
    assert whole != [token.tolist() for token in generate(model, ids(), 8, temperature=0)]


def test_weights_that_come_to_an_old_address_are_seen():
    model = compile_decoding(small())
    weight = model.model.layers[0].mlp.up_proj.weight
    for _ in range(5):  # in memory that was freed just now
        model.one_token.get_ready(1)
        before = model.one_token.packed
        weight.data = weight.data.double()
        weight.data = weight.data.float()
        assert model.one_token.state() != before
    with torch.inference_mode():
        model = compile_decoding(small())
        expected = model(ids()).logits[:, 6:]
        torch.testing.assert_close(step_by_step(model, ids()), expected, rtol=1e-5, atol=5e-5)


def test_texts_that_overlap():
    """Two threads begin at the same time, and another batch comes between two tokens."""
    model = compile_decoding(small())
    expected = [token.tolist() for token in generate(deepcopy(model), ids(), 8, temperature=0)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: list(generate(model, ids(), 8, temperature=0)), range(8))
        assert all([token.tolist() for token in tokens] == expected for tokens in found)
    text = generate(model, ids(), 8, temperature=0)
    assert next(text).tolist() == expected[0]
    list(generate(model, ids(5), 2, temperature=0))
    assert [token.tolist() for token in text] == expected[1:]


def test_it_steps_aside_where_it_does_not_fit():
    model = compile_decoding(small())
    copied = deepcopy(model)
    with torch.no_grad():
        copied.model.norm.weight.zero_()
    assert not step_by_step(copied, ids()).any() and step_by_step(model, ids()).any()
    assert not copied.bfloat16().one_token.get_ready(1)
    cache = KVCache(model.config, 1, 1, dtype=torch.float32)
    model.one_token.get_ready(1)
    model.one_token(ids(1)[:, 0], cache)
    with pytest.raises(RunError, match="the KV cache holds 1 tokens, and all are in use"):
        model.one_token(ids(1)[:, 1], cache)
    with pytest.raises(RuntimeError, match="size"):  # a cache for another number of rows
        model.one_token(ids(2)[:, 0], KVCache(model.config, 1, 1, dtype=torch.float32))
    for token in (-1, 97, 2**40):
        with pytest.raises(IndexError, match="ids outside of the vocabulary"):
            model.one_token(torch.tensor([3, token]), KVCache(model.config, 2, 1, dtype=torch.float32))


def test_numbers_that_are_not_finite_come_through():
    model = small()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(RunError, match="holds numbers that are not finite"):
        list(generate(compile_decoding(model), ids(2), 4, temperature=0))
    model = compile_decoding(quantize_int8(small()))
    for number in (torch.nan, torch.inf):
        with torch.no_grad():
            model.model.norm.weight[3] = number
        assert not step_by_step(model, ids(2)).isfinite().any()


def test_a_damaged_library_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one_token.cpp"
    source.write_text('extern "C" int block_size() { return 16; }')
    monkeypatch.setattr(compiled_step, "SOURCE", source)
    compile_decoding(small())
    [library] = tmp_path.glob("seedling/*.so")
    whole = library.read_bytes()
    library.unlink()  # the process has it in use: a new file, and not another content
    library.write_bytes(whole[:len(whole) // 2])
    compile_decoding(small())
    assert library.read_bytes() == whole


def test_what_is_in_the_way_is_told(tmp_path, monkeypatch):
    for model in (small().bfloat16(), small(num_experts=2, qk_norm=True)):
        with pytest.raises(UsageError, match="--compile needs a model without experts"):
            compile_decoding(model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("int main( { }")
    monkeypatch.setattr(compiled_step, "SOURCE", wrong)
    with pytest.raises(UsageError, match="could not compile wrong.cpp: .*error"):
        compile_decoding(small())
    assert not [path for path in (tmp_path / "seedling").iterdir()]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="can't hold a library .*: set XDG_CACHE_HOME"):
        compile_decoding(small())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    with monkeypatch.context() as patched, pytest.raises(UsageError, match="~/.cache .*: set XDG_CACHE_HOME"):
        patched.setattr(os, "getuid", lambda: 2**30, raising=False)
        compile_decoding(small())
    compiler = tmp_path / "c++"
    compiler.write_text("no program")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="can't be started: "):
        compile_decoding(small())
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(UsageError, match="--compile needs a C.. compiler"):
        compile_decoding(small())
