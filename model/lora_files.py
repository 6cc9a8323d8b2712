"""Adapters on disk: PEFT's folders, and plain .pth files. A reader may skip this file.

    adapter_model.safetensors   base_model.model.NAME.lora_A.weight (rank, in), ...lora_B.weight (out, rank)
    adapter_config.json         r, lora_alpha, target_modules, ...

    x.pth                       {"NAME.lora.A.weight": ..., "NAME.lora.B.weight": ...}, nothing else

NAME is the name of a layer. `rank` is the width of A and of B, as everywhere in the files of LoRA.
"""

import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from common import files
from common.errors import ModelError
from model.expert_files import FusedLoRA, fuse_adapter, peft_names, split_adapter
from model.gguf import read_adapter_file
from model.gguf_file import is_gguf
from model.low_rank import base_weight
from model.rope_scaling import check_same_scaling
from model.tokenizer_files import write_tokenizer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The settings of PEFT that are obeyed here, and those that do not change what an adapter computes. Any other
# setting (use_dora, modules_to_save, layer_replication, or one that a later PEFT invents) is refused. So is
# any other init_lora_weights (pissa, olora, loftq, ...): PEFT may have changed the base before it trained.
OBEYED_SETTINGS = {"peft_type", "init_lora_weights", "r", "lora_alpha", "lora_dropout", "use_rslora",
                   "rank_pattern", "alpha_pattern"}
HARMLESS_SETTINGS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
                     "inference_mode", "target_modules", "exclude_modules", "layers_to_transform",
                     "layers_pattern", "fan_in_fan_out", "megatron_config", "megatron_core",
                     "qalora_group_size", "loftq_config", "runtime_config", "ensure_weight_tying"}
HARMLESS_INITS = {"none", "true", "false", "gaussian", "orthogonal", "mica"}
BASE_FROM_HERE = "base_from_here"  # in the metadata: the path of the base, seen from the adapter's folder
RELATIVE_TOLERANCE = 2**-7  # twice the rounding of bfloat16, and far less than what training does to a weight
MAX_REPEATS_IN_PATTERN = 2  # signs * + { in a stranger's regular expression; more may take forever to match


# --- target_modules: from the words of a person to the names of layers, and back ----------------------------


def select_layers(layers: dict[str, nn.Module], targets: str | list[str]) -> list[str]:
    """The names of the layers that target_modules means (see apply_lora). Raises ModelError for none."""
    targets = [targets] if isinstance(targets, str) else targets
    selected = set()
    for target in targets or [""]:  # an empty list is refused like a name that no layer has
        try:
            names = layers_of_target(layers, target)
        except re.error as error:
            raise ModelError(f"target_modules: {target!r} is no regular expression: {error}") from None
        if not names:
            there_is = ", ".join(dict.fromkeys(name.split(".")[-1] for name in layers)) or "none at all"
            raise ModelError(f"target_modules: {target!r} matches no linear layer; there is: {there_is}")
        selected.update(names)
    return [name for name in layers if name in selected]


def layers_of_target(layers: dict[str, nn.Module], target: str) -> list[str]:
    """The names of the layers that one target means; an empty list where it means none."""
    without_head = [name for name in layers if not ends(name, "lm_head")]  # often the embedding, too
    if target == "all-linear":
        return without_head
    if target == "square":
        return [name for name in without_head if layers[name].in_features == layers[name].out_features]
    names = [name for name in layers if ends(name, target)]
    return names or [name for name in layers if re.fullmatch(target, name)]


def ends(name: str, ending: str) -> bool:
    """Whether a name ends so, in whole parts: "mlp.up_proj" ends in "up_proj", but not in "proj"."""
    return f".{name}".endswith(f".{ending}")


