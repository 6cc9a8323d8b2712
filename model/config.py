"""The shape of a model: `ModelConfig` and the presets; and the scaling of rotary positions."""

import math
from dataclasses import InitVar, dataclass, replace

import torch

from common.errors import ModelError
from model.attention import SLIDING, layer_kinds
from model.moe import check_experts


@dataclass
class ModelConfig:
    """The shape of a model, in the names of config.json. Raises ModelError for a shape that cannot exist."""

    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2  # query heads share a key/value head: decoding needs less memory
    intermediate_size: int = 1408  # about 8/3 of hidden_size: see FeedForward in model/transformer.py
    vocab_size: int = 6400
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qk_norm: bool = False  # RMSNorm on each head's query and key (Qwen3): attention scores stay small
    attention_bias: bool = False  # biases on q, k and v, but not on the output (Qwen2)
    tie_word_embeddings: bool = True  # embedding and output head are one matrix: a small model saves much
    rope_theta: float = 1e6
    rope_scaling: dict | None = None  # {"rope_type": "linear", "llama3" or "yarn", "factor": ..., ...}
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    layer_types: list[str] | None = None  # which layers have the window (model/attention.py); None: all
    full_attention_every: InitVar[int | None] = None  # K instead of layer_types: all layers but every K-th
    # A mixture of experts (model/moe.py) in the place of the feed-forward layer; 0 experts: none
    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int | None = None  # None: an expert is as large as intermediate_size says
    norm_topk_prob: bool = False  # what the chosen experts count adds up to 1
    mlp_only_layers: tuple[int, ...] = ()  # the layers without experts, counted from 0
    router_aux_loss_coef: float = 0.01  # the weight of the loss that keeps experts equally busy
    router_z_loss_coef: float = 0.001  # the weight of the loss that keeps the router's scores small

    def __post_init__(self, full_attention_every):
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "intermediate_size", "vocab_size", "max_position_embeddings", "num_experts_per_tok",
                     "expert_size"):
            check_size(name, getattr(self, name))
        for name in ("head_dim", "sliding_window"):
            if getattr(self, name) is not None:
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
            raise ModelError(f"head_dim must be even, since RoPE rotates pairs; it is {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(f"num_attention_heads {self.num_attention_heads} is no multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.qk_norm and self.attention_bias:
            raise ModelError("qk_norm and attention_bias: Hugging Face has no class with both; choose one")
        if full_attention_every is not None or self.layer_types is not None:
            self.sliding_window, self.layer_types = layer_kinds(self, full_attention_every)
        if self.num_experts:
            self.mlp_only_layers = tuple(self.mlp_only_layers)
            check_experts(self)
        if not isinstance(self.rope_scaling, dict | None):
            raise ModelError(f"rope_scaling must be an object or null, not {self.rope_scaling!r}")
        frequency, scale = rope_frequencies(self, "cpu")  # raises for unknown or incomplete settings
        if not (isinstance(scale, (int, float)) and frequency.mul(scale).log().isfinite().all()):
            raise ModelError(f"rope_scaling gives angles that are no positive numbers: {self.rope_scaling}")

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer; None where a token sees all tokens before it."""
        kinds = self.layer_types or [SLIDING] * self.num_hidden_layers
        return [self.sliding_window if kind == SLIDING else None for kind in kinds]

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.mlp_only_layers

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size


def check_size(name: str, value: int) -> None:
    """Raises ModelError unless `value` is a possible value of the field `name`, such as hidden_size.

    The limits are far above every model there is. A config.json that exceeds them is damaged or hostile. It
    is refused here, before memory is taken for it.
    """
    limit = {"num_hidden_layers": 10_000, "head_dim": 2**16}.get(name, 2**31)
    if not isinstance(value, int) or not 0 < value < limit:
        raise ModelError(f"{name} must be a positive integer below {limit:,}, not {value!r}")


def rope_frequencies(config: ModelConfig, device) -> tuple[torch.Tensor, float]:
    """The angles of rotary position embedding (RoPE, see `rotate` in model/transformer.py).

    RoPE rotates pairs of numbers in each head. With D = head_dim there are D/2 pairs. This function returns
    the angle of each pair for one step of position, (D/2,), and a factor for cos and sin, 1 except for yarn.

    default  theta^(-2i/D) for pair i: the first pairs turn fast, the last ones very slowly, so that small
             distances can be recognised, and large ones too
    linear   all angles divided by `factor`, to reach further than the training did (arXiv:2306.15595)
    llama3   the angles of slow pairs are divided, those of fast pairs are kept, and between slow and fast the
             divisor falls gradually to 1 (arXiv:2407.21783)
    yarn     like llama3, but slow and fast are defined in another way. cos and sin are also multiplied by a
             factor above 1, which makes attention scores larger (arXiv:2309.00071)

    Raises ModelError for unknown or incomplete settings.
    """
    theta, scaling = config.rope_theta, config.rope_scaling or {}
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / theta**exponent
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return frequency, 1.0
    original_length = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    try:
        if kind == "linear":
            return frequency / scaling["factor"], 1.0
        if kind == "llama3":
            factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
            turns = original_length * frequency / (2 * math.pi)  # how often a pair turns in that length
            kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0 for slow pairs, 1 for fast pairs
            return frequency * (kept + (1 - kept) / factor), 1.0
        if kind == "yarn":
            return yarn_frequencies(config, frequency, original_length)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"rope_scaling of type {kind} is incomplete or wrong: {error}") from None
    raise ModelError(f"unknown rope_scaling type {kind!r}; known are default, linear, llama3 and yarn")


def yarn_frequencies(config: ModelConfig, frequency, original_length) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): the same two results as rope_frequencies.

    A pair that turns more than beta_fast times within the original length keeps its angle. A pair that turns
    less than beta_slow times has its angle divided by `factor`. The angles of the pairs between go gradually
    from the one to the other.
    """
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    factor = scaling.get("factor") or config.max_position_embeddings / original_length

    # Pair i turns by theta^(-2i/D) at each position, which is original_length * theta^(-2i/D) / (2 pi) whole
    # turns within the original length. The function solves "whole turns = times" for i.
    def pair_that_turns(times):
        return dim * math.log(original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    # In the paper weight is 1. DeepSeek's models set two weights, mscale and mscale_all_dim. cos and sin then
    # get the quotient of the two factors, as in the library transformers.
    def score_factor(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    # Pairs up to `first` keep their angle, pairs from `last` on have it divided.
    first = pair_that_turns(scaling.get("beta_fast") or 32)
    last = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)  # dim and not dim / 2, as in the authors' code
    if first == last:
        last += 0.001  # against a division by zero
    pair = torch.arange(dim // 2, dtype=torch.float32, device=frequency.device)
    kept = 1 - ((pair - first) / (last - first)).clamp(0, 1)
    scale, mscale, mscale_all = (scaling.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if scale is None and mscale and mscale_all:
        scale = score_factor(mscale) / score_factor(mscale_all)
    elif scale is None:
        scale = score_factor(1)
    return frequency * (kept + (1 - kept) / factor), scale


PRESETS: dict[str, ModelConfig] = {
    # A third of tiny's parameters, for tiny's student in train_distillation.py. Three quarters of them are in
    # the embedding. After 500 of 800 steps of SFT the loss was 0.65. With heads as wide as tiny's, and in
    # return an intermediate_size of 128, it was 0.71 (one run each).
    "micro": ModelConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=192, qk_norm=True, rope_theta=1e4),
    # Two wide heads, and not more: the model that scripts/quickstart.sh trains answered 93.6 % of 1,956 test
    # questions with two heads of 64, 92.5 % with four of 32, and 85.7 % with eight of 16 (one run each).
    "tiny": ModelConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
                        intermediate_size=384, qk_norm=True, rope_theta=1e4),  # the quickstart's model
    "26m": ModelConfig(),  # exactly 25,829,888 parameters
    "64m": ModelConfig(hidden_size=768, num_key_value_heads=4, intermediate_size=2432, qk_norm=True),
    "104m": ModelConfig(hidden_size=768, num_hidden_layers=16, intermediate_size=2048),
}
# With experts: as many parameters as tiny and 64m in what one token uses, but more in all. tiny learned more
# with two experts of half the size for each token than with one of the whole size (docs/experts.md).
PRESETS |= {"tiny-moe": replace(PRESETS["tiny"], num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
                                moe_intermediate_size=192),
            "198m-a64m": replace(PRESETS["64m"], num_experts=4)}


def preset(name: str) -> ModelConfig:
    """The ModelConfig of that name. Raises ModelError, with the names there are, for an unknown one."""
    if name not in PRESETS:
        raise ModelError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
