"""Weights in 8 bits, to decode faster. May be skipped: a model decodes without this file, too.

    model = quantize_int8(load_model("out/full_sft"))  # then prepare_to_decode (model/one_token.py), generate
"""

import torch
import torch.nn.functional as F
from torch import nn

from common.device import matmul_dtype
from model.quantize import QuantizedLinear, linears_to_quantize

MAX_KERNEL_ROWS = 8  # with more rows of x, products of whole numbers are faster than the int8 kernel
KERNEL_WIDTH_MULTIPLE = 32  # the kernel takes multiples of this width; with others it reads beyond the end
# Older CPUs add up pairs of products in 16 bits, where large ones are cut off. VNNI adds them in 32 bits.
MULTIPLIES_WHOLE_NUMBERS = torch.cpu._is_vnni_supported()


@torch.no_grad()  # 8 bits are for decoding
def multiply_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (N, in), codes (out, in) int8, scale (out,) -> (N, out) in the type of x.

    A few rows go through a kernel that takes and gives bfloat16. For more rows each row of x becomes whole
    numbers, too, and the CPU multiplies whole numbers several times as fast as float32. 8 bits of x would be
    too few: in some models one value of x is a hundred times as large as most. So x is the sum of two parts,
    and the second part is what rounding the first part left:
        step = max |x| / 127        x / step = 37.281 = 37 + 71 / 254 (+ 0.0015)
    A row's result is the same to the bit, whatever the rows beside it.
    """
    if x.device.type == "cpu" and len(x) <= MAX_KERNEL_ROWS and x.size(1) % KERNEL_WIDTH_MULTIPLE == 0:
        return torch._weight_int8pack_mm(x.bfloat16(), codes, scale).to(x.dtype)
    if x.device.type != "cpu" or not MULTIPLIES_WHOLE_NUMBERS:
        return F.linear(x, codes.to(x.dtype)) * scale.to(x.dtype)
    step = x.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30).float() / 127  # (N, 1)
    steps = x / step
    first = steps.round()
    second = steps.sub_(first).mul_(254).round_()
    sums = torch._int_mm(torch.cat([first, second]).to(torch.int8), codes.t()).float()  # (2 N, out)
    first, second = sums.chunk(2)
    return first.add_(second, alpha=1 / 254).mul_(step).mul_(scale).to(x.dtype)


class Int8Linear(QuantizedLinear):
    """y = W x + b with W in 8 bits, frozen: each row of W is whole numbers from -127 to 127 times one scale.

        row [0.5, -1.27, 0.013] -> scale 1.27 / 127 = 0.01 -> codes [50, -127, 1], off by scale / 2 at most

    codes (out, in) int8, scale (out,) bfloat16. A model that decodes waits for its weights to come from
    memory, and these are a quarter of the size of float32.
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
        y = multiply_int8(x.reshape(-1, self.in_features).to(dtype), self.codes, self.scale)
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
