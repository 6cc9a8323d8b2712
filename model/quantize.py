"""Frozen weights in 4 bits (NF4), for QLoRA: adapters that train over them. A reader may skip this file.

    model = quantize_model(load_model("out/full_sft"))  # then apply_lora, freeze_all_but_lora, train
    print(memory_line(model))                            # ..., 4.127 bits each

QLoRA: Dettmers et al. 2023, arXiv:2305.14314. Weights are close to normal, so the 16 values that 4 bits can
name are quantiles of a normal distribution, scaled to [-1, 1]. 64 weights are stored as 64 codes and one
scale, which is their largest absolute value ("absmax"):

    [0.5, -1.0, 0.05, ...]  ->  absmax 1.0  ->  nearest values 0.44, -1.0, 0.08, ...  ->  codes 12, 0, 8, ...

Double quantization stores the scales in 8 bits too, with one float32 for 256 of them. This takes
4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight instead of 4.5. Codes and constants are those of bitsandbytes,
bit for bit.
"""

import functools
import json
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import matmul_dtype
from common.errors import ModelError
from common.files import check_finite

WEIGHTS_PER_SCALE = 64
SCALES_PER_NESTED_SCALE = 256
QUANT_STATE = "quant_state.bitsandbytes__nf4"  # the key under which bitsandbytes describes a weight, in JSON
MAX_QUANT_STATE_BYTES = 10_000  # a description takes about 150

NF4_VALUES = torch.tensor([  # nine digits name a float32 exactly
    -1.0, -0.696192801, -0.525073051, -0.394917488, -0.284441382, -0.184773430, -0.0910500363, 0.0,
    0.0795802996, 0.160930201, 0.246112302, 0.337915242, 0.440709829, 0.562617004, 0.722956836, 1.0])
# The two weights of each byte, the first in its upper half: 256 pairs of float32. A pair is seen as one int64
# because one look-up of 8 bytes is several times as fast as two of 4.
NF4_PAIRS = torch.cartesian_prod(NF4_VALUES, NF4_VALUES).view(torch.int64).flatten()


def _dynamic_values() -> Tensor:
    """The 256 values of the signed 8-bit "dynamic" code (Dettmers 2015, arXiv:1511.04561), in order.

    There are seven decades, each with both signs. The largest decade reaches up to 1 and has 64 values, and
    each smaller one has half as many. 0 and 1 are added.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


DYNAMIC_VALUES = _dynamic_values()


# --- numbers to codes, and back ---------------------------------------------------------------------------


def _nearest(x: Tensor, values: Tensor, per_scale: int) -> tuple[Tensor, Tensor]:
    """x (n,) float32 -> which of `values` is nearest to x / absmax (n,) uint8; absmax (n / per_scale,)."""
    n = x.numel()
    x = F.pad(x, (0, -n % per_scale)).view(-1, per_scale)
    absmax = x.abs().amax(dim=1)
    # Like bitsandbytes, this multiplies by the reciprocal and does not divide: the last bit can decide.
    x = (x * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    values = values.to(x.device)
    nearest = torch.bucketize(x, (values[1:] + values[:-1]) / 2, out_int32=True)
    return nearest.to(torch.uint8).flatten()[:n], absmax


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight, n values -> codes (n / 2,) uint8, the first of two in the upper half; absmax (n / 64,)."""
    codes, absmax = _nearest(weight.detach().flatten().float(), NF4_VALUES, WEIGHTS_PER_SCALE)
    codes = F.pad(codes, (0, codes.numel() % 2), value=7).view(-1, 2)  # if n is odd, a zero follows: code 7
    return codes[:, 0] << 4 | codes[:, 1], absmax


@functools.cache
def bitsandbytes_operators(device: torch.device):
    """bitsandbytes' operators, each a fast kernel; None where they are not installed or do not run."""
    if device.type != "cuda":
        return None
    try:
        import bitsandbytes  # noqa: F401

        codes, absmax = quantize_nf4(torch.ones(64, device=device))
        torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, 64, "nf4", (1, 64), torch.float32)
    except Exception:  # not installed, or not built for this GPU: PyTorch computes the same, only slower
        return None
    return torch.ops.bitsandbytes


