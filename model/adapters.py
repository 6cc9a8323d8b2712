"""Several adapters on one model: one in use at a time, or a blend of them, or another one for each row.

    adapters = Adapters(model)
    adapters.load("out/lora_clinic")                       # named by its folder
    adapters.load("out/lora_identity")
    adapters.use("lora_clinic")                            # W + B1 A1; the base is not touched
    adapters.use({"lora_clinic": 0.7, "lora_identity": 0.3})
    adapters.use_rows(["lora_clinic", None, "lora_identity"])  # for batches of three rows
    adapters.use(None)                                     # the base alone

    adapters.combine("both", {"lora_clinic": 0.7, "lora_identity": 0.3}, "svd", rank=16)
    adapters.use("both")
    save_lora(model, "out/both")                           # saves what is in use
"""

import math
from pathlib import Path

import torch
from torch import nn

from model.lora import (
    LoRA,
    LoRAReport,
    _adapted,
    _inject,
    _linears,
    low_rank,
    read_lora,
    remove_lora,
    set_lora,
)
from model.transformer import ModelError, matmul_dtype

COMBINATIONS = ("linear", "cat", "svd")


class Adapters:
    """The adapters of one model by name; `linear.lora` is that of the adapter in use.

    adapters: {name: {layer: LoRA}}. in_use: a name, {name: weight}, a list of one for each row, or None.
    """

    def __init__(self, model: nn.Module):
        """Any LoRA that the model has already must be saved and removed first, or it is lost: ModelError."""
        if any("lora" in dict(linear.named_children()) for linear in _linears(model).values()):
            raise ModelError("the model has LoRA already: save it, call remove_lora, and load it from there")
        self.model, self.adapters, self.in_use = model, {}, None

    def load(self, path: str | Path, name: str | None = None) -> str:
        """Read an adapter, without using it yet. Returns its name: the folder's (a .pth's without .pth), or
        `name`. Raises ModelError for a name that is taken, and as read_lora does."""
        path = Path(path)
        name = name or (path.stem if path.suffix == ".pth" else path.resolve().name)
        self._check_new(name)
        self.adapters[name] = read_lora(self.model, path)
        return name

    def use(self, what: str | dict[str, float] | None) -> None:
        """Switch to one adapter, to a weighted sum of several, or to none. Raises ModelError, and leaves in
        use what was, for a name that is not loaded or adapters that can't be summed."""
        if isinstance(what, dict):
            self._put(_combine(self._get(what), list(what.values()), "cat", None))
        else:
            self._put({} if what is None else self._get([what])[0])
        self.in_use = what

    def use_rows(self, names: list[str | None]) -> None:
        """From now on row i of each batch goes through the adapter names[i], or where that is None through
        the base alone. For inference: these copies don't train."""
        loras = [{} if name is None else self._get([name])[0] for name in names]
        layers = dict.fromkeys(layer for adapter in loras for layer in adapter)
        self._put({layer: RowLoRA([adapter.get(layer) for adapter in loras]) for layer in layers})
        self.in_use = list(names)

    def combine(self, name: str, weights: dict[str, float], how: str, rank: int | None = None) -> None:
        """Make a new adapter, `name`, of others, by PEFT's definitions:

        cat     all their ranks side by side: the weighted sum itself
        svd     of that sum, what `rank` holds best (None: the largest rank of them)
        linear  B = sum sqrt(w) B_i and A = sum sqrt(w) A_i: of the rank of one, but with cross terms B_i A_j,
                so not the sum; for adapters of equal ranks

        Raises ModelError: unknown name or way, a taken name, other layers or (linear) ranks, a bad weight.
        """
        self._check_new(name)
        self.adapters[name] = _combine(self._get(weights), list(weights.values()), how, rank)

    def _check_new(self, name: str) -> None:
        if name in self.adapters:
            raise ModelError(f"there is an adapter {name!r} already: give this one another name")

    def _get(self, names) -> list[dict[str, LoRA]]:
        for name in names:
            if name not in self.adapters:
                loaded = ", ".join(self.adapters) or "none"
                raise ModelError(f"adapter {name!r} is not loaded; loaded: {loaded}")
        return [self.adapters[name] for name in names]

    def _put(self, loras: dict[str, nn.Module]) -> None:
        remove_lora(self.model)  # undoes a merge
        linears = _linears(self.model)
        for layer, lora in loras.items():
            lora.enabled = True
            device = next(linears[layer].parameters()).device  # the model may have moved since
            _inject(linears[layer], lora.to(device))