def shortest_ending(name: str, adapted: dict, modules: list[str]) -> str:
    """The shortest ending of an adapted layer's name that no other module has, except adapted layers."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        ending = ".".join(parts[-length:])
        if all(module in adapted for module in modules if ends(module, ending)):
            return ending
    return name


# --- which base an adapter belongs to -----------------------------------------------------------------------


def base_marks(model: nn.Module) -> dict[str, list[float]]:
    """Four values of each weight of the base, as it is without a merge.

    From these values the base can be recognised in a half-precision copy, too, which a hash cannot do.
    """
    weights = {name: weight for name, weight in model.named_parameters() if ".lora." not in name}
    for name, module in model.named_modules():
        if name.endswith(".lora") and getattr(module, "original", None) is not None:  # merged into the weight
            weights[name.removesuffix("lora") + "weight"] = module.original
    marks = {}
    for name, weight in weights.items():
        if weight.numel() and not weight.is_meta:
            places = torch.tensor([1, 3, 5, 7], device=weight.device) * weight.numel() // 8
            values = weight.detach().reshape(-1)[places].tolist()
            marks[files.without_wrappers(name)] = [float(f"{value:.6g}") for value in values]
    return marks


def base_of(path: Path) -> Path | None:
    """Where the base of an adapter lies: a model that was moved together with it, or the path as it was.

    None where neither exists, or where the adapter names no base, as in a .pth file.
    """
    _, metadata = files.read_safetensors(path / WEIGHTS) if (path / WEIGHTS).is_file() else ({}, {})
    as_it_was = files.read_json_if_there(path / CONFIG).get("base_model_name_or_path")
    places = [path / metadata[BASE_FROM_HERE]] if BASE_FROM_HERE in metadata else []
    places += [Path(as_it_was)] if isinstance(as_it_was, str) and as_it_was else []
    return next((place for place in places if place.exists()), None)


def check_base(marks: dict, marks_here: dict) -> None:
    """Raises ModelError where the marks of an adapter's base differ from those of the base here.

    Only names that both have are compared, because of a quantized base only the plain weights are known.
    """
    for name in sorted(marks.keys() & marks_here.keys()):
        for value, here in zip(marks[name], marks_here[name], strict=False):
            if abs(float(value) - here) > RELATIVE_TOLERANCE * abs(float(value)) + 1e-6:
                raise ModelError(f"made for another base model (other values in {name})")


# --- writing ------------------------------------------------------------------------------------------------


def write_adapter(path: Path, loras: dict, model: nn.Module, base, tokenizer, training) -> None:
    """loras {layer name: LoRA} -> a PEFT folder, or a plain file where path ends in .pth (see save_lora)."""
    if path.suffix == ".pth":
        state = _tensors(loras, "{}.lora.{}.weight")
        for name, lora in loras.items():
            state[f"{name}.lora.B.weight"] = state[f"{name}.lora.B.weight"] * lora.scaling
        with files.writing(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
        return
    if path.is_file():
        raise ModelError(f"{path} is a file; an adapter is saved as a folder, or as a file that ends in .pth")
    files.keep_apart(path, "config.json", "a model")
    loras = fuse_adapter(loras, _num_experts(model))  # PEFT has one LoRA for all experts
    peft_name = peft_names(loras)
    state = _tensors({peft_name[name]: lora for name, lora in loras.items()},
                     "base_model.model.{}.lora_{}.weight")
    # The marks lie beside the tensors, because PEFT warns about keys in the config that it does not know.
    metadata = {"format": "pt", "base_fingerprint": json.dumps(base_marks(model))}
    if scaling := getattr(getattr(model, "config", None), "rope_scaling", None):
        metadata["rope_scaling"] = json.dumps(scaling)
    if base is not None and Path(base).exists():
        # Two paths, see `base_of`. The config has the absolute one: PEFT looks for a relative path from the
        # folder in which its user happens to stand.
        base = Path(base).resolve()
        metadata[BASE_FROM_HERE] = Path(os.path.relpath(base, path.resolve())).as_posix()
    with files.writing(path, last=(CONFIG, "training.json")) as temporary:
        temporary.mkdir()
        save_file(state, temporary / WEIGHTS, metadata)
        if tokenizer is not None:
            write_tokenizer(tokenizer, temporary)
        (temporary / CONFIG).write_bytes(files.json_text(_peft_config(loras, model, base)).encode("utf-8"))
        if training is not None:
            (temporary / "training.json").write_bytes(files.json_text(training).encode("utf-8"))


def _tensors(loras: dict[str, nn.Module], key: str) -> dict[str, torch.Tensor]:
    """{key with the name and A or B filled in: matrix}, on the CPU. Raises ModelError for NaN or infinity."""
    tensors = {}
    for name, lora in loras.items():
        for a_or_b, matrix in zip("BA", lora.factors(), strict=True):
            tensors[key.format(name, a_or_b)] = matrix.detach().cpu().contiguous()
    files.check_finite(tensors, "save the adapter")
    return tensors


def _num_experts(model: nn.Module) -> int:
    """0 for a model without experts, and for a module that is no CausalLM."""
    return getattr(getattr(model, "config", None), "num_experts", 0)


def _peft_config(loras: dict[str, nn.Module], model: nn.Module, base) -> dict:
    """The content of adapter_config.json. base: the path of the base model, or None."""
    modules = [files.without_wrappers(name) for name, _ in model.named_modules()]
    # PEFT reaches what is no layer of its model as a parameter: the fused tensors. In a model with experts it
    # takes the names of their matrices for fused ones everywhere. So dense layers of these names are stored
    # as parameters, too.
    parameters = {name: name for name, lora in loras.items() if isinstance(lora, FusedLoRA)}
    if _num_experts(model):
        parameters |= {name: f"{name}.weight" for name in loras if re.search(r"\.mlp\.\w+_proj$", name)}
    layers = [name for name in loras if name not in parameters]
    first, first_lora = next(iter(loras.items()))
    ranks = {name: len(lora.factors()[1]) // getattr(lora, "num_experts", 1) for name, lora in loras.items()}
    # PiSSA's B A - B0 A0 is stored as one product of twice the rank. alpha grows likewise, so that the factor
    # alpha / rank, or alpha / sqrt(rank), stays the same.
    alphas = {name: lora.alpha * (ranks[name] / lora.rank) ** (0.5 if lora.rslora else 1)
              for name, lora in loras.items()}
    # Some programs, such as vLLM, take only a whole number for a whole number.
    alphas = {name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in alphas.items()}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "r": ranks[first], "lora_alpha": alphas[first], "use_rslora": first_lora.rslora,
        "lora_dropout": first_lora.dropout,
        "target_modules": sorted({shortest_ending(name, layers, modules) for name in layers}),
        **({"target_parameters": sorted(parameters.values())} if parameters else {}),
        # The layers that are unlike the first one: an adapter from elsewhere may mix ranks.
        "rank_pattern": {parameters.get(name, name): rank for name, rank in ranks.items()
                         if rank != ranks[first]},
        "alpha_pattern": {parameters.get(name, name): alpha for name, alpha in alphas.items()
                          if alpha != alphas[first]},
        "base_model_name_or_path": None if base is None else str(base),
    }


# --- reading ------------------------------------------------------------------------------------------------


def read_adapter(path: Path, model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, dict]:
    """-> {layer name: {"A": (rank, in), "B": (out, rank), "alpha", "dropout", "rslora"}}.

    layers: all linear layers of the model. Runs no code of the file. Raises ModelError for a file that is
    missing, damaged or no LoRA adapter, for layers or shapes that the model does not have, and for an adapter
    of another base model.
    """
    marks_here = base_marks(model)
    with files.explained(path):
        config, metadata = {}, {}
        if path.is_dir():
            config = files.read_json(path / CONFIG)
            if config.get("target_parameters") and not _num_experts(model):
                raise ModelError(f"{CONFIG} sets target_parameters to parts of experts: this model has none")
            # The names of the tensors say which experts target_parameters are of.
            _check_config({key: value for key, value in config.items() if key != "target_parameters"})
            if not (path / WEIGHTS).is_file():
                raise ModelError(f"{WEIGHTS} is missing (a pickled adapter_model.bin is not read)")
            state, metadata = files.read_safetensors(path / WEIGHTS)
            state = files.with_plain_names(state)
        elif is_gguf(path):
            state = read_adapter_file(path, model.config)
        else:
            state = files.read_state_dict(path)
        parts = _parts(_without_copies(state, layers), config, model)
        _check_shapes(parts, layers)
        check_base(json.loads(metadata.get("base_fingerprint", "{}")), marks_here)
        if "rope_scaling" in metadata:
            check_same_scaling(json.loads(metadata["rope_scaling"]), model.config)
    return parts


def _without_copies(state: dict[str, torch.Tensor], layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The tensors without copies of the base's weights, which PEFT stores beside an adapter over lm_head.

    Raises ModelError where a copy differs from the base here.
    """
    kept = {}
    for key, tensor in state.items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.{1,200})\.base_layer\.weight", key)
        if not found or found[1] not in layers:
            kept[key] = tensor
        elif isinstance(layers[found[1]], nn.Linear):  # of a quantized layer the plain weights are not known
            there, here = tensor.float(), base_weight(layers[found[1]]).cpu()
            if there.shape != here.shape or not torch.allclose(there, here, RELATIVE_TOLERANCE, 1e-6):
                raise ModelError(f"made for another base model (other values in {found[1]})")
    return kept


