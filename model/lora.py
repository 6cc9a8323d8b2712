"""LoRA: fine-tune by training two thin matrices beside each frozen weight (Hu et al. 2021, arXiv:2106.09685).

    y = W x + (alpha / rank) B A x        A (rank, in) is Gaussian, B (out, rank) is zero

What fine-tuning changes in W is close to low rank, so B A can hold it; B = 0 makes the start exactly W.
W may be a plain linear layer's or, in 4 bits, an NF4Linear's (QLoRA).

    apply_lora(model, rank=16)               # an A and a B for every linear layer; no output changes
    freeze_all_but_lora(model)               # ... train lora_parameters(model) ...
    save_lora(model, "out/my_adapter")       # a few MB, in PEFT's format
    load_lora(base_model, "out/my_adapter")  # and merge_lora(base_model) for the speed of the base

Several adapters on one model: model/adapters.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model.adapter_files import (
    check_shapes,
    fingerprint,
    other_base,
    read_adapter,
    select_layers,
    write_adapter,
    write_plain,
)
from model.files import clean
from model.quantize import Int8Linear, NF4Linear
from model.transformer import ModelError, count_parameters, matmul_dtype


class LoRA(nn.Module):
    """The update (alpha / rank) B A x of one linear layer: (..., in) -> (..., out).

    rslora: alpha / sqrt(rank) instead, under which high ranks learn as fast as low ones (Kalajdzievski 2023,
    arXiv:2312.03732).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float | None = None,
                 dropout: float = 0.0, rslora: bool = False, device=None):
        super().__init__()
        self.rank, self.dropout, self.rslora = rank, dropout, rslora
        self.alpha = float(rank if alpha is None else alpha)
        self.scaling = self.alpha / (math.sqrt(rank) if rslora else rank)
        self.enabled = True  # see set_lora
        self.original = None  # the base weight, while merged; no buffer, since it belongs in no checkpoint
        # float32: an optimizer's small steps round away in bf16, and GradScaler refuses float16 gradients.
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.B = nn.Linear(rank, out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.normal_(self.A.weight, std=0.02)
        nn.init.zeros_(self.B.weight)  # one of the two must be zero; were both, neither would get a gradient
        # Where B A does not start at zero (PiSSA), what it started at. No parameters: they never change.
        self.register_buffer("A0", None, persistent=False)
        self.register_buffer("B0", None, persistent=False)

    @property
    def active(self) -> bool:
        return self.enabled and self.original is None  # switched on, and not in the weight already

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """B (out, r) and A (r, in) of the update: r = rank, or 2 rank for B A - B0 A0."""
        b, a = self.B.weight, self.A.weight
        if self.B0 is not None:
            b, a = torch.cat((b, -self.B0), dim=1), torch.cat((a, self.A0))
        return b.to(dtype), a.to(dtype)

    def forward(self, x):
        b, a = self.factors(matmul_dtype(x))
        x = F.linear(F.dropout(x.to(a.dtype), self.dropout, self.training), a)  # (..., rank)
        return F.linear(x * self.scaling, b)  # (..., out); scaled where it is thin


class _LoRAMatMul(torch.autograd.Function):
    """W x + bias + scaling B A x for a frozen W, all of one dtype: (..., in) -> (..., out).

    What autograd makes of the plain formula, in fewer passes over the wide tensors: the matrix product with B
    adds itself to W x, and the one that takes the gradient back through A to what came back through W.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        ctx.scaling, rows = scaling, x.reshape(-1, x.size(-1))  # (N, in)
        h = F.linear(rows, a)  # (N, rank)
        ctx.save_for_backward(rows, h, weight, a, b)  # rows for A's gradient: W has none
        y = F.linear(rows, weight, bias).addmm_(h, b.t(), alpha=scaling)  # (N, out)
        return y.view(*x.shape[:-1], y.size(-1))

    @staticmethod
    def backward(ctx, grad):
        rows, h, weight, a, b = ctx.saved_tensors
        dx, dy = None, grad.reshape(-1, grad.size(-1))  # (N, out)
        dh = (dy @ b) * ctx.scaling  # (N, rank)
        if ctx.needs_input_grad[0]:  # the first block's q, k and v have nothing to train before them
            dx = (dy @ weight).addmm_(dh, a).view(*grad.shape[:-1], weight.size(-1))
        return dx, None, None, dh.t() @ rows, (dy.t() @ h) * ctx.scaling, None


class LoRALinear(nn.Linear):
    """An nn.Linear with a child `lora`. Never constructed: `_inject` makes one of a layer that exists."""

    def forward(self, x):
        lora = self.lora
        if not lora.active:
            return F.linear(x, self.weight, self.bias)
        # _LoRAMatMul is for a frozen W and one LoRA without dropout; model/adapters.py's RowLoRA has many.
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters(recurse=False))
        if trains or not isinstance(lora, LoRA) or (lora.dropout and lora.training):
            return F.linear(x, self.weight, self.bias) + lora(x)
        b, a = lora.factors(matmul_dtype(x))
        bias = None if self.bias is None else self.bias.to(a.dtype)
        return _LoRAMatMul.apply(x.to(a.dtype), self.weight.to(a.dtype), bias, a, b, lora.scaling)


class _OverQuantized:
    """What a quantized layer gives, plus what its child `lora` does."""

    def forward(self, x):
        y = super().forward(x)
        return y + self.lora(x) if self.lora.active else y


class LoRANF4Linear(_OverQuantized, NF4Linear):
    """The same for a layer whose weight is held in 4 bits, to train."""


class LoRAInt8Linear(_OverQuantized, Int8Linear):
    """And in 8 bits, to decode with an adapter."""


_WITH_LORA = {nn.Linear: LoRALinear, NF4Linear: LoRANF4Linear, Int8Linear: LoRAInt8Linear}
_WITHOUT_LORA = {adapted: plain for plain, adapted in _WITH_LORA.items()}


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


def _inject(linear: nn.Module, lora: nn.Module) -> None:
    linear.lora = lora.train(linear.training)  # born in training mode, it would drop out in an eval() model
    # The living object changes its class and nothing wraps it: `q_proj.weight` keeps its name and, for
    # all that refers to it (tied weights, optimizers), its identity. Unlike a patched forward, it pickles.
    linear.__class__ = _WITH_LORA.get(type(linear), type(linear))


def _new_lora(linear: nn.Module, *arguments) -> LoRA:
    return LoRA(linear.in_features, linear.out_features, *arguments, device=next(linear.parameters()).device)


def _base_weight(linear: nn.Module) -> torch.Tensor:
    """W (out, in) in float32, whatever holds it and whether or not an adapter is merged into it."""
    if isinstance(linear, (NF4Linear, Int8Linear)):
        return linear.dequantize()
    lora = getattr(linear, "lora", None)
    return (linear.weight if lora is None or lora.original is None else lora.original).detach().float()


def _adapted(model: nn.Module, required: bool = True) -> dict[str, LoRALinear | _OverQuantized]:
    found = {clean(name): m for name, m in model.named_modules() if type(m) in _WITHOUT_LORA}
    if required and not found:
        raise ModelError("the model has no LoRA: call apply_lora or load_lora first")
    return found


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    # No other subclasses: they have a forward of their own (fused, say), which the new class would discard.
    kinds = {*_WITH_LORA, *_WITHOUT_LORA}
    return {clean(name): m for name, m in model.named_modules()
            if type(m) in kinds and name and ".lora." not in f".{name}."}


def apply_lora(model: nn.Module, rank: int = 16, alpha: float | None = None, dropout: float = 0.0,
               target_modules: str | list[str] = "all-linear", rslora: bool = False,
               init: str = "gaussian") -> list[str]:
    """Give layers of any model an adapter, in place; no output changes. Returns their names.

    target_modules, one or a list: "all-linear" (never lm_head), "square" (in = out, MiniMind's rule), the end
    of a name ("q_proj"), or a regular expression for the whole name. alpha None: rank, so a scale of 1.
    rslora: see LoRA. init: "gaussian", or "pissa": A and B start as W's largest singular vectors, where there
    is most to change (Meng et al. 2024, arXiv:2404.02948), and outputs stay the same to float rounding.
    Raises ModelError: rank, alpha or dropout out of range, a target that matches nothing, LoRA there already.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"LoRA rank must be a whole number from 1 up, not {rank!r}")
    if alpha is not None and not 0 < alpha <= 1e6:
        raise ModelError(f"LoRA alpha must be above 0 and at most 1e6, not {alpha!r}")
    if not 0 <= dropout < 1:
        raise ModelError(f"LoRA dropout must be from 0 to below 1, not {dropout!r}")
    if init not in ("gaussian", "pissa"):
        raise ModelError(f"LoRA init must be gaussian or pissa, not {init!r}")
    if _adapted(model, required=False):
        raise ModelError("the model has LoRA already: call remove_lora first")
    # First all the names, then the injection: a walk that injects as it goes meets LoRA's own A, which is
    # square too when rank = width, and never ends.
    linears = _linears(model)
    names = select_layers(linears, target_modules)
    widths = [min(linears[name].in_features, linears[name].out_features) for name in names]
    width = min(widths) if init == "pissa" else max(widths)  # W has no more singular vectors than that
    if rank > width:
        raise ModelError(f"LoRA rank {rank} is above the width of the layers, {width}")
    for name in names:
        lora = _new_lora(linears[name], rank, alpha, dropout, rslora)
        if init == "pissa":
            _start_at_singular_vectors(lora, _base_weight(linears[name]))
        _inject(linears[name], lora)
    return names


@torch.no_grad()
def _start_at_singular_vectors(lora: LoRA, weight: torch.Tensor) -> None:
    """scaling B A becomes the nearest to `weight` (out, in) of its rank.

    The paper trains B A beside the rest, W - B0 A0. Here W stays and the update is B A - B0 A0, which is the
    same function: the base keeps its bits and other adapters their base, for one more thin product.
    """
    lora.B0, lora.A0, _ = low_rank(weight / lora.scaling, lora.rank)
    lora.B.weight.copy_(lora.B0)
    lora.A.weight.copy_(lora.A0)


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


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen matrices in the type that the forward pass computes in: nothing adds small updates to
    them. Norms and biases, which are few, stay as they are, and so do 4-bit weights."""
    for weight in model.parameters():
        if not weight.requires_grad and weight.is_floating_point() and weight.ndim == 2:
            weight.data = weight.data.to(dtype)  # the same Parameter: embedding and head may share it


def count_line(model: nn.Module) -> str:
    """How many parameters there are and how few of them train, for a person to read."""
    total, lora = count_parameters(model), sum(p.numel() for p in lora_parameters(model))
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
    nothing, where W is in 4 bits, or shared (an adapted lm_head tied to the embedding): both would change.
    """
    names, adapted = {}, _adapted(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, linear in adapted.items():
        if isinstance(linear, (NF4Linear, Int8Linear)):
            bits = 4 if isinstance(linear, NF4Linear) else 8
            raise ModelError(f"LoRA can't be merged into {bits}-bit weights ({name}): "
                             "use scripts/merge_lora.py")
        if len(shared := names[linear.weight]) > 1:
            raise ModelError(f"LoRA can't be merged into a shared weight: {' = '.join(shared)}")
    factors = {name: linear.lora.factors() for name, linear in adapted.items()}
    for name, linear in adapted.items():
        lora, weight, (b, a) = linear.lora, linear.weight, factors[name]
        lora.enabled = True
        if lora.original is None:
            lora.original = weight.detach().clone()
            weight.copy_(weight.float() + lora.scaling * b @ a)  # same Parameter


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Undo merge_lora, to the bit. Does nothing where nothing is merged."""
    for linear in _adapted(model).values():
        if linear.lora.original is not None:
            linear.weight.copy_(linear.lora.original)
            linear.lora.original = None


def remove_lora(model: nn.Module, keep_merged: bool = False) -> None:
    """Back to plain layers: the base model, or with keep_merged what merge_lora made of it."""
    for linear in _adapted(model, required=False).values():
        if not keep_merged:
            unmerge_lora(linear)
        del linear.lora
        linear.__class__ = _WITHOUT_LORA[type(linear)]


def _base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is not LoRA's, as it is without a merge."""
    weights = {clean(name): p for name, p in model.named_parameters() if ".lora." not in name}
    merged = {f"{name}.weight": linear.lora.original for name, linear in _adapted(model, False).items()}
    return weights | {name: weight for name, weight in merged.items() if weight is not None}


def save_lora(model: nn.Module, path: str | Path, base: str | Path | None = None, tokenizer=None,
              training: dict | None = None) -> None:
    """Write the adapter and nothing of the base: a PEFT folder, or one plain file where path ends in .pth.

    The folder: adapter_model.safetensors, adapter_config.json (`base`: where the base model lies), and where
    given, the tokenizer and training.json. The .pth: {"NAME.lora.A.weight": ...} alone; it has no place for
    alpha, so it holds B times alpha / rank. Each file is complete or absent; other files survive. Raises
    ModelError, and writes nothing, where A or B hold NaN or infinity.
    """
    path, loras = Path(path), {name: linear.lora for name, linear in _adapted(model).items()}
    if path.suffix == ".pth":
        return write_plain(path, loras)
    modules, marks = [clean(name) for name, _ in model.named_modules()], fingerprint(_base_weights(model))
    write_adapter(path, loras, modules, marks, base, tokenizer, training)


def read_lora(model: nn.Module, path: str | Path) -> dict[str, LoRA]:
    """{name: the LoRA of that layer} of an adapter that fits the model, which stays as it is.

    A PEFT folder, ours or PEFT's own, or a plain .pth, also an old one in half precision. Raises ModelError:
    a missing or misshapen matrix, a layer that isn't here, another base model, a damaged file.
    """
    parts, marks = read_adapter(Path(path))
    linears = _linears(model)
    check_shapes(parts, linears, path)
    if name := other_base(marks, fingerprint(_base_weights(model))):
        raise ModelError(f"{path}: made for another base model (other values in {name})")
    loras = {}
    for name, part in parts.items():
        loras[name] = _new_lora(linears[name], len(part["A"]), part["alpha"], part["dropout"], part["rslora"])
        loras[name].A.weight.data.copy_(part["A"])
        loras[name].B.weight.data.copy_(part["B"])
    return loras


@dataclass
class LoRAReport:
    """What load_lora did. relative_norm: |updates| / |the weights they change|; 0 changes nothing."""

    matched: int
    names: list[str]
    relative_norm: float


@torch.no_grad()
def load_lora(model: nn.Module, path: str | Path) -> LoRAReport:
    """Load an adapter (see read_lora) and put it to use.

    A model without LoRA gets it where the adapter needs it; one with LoRA must have the same layers and ranks
    and keeps its alpha (B is rescaled where the file's differs). Raises ModelError as read_lora does, and for
    missing layers or other ranks; the model is untouched then.
    """
    adapted, loras, linears = _adapted(model, required=False), read_lora(model, path), _linears(model)
    if missing := sorted(adapted.keys() - loras.keys()):
        raise ModelError(f"{path}: lacks {len(missing)} of the model's LoRA layers, as {missing[0]}")
    for name, lora in loras.items() if adapted else ():
        if name not in adapted:
            raise ModelError(f"{path}: has a layer that is no LoRA layer here, {name}")
        if (rank := adapted[name].lora.rank) != lora.rank:
            raise ModelError(f"{path}: {name} lora A is {(lora.rank, linears[name].in_features)}, "
                             f"not {(rank, linears[name].in_features)}")
    if adapted:
        unmerge_lora(model)
    for name, lora in loras.items():
        if not adapted:
            _inject(linears[name], lora)
            continue
        mine = adapted[name].lora
        mine.A.weight.copy_(lora.A.weight)
        mine.B.weight.copy_(lora.B.weight * (lora.scaling / mine.scaling))
        mine.A0 = mine.B0 = None
    return report_lora(model)


def report_lora(model: nn.Module) -> LoRAReport:
    """How much the adapter in use changes."""
    update = weight = 0.0
    adapted = _adapted(model)
    for linear in adapted.values():
        b, a = (part.detach() for part in linear.lora.factors())
        # |scaling B A|^2 without making B A
        update += linear.lora.scaling**2 * ((b.T @ b) * (a @ a.T)).sum().item()
        weight += _base_weight(linear).square().sum().item()
    return LoRAReport(len(adapted), sorted(adapted), math.sqrt(max(update, 0.0) / max(weight, 1e-30)))
