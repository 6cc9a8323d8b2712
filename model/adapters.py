"""Several adapters on one model: one in use at a time, or a blend of them, or another one for each row.
A reader may skip this file.

    adapters = Adapters(model)
    adapters.load("out/lora_clinic")                       # its name is that of its folder
    adapters.load("out/lora_identity")
    adapters.use("lora_clinic")                            # W + B1 A1; W itself stays as it is
    adapters.use({"lora_clinic": 0.7, "lora_identity": 0.3})
    adapters.use_rows(["lora_clinic", None, "lora_identity"])  # for batches of three rows
    adapters.use(None)                                     # the base alone

    adapters.combine("both", {"lora_clinic": 0.7, "lora_identity": 0.3}, "svd", rank=16)
    adapters.use("both")
    save_lora(model, "out/both")                           # saves the adapter in use

Also here: LoRA is switched off, removed, and described for a person. `rank` is the width of A and of B.
"""

import math
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from common.device import matmul_dtype
from common.errors import ModelError
from model.lora import WITH_LORA, LoRA, adapted_layers, inject, read_lora, unmerge_lora
from model.low_rank import LoRAReport, low_rank, report_layers


class Adapters:
    """The adapters of one model by name. The child `lora` of a layer is that of the adapter in use.

    adapters: {name: {layer name: LoRA}}. in_use: a name, {name: weight}, a list with a name or None for each
    row, or None.
    """

    def __init__(self, model: nn.Module):
        """Raises ModelError where the model has LoRA already, because using another adapter would drop it."""
        if adapted_layers(model, required=False):
            raise ModelError("the model has LoRA already: save it, call remove_lora, and load it from there")
        self.model, self.adapters, self.in_use = model, {}, None

    def load(self, path: str | Path, name: str | None = None) -> str:
        """Reads an adapter, without using it yet. Returns its name: `name`, or that of its folder or file.

        A .pth is named without its .pth. Raises ModelError for a name that is taken, and as read_lora does.
        """
        path = Path(path)
        if not name:
            name = path.stem if path.suffix == ".pth" else path.resolve().name
        self._add(name, read_lora(self.model, path))
        return name

    def use(self, what: str | dict[str, float] | None) -> None:
        """Switches to one adapter, to a weighted sum of several, or to none.

        Raises ModelError for a name that is not loaded, or adapters that cannot be summed. The adapter that
        was in use then stays in use.
        """
        if what is None:
            self._put({}, None)
        elif isinstance(what, dict):
            self._put(self._combine(what, "cat"), what)
        else:
            self._put(self._get(what), what)

    def use_rows(self, names: list[str | dict[str, float] | None]) -> None:
        """From now on row i of each batch goes through names[i]: an adapter, a weighted sum, or None, the
        base alone.

        For inference only: the rows hold copies of A and B, which do not train. Raises ModelError as `use`.
        """
        distinct = [name for place, name in enumerate(names) if name not in names[:place]]
        loras = [{} if name is None else self._combine(name, "cat") if isinstance(name, dict)
                 else self._get(name) for name in distinct]
        rows = [loras[distinct.index(name)] for name in names]
        layers = dict.fromkeys(layer for row in rows for layer in row)
        if not self.fit_together(names):
            raise ModelError("adapters over experts can't differ between the rows of a batch")
        self._put({layer: RowLoRA([row.get(layer) for row in rows]) for layer in layers}, list(names))

    def fit_together(self, names: list) -> bool:
        """Whether `use_rows` takes these. An expert reads tokens of all rows as one matrix, so where adapters
        change experts, all rows must have the same one."""
        over_experts = any(".experts." in layer for loras in self.adapters.values() for layer in loras)
        return not over_experts or all(name == names[0] for name in names)

    def combine(self, name: str, weights: dict[str, float], how: str, rank: int | None = None) -> None:
        """Makes a new adapter, `name`, of others, by PEFT's definitions:

        cat     all their A side by side, and all their B: exactly the weighted sum of the updates
        svd     the nearest update to that sum that `rank` can hold (None: the largest rank of the adapters)
        linear  B = sum sqrt(w) B_i and A = sum sqrt(w) A_i. The rank stays that of one adapter, but B A has
                cross terms B_i A_j, so it is not the sum. All adapters must have equal ranks.

        The new adapter changes every layer that one of them changes. Raises ModelError for an unknown name or
        way, a name that is taken, (linear) other ranks, or a weight that is not finite.
        """
        self._add(name, self._combine(weights, how, rank))

    def _add(self, name: str, loras: dict[str, LoRA]) -> None:
        if name in self.adapters:
            raise ModelError(f"there is an adapter {name!r} already: give this one another name")
        self.adapters[name] = loras

    def _get(self, name: str) -> dict[str, LoRA]:
        if name not in self.adapters:
            raise ModelError(f"adapter {name!r} is not loaded; loaded: {', '.join(self.adapters) or 'none'}")
        return self.adapters[name]

    @torch.no_grad()
    def _combine(self, weights: dict[str, float], how: str, rank: int | None = None) -> dict[str, LoRA]:
        """{layer name: LoRA} with alpha = rank: the factor of each adapter is in its matrices, as in PEFT."""
        adapters = [self._get(name) for name in weights]
        if how not in ("linear", "cat", "svd"):
            raise ModelError(f"adapters are combined by linear, cat, svd, not {how!r}")
        if rank is not None and how != "svd":
            raise ModelError(f"a rank can be chosen for svd; {how} has its own")
        if not adapters or not all(math.isfinite(weight) for weight in weights.values()):
            raise ModelError(f"adapters are combined with a number for each, not {weights}")
        combined = {}
        for layer in dict.fromkeys(layer for loras in adapters for layer in loras):
            parts = [(weight, loras[layer]) for weight, loras in zip(weights.values(), adapters, strict=True)
                     if layer in loras]
            b, a = _combine_layer(layer, parts, how, rank)
            combined[layer] = LoRA(a.size(1), len(b), len(a), device=a.device)
            combined[layer].load_state_dict({"A.weight": a, "B.weight": b})
        return combined

    def _put(self, loras: dict[str, nn.Module], in_use) -> None:
        remove_lora(self.model)  # this undoes a merge, too
        inject(self.model, loras)
        self.in_use = in_use


