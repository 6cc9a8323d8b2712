"""AdamW with its state in 8 bits, from bitsandbytes: --optimizer adamw8bit. A reader may skip this file."""

import logging

import torch
from torch import nn

from common.errors import UsageError
from common.files import one_line


def adamw_8bit(name: str, device: str) -> type[torch.optim.Optimizer]:
    """AdamW with both moments in 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861).

    Moments of fewer than 4,096 values stay float32. "paged_adamw8bit" holds them in memory that CPU and GPU
    share, so that a GPU whose memory is full for a moment slows down and does not fail (Dettmers et al. 2023,
    arXiv:2305.14314). Raises UsageError where it cannot run.
    """
    possible = ("cuda",) if name == "paged_adamw8bit" else ("cuda", "cpu")
    if device not in possible:
        raise UsageError(f"--optimizer {name} runs on {' and '.join(possible)}, not on {device}; use adamw")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are not used here
    try:  # it may be installed and yet have no kernels for this machine, so it takes one step on trial
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit  # here: optional, and slow to import

        optimizer = PagedAdamW8bit if name == "paged_adamw8bit" else AdamW8bit
        weight = nn.Parameter(torch.zeros(4096, device=device))
        weight.grad = torch.zeros_like(weight)
        optimizer([weight]).step()
    except Exception as error:
        reason = one_line(error)
        line = f"--optimizer {name}: bitsandbytes does not run here ({reason}); use adamw"
        raise UsageError(line) from None
    return optimizer
