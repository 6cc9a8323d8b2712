"""A decoder-only transformer: token ids in, the logits of the next token out.

Read it from bottom to top if you like the big picture first: `CausalLM` = `Decoder` + output head; a `Decoder` is an
embedding, a stack of `Block`s and a norm; a `Block` is `Attention`, then `FeedForward`, each added to the residual stream.

Every parameter carries the name that transformers' LlamaForCausalLM (Qwen3ForCausalLM with q/k norms, Qwen2ForCausalLM
with q/k/v biases) gives it, so a saved model opens anywhere and theirs open here.

Shapes:  B batch, T tokens, S keys visible (T plus what is cached), C width, H heads, K key/value heads, D head dim, V vocab.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SHORT = 512  # rows of up to this many tokens take `short_attention` when a CPU trains on them
LOSS_CHUNK = 4096  # rows projected to the vocabulary at once: bounds the (rows, V) float32 logits


class ModelError(ValueError):
    """A model that can't be built, read or used as asked: one line that says what is wrong and what to do."""


@dataclass
class ModelConfig:
    """The shape of a model, in the names of config.json. Raises ModelError for a shape that can't exist."""

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2  # fewer than heads: a smaller KV cache for almost the same quality
    intermediate_size: int = 1408  # about 8/3 of the width: SwiGLU has three matrices where a plain MLP has two
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qk_norm: bool = False  # RMSNorm on every head's query and key (Qwen3): bounds the logits of attention
    attention_bias: bool = False  # biases on q, k and v, none on the output (Qwen2)
    tie_word_embeddings: bool = True  # one matrix reads and writes tokens: most of a small model's parameters
    rope_theta: float = 1e6
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3" | "yarn", "factor": ...}
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "intermediate_size", "max_position_embeddings")
        for name in sizes:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ModelError(f"{name} must be a positive integer, not {getattr(self, name)!r}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ModelError(f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                                 f"{self.num_attention_heads}; change one, or set head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim < 2 or self.head_dim % 2:
            raise ModelError(f"head_dim must be even (RoPE turns pairs), not {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.qk_norm and self.attention_bias:
            raise ModelError("qk_norm and attention_bias together exist in no standard class; choose one")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ModelError(f"sliding_window must be positive or None, not {self.sliding_window}")
        rope_frequencies(self, "meta")  # raises for rotary settings of an unknown type or with parts missing


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight   (Zhang & Sennrich 2019, arXiv:1910.07467)

    LayerNorm without the mean and the bias: only the length of the vector is standardised.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # Statistics in float32 whatever comes in. Under autocast the result leaves in the type of the matmuls that
        # read it, so that q, k and v (or gate and up) don't each cast the same tensor.
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.weight).to(dtype)


def rope_frequencies(config: ModelConfig, device) -> tuple[torch.Tensor, float]:
    """The angle that each of the D/2 pairs turns per position, and the scale of the rotation (1 except for yarn).

    default: theta^(-2i/D)           linear: positions divided by `factor` (arXiv:2306.15595)
    llama3:  slow pairs divided by `factor`, fast ones kept, a ramp between (arXiv:2407.21783)
    yarn:    the same idea by number of turns in the original context, and a hotter softmax (arXiv:2309.00071)
    """
    dim, theta = config.head_dim, config.rope_theta
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)  # (D/2,)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        if kind == "default":
            return frequency, 1.0
        if kind == "linear":
            return frequency / scaling["factor"], 1.0
        original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind == "llama3":
            factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = original * frequency / (2 * math.pi)  # full turns of each pair within the original context
            keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: too slow, stretch it; 1: fast, leave it
            return frequency * (keep + (1 - keep) / factor), 1.0
        if kind == "yarn":
            factor = scaling.get("factor") or config.max_position_embeddings / original
            pair_of = lambda turns: dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
            low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
            if scaling.get("truncate", True):
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            pairs = torch.arange(dim // 2, dtype=torch.float32, device=device)
            keep = 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
            heat = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
            scale, m, m_all = scaling.get("attention_factor"), scaling.get("mscale"), scaling.get("mscale_all_dim")
            if scale is None:
                scale = heat(m) / heat(m_all) if m and m_all else heat(1)
            return frequency * (keep + (1 - keep) / factor), scale
    except (KeyError, TypeError) as error:
        raise ModelError(f"rope_scaling of type {kind} is incomplete or wrong: {error}") from None
    raise ModelError(f"rope_scaling type {kind!r} is unknown; known are default, linear, llama3, yarn")


def rope_tables(config: ModelConfig, positions: torch.Tensor, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for `rotate`, computed in float32 and cast once. positions (B or 1, T) -> two (B or 1, T, 1, D).

    Recomputed from the config in every forward pass (a few microseconds): a stored buffer would be cast by
    model.to(bfloat16), and positions in bfloat16 are wrong from 257 on.
    """
    frequency, scale = rope_frequencies(config, positions.device)
    angle = positions.unsqueeze(-1).float() * frequency  # (B, T, D/2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos.unsqueeze(2).to(dtype), sin.unsqueeze(2).to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864): q.k then depends on relative distance alone.

    Layout of Hugging Face, "rotate half": pair i is (x[i], x[i + D/2]), not two neighbours as in the paper. With D = 4:
        x = [a, b, c, d]   angles t, u        pairs (a, c) and (b, d)
        rotated = [a cos t - c sin t,  b cos u - d sin u,  c cos t + a sin t,  d cos u + b sin u]
                = x * [cos t, cos u, cos t, cos u] + [c, d, a, b] * [-sin t, -sin u, sin t, sin u]
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class KVCache:
    """Keys and values of the tokens seen so far, preallocated: decoding costs one token a step, not the whole text.

    start (B,): the number of left-pad tokens of each row; positions count from there and nothing attends to the pads.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, device=None, dtype=None, start=None):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.start = start
        self.length = 0  # tokens stored; the Decoder advances it once all layers have appended
        self.max_length = max_length

    def append(self, layer: int, k, v):
        """Stores the new k, v (B, K, T, D) of one layer; returns all its keys and values (B, K, length + T, D)."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def short_attention(q, k, v, bias):
    """Attention as two batched matrix products: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D).

    For training on short rows on a CPU, where the backward pass of F.scaled_dot_product_attention takes three to
    eight times as long. bias (B * K, H / K * T, T) is 0 where a query may look and -inf where not. The query heads
    that share a key/value head lie below each other, as if they were more queries of one head.
    """
    rows = k.size(0) * k.size(1)  # B * K
    q, k, v_rows = q.reshape(rows, -1, q.size(-1)), k.reshape(rows, *k.shape[2:]), v.reshape(rows, *v.shape[2:])
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.size(-1) ** -0.5)  # (B * K, H / K * T, T)
    return (scores.softmax(dim=-1) @ v_rows).view(v.size(0), -1, *v.shape[2:])


def short_bias(config: ModelConfig, mask, batch_size: int, length: int, dtype, device):
    """The mask of `positions_and_mask` as the bias of `short_attention`, made once for all blocks."""
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    bias = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, -math.inf)  # (B or 1, 1, T, T)
    kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    bias = bias[:, :, None].expand(batch_size, kv_heads, group, length, length)
    return bias.reshape(batch_size * kv_heads, group * length, length)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V, with fewer key/value heads than query heads (GQA: Ainslie et al. 2023, arXiv:2305.13245).

    Each group of H/K neighbouring query heads reads one key/value head. With H = 4 and K = 2:
        query head       0  1  2  3
        key/value head   0  0  1  1
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        width, bias, self.head_dim, self.layer = config.hidden_size, config.attention_bias, config.head_dim, layer
        q_width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.grouped = q_width != kv_width
        self.q_proj = nn.Linear(width, q_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, cache=None):
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), *rope).transpose(1, 2)  # (B, H, T, D)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), *rope).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        if mask is not None and mask.is_floating_point():
            y = short_attention(q, k, v, mask)
        else:
            causal = mask is None and x.size(1) > 1  # a single new token may see every key there is
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)   (Shazeer 2020, arXiv:2002.05202): one half decides what of the other passes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + Attention(norm(x)), then x + FeedForward(norm(x)): pre-norm keeps the residual stream a straight line."""

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
    """Where each token stands (B or 1, T), and which keys it may see: bool (B or 1, 1, T, S), or None for "all before".

    Packed documents, ids [7, 7, 7, 9, 9]:  positions [0, 1, 2, 0, 1], and the tokens of 9 see nothing of 7.
    """
    past = cache.length if cache is not None else 0
    index = torch.arange(past, past + input_ids.size(1), device=input_ids.device)  # (T,) of the new tokens
    positions, visible = index[None], None
    if document_ids is not None:
        if cache is not None:
            raise ModelError("document_ids and cache can't be used together: decode documents as separate rows")
        starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
        positions = index - torch.where(starts, index, 0).cummax(dim=1).values  # (B, T)
        visible = document_ids[:, :, None] == document_ids[:, None, :]  # (B, T, T)
    padded = cache is not None and cache.start is not None
    if visible is None and not padded and config.sliding_window is None and (past == 0 or index.size(0) == 1):
        return positions, None

    keys, queries = torch.arange(past + index.size(0), device=index.device), index[:, None]  # (S,), (T, 1)
    causal = keys <= queries  # (T, S)
    if config.sliding_window is not None:
        causal = causal & (keys > queries - config.sliding_window)
    mask = causal[None] if visible is None else causal & visible
    if padded:
        start = cache.start.to(index.device)[:, None]
        positions = (index - start).clamp(min=0)  # (B, T)
        # A pad sees itself, since a softmax over nothing is NaN; nobody else sees it.
        mask = mask & ((keys >= start)[:, None] | (keys == queries))
    return positions, mask[:, None]