def _parts(state: dict[str, torch.Tensor], config: dict, model: nn.Module) -> dict[str, dict]:
    """What read_adapter returns, made of the tensors, in float32, and the config. Raises ModelError."""
    parts, num_experts = {}, _num_experts(model)
    for key, tensor in state.items():
        # A state dict that PEFT did not save itself still names the adapter, which is called "default".
        pattern = r"(?:base_model\.model\.)?(.{1,200})\.lora[._]([AB])(?:\.default)?\.weight"
        found = re.fullmatch(pattern, key)
        if not found or tensor.ndim != 2 or not tensor.is_floating_point():
            raise ModelError(f"{key[:200]!r} is no LoRA matrix; DoRA, biases and the like can't be loaded")
        name, a_or_b = found.groups()
        files.check_finite({key: tensor.float()}, "load")
        if a_or_b in parts.setdefault(name, {}):
            raise ModelError(f"{name} has lora {a_or_b} twice, under two names")
        parts[name][a_or_b] = tensor.float()
    if not parts:
        raise ModelError("holds no LoRA matrices")
    for name, part in parts.items():
        if len(part) < 2:
            raise ModelError(f"{name} lacks its lora {'B' if 'A' in part else 'A'}")
    found = {}
    for name, part in parts.items():
        if re.search(r"\.mlp\.experts(\.base_layer)?$", name) and num_experts:
            fused, of_experts = split_adapter(name, part["A"], part["B"], num_experts,
                                              model.config.expert_size)
            rank = len(part["A"]) // num_experts
            settings = _settings_of_layer(config, fused, rank)
            for layer, matrices in of_experts.items():
                # A part of the rank, with the same scaling: alpha / rank, or alpha / sqrt(rank)
                smaller = (len(matrices["A"]) / rank) ** (0.5 if settings["rslora"] else 1)
                found[layer] = matrices | settings | {"alpha": settings["alpha"] * smaller}
        else:
            found[name] = part | _settings_of_layer(config, name, len(part["A"]))
    return found


