"""Weights in 8 bits, to decode faster. May be skipped: a model decodes without this file, too.

    model = quantize_int8(load_model("out/full_sft"))  # then prepare_to_decode (model/one_token.py), generate
"""

import torch
import torch.nn.functional as F
from torch import nn

from common.device import matmul_dtype
from model.quantize import QuantizedLinear, linears_to_quantize

MAX_KERNEL_ROWS = 8  # with more rows of x, dense weights are faster than the int8 kernel
KERNEL_WIDTH_MULTIPLE = 32  # the kernel takes multiples of this width; with others it reads beyond the end


class Int8Linear(QuantizedLinear):
    """y = W x + b with W in 8 bits, frozen: each row of W is whole numbers from -127 to 127 times one scale.

        row [0.5, -1.27, 0.013] -> scale 1.27 / 127 = 0.01 -> codes [50, -127, 1], off by scale / 2 at most

    codes (out, in) int8, scale (out,) bfloat16. A model that decodes waits for its weights to come from
    memory, and these are a quarter of the size of float32. On a CPU a kernel multiplies a few rows of x with
    the codes themselves, and takes and gives bfloat16. For more rows, and on other devices, W is computed
    again in the type of x.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
        codes = (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def dequantize(self) -> torch.Tensor:
        """W as a new dense tensor (out, in) in float32."""
        return self.codes.float() * self.scale[:, None].float()

    def forward(self, x):
        dtype = matmul_dtype(x)
        rows = x.reshape(-1, self.in_features)  # (N, in)
        fits_kernel = len(rows) <= MAX_KERNEL_ROWS and self.in_features % KERNEL_WIDTH_MULTIPLE == 0
        if x.device.type == "cpu" and fits_kernel:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.codes, self.scale).to(dtype)
        else:
            y = F.linear(rows.to(dtype), self.codes.to(dtype)) * self.scale.to(dtype)
        if self.bias is not None:
            y = y + self.bias.to(dtype)
        return y.view(*x.shape[:-1], self.out_features)


def quantize_int8(model: nn.Module) -> nn.Module:
    """Every nn.Linear, lm_head too, becomes an Int8Linear, in place; embedding and norms stay as they are.

    Raises ModelError in the same cases as quantize_model.
    """
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for name, linear in linears_to_quantize(model, but=()).items():
        layer = Int8Linear(linear.weight, linear.bias).train(linear.training)
        layer.is_copy = any(linear.weight is weight for weight in embeddings)
        model.set_submodule(name, layer)
    return model
