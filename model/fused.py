"""Two formulas with their gradients written by hand: RMSNorm, and a frozen linear layer with LoRA.
A reader may skip this file.

Each function gives the same result as one line of PyTorch, which its docstring names. The gradient that
PyTorch derives by itself passes over memory more often: without these two, training steps are some per cent
slower on a CPU.
"""

import torch
import torch.nn.functional as F

from common.device import matmul_dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """F.rms_norm(x.float(), weight.shape, weight.float(), eps), for x (..., C) and weight (C,).

    The computation is in float32 whatever x is. The result has the type of the matrix products that read it:
    under autocast that is one cast here, in place of one each in q, k and v.
    """
    dtype = matmul_dtype(x)
    if x.is_cuda or not torch.is_grad_enabled():  # on CUDA PyTorch has one kernel for each direction
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype)
    return _RMSNorm.apply(x, weight, eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps), n = x r and y = n w, and g = dL/dy:

        dL/dw = the sum over all vectors of g n
        dL/dx = r (g w - n mean(g w n))
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        x = x.float()
        r = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.size(-1) + eps)
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return (n * weight).to(dtype)

    @staticmethod
    def backward(ctx, g):
        n, r, weight = ctx.saved_tensors
        g = g.float()
        gn = g * n
        g_weight = gn.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = (gn @ weight.float() / n.size(-1)).unsqueeze(-1)
        return torch.addcmul(g * weight, n, mean, value=-1).mul_(r), g_weight, None, None


def lora_linear(x, weight, bias, a, b, scaling: float) -> torch.Tensor:
    """F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, a), b), for a frozen weight and bias.

    x (..., in), weight (out, in), bias (out,) or None, a (rank, in), b (out, rank) -> (..., out) in the type
    of a, which is that of b.
    """
    bias = None if bias is None else bias.to(a.dtype)
    return _LoRALinear.apply(x.to(a.dtype), weight.to(a.dtype), bias, a, b, scaling)


class _LoRALinear(torch.autograd.Function):
    """The product with B is added into W x where W x lies, without a tensor of its own as wide as the output.

    Likewise, the part of the gradient that comes back through A is added into the part that came through W.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        ctx.scaling, rows = scaling, x.reshape(-1, x.size(-1))  # (N, in)
        h = F.linear(rows, a)  # (N, rank)
        ctx.save_for_backward(rows, h, weight, a, b)  # rows are kept for the gradient of A; W has none
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
