"""One new token for each row, as fast as a CPU can: most of `generate`'s time. A reader may skip this file.

    model = prepare_to_decode(load_model("out/full_sft"))  # or quantize_int8(...) of it; then generate

The arithmetic for one token takes almost no time. Two other things do: every weight comes from memory once,
and some hundred small operations are started one after the other. For this reason weights are arranged in
memory so that all threads read long streams of them, and `CausalLM` is written here once more, with few
operations.

Shapes: B rows, L layers, C width, H heads, K key/value heads, D head dim, S tokens in the cache, V vocabulary
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from model.attention import one_block, visible_keys
from model.generate import KVCache
from model.int8 import (
    KERNEL_WIDTH_MULTIPLE,
    MAX_KERNEL_ROWS,
    MULTIPLIES_WHOLE_NUMBERS,
    Int8Linear,
    multiply_int8,
)
from model.transformer import Block, CausalLM, RMSNorm, rotate, token_positions

MAX_FLOAT32_ROWS = 64  # with more rows of x, PyTorch's own product is faster than a float32 `Product`


class Product:
    """Computes several layers that read the same x (B, in) at once: their outputs side by side, (B, out).

        W x = the sum of the columns of W, each times one number of x

    float32 matrices are stored column by column, and each thread adds up a part of the columns. PyTorch's own
    product of a matrix and a vector uses one thread only. The layers stay usable, and share this memory.
    Call `get_ready` before the first use, and again whenever adapters have changed.
    """

    def __init__(self, *layers: nn.Linear | Int8Linear):
        self.layers = layers
        self.joined = {}  # the parameters of all layers in one tensor each: weight or codes, scale, bias
        for name, _ in layers[0].named_parameters():
            parameters = [getattr(layer, name) for layer in layers]
            joined = torch.cat([parameter.data for parameter in parameters])  # (out, ...) like each of them
            if name == "weight":
                joined = joined.t().contiguous().t()
            parts = joined.split([len(parameter) for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part
            self.joined[name] = joined
        self.max_rows = MAX_FLOAT32_ROWS
        if "codes" in self.joined:
            self.max_rows = math.inf if MULTIPLIES_WHOLE_NUMBERS else MAX_KERNEL_ROWS
        self.addresses = self.find_addresses()

    def find_addresses(self) -> list[int]:
        """Where the parameters of each layer lie in memory now."""
        return [getattr(layer, name).data_ptr() for layer in self.layers for name in self.joined]

    def get_ready(self, batch_size: int) -> bool:
        """Looks up the adapters in use. False for too many rows, or if the layers left this memory."""
        self.loras = []  # the columns of the output that an adapter adds to, and the adapter
        begin = 0
        for layer in self.layers:
            lora = getattr(layer, "lora", None)
            if lora is not None and lora.active:
                self.loras.append((slice(begin, begin + layer.out_features), lora))
            begin += layer.out_features
        if "weight" in self.joined:
            columns = self.joined["weight"].t()  # (in, out)
            # Equal parts, at most two for each thread, because one of the threads may be slow.
            parts = max(n for n in range(1, 2 * torch.get_num_threads() + 1) if len(columns) % n == 0)
            self.columns = columns.view(parts, -1, columns.size(1))  # (parts, in / parts, out)
        return batch_size <= self.max_rows and self.find_addresses() == self.addresses

    def __call__(self, x):
        if "codes" in self.joined:
            y = multiply_int8(x, self.joined["codes"], self.joined["scale"])
        else:
            rows = x.view(len(x), len(self.columns), -1).transpose(0, 1)  # (parts, B, in / parts)
            y = torch.bmm(rows, self.columns).sum(0)
        if "bias" in self.joined:
            y += self.joined["bias"]
        for outputs, lora in self.loras:
            y[:, outputs] += lora(x[:, None])[:, 0]
        return y


square_root = functools.cache(lambda eps: torch.tensor(eps).sqrt())


def norm(module: RMSNorm, x):
    """The result of an RMSNorm in half the time: sqrt(mean of squares + eps) is computed as a hypotenuse."""
    root_mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(x.size(-1) ** -0.5)
    return (x * module.weight).div_(root_mean_square.hypot_(square_root(module.eps)))


class OneBlock:
    """`Block.forward` for one new token in each row."""

    def __init__(self, block: Block):
        self.block = block
        self.qkv = Product(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        self.o = Product(block.self_attn.o_proj)
        layers = block.mlp.experts if block.has_experts else [block.mlp]
        self.feed_forwards = [(Product(mlp.gate_proj, mlp.up_proj), Product(mlp.down_proj)) for mlp in layers]
        self.products = [self.qkv, self.o, *(product for pair in self.feed_forwards for product in pair)]

    def __call__(self, x, config, rope, bias, keys, values, new_key, new_value):
        """x (B, C) -> (B, C). keys, values (B * K, S, D): those of this layer in the cache.

        new_key, new_value (B, K, D): the last of them, which are written here. bias: as `one_block` makes it.
        """
        kv_heads = config.num_key_value_heads
        y = self.qkv(norm(self.block.input_layernorm, x)).view(len(x), -1, config.head_dim)  # (B, H + 2 K, D)
        qk = y[:, :-kv_heads]  # (B, H + K, D)
        if config.qk_norm:
            q, k = qk[:, :-kv_heads], qk[:, -kv_heads:]
            attention = self.block.self_attn
            qk = torch.cat([norm(attention.q_norm, q), norm(attention.k_norm, k)], dim=1)
        qk = rotate(qk, *rope)
        new_key.copy_(qk[:, -kv_heads:])
        new_value.copy_(y[:, -kv_heads:])
        q = qk[:, :-kv_heads].reshape(len(keys), -1, config.head_dim)  # (B * K, H / K, D)
        scores = torch.baddbmm(bias, q, keys.mT, alpha=config.head_dim ** -0.5)  # (B * K, H / K, S)
        x = x + self.o(torch.bmm(scores.softmax(dim=-1), values).view(len(x), -1))
        y = norm(self.block.post_attention_layernorm, x)
        return x + (self.mix_experts(y) if self.block.has_experts else self.feed_forward(y, 0))

    def feed_forward(self, x, number):
        """The feed-forward layer, or the expert of that number: (n, C) -> (n, C)."""
        gate_up, down = self.feed_forwards[number]
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(F.silu(gate) * up)

    def mix_experts(self, x):
        """`MixtureOfExperts.forward` (model/moe.py) for one token in each row: (B, C) -> (B, C)."""
        mlp = self.block.mlp
        p, chosen = mlp.choose(mlp.gate(x))  # (B, k)
        y = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            rows, places = (chosen == number).nonzero(as_tuple=True)
            y.index_add_(0, rows, self.feed_forward(x[rows], number) * p[rows, places, None])
        return y


class OneToken:
    """`CausalLM.forward` for one new token in each row: float32 or int8 weights, on a CPU."""

    def __init__(self, model: CausalLM):
        self.model = model
        self.blocks = [OneBlock(block) for block in model.model.layers]
        self.head = Product(model.lm_head)

    def get_ready(self, batch_size: int) -> bool:
        """Looks up adapters and memory, which may have changed: call it before each text.

        False if the ordinary forward pass must be used.
        """
        products = [self.head]
        for block in self.blocks:
            products += block.products
        return all([product.get_ready(batch_size) for product in products])  # a list: no product is left out

    @torch.inference_mode()
    def __call__(self, ids, cache: KVCache):
        """The logits (B, V) after ids (B,), which are appended to the cache."""
        config = self.model.config
        # The biases of the layers with each window, (1 or B * K, 1, S)
        biases = {}
        for window in dict.fromkeys(config.windows):
            visible = visible_keys(window, ids[:, None], cache=cache)
            [(_, biases[window])] = one_block(config, visible, torch.float32)
        positions = token_positions(ids[:, None], cache=cache)[:, 0]  # (B or 1,)
        rope = [table[positions] for table in cache.rope]  # cos and sin, (B or 1, 1, D) each
        # The cache is cut for all layers at once: L views of each kind. The new token has the last place.
        end = cache.length + 1
        keys = cache.k[..., :end, :].flatten(1, 2).unbind()  # (B * K, S, D)
        values = cache.v[..., :end, :].flatten(1, 2).unbind()
        new_keys = cache.k[..., end - 1, :].unbind()  # (B, K, D)
        new_values = cache.v[..., end - 1, :].unbind()
        x = self.model.model.embed_tokens(ids)  # (B, C)
        layers = zip(self.blocks, config.windows, keys, values, new_keys, new_values, strict=True)
        for block, window, *of_layer in layers:
            x = block(x, config, rope, biases[window], *of_layer)
        cache.length = end
        return self.head(norm(self.model.model.norm, x))


def prepare_to_decode(model: CausalLM) -> CausalLM:
    """Arranges the weights for `OneToken` and gives it to the model. Weights keep names, shapes and values.

    This is the last thing to do, after quantize_int8, with a model that is not trained any more: the state of
    an optimizer would lie in the other order. A model in half precision or 4 bits stays as it is, and so does
    a model on a GPU, where none of this was measured.
    """
    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    are_known = all(type(layer) in (nn.Linear, Int8Linear) for layer in layers)
    widths = [layer.in_features for layer in layers if type(layer) is Int8Linear]
    fit_kernel = all(width % KERNEL_WIDTH_MULTIPLE == 0 for width in widths)
    weight = model.model.norm.weight
    if are_known and fit_kernel and weight.dtype == torch.float32 and weight.device.type == "cpu":
        model.one_token = OneToken(model)
    return model
