"""The optimizer and its learning rate over time.

AdamW: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101
Muon:  Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; scaled as in Liu et al. 2025,
       https://arxiv.org/abs/2502.16982, so that one learning rate serves both optimizers.
"""

import inspect
import logging
import math

import torch
from torch import nn

from trainer.args import UsageError
from trainer.distributed import full_tensor, shard_like, share_out, world_size

AT_ONCE = 2**27  # numbers in the matrices that Muon takes as one batch: bounds the memory of their copies


def learning_rate_factor(step: int, max_steps: int, warmup_ratio: float, schedule: str = "cosine") -> float:
    """What the peak learning rate is multiplied by at `step` (0, 1, ...): linear warm-up, then

    cosine  half a cosine: 100 steps, 2 of them warm-up: step 0 -> 0.5, 1 -> 1, 51 -> 0.5, 99 -> 0.0003
    wsd     all of it until the middle, then straight down: step 0 -> 0.5, 1 -> 1, 50 -> 1, 75 -> 0.5, 99 ->
            0.02 (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395)

    The first step already learns something, and the last one still does.
    """
    warmup = round(max_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "wsd":
        return min(1.0, 2 * (max_steps - step) / max_steps)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))


class Muon(torch.optim.Optimizer):
    """W <- W - lr * (decay * W + 0.2 * sqrt(max(rows, columns)) * orthogonalise(momentum))

    The momentum of a weight matrix is replaced by the nearest matrix whose singular values are all about one,
    so that directions the gradient hardly shows are learned as fast as the loud ones. 0.2 * sqrt(max(...))
    gives the update the size AdamW's would have, so both take the same learning rate (Liu et al. 2025).

    The same updates as torch.optim.Muon with adjust_lr_fn="match_rms_adamw"; but matrices of one shape go
    through the iteration as one batch, which for small models is twice as fast on a CPU; and ranks, who have
    the same gradients by now, share the batch out.

    dtype: of that iteration. bfloat16 is fast and exact enough to learn by, but it makes a difference in the
    last place of a gradient (another order of summing, on another number of processes) a thousand times
    larger; a run in float32 iterates in float32.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95,
                 dtype: torch.dtype = torch.bfloat16):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[tuple, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), same in shapes.items():
                at_once = max(world_size(), AT_ONCE // (rows * columns))
                for i in range(0, len(same), at_once):
                    self._update(same[i:i + at_once], group)

    def _update(self, weights: list[torch.Tensor], group: dict) -> None:
        """Takes a step with matrices of one shape."""
        gradients = [w.grad for w in weights]
        for w in weights:
            if "momentum_buffer" not in self.state[w]:
                self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        momenta = [self.state[w]["momentum_buffer"] for w in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov: one step on
        whole = [full_tensor(matrix) for matrix in ahead]  # where processes hold parts of them (FSDP)
        updates = share_out(orthogonalise, torch.stack(whole).to(self.dtype)).to(weights[0].dtype)
        updates = [shard_like(update, w) for update, w in zip(updates, weights, strict=True)]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(weights[0].shape))
        torch._foreach_add_(weights, updates, alpha=-group["lr"] * scale)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, rows, columns) with their singular vectors kept, and all their singular values near one.

    Five steps of a Newton-Schulz iteration, in the matrices' own dtype. A step sends each singular value s to
    3.4445 s - 4.775 s^3 + 2.0315 s^5: small ones more than triple, those between 0.7 and 1.2 stay there.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # wide: the products below are rows x rows
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above one
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


# PyTorch's optimizers import the compiler, more than a second of work, only to keep it out of their methods.
# Nobody compiles ours: here the methods are marked as done, and AdamW's step below goes without.
for method in vars(torch.optim.Optimizer).values():
    if plain := getattr(method, "__wrapped__", None):
        plain.__dynamo_disable = plain


class AdamW(torch.optim.AdamW):
    """PyTorch's (Loshchilov & Hutter 2017, arXiv:1711.05101), to the bit, without importing the compiler."""

    @torch.no_grad()
    def step(self, closure=None):
        return inspect.unwrap(torch.optim.Adam.step)(self, closure)


def build_optimizers(model: nn.Module, name: str, learning_rate: float, weight_decay: float,
                     lora_plus_ratio: float = 1.0, dtype: torch.dtype = torch.bfloat16,
                     ) -> list[torch.optim.Optimizer]:
    """Optimizers over the parameters that train (`requires_grad`), and over no other.

    Decay pulls matrices towards zero. It leaves gains and biases alone, which are few and scale what follows,
    and the embedding, which is a lookup table: the rows of words that a stage never meets would shrink to
    nothing.
    With "muon" the matrices inside the blocks go to Muon, the rest stays with AdamW.

    Each group carries its `ratio` to the learning rate: 1, and lora_plus_ratio for LoRA's B (LoRA+: Hayou et
    al. 2024, https://arxiv.org/abs/2402.12354). With A and B at one rate wide layers learn too little: B
    starts at zero and has to grow, while A only turns.

    `dtype` is that of the forward pass: where it is bfloat16 Muon iterates in it too. Raises UsageError where
    "adamw8bit" can't run.
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for key, p in model.named_parameters():
        if p.requires_grad:
            muon = name == "muon" and p.ndim == 2 and ".layers." in key
            decay = weight_decay if p.ndim >= 2 and "embed" not in key else 0.0
            ratio = lora_plus_ratio if key.endswith(".lora.B.weight") else 1.0
            groups.setdefault((muon, decay, ratio), []).append(p)
    hidden, rest = ([{"params": params, "weight_decay": decay, "ratio": ratio, "lr": learning_rate * ratio}
                     for (muon, decay, ratio), params in groups.items() if muon == wanted]
                    for wanted in (True, False))
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        device = rest[0]["params"][0].device.type
        # beta2 of 0.99, not 0.95: the row of a rare word gets a gradient once in many steps, and its scale
        # should still be known by then.
        settings = {"lr": learning_rate, "betas": (0.9, 0.99)}
        if "8bit" in name:
            optimizers.append(_adamw_8bit(name, device)(rest, **settings))
        else:
            fused = device in ("cpu", "cuda")  # one kernel for a whole group
            optimizers.append(AdamW(rest, **settings, fused=fused))
    if hidden:
        # GPUs that train in float16 have no fast bfloat16, and in float16 small gradients would vanish.
        iteration = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(hidden, learning_rate, weight_decay, dtype=iteration))
    return optimizers


def _adamw_8bit(name: str, device: str) -> type[torch.optim.Optimizer]:
    """AdamW with both moments in 8 bits, blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861).

    Moments of fewer than 4,096 values stay float32. Paged: in memory that CPU and GPU share, so that a GPU
    which is full for a moment slows down and does not fail (Dettmers et al. 2023, arXiv:2305.14314).
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--optimizer {name} runs on CUDA GPUs and CPUs, not on {device}; use adamw")
    if name == "paged_adamw8bit" and device != "cuda":
        raise UsageError(f"--optimizer {name} needs a CUDA GPU, whose memory it extends; use adamw8bit")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that we don't use
    try:  # it may be installed and yet have no kernels for this machine: one step tells
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit  # here: optional, and slow to import

        optimizer = PagedAdamW8bit if name == "paged_adamw8bit" else AdamW8bit
        weight = nn.Parameter(torch.zeros(4096, device=device))
        weight.grad = torch.zeros_like(weight)
        optimizer([weight]).step()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--optimizer {name}: bitsandbytes does not run here ({reason}); use adamw") \
            from None
    return optimizer
