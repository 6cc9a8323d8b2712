"""A decoder-only transformer: token ids in, the logits of the next token out.

For the big picture read from bottom to top: `CausalLM` is a `Decoder` and an output head; a `Decoder` is an
embedding, a stack of `Block`s and a norm; a `Block` is `Attention`, then `FeedForward`, each adding its part.

Parameters carry the names of transformers' LlamaForCausalLM (Qwen3's with q/k norms, Qwen2's with biases),
so that a saved model opens anywhere and theirs open here.

Shapes: B batch, T tokens, S keys in sight (T plus what is cached), C width, H heads, K key/value heads,
D head dim, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

LONGEST_BLOCKED = 1024  # tokens of a row up to which a CPU trains with `block_attention`
BLOCK = 128  # queries that it takes at once
LOSS_CHUNK = 4096  # rows projected to the vocabulary at once: bounds the memory of their float32 logits


class ModelError(ValueError):
    """A model that can't be built, read or used as asked: one line that says what is wrong and what to do."""


@dataclass
class ModelConfig:
    """The shape of a model, in the names of config.json. Raises ModelError for a shape that can't exist."""

    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2  # fewer than heads: a smaller KV cache for almost the same quality
    intermediate_size: int = 1408  # about 8/3 of the width: SwiGLU has three matrices, a plain MLP two
    vocab_size: int = 6400
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qk_norm: bool = False  # RMSNorm on each head's query and key (Qwen3): attention scores can't explode
    attention_bias: bool = False  # biases on q, k and v, none on the output (Qwen2)
    tie_word_embeddings: bool = True  # one matrix reads and writes tokens: it is much of a small model
    rope_theta: float = 1e6
    rope_scaling: dict | None = None  # {"rope_type": "linear", "llama3" or "yarn", "factor": ..., ...}
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it

    def __post_init__(self):
        optional = ("head_dim", "sliding_window")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "intermediate_size", "vocab_size", "max_position_embeddings", *optional):
            if not (name in optional and getattr(self, name) is None):
                check_size(name, getattr(self, name))
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ModelError(f"{name} must be a positive number, not {value!r}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ModelError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                                 f"{self.num_attention_heads}: change one of them, or set head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ModelError(f"head_dim must be even, since RoPE turns pairs; it is {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(f"num_attention_heads {self.num_attention_heads} is no multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.qk_norm and self.attention_bias:
            raise ModelError("no standard class has both qk_norm and attention_bias: choose one")
        if not isinstance(self.rope_scaling, dict | None):
            raise ModelError(f"rope_scaling must be an object or null, not {self.rope_scaling!r}")
        frequency, scale = rope_frequencies(self, "cpu")  # raises for what is unknown or incomplete
        if not isinstance(scale, (int, float)) or not frequency.mul(scale).isfinite().all():
            raise ModelError(f"rope_scaling gives angles that are no numbers: {self.rope_scaling}")


def check_size(name: str, value: int) -> None:
    """Raises ModelError for a number that can't be that size of a model. The limits are far above any model
    there is: a config.json that claims more is nonsense, which even shapes without memory would choke on."""
    limit = {"num_hidden_layers": 10_000, "head_dim": 2**16}.get(name, 2**31)
    if not isinstance(value, int) or not 0 < value < limit:
        raise ModelError(f"{name} must be a positive integer below {limit:,}, not {value!r}")


def count_parameters(model: nn.Module) -> int:
    """Weights of the model, a tied matrix once. In 4 bits they are packed: those layers tell the rest."""
    packed = sum(getattr(module, "packed", 0) for module in model.modules())
    return sum(parameter.numel() for parameter in model.parameters()) + packed


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The type that matrix products of x come out in: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Normalise(torch.autograd.Function):
    """RMSNorm with its backward written out, which passes over memory half as often as autograd's would.

    With r = 1 / sqrt(mean(x^2) + eps) and n = x r:    y = n w
        dy/dw: the sum over all vectors of g n         dy/dx: r (g w - n mean(g w n)), g being dL/dy
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        x = x.float()
        r = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.size(-1) + eps)
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return (n * weight).to(dtype)

    @staticmethod
    def backward(ctx, g):
        n, r, weight = ctx.saved_tensors
        g = g.float()
        gn = g * n
        g_weight = gn.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = (gn @ weight.float() / n.size(-1)).unsqueeze(-1)
        return torch.addcmul(g * weight, n, mean, value=-1).mul_(r), g_weight, None, None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight   (Zhang & Sennrich 2019, arXiv:1910.07467)

    LayerNorm without the mean and the bias: only the length of a vector is standardised, its direction stays.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # In float32 whatever comes in. Under autocast the result leaves in the type of the matmuls that read
        # it: one cast here instead of one each in q, k and v.
        dtype = matmul_dtype(x)
        if not torch.is_grad_enabled():
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(dtype)
        return Normalise.apply(x, self.weight, self.eps, dtype)


def rope_frequencies(config: ModelConfig, device) -> tuple[torch.Tensor, float]:
    """The angle (D/2,) that each pair turns per position, and the scale of cos and sin (1 except for yarn).

    default  theta^(-2i/D): the first pairs turn fast and tell neighbours apart, the last ones tell chapters
    linear   positions divided by `factor`, to reach further than the training did (arXiv:2306.15595)
    llama3   only the slow pairs divided, the fast ones kept, a ramp between (arXiv:2407.21783)
    yarn     the same idea with another ramp, and sharper attention to make up for it (arXiv:2309.00071)
    """
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling or {}
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return frequency, 1.0
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    try:
        if kind == "linear":
            return frequency / scaling["factor"], 1.0
        if kind == "llama3":
            factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
            turns = original * frequency / (2 * math.pi)  # turns of each pair in the original context
            keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, stretched; 1: fast, left alone
            return frequency * (keep + (1 - keep) / factor), 1.0
        if kind == "yarn":
            factor = scaling.get("factor") or config.max_position_embeddings / original

            def pair_that_turns(times):
                return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

            def sharpness(mscale):
                return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

            low = pair_that_turns(scaling.get("beta_fast") or 32)
            high = pair_that_turns(scaling.get("beta_slow") or 1)
            if scaling.get("truncate", True):
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            pair = torch.arange(dim // 2, dtype=torch.float32, device=device)
            keep = 1 - ((pair - low) / (high - low or 0.001)).clamp(0, 1)
            scale, m, m_all = (scaling.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
            if scale is None:
                scale = sharpness(m) / sharpness(m_all) if m and m_all else sharpness(1)
            return frequency * (keep + (1 - keep) / factor), scale
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"rope_scaling of type {kind} is incomplete or wrong: {error}") from None
    raise ModelError(f"unknown rope_scaling type {kind!r}; known are default, linear, llama3 and yarn")


def rope_tables(config: ModelConfig, positions: torch.Tensor, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin for `rotate`: positions (B or 1, T) -> two tables (B or 1, T, 1, D).

    Made anew in every forward pass, or once for a KVCache: a buffer of the model would be cast by
    model.to(bfloat16), and bfloat16 can't even count positions beyond 256.
    """
    frequency, scale = rope_frequencies(config, positions.device)
    angle = positions[:, :, None, None].float() * frequency  # (B or 1, T, 1, D/2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864): q.k comes to depend on distance only.

    The layout is Hugging Face's "rotate half": a pair is (x[i], x[i + D/2]), the paper takes neighbours.
        x        = [a, b, c, d], D = 4, so the pairs are (a, c), turned by angle t, and (b, d), turned by u
        rotated  = [a cos t - c sin t,  b cos u - d sin u,  c cos t + a sin t,  d cos u + b sin u]
                 = x * [cos t, cos u, cos t, cos u]  +  [c, d, a, b] * [-sin t, -sin u, sin t, sin u]
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


class KVCache:
    """Keys and values of the tokens so far, preallocated: a new token costs its own work, not the text's.

    start (B,): the number of left-pad tokens of each row; positions count from there, and pads stay unseen.
    rope: the tables of `rope_tables` for all positions, (max_length, 1, D) each.
    """

    def __init__(self, config: ModelConfig, batch_size, max_length, device=None, dtype=None, start=None):
        layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch_size, kv_heads, max_length, config.head_dim)
        positions = torch.arange(max_length, device=device)[None]
        self.rope = [table[0] for table in rope_tables(config, positions, torch.float32)]
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.start, self.max_length = start, max_length
        self.length = 0  # tokens stored; the Decoder moves it on once every layer has appended

    def append(self, layer: int, k, v):
        """Stores new k, v (B, K, T, D) of one layer; returns all keys and values it has now (B, K, S, D)."""
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length:end], self.v[layer][:, :, self.length:end] = k, v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


