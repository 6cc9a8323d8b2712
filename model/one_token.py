"""One new token for each row, as fast as a CPU can: most of `generate`'s time. A reader may skip this file.

    model = prepare_to_decode(load_model("out/full_sft"))  # or quantize_int8(...) of it; then generate

The arithmetic for one token takes almost no time. Two other things do: every weight comes from memory once,
and some hundred small operations are started one after the other. For this reason weights are arranged in
memory so that all threads read long streams of them, and `CausalLM` is written here once more, with few
operations.

Shapes: B rows, L layers, C width, H heads, K key/value heads, D head dim, S tokens in the cache, V vocabulary
"""

import math
import platform

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

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

# oneDNN is the library that PyTorch multiplies half precision with. For float32 PyTorch takes another one.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")
MIN_ONEDNN_ROWS = 2  # for one row of x, the columns are faster
TYPICAL_ROWS = 32  # the order of oneDNN is chosen for so many rows, and serves others, too
MAX_COPIED_SIZE = 2**29  # numbers of all weights: oneDNN's order is a copy, here of 2 GB at most
MAX_FLOAT32_ROWS = 64  # with more rows of x, PyTorch's own product is faster than the columns
MIN_SPLIT_SIZE = 2**17  # numbers of a matrix: a smaller one is multiplied faster than it is split up


