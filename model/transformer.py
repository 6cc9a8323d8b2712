"""A decoder-only transformer: token ids in, the logits of the next token out.

For the big picture read from bottom to top: `CausalLM` is a `Decoder` and an output head. A `Decoder` is an
embedding, a stack of `Block`s and a norm. A `Block` is `Attention`, then `FeedForward`, and each of them
adds its result to the hidden state.

Parameters have the same names as in Hugging Face's library transformers. Its classes are LlamaForCausalLM,
Qwen3ForCausalLM (with q/k norms) and Qwen2ForCausalLM (with biases). So a saved model opens anywhere, and
models from elsewhere open here.

Shapes: B batch, T tokens, S keys in sight (T plus what is cached), C width, H heads, K key/value heads,
D head dim, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.device import matmul_dtype
from common.errors import ModelError
from model.attention import attention, make_mask
from model.config import PRESETS, ModelConfig, preset, rope_frequencies
from model.fused import rms_norm
from model.moe import MixtureOfExperts, routing_sums

__all__ = ["PRESETS", "CausalLM", "ModelConfig", "ModelError", "preset"]

LOSS_ROWS = 4096  # tokens that go through the output head at once; bounds the memory of their logits
MAX_KEPT_LOGITS = 2**28  # on a GPU: numbers kept for the backward pass, 1 GB in float32


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight   (Zhang & Sennrich 2019, arXiv:1910.07467)

    This is LayerNorm without subtracting a mean and without a bias. A vector is divided by the root of its
    mean square, and then each of its numbers is multiplied by a learned weight. The computation is in
    float32, whatever the type of x.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def token_positions(input_ids, document_ids=None, cache=None) -> torch.Tensor:
    """The position of each token in its text, (B or 1, T).

        a row of two packed documents   7 7 7 9 9     positions   0 1 2 0 1
        two new tokens, 5 are cached            a b     positions   5 6
        three pads on the left          - - - a b     positions   0 0 0 0 1
    """
    past = cache.length if cache is not None else 0
    positions = torch.arange(past, past + input_ids.size(1), device=input_ids.device)[None]  # (1, T)
    if document_ids is not None:
        # Where a document begins, its position is kept; everywhere else there is 0. The running maximum of
        # these numbers is, for each token, the position at which its own document begins.
        is_new = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))  # (B, T)
        first = torch.where(is_new, positions, 0).cummax(dim=1).values  # (B, T)
        positions = positions - first
    if cache is not None and cache.start is not None:  # the number of pads on the left of each row, (B,)
        positions = (positions - cache.start[:, None]).clamp(min=0)
    return positions


def rope_tables(config: ModelConfig, positions: torch.Tensor, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The cos and the sin for `rotate` (below): positions (B or 1, T) -> two tables (B or 1, T, 1, D).

    Both numbers of a pair are turned by one angle, so each angle is in a table twice: at i and at i + D/2.
    Angles are computed in float32, since bfloat16 cannot represent every position beyond 256, and only the
    tables become `dtype`. The model does not store the tables: model.to(bfloat16) would round them.
    """
    frequency, scale = rope_frequencies(config, positions.device)
    angle = positions[:, :, None, None].float() * frequency  # (B or 1, T, 1, D/2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    After it, the product of a query and a key depends only on the distance between the two tokens.
    The layout is Hugging Face's "rotate half": a pair is (x[i], x[i + D/2]). The paper pairs neighbours.
        x        = [a, b, c, d], D = 4, so the pairs are (a, c), turned by angle t, and (b, d), turned by u
        rotated  = [a cos t - c sin t,  b cos u - d sin u,  c cos t + a sin t,  d cos u + b sin u]
                 = x * [cos t, cos u, cos t, cos u]  +  [c, d, a, b] * [-sin t, -sin u, sin t, sin u]
    """
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(x * cos, swapped, sin)  # x * cos + swapped * sin


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V with grouped queries (GQA: Ainslie et al. 2023, arXiv:2305.13245).

    There are fewer key/value heads than query heads, and neighbouring query heads share one. With H = 4 query
    heads and K = 2 key/value heads:
        query head      0  1  2  3
        key/value head  0  0  1  1
    The formula itself, with the mask and the sharing, is `attention` in model/attention.py.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, bias, eps = config.hidden_size, config.attention_bias, config.rms_norm_eps
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, cache=None):
        into_heads = (*x.shape[:2], -1, self.head_dim)  # (B, T, H or K, D)
        q = self.q_norm(self.q_proj(x).view(into_heads))
        k = self.k_norm(self.k_proj(x).view(into_heads))
        q = rotate(q, *rope).transpose(1, 2)  # (B, H, T, D)
        k = rotate(k, *rope).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(into_heads).transpose(1, 2)  # (B, K, T, D): values are not rotated
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D): with those of all earlier tokens
        y = attention(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)   (Shazeer 2020, arXiv:2002.05202)

    The gate decides, for each of the intermediate_size values of W_up x, how much of it goes on. A usual
    feed-forward layer has two matrices, between the width C and 4 C. Three matrices between C and 8/3 C have
    the same number of weights.
    """

    def __init__(self, width: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + Attention(norm(x)), then x + FeedForward(norm(x)).

    Each part reads a normalised copy of x, and its result is added to x. The path of x itself has no norm
    in it, so gradients come back through many blocks without shrinking.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.has_experts = config.has_experts(layer)
        self.mlp = (MixtureOfExperts(config, FeedForward) if self.has_experts
                    else FeedForward(config.hidden_size, config.intermediate_size))

    def forward(self, x, rope, mask, cache=None):
        """x (B, T, C) -> (B, T, C). A block with experts also returns its router's scores, (B, T, E)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        y = self.mlp(self.post_attention_layernorm(x))
        if self.has_experts:
            y, scores = y
            return x + y, scores
        return x + y


class Decoder(nn.Module):
    """Embedding, blocks, final norm: input_ids (B, T) -> hidden states (B, T, C).

    With experts (model/moe.py) it also returns the scores of the routers, one (B, T, E) for each such layer.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, document_ids=None, cache=None, recompute=False):
        x = self.embed_tokens(input_ids)  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # blocks add small numbers to x, which 16 bits would round away
        # Rotations are the same in every block, and masks in all blocks with the same window: made once each.
        dtype = matmul_dtype(x)
        positions = token_positions(input_ids, document_ids, cache)
        masks = {window: make_mask(self.config, window, input_ids, document_ids, cache, dtype)
                 for window in dict.fromkeys(self.config.windows)}
        rope = (rope_tables(self.config, positions, dtype) if cache is None
                else cache.rope_at(positions, dtype))
        scores = []
        for block, window in zip(self.layers, self.config.windows, strict=True):
            if recompute:
                # use_reentrant=True would train no block whose input needs no gradient. In LoRA
                # (model/lora.py) the embedding is frozen, so the input of the first block needs none.
                x = checkpoint(block, x, rope, masks[window], use_reentrant=False)
            else:
                x = block(x, rope, masks[window], cache)
            if block.has_experts:
                x, of_block = x
                scores.append(of_block)
        if cache is not None:
            cache.length += input_ids.size(1)
        return self.norm(x), scores


