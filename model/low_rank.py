"""Matrices of low rank: the one nearest to a given matrix, PiSSA's start, and how large an update is.
A reader may skip this file.

Here `rank` is the rank of a matrix, as in mathematics.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from common.errors import ModelError


@torch.no_grad()
def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The nearest product B A of two thin matrices, by truncated SVD (Eckart & Young 1936).

    matrix (out, in) -> B (out, rank), A (rank, in), and the share of the energy that B A keeps. The energy is
    the sum of sigma^2 over the singular values. B and A each carry sqrt(sigma), the largest first. A matrix
    of zeros loses nothing, so its share is 1. Raises ModelError for a rank that the matrix cannot have.
    """
    if not 0 < rank <= min(matrix.shape):
        raise ModelError(f"rank must be from 1 to {min(matrix.shape)}, not {rank}")
    u, sigma, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    root, energy = sigma[:rank].sqrt(), sigma.square()
    kept = (energy[:rank].sum() / energy.sum()).item() if energy.any() else 1.0
    return u[:, :rank] * root, root[:, None] * vh[:rank], kept


@torch.no_grad()
def start_at_singular_vectors(lora: nn.Module, weight: torch.Tensor) -> None:
    """PiSSA (Meng et al. 2024, arXiv:2404.02948): scaling B A starts as the nearest matrix to W of its rank.

    There W can change most. weight: W (out, in). The paper replaces W by W - B0 A0, where B0 and A0 are the
    start of B and A. Here W stays, and the update is B A - B0 A0, which gives the same function. The base
    keeps its bits, and other adapters keep their base, at the price of one more thin product.
    """
    lora.B0, lora.A0, _ = low_rank(weight / lora.scaling, lora.rank)
    lora.load_state_dict({"A.weight": lora.A0, "B.weight": lora.B0})


def base_weight(layer: nn.Module) -> torch.Tensor:
    """W (out, in) of a linear layer in float32, also where W is quantized or an adapter is merged into W."""
    if hasattr(layer, "dequantize"):
        return layer.dequantize()
    original = getattr(getattr(layer, "lora", None), "original", None)
    return (layer.weight if original is None else original).detach().float()


@dataclass
class LoRAReport:
    """What an adapter does. relative_norm: |updates| / |the weights that they change|; 0 changes nothing."""

    matched: int  # layers
    names: list[str]
    relative_norm: float


def report_layers(adapted: dict[str, nn.Module]) -> LoRAReport:
    """How much the LoRA of these layers changes, in Frobenius norms over all of them together."""
    updates = weights = 0.0
    for layer in adapted.values():
        b, a = (factor.detach() for factor in layer.lora.factors())
        # |B A|^2 is the sum of (B^T B) * (A A^T), two small matrices. B A itself would be as large as W.
        updates += layer.lora.scaling**2 * ((b.T @ b) * (a @ a.T)).sum().item()
        weights += base_weight(layer).square().sum().item()
    return LoRAReport(len(adapted), sorted(adapted), math.sqrt(max(updates, 0.0) / max(weights, 1e-30)))
