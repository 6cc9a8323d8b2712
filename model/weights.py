"""Models on disk: Hugging Face directories, MiniMind's .pth files, GGUF. A reader may skip this file.

    model = load_model("out/full_sft")         # or a Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE or Mixtral one;
                                               # or "x.pth", or "x.gguf"
    save_model(model, "out/mine", tokenizer)   # AutoModelForCausalLM.from_pretrained("out/mine") opens it

Reading is strict: every tensor must be there, have the shape that the config says, and belong somewhere. All
of this is checked before memory is taken. No code from a file is run (see common/files.py), and nothing comes
from the network: a path that does not exist is an error, and never the name of a model on some hub.
"""

import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from common import files
from common.errors import ModelError
from common.fast_start import give_memory, without_initial_values
from model.attention import FULL, SLIDING
from model.config import ModelConfig, check_size
from model.expert_files import mixtral_names, our_names
from model.gguf import read_model as read_gguf_model
from model.gguf_file import is_gguf
from model.int8 import Int8Linear
from model.moe import ROUTER
from model.moe import SETTINGS as EXPERT_SETTINGS
from model.quantize import from_bitsandbytes, quantization_config, to_bitsandbytes
from model.rope_scaling import scale
from model.tokenizer_files import FILES as TOKENIZER_FILES
from model.tokenizer_files import load_tokenizer as load_tokenizer  # so that others find all three here
from model.tokenizer_files import write_tokenizer
from model.transformer import CausalLM

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "MinistralForCausalLM", "Qwen2ForCausalLM",
                 "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM")
MODEL_TYPES = {"Qwen3Moe": "qwen3_moe"}  # where model_type is not the name of the class in small letters
MINIMIND_HEADS = 8  # query heads of MiniMind's models without q_norm
MINIMIND_ROTARY_TABLES = ("freqs_cos", "freqs_sin", "freqs_cis")  # how the names of these tensors end
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION, TOKEN_IDS = "generation_config.json", ("bos_token_id", "eos_token_id", "pad_token_id")
# How transformers and vLLM choose words unless told otherwise: as eval_model.py does. top_k 0 means all.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}


# --- config.json <-> ModelConfig ------------------------------------------------------------------------