def _settings_of_layer(config: dict, name: str, rank: int) -> dict:
    """{"alpha", "dropout", "rslora"} of a layer. A .pth has no config, so its alpha is the rank of A."""
    config_rank = _of_layer(config, "rank_pattern", name, config.get("r", rank))
    alpha = _of_layer(config, "alpha_pattern", name, config.get("lora_alpha", rank))
    if rank != config_rank or not rank:
        raise ModelError(f"{name} lora A has rank {rank}, not the {config_rank} of {CONFIG}")
    if not 0 < abs(alpha) < math.inf:
        raise ModelError(f"lora_alpha must be a number and not 0; it is {alpha} for {name}")
    dropout = config.get("lora_dropout", 0.0)
    return {"alpha": alpha, "dropout": dropout, "rslora": bool(config.get("use_rslora"))}


def _of_layer(config: dict, key: str, name: str, default):
    """The value that rank_pattern or alpha_pattern has for a layer. As in PEFT, the first match counts."""
    for pattern, value in (config.get(key) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name) or re.fullmatch(pattern, f"{name}.weight"):
            return value
    return default


def _check_shapes(parts: dict[str, dict], layers: dict[str, nn.Module]) -> None:
    """Raises ModelError where the matrices of a file do not fit the linear layers of the model."""
    if surplus := sorted(parts.keys() - layers.keys()):
        raise ModelError(f"{len(surplus)} of its layers are no linear layers here, as {surplus[0]}")
    for name, part in parts.items():
        layer, rank = layers[name], len(part["A"])
        for key, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
            if part[key].shape != shape:
                raise ModelError(f"{name} lora {key} is {tuple(part[key].shape)}, not {shape}")