def block_attention(q, k, v, blocks):
    """Attention as batched matmuls, BLOCK queries at a time: q (B, H, T, D), k and v (B, K, T, D).

    For training in half precision on a CPU, where PyTorch's own takes 2 to 3 times as long. A block meets
    only keys that it may see (`blocks`, of `visible_blocks`): causality alone spares almost half the pairs.
    Query heads that share a key/value head are stacked, as if one head had more queries.
    """
    q = q.reshape(k.size(0) * k.size(1), -1, *q.shape[2:])  # (B * K, H / K, T, D)
    k, values = k.flatten(0, 1), v.flatten(0, 1)  # (B * K, T, D)
    parts = []
    for part, (keys, bias) in zip(q.split(BLOCK, dim=2), blocks, strict=True):  # part: (B * K, H / K, n, D)
        queries, scale = part.flatten(1, 2), q.size(-1) ** -0.5
        scores = torch.baddbmm(bias, queries, k[:, keys].mT, alpha=scale)  # (B * K, H / K * n, S)
        parts.append((scores.softmax(dim=-1) @ values[:, keys]).view(part.shape))
    return torch.cat(parts, dim=2).view(v.size(0), -1, *q.shape[2:])  # (B, H, T, D)


def visible_blocks(config: ModelConfig, mask, batch_size: int, length: int, dtype, device):
    """The mask of `positions_and_mask` for `block_attention`. Of each block of n queries: the slice of S keys
    that any of them may see, and a bias (B * K, H / K * n, S), 0 where a query may look, -inf elsewhere."""
    kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    blocks = []
    for begin in range(0, length, BLOCK):
        seen = slice(0, begin + BLOCK)
        queries = mask[:, :, begin:begin + BLOCK]  # (B or 1, 1, n, T)
        if not torch.compiler.is_compiling():  # sizes that depend on values would break its graph
            seen = slice(queries.any(dim=2).any(dim=0).nonzero()[0, 1].item(), begin + BLOCK)
        hidden = ~queries[:, :, None, :, seen]  # (B or 1, 1, 1, n, S)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, -math.inf)
        bias = bias.expand(batch_size, kv_heads, group, -1, -1)
        blocks.append((seen, bias.reshape(batch_size * kv_heads, -1, bias.size(-1))))
    return blocks


