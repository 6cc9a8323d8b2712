"""Decoding on a GPU as one recorded step, a CUDA graph. A reader may skip this file.

    model = record_decoding(load_model("out/full_sft", "cuda", torch.bfloat16))  # then generate

A token takes some hundred short computations. Python needs longer to start one of them than a GPU to carry
it out. A CUDA graph is a recording of all of them, which the GPU repeats as a whole. Whatever is recorded
has the same shapes and the same addresses in every step. So each step reads the whole cache, and a mask hides
the places that are not filled yet; the place of the new token is a number in the GPU's memory.

No GPU has run this so far, so nothing but benchmarks/gpu.py calls `record_decoding`. Tests compare the step
itself, unrecorded, with the ordinary forward pass.

Shapes: B rows, S places of the cache, V vocabulary, K key/value heads, D head dim.
"""

import torch

from common.errors import ModelError
from model.attention import AttentionMask, one_block
from model.generate import KVCache
from model.quantize import QuantizedLinear
from model.transformer import CausalLM, Output

STEPS_BEFORE = 2  # unrecorded: PyTorch sets up its libraries at their first use, which no recording may hold


class OnePlace:
    """Writes a layer's new key and value at `place`, (1,) on the GPU, and returns all that are stored."""

    def __init__(self, cache: KVCache, place):
        self.cache, self.place = cache, place

    def append(self, layer: int, k, v):
        """k, v (B, K, 1, D) -> all keys and values of the layer, (B, K, S, D)."""
        for stored, new in ((self.cache.k, k), (self.cache.v, v)):
            stored[layer].index_copy_(2, self.place, new.to(stored.dtype))
        return self.cache.k[layer], self.cache.v[layer]


class RecordedStep:
    """`CausalLM.forward` for one new token in each row. Every new cache needs a new recording."""

    def __init__(self, model: CausalLM):
        self.model = model
        self.recorded = None  # the cache whose addresses are in the recording

    def get_ready(self, batch_size: int) -> bool:
        """Called before each text. Adapters may have changed, so the next token is recorded anew."""
        self.recorded = self.graph = None
        return not torch.is_autocast_enabled("cuda")

    @torch.inference_mode()
    def __call__(self, ids, cache: KVCache):
        """The logits (B, V) after ids (B,), which join the cache. The next call writes over the logits."""
        if cache.length == cache.max_length:
            raise ModelError(f"the KV cache holds {cache.max_length} tokens, and all are in use")
        if cache.k is not self.recorded:
            self.ids, self.place = ids.clone(), torch.zeros(1, dtype=torch.long, device=ids.device)
        self.ids.copy_(ids)
        self.place.fill_(cache.length)
        if cache.k is not self.recorded:
            self.record(cache)
        if self.graph is None:  # on a CPU, for the tests
            self.logits = self.step(cache)
        else:
            self.graph.replay()
        cache.length += 1
        return self.logits

    def record(self, cache: KVCache) -> None:
        """Records `step`. A recording computes nothing; and a step may be repeated, as it writes the same."""
        self.recorded = cache.k
        if self.ids.is_cuda:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(STEPS_BEFORE):
                    self.step(cache)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.step(cache)

    def step(self, cache: KVCache):
        """The logits (B, V) after self.ids (B,), whose place in the text is self.place (1,)."""
        decoder, config = self.model.model, self.model.config
        keys = torch.arange(cache.max_length, device=self.ids.device)[None]
        visible, positions = keys <= self.place, self.place[None]  # (1, S), (1, 1)
        if cache.start is not None:  # pads on the left of each row
            visible = visible & (keys >= cache.start[:, None])  # (B, S)
            positions = positions - cache.start[:, None]  # (B, 1)
        x = decoder.embed_tokens(self.ids[:, None])  # (B, 1, C)
        masks, rope, here = {}, cache.rope_at(positions, x.dtype), OnePlace(cache, self.place)
        for window in dict.fromkeys(config.windows):
            seen = visible if window is None else visible & (keys > self.place - window)
            seen = seen[:, None, None]  # (B or 1, 1, 1, S)
            masks[window] = AttentionMask(seen, one_block(config, seen, x.dtype))
        for block, window in zip(decoder.layers, config.windows, strict=True):
            x = block(x, rope, masks[window], here)
        return Output(decoder.norm(x), self.model.lm_head).logits[:, 0].float()


def record_decoding(model: CausalLM) -> CausalLM:
    """Lets `generate` decode by a recorded step, if the model is on CUDA, not quantized and without experts.

    Quantized weights are looked up in tables that come from the CPU, which no recording can hold. With
    experts each step computes something else.
    """
    quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if model.model.norm.weight.is_cuda and not quantized and not model.config.num_experts:
        model.one_token = RecordedStep(model)
    return model
