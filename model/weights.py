"""Reading and writing models: Hugging Face directories, and legacy single-file state dicts.

    model = load_model("out/full_sft")         # or a Llama, Mistral, Qwen2 or Qwen3 directory, or "x.pth"
    save_model(model, "out/mine", tokenizer)   # AutoModelForCausalLM.from_pretrained("out/mine") opens it

Reading is strict: every tensor must be there, in the shape that the config says, and belong somewhere; all
that is checked before memory is taken. It never runs code from a file (see model/files.py), and never asks
the network: a path that is not there is an error and no name of a model on some hub.
"""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch

from model.files import check_finite, explained, one_line, read_json, read_safetensors, read_state_dict
from model.quantize import Int8Linear, from_bitsandbytes, quantization_config, to_bitsandbytes
from model.transformer import CausalLM, ModelConfig, ModelError, check_size

GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # tokenizer.json alone says it all
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LARGEST_TOKENIZER = 2**28  # bytes; those of vocabularies of 260,000 take 2**25
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


# --- config.json <-> ModelConfig ------------------------------------------------------------------------


def config_from_dict(raw: dict) -> ModelConfig:
    """The ModelConfig of a config.json. Raises ModelError for what our model can't compute."""
    architecture = (raw.get("architectures") or ["none named"])[0]
    if architecture not in ARCHITECTURES:
        raise ModelError(f"can't read architecture {architecture}, only {', '.join(ARCHITECTURES)}")
    family = architecture.removesuffix("ForCausalLM")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for name in sizes:
        if name not in raw:
            raise ModelError(f"{name} is missing")
        check_size(name, raw[name])  # before anything is made of that size
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {raw['hidden_act']!r} is not supported, only silu")
    if raw.get("mlp_bias") or (family in ("Llama", "Qwen3") and raw.get("attention_bias")):
        raise ModelError("biases on the output projections are not supported")
    quantized = raw.get("quantization_config") or {}
    if quantized and quantized.get("bnb_4bit_quant_type", quantized.get("quant_method")) != "nf4":
        raise ModelError("of quantized weights only bitsandbytes' NF4 is read; use the unquantized "
                         "model")

    # transformers 5 keeps it all in rope_parameters; before, there were rope_theta and rope_scaling.
    rope = (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError("rotary settings that differ between layers are not supported")
    if (rope.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial_rotary_factor is not supported")
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", "default")

    heads = raw["num_attention_heads"]
    # Where a key is missing, the default is that of the class: Qwen3's head_dim, Mistral's window.
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        intermediate_size=raw["intermediate_size"],
        head_dim=raw.get("head_dim", 128 if family == "Qwen3" else None),
        qk_norm=family == "Qwen3",
        attention_bias=family == "Qwen2",
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        rope_theta=float(theta),
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        max_position_embeddings=raw.get("max_position_embeddings", 32768),
        initializer_range=raw.get("initializer_range", 0.02),
        sliding_window=_sliding_window(raw, family),
    )


def _sliding_window(raw: dict, family: str) -> int | None:
    """The window of all layers. Qwen has a switch, and can have it in upper layers only; we can't."""
    if family == "Llama":
        return None
    if family == "Mistral":
        return raw.get("sliding_window", 4096)
    if not raw.get("use_sliding_window"):
        return None
    layers = raw["num_hidden_layers"]
    first = min(raw.get("max_window_layers", 28), layers)
    kinds = raw.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    if len(set(kinds)) > 1:
        raise ModelError("a sliding window in some layers only is not supported")
    return raw.get("sliding_window", 4096) if kinds[0] == "sliding_attention" else None


def config_to_dict(config: ModelConfig) -> dict:
    """config.json in the terms of the standard class that computes the same; RoPE in both spellings."""
    raw = asdict(config)
    raw.pop("qk_norm")
    raw.pop("attention_bias")
    window = raw["sliding_window"]
    if config.qk_norm or config.attention_bias:
        family = "Qwen3" if config.qk_norm else "Qwen2"
        raw["use_sliding_window"] = window is not None
        raw["max_window_layers"] = 0 if window else config.num_hidden_layers  # the first layer with a window
    elif window is not None:
        family = "Mistral"
    else:
        family = "Llama"
        raw.pop("sliding_window")
    scaling = dict(config.rope_scaling or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("rope_type", None) or scaling.pop("type", "default")
    if scaling["rope_type"] in ("llama3", "yarn"):
        scaling.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return {
        "architectures": [family + "ForCausalLM"],
        "model_type": family.lower(),
        **raw,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
    }


# --- reading --------------------------------------------------------------------------------------------


def load_model(path, device="cpu", dtype: torch.dtype | None = None) -> CausalLM:
    """Reads a Hugging Face directory or a legacy .pth file into a CausalLM, in eval mode.

    dtype None is float32 whatever the file holds: training needs it, since small updates to bfloat16 are
    lost. Raises ModelError, one line, for what is missing, surplus, misshapen, truncated or of another
    architecture.
    """
    path, tensors, files = Path(path), {}, {}
    with explained(path):
        if path.is_dir():
            with explained(path / "config.json"):
                config = config_from_dict(read_json(path / "config.json"))
            for file in _weight_files(path):
                read = read_safetensors(file)[0]
                tensors |= read
                files |= dict.fromkeys(read, file)
        elif path.is_file():
            tensors = _read_legacy(path)
            config = _infer_config(tensors)
        else:
            raise ModelError(f"no model at {path}: neither a folder with config.json nor a .pth file")
        if config.num_hidden_layers > len(tensors):
            raise ModelError(f"{config.num_hidden_layers} layers in the config, but {len(tensors)} tensors")
        model = _without_memory(config).to(dtype or torch.float32)  # so that a wrong file costs nothing
        tensors = from_bitsandbytes(model, tensors)  # those layers that the file holds in 4 bits
        tensors = _check(tensors, model)
    return _fill(model, tensors, files, device, path)


class _NoInitialValues(torch.overrides.TorchFunctionMode):
    """Within it the functions of torch.nn.init do nothing. On the meta device, where there is nothing to
    fill, they would import PyTorch's compiler: more than a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _without_memory(config: ModelConfig) -> CausalLM:
    """The model with shapes alone, on the meta device."""
    with torch.device("meta"), _NoInitialValues():
        return CausalLM(config)


@torch.no_grad()
def _fill(model: CausalLM, tensors: dict, files: dict[str, Path], device, path: Path) -> CausalLM:
    """Gives the model on the meta device memory and the tensors' numbers."""
    try:
        # As model.to_empty, which for the meta device would import sympy
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    except (RuntimeError, MemoryError):
        size = sum(parameter.nbytes for parameter in model.parameters())
        raise ModelError(f"{path}: no memory on {device} for {size:,} bytes of weights") from None
    model.tie_weights()  # each has its own memory now
    for name, parameter in model.named_parameters():
        # Mapped anew and let go, one by one: so there is never more in memory than the model and one tensor.
        tensor = read_safetensors(files[name], name)[0][name] if name in files else tensors[name]
        check_finite({name: tensor}, f"load {path}")
        parameter.copy_(tensor)
    return model.eval()


def _check(tensors: dict, model: CausalLM) -> dict:
    """The tensors that the model wants, complete and in shape. Raises ModelError."""
    wanted = model.state_dict()
    # Rotary tables that old files carry: we compute them from the config.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        embedding = tensors["model.embed_tokens.weight"]
        if not _equal(tensors.setdefault("lm_head.weight", embedding), embedding):
            raise ModelError("lm_head.weight is not the embedding, yet tie_word_embeddings is true")
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    for names, problem in ((missing, "has no"), (unknown, "has an unknown")):
        if names:
            more = f" and {len(names) - 1} like it" if len(names) > 1 else ""
            raise ModelError(f"it {problem} {min(names)}{more}: the weights don't fit the config")
    for name, blank in wanted.items():
        tensor = tensors[name]
        if tensor.shape != blank.shape:
            shapes = f"is {list(tensor.shape)}, the config asks for {list(blank.shape)}"
            raise ModelError(f"{name} {shapes}")
        floats = tensor.is_floating_point() and blank.is_floating_point() and tensor.itemsize > 1  # are cast
        if tensor.dtype != blank.dtype and not floats:
            raise ModelError(f"{name} holds {tensor.dtype}; of quantized weights only NF4 is read")
    return tensors


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.float())  # of other types torch.equal raises


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(f"no {WEIGHTS} in {folder} (pickled .bin weights are not read: they may run code)")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{INDEX} has no weight_map")
    names, home = sorted(set(weight_map.values())), folder.resolve()
    # A stranger's index reaches no further than its folder. (A hub's cache links its files to ../../blobs.)
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for name in names:
        plain = name and not re.search(r"[/\\:\0]", name) and name not in (".", "..")
        if not plain or (folder / name).resolve().parent not in allowed:
            raise ModelError(f"{INDEX} names {name[:100]!r}, which is outside of the folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, though {INDEX} names it")
    return [folder / name for name in names]


def _read_legacy(path: Path) -> dict[str, torch.Tensor]:
    """A MiniMind state dict, without the rotary tables that were saved with it."""
    rotary = ("freqs_cos", "freqs_sin", "freqs_cis")
    return {name: tensor for name, tensor in read_state_dict(path).items() if not name.endswith(rotary)}


def _infer_config(tensors: dict) -> ModelConfig:
    """The shape behind a legacy state dict. Everything but the heads can be read off the tensors.

    With q_norm (as long as a head) the heads follow too, and the rest is as in MiniMind's newer models: eps
    1e-6. Without it, MiniMind's 8 query heads are assumed, and eps 1e-5; key/value heads follow from the
    rows of k_proj:
        26m: q_proj 512 rows / 8 heads = head_dim 64; k_proj 128 rows / 64 = 2 key/value heads
    """
    first = "model.layers.0."
    try:
        vocab_size, hidden_size = tensors["model.embed_tokens.weight"].shape
        q_rows = tensors[f"{first}self_attn.q_proj.weight"].shape[0]
        k_rows = tensors[f"{first}self_attn.k_proj.weight"].shape[0]
        intermediate_size = tensors[f"{first}mlp.gate_proj.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ModelError(f"not a dense MiniMind state dict: {error} is missing") from None
    q_norm = tensors.get(f"{first}self_attn.q_norm.weight")
    head_dim = q_rows // 8 if q_norm is None else q_norm.shape[0]
    if not head_dim or q_rows % head_dim or k_rows % head_dim or (q_norm is None and q_rows % 8):
        raise ModelError(f"can't tell the heads from {q_rows} query and {k_rows} key rows; make it a "
                         "Hugging Face directory, whose config.json says")
    head = tensors.get("lm_head.weight")
    layers = [int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))]
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=q_rows // head_dim,
        num_key_value_heads=k_rows // head_dim,
        intermediate_size=intermediate_size,
        head_dim=head_dim,
        qk_norm=q_norm is not None,
        attention_bias=f"{first}self_attn.q_proj.bias" in tensors,
        tie_word_embeddings=head is None or _equal(head, tensors["model.embed_tokens.weight"]),
        rope_theta=1e6,
        rms_norm_eps=1e-5 if q_norm is None else 1e-6,
    )