class RowLoRA(nn.Module):
    """In the place of a LoRA, one for each row of the batch: (rows, ..., in) -> (rows, ..., out)."""

    rank, enabled, original = 0, True, None

    def __init__(self, loras: list[LoRA | None]):
        super().__init__()
        some = next(lora for lora in loras if lora is not None)
        rank = max(lora.factors()[1].size(0) for lora in loras if lora is not None)
        a = some.A.weight.new_zeros(len(loras), rank, some.A.in_features)
        b = some.A.weight.new_zeros(len(loras), some.B.out_features, rank)
        for row, lora in enumerate(loras):  # lower ranks, and rows without, are filled up with zeros
            if lora is not None:
                up, down = (part.detach() for part in lora.factors())
                a[row, :len(down)], b[row, :, :len(down)] = down, lora.scaling * up
        self.register_buffer("a", a.transpose(1, 2), persistent=False)  # (rows, in, rank)
        self.register_buffer("b", b.transpose(1, 2), persistent=False)  # (rows, rank, out)

    @property
    def active(self) -> bool:
        return self.enabled

    def factors(self, dtype=None):
        raise ModelError("each row has an adapter of its own: switch to one of them before merging or saving")

    def forward(self, x):
        if x.dim() < 3 or x.size(0) != len(self.a):
            raise ModelError(f"use_rows was told of {len(self.a)} rows, but the batch is {tuple(x.shape)}")
        dtype = matmul_dtype(x)
        y = x.to(dtype).flatten(1, -2) @ self.a.to(dtype) @ self.b.to(dtype)  # (rows, T, out)
        return y.view(*x.shape[:-1], y.size(-1))


@torch.no_grad()
def _combine(adapters: list[dict[str, LoRA]], weights: list[float], how: str, rank: int | None) -> dict:
    """{layer: LoRA} of rank = alpha: the scale of each is inside its matrices, as PEFT has it."""
    if how not in COMBINATIONS:
        raise ModelError(f"adapters are combined by {', '.join(COMBINATIONS)}, not {how!r}")
    if rank is not None and how != "svd":
        raise ModelError(f"a rank can be chosen for svd; {how} has its own")
    if not adapters or not all(math.isfinite(weight) for weight in weights):
        raise ModelError(f"adapters are combined with a number for each, not {weights}")
    for adapter in adapters[1:]:
        if different := sorted(adapter.keys() ^ adapters[0].keys()):
            raise ModelError(f"adapters of different layers can't be combined: not all have {different[0]}")
    combined = {}
    for layer, first in adapters[0].items():
        loras = [adapter[layer] for adapter in adapters]
        scales = [weight * lora.scaling for weight, lora in zip(weights, loras, strict=True)]
        bs, factors_a = zip(*(lora.factors() for lora in loras), strict=True)
        if how == "linear":
            if len({len(a) for a in factors_a}) > 1:
                ranks = " and ".join(str(len(a)) for a in factors_a)
                raise ModelError(f"linear needs equal ranks, but {layer} has {ranks}: use cat or svd")
            b = sum(abs(s) ** 0.5 * b for s, b in zip(scales, bs, strict=True))
            a = sum(math.copysign(abs(s) ** 0.5, s) * a for s, a in zip(scales, factors_a, strict=True))
        else:
            b, a = torch.cat(bs, dim=1), torch.cat([s * a for s, a in zip(scales, factors_a, strict=True)])
            if how == "svd":
                b, a, _ = low_rank(b @ a, max(len(a) for a in factors_a) if rank is None else rank)
        new = LoRA(first.A.in_features, first.B.out_features, len(a), device=a.device)
        new.B.weight.copy_(b)
        new.A.weight.copy_(a)
        combined[layer] = new
    return combined


@torch.no_grad()
def logit_shift(model: nn.Module) -> tuple[float, float]:
    """What the adapter does to the logits of 32 fixed tokens: the largest change, and the mean KL divergence
    of the adapted model's prediction from the base model's, in nats. Undoes a merge."""
    device = next(model.parameters()).device
    ids = torch.arange(1, 33, device=device)[None] * 37 % model.config.vocab_size
    adapted, training, logits = _adapted(model).values(), model.training, {}
    was = [linear.lora.enabled for linear in adapted]
    model.eval()
    for on in (False, True):
        set_lora(model, on)
        logits[on] = model(ids).logits.float()
    model.train(training)
    for linear, enabled in zip(adapted, was, strict=True):
        linear.lora.enabled = enabled
    base, now = (logits[on].log_softmax(dim=-1) for on in (False, True))
    kl = (base.exp() * (base - now)).sum(-1).mean().item()
    return (logits[True] - logits[False]).abs().max().item(), max(kl, 0.0)


def report_line(model: nn.Module, path: str | Path, report: LoRAReport) -> str:
    """What loading did, for a person to read; an adapter that does nothing is called out."""
    line = f"{path}: {report.matched}/{report.matched} layers matched"
    if not report.relative_norm:
        return f"{line}, but it changes nothing: all its updates are zero; was it trained and saved?"
    change, kl = logit_shift(model)
    return (f"{line}, updates {report.relative_norm:.4f} of the weights they change, logits move by up to "
            f"{change:.3g} (KL {kl:.2g} nats)")
