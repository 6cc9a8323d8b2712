"""OneToken against CausalLM.forward without a cache: both give the same logits."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from model import one_token
from model.adapters import Adapters, remove_lora, set_lora
from model.generate import KVCache, generate
from model.int8 import MAX_KERNEL_ROWS, MULTIPLIES_WHOLE_NUMBERS, quantize_int8
from model.lora import apply_lora, lora_parameters, merge_lora, save_lora, unmerge_lora
from model.one_token import HAS_ONEDNN, MAX_FLOAT32_ROWS, OneToken, prepare_to_decode
from model.quantize import quantize_model
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, save_model

SHAPES = {
    "grouped": {},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
    "qk_norm": {"qk_norm": True},
    "biases": {"attention_bias": True},
    "own head": {"tie_word_embeddings": False},
    "window": {"sliding_window": 5},
    "a window in some layers": {"sliding_window": 5, "full_attention_every": 2},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
    "head_dim": {"head_dim": 24},
}


@pytest.fixture(params=[False, True], ids=["columns", "oneDNN"])
def has_onednn(request, monkeypatch):
    if request.param and not HAS_ONEDNN:
        pytest.skip("PyTorch has no oneDNN here")
    monkeypatch.setattr(one_token, "HAS_ONEDNN", request.param)
    return request.param


def small(**changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
             "intermediate_size": 96, "initializer_range": 0.2}
    model = CausalLM(ModelConfig(**shape | changes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms start at 1 and biases at 0, and would change nothing
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def ids(rows=2, length=14):
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def step_by_step(model, tokens, begin=6, start=None):
    """Logits (B, T - begin, V) after each token from `begin` on, by model.one_token."""
    assert model.one_token.get_ready(len(tokens))
    cache = KVCache(model.config, *tokens.shape, dtype=torch.float32, start=start)
    model(tokens[:, :begin], cache=cache)
    steps = [model.one_token(tokens[:, t], cache) for t in range(begin, tokens.size(1))]
    assert cache.length == tokens.size(1)
    return torch.stack(steps, dim=1)


def adapted(model, folder, seed, **settings):
    """Saves an adapter for the model there; the model stays as it was."""
    torch.manual_seed(seed)
    apply_lora(model, **{"rank": 4, "alpha": 8} | settings)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    save_lora(model, folder)
    remove_lora(model)
    return folder


@pytest.mark.parametrize("rows", [1, 3, MAX_KERNEL_ROWS, MAX_FLOAT32_ROWS])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_forward_pass(shape, rows, has_onednn):
    model = small(**SHAPES[shape])
    with torch.no_grad():
        expected = model(ids(rows)).logits[:, 6:]
    found = step_by_step(prepare_to_decode(model), ids(rows))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)


def test_left_padded_rows_are_themselves_alone():
    model = prepare_to_decode(small())
    batch = step_by_step(model, ids(), start=torch.tensor([0, 4]))
    alone = step_by_step(model, ids()[1:, 4:], begin=2)
    torch.testing.assert_close(batch[1:], alone, rtol=1e-5, atol=2e-5)


def test_names_values_and_ties_stay(tmp_path):
    model = small(attention_bias=True)
    plain = deepcopy(model)
    assert prepare_to_decode(model) is model
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for (name, before), after in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_model(model, tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m")(ids()).logits, plain(ids()).logits)


def test_weights_that_are_changed_in_place_are_seen(has_onednn):
    model, other = prepare_to_decode(small()), small(initializer_range=0.1)
    step_by_step(model, ids())
    assert (model.one_token.head.packed is not None) == has_onednn
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        expected = other(ids()).logits[:, 6:]
    torch.testing.assert_close(step_by_step(model, ids()), expected, rtol=1e-5, atol=2e-5)


def check_that_a_step_of_an_optimizer_is_seen(model, fused):
    """PyTorch does not count what a fused optimizer writes."""
    step_by_step(model, ids())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    with torch.no_grad():
        expected = model(ids()).logits[:, 6:]
    torch.testing.assert_close(step_by_step(model, ids()), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_what_an_optimizer_writes_is_seen(fused, has_onednn):
    check_that_a_step_of_an_optimizer_is_seen(prepare_to_decode(small()), fused)


def test_adapters_of_a_product_change_at_once():
    """Another thread may compute while this one looks them up."""
    model = prepare_to_decode(small())
    apply_lora(model, rank=2)
    model.one_token.get_ready(1)
    product, seen = model.one_token.blocks[0].qkv, []

    class Layer(nn.Linear):
        lora = property(lambda self: seen.append(len(product.loras)))

    product.layers = [Layer(64, 64), *product.layers]
    product.get_ready(1)
    assert seen == [3]  # and not 0


@pytest.mark.parametrize("rows", [2, 2 * MAX_KERNEL_ROWS])
def test_int8_is_that_of_the_layers(rows):
    model = quantize_int8(small(attention_bias=True))
    with torch.no_grad():
        expected = model(ids(rows)).logits[:, 6:]
    if rows > MAX_KERNEL_ROWS and not MULTIPLIES_WHOLE_NUMBERS:
        pytest.skip("this CPU takes the ordinary forward pass")
    found = step_by_step(prepare_to_decode(model), ids(rows))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.03 * expected.abs().max().item())


@pytest.mark.parametrize(("quantize", "tolerance"), [
    (lambda model: model, {"rtol": 1e-5, "atol": 5e-5}), (quantize_int8, {"rtol": 0.05, "atol": 0.2}),
], ids=["float32", "int8"])
def test_adapters_on_off_mixed_merged_and_for_each_row(quantize, tolerance, tmp_path):
    model = prepare_to_decode(quantize(small()))
    adapters = Adapters(model)
    for seed, name in enumerate("ab"):
        adapters.load(adapted(model, tmp_path / name, seed))

    def check():
        with torch.no_grad():
            expected = model(ids()).logits[:, 6:]
        torch.testing.assert_close(step_by_step(model, ids()), expected, **tolerance)
        return expected

    base = check()
    for what in ("a", "b", {"a": 0.7, "b": 0.3}):
        adapters.use(what)
        assert not torch.allclose(check(), base, atol=0.1)
    set_lora(model, False)
    assert torch.equal(check(), base)
    set_lora(model, True)
    adapters.use_rows(["a", None])
    rows = check()
    assert torch.allclose(rows[1], base[1], atol=1e-4) and not torch.allclose(rows[0], base[0], atol=0.1)
    adapters.use("b")
    if quantize is not quantize_int8:
        merge_lora(model)
        check()
        unmerge_lora(model)
    adapters.use(None)
    assert torch.equal(check(), base)


def test_it_steps_aside_where_it_does_not_fit(has_onednn, monkeypatch):
    model = prepare_to_decode(small())
    too_many = MAX_FLOAT32_ROWS + 1
    assert model.one_token.get_ready(too_many - 1) and model.one_token.get_ready(too_many) == has_onednn
    tokens = torch.stack(list(generate(model, ids(too_many), 4, temperature=0)))  # by the forward pass
    assert torch.equal(tokens, torch.stack(list(generate(small(), ids(too_many), 4, temperature=0))))
    in_8_bits = prepare_to_decode(quantize_int8(small())).one_token
    assert in_8_bits.get_ready(MAX_KERNEL_ROWS)
    assert in_8_bits.get_ready(MAX_KERNEL_ROWS + 1) == MULTIPLIES_WHOLE_NUMBERS
    copied = deepcopy(model)
    assert not copied.one_token.get_ready(1)  # its layers have memory of their own now
    list(generate(copied.bfloat16(), ids(1), 3))
    assert model.one_token.get_ready(1)
    last = model.model.layers[1].mlp.up_proj  # the second of the two that lie together
    last.weight.data = last.weight.data.clone()
    assert not model.one_token.get_ready(1)
    model = prepare_to_decode(small())
    model.double()
    assert not model.one_token.get_ready(1)
    monkeypatch.setattr(one_token, "MAX_COPIED_SIZE", 1000)  # a large model is not copied
    assert not prepare_to_decode(small()).one_token.get_ready(too_many)


@pytest.mark.parametrize("make", [
    lambda: small().half(), lambda: small().bfloat16(), lambda: quantize_model(small()),
    lambda: quantize_int8(small(intermediate_size=90)),
], ids=["float16", "bfloat16", "NF4", "int8 of odd width"])
def test_other_weights_stay_as_they_are(make):
    model = make()
    strides = [parameter.stride() for parameter in model.parameters()]
    assert prepare_to_decode(model).one_token is None
    assert strides == [parameter.stride() for parameter in model.parameters()]


def test_tokens_can_be_used_where_gradients_are():
    """OneToken computes in inference mode. Autograd refuses tensors of that mode, so none may come out."""
    model = prepare_to_decode(small())
    tokens = torch.stack(list(generate(model, ids(1), 5)), dim=1)
    model(tokens, labels=tokens).loss.backward()
    assert isinstance(model.one_token, OneToken) and model.lm_head.weight.grad is not None
