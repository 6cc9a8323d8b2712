"""Adapters on disk: PEFT's folders, and plain .pth files. model/lora.py puts them into models.

    adapter_model.safetensors   base_model.model.NAME.lora_A.weight (rank, in), ...lora_B.weight (out, rank)
    adapter_config.json         r, lora_alpha, target_modules, ...

    x.pth                       {"NAME.lora.A.weight": ..., "NAME.lora.B.weight": ...}, nothing else
"""

import json
import math
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from model.transformer import ModelError


def clean(name: str) -> str:
    """A module's name without what DDP and torch.compile put into it."""
    return re.sub(r"^(module\.)+|_orig_mod\.", "", name)


@contextmanager
def _replacing(folder: Path):
    """A temporary folder whose files, when all are written, move into `folder`, adapter_config.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving_") as temporary:  # same disk: atomic moves
        yield Path(temporary)
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "adapter_config.json"):
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(file, folder / file.name)


def write_plain(path: Path, factors: dict) -> None:
    """factors {name: (B, A)} -> a .pth, complete or absent. It has no place for a scale: B must hold it."""
    state = {f"{name}.lora.A.weight": a for name, (_, a) in factors.items()}
    state |= {f"{name}.lora.B.weight": b for name, (b, _) in factors.items()}
    with _replacing(path.parent) as folder:
        torch.save(state, folder / path.name)


def write_adapter(path: Path, factors: dict, config: dict, marks: dict, tokenizer, training) -> None:
    """factors {name: (B, A)} -> a PEFT folder: each file complete or absent, other files survive.

    marks: the base's fingerprint. It goes with the tensors: PEFT warns about keys in the config that it
    doesn't know.
    """
    if path.is_file():
        raise ModelError(f"{path} is a file; an adapter is saved as a folder, or as a file that ends in .pth")
    state = {f"base_model.model.{name}.lora_A.weight": a.contiguous() for name, (_, a) in factors.items()}
    state |= {f"base_model.model.{name}.lora_B.weight": b.contiguous() for name, (b, _) in factors.items()}
    metadata = {"format": "pt", "base_fingerprint": json.dumps(marks)}
    with _replacing(path) as folder:
        (folder / "adapter_model.safetensors").write_bytes(save(state, metadata))  # save_file: mode 0600
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, content in {"training.json": training, "adapter_config.json": config}.items():
            if content is not None:
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (folder / name).write_text(text, encoding="utf-8", newline="\n")


def read_adapter(path: Path) -> tuple[dict, dict, dict]:
    """-> {name: {"A": (rank, in), "B": (out, rank), "alpha": ...}}, adapter_config.json, the fingerprint.

    Runs no code of the file. Raises ModelError for a file that is missing, damaged or no LoRA adapter.
    """
    config_path = path / "adapter_config.json"
    if not path.exists() or (path.is_dir() and not config_path.is_file()):
        raise ModelError(f"{config_path if path.is_dir() else path}: not found; no adapter here")
    try:
        return _parse_adapter(path)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except Exception as error:  # a damaged or hostile file can raise a dozen types
        raise ModelError(f"{path}: damaged, or not an adapter ({type(error).__name__})") from None


def _parse_adapter(path: Path) -> tuple[dict, dict, dict]:
    config, marks = {"peft_type": "LORA"}, {}
    if path.is_dir():
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            marks = json.loads((file.metadata() or {}).get("base_fingerprint", "{}"))
            marks = {name: [float(x) for x in values] for name, values in marks.items()}
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file
    if config["peft_type"] != "LORA":
        raise ModelError(f"an adapter of type {config['peft_type']}; only LORA can be loaded")
    init = str(config.get("init_lora_weights"))
    if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ModelError(f"init_lora_weights {init} goes with a base that PEFT changed: save it anew with "
                         "PEFT's path_initial_model_for_weight_conversion")
    if not 0 <= config.get("lora_dropout", 0.0) < 1:
        raise ModelError(f"lora_dropout must be from 0 to below 1, not {config['lora_dropout']}")

    parts = {}
    for key, tensor in dict(state).items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora[._]([AB])\.weight", clean(str(key)))
        if not found or not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
            raise ModelError(f"{key!r} is no LoRA matrix; DoRA, biases and the like can't be loaded")
        if not tensor.isfinite().all():
            raise ModelError(f"{key!r} holds NaN or infinity")
        parts.setdefault(found[1], {})[found[2]] = tensor.float()
    if not parts:
        raise ModelError("holds no LoRA matrices")
    for name, part in parts.items():
        if len(part) < 2:
            raise ModelError(f"{name} lacks its lora {'B' if 'A' in part else 'A'}")
        rank = len(part["A"])
        told, alpha = config.get("r", rank), config.get("lora_alpha", rank)  # a .pth tells none: a scale of 1
        told, alpha = (next((value for pattern, value in (config.get(key) or {}).items()
                             if re.fullmatch(rf"(.*\.)?({pattern})", name)), default)
                       for key, default in (("rank_pattern", told), ("alpha_pattern", alpha)))
        if rank != told or not rank:
            raise ModelError(f"{name} lora A has rank {rank}, not the {told} of adapter_config.json")
        if not 0 < abs(alpha) < math.inf:
            raise ModelError(f"lora_alpha must be a number and not 0; it is {alpha} for {name}")
        part["alpha"] = alpha
    return parts, config, marks