def config_from_dict(raw: dict) -> ModelConfig:
    """The ModelConfig of a config.json. Raises ModelError for whatever our model cannot compute."""
    architecture = (raw.get("architectures") or ["none named"])[0]
    if architecture not in ARCHITECTURES:
        raise ModelError(f"can't read architecture {architecture}, only {', '.join(ARCHITECTURES)}")
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
    rope = (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError("rotary settings that differ between layers are not supported")
    if (rope.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial_rotary_factor is not supported")
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", "default")

    window, layer_types = _windows(raw, family)
    # A missing key has the default of its class, such as Qwen3's head_dim and Mistral's window.
    return ModelConfig(
        **{name: raw[name] for name in sizes},
        num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim", 128 if family == "Qwen3" else None),
        qk_norm=family in ("Qwen3", "Qwen3Moe"),
        attention_bias=family == "Qwen2", tie_word_embeddings=raw.get("tie_word_embeddings", False),
        rope_theta=float(theta), rope_scaling=None if rope["rope_type"] == "default" else rope,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6), initializer_range=raw.get("initializer_range", 0.02),
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
    step, layers = raw.get("decoder_sparse_step", 1), range(raw["num_hidden_layers"])
    without = raw.get("mlp_only_layers") or []
    if not isinstance(step, int) or step < 1 or not isinstance(without, list):
        raise ModelError("decoder_sparse_step must be a number from 1 up, and mlp_only_layers a list")
    return {"num_experts": num_experts, "num_experts_per_tok": raw["num_experts_per_tok"],
            "moe_intermediate_size": raw["intermediate_size" if is_mixtral else "moe_intermediate_size"],
            "norm_topk_prob": is_mixtral or bool(raw.get("norm_topk_prob")),
            "mlp_only_layers": [i for i in layers if i in without or (i + 1) % step],
            "router_aux_loss_coef": raw.get("router_aux_loss_coef", 0.001),
            "router_z_loss_coef": raw.get("router_z_loss_coef", 0.0)}  # a setting of our own


def _windows(raw: dict, family: str) -> tuple[int | None, list[str] | None]:
    """(sliding_window, layer_types). Qwen has a switch for the window, and may name its first layers without.

    Raises ModelError for a Mistral with layers of two kinds: transformers' class has the window in all. So
    have those of Mixtral and Qwen3Moe, which do not read layer_types.
    """
    kinds, layers = raw.get("layer_types"), raw["num_hidden_layers"]
    if family == "Llama" or (family.startswith("Qwen") and not raw.get("use_sliding_window")):
        return None, None
    if family == "Mistral" and isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
        raise ModelError("layer_types of two kinds: the architecture for them is MinistralForCausalLM")
    if family in ("Qwen2", "Qwen3") and not kinds:
        first = min(raw.get("max_window_layers", 28), layers)
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


# --- reading --------------------------------------------------------------------------------------------


def load_model(path, device="cpu", dtype: torch.dtype | None = None,
               rope_scaling: str | None = None) -> CausalLM:
    """Reads a Hugging Face directory, a .pth file of MiniMind or a GGUF file into a CausalLM, in eval mode.

    dtype None is float32, whatever the file holds. Training needs float32, because small updates are lost in
    bfloat16. rope_scaling: as in "yarn:4", for longer texts (model/rope_scaling.py). Raises ModelError, one
    line, for tensors that are missing, unknown or of the wrong shape, for files that are cut off, and for
    other architectures.
    """
    path = Path(path)
    readers = {}  # the name of each tensor that is read late -> the function that reads it
    generation = None
    with files.explained(path):
        if path.is_dir():
            with files.explained(path / "config.json"):
                raw = files.read_json(path / "config.json")
                config = config_from_dict(raw)
            generation = _generation_config(raw, files.read_json_if_there(path / GENERATION))
            tensors = {}
            for file in _weight_files(path):
                of_file, _ = files.read_safetensors(file)
                tensors |= of_file
                readers |= {name: partial(_read_again, file, name) for name in of_file}
            if config.num_experts:
                tensors, readers = our_names(tensors, readers, config.num_experts)
        elif is_gguf(path):
            config, shapes, readers, generation = read_gguf_model(path)
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        elif path.is_file():
            state = files.read_state_dict(path)
            tensors = {name: state[name] for name in state if not name.endswith(MINIMIND_ROTARY_TABLES)}
            config = _infer_config(tensors)
        else:
            raise ModelError(f"no model at {path}: neither a folder with config.json, nor .pth, nor .gguf")
        config = scale(config, rope_scaling, path)
        experts = config.num_experts * (config.num_hidden_layers - len(config.mlp_only_layers))
        if config.num_hidden_layers + experts > len(tensors):
            of_experts = f" with {experts} experts" if experts else ""
            raise ModelError(f"{config.num_hidden_layers} layers{of_experts} in the config, but "
                             f"{len(tensors)} tensors")
        model = _without_memory(config).to(dtype or torch.float32)  # so that a wrong file costs no memory
        # Layers that the file holds in 4 bits become NF4Linear before the names and shapes are compared.
        tensors = _check(from_bitsandbytes(model, tensors), model)
    model.generation_config = generation
    return _fill(model, tensors, readers, device, path)


def _read_again(file: Path, name: str) -> torch.Tensor:
    """A tensor of a safetensors file. The file is mapped again for each tensor, and the mapping ends with the
    tensor. So memory never holds more than the model and one tensor."""
    return files.read_safetensors(file, name)[0][name]


def _without_memory(config: ModelConfig) -> CausalLM:
    """The model with shapes alone, on the meta device."""
    with torch.device("meta"), without_initial_values():
        return CausalLM(config)


@torch.no_grad()
def _fill(model: CausalLM, tensors: dict, readers: dict[str, Callable], device, path: Path) -> CausalLM:
    """Gives memory and the numbers of the tensors to a model on the meta device."""
    try:
        give_memory(model, device)
    except (RuntimeError, MemoryError):
        size = sum(parameter.nbytes for parameter in model.parameters())
        raise ModelError(f"{path}: no memory on {device} for {size:,} bytes of weights") from None
    model.tie_weights()  # embedding and head have memory of their own now
    for name, parameter in model.named_parameters():
        tensor = readers[name]() if name in readers else tensors[name]
        files.check_finite({name: tensor}, f"load {path}")
        parameter.copy_(tensor)
    return model.eval()


def _check(tensors: dict, model: CausalLM) -> dict:
    """The tensors that the model needs. Raises ModelError where one is missing, unknown or misshapen."""
    wanted = model.state_dict()
    # Old files hold rotary tables. Ours are computed from the config.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        embedding = tensors["model.embed_tokens.weight"]
        head = tensors.setdefault("lm_head.weight", embedding)
        # torch.equal raises for unequal types.
        if head is not embedding and not torch.equal(head.float(), embedding.float()):
            raise ModelError("lm_head.weight is not the embedding, yet tie_word_embeddings is true")
    for names, problem in ((wanted.keys() - tensors.keys(), "has no"),
                           (tensors.keys() - wanted.keys(), "has an unknown")):
        if names:
            more = f" and {len(names) - 1} like it" if len(names) > 1 else ""
            raise ModelError(f"it {problem} {min(names)}{more}: the weights don't fit the config")
    for name, blank in wanted.items():
        tensor = tensors[name]
        if tensor.shape != blank.shape:
            raise ModelError(f"{name} is {list(tensor.shape)}, the config asks for {list(blank.shape)}")
        can_be_cast = tensor.is_floating_point() and blank.is_floating_point() and tensor.itemsize > 1
        if tensor.dtype != blank.dtype and not can_be_cast:
            raise ModelError(f"{name} holds {tensor.dtype}; of quantized weights only NF4 is read")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(f"no {WEIGHTS} in {folder} (pickled .bin weights are not read: they may run code)")
    weight_map = files.read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{INDEX} has no weight_map")
    names = sorted(set(weight_map.values()))
    # A stranger's index must not reach beyond its folder.
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # the cache of a hub, in which files are links to ../../blobs
        allowed.append(home.parent.parent / "blobs")
    for name in names:
        is_plain = name not in ("", ".", "..") and not re.search(r"[/\\:\0]", name)
        if not is_plain or (folder / name).resolve().parent not in allowed:
            raise ModelError(f"{INDEX} names {name[:100]!r}, which is outside of the folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, though {INDEX} names it")
    return [folder / name for name in names]


def _infer_config(tensors: dict) -> ModelConfig:
    """The ModelConfig that fits a state dict of MiniMind. The shapes of the tensors say all but the heads.

    MiniMind's newer models have a q_norm, which is as long as a head, and an eps of 1e-6. The older ones have
    no q_norm; they have 8 query heads, and an eps of 1e-5. The rows of k_proj give the key/value heads:
        26m: q_proj 512 rows / 8 heads = head_dim 64; k_proj 128 rows / 64 = 2 key/value heads
    """
    first = "model.layers.0."
    try:
        embedding = tensors["model.embed_tokens.weight"]
        vocab_size, hidden_size = embedding.shape
        q_rows = tensors[f"{first}self_attn.q_proj.weight"].shape[0]
        k_rows = tensors[f"{first}self_attn.k_proj.weight"].shape[0]
        router = tensors.get(f"{first}{ROUTER}")  # in a model with experts
        of_expert = "" if router is None else "experts.0."
        intermediate_size = tensors[f"{first}mlp.{of_expert}gate_proj.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ModelError(f"not a MiniMind state dict: {error} is missing") from None
    q_norm = tensors.get(f"{first}self_attn.q_norm.weight")
    head_dim = q_rows // MINIMIND_HEADS if q_norm is None else q_norm.shape[0]
    uneven = q_norm is None and q_rows % MINIMIND_HEADS
    if uneven or head_dim == 0 or q_rows % head_dim or k_rows % head_dim:
        raise ModelError(f"can't tell the heads from {q_rows} query and {k_rows} key rows: use a folder")
    matches = [re.match(r"model\.layers\.(\d{1,9})\.", name) for name in tensors]
    layers = [int(match[1]) for match in matches if match]
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=max(layers) + 1, num_attention_heads=q_rows // head_dim,
        num_key_value_heads=k_rows // head_dim, head_dim=head_dim,
        qk_norm=q_norm is not None, attention_bias=f"{first}self_attn.q_proj.bias" in tensors,
        tie_word_embeddings=torch.equal(tensors.get("lm_head.weight", embedding).float(), embedding.float()),
        rope_theta=1e6, rms_norm_eps=1e-5 if q_norm is None else 1e-6,
        # How many experts a token uses cannot be told. MiniMind's models use one, with normalised gates.
        num_experts=0 if router is None else router.shape[0], norm_topk_prob=router is not None)


# --- writing --------------------------------------------------------------------------------------------


def save_model(model: CausalLM, path, tokenizer=None, training: dict | None = None) -> None:
    """Writes a Hugging Face directory: weights, configs, tokenizer, and `training` as training.json.

    4-bit layers are written as transformers with bitsandbytes writes them, and open there. A process that is
    killed here leaves the old model, the new one, or a folder without config.json, and never the weights of
    one model with the config of another (see common/files.py). Other files in the folder (metrics.jsonl,
    checkpoints/) stay. Raises ModelError if there are adapters, or if a weight is NaN or infinite.
    """
    path = Path(path).resolve()
    if path.is_file():
        raise ModelError(f"{path} is a file; a model is saved as a folder")
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ModelError("8-bit weights are not saved: save the model first, and then call quantize_int8")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    files.check_finite(tensors, f"save {path}")
    tensors = to_bitsandbytes(model, tensors)
    if model.config.num_experts and quantization_config(model):
        raise ModelError("experts in 4 bits are not saved, since transformers can't read them: save the "
                         "model as it is, and quantize it after loading")
    names = {name for name in tensors if ".weight." not in name}  # without the constants of 4-bit weights
    surplus = names ^ _without_memory(model.config).state_dict().keys()
    if surplus:
        raise ModelError(f"can't save a model because of {min(surplus)}: merge adapters, or save them alone")
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the config says that this is the embedding
    if model.config.num_experts and not model.config.qk_norm:
        tensors = mixtral_names(tensors)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")

    generation = _generation_to_save(model, tokenizer)
    tokens = {name: generation[name] for name in TOKEN_IDS}
    config = config_to_dict(model.config) | tokens | {"dtype": dtype, "torch_dtype": dtype}
    if quantized := quantization_config(model):
        config["quantization_config"] = quantized
    documents = {GENERATION: generation, "config.json": config, "training.json": training}
    with files.writing(path, last=("config.json", "training.json")) as temporary:
        temporary.mkdir()
        safetensors.torch.save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            write_tokenizer(tokenizer, temporary)
        for name, document in documents.items():
            if document is not None:
                (temporary / name).write_bytes(files.json_text(document).encode("utf-8"))
        surplus = {INDEX} if tokenizer is None else {INDEX, *TOKENIZER_FILES}
        surplus -= {file.name for file in temporary.iterdir()}
    for former in (*(path / name for name in surplus), *path.glob("model-*-of-*.safetensors")):
        files.remove(former)  # of another model that was here before


# --- what ends an answer, and how words are chosen: generation_config.json --------------------------------


def end_tokens(model: CausalLM, tokenizer) -> list:
    """The tokens that end an answer: those that the model's files list, unchecked, and those known by name.

    Both the end of a turn and the end of a text end an answer.
    """
    known = tokenizer.get_vocab()
    by_name = [tokenizer.eos_token_id, known.get("<|im_end|>"), known.get("<|endoftext|>")]
    return _ends(model.generation_config or {}, {"eos_token_id": by_name})


def _ends(*settings: dict) -> list:
    """All tokens under eos_token_id, which holds one, a list of some, or None; each token once."""
    values = [raw.get("eos_token_id") for raw in settings]
    ends = [end for value in values for end in (value if isinstance(value, list) else [value])]
    return [end for place, end in enumerate(ends) if end is not None and end not in ends[:place]]


def _generation_config(config: dict, generation: dict) -> dict:
    """The settings of generation_config.json, and the ids that stand only in config.json.

    Either file may list tokens that end an answer (Llama 3: two or three of them), and both lists count.
    """
    ids = {name: config.get(name) for name in TOKEN_IDS}
    return ids | generation | {"eos_token_id": _ends(generation, config)}


def _generation_to_save(model: CausalLM, tokenizer) -> dict:
    """The generation_config.json of a model. A model that was read hands on what it came with."""
    settings = dict.fromkeys(TOKEN_IDS)
    settings |= SAMPLING if model.generation_config is None else model.generation_config
    if tokenizer is not None:
        settings["eos_token_id"] = end_tokens(model, tokenizer)
        for name in ("bos_token_id", "pad_token_id"):
            settings[name] = getattr(tokenizer, name) if settings[name] is None else settings[name]
    ends = _ends(settings)
    if len(ends) < 2:
        settings["eos_token_id"] = ends[0] if ends else None
    return settings
