"""int8 weights against their definition in plain formulas, and all that a model in int8 must still do."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import ModelError
from model import int8
from model.adapters import remove_lora
from model.generate import KVCache
from model.int8 import Int8Linear, quantize_int8
from model.lora import apply_lora, load_lora, lora_parameters, merge_lora, save_lora
from model.quantize import count_parameters, quantize_model
from model.transformer import CausalLM, ModelConfig
from model.weights import save_model


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**changes):
    return CausalLM(ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
                                intermediate_size=96, initializer_range=0.1, **changes)).eval()


@pytest.mark.parametrize(("out", "width"), [(96, 64), (7, 32), (1, 96), (33, 48), (5, 7)])
def test_int8_is_off_by_half_a_step_at_most(out, width):
    weight = torch.randn(out, width) * torch.logspace(-3, 3, out)[:, None]
    weight[0, 0] = 0
    layer = Int8Linear(weight)
    assert layer.codes.dtype == torch.int8 and layer.codes.abs().max() == 127
    error = (layer.dequantize() - weight).abs()
    assert (error <= layer.scale[:, None] * 0.501).all()
    assert layer.dequantize()[0, 0] == 0
    assert torch.equal(Int8Linear(torch.zeros(3, 32)).dequantize(), torch.zeros(3, 32))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (7, 32), (33, 48), (5, 7)])
@pytest.mark.parametrize("rows", [(1,), (3, 2), (2, 40)])
def test_int8_products_are_those_of_the_dequantized_weight(out, width, bias, rows):
    """By the kernel for few rows, and by the plain formula for many and for odd widths."""
    linear = nn.Linear(width, out, bias=bias)
    layer = Int8Linear(linear.weight, linear.bias)
    x = torch.randn(*rows, width)
    expected = F.linear(x, layer.dequantize(), linear.bias)
    y = layer(x)
    assert y.shape == expected.shape and y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.skipif(not int8.MULTIPLIES_WHOLE_NUMBERS, reason="this CPU multiplies no whole numbers")
def test_many_rows_are_as_exact_as_float32_and_independent():
    """Also where one value of x is a thousand times as large as the others, which 8 bits of x would lose."""
    layer = Int8Linear(torch.randn(33, 64))
    x = torch.randn(40, 64)
    x[:, 5] = 1000
    y = layer(x)
    exact = x.double() @ layer.dequantize().double().T
    step = 1000 / 127 / 254  # of the second part
    assert ((y - exact).abs() <= 64 * 127 * layer.scale.double() * step / 2).all()
    assert (layer(x[:2]) - exact[:2]).abs().mean() > 10 * (y - exact).abs().mean()  # the kernel of a few rows
    assert torch.equal(layer(x[9:20]), y[9:20])
    x[3] = torch.nan
    assert layer(x)[3].isnan().all() and torch.equal(layer(x)[4:], y[4:])


@pytest.mark.parametrize("whole_numbers", [True, False])
def test_a_cpu_without_products_of_whole_numbers_gives_the_same(whole_numbers, monkeypatch):
    layer, x = Int8Linear(torch.randn(33, 64)), torch.randn(40, 64)
    monkeypatch.setattr(int8, "MULTIPLIES_WHOLE_NUMBERS", whole_numbers)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-3, atol=2e-3)


def test_int8_takes_every_linear_layer_and_leaves_the_embedding():
    model = small()
    parameters, embedding = count_parameters(model), model.model.embed_tokens.weight.clone()
    ids = torch.randint(model.config.vocab_size, (2, 12))
    exact = model(ids).logits
    assert quantize_int8(model) is model
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert isinstance(model.lm_head, Int8Linear)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert count_parameters(model) == parameters  # a tied head has codes of its own, and counts once
    assert F.cosine_similarity(model(ids).logits.flatten(), exact.flatten(), dim=0) > 0.999
    scale = model.lm_head.scale.clone()
    ids = ids[:, :1]
    model.to(torch.bfloat16)
    assert torch.equal(model.lm_head.scale, scale) and model.lm_head.codes.dtype == torch.int8
    assert model(ids).logits.dtype == torch.bfloat16


def test_int8_decodes_with_a_cache_what_it_computes_without():
    model = quantize_int8(small())
    ids = torch.randint(model.config.vocab_size, (2, 20))
    cache = KVCache(model.config, 2, 20)
    with torch.no_grad():
        cached = torch.cat([model(ids[:, t:t + 1], cache=cache).logits for t in range(20)], dim=1)
        whole = model(ids).logits
    torch.testing.assert_close(cached, whole, rtol=0.05, atol=0.03 * whole.abs().max().item())


@pytest.mark.parametrize("first", [quantize_int8, quantize_model])
@pytest.mark.parametrize("second", [quantize_int8, quantize_model])
def test_a_model_is_quantized_once(first, second):
    with pytest.raises(ModelError, match="quantized already"):
        second(first(small()))


def test_int8_is_not_saved(tmp_path):
    with pytest.raises(ModelError, match="8-bit"):
        save_model(quantize_int8(small()), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_adapters_over_int8_give_what_they_give_over_its_weights(tmp_path):
    model = small()
    apply_lora(model, rank=4)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    save_lora(model, tmp_path / "a")
    save_lora(model, tmp_path / "a.pth")  # has no marks of its base: the dense twin is another
    remove_lora(model)
    base = quantize_int8(model)
    dense = deepcopy(base)
    load_lora(base, tmp_path / "a")
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, Int8Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = layer.dequantize()
            dense.set_submodule(name, linear)
    load_lora(dense, tmp_path / "a.pth")
    ids = torch.randint(model.config.vocab_size, (2, 12))
    torch.testing.assert_close(base(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match="8-bit"):
        merge_lora(base)
