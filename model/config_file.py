"""config.json <-> ModelConfig. A reader may skip this file.

    config = config_from_dict(read_json(Path("out/full_sft/config.json")))
    raw = config_to_dict(config)  # in the terms of the standard class that computes the same

People edit config.json by hand, and other programs write it in their own way. So the type of every value that
is read here is checked first: "use_sliding_window": "false" would otherwise switch the window on, since a
text that is not empty counts as true.
"""

from dataclasses import asdict

from common.errors import ModelError
from model.attention import FULL, KINDS, SLIDING
from model.config import ModelConfig, check_size
from model.moe import SETTINGS as EXPERT_SETTINGS

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "MinistralForCausalLM", "Qwen2ForCausalLM",
                 "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM")
# What the classes of transformers take where a config.json does not name it
DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6}
DEFAULTS_OF_MIXTRAL = {"rope_theta": 1e6, "rms_norm_eps": 1e-5}
MODEL_TYPES = {"Qwen3Moe": "qwen3_moe"}  # where model_type is not the name of the class in small letters


def is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_list_of(is_right, value) -> bool:
    return isinstance(value, list) and all(map(is_right, value))


# What a value must be -> (whether it is that, the keys of config.json and of its rotary settings). null is
# always allowed here: it stands for a setting that is not made.
TYPES = {
    "a whole number": (is_integer, (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size "
        "head_dim max_position_embeddings sliding_window max_window_layers num_experts num_local_experts "
        "num_experts_per_tok moe_intermediate_size decoder_sparse_step bos_token_id pad_token_id "
        "original_max_position_embeddings")),
    "a number": (lambda value: is_integer(value) or isinstance(value, float), (
        "rms_norm_eps initializer_range rope_theta partial_rotary_factor router_aux_loss_coef "
        "router_z_loss_coef router_jitter_noise factor low_freq_factor high_freq_factor beta_fast beta_slow "
        "attention_factor mscale mscale_all_dim")),
    "true or false": (lambda value: isinstance(value, bool), (
        "tie_word_embeddings attention_bias mlp_bias use_sliding_window norm_topk_prob truncate")),
    "a text": (lambda value: isinstance(value, str), "hidden_act rope_type type"),
    "an object": (lambda value: isinstance(value, dict), "rope_scaling rope_parameters quantization_config"),
    "a list of texts": (lambda value: is_list_of(lambda item: isinstance(item, str), value), "architectures"),
    "a list of whole numbers": (lambda value: is_list_of(is_integer, value), "mlp_only_layers"),
    "a whole number or a list of them": (
        lambda value: is_integer(value) or is_list_of(is_integer, value), "eos_token_id"),
    f"a list of {' and '.join(KINDS)}": (
        lambda value: is_list_of(lambda item: item in KINDS, value), "layer_types"),
}


def check_types(raw: dict) -> None:
    """Raises ModelError for the first value of a config.json that is of another type than its key needs."""
    for says, (is_right, names) in TYPES.items():
        for name in names.split():
            if raw.get(name) is not None and not is_right(raw[name]):
                raise ModelError(f"{name} must be {says}, not {raw[name]!r:.100}")


