"""The optimizers, and the learning rate over time.

AdamW: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101
Muon:  Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; scaled as in Liu et al. 2025,
       https://arxiv.org/abs/2502.16982, so that one learning rate serves both optimizers.
"""

import math

import torch
from torch import nn

from common.fast_start import AdamW, Optimizer
from model.moe import ROUTER
from trainer.adamw_8bit import adamw_8bit
from trainer.distributed import full_tensor, shard_like, share_out, world_size

MAX_NUMBERS_AT_ONCE = 2**27  # of a batch of Muon's matrices, to bound its memory


def learning_rate_factor(step: int, max_steps: int, warmup_ratio: float, schedule: str = "cosine") -> float:
    """The factor of the peak learning rate at `step` (0, 1, ...). First it rises linearly: the warm-up.

    After the warm-up the factor follows the schedule:

    cosine  half a cosine, from 1 down to 0
    wsd     1 until the middle, then a straight line down (warm-up, stable, decay: Hu et al. 2024,
            arXiv:2404.06395)

    Of 100 steps, 2 of them warm-up, the factors are

    cosine  step 0 -> 0.5, 1 -> 1, 51 -> 0.5, 99 -> 0.0003
    wsd     step 0 -> 0.5, 1 -> 1, 50 -> 1, 75 -> 0.5, 99 -> 0.02

    The factor is above 0 at the first step and at the last, so both steps change the model.
    """
    warmup = round(max_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "wsd":
        return min(1.0, 2 * (max_steps - step) / max_steps)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))


class Muon(Optimizer):
    """W <- W - lr * (decay * W + 0.2 * sqrt(max(rows, columns)) * orthogonalise(momentum))

    A matrix stretches vectors in some directions more than in others. Its singular values say how much. In a
    gradient a few directions dominate. Muon keeps a running mean of the gradients, the momentum, and replaces
    the momentum by the nearest matrix whose singular values are all about one. So all directions are learned
    equally fast. The factor 0.2 * sqrt(max(...)) gives the update the size of AdamW's, so both take the same
    learning rate (Liu et al. 2025).

    The updates are those of torch.optim.Muon with adjust_lr_fn="match_rms_adamw". But `orthogonalise` takes
    matrices of one shape as one batch, which for small models is twice as fast on a CPU. Where several
    processes train together, all have the same gradients at this point, and each computes a part of the
    batch.

    dtype: the type in which `orthogonalise` computes. bfloat16 is fast, and exact enough to learn. But it
    enlarges small differences. The gradients of a run on two processes and of the same run on four differ in
    their last digit, because they are summed in another order. In bfloat16 the updates differ a thousand
    times as much as these gradients. So a run in float32 uses float32 here too.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95,
                 dtype: torch.dtype = torch.bfloat16):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            same_shape: dict[tuple, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), weights in same_shape.items():
                # Every process gets a matrix to compute, even if these matrices exceed the limit.
                at_once = max(world_size(), MAX_NUMBERS_AT_ONCE // (rows * columns))
                for i in range(0, len(weights), at_once):
                    self.update(weights[i:i + at_once], group)

    def update(self, weights: list[torch.Tensor], group: dict) -> None:
        """Takes a step with matrices of one shape."""
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        # lerp(a, b, t) is a + t (b - a). So with m = group["momentum"], a momentum becomes
        # m * momentum + (1 - m) * gradient.
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        # Nesterov's variant does this once more, with the new momentum, and keeps the result apart. (One by
        # one, because PyTorch 2.11 has no such operation for lists of matrices that FSDP has cut up.)
        pairs = zip(gradients, momenta, strict=True)
        ahead = [gradient.lerp(momentum, group["momentum"]) for gradient, momentum in pairs]
        # With FSDP each process holds a part of a matrix.
        batch = torch.stack([full_tensor(matrix) for matrix in ahead]).to(self.dtype)  # (n, rows, columns)
        updates = share_out(orthogonalise, batch).to(weights[0].dtype)  # each process computes some of the n
        updates = [shard_like(update, weight) for update, weight in zip(updates, weights, strict=True)]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(weights[0].shape))
        torch._foreach_add_(weights, updates, alpha=-group["lr"] * scale)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, rows, columns) with their singular vectors kept, and all their singular values near one.

    Five steps of a Newton-Schulz iteration, in the matrices' own dtype. A step sends each singular value s to
    3.4445 s - 4.775 s^3 + 2.0315 s^5. Small values more than triple, and values from 0.68 to 1.2 stay in
    that range.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # x has no more rows than columns, so x @ x.mT is small
    # No singular value is larger than this norm, so now all are at most 1, where the polynomial works.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)  # -4.775 g + 2.0315 g @ g
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)  # 3.4445 x + polynomial @ x
    return x.mT if tall else x


def build_optimizers(model: nn.Module, name: str, learning_rate: float, weight_decay: float,
                     lora_plus_ratio: float = 1.0, dtype=torch.bfloat16) -> list[torch.optim.Optimizer]:
    """Optimizers over the parameters that train (`requires_grad`), and over no others.

    With "muon" the matrices inside the blocks go to Muon, each expert's by itself, and the rest to AdamW.

    Weight decay pulls matrices towards zero. It leaves out the weights of norms and the biases, which are
    few and must be free to have any size. It also leaves out the embedding, a table in which each word has
    a row: the rows of words that a stage never meets would shrink to nothing.

    A group of parameters learns at learning_rate times its `ratio`. The ratio is stored in the group, since
    the loop sets the rate anew in each step. It is 1, or lora_plus_ratio for LoRA's matrix B
    (model/lora.py). B starts at zero and has to grow, and in wide layers it grows too slowly if it learns
    at the rate of A (LoRA+: Hayou et al. 2024, https://arxiv.org/abs/2402.12354).

    dtype: the type of the forward pass. Raises UsageError where "adamw8bit" cannot run.
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and ".layers." in key and not key.endswith(ROUTER)
            to_muon = name == "muon" and is_matrix
            decay = weight_decay if parameter.ndim >= 2 and "embed" not in key else 0.0
            ratio = lora_plus_ratio if key.endswith(".lora.B.weight") else 1.0
            groups.setdefault((to_muon, decay, ratio), []).append(parameter)
    for_muon, for_adamw = [], []
    for (to_muon, decay, ratio), parameters in groups.items():
        group = {"params": parameters, "weight_decay": decay, "ratio": ratio, "lr": learning_rate * ratio}
        (for_muon if to_muon else for_adamw).append(group)

    optimizers: list[torch.optim.Optimizer] = []
    if for_adamw:
        device = for_adamw[0]["params"][0].device.type
        # The second beta decides for how long AdamW remembers the size of gradients. The row of a rare word
        # in the embedding gets a gradient once in many steps, so 0.99 is better than 0.95, which many
        # others use.
        settings = {"lr": learning_rate, "betas": (0.9, 0.99)}
        if "8bit" in name:
            optimizers.append(adamw_8bit(name, device)(for_adamw, **settings))
        else:  # fused: faster, all parameters of a group in one call of compiled code
            optimizers.append(AdamW(for_adamw, **settings, fused=device in ("cpu", "cuda")))
    if for_muon:
        # A run in float16 computes this in float32: such GPUs have no fast bfloat16.
        iteration_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(for_muon, learning_rate, weight_decay, dtype=iteration_dtype))
    return optimizers