def check_same_layers(path: str | Path, loras: dict, loras_here: dict) -> None:
    """Raises ModelError where the LoRA of a file and the LoRA here differ in their layers or ranks."""
    if missing := sorted(loras_here.keys() - loras.keys()):
        raise ModelError(f"{path}: lacks {len(missing)} of the model's LoRA layers, as {missing[0]}")
    for name, lora in loras.items():
        if name not in loras_here:
            raise ModelError(f"{path}: has a layer that is no LoRA layer here, {name}")
        if lora.rank != loras_here[name].rank:
            raise ModelError(f"{path}: {name} has LoRA rank {lora.rank}, not {loras_here[name].rank} as here")


def _check_config(config: dict) -> None:
    """Raises ModelError for an adapter_config.json that asks for more than LoRA, or that makes no sense."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"an adapter of type {config.get('peft_type')}; only LORA can be loaded")
    for key, value in config.items():
        if value and key not in OBEYED_SETTINGS | HARMLESS_SETTINGS and (key, value) != ("bias", "none"):
            raise ModelError(f"{CONFIG} sets {key} to {str(value)[:50]}: not supported, only plain LoRA is")
    init = str(config.get("init_lora_weights"))[:50]
    if init.lower() not in HARMLESS_INITS:
        line = f"init_lora_weights {init} may go with a base that PEFT changed: save it again with PEFT's"
        raise ModelError(f"{line} path_initial_model_for_weight_conversion")
    if config.get("use_rslora") not in (None, False, True):
        raise ModelError(f"use_rslora must be true or false in {CONFIG}")
    settings, number = {"lora_dropout": 0.0} | config, (int, float)
    for key, kind in (("r", int), ("lora_alpha", number), ("lora_dropout", number)):
        value = settings.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelError(f"{key} must be a number in {CONFIG}, not {str(value)[:50]!r}")
    if not 0 <= settings["lora_dropout"] < 1:
        raise ModelError(f"lora_dropout must be from 0 to below 1, not {settings['lora_dropout']}")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        values = patterns.values() if isinstance(patterns, dict) else [None]
        if not all(isinstance(value, number) and not isinstance(value, bool) for value in values):
            raise ModelError(f"{key} must give a number for each name in {CONFIG}")
        for pattern in patterns:
            # The first search finds a group that is repeated, as in (a+)+b.
            if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > MAX_REPEATS_IN_PATTERN:
                raise ModelError(f"{key}: {pattern[:50]!r} is too involved a pattern; name the layers")