def config_from_dict(raw: dict) -> ModelConfig:
    """The ModelConfig of a config.json. Raises ModelError for whatever our model cannot compute."""
    check_types({"architectures": raw.get("architectures")})
    architecture = (raw.get("architectures") or ["none named"])[0]
    if architecture not in ARCHITECTURES:
        raise ModelError(f"can't read architecture {architecture}, only {', '.join(ARCHITECTURES)}")
    check_types(raw)  # not before: in other architectures the same keys may hold something else
    family = architecture.removesuffix("ForCausalLM")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for name in sizes:
        if name not in raw:
            raise ModelError(f"{name} is missing")
        check_size(name, raw[name])  # before anything of that size is made
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {raw['hidden_act']!r} is not supported, only silu")
    if raw.get("mlp_bias") or (family in ("Llama", "Qwen3", "Qwen3Moe") and raw.get("attention_bias")):
        raise ModelError("biases on the output projections are not supported")
    quantized = raw.get("quantization_config") or {}
    if quantized and quantized.get("bnb_4bit_quant_type", quantized.get("quant_method")) != "nf4":
        raise ModelError("of quantized weights only bitsandbytes' NF4 is read; use the unquantized model")

    # transformers 5 writes rope_parameters alone. Older versions write rope_theta and rope_scaling.
    parameters, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for name in parameters.keys() & scaling.keys():
        is_added = name == "rope_type" and parameters[name] == "default"  # a scaling, added by hand
        if parameters[name] != scaling[name] and not is_added:
            raise ModelError(f"rope_parameters and rope_scaling differ in {name}: keep one of the two")
    rope = parameters | scaling
    check_types(rope)
    default = DEFAULTS_OF_MIXTRAL if family == "Mixtral" else DEFAULTS
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or default["rope_theta"]
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError("rotary settings that differ between layers are not supported")
    if (rope.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial_rotary_factor is not supported")
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", "default")
    original_length = raw.get("original_max_position_embeddings")
    if rope["rope_type"] in ("llama3", "yarn") and original_length:  # beside rope_scaling, as Phi-3 has it
        rope["original_max_position_embeddings"] = original_length

    window, layer_types = _windows(raw, family)
    # A missing key has the default of its class, such as Qwen3's head_dim and Mistral's window.
    return ModelConfig(
        **{name: raw[name] for name in sizes},
        num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim", 128 if family == "Qwen3" else None),
        qk_norm=family in ("Qwen3", "Qwen3Moe"),
        attention_bias=family == "Qwen2", tie_word_embeddings=raw.get("tie_word_embeddings", False),
        rope_theta=float(theta), rope_scaling=None if rope["rope_type"] == "default" else rope,
        rms_norm_eps=raw.get("rms_norm_eps", default["rms_norm_eps"]),
        initializer_range=raw.get("initializer_range", 0.02),
        max_position_embeddings=raw.get("max_position_embeddings", 32768),
        sliding_window=window, layer_types=layer_types, **_experts(raw, family))


def _experts(raw: dict, family: str) -> dict:
    """The settings of the experts; none for a family without them, or for a model that has 0 experts."""
    # transformers 5 writes num_local_experts for all families.
    num_experts = raw.get("num_local_experts", raw.get("num_experts"))
    if family not in ("Qwen3Moe", "Mixtral") or num_experts == 0:
        return {}
    if raw.get("router_jitter_noise"):
        raise ModelError("router_jitter_noise, noise on what the router reads, is not supported")
    is_mixtral = family == "Mixtral"
    names = ("num_experts_per_tok",) if is_mixtral else ("num_experts_per_tok", "moe_intermediate_size")
    for name, value in (("num_experts", num_experts), *((name, raw.get(name)) for name in names)):
        check_size(name, value)
    step, without = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    check_size("decoder_sparse_step", step)
    return {"num_experts": num_experts, "num_experts_per_tok": raw["num_experts_per_tok"],
            "moe_intermediate_size": raw["intermediate_size" if is_mixtral else "moe_intermediate_size"],
            "norm_topk_prob": is_mixtral or bool(raw.get("norm_topk_prob")),
            "mlp_only_layers": [i for i in range(raw["num_hidden_layers"]) if i in without or (i + 1) % step],
            "router_aux_loss_coef": raw.get("router_aux_loss_coef", 0.001),
            "router_z_loss_coef": raw.get("router_z_loss_coef", 0.0)}  # a setting of our own


def _windows(raw: dict, family: str) -> tuple[int | None, list[str] | None]:
    """(sliding_window, layer_types). Qwen has a switch for the window, and may name its first layers without.

    Raises ModelError for a Mistral with layers of two kinds: transformers' class has the window in all. So
    have those of Mixtral and Qwen3Moe, which do not read layer_types.
    """
    kinds, layers = raw.get("layer_types"), raw["num_hidden_layers"]
    if kinds and len(kinds) != layers:
        raise ModelError(f"layer_types names the kinds of {len(kinds)} layers, but there are {layers} layers")
    if family == "Llama" or (family.startswith("Qwen") and not raw.get("use_sliding_window")):
        return None, None
    if family == "Mistral" and len(set(kinds or [])) > 1:
        raise ModelError("layer_types of two kinds: the architecture for them is MinistralForCausalLM")
    if family in ("Qwen2", "Qwen3") and not kinds:
        first = raw.get("max_window_layers")
        first = min(28 if first is None else first, layers)
        kinds = [FULL] * first + [SLIDING] * (layers - first)
    window = raw.get("sliding_window", None if family == "Mixtral" else 4096)
    return window, None if window is None or family in ("Mistral", "Mixtral", "Qwen3Moe") else kinds


def config_to_dict(config: ModelConfig) -> dict:
    """config.json in the terms of the standard class that computes the same, with RoPE in both spellings."""
    unknown = ("qk_norm", "attention_bias", *(() if config.num_experts else EXPERT_SETTINGS))
    raw = {key: value for key, value in asdict(config).items() if key not in unknown}
    window = raw["sliding_window"]
    if config.num_experts and config.qk_norm:
        family = "Qwen3Moe"
        raw |= {"num_local_experts": config.num_experts, "decoder_sparse_step": 1,
                "moe_intermediate_size": config.expert_size,
                "use_sliding_window": window is not None, "mlp_only_layers": list(config.mlp_only_layers)}
    elif config.num_experts:
        family = "Mixtral"
        raw = {key: value for key, value in raw.items() if key not in EXPERT_SETTINGS}
        raw |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok,
                "intermediate_size": config.expert_size,
                "router_aux_loss_coef": config.router_aux_loss_coef,
                "router_z_loss_coef": config.router_z_loss_coef}
    elif config.qk_norm or config.attention_bias:
        family = "Qwen3" if config.qk_norm else "Qwen2"
        raw["use_sliding_window"] = window is not None
        raw["max_window_layers"] = config.num_hidden_layers if window is None else 0  # the layers without it
    elif window is not None:
        family = "Ministral" if config.layer_types else "Mistral"
    else:
        family = "Llama"
        raw.pop("sliding_window")
    if not config.layer_types:
        raw.pop("layer_types")  # all layers are of one kind
    scaling = dict(config.rope_scaling or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("rope_type", None) or scaling.pop("type", "default")
    if scaling["rope_type"] in ("llama3", "yarn"):
        scaling.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return {"architectures": [family + "ForCausalLM"],
            "model_type": MODEL_TYPES.get(family, family.lower()), **raw,
            "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
            "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
            "hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True}
