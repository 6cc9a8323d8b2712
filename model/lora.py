"""LoRA: fine-tuning by two thin matrices beside each frozen weight (Hu et al. 2021, arXiv:2106.09685).

    y = W x + (alpha / rank) B A x        A (rank, in) starts random, B (out, rank) starts at zero

The authors found that what fine-tuning adds to W is nearly a matrix of low rank, which B A can hold. Because
B starts at zero, the adapted model starts as exactly the base model. `rank` is the number of rows of A, which
is also the number of columns of B.

    apply_lora(model, rank=16)               # every linear layer gets an A and a B; no output changes
    freeze_all_but_lora(model)               # ... train lora_parameters(model) ...
    save_lora(model, "out/my_adapter")       # a few MB, in PEFT's format
    load_lora(base_model, "out/my_adapter")  # then merge_lora(base_model) makes it as fast as the base

Several adapters on one model: model/adapters.py. The files of an adapter: model/lora_files.py.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.device import matmul_dtype
from common.errors import ModelError
from common.files import without_wrappers
from model.fused import lora_linear
from model.int8 import Int8Linear
from model.lora_files import check_same_layers, read_adapter, select_layers, write_adapter
from model.low_rank import LoRAReport, base_weight, report_layers, start_at_singular_vectors
from model.moe import ROUTER
from model.quantize import NF4Linear, count_parameters


class LoRA(nn.Module):
    """The update of one linear layer: x (..., in) -> (alpha / rank) B A x (..., out).

    rslora: the factor is alpha / sqrt(rank). With this factor high ranks learn as fast as low ones
    (Kalajdzievski 2023, arXiv:2312.03732).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float | None = None,
                 dropout: float = 0.0, rslora: bool = False, device=None):
        super().__init__()
        self.rank, self.dropout, self.rslora = rank, dropout, rslora
        self.alpha = float(rank if alpha is None else alpha)
        self.scaling = self.alpha / (math.sqrt(rank) if rslora else rank)
        # Always float32: bfloat16 would round small steps away, and GradScaler refuses float16 gradients.
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.B = nn.Linear(rank, out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.normal_(self.A.weight, std=0.02)
        nn.init.zeros_(self.B.weight)  # B alone is zero: if A were zero too, neither would get a gradient
        self.enabled = True  # changed by set_lora in model/adapters.py
        # merge_lora adds the update to W and keeps the old W here. It is no buffer, so it is never saved.
        self.original = None
        # With init="pissa" (model/low_rank.py) A and B start from other values than here, and B A is not
        # zero at the start. A0 and B0 then keep these first values, so that `factors` can subtract B0 A0.
        self.register_buffer("A0", None, persistent=False)
        self.register_buffer("B0", None, persistent=False)

    def forward(self, x):
        b, a = self.factors(matmul_dtype(x))
        h = F.linear(F.dropout(x.to(a.dtype), self.dropout, self.training), a)  # (..., rank)
        return F.linear(h * self.scaling, b)  # (..., out); h is thin, so scaling h costs little

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """B (out, r) and A (r, in) of the update, r = rank.

        With PiSSA the update is B A - B0 A0. It is one product too, with twice the rank: B and -B0 side by
        side, times A on top of A0.
        """
        b, a = self.B.weight, self.A.weight
        if self.B0 is not None:
            b, a = torch.cat((b, -self.B0), dim=1), torch.cat((a, self.A0))
        return b.to(dtype), a.to(dtype)

    @property
    def active(self) -> bool:
        """Whether the update is to be added: it is switched on, and not in W already."""
        return self.enabled and self.original is None


class WithLoRA:
    """The forward pass of every linear layer with a child `lora`: y = W x + bias + (alpha / rank) B A x.

    The classes below inherit from this class first and from a layer's own class second. So in this class
    super().forward is the layer's own forward pass, W x + bias.
    """

    def forward(self, x):
        y = super().forward(x)
        return y + self.lora(x) if self.lora.active else y


class LoRALinear(WithLoRA, nn.Linear):
    """An nn.Linear with a child `lora`. Nobody constructs one: `inject` makes it of an existing layer."""

    def forward(self, x):
        if not self.can_be_fast():
            return super().forward(x)
        b, a = self.lora.factors(matmul_dtype(x))
        return lora_linear(x, self.weight, self.bias, a, b, self.lora.scaling)  # the same in fewer steps

    def can_be_fast(self) -> bool:
        """Whether W is frozen, nothing drops out, and `lora` is a LoRA. (model/adapters.py has another
        class.)
        """
        lora = self.lora
        if not lora.active or not isinstance(lora, LoRA):
            return False
        drops_out = lora.training and lora.dropout > 0
        w_trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters(recurse=False))
        return not drops_out and not w_trains


class LoRANF4Linear(WithLoRA, NF4Linear):
    """A layer with its weight in 4 bits. The adapter trains over it (QLoRA)."""

    bits = 4


