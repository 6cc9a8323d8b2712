"""One new token for each row, as fast as a CPU can: what `generate` spends its time on.

    model = prepare_to_decode(load_model("out/full_sft"))  # or quantize_int8(...) of it; then generate

A token's arithmetic is nothing. It waits for two things: every weight comes from memory once, and some
hundred small operations are started one after the other. So the weights lie such that all threads read long
streams of them, and what `CausalLM` computes is written here once more, in few operations. Shapes: B rows, C
width, H heads, K key/value heads, D head dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.quantize import FEW, KERNEL_WIDTH, Int8Linear
from model.transformer import CausalLM, KVCache, one_block, positions_and_mask, rotate

MANY = 64  # rows of x up to which a float32 `Product` is faster than PyTorch's


class Product:
    """Layers that read the same x (B, in) as one: their outputs, one after the other (B, out).

        W x = the sum of the columns of W, each times one number of x

    float32 matrices are stored column by column, and each thread adds up a part of the columns: PyTorch's own
    product of a matrix and a vector keeps to one thread. The layers live on, and share this memory.
    Before the first call, and after a change of adapters, `look`.
    """

    def __init__(self, *layers: nn.Linear | Int8Linear):
        self.layers, self.joined = layers, {}
        for name, _ in layers[0].named_parameters():
            parameters = [getattr(layer, name) for layer in layers]
            joined = torch.cat([parameter.data for parameter in parameters])  # (out, ...) like each of them
            if name == "weight":
                joined = joined.t().contiguous().t()
            for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
                parameter.data = part
            self.joined[name] = joined
        self.laid_out = self.addresses()

    def addresses(self) -> list[int]:
        """Where each layer's parameters lie now."""
        return [getattr(layer, name).data_ptr() for layer in self.layers for name in self.joined]

    def look(self) -> bool:
        """Finds the adapters that are on now; False where the layers no longer share the memory."""
        adapters = [(i, getattr(layer, "lora", None)) for i, layer in enumerate(self.layers)]
        self.loras = [(i, lora) for i, lora in adapters if lora is not None and lora.active]
        if "weight" in self.joined:
            columns = self.joined["weight"].t()  # (in, out)
            most = 2 * torch.get_num_threads()  # two each: one of them may be slow
            parts = max(n for n in range(1, most + 1) if len(columns) % n == 0)
            self.columns = columns.view(parts, -1, columns.size(1))  # (parts, in / parts, out)
        return self.addresses() == self.laid_out

    def __call__(self, x):
        if "codes" in self.joined:
            y = torch._weight_int8pack_mm(x.bfloat16(), self.joined["codes"], self.joined["scale"]).float()
        else:
            rows = x.view(len(x), len(self.columns), -1).transpose(0, 1)  # (parts, B, in / parts)
            y = torch.bmm(rows, self.columns).sum(0)
        if "bias" in self.joined:
            y += self.joined["bias"]
        for i, lora in self.loras:
            begin = sum(layer.out_features for layer in self.layers[:i])
            y[:, begin:begin + self.layers[i].out_features] += lora(x[:, None])[:, 0]
        return y


class OneToken:
    """CausalLM.forward for one new token in each of some rows: float32 or int8 weights, on a CPU."""

    def __init__(self, model: CausalLM):
        self.model, config = model, model.config
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.layers = [
            (block, Product(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
             Product(block.self_attn.o_proj), Product(block.mlp.gate_proj, block.mlp.up_proj),
             Product(block.mlp.down_proj)) for block in model.model.layers]
        self.head = Product(model.lm_head)
        self.root_eps = torch.tensor(config.rms_norm_eps).sqrt()

    def fits(self, batch_size: int) -> bool:
        """To be asked before each text: adapters and memory may have changed since the last."""
        products = [self.head, *(product for _, *products in self.layers for product in products)]
        most = FEW if any("codes" in product.joined for product in products) else MANY
        return batch_size <= most and all([product.look() for product in products])  # a list: each must look

    @torch.inference_mode()
    def __call__(self, ids, cache: KVCache):
        """The logits (B, V) after ids (B,), which are appended to the cache."""
        config, decoder, (heads, kv_heads) = self.model.config, self.model.model, self.heads
        positions, mask = positions_and_mask(config, ids[:, None], cache=cache)
        cos, sin = (table[positions[:, 0]] for table in cache.rope)  # (B or 1, 1, D) each
        [(_, bias)] = one_block(config, mask, torch.float32)  # (1 or B * K, 1, S)
        # Of the cache, for all layers at once: what is seen, and where the new token goes.
        end, stored = cache.length + 1, (cache.k, cache.v)
        seen = [tensor[..., :end, :].flatten(1, 2) for tensor in stored]  # (L, B * K, S, D) each
        places = [tensor[..., end - 1, :] for tensor in stored]  # (L, B, K, D) each
        parts = zip(*(part.unbind() for part in (*seen, *places)), strict=True)
        x = decoder.embed_tokens(ids)  # (B, C)
        for (block, qkv, o, gate_up, down), (k, v, new_k, new_v) in zip(self.layers, parts, strict=True):
            y = qkv(self.norm(block.input_layernorm, x)).view(len(x), -1, config.head_dim)  # (B, H + 2 K, D)
            qk = y[:, :-kv_heads]  # (B, H + K, D)
            if config.qk_norm:
                norms = block.self_attn.q_norm, block.self_attn.k_norm
                split = qk.split((heads, kv_heads), dim=1)
                qk = torch.cat([self.norm(*pair) for pair in zip(norms, split, strict=True)], dim=1)
            qk = rotate(qk, cos, sin)
            new_k.copy_(qk[:, heads:])
            new_v.copy_(y[:, -kv_heads:])
            q = qk[:, :heads].reshape(len(k), -1, config.head_dim)  # (B * K, H / K, D)
            scores = torch.baddbmm(bias, q, k.mT, alpha=config.head_dim ** -0.5)  # (B * K, H / K, S)
            x = x + o(torch.bmm(scores.softmax(dim=-1), v).view(len(x), -1))
            gate, up = gate_up(self.norm(block.post_attention_layernorm, x)).chunk(2, dim=-1)
            x = x + down(F.silu(gate) * up)
        cache.length = end
        return self.head(self.norm(decoder.norm, x))

    def norm(self, module: nn.Module, x):
        """What an RMSNorm gives, in half the time: sqrt(mean of squares + eps) as a hypotenuse."""
        root_mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(x.size(-1) ** -0.5)
        return (x * module.weight).div_(root_mean_square.hypot_(self.root_eps))


def prepare_to_decode(model: CausalLM) -> CausalLM:
    """Lays out weights for `OneToken` and hands it to the model; names, shapes and values of all stay.

    The last thing to do, after quantize_int8, with a model that is not trained any more: an optimizer's state
    would lie in the other order. A model in half precision or 4 bits stays as it is, and so does one on a
    GPU, where nothing of this was measured.
    """
    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    known = all(type(layer) is nn.Linear
                or type(layer) is Int8Linear and layer.in_features % KERNEL_WIDTH == 0 for layer in layers)
    weight = model.model.norm.weight
    if known and weight.dtype == torch.float32 and weight.device.type == "cpu":
        model.one_token = OneToken(model)
    return model
