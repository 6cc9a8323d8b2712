"""Attention: softmax(Q K^T / sqrt(D)) V, and the faster ways to compute the same numbers.
A reader may skip all but `plain_attention`.

`plain_attention` is the definition, and with `AttentionMask` it says everything. The model calls `attention`,
which gives the same result by the fastest way for the device. The rest of this file is those
ways, and tests compare each of them with the definition.

Shapes: B batch, T tokens, S keys in sight (T plus what is cached), H heads, K key/value heads, D head dim.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.errors import ModelError

MAX_BLOCKED_TOKENS = 1024  # rows up to this length train with `block_attention` on a CPU
QUERIES_PER_BLOCK = 128
MIN_FLEX_TOKENS = 1024  # below it a mask of T x T numbers is cheap, and compiling a kernel takes seconds
KINDS = FULL, SLIDING = "full_attention", "sliding_attention"  # of layers, in the words of config.json


def plain_attention(q, k, v, visible):
    """q (B, H, T, D), k and v (B, K, S, D), visible: bool (B or 1, 1, T, S) -> (B, H, T, D)."""
    k, v = (heads.repeat_interleave(q.size(1) // k.size(1), dim=1) for heads in (k, v))  # (B, H, S, D)
    scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, S): how well each key answers each query
    scores = scores.masked_fill(~visible, -math.inf)  # softmax gives these keys a weight of 0
    return scores.softmax(dim=-1) @ v  # for each query, the mean of the values, weighted


@dataclass
class AttentionMask:
    """Which keys each query may see. `make_mask` makes it once in a forward pass for all layers of a kind.

    visible: bool (B or 1, 1, T, S). None: each token sees itself and all before it, and nothing else.
    blocks: the same for `block_attention`, where that is the fastest way; None where it is not.
    flex: a BlockMask of PyTorch, in place of `visible`, for `flex_attention`; None where that is not used.
    """

    visible: torch.Tensor | None
    blocks: list[tuple[slice, torch.Tensor]] | None = None
    flex: object | None = None


def layer_kinds(config, full_attention_every: int | None = None) -> tuple[int | None, list[str] | None]:
    """The sliding_window and the layer_types of a config, with a list only where layers differ.

    full_attention_every: K, and every K-th layer has no window. Raises ModelError for kinds that are unknown,
    not one for each layer, or need a window that is not there.
    """
    kinds, layers, window = config.layer_types, config.num_hidden_layers, config.sliding_window
    if full_attention_every is not None:
        if not 2 <= full_attention_every <= layers:  # otherwise all layers would be of one kind
            raise ModelError(f"full_attention_every must be from 2 to {layers}, the number of layers, not "
                             f"{full_attention_every}")
        kinds = [SLIDING if layer % full_attention_every else FULL for layer in range(1, layers + 1)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in KINDS for kind in kinds):
        raise ModelError(f"layer_types must be {' or '.join(KINDS)} for each of {layers} layers")
    if SLIDING in kinds and window is None:
        raise ModelError("layers with a window and layers without one need a sliding_window")
    return window if SLIDING in kinds else None, kinds if len(set(kinds)) > 1 else None


def attention(q, k, v, mask: AttentionMask):
    """q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D): `plain_attention` by the fastest way here."""
    if mask.blocks is not None:
        return block_attention(q, k, v, mask.blocks)
    if mask.flex is not None:
        return flex_attention(q, k, v, mask.flex)
    # With one new token PyTorch's own causal mask would show it the first key alone. It may see every key.
    causal = mask.visible is None and q.size(2) > 1
    grouped = k.size(1) < q.size(1)
    if grouped and q.is_cuda and (mask.visible is not None or q.dtype == torch.float32):
        # On CUDA only flash attention knows grouped heads, and it takes neither a mask nor float32. Every
        # other kernel would store all the scores if it had to group heads, so heads are repeated.
        k, v = (heads.repeat_interleave(q.size(1) // k.size(1), dim=1) for heads in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask.visible, is_causal=causal, enable_gqa=grouped)


def make_mask(config, window, input_ids, document_ids, cache, dtype) -> AttentionMask:
    """The mask for input_ids (B, T), in a forward pass whose matrix products have that dtype.

    window: a token sees itself and the window - 1 tokens before it; None: all tokens before it.
    document_ids (B, T): in a packed row a token sees only tokens of its own document.
    cache: the keys and values of earlier tokens, which all new tokens see.
    """
    if takes_flex(config, window, input_ids, document_ids, cache, dtype):
        return AttentionMask(None, flex=flex_mask(window, input_ids, document_ids))
    visible = visible_keys(window, input_ids, document_ids, cache)
    batch_size, length = input_ids.shape
    if input_ids.device.type != "cpu":
        return AttentionMask(visible)
    if cache is not None and length == 1:
        return AttentionMask(visible, one_block(config, visible, dtype))
    trains = torch.is_grad_enabled() and cache is None
    if trains and dtype != torch.float32 and length <= MAX_BLOCKED_TOKENS:
        return AttentionMask(visible, causal_blocks(config, visible, batch_size, length, dtype))
    return AttentionMask(visible)


def visible_keys(window, input_ids, document_ids=None, cache=None) -> torch.Tensor | None:
    """Which keys each query sees, as `AttentionMask.visible` has it.

        a row of two documents     7 7 7 9 9         the first token of document 9 sees itself alone
        its last token sees        . . . x x         and the second one sees both
    """
    past = cache.length if cache is not None else 0
    pads = cache.start if cache is not None else None
    length = input_ids.size(1)
    if document_ids is not None and cache is not None:
        raise ModelError("document_ids and a cache don't go together: give each document a row")
    if cache is not None and past + length > cache.max_length:
        raise ModelError(f"the KV cache holds {cache.max_length} tokens, too few for {past + length}")
    # PyTorch's causal mask assumes that queries and keys begin at the same token, which is so where the cache
    # is empty. One new token needs no mask at all.
    in_order = past == 0 or length == 1
    if document_ids is None and pads is None and window is None and in_order:
        return None
    keys = torch.arange(past + length, device=input_ids.device)
    queries = torch.arange(past, past + length, device=input_ids.device)[:, None]  # (T, 1)
    visible = (keys <= queries)[None]  # (1, T, S)
    if window is not None:
        visible = visible & (keys > queries - window)
    if document_ids is not None:
        visible = visible & (document_ids[:, :, None] == document_ids[:, None, :])  # (B, T, T)
    if pads is not None:
        # A pad sees itself, because a softmax over nothing is NaN.
        visible = visible & ((keys >= pads[:, None])[:, None] | (keys == queries))  # (B, T, S)
    return visible[:, None]


# --- faster ways on a CPU -----------------------------------------------------------------------------------


def block_attention(q, k, v, blocks):
    """Attention as batched matrix products, QUERIES_PER_BLOCK queries at a time.

    This is for training in half precision on a CPU, where PyTorch's own function takes 2 to 3 times as long.
    A block computes only with the keys that it may see, which almost halves the work of a causal mask. Query
    heads that share a key/value head are stacked, as if one head had more queries.

    blocks: for each block, the slice of S keys that any of its n queries may see, and a bias
    (B * K, H / K * n, S), which is 0 where a query may look and -inf elsewhere.
    """
    q = q.reshape(k.size(0) * k.size(1), -1, *q.shape[2:])  # (B * K, H / K, T, D)
    k, values = k.flatten(0, 1), v.flatten(0, 1)  # (B * K, S, D)
    parts = []
    for part, (keys, bias) in zip(q.split(QUERIES_PER_BLOCK, dim=2), blocks, strict=True):
        queries, scale = part.flatten(1, 2), q.size(-1) ** -0.5  # (B * K, H / K * n, D)
        scores = torch.baddbmm(bias, queries, k[:, keys].mT, alpha=scale)  # (B * K, H / K * n, S)
        parts.append((scores.softmax(dim=-1) @ values[:, keys]).view(part.shape))
    return torch.cat(parts, dim=2).view(v.size(0), -1, *q.shape[2:])  # (B, H, T, D)


def causal_blocks(config, visible, batch_size: int, length: int, dtype):
    """The `blocks` of `block_attention` for whole rows of `length` tokens."""
    kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    if visible is None:
        visible = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    blocks = []
    for begin in range(0, length, QUERIES_PER_BLOCK):
        keys = slice(0, begin + QUERIES_PER_BLOCK)
        queries = visible[:, :, begin:begin + QUERIES_PER_BLOCK]  # (B or 1, 1, n, T)
        if not torch.compiler.is_compiling():  # sizes that depend on values would break the compiler's graph
            first_seen = queries.any(dim=2).any(dim=0).nonzero()[0, 1].item()
            keys = slice(first_seen, begin + QUERIES_PER_BLOCK)
        hidden = ~queries[:, :, None, :, keys]  # (B or 1, 1, 1, n, S)
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -math.inf)
        bias = bias.expand(batch_size, kv_heads, group, -1, -1)
        blocks.append((keys, bias.reshape(batch_size * kv_heads, -1, bias.size(-1))))
    return blocks


def one_block(config, visible, dtype):
    """The `blocks` for one new token over a cache: this way is faster for batches and for long texts."""
    if visible is None:
        return [(slice(None), torch.zeros(1, 1, 1, dtype=dtype))]
    bias = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -math.inf)[:, 0]  # (B or 1, 1, S)
    rows = config.num_key_value_heads if len(visible) > 1 else 1
    return [(slice(None), bias.repeat_interleave(rows, dim=0))]


# --- a faster way on CUDA -----------------------------------------------------------------------------------
#
# Flash attention takes no mask but the causal one, and every other kernel reads a mask of T x T numbers.
# PyTorch's flex_attention takes a function in place of the mask, and a kernel is compiled from it. The kernel
# skips blocks of 128 x 128 in which no query may see a key. In a packed row these are most of the blocks.


def takes_flex(config, window, input_ids, document_ids, cache, dtype) -> bool:
    """Whether `flex_attention` computes: on CUDA, in half precision, for long rows that need a mask."""
    needs_mask = document_ids is not None or window is not None
    is_long = input_ids.size(1) >= MIN_FLEX_TOKENS
    fits = dtype != torch.float32 and config.head_dim >= 16  # the kernel takes no smaller heads
    if not (input_ids.is_cuda and cache is None and needs_mask and is_long and fits):
        return False
    return torch.compiler.is_compiling() or flex_kernel(input_ids.device) is not None


def flex_mask(window, input_ids, document_ids):
    """What `visible_keys` says of whole rows, as a BlockMask."""
    from torch.nn.attention.flex_attention import create_block_mask  # here: it imports PyTorch's compiler

    def sees(row, head, query, key):
        seen = key <= query
        if window is not None:
            seen = seen & (key > query - window)
        if document_ids is not None:
            seen = seen & (document_ids[row, query] == document_ids[row, key])
        return seen

    batch_size, length = input_ids.shape
    return create_block_mask(sees, batch_size, None, length, length, device=input_ids.device)


def flex_attention(q, k, v, block_mask):
    """q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D), for a mask of `flex_mask`."""
    from torch.nn.attention.flex_attention import flex_attention as compute

    # Within a compiled model PyTorch compiles it with the rest. On a CPU only tests come here.
    if q.is_cuda and not torch.compiler.is_compiling():
        compute = flex_kernel(q.device)
    return compute(q, k, v, block_mask=block_mask, enable_gqa=True)


@functools.cache
def flex_kernel(device: torch.device):
    """PyTorch's flex_attention, compiled for a GPU. None where PyTorch cannot compile: then masks serve."""
    from torch.nn.attention.flex_attention import flex_attention

    try:  # this needs Triton, which Windows has not, and a C compiler
        torch.compile(F.silu)(torch.ones(1, device=device))
    except Exception:
        return None
    # dynamic: rows of all lengths share a kernel. PyTorch gives up on a function after compiling it eight
    # times, and would then compute all T x T scores.
    return torch.compile(flex_attention, dynamic=True)
