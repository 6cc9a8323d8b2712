"""LoRA: fine-tune by training two thin matrices beside each frozen weight (Hu et al. 2021, arXiv:2106.09685).

    y = W x + (alpha / rank) B A x        A (rank, in) is Gaussian, B (out, rank) is zero

What fine-tuning changes in W is close to low rank, so B A can hold it; B = 0 makes the start exactly W.

    apply_lora(model, rank=16)               # an A and a B for every linear layer; no output changes
    freeze_all_but_lora(model)               # ... train lora_parameters(model) ...
    save_lora(model, "out/my_adapter")       # a few MB, in PEFT's format
    load_lora(base_model, "out/my_adapter")  # and merge_lora(base_model) for the speed of the base
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from model.transformer import ModelError


class LoRA(nn.Module):
    """The update (alpha / rank) B A x of one linear layer: (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float | None = None,
                 dropout: float = 0.0, device=None):
        super().__init__()
        self.rank, self.dropout = rank, dropout
        self.alpha = float(rank if alpha is None else alpha)
        self.scaling = self.alpha / rank  # by rank: a learning rate found at one rank suits the others
        self.enabled = True  # see set_lora
        self.original = None  # the base weight, while merged; no buffer, since it belongs in no checkpoint
        # float32: an optimizer's small steps round away in bf16, and GradScaler refuses float16 gradients.
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.B = nn.Linear(rank, out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.normal_(self.A.weight, std=0.02)
        nn.init.zeros_(self.B.weight)  # one of the two must be zero; were both, neither would get a gradient

    def forward(self, x):
        if not torch.is_autocast_enabled(x.device.type):  # autocast does its own casting
            x = x.to(self.A.weight.dtype)
        x = self.A(F.dropout(x, self.dropout, self.training))  # (..., rank)
        return self.B(x * self.scaling)  # (..., out); scaled where it is thin


class LoRALinear(nn.Linear):
    """An nn.Linear with a child `lora`. Never constructed: `_inject` makes one of a layer that exists."""

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.lora.enabled or self.lora.original is not None:  # switched off, or already in the weight
            return y
        return (y + self.lora(x)).to(y.dtype)


@torch.no_grad()
def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The nearest product B A of two thin matrices, by truncated SVD (Eckart & Young 1936).

    matrix (out, in) -> B (out, rank), A (rank, in), and the share of the energy kept: the sum of sigma^2 over
    the `rank` largest singular values, divided by that over all. B and A each carry sqrt(sigma), the largest
    first. A zero matrix loses nothing: 1. Raises ModelError for a rank that the matrix can't have.
    """
    if not 0 < rank <= min(matrix.shape):
        raise ModelError(f"rank must be from 1 to {min(matrix.shape)}, not {rank}")
    u, sigma, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    root, energy = sigma[:rank].sqrt(), sigma.square()
    kept = (energy[:rank].sum() / energy.sum()).item() if energy.any() else 1.0
    return u[:, :rank] * root, root[:, None] * vh[:rank], kept


def _inject(linear: nn.Linear, rank: int, alpha: float | None, dropout: float) -> None:
    linear.lora = LoRA(linear.in_features, linear.out_features, rank, alpha, dropout, linear.weight.device)
    linear.lora.train(linear.training)  # born in training mode, it would drop out in an eval() model
    # The living object changes its class and nothing wraps it: `q_proj.weight` keeps its name and, for
    # all that refers to it (tied weights, optimizers), its identity. Unlike a patched forward, it pickles.
    linear.__class__ = LoRALinear


def _clean(name: str) -> str:
    """A module's name without what DDP and torch.compile put into it."""
    return re.sub(r"^(module\.)+|_orig_mod\.", "", name)


def _adapted(model: nn.Module, required: bool = True) -> dict[str, LoRALinear]:
    found = {_clean(name): m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if required and not found:
        raise ModelError("the model has no LoRA: call apply_lora or load_lora first")
    return found


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    # No subclasses: they have a forward of their own (quantized, fused), which the new class would discard.
    return {_clean(name): m for name, m in model.named_modules() if type(m) is nn.Linear and name}


def _select(linears: dict[str, nn.Linear], targets: str | list[str]) -> list[str]:
    """The names of the linear layers that target_modules means."""
    found = set()
    for target in [targets] if isinstance(targets, str) else targets or [""]:
        try:
            if target in ("all-linear", "square"):  # without the head: often the embedding too
                here = [name for name, layer in linears.items() if name.split(".")[-1] != "lm_head"
                        and (target == "all-linear" or layer.in_features == layer.out_features)]
            else:
                here = [name for name in linears if _ends(name, target)]
                here = here or [name for name in linears if re.fullmatch(target, name)]
        except re.error as error:
            raise ModelError(f"target_modules: {target!r} is no regular expression: {error}") from None
        if not here:
            there_is = ", ".join(dict.fromkeys(name.split(".")[-1] for name in linears)) or "none at all"
            raise ModelError(f"target_modules: {target!r} matches no linear layer; there is: {there_is}")
        found.update(here)
    return [name for name in linears if name in found]


def _ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")  # in whole parts: "q_proj" doesn't end in "proj"


def apply_lora(model: nn.Module, rank: int = 16, alpha: float | None = None, dropout: float = 0.0,
               target_modules: str | list[str] = "all-linear") -> list[str]:
    """Give layers of any model an adapter, in place; no output changes. Returns their names.

    target_modules, one or a list: "all-linear" (never lm_head), "square" (in = out, MiniMind's rule), the end
    of a name ("q_proj"), or a regular expression for the whole name. alpha None: rank, so a scale of 1.
    Raises ModelError: rank, alpha or dropout out of range, a target that matches nothing, LoRA there already.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"LoRA rank must be a whole number from 1 up, not {rank!r}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ModelError(f"LoRA alpha must be positive, not {alpha!r}")
    if not 0 <= dropout < 1:
        raise ModelError(f"LoRA dropout must be from 0 to below 1, not {dropout!r}")
    if _adapted(model, required=False):
        raise ModelError("the model has LoRA already: call remove_lora first")
    # First all the names, then the injection: a walk that injects as it goes meets LoRA's own A, which is
    # square too when rank = width, and never ends.
    linears = _linears(model)
    names = _select(linears, target_modules)
    width = max(min(linears[name].weight.shape) for name in names)
    if rank > width:
        raise ModelError(f"LoRA rank {rank} is above the width of the layers, {width}")
    for name in names:
        _inject(linears[name], rank, alpha, dropout)
    return names


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every A and B, for the optimizer."""
    for linear in _adapted(model).values():
        yield from linear.lora.parameters()


def freeze_all_but_lora(model: nn.Module) -> None:
    """Only A and B train. Call it before DDP wraps the model: DDP looks at requires_grad once."""
    lora = list(lora_parameters(model))
    model.requires_grad_(False)
    for parameter in lora:
        parameter.requires_grad_(True)


def count_line(model: nn.Module) -> str:
    """How many parameters there are and how few of them train, for a person to read."""
    total, lora = (sum(p.numel() for p in group) for group in (model.parameters(), lora_parameters(model)))
    return f"{total:,} parameters in all, {lora:,} LoRA, {100 * lora / total:.2f} %"


def set_lora(model: nn.Module, on: bool) -> None:
    """Switch the adapter on, or off: exactly the base model then (a merge is undone)."""
    if not on:
        unmerge_lora(model)
    for linear in _adapted(model).values():
        linear.lora.enabled = on


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """W <- W + (alpha / rank) B A: the adapted model at the speed of the base. A second call does nothing.

    The old W is kept: subtracting B A again would not give back the same bits. Raises ModelError, and merges
    nothing, where W is shared (an adapted lm_head tied to the embedding): both would change.
    """
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    adapted = _adapted(model).values()
    if shared := [" = ".join(names[linear.weight]) for linear in adapted if len(names[linear.weight]) > 1]:
        raise ModelError(f"LoRA can't be merged into a shared weight: {shared[0]}")
    for weight, lora in [(linear.weight, linear.lora) for linear in adapted]:
        lora.enabled = True
        if lora.original is None:
            lora.original = weight.detach().clone()
            weight.copy_(weight.float() + lora.scaling * lora.B.weight @ lora.A.weight)  # same Parameter


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Undo merge_lora, to the bit. Does nothing where nothing is merged."""
    for linear in _adapted(model).values():
        if linear.lora.original is not None:
            linear.weight.copy_(linear.lora.original)
            linear.lora.original = None


def remove_lora(model: nn.Module, keep_merged: bool = False) -> None:
    """Back to plain nn.Linear: the base model, or with keep_merged what merge_lora made of it."""
    for linear in _adapted(model, required=False).values():
        if not keep_merged:
            unmerge_lora(linear)
        del linear.lora
        linear.__class__ = nn.Linear


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


def _peft_targets(model: nn.Module) -> list[str]:
    """The shortest name endings that mean the adapted modules and no others, as ["o_proj", "q_proj"]."""
    names, adapted, targets = [_clean(name) for name, _ in model.named_modules()], _adapted(model), set()
    for name in adapted:
        endings = [name.split(".", n)[-1] for n in range(name.count("."), -1, -1)]
        exact = (e for e in endings if all(n in adapted for n in names if _ends(n, e)))
        targets.add(next(exact, name))
    return sorted(targets)


def _fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """Four values of each base weight. Unlike a hash, they still tell a model by its half-precision copy."""
    merged = {f"{name}.weight": linear.lora.original for name, linear in _adapted(model, False).items()}
    marks = {}
    for name, weight in model.named_parameters():
        name = _clean(name)
        if ".lora." not in name and weight.numel() and not weight.is_meta:
            weight = weight if merged.get(name) is None else merged[name]  # the base's own
            places = torch.tensor([1, 3, 5, 7], device=weight.device) * weight.numel() // 8
            marks[name] = [float(f"{x:.6g}") for x in weight.detach().reshape(-1)[places].tolist()]
    return marks


def save_lora(model: nn.Module, path: str | Path, base: str | Path | None = None, tokenizer=None,
              training: dict | None = None) -> None:
    """Write the adapter and nothing of the base: a PEFT folder, or one plain file where path ends in .pth.

    The folder: adapter_model.safetensors, adapter_config.json (`base`: where the base model lies), and where
    given, the tokenizer and training.json. The .pth: {"NAME.lora.A.weight": ...} alone; it has no place for
    alpha, so it holds B times alpha / rank. Each file is complete or absent; other files survive.
    """
    path, loras = Path(path), {name: linear.lora for name, linear in _adapted(model).items()}
    a, b = ({name: getattr(lora, key).weight.detach().cpu() for name, lora in loras.items()} for key in "AB")
    if path.suffix == ".pth":
        state = {f"{name}.lora.A.weight": a[name] for name in loras}
        state |= {f"{name}.lora.B.weight": b[name] * lora.scaling for name, lora in loras.items()}
        with _replacing(path.parent) as folder:
            torch.save(state, folder / path.name)
        return
    state = {f"base_model.model.{name}.lora_A.weight": a[name] for name in loras}
    state |= {f"base_model.model.{name}.lora_B.weight": b[name] for name in loras}
    first = next(iter(loras.values()))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "base_model_name_or_path": None if base is None else str(base),
        "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout,
        "target_modules": _peft_targets(model),
        # Layers unlike the first: an adapter that came from elsewhere may mix ranks.
        "rank_pattern": {name: lora.rank for name, lora in loras.items() if lora.rank != first.rank},
        "alpha_pattern": {name: lora.alpha for name, lora in loras.items() if lora.alpha != first.alpha},
    }
    # The fingerprint goes with the tensors: PEFT warns about keys in the config that it doesn't know.
    metadata = {"format": "pt", "base_fingerprint": json.dumps(_fingerprint(model))}
    with _replacing(path) as folder:
        (folder / "adapter_model.safetensors").write_bytes(save(state, metadata))  # save_file: mode 0600
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, content in {"training.json": training, "adapter_config.json": config}.items():
            if content is not None:
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _read_adapter(path: Path) -> tuple[dict, dict, dict, float]:
    """-> {name: {"A": (rank, in), "B": (out, rank)}}, {name: scaling}, the base's fingerprint, dropout."""
    config, marks, config_path = {"peft_type": "LORA"}, {}, path / "adapter_config.json"
    if not path.exists() or (path.is_dir() and not config_path.is_file()):
        raise ModelError(f"{config_path if path.is_dir() else path}: not found; no adapter here")
    try:
        if path.is_dir():
            config = json.loads(config_path.read_text(encoding="utf-8"))
            with safe_open(path / "adapter_model.safetensors", "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                marks = json.loads((file.metadata() or {}).get("base_fingerprint", "{}"))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file
        kind, state = config["peft_type"], dict(state)
    except Exception as error:  # a damaged file can raise a dozen types
        raise ModelError(f"{path}: damaged, or not an adapter ({type(error).__name__})") from None
    if kind != "LORA":
        raise ModelError(f"{path}: an adapter of type {kind}; only LORA can be loaded")

    parts, scalings, alphas = {}, {}, config.get("alpha_pattern") or {}
    for key, tensor in state.items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora[._]([AB])\.weight", _clean(str(key)))
        if not found or not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
            raise ModelError(f"{path}: {key!r} is no LoRA matrix; DoRA, biases and the like can't be loaded")
        parts.setdefault(found[1], {})[found[2]] = tensor.float()
    if not parts:
        raise ModelError(f"{path}: holds no LoRA matrices")
    for name, part in parts.items():
        if len(part) < 2:
            raise ModelError(f"{path}: {name} lacks its lora {'B' if 'A' in part else 'A'}")
        rank = len(part["A"])
        alpha = config.get("lora_alpha", rank)  # a plain file tells none: a scale of 1
        alpha = next((alphas[key] for key in alphas if re.fullmatch(rf"(.*\.)?({key})", name)), alpha)
        scalings[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return parts, scalings, marks, config.get("lora_dropout", 0.0)


@dataclass
class LoRAReport:
    """What load_lora did. relative_norm: |updates| / |the weights they change|; 0 changes nothing."""

    matched: int
    names: list[str]
    relative_norm: float


@torch.no_grad()
def load_lora(model: nn.Module, path: str | Path) -> LoRAReport:
    """Load an adapter: a PEFT folder, ours or PEFT's own, or a plain .pth, also an old one in half precision.

    A model without LoRA gets it where the adapter needs it; one with LoRA must have the same layers and ranks
    and keeps its alpha (B is rescaled where the file's differs). Raises ModelError, the model untouched, on a
    missing, surplus or misshapen matrix, another base model or a damaged file.
    """
    path = Path(path)
    parts, scalings, marks, dropout = _read_adapter(path)
    adapted = _adapted(model, required=False)
    linears = adapted or _linears(model)
    kind = "LoRA" if adapted else "linear"
    if missing := sorted(adapted.keys() - parts.keys()):
        raise ModelError(f"{path}: lacks {len(missing)} of the model's LoRA layers, as {missing[0]}")
    if surplus := sorted(parts.keys() - linears.keys()):
        raise ModelError(f"{path}: {len(surplus)} of its layers are no {kind} layers here, as {surplus[0]}")
    for name, part in parts.items():
        rank = adapted[name].lora.rank if adapted else len(part["A"])
        shapes = {"A": (rank, linears[name].in_features), "B": (linears[name].out_features, rank)}
        for key in "AB":
            if part[key].shape != shapes[key]:
                raise ModelError(f"{path}: {name} lora {key} is {tuple(part[key].shape)}, not {shapes[key]}")
    here = _fingerprint(model)
    for name in sorted(marks.keys() & here.keys()):  # not all: a quantized base has fewer plain weights
        # 2^-7: twice the rounding of bf16, and far below what training does to a weight
        if any(abs(a - b) > 2**-7 * abs(a) + 1e-6 for a, b in zip(marks[name], here[name], strict=True)):
            raise ModelError(f"{path}: made for another base model (other values in {name})")

    if adapted:
        unmerge_lora(model)
    update = weight = 0.0
    for name, part in parts.items():
        linear, a, b, scaling = linears[name], part["A"], part["B"], scalings[name]
        if not adapted:
            _inject(linear, len(a), scaling * len(a), dropout)
        linear.lora.A.weight.copy_(a)
        linear.lora.B.weight.copy_(b * (scaling / linear.lora.scaling))
        update += scaling**2 * ((b.T @ b) * (a @ a.T)).sum().item()  # = |scaling B A|^2 without making B A
        weight += linear.weight.float().square().sum().item()
    return LoRAReport(len(parts), sorted(parts), math.sqrt(max(update, 0.0) / max(weight, 1e-30)))