class LoRAInt8Linear(WithLoRA, Int8Linear):
    """A layer with its weight in 8 bits. It can only answer: over 8 bits no adapter is trained."""

    bits = 8


WITH_LORA = {nn.Linear: LoRALinear, NF4Linear: LoRANF4Linear, Int8Linear: LoRAInt8Linear}

# --- adding adapters, and training them ---------------------------------------------------------------------


def apply_lora(model: nn.Module, rank: int = 16, alpha: float | None = None, dropout: float = 0.0,
               target_modules: str | list[str] = "all-linear", rslora: bool = False,
               init: str = "gaussian") -> list[str]:
    """Gives layers of any model an adapter, in place; no output changes. Returns the names of the layers.

    target_modules, one or a list: "all-linear" (all but lm_head), "square" (layers with in = out, as in the
    project MiniMind), the end of a name ("q_proj"), or a regular expression for the whole name. alpha: None
    means rank, so that the factor alpha / rank is 1. rslora: see LoRA. init: "gaussian", or "pissa", where
    A and B start as the largest singular vectors of W and outputs stay the same apart from rounding
    (model/low_rank.py). Raises ModelError if rank, alpha or dropout is out of range, a target matches
    nothing, or the model has LoRA already. The model is unchanged then.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"LoRA rank must be a whole number from 1 up, not {rank!r}")
    if alpha is not None and not 0 < alpha <= 1e6:
        raise ModelError(f"LoRA alpha must be above 0 and at most 1e6, not {alpha!r}")
    if not 0 <= dropout < 1:
        raise ModelError(f"LoRA dropout must be from 0 to below 1, not {dropout!r}")
    if init not in ("gaussian", "pissa"):
        raise ModelError(f"LoRA init must be gaussian or pissa, not {init!r}")
    if adapted_layers(model, required=False):
        raise ModelError("the model has LoRA already: call remove_lora first")
    layers = linear_layers(model)
    names = select_layers(layers, target_modules)
    if dropout and any(".experts." in name for name in names):
        raise ModelError("LoRA dropout over experts can't be saved, since PEFT has none there: use 0, or "
                         "target_modules without experts")
    widths = [min(layers[name].in_features, layers[name].out_features) for name in names]
    # The width of a layer is here its smaller side. No matrix has more singular vectors than that, and PiSSA
    # takes `rank` of them in every layer. The other init works with any rank, but above the largest width no
    # layer could use it.
    max_rank = min(widths) if init == "pissa" else max(widths)
    if rank > max_rank:
        raise ModelError(f"LoRA rank {rank} is above the width of the layers, {max_rank}")
    loras = {name: new_lora(layers[name], rank, alpha, dropout, rslora) for name in names}
    if init == "pissa":
        for name, lora in loras.items():
            start_at_singular_vectors(lora, base_weight(layers[name]))
    inject(model, loras)
    return names


def new_lora(layer: nn.Module, *settings) -> LoRA:
    """A LoRA of the layer's size, on the layer's device. settings: rank, alpha, dropout, rslora."""
    return LoRA(layer.in_features, layer.out_features, *settings, device=next(layer.parameters()).device)


def inject(model: nn.Module, loras: dict[str, nn.Module]) -> None:
    """loras {layer name: LoRA}: makes each LoRA the child `lora` of its layer. The layer has no LoRA yet.

    The layer changes its class and is not wrapped. The name `q_proj.weight` stays, and the parameter is the
    same object for everything that refers to it (tied weights, optimizers). Unlike a layer with a patched
    forward method, the layer can be pickled.
    """
    layers = linear_layers(model)
    for name, lora in loras.items():
        layer = layers[name]
        device = next(layer.parameters()).device  # the model may have moved since `lora` was made
        layer.lora = lora.to(device).train(layer.training)  # a new module is in training mode: dropout is on
        layer.lora.enabled = True  # an adapter that was used before may have been switched off
        layer.__class__ = WITH_LORA[type(layer)]


def adapted_layers(model: nn.Module, required: bool = True) -> dict[str, WithLoRA]:
    """The layers that have an adapter, by name. required: raises ModelError where there are none."""
    layers = {without_wrappers(name): module for name, module in model.named_modules()
              if isinstance(module, WithLoRA)}
    if required and not layers:
        raise ModelError("the model has no LoRA: call apply_lora or load_lora first")
    return layers


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that may get an adapter, and those that have one, by name.

    Other subclasses of nn.Linear are left out: they have a forward of their own, which a new class would
    drop. A and B of an adapter are left out, and so is `model` itself, which has no name.
    """
    classes = {*WITH_LORA, *WITH_LORA.values()}
    return {without_wrappers(name): module for name, module in model.named_modules()
            if name and type(module) in classes and "lora" not in name.split(".")}


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every A and B, for the optimizer."""
    for layer in adapted_layers(model).values():
        yield from layer.lora.parameters()


def freeze_all_but_lora(model: nn.Module) -> None:
    """Lets only A and B train. Call it before DDP wraps the model: DDP reads requires_grad only once."""
    trained = set(lora_parameters(model))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Holds the frozen matrices in the type that the forward pass computes in, to save memory.

    Training needs float32, because it makes small changes. What never changes does not need it. Norms, biases
    and routers, which are small, stay as they are, and so do quantized weights.
    """
    for name, weight in model.named_parameters():
        is_small = weight.ndim != 2 or name.endswith(ROUTER)
        if not weight.requires_grad and weight.is_floating_point() and not is_small:
            weight.data = weight.data.to(dtype)  # the same Parameter: embedding and head may share it