class Product:
    """Computes several layers that read the same x (B, in) at once: their outputs side by side, (B, out).

        W x = the sum of the columns of W, each times one number of x

    float32 matrices are stored column by column, and each thread adds up a part of the columns. PyTorch's own
    product of a matrix and a vector uses one thread only. The layers stay usable, and share this memory.
    Several rows of x go through oneDNN after `pack`. Call `get_ready` before the first use, and again
    whenever adapters have changed.
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
        self.packed = None  # the joined weight once more, in the order in which oneDNN reads it
        self.max_rows = MAX_FLOAT32_ROWS
        if "codes" in self.joined:
            self.max_rows = math.inf if MULTIPLIES_WHOLE_NUMBERS else MAX_KERNEL_ROWS
        self.addresses = self.find_addresses()

    def __getstate__(self):
        """What copy.deepcopy copies: not oneDNN's own tensor, which it can't."""
        return self.__dict__ | {"packed": None}

    def find_addresses(self) -> list[int]:
        """Where the parameters of each layer lie in memory now."""
        return [getattr(layer, name).data_ptr() for layer in self.layers for name in self.joined]

    def pack(self) -> None:
        """Copies float32 weights for oneDNN, if they have changed."""
        if "weight" not in self.joined:
            return
        written = [count_writes(layer.weight) for layer in self.layers]
        if self.packed is None or written != self.written:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.joined["weight"], TYPICAL_ROWS)
            self.written, self.max_rows = written, math.inf

    def get_ready(self, batch_size: int) -> bool:
        """Looks up the adapters in use. False for too many rows, or if the layers left this memory."""
        loras, begin = [], 0
        for layer in self.layers:
            lora = getattr(layer, "lora", None)
            if lora is not None and lora.active:
                loras.append((slice(begin, begin + layer.out_features), lora))
            begin += layer.out_features
        self.loras = loras  # the columns of the output that an adapter adds to, and the adapter
        if "weight" in self.joined:
            columns = self.joined["weight"].t()  # (in, out)
            # Equal parts, at most two for each thread, because one of the threads may be slow.
            most = 2 * torch.get_num_threads() if columns.numel() >= MIN_SPLIT_SIZE else 1
            parts = max(n for n in range(1, most + 1) if len(columns) % n == 0)
            self.columns = columns.view(parts, -1, columns.size(1))  # (parts, in / parts, out)
        return batch_size <= self.max_rows and self.find_addresses() == self.addresses

    def __call__(self, x):
        if "codes" in self.joined:
            y = multiply_int8(x, self.joined["codes"], self.joined["scale"])
        elif self.packed is not None and len(x) >= MIN_ONEDNN_ROWS:
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        elif len(self.columns) == 1:
            y = torch.mm(x, self.columns[0])
        else:
            rows = x.view(len(x), len(self.columns), -1).transpose(0, 1)  # (parts, B, in / parts)
            y = torch.bmm(rows, self.columns).sum(0)
        if "bias" in self.joined:
            y += self.joined["bias"]
        for outputs, lora in self.loras:
            y[:, outputs] += lora(x[:, None])[:, 0]
        return y


optimizer_steps = 0  # of all optimizers


@register_optimizer_step_post_hook
def count_step(*_) -> None:
    global optimizer_steps
    optimizer_steps += 1


def count_writes(parameter: torch.Tensor) -> int:
    """Another number whenever the numbers of a parameter may have been changed in place.

    PyTorch counts this itself, but not what a fused optimizer writes: so each step of an optimizer counts.
    What is written through `.data`, or in tensors made in inference mode, is counted nowhere.
    """
    return optimizer_steps + (0 if parameter.is_inference() else parameter._version)


class Norm:
    """One RMSNorm, or those of several heads at once, in half the time:

        weight * x / sqrt(mean of squares of x + eps) = sqrt(n) weight * x / hypot(length of x, sqrt(n eps))

    n is the width of x (B, n) or (B, heads, n). Call `get_ready` before each text: weights may have changed.
    """

    def __init__(self, *modules: RMSNorm):
        self.modules = modules  # one, or one for each head

    def get_ready(self) -> None:
        weights = torch.stack([module.weight for module in self.modules])  # (1, n) or (heads, n)
        self.weight = weights * weights.size(1) ** 0.5
        self.smallest = torch.tensor(weights.size(1) * self.modules[0].eps).sqrt()

    def __call__(self, x):
        return (x * self.weight).div_(torch.linalg.vector_norm(x, 2, -1, True).hypot_(self.smallest))


class OneBlock:
    """`Block.forward` for one new token in each row."""

    def __init__(self, block: Block):
        self.block = block
        attention = block.self_attn
        self.input_norm, self.mlp_norm = Norm(block.input_layernorm), Norm(block.post_attention_layernorm)
        self.norms = [self.input_norm, self.mlp_norm]
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = Product(attention.o_proj)
        if isinstance(attention.q_norm, RMSNorm):  # otherwise it does nothing
            kv_heads = attention.k_proj.out_features // attention.head_dim
            heads = attention.q_proj.out_features // attention.head_dim
            self.qk_norm = Norm(*[attention.q_norm] * heads, *[attention.k_norm] * kv_heads)
            self.norms.append(self.qk_norm)
        layers = block.mlp.experts if block.has_experts else [block.mlp]
        self.feed_forwards = [(Product(mlp.gate_proj, mlp.up_proj), Product(mlp.down_proj)) for mlp in layers]
        self.products = [self.qkv, self.o, *(product for pair in self.feed_forwards for product in pair)]

    def __call__(self, x, config, rope, bias, keys, values, new_key, new_value):
        """x (B, C) -> (B, C). keys, values (B * K, S, D): those of this layer in the cache.

        new_key, new_value (B, K, D): the last of them, which are written here. bias: as `one_block` makes it.
        """
        kv_heads = config.num_key_value_heads
        y = self.qkv(self.input_norm(x)).view(len(x), -1, config.head_dim)  # (B, H + 2 K, D)
        qk = y[:, :-kv_heads]  # (B, H + K, D)
        qk = rotate(self.qk_norm(qk) if config.qk_norm else qk, *rope)
        new_key.copy_(qk[:, -kv_heads:])
        new_value.copy_(y[:, -kv_heads:])
        q = qk[:, :-kv_heads].reshape(len(keys), -1, config.head_dim)  # (B * K, H / K, D)
        scores = torch.baddbmm(bias, q, keys.mT, alpha=config.head_dim ** -0.5)  # (B * K, H / K, S)
        x = x + self.o(torch.bmm(scores.softmax(dim=-1), values).view(len(x), -1))
        y = self.mlp_norm(x)
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
        self.norm, self.head = Norm(model.model.norm), Product(model.lm_head)
        self.may_pack = HAS_ONEDNN and sum(p.numel() for p in model.parameters()) <= MAX_COPIED_SIZE

    def get_ready(self, batch_size: int) -> bool:
        """Looks up weights, adapters and memory, which may have changed: call it before each text.

        False if the ordinary forward pass must be used.
        """
        products, norms = [self.head], [self.norm]
        for block in self.blocks:
            products += block.products
            norms += block.norms
        for norm in norms:
            norm.get_ready()
        if self.may_pack and batch_size >= MIN_ONEDNN_ROWS:
            for product in products:
                product.pack()
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
        return self.head(self.norm(x))


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