def one_block(config: ModelConfig, mask, dtype):
    """What `visible_blocks` gives, for one new token over a cache: there, too, a CPU is faster in batches and
    with long texts. mask: bool (B or 1, 1, 1, S), or None where all may be seen."""
    if mask is None:
        return [(slice(None), torch.zeros(1, 1, 1, dtype=dtype))]
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)[:, 0]  # (B or 1, 1, S)
    rows = config.num_key_value_heads if len(mask) > 1 else 1
    return [(slice(None), bias.repeat_interleave(rows, dim=0))]


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V with grouped queries (GQA: Ainslie et al. 2023, arXiv:2305.13245).

    H / K neighbouring query heads share one key/value head. With H = 4 and K = 2:
        query head      0  1  2  3
        key/value head  0  0  1  1
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.grouped = config.num_key_value_heads < config.num_attention_heads
        width, bias, eps = config.hidden_size, config.attention_bias, config.rms_norm_eps
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, cache=None):
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), *rope).transpose(1, 2)  # (B, H, T, D)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), *rope).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        if isinstance(mask, list):
            y = block_attention(q, k, v, mask)
        else:
            causal = mask is None and x.size(1) > 1  # a single new token may see every key there is
            grouped = self.grouped
            if grouped and x.is_cuda and (mask is not None or q.dtype == torch.float32):
                # Only CUDA's flash attention knows groups, in half precision and without a mask; with them
                # everything else would write all the scores out.
                k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
                grouped = False
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)   (Shazeer 2020, arXiv:2002.05202): one gates the other."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + Attention(norm(x)), then x + FeedForward(norm(x)): the norms stand aside, so x flows on."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x, rope, mask, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def positions_and_mask(config: ModelConfig, input_ids, document_ids=None, cache=None):
    """Where each token stands (B or 1, T), and what it sees: bool (B or 1, 1, T, S), or None: all before it.

    Packed documents [7, 7, 7, 9, 9] stand at [0, 1, 2, 0, 1], and the tokens of 9 see nothing of 7.
    """
    if document_ids is not None and cache is not None:
        raise ModelError("document_ids and a cache don't go together: give each document a row")
    past = cache.length if cache is not None else 0
    pads = cache.start if cache is not None else None
    if cache is not None and (end := past + input_ids.size(1)) > cache.max_length:
        raise ModelError(f"the KV cache holds {cache.max_length} tokens, too few for {end}")
    queries = torch.arange(past, past + input_ids.size(1), device=input_ids.device)  # (T,)
    positions = queries[None]
    in_order = past == 0 or queries.size(0) == 1  # SDPA's is_causal takes the first query for the first key's
    if document_ids is None and pads is None and config.sliding_window is None and in_order:
        return positions, None

    keys, queries = torch.arange(past + queries.size(0), device=queries.device), queries[:, None]
    mask = (keys <= queries)[None]  # (1, T, S)
    if config.sliding_window is not None:
        mask = mask & (keys > queries - config.sliding_window)
    if document_ids is not None:
        begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
        positions = positions - torch.where(begins, positions, 0).cummax(dim=1).values  # (B, T)
        mask = mask & (document_ids[:, :, None] == document_ids[:, None, :])  # (B, T, T)
    if pads is not None:
        pads = pads[:, None]
        positions = (positions - pads).clamp(min=0)  # (B, T)
        # A pad sees itself, because a softmax over nothing is NaN.
        mask = mask & ((keys >= pads)[:, None] | (keys == queries))  # (B, T, S)
    return positions, mask[:, None]