def count_line(model: nn.Module) -> str:
    """How many parameters the model has and how many of them train, in words."""
    total = count_parameters(model)
    lora = sum(parameter.numel() for parameter in lora_parameters(model))
    return f"{total:,} parameters in all, {lora:,} LoRA, {100 * lora / total:.2f} %"


# --- merging ------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """W <- W + (alpha / rank) B A: the adapted model becomes as fast as the base.

    A second call changes nothing. The old W is kept, because subtracting B A again would not give back the
    same bits. Raises ModelError, and merges nothing, where a W is quantized, where each row of a batch has
    its own adapter (use_rows in adapters.py), or where a W is shared: an adapted lm_head may be tied to the
    embedding, and both would change.
    """
    adapted = adapted_layers(model)
    for name, layer in adapted.items():
        if not isinstance(layer, nn.Linear):
            raise ModelError(f"can't merge into {layer.bits}-bit weights ({name}): use scripts/merge_lora.py")
        shared = [n for n, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
        if len(shared) > 1:
            raise ModelError(f"LoRA can't be merged into a shared weight: {' = '.join(shared)}")
    for layer in adapted.values():
        lora = layer.lora
        b, a = lora.factors()
        lora.enabled = True  # an adapter that was switched off (set_lora in adapters.py) is on when merged
        if lora.original is None:
            lora.original = layer.weight.detach().clone()
            layer.weight.copy_(layer.weight.float() + lora.scaling * b @ a)  # same Parameter


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Undoes merge_lora, to the bit. Where nothing is merged, nothing changes."""
    for layer in adapted_layers(model).values():
        if layer.lora.original is not None:
            layer.weight.copy_(layer.lora.original)
            layer.lora.original = None


# --- saving and loading -------------------------------------------------------------------------------------


def save_lora(model: nn.Module, path: str | Path, base: str | Path | None = None, tokenizer=None,
              training: dict | None = None) -> None:
    """Writes the adapter and nothing of the base: a PEFT folder, or one plain file where path ends in .pth.

    The folder holds adapter_model.safetensors and adapter_config.json (which names `base`, the path of the
    base model), and the tokenizer and training.json if they are given. A .pth file holds the matrices alone,
    {"NAME.lora.A.weight": ...}. It has no place for alpha, so B is stored multiplied by alpha / rank.
    Each file is complete or absent, and other files in the folder stay. Raises ModelError, and writes
    nothing, where A or B holds NaN or infinity.
    """
    loras = {name: layer.lora for name, layer in adapted_layers(model).items()}
    write_adapter(Path(path), loras, model, base, tokenizer, training)


def read_lora(model: nn.Module, path: str | Path) -> dict[str, LoRA]:
    """{layer name: LoRA} of an adapter that fits the model. The model stays as it is.

    path: a PEFT folder, ours or PEFT's own, or a plain .pth, which may be in half precision. Raises
    ModelError for a matrix that is missing or has another shape, a layer that the model does not have, an
    adapter of another base model, or a damaged file.
    """
    layers, loras = linear_layers(model), {}
    for name, part in read_adapter(Path(path), model, layers).items():
        loras[name] = new_lora(layers[name], len(part["A"]), part["alpha"], part["dropout"], part["rslora"])
        loras[name].load_state_dict({"A.weight": part["A"], "B.weight": part["B"]})
    return loras


@torch.no_grad()
def load_lora(model: nn.Module, path: str | Path) -> LoRAReport:
    """Reads an adapter (see read_lora) and puts it to use.

    A model without LoRA gets it in the layers that the adapter has. A model with LoRA must have it in the
    same layers and with the same ranks. The model keeps its alpha: where the file has another alpha, the B
    that was read is rescaled. Raises ModelError as read_lora does, and for other layers or ranks. The model
    is unchanged then.
    """
    adapted, loras = adapted_layers(model, required=False), read_lora(model, path)
    if adapted:
        check_same_layers(path, loras, {name: layer.lora for name, layer in adapted.items()})
        unmerge_lora(model)
        for name, lora in loras.items():
            mine = adapted[name].lora
            b = lora.B.weight * (lora.scaling / mine.scaling)
            mine.load_state_dict({"A.weight": lora.A.weight, "B.weight": b})
            mine.A0 = mine.B0 = None  # a file holds the whole update, from which nothing is subtracted
    else:
        inject(model, loras)
    return report_layers(adapted_layers(model))