def load_tokenizer(path):
    """transformers' tokenizer of a model or tokenizer folder. Raises ModelError where there is none."""
    path = Path(path)
    file, settings = path / "tokenizer.json", path / "tokenizer_config.json"
    if not file.is_file() and not settings.is_file():
        raise ModelError(f"no tokenizer in {path}: tokenizer.json is missing")
    if file.is_file() and file.stat().st_size > LARGEST_TOKENIZER:
        raise ModelError(f"{file} is too large to be a tokenizer: {file.stat().st_size:,} bytes")
    config = read_json(settings) if settings.is_file() else {}
    if config.get("tokenizer_class") in GENERIC_TOKENIZERS and file.is_file():
        from transformers import PreTrainedTokenizerFast as Tokenizer
    else:  # a class with rules of its own; finding it imports every model: two seconds
        from transformers import AutoTokenizer as Tokenizer
    try:
        # Not by default: left out, transformers would ask the person whether to run code of the folder.
        return Tokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of damaged files: bare Exceptions, and panics of Rust, which are none
        raise ModelError(f"the tokenizer in {path} can't be read: {one_line(error)}") from None


# --- writing --------------------------------------------------------------------------------------------


def save_model(model: CausalLM, path, tokenizer=None, training: dict | None = None) -> None:
    """Writes a Hugging Face directory: weights, configs, tokenizer, training.json.

    What is quantized is written as transformers with bitsandbytes writes it, and opens there.
    Never half-written: all files go to a temporary folder beside `path` first. A new folder then appears in
    one rename. In a folder that exists the old config.json goes first and the new one comes when the weights
    are there, so a kill in between leaves no model, but never one of two halves; what else lies there
    (metrics.jsonl, checkpoints/) stays. Raises ModelError where adapters are in the way, or a weight is NaN
    or infinite.
    """
    path = Path(path).resolve()
    if path.is_file():
        raise ModelError(f"{path} is a file; a model is saved as a folder")
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ModelError("8-bit weights are not saved, they are made in a moment: save the model before")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    check_finite(tensors, f"save {path}")
    tensors = to_bitsandbytes(model, tensors)
    plain = _without_memory(model.config).state_dict()
    names = {name for name in tensors if ".weight." not in name}  # without the constants of 4-bit weights
    if names != plain.keys():
        surplus = min(names ^ plain.keys())
        raise ModelError(f"can't save a plain model because of {surplus}: merge adapters, or save them alone")
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the same memory as the embedding, which the config says
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")

    tokens = _special_tokens(tokenizer)
    config = config_to_dict(model.config) | tokens | {"dtype": dtype, "torch_dtype": dtype}
    if quantized := quantization_config(model):
        config["quantization_config"] = quantized
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")  # one name: what a kill leaves, the next call removes
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        safetensors.torch.save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        _write_json(temporary / "generation_config.json", tokens)
        _write_json(temporary / "config.json", config)
        if training is not None:
            _write_json(temporary / "training.json", training)
        _publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _special_tokens(tokenizer) -> dict:
    """bos, eos and pad ids. Both the end of a turn and the end of a text end an answer."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    known = tokenizer.get_vocab()
    ends = [tokenizer.eos_token_id] + [known.get(token) for token in ("<|im_end|>", "<|endoftext|>")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    eos = ends[0] if len(ends) == 1 else ends or None
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def _write_json(path: Path, value: dict) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")


def _publish(temporary: Path, path: Path) -> None:
    """Moves the files of `temporary` into `path`, all on disk before any is visible."""
    last = ("config.json", "training.json")
    files = [file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (last.index(file.name) if file.name in last else -1, file.as_posix()))
    for file in files:
        with open(temporary / file, "rb+") as handle:
            os.fsync(handle.fileno())
    if not path.exists():
        os.rename(temporary, path)
    else:
        (path / "config.json").unlink(missing_ok=True)
        for file in files:
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / file, path / file)
        for stale in [path / INDEX, *path.glob("model-*-of-*.safetensors")]:  # a former model's shards
            stale.unlink(missing_ok=True)
    if os.name == "posix":  # renames are durable once the folders are; Windows has no such call
        for folder in (path, path.parent):
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