class Decoder(nn.Module):
    """Embedding, blocks, final norm: input_ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, input_ids, document_ids=None, cache=None):
        x = self.embed_tokens(input_ids)  # (B, T, C)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        # Once for all blocks: no block rebuilds what every block needs.
        positions, mask = positions_and_mask(self.config, input_ids, document_ids, cache)
        rope = rope_tables(self.config, positions, dtype)
        if device == "cpu" and torch.is_grad_enabled() and cache is None and input_ids.size(1) <= SHORT:
            mask = short_bias(self.config, mask, *input_ids.shape, dtype, x.device)
        for block in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)  # reentrant gives a frozen base no gradients
            else:
                x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += input_ids.size(1)
        return self.norm(x)


@dataclass
class Output:
    """What a forward pass gives. Training never needs the (B, T, V) logits, so they are made when asked for."""

    hidden: torch.Tensor  # (B, T, C), after the final norm
    head: nn.Module
    loss: torch.Tensor | None = None  # mean over the supervised tokens; 0 when there are none
    loss_sum: torch.Tensor | None = None
    num_targets: torch.Tensor | None = None

    @property
    def logits(self):
        return self.head(self.hidden)


class CausalLM(nn.Module):
    """A language model: p(token t+1 | tokens 0..t). New weights are random; model.weights reads and writes them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        # GPT-2's start: small normals, and the two layers that write to the residual stream smaller still, because the
        # sum of 2 * layers of them should not grow with depth.
        std = config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.num_hidden_layers))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def gradient_checkpointing(self) -> bool:
        """True: keep only the inputs of the blocks and compute the rest again in the backward pass (less memory, 1/3 slower)."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool):
        self.model.gradient_checkpointing = value

    def tie_weights(self):
        """Makes the head and the embedding one Parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())  # parameters() names a tied matrix once

    def forward(self, input_ids, labels=None, document_ids=None, cache=None) -> Output:
        """input_ids (B, T) -> Output. labels (B, T): the tokens to learn at their own positions, -100 for the others.

        document_ids (B, T): tokens see only earlier tokens with the same id (packing); None is one document a row.
        cache: a KVCache that holds what came before input_ids, and gets input_ids appended.
        """
        hidden = self.model(input_ids, document_ids, cache)
        if labels is None:
            return Output(hidden, self.lm_head)
        # The label shift happens here, so inputs and labels line up in the data. "2 + 2 = 4 <end>", answer supervised:
        #     inputs       2     +     2     =     4   <end>
        #     labels    -100  -100  -100  -100     4   <end>
        #     targets   -100  -100  -100     4   <end>      (the state at "=" must predict 4; the last predicts nothing)
        states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # (N, C), (N,)
        if states.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = (targets != -100).nonzero().squeeze(-1)  # a CPU can look at the data for free: skip unlearned rows
            states, targets = states[rows], targets[rows]
        loss_sum = states.sum() * 0.0  # a zero with a gradient: a batch without targets trains nothing, and isn't NaN
        for state, target in zip(states.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            loss_sum = loss_sum + F.cross_entropy(self.lm_head(state).float(), target, ignore_index=-100, reduction="sum")
        num_targets = (targets != -100).sum()
        return Output(hidden, self.lm_head, loss_sum / num_targets.clamp(min=1), loss_sum, num_targets)


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                        intermediate_size=384, qk_norm=True, rope_theta=1e4),  # what the quickstart trains on a laptop
    "26m": ModelConfig(),  # exactly 25,829,888 parameters
    "64m": ModelConfig(hidden_size=768, num_key_value_heads=4, intermediate_size=2432, qk_norm=True),
    "104m": ModelConfig(hidden_size=768, num_hidden_layers=16, intermediate_size=2048),
}


def preset(name: str) -> ModelConfig:
    """The ModelConfig of that name; raises ModelError with the names there are."""
    if name not in PRESETS:
        raise ModelError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