def dequantize_nf4(stored: list[Tensor], shape, dtype: torch.dtype) -> Tensor:
    """The inverse of quantize_nf4, but for the rounding: a tensor of that shape and dtype.

    stored: codes and absmax, or with double quantization codes and what quantize_absmax returns.
    """
    codes, absmax, *nested = stored
    if nested:
        absmax = dequantize_absmax(absmax, *nested)
    operators = bitsandbytes_operators(codes.device)
    if operators is not None:
        return operators.dequantize_4bit(codes, absmax, WEIGHTS_PER_SCALE, "nf4", shape, dtype)
    n = math.prod(shape)
    missing = -codes.numel() % (WEIGHTS_PER_SCALE // 2)  # where the last scale has fewer weights
    if missing:
        codes = F.pad(codes, (0, missing))
    # non_blocking, here and below: otherwise the CPU would wait for the GPU in each layer.
    weight = NF4_PAIRS.to(codes.device, non_blocking=True).index_select(0, codes.int()).view(torch.float32)
    return (weight.view(-1, WEIGHTS_PER_SCALE) * absmax[:, None]).to(dtype).flatten()[:n].view(shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales (n,) float32 -> codes (n,) uint8, nested_absmax (n / 256,) and offset () float32.

    The offset is the mean. It is subtracted first, because scales are all positive, and half of the values
    that a code can name are negative.
    """
    offset = absmax.mean()
    codes, nested_absmax = _nearest(absmax - offset, DYNAMIC_VALUES, SCALES_PER_NESTED_SCALE)
    return codes, nested_absmax, offset


def dequantize_absmax(codes, nested_absmax, offset) -> Tensor:
    """The inverse of quantize_absmax: (n,) float32."""
    scales = nested_absmax.repeat_interleave(SCALES_PER_NESTED_SCALE)[:codes.numel()]
    return DYNAMIC_VALUES.to(codes.device, non_blocking=True).index_select(0, codes.int()) * scales + offset


# --- layers -----------------------------------------------------------------------------------------------

# y = x W^T + b is one operator, closed to torch.compile. Its backward pass dequantizes W again.
# Otherwise autograd would keep every dense W for the backward pass. The compiler would keep it as well, since
# it would see the same computation twice in one graph. `stored` is what NF4Linear.stored() returns.


@torch.library.custom_op("seedling::nf4_linear", mutates_args=())
def nf4_linear(x: Tensor, stored: list[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    return F.linear(x, dequantize_nf4(stored, (out_features, x.size(-1)), x.dtype), bias)


@torch.library.custom_op("seedling::nf4_linear_backward", mutates_args=())
def nf4_linear_backward(grad: Tensor, stored: list[Tensor], in_features: int) -> Tensor:
    return grad @ dequantize_nf4(stored, (grad.size(-1), in_features), grad.dtype)


@nf4_linear.register_fake
def _(x, stored, bias, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


@nf4_linear_backward.register_fake
def _(grad, stored, in_features):
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup_context(ctx, inputs, output):
    x, stored, _, _ = inputs
    ctx.save_for_backward(*stored)
    ctx.in_features = x.size(-1)


def _backward(ctx, grad):
    stored = list(ctx.saved_tensors)
    return nf4_linear_backward(grad, stored, ctx.in_features), [None] * len(stored), None, None


nf4_linear.register_autograd(_backward, setup_context=_setup_context)


class QuantizedLinear(nn.Module):
    """A frozen layer y = W x + b that stores W (out, in) in fewer bits: an NF4Linear or an Int8Linear.

    Both kinds also have dequantize(), which returns W.
    """

    is_copy = False  # True for the output head where another layer, the embedding, holds the same W

    def stored(self) -> list[nn.Parameter]:
        """The parameters that W is computed from, in the order in which __init__ makes them."""
        return [parameter for name, parameter in self._parameters.items() if name != "bias"]

    def _apply(self, fn, recurse=True):
        """model.to(...) calls this method. Stored numbers move to a device, but no cast may round them."""
        exact = [(parameter, parameter.data) for parameter in self.stored()]
        super()._apply(fn, recurse)
        for parameter, data in exact:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class NF4Linear(QuantizedLinear):
    """y = W x + b with W in 4 bits, frozen: (..., in) -> (..., out) in the compute dtype, autocast's or x's.

    codes (out * in / 2,) uint8, and absmax (out * in / 64,): float32, or with double quantization uint8 in
    units of nested_absmax (out * in / 64 / 256,) float32, around nested_offset () float32.
    """

    def __init__(self, linear: nn.Linear, double_quant: bool = True):
        """The sizes, the device, the bias and the mode are those of `linear`. W is not filled yet."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.double_quant = double_quant
        weight, bias = linear.weight, linear.bias
        scales = math.ceil(weight.numel() / WEIGHTS_PER_SCALE)

        # Parameters and no buffers, because DDP would send buffers to every process in each step.
        def frozen(*size, dtype=torch.float32):
            return nn.Parameter(torch.empty(size, dtype=dtype, device=weight.device), requires_grad=False)

        self.codes = frozen(math.ceil(weight.numel() / 2), dtype=torch.uint8)
        self.absmax = frozen(scales, dtype=torch.uint8 if double_quant else torch.float32)
        if double_quant:
            self.nested_absmax = frozen(math.ceil(scales / SCALES_PER_NESTED_SCALE))
            self.nested_offset = frozen()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.train(linear.training)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, double_quant: bool = True) -> "NF4Linear":
        """The quantized form of a linear layer; its bias is kept as it is."""
        new = cls(linear, double_quant)
        codes, absmax = quantize_nf4(linear.weight)
        scales = quantize_absmax(absmax) if double_quant else [absmax]
        for parameter, value in zip(new.stored(), [codes, *scales], strict=True):
            parameter.copy_(value)
        return new

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as a new dense tensor (out, in)."""
        return dequantize_nf4(self.stored(), (self.out_features, self.in_features), dtype)

    def forward(self, x):
        dtype = matmul_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nf4_linear(x.to(dtype), self.stored(), bias, self.out_features)


# --- models -----------------------------------------------------------------------------------------------


def quantize_model(model: nn.Module, double_quant: bool = True) -> nn.Module:
    """Every nn.Linear but lm_head becomes an NF4Linear, in place; embedding, norms and head stay as they are.

    Raises ModelError and leaves the model as it was if it has LoRA already, if there is nothing to quantize,
    or if weights are NaN or infinite.
    """
    linears = linears_to_quantize(model, but=("lm_head",))
    for name in list(linears):
        model.set_submodule(name, NF4Linear.from_linear(linears.pop(name), double_quant))  # frees the old one
    return model


def linears_to_quantize(model: nn.Module, but: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Every nn.Linear by its name, but for those whose name ends in one of `but`. Raises ModelError."""
    linears = {name: module for name, module in model.named_modules()
               if type(module) is nn.Linear and name.split(".")[-1] not in ("", *but)}
    if any(".lora." in name for name in linears):
        raise ModelError("quantize the model before apply_lora, not after: adapters stay as they are")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ModelError("nothing to quantize: its linear layers are quantized already")
    if not linears:
        raise ModelError("nothing to quantize: it has no linear layers")
    check_finite({f"{name}.weight": linear.weight for name, linear in linears.items()}, "quantize")
    return linears


@torch.no_grad()
def dequantize_model(model: nn.Module) -> nn.Module:
    """Every NF4Linear becomes an nn.Linear in float32, in place. Its weights are the rounded ones.

    Raises ModelError and leaves the model as it was if it has LoRA.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    if any(hasattr(layer, "lora") for layer in layers.values()):
        raise ModelError("dequantize the model before apply_lora or after remove_lora: LoRA would be lost")
    for name in list(layers):
        layer = layers.pop(name)
        # "meta" takes no memory for weights that are replaced at once.
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight = nn.Parameter(layer.dequantize())
        linear.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        model.set_submodule(name, linear.train(layer.training))
    return model


def count_parameters(model: nn.Module) -> int:
    """The number of weights. A tied matrix counts once, and a weight in 4 or 8 bits is one weight."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            count -= sum(part.numel() for part in layer.stored())
            count += 0 if layer.is_copy else layer.in_features * layer.out_features
    return count


def memory_line(model: nn.Module) -> str:
    """A line on the memory of the quantized weights, for a person. Raises ModelError where there are none.

    The bits of a weight include its share of the constants: 4.127, or 4.5 without double quantization.
    """
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    if not layers:
        raise ModelError("the model has no quantized layer: call quantize_model first")
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    size = sum(part.nbytes for layer in layers for part in layer.stored())
    return (f"{weights:,} weights in NF4: {size / 2**20:.1f} MiB, {8 * size / weights:.3f} bits each "
            f"({2 * weights / 2**20:.1f} MiB in bfloat16)")


# --- on disk: the format of transformers with bitsandbytes ------------------------------------------------


def quantization_config(model: nn.Module) -> dict | None:
    """What config.json says about the quantized layers of the model; None where there are none."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    if not layers:
        return None
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": layers[0].double_quant, "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": "float32",  # for bitsandbytes this means: the type of the input
            "llm_int8_skip_modules": [n for n, module in model.named_modules() if type(module) is nn.Linear]}


def to_bitsandbytes(model: nn.Module, tensors: dict) -> dict:
    """A state dict of the model -> what transformers stores: NAME.weight, NAME.weight.absmax, ..."""
    tensors = dict(tensors)
    for name, layer in model.named_modules():
        if not isinstance(layer, NF4Linear):
            continue
        weight = f"{name}.weight"
        tensors[weight] = tensors.pop(f"{name}.codes")[:, None]
        tensors[f"{weight}.absmax"] = tensors.pop(f"{name}.absmax")
        tensors[f"{weight}.quant_map"] = NF4_VALUES.clone()
        state = {"quant_type": "nf4", "blocksize": WEIGHTS_PER_SCALE, "dtype": "float32",
                 "shape": [layer.out_features, layer.in_features]}
        if layer.double_quant:
            tensors[f"{weight}.nested_absmax"] = tensors.pop(f"{name}.nested_absmax")
            tensors[f"{weight}.nested_quant_map"] = DYNAMIC_VALUES.clone()
            state |= {"nested_blocksize": SCALES_PER_NESTED_SCALE, "nested_dtype": "float32",
                      "nested_offset": tensors.pop(f"{name}.nested_offset").item()}
        tensors[f"{weight}.{QUANT_STATE}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def from_bitsandbytes(model: nn.Module, tensors: dict) -> dict:
    """The inverse: -> a state dict. A layer in 4 bits becomes an NF4Linear of the model.

    The new layers are on the meta device. Raises ModelError for another code, another number of weights per
    scale or another shape, and for what is missing or damaged. The shapes of tensors are left to the caller.
    """
    tensors = dict(tensors)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for state_key in [key for key in tensors if ".weight.quant_state." in key]:
        name, kind = state_key.split(".weight.", 1)
        if kind != QUANT_STATE:
            raise ModelError(f"{name} is quantized as {kind.removeprefix('quant_state.')}; only NF4 is read")
        if name not in linears:
            raise ModelError(f"{name} is quantized, but is no linear layer of the model")
        linear = linears[name]
        try:
            settings = _rename_stored(tensors, name)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{name}: its 4-bit weight is incomplete or damaged ({error})") from None
        ours = {"blocksize": WEIGHTS_PER_SCALE, "nested_blocksize": SCALES_PER_NESTED_SCALE,
                "shape": [linear.out_features, linear.in_features],
                "quant_map": "standard", "nested_quant_map": "standard"}
        wrong = [f"{key} {value}, not {ours[key]}" for key, value in settings.items() if value != ours[key]]
        if wrong:
            raise ModelError(f"{name}: its 4-bit weight can't be read: {', '.join(wrong)}")
        model.set_submodule(name, NF4Linear(linear, double_quant="nested_blocksize" in settings))
    return tensors


def _rename_stored(tensors: dict, name: str) -> dict:
    """Gives the tensors of one 4-bit weight the names that NF4Linear has for them. Returns its settings."""
    def take(key):
        return tensors.pop(f"{name}.weight.{key}")

    def kind(table, values):
        return "standard" if torch.equal(table, values) else "its own"

    description = take(QUANT_STATE)
    if description.numel() > MAX_QUANT_STATE_BYTES:
        raise ValueError("its description is too long")
    state = json.loads(bytes(description.tolist()))
    settings = {"blocksize": state["blocksize"], "shape": list(state["shape"]),
                "quant_map": kind(take("quant_map"), NF4_VALUES)}
    if "nested_blocksize" in state:
        settings["nested_blocksize"] = state["nested_blocksize"]
        settings["nested_quant_map"] = kind(take("nested_quant_map"), DYNAMIC_VALUES)
        tensors[f"{name}.nested_offset"] = torch.tensor(float(state["nested_offset"]))
        tensors[f"{name}.nested_absmax"] = take("nested_absmax")
    tensors[f"{name}.absmax"] = take("absmax")
    tensors[f"{name}.codes"] = tensors.pop(f"{name}.weight").flatten().view(torch.uint8)
    return settings
