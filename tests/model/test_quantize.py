"""NF4 against bitsandbytes: the same codes and constants, in a layer that autograd and pickle can take."""

import copy
import pickle

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, get_4bit_type, quantize_4bit
from torch import nn

from common.errors import ModelError
from model import quantize as Q
from model.transformer import CausalLM, ModelConfig

SHAPES = [(512, 128), (100, 64), (30, 50), (7, 13), (64, 1), (1, 3)]  # the last scale may have fewer weights
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape, dtype, seed=0):
    """Random weights with an outlier, an exact tie of absmax and a block of zeros."""
    torch.manual_seed(seed)
    weight = torch.randn(shape) * 0.02
    flat = weight.view(-1)
    flat[len(flat) // 2] = 3.0
    flat[64:128] = 0
    flat[-1], flat[-2] = 0.5, -0.5
    return weight.to(dtype)


def linear(out_features=48, in_features=40, bias=False, dtype=torch.float32):
    layer = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    layer.weight.data.copy_(weights((out_features, in_features), dtype))
    return layer


def tiny(**changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 96, "vocab_size": 50}
    return CausalLM(ModelConfig(**shape | changes))


def test_the_tables_are_those_of_bitsandbytes():
    assert torch.equal(Q.NF4_VALUES, get_4bit_type("nf4", device="cpu"))
    assert torch.equal(Q.DYNAMIC_VALUES, create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_equal_bitsandbytes(shape, dtype):
    for seed in range(4):
        weight = weights(shape, dtype, seed)
        theirs, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        codes, absmax = Q.quantize_nf4(weight)
        assert torch.equal(codes, theirs.flatten())
        assert torch.equal(absmax, state.absmax)
        for state.dtype in DTYPES:
            ours = Q.dequantize_nf4([codes, absmax], shape, state.dtype)
            assert torch.equal(ours, dequantize_4bit(theirs, state))


def reference_quantize_blockwise(x, block):
    """bitsandbytes' own function in plain PyTorch. Its GPU kernels give the same."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(key, x, create_dynamic_map(), block)


@pytest.mark.parametrize("shape", [(512, 512), (512, 128), (100, 64), (64, 3), (64, 1)], ids=str)
def test_double_quantization_equals_bitsandbytes(shape):
    weight = weights(shape, torch.float32)
    theirs, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    layer = Q.NF4Linear.from_linear(linear(*shape))
    layer.weight = None  # all that follows uses the stored constants alone
    assert torch.equal(layer.codes, theirs.flatten())
    assert torch.equal(layer.nested_offset, state.offset)
    assert torch.equal(layer.nested_absmax, state.state2.absmax)
    scales = Q.quantize_nf4(weight)[1] - state.offset
    assert torch.equal(layer.absmax, reference_quantize_blockwise(scales, 256)[0])
    # bitsandbytes' CPU kernel looks the nearest value up on a grid of 2^16: near a midpoint it errs by one.
    differ = layer.absmax != state.absmax
    nested = state.state2.absmax.repeat_interleave(256)[:differ.numel()]
    ours, others = (Q.DYNAMIC_VALUES[codes.int()] * nested for codes in (layer.absmax, state.absmax))
    assert ((scales - ours).abs() <= (scales - others).abs()).all()
    assert ((scales - others).abs() - (scales - ours).abs() <= 2**-14 * nested).all()
    assert differ.float().mean() < 0.02 or scales.abs().max() == 0
    # With their constants, our layer gives their weights, bit for bit.
    layer.absmax.copy_(state.absmax)
    for state.dtype in DTYPES:
        assert torch.equal(layer.dequantize(state.dtype), dequantize_4bit(theirs, state))


def test_forward_is_the_dense_layer_and_equals_bitsandbytes():
    layer = Q.NF4Linear.from_linear(linear(bias=True), double_quant=False)
    theirs = bitsandbytes.nn.Linear4bit(40, 48, quant_type="nf4", compress_statistics=False)
    dense = linear(bias=True)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")
    layer.bias.copy_(theirs.bias)
    x = torch.randn(2, 5, 40)
    assert torch.equal(layer(x), F.linear(x, layer.dequantize(), layer.bias))
    torch.testing.assert_close(layer(x), theirs(x), atol=1e-5, rtol=1e-5)
    half = x.bfloat16()
    expected = F.linear(half, layer.dequantize(torch.bfloat16), layer.bias.bfloat16())
    assert torch.equal(layer(half), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_flows_through_and_no_dense_weight_is_kept(autocast):
    layer = Q.NF4Linear.from_linear(linear(bias=True))
    x, other = (torch.randn(2, 5, 40, requires_grad=True) for _ in range(2))
    other.data.copy_(x.data)
    kept = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(x)
        dtype = y.dtype
        expected = F.linear(other, layer.dequantize(dtype), layer.bias)
    assert dtype == (torch.bfloat16 if autocast else torch.float32)
    assert kept and sum(t.nbytes for t in kept) < 48 * 40  # a dense weight would take 2 or 4 bytes for each
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(x.grad, other.grad)
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())


def test_constants_survive_casts_of_the_model():
    layer = nn.Sequential(Q.NF4Linear.from_linear(linear(bias=True)))
    before = layer[0].dequantize()
    layer.bfloat16().half().to("cpu", torch.float64).float()
    assert torch.equal(layer[0].dequantize(), before)
    assert layer.half()[0].bias.dtype == torch.float16


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_model_is_quantized_but_for_embedding_norms_and_head(double_quant):
    model, plain = tiny(attention_bias=True), tiny(attention_bias=True)
    assert Q.quantize_model(model, double_quant) is model
    for name, module in plain.named_modules():
        here = model.get_submodule(name)
        if type(module) is nn.Linear and name != "lm_head":
            assert type(here) is Q.NF4Linear
            assert (here.dequantize() - module.weight).abs().max() < 0.16 * module.weight.abs().max()
        else:
            assert type(here) is type(module)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(20).view(2, 10)
    assert 0 < (model(ids).logits - plain(ids).logits).abs().max() < 0.5
    # Copies have the same bits.
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, model(ids).logits)
    blank = Q.quantize_model(tiny(attention_bias=True, initializer_range=1.0), double_quant)
    blank.load_state_dict(model.state_dict())
    assert torch.equal(blank(ids).logits, model(ids).logits)


@pytest.mark.parametrize("double_quant", [True, False])
def test_parameters_are_counted_as_if_they_were_not_packed(double_quant):
    model = tiny()
    before = Q.count_parameters(model)
    assert before == sum(p.numel() for p in model.parameters())
    assert Q.count_parameters(Q.quantize_model(model, double_quant)) == before


def test_bits_per_parameter():
    def bits(model):
        return 8 * sum(part.nbytes for part in model[0].stored()) / 512**2

    plain = nn.Sequential(nn.Linear(512, 512))
    single = Q.quantize_model(copy.deepcopy(plain), double_quant=False)
    assert bits(single) == 4.5 and "4.500 bits" in Q.memory_line(single)
    quantized = Q.quantize_model(plain)
    assert bits(quantized) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=2e-4)
    assert "262,144 weights in NF4" in Q.memory_line(quantized) and "4.127 bits" in Q.memory_line(quantized)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = Q.quantize_model(tiny())
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    ids = torch.arange(20).view(2, 10)
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad.clone())
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_one_compiled_graph():
    model = Q.quantize_model(tiny())
    ids = torch.arange(20).view(2, 10)
    compiled = torch.compile(lambda ids: model(ids, labels=ids).loss, backend="aot_eager", fullgraph=True)
    expected = model(ids, labels=ids).loss
    expected.backward()
    grad, model.model.embed_tokens.weight.grad = model.model.embed_tokens.weight.grad, None
    loss = compiled(ids)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, grad)
    torch.compiler.reset()


def test_compiled_code_keeps_no_dense_weight_either():
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    kept = []

    def look(graph, inputs):
        (outputs,) = next(node.args for node in graph.graph.nodes if node.op == "output")
        kept.extend(node.meta["val"] for node in outputs)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
                           partition_fn=min_cut_rematerialization_partition)
    layer, x = Q.NF4Linear.from_linear(linear(64, 64)), torch.randn(1, 64, requires_grad=True)
    torch.compile(layer, backend=backend, fullgraph=True)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 64) @ layer.dequantize())
    assert kept and sum(t.nbytes for t in kept) < 64 * 64
    torch.compiler.reset()


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_operator_keeps_the_rules_of_pytorch(double_quant):
    layer = Q.NF4Linear.from_linear(linear(bias=True), double_quant)
    x = torch.randn(2, 3, 40, requires_grad=True)
    torch.library.opcheck(Q.nf4_linear, (x, layer.stored(), layer.bias, 48))


@pytest.mark.parametrize("double_quant", [False, True])
def test_kernels_of_bitsandbytes_give_the_same_bits(monkeypatch, double_quant):
    """This calls the CPU kernel in the way that a GPU kernel is called."""
    layer = Q.NF4Linear.from_linear(linear(64, 128), double_quant)
    ours = [layer.dequantize(dtype) for dtype in DTYPES]
    assert Q.bitsandbytes_operators(torch.device("cpu")) is None
    monkeypatch.setattr(Q, "bitsandbytes_operators", lambda device: torch.ops.bitsandbytes)
    for dtype, expected in zip(DTYPES, ours, strict=True):
        assert torch.equal(layer.dequantize(dtype), expected)


def test_bad_input_is_one_line():
    def fails(match, model):
        with pytest.raises(ModelError, match=match) as error:
            Q.quantize_model(model)
        assert "\n" not in str(error.value)

    fails("no linear layers", nn.Sequential(nn.Embedding(3, 3)))
    fails("already", Q.quantize_model(nn.Sequential(nn.Linear(4, 4))))
    broken = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    broken[1].weight.data[0, 0] = float("nan")
    fails("can't quantize: 1.weight .* NaN", broken)
    assert type(broken[0]) is nn.Linear
    adapted = nn.Sequential(nn.Linear(4, 4))
    adapted[0].lora = nn.Sequential(nn.Linear(4, 2))
    fails("before apply_lora", adapted)
    with pytest.raises(ModelError, match="quantize_model first"):
        Q.memory_line(nn.Linear(4, 4))
