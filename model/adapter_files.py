"""Adapters on disk: PEFT's folders, and plain .pth files. model/lora.py puts them into models.

    adapter_model.safetensors   base_model.model.NAME.lora_A.weight (rank, in), ...lora_B.weight (out, rank)
    adapter_config.json         r, lora_alpha, target_modules, ...

    x.pth                       {"NAME.lora.A.weight": ..., "NAME.lora.B.weight": ...}, nothing else
"""

import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save

from model.files import check_finite, explained, read_json, read_safetensors, read_state_dict
from model.transformer import ModelError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Settings of PEFT's that are read here, and those that don't change what an adapter computes. Any other that
# is set (use_dora, modules_to_save, layer_replication, what a later PEFT invents) is refused.
READ = {"peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "lora_dropout", "use_rslora",
        "rank_pattern", "alpha_pattern"}
HARMLESS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
            "fan_in_fan_out", "megatron_config", "megatron_core", "qalora_group_size", "loftq_config",
            "runtime_config", "ensure_weight_tying"}


# --- which base an adapter belongs to --------------------------------------------------------------------


def fingerprint(weights: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Four values of each weight. Unlike a hash, they still tell a model by its half-precision copy."""
    marks = {}
    for name, weight in weights.items():
        if weight.numel() and not weight.is_meta:
            places = torch.tensor([1, 3, 5, 7], device=weight.device) * weight.numel() // 8
            marks[name] = [float(f"{x:.6g}") for x in weight.detach().reshape(-1)[places].tolist()]
    return marks


def other_base(marks: dict, here: dict) -> str | None:
    """The first weight that differs between two fingerprints. Only what both have is compared: of a
    quantized base the plain weights alone are known."""
    for name in sorted(marks.keys() & here.keys()):
        # 2^-7: twice the rounding of bf16, and far below what training does to a weight
        if any(abs(a - b) > 2**-7 * abs(a) + 1e-6 for a, b in zip(marks[name], here[name], strict=False)):
            return name
    return None


# --- target_modules: from what a person says to the names of layers, and back -----------------------------


def select_layers(linears: dict, targets: str | list[str]) -> list[str]:
    """The names of those linear layers that target_modules means (see apply_lora)."""
    found = set()
    for target in [targets] if isinstance(targets, str) else targets or [""]:
        try:
            if target in ("all-linear", "square"):  # without the head: often the embedding too
                here = [name for name, layer in linears.items() if name.split(".")[-1] != "lm_head"
                        and (target == "all-linear" or layer.in_features == layer.out_features)]
            else:
                here = [name for name in linears if ends(name, target)]
                here = here or [name for name in linears if re.fullmatch(target, name)]
        except re.error as error:
            raise ModelError(f"target_modules: {target!r} is no regular expression: {error}") from None
        if not here:
            there_is = ", ".join(dict.fromkeys(name.split(".")[-1] for name in linears)) or "none at all"
            raise ModelError(f"target_modules: {target!r} matches no linear layer; there is: {there_is}")
        found.update(here)
    return [name for name in linears if name in found]


def _peft_targets(adapted: dict, modules: list[str]) -> list[str]:
    """The shortest name endings that mean the adapted modules and no others, as ["o_proj", "q_proj"]."""
    targets = set()
    for name in adapted:
        endings = [name.split(".", n)[-1] for n in range(name.count("."), -1, -1)]
        exact = (end for end in endings if all(n in adapted for n in modules if ends(n, end)))
        targets.add(next(exact, name))
    return sorted(targets)


def ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")  # in whole parts: "q_proj" doesn't end in "proj"


# --- writing ---------------------------------------------------------------------------------------------


@contextmanager
def _replacing(folder: Path):
    """A temporary folder whose files, when all are written, move into `folder`, adapter_config.json last: an
    old one goes before, so that a kill in between leaves no adapter, but never one of two halves."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".writing"  # same disk: atomic moves; one name: what a kill left goes now
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: file.name == CONFIG)
        for file in files:
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
        if temporary / CONFIG in files:  # not where a .pth is saved beside an adapter
            (folder / CONFIG).unlink(missing_ok=True)
        for file in files:
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tensors(loras: dict, key: str) -> dict[str, torch.Tensor]:
    """{key with the name and A or B filled in: matrix}, on the CPU. Raises ModelError for NaN or infinity."""
    tensors = {}
    for name, lora in loras.items():
        for part, factor in zip("BA", lora.factors(), strict=True):
            tensors[key.format(name, part)] = factor.detach().cpu().contiguous()
    check_finite(tensors, "save the adapter")
    return tensors


def write_plain(path: Path, loras: dict) -> None:
    """loras {name: LoRA} -> a .pth, complete or absent. It has no place for a scale, so B holds it."""
    state = _tensors(loras, "{}.lora.{}.weight")
    for name, lora in loras.items():
        state[f"{name}.lora.B.weight"] = state[f"{name}.lora.B.weight"] * lora.scaling
    with _replacing(path.parent) as folder:
        torch.save(state, folder / path.name)