class Decoder(nn.Module):
    """Embedding, blocks, final norm: input_ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, document_ids=None, cache=None, recompute=False):
        x = self.embed_tokens(input_ids)  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # a frozen embedding may be in half precision; the sum that blocks add to never is
        # Rotation and mask are made here, once for all blocks.
        positions, mask = positions_and_mask(self.config, input_ids, document_ids, cache)
        dtype = matmul_dtype(x)
        if cache is None:
            rope = rope_tables(self.config, positions, dtype)
        else:
            rope = [table[positions].to(dtype) for table in cache.rope]  # (B or 1, T, 1, D) each
        half_on_cpu = x.device.type == "cpu" and dtype != torch.float32
        short = input_ids.size(1) <= LONGEST_BLOCKED
        if half_on_cpu and torch.is_grad_enabled() and cache is None and short:
            mask = visible_blocks(self.config, mask, *input_ids.shape, dtype, x.device)
        elif x.device.type == "cpu" and cache is not None and input_ids.size(1) == 1:
            mask = one_block(self.config, mask, dtype)
        for block in self.layers:
            if recompute:  # not reentrant: that gives adapters over a frozen embedding no gradient
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += input_ids.size(1)
        return self.norm(x)


@dataclass
class Output:
    """What a forward pass gives. The loss never needs all the logits, so they are made when asked for."""

    hidden: torch.Tensor  # (B, T, C), after the final norm
    head: nn.Module
    loss: torch.Tensor | None = None  # mean over the supervised tokens, 0 where there are none
    loss_sum: torch.Tensor | None = None
    num_targets: torch.Tensor | None = None

    @property
    def logits(self) -> torch.Tensor:
        """(B, T, V)"""
        dtype = getattr(self.head, "weight", self.hidden).dtype  # a head in 8 bits takes any
        return self.head(self.hidden.to(dtype))  # asked for outside of autocast, perhaps


class CausalLM(nn.Module):
    """p(token t + 1 | tokens 0..t). Weights start at random; model.weights reads and writes them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.gradient_checkpointing = False  # True: blocks run twice, 1/3 slower, and keep only their inputs
        self.one_token = None  # a faster forward for decoding: see model/one_token.py
        # As in GPT-2: small normals, and smaller where a layer writes to the residual stream, for the sum of
        # 2 * layers writes should not grow with depth.
        std = config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=std / math.sqrt(2 * len(self.model.layers)) if writes else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def tie_weights(self) -> None:
        """Makes embedding and head one Parameter where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def num_parameters(self) -> int:
        return count_parameters(self)

    def forward(self, input_ids, labels=None, document_ids=None, cache=None) -> Output:
        """input_ids (B, T) -> Output. labels (B, T): tokens to learn, each at its own place; -100 elsewhere.

        document_ids (B, T): packed rows, where a token sees only earlier tokens of its own id.
        cache: a KVCache with what came before input_ids; they are appended to it.
        """
        recompute = self.gradient_checkpointing and self.training and cache is None
        hidden = self.model(input_ids, document_ids, cache, recompute)
        if labels is None:
            return Output(hidden, self.lm_head)
        # The label shift is done here, so that inputs and labels line up in the data. To learn "4 <end>":
        #     inputs      2     +     2     =     4   <end>
        #     labels   -100  -100  -100  -100     4   <end>
        #     targets  -100  -100  -100     4   <end>        the state at "=" must predict 4
        states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # (N, C), (N,)
        if states.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = (targets != -100).nonzero().squeeze(1)  # spares the costly head; a GPU would have to wait
            states, targets = states[rows], targets[rows]
        # With no target this sums nothing: a loss of 0 and gradients of 0, where a mean would be 0/0.
        chunks = zip(states.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        loss_sum = sum(F.cross_entropy(self.lm_head(rows).float(), wanted, ignore_index=-100, reduction="sum")
                       for rows, wanted in chunks)
        num_targets = (targets != -100).sum()
        return Output(hidden, self.lm_head, loss_sum / num_targets.clamp(min=1), loss_sum, num_targets)


PRESETS: dict[str, ModelConfig] = {
    # Few wide heads: after the quickstart two of 64 answer 93.6 % of 1,956 questions, four of 32 92.5, eight
    # of 16 85.7 (one run each).
    "tiny": ModelConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
                        intermediate_size=384, qk_norm=True, rope_theta=1e4),  # what the quickstart trains
    "26m": ModelConfig(),  # exactly 25,829,888 parameters
    "64m": ModelConfig(hidden_size=768, num_key_value_heads=4, intermediate_size=2432, qk_norm=True),
    "104m": ModelConfig(hidden_size=768, num_hidden_layers=16, intermediate_size=2048),
}


def preset(name: str) -> ModelConfig:
    """The ModelConfig of that name. Raises ModelError with the names there are."""
    if name not in PRESETS:
        raise ModelError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