@dataclass
class Output:
    """The result of a forward pass. Logits are large, and training does not ask for them, so they are
    computed only on demand."""

    hidden: torch.Tensor  # (B, T, C), after the final norm
    head: nn.Module
    token_losses: torch.Tensor | None = None  # (B, T), see CausalLM.token_losses
    num_targets: torch.Tensor | None = None  # how many tokens have a label
    routing: tuple | None = None  # in training with experts: see routing_sums in model/moe.py

    @property
    def loss(self) -> torch.Tensor | None:
        """The mean over the tokens that have a label, and 0 where none has: a plain mean would be NaN."""
        if self.token_losses is None:
            return None
        return self.token_losses.sum() / self.num_targets.clamp(min=1)

    @property
    def logits(self) -> torch.Tensor:
        """(B, T, V)"""
        # hidden may be in bfloat16 and the head in float32. A head in 8 bits (model/int8.py) has no `weight`.
        weight = getattr(self.head, "weight", None)
        return self.head(self.hidden if weight is None else self.hidden.to(weight.dtype))


class CausalLM(nn.Module):
    """p(token t + 1 | tokens 0..t). Weights start at random; model/weights.py reads and writes them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        # True: blocks keep only their inputs, and run again in the backward pass. Less memory, 1/3 slower.
        self.gradient_checkpointing = False
        self.generation_config = None  # or what generation_config.json says: see model/weights.py
        self.one_token = None  # or a OneToken, a faster forward pass for decoding: see model/one_token.py
        # As in GPT-2: small random numbers (normally distributed), and smaller ones in the matrices whose
        # results are added to x. A sum of n random numbers is about sqrt(n) times as large as one of them,
        # and there are n = 2 * layers such results.
        std = config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds_to_x = name.endswith(("o_proj.weight", "down_proj.weight"))
                divisor = math.sqrt(2 * config.num_hidden_layers) if adds_to_x else 1
                nn.init.normal_(parameter, std=std / divisor)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def tie_weights(self) -> None:
        """Makes embedding and head one Parameter, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids, labels=None, document_ids=None, cache=None) -> Output:
        """input_ids (B, T) -> Output. labels (B, T): tokens to learn, each at its own place; -100 elsewhere.

        document_ids (B, T): packed rows, in which a token sees only earlier tokens with its own id.
        cache: a KVCache (model/generate.py) of the tokens before input_ids, which are appended to it.
        """
        recompute = self.gradient_checkpointing and self.training and cache is None
        hidden, scores = self.model(input_ids, document_ids, cache, recompute)
        if labels is None:
            return Output(hidden, self.lm_head)
        num_targets, routing = (labels[:, 1:] != -100).sum(), None
        if scores and self.training:
            routing = routing_sums(self.config, torch.stack(scores), labels, document_ids)
        return Output(hidden, self.lm_head, self.token_losses(hidden, labels), num_targets, routing)

    def token_losses(self, hidden, labels) -> torch.Tensor:
        """-log p(label), natural logarithm, at the place of each label; 0 where there is none: (B, T).

        The label shift is done here, so that inputs and labels line up in the data. Targets are the labels,
        moved to the left by one. To learn "4 <end>":
            inputs      2     +     2     =     4   <end>
            labels   -100  -100  -100  -100     4   <end>
            targets  -100  -100  -100     4   <end>        the state at "=" must predict 4
        """
        states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # (N, C), (N,)
        # On a CPU only tokens with a label go through the costly head. A GPU would have to tell the CPU first
        # how many there are, and waiting costs more. A compiled model needs shapes that stay the same.
        select = states.device.type == "cpu" and not torch.compiler.is_compiling()
        if select:
            places = (targets != -100).nonzero().squeeze(1)
            states, targets = states[places], targets[places]

        def losses_of(rows, wanted):
            logits = self.lm_head(rows).float()
            return F.cross_entropy(logits, wanted, ignore_index=-100, reduction="none")

        # The backward pass needs the logits. If they are many, it computes those of each chunk once more.
        if not select and len(states) * self.config.vocab_size > MAX_KEPT_LOGITS:
            losses_of = partial(checkpoint, losses_of, use_reentrant=False)
        chunks = zip(states.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        losses = torch.cat([losses_of(rows, wanted) for rows, wanted in chunks])
        if select:
            zeros = losses.new_zeros(labels[:, 1:].numel())
            losses = zeros.index_copy(0, places, losses)  # each loss at its place
        losses = losses.view(labels.size(0), labels.size(1) - 1)  # (B, T - 1)
        return F.pad(losses, (1, 0))  # the first token is never predicted