def write_adapter(path: Path, loras: dict, modules: list[str], marks: dict, base, tokenizer,
                  training) -> None:
    """loras {name: LoRA} -> a PEFT folder: each file complete or absent, other files survive.

    modules: the names of all modules of the model. marks: the base's fingerprint, which goes with the
    tensors: PEFT warns about keys in the config that it doesn't know.
    """
    if path.is_file():
        raise ModelError(f"{path} is a file; an adapter is saved as a folder, or as a file that ends in .pth")
    state = _tensors(loras, "base_model.model.{}.lora_{}.weight")
    metadata = {"format": "pt", "base_fingerprint": json.dumps(marks)}
    config = _peft_config(loras, modules) | {"base_model_name_or_path": None if base is None else str(base)}
    with _replacing(path) as folder:
        (folder / WEIGHTS).write_bytes(save(state, metadata))  # save_file: mode 0600
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, content in {"training.json": training, CONFIG: config}.items():
            if content is not None:
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _peft_config(loras: dict, modules: list[str]) -> dict:
    first, lora = next(iter(loras.items()))
    ranks = {name: len(lora.factors()[1]) for name, lora in loras.items()}
    # B A - B0 A0 (see LoRA) has twice the rank, which must not change the scale.
    alphas = {name: lora.alpha * (ranks[name] / lora.rank) ** (0.5 if lora.rslora else 1)
              for name, lora in loras.items()}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "r": ranks[first], "lora_alpha": alphas[first], "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout, "target_modules": _peft_targets(loras, modules),
        # Layers unlike the first: an adapter that came from elsewhere may mix ranks.
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
    }


# --- reading ---------------------------------------------------------------------------------------------


def read_adapter(path: Path) -> tuple[dict, dict]:
    """-> {name: {"A": (rank, in), "B": (out, rank), "alpha", "dropout", "rslora"}}, the base's fingerprint.

    Runs no code of the file. Raises ModelError for a file that is missing, damaged or no LoRA adapter.
    """
    config_path = path / CONFIG
    if not path.exists() or (path.is_dir() and not config_path.is_file()):
        raise ModelError(f"{config_path if path.is_dir() else path}: not found; no adapter here")
    with explained(path):
        return _parse_adapter(path)


def _parse_adapter(path: Path) -> tuple[dict, dict]:
    config, marks = {}, {}
    if path.is_dir():
        config = read_json(path / CONFIG)
        _check_config(config)
        if not (path / WEIGHTS).is_file():
            raise ModelError(f"{WEIGHTS} is missing (a pickled adapter_model.bin is not read)")
        state, metadata = read_safetensors(path / WEIGHTS)
        marks = json.loads(metadata.get("base_fingerprint", "{}"))
        marks = {name: [float(x) for x in values] for name, values in marks.items()}
    else:
        state = read_state_dict(path)

    parts = {}
    for key, tensor in state.items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.{1,200})\.lora[._]([AB])\.weight", key)
        if not found or tensor.ndim != 2 or not tensor.is_floating_point():
            raise ModelError(f"{key[:200]!r} is no LoRA matrix; DoRA, biases and the like can't be loaded")
        check_finite({key: tensor.float()}, "load")
        parts.setdefault(found[1], {})[found[2]] = tensor.float()
    if not parts:
        raise ModelError("holds no LoRA matrices")
    for name, part in parts.items():
        if len(part) < 2:
            raise ModelError(f"{name} lacks its lora {'B' if 'A' in part else 'A'}")
        rank = len(part["A"])
        told = _of_layer(config, "rank_pattern", name, config.get("r", rank))
        alpha = _of_layer(config, "alpha_pattern", name, config.get("lora_alpha", rank))  # .pth: a scale of 1
        if rank != told or not rank:
            raise ModelError(f"{name} lora A has rank {rank}, not the {told} of {CONFIG}")
        if not 0 < abs(alpha) < math.inf:
            raise ModelError(f"lora_alpha must be a number and not 0; it is {alpha} for {name}")
        part |= {"alpha": alpha, "dropout": config.get("lora_dropout", 0.0),
                 "rslora": bool(config.get("use_rslora"))}
    return parts, marks


def check_shapes(parts: dict, linears: dict, path: Path) -> None:
    """Raises ModelError where what read_adapter gave doesn't fit the linear layers of a model."""
    if surplus := sorted(parts.keys() - linears.keys()):
        raise ModelError(f"{path}: {len(surplus)} of its layers are no linear layers here, as {surplus[0]}")
    for name, part in parts.items():
        linear, rank = linears[name], len(part["A"])
        for key, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
            if part[key].shape != shape:
                raise ModelError(f"{path}: {name} lora {key} is {tuple(part[key].shape)}, not {shape}")


def _check_config(config: dict) -> None:
    """Raises ModelError for an adapter_config.json that asks for what we don't compute, or for nonsense."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"an adapter of type {config.get('peft_type')}; only LORA can be loaded")
    for key, value in config.items():
        if value and key not in READ | HARMLESS:
            raise ModelError(f"{CONFIG} sets {key} to {str(value)[:50]}: not supported, only plain LoRA is")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{CONFIG} sets bias to {str(config['bias'])[:50]}: trained biases can't be loaded")
    init = str(config.get("init_lora_weights"))
    if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ModelError(f"init_lora_weights {init} goes with a base that PEFT changed: save it anew with "
                         "PEFT's path_initial_model_for_weight_conversion")
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("lora_dropout", (int, float))):
        value = config.get(key, 0.0 if key == "lora_dropout" else None)
        if not isinstance(value, kind):
            raise ModelError(f"{key} must be a number in {CONFIG}, not {str(value)[:50]!r}")
    if not 0 <= config.get("lora_dropout", 0.0) < 1:
        raise ModelError(f"lora_dropout must be from 0 to below 1, not {config['lora_dropout']}")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(isinstance(v, (int, float)) for v in pattern.values()):
            raise ModelError(f"{key} must give a number for each name in {CONFIG}")
        for name in pattern:  # a regular expression of a stranger, and some take for ever: (a+)+b
            if len(re.findall(r"[*+{]", name)) > 2 or re.search(r"\)[*+{]", name):
                raise ModelError(f"{key}: {name[:50]!r} is too involved a pattern; name the layers instead")


def _of_layer(config: dict, key: str, name: str, default):
    """What rank_pattern or alpha_pattern say of a layer; as in PEFT, the first that means it counts."""
    patterns = (config.get(key) or {}).items()
    return next((value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name)), default)