def _combine_layer(layer: str, loras: list[tuple[float, LoRA]], how: str, rank: int | None) -> tuple:
    """B (out, r) and A (r, in) of one layer in the new adapter. layer: its name, for the message.

    loras: the weight and the LoRA of each adapter that changes this layer.
    """
    parts = [(weight * lora.scaling, *lora.factors()) for weight, lora in loras]  # (scale, B, A) of each
    ranks = [len(a) for _, _, a in parts]
    if how == "linear":
        if len(set(ranks)) > 1:
            raise ModelError(f"linear needs equal ranks, but {layer} has {ranks}: use cat or svd")
        b = sum(abs(scale) ** 0.5 * b for scale, b, _ in parts)
        a = sum(math.copysign(abs(scale) ** 0.5, scale) * a for scale, _, a in parts)
        return b, a
    b = torch.cat([b for _, b, _ in parts], dim=1)
    a = torch.cat([scale * a for scale, _, a in parts])
    if how == "svd":
        b, a, _ = low_rank(b @ a, max(ranks) if rank is None else rank)
    return b, a


class RowLoRA(nn.Module):
    """A LoRA for each row of the batch, in the place of one for all: (rows, ..., in) -> (rows, ..., out)."""

    active = LoRA.active  # switched on, and not merged
    original = None  # a RowLoRA is never merged
    rank = 0  # the rows have several ranks; load_lora, which compares ranks, refuses to replace a RowLoRA

    def __init__(self, loras: list[LoRA | None]):
        super().__init__()
        self.enabled = True
        distinct = list(dict.fromkeys(lora for lora in loras if lora is not None))
        factors = [lora.factors() for lora in distinct]  # (B, A) of each
        b, a = factors[0]
        # Lower ranks are filled up with zeros. The last place is for rows without an adapter.
        rank = max(len(a) for _, a in factors)
        all_b = b.new_zeros(len(distinct) + 1, rank, len(b))
        all_a = a.new_zeros(len(distinct) + 1, rank, a.size(1))
        for place, (lora, (b, a)) in enumerate(zip(distinct, factors, strict=True)):
            all_b[place, :len(a)] = lora.scaling * b.detach().T
            all_a[place, :len(a)] = a.detach()
        places = [len(distinct) if lora is None else distinct.index(lora) for lora in loras]
        self.register_buffer("a", all_a, persistent=False)  # (adapters, rank, in)
        self.register_buffer("b", all_b, persistent=False)  # (adapters, rank, out)
        self.register_buffer("places", torch.tensor(places, device=a.device), persistent=False)  # (rows,)

    @cached_property
    def of_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For the ordinary forward pass: copies, A (rows, in, rank) and B (rows, rank, out), made once."""
        return self.a[self.places].mT, self.b[self.places]

    def factors(self, dtype=None):
        raise ModelError("each row has an adapter of its own: switch to one of them before merging or saving")

    def forward(self, x):
        if x.dim() < 3 or x.size(0) != len(self.places):
            raise ModelError(f"use_rows got names for {len(self.places)} rows, but the batch is "
                             f"{tuple(x.shape)}")
        dtype, (a, b) = matmul_dtype(x), self.of_rows
        y = x.to(dtype).flatten(1, -2) @ a.to(x.device, dtype) @ b.to(x.device, dtype)  # (rows, T, out)
        return y.view(*x.shape[:-1], y.size(-1))


# --- off, on, and gone --------------------------------------------------------------------------------------


def set_lora(model: nn.Module, on: bool) -> None:
    """Switches the adapter on, or off. Off is exactly the base model, because a merge is undone."""
    if not on:
        unmerge_lora(model)
    for layer in adapted_layers(model).values():
        layer.lora.enabled = on


def remove_lora(model: nn.Module, keep_merged: bool = False) -> None:
    """Makes the layers plain again, as in the base model; keep_merged: with the weights that are merged."""
    plain = {adapted: kind for kind, adapted in WITH_LORA.items()}
    for layer in adapted_layers(model, required=False).values():
        if not keep_merged:
            unmerge_lora(layer)
        del layer.lora
        layer.__class__ = plain[type(layer)]


# --- what an adapter does, for a person to read -------------------------------------------------------------


def report_lora(model: nn.Module) -> LoRAReport:
    """How much the adapter in use changes. Raises ModelError where there is none."""
    return report_layers(adapted_layers(model))


@torch.no_grad()
def logit_shift(model: nn.Module) -> tuple[float, float]:
    """The effect of the adapter on the logits of 32 fixed tokens. Undoes a merge.

    Returns the largest change of a logit, and the mean KL divergence of the adapted model's prediction from
    the base model's, in nats.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 33, device=device)[None] * 37 % model.config.vocab_size  # (1, 32)
    was_training = model.training
    was_on = all(layer.lora.enabled for layer in adapted_layers(model).values())
    model.eval()
    set_lora(model, False)
    base = model(ids).logits.float()
    set_lora(model, True)
    adapted = model(ids).logits.float()
    model.train(was_training)
    set_lora(model, was_on)
    log_p, log_q = base.log_softmax(dim=-1), adapted.log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return (adapted - base).abs().max().item(), max(kl, 0.0)


def report_line(model: nn.Module, path: str | Path, report: LoRAReport) -> str:
    """What loading an adapter did, in words. The line calls out an adapter that does nothing."""
    line = f"{path}: {report.matched}/{report.matched} layers matched"
    if not report.relative_norm:
        return f"{line}, but it changes nothing: all its updates are zero; was it trained and saved?"
    change, kl = logit_shift(model)
    return (f"{line}, updates {report.relative_norm:.4f} of the weights they change, logits move by up to "
            f"{change:.3g} (KL {kl:.2g} nats)")
