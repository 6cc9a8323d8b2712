"""The forward pass for one new token, compiled, to decode faster on a CPU. A reader may skip this file.

    model = compile_step(load_model("out/full_sft"))  # or quantize_int8(...) of it; then generate

A token of a small model is some hundred small operations, and most of its time goes into starting them from
Python one by one. PyTorch's compiler joins them into a few loops in C++. It needs a C++ compiler, and some
seconds before the first token; what it made stays on disk (TORCHINDUCTOR_CACHE_DIR), and later starts take a
part of that time. The steps of any length, and of any number of rows above one, are one program.

Shapes: B rows, L layers, K key/value heads, D head dim, S tokens in the cache, V vocabulary
"""

import shutil

import torch

from common.errors import UsageError
from model.adapters import RowLoRA
from model.attention import AttentionMask, one_block, visible_keys
from model.generate import KVCache
from model.transformer import CausalLM, token_positions

COMPILERS = ("g++", "clang++", "c++", "cl")


class CompiledStep:
    """What `CausalLM.forward` gives for one new token in each row, float32 or int8 weights, on a CPU."""

    def __init__(self, model: CausalLM):
        self.model = model
        self.run = torch.compile(self.logits, dynamic=True, fullgraph=True, options={"cpp_wrapper": True})

    def get_ready(self, batch_size: int) -> bool:
        """False if the ordinary forward pass must be used, because rows have adapters of their own."""
        return not any(isinstance(module, RowLoRA) for module in self.model.modules())

    @torch.inference_mode()
    def __call__(self, ids, cache: KVCache):
        """The logits (B, V) after ids (B,), which are appended to the cache."""
        config, ids, rows, end = self.model.config, ids[:, None], len(ids), cache.length + 1
        # Each row gets a bias and angles of its own, also where all are equal: tensors of other shapes would
        # need another program.
        biases = {}
        for window in dict.fromkeys(config.windows):
            [(_, bias)] = one_block(config, visible_keys(window, ids, cache=cache), torch.float32)
            biases[window] = bias.expand(rows * config.num_key_value_heads, 1, end).contiguous()
        angles = [table.expand(rows, -1, -1, -1).contiguous()
                  for table in cache.rope_at(token_positions(ids, cache=cache), torch.float32)]
        place = torch.tensor([cache.length])
        cache.length = end
        return self.run(ids, *angles, biases, cache.k, cache.v, place)

    def logits(self, ids, cos, sin, biases, k, v, place):
        """ids (B, 1), cos and sin (B, 1, 1, D), a bias (B * K, 1, S) for each window of layers; k and v
        (L, B, K, S or more, D), in which the new token has the place (1,)."""
        masks = {window: AttentionMask(None, [(slice(None), bias)]) for window, bias in biases.items()}
        cache = Memory(k, v, place, next(iter(biases.values())).size(-1))
        decoder = self.model.model
        x = decoder.embed_tokens(ids)  # (B, 1, C)
        for block, window in zip(decoder.layers, self.model.config.windows, strict=True):
            x = block(x, (cos, sin), masks[window], cache)
        return self.model.lm_head(decoder.norm(x))[:, 0]


class Memory:
    """A KVCache for the compiler: no number in it is fixed in the program."""

    def __init__(self, k, v, place, end: int):
        self.k, self.v, self.place, self.end = k, v, place, end

    def append(self, layer: int, k, v):
        """As in KVCache."""
        self.k[layer].index_copy_(2, self.place, k)
        self.v[layer].index_copy_(2, self.place, v)
        return self.k[layer][:, :, :self.end], self.v[layer][:, :, :self.end]


def compile_step(model: CausalLM) -> CausalLM:
    """Gives the model a CompiledStep. Raises UsageError where it can't have one."""
    if not any(map(shutil.which, COMPILERS)):
        raise UsageError(f"--compile needs a C++ compiler, one of {', '.join(COMPILERS)}")
    weight = model.model.norm.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        raise UsageError(f"--compile is for float32 and int8 on a CPU, not for {kind}")
    if model.config.num_experts:
        raise UsageError("--compile is not for experts: each step computes something else")
    model.one_token = CompiledStep(model)
    return model
