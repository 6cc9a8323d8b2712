"""Frozen weights in fewer bits: NF4 to train adapters over, int8 to decode faster.

    model = quantize_model(load_model("out/full_sft"))  # NF4; then apply_lora, freeze_all_but_lora, train
    print(memory_line(model))                            # ..., 4.127 bits each
    model = quantize_int8(load_model("out/full_sft"))   # int8; then generate

int8 is plain rounding to 255 steps: see Int8Linear. NF4 is the base under QLoRA's adapters (Dettmers et al.
2023, arXiv:2305.14314).

Weights are close to normal, so the 16 values that 4 bits can name are quantiles of a normal distribution,
scaled to [-1, 1]. Each block of 64 weights is stored as 64 codes and one scale, its largest absolute value:

    [0.5, -1.0, 0.05, ...]  ->  absmax 1.0  ->  nearest values 0.44, -1.0, 0.08, ...  ->  codes 12, 0, 8, ...

Double quantization stores the scales in 8 bits too, 256 of them to one float32: 4 + 8/64 + 32/(64 * 256) =
4.127 bits a weight instead of 4.5. Codes and constants are those of bitsandbytes, bit for bit.
"""

import functools
import json
import math

import torch
import torch.nn.functional as F
from torch import nn

from model.transformer import ModelError, matmul_dtype

BLOCK = 64  # weights to a scale
NESTED_BLOCK = 256  # scales to a scale of scales
FEW = 8  # rows of x up to which the int8 kernel is faster than dense weights
KERNEL_WIDTH = 32  # it takes widths that are multiples of this, and reads beyond the end of others
_STATE = "quant_state.bitsandbytes__nf4"  # the key of what bitsandbytes stores besides tensors, as JSON

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0])


def _dynamic_code() -> torch.Tensor:
    """The 256 values of the signed 8-bit "dynamic" code (Dettmers 2015, arXiv:1511.04561), in order.

    Seven decades, the largest up to 1 with 64 values, each smaller one with half as many, of both signs; and
    0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


DYNAMIC = _dynamic_code()
# Both weights of a byte at once, the first in its upper half: 256 pairs of float32, each seen as one int64,
# because one look-up of 8 bytes is several times as fast as two of 4.
PAIRS = torch.stack((NF4.repeat_interleave(16), NF4.repeat(16)), dim=1).view(torch.int64).flatten()


def _nearest(x: torch.Tensor, values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (n,) float32 -> which of `values` is nearest to x / absmax (n,) uint8; absmax (n / block,)."""
    n = x.numel()
    x = F.pad(x, (0, -n % block)).view(-1, block)
    absmax = x.abs().amax(dim=1)
    # Times the reciprocal and not divided, as bitsandbytes does: the last bit can decide.
    x = (x * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    values = values.to(x.device)
    nearest = torch.bucketize(x, (values[1:] + values[:-1]) / 2, out_int32=True)
    return nearest.to(torch.uint8).flatten()[:n], absmax


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight, n values -> codes (n / 2,) uint8, the first of two in the upper half; absmax (n / 64,)."""
    codes, absmax = _nearest(weight.detach().flatten().float(), NF4, BLOCK)
    codes = F.pad(codes, (0, codes.numel() % 2), value=7).view(-1, 2)  # an odd one's neighbour: 7 is zero
    return codes[:, 0] << 4 | codes[:, 1], absmax


@functools.cache
def _kernels(device: torch.device):
    """bitsandbytes' operators, one fast kernel each, where they run: on a GPU with bitsandbytes installed."""
    if device.type != "cuda":
        return None
    try:
        import bitsandbytes  # noqa: F401

        codes, absmax = quantize_nf4(torch.ones(BLOCK, device=device))
        torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK, "nf4", (1, BLOCK), torch.float32)
    except Exception:  # not installed, or not built for this GPU: PyTorch computes the same, only slower
        return None
    return torch.ops.bitsandbytes


def dequantize_nf4(codes: torch.Tensor, absmax: torch.Tensor, shape, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of quantize_nf4, as far as there is one: a tensor of that shape and dtype."""
    if kernels := _kernels(codes.device):
        return kernels.dequantize_4bit(codes, absmax, BLOCK, "nf4", shape, dtype)
    n = math.prod(shape)
    if short := -codes.numel() % (BLOCK // 2):  # the last block is not full
        codes = F.pad(codes, (0, short))
    # non_blocking, here and below: else each layer would have the CPU wait for the GPU.
    weight = PAIRS.to(codes.device, non_blocking=True).index_select(0, codes.int()).view(torch.float32)
    return (weight.view(-1, BLOCK) * absmax[:, None]).to(dtype).flatten()[:n].view(shape)


def quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales (n,) float32 -> codes (n,) uint8, nested_absmax (n / 256,) and offset () float32.

    The offset is the mean, taken off first: scales are all positive, and half of the code's values are not.
    """
    offset = absmax.mean()
    return *_nearest(absmax - offset, DYNAMIC, NESTED_BLOCK), offset


def dequantize_absmax(codes, nested_absmax, offset) -> torch.Tensor:
    """The inverse of quantize_absmax: (n,) float32."""
    scales = nested_absmax.repeat_interleave(NESTED_BLOCK)[:codes.numel()]
    return DYNAMIC.to(codes.device, non_blocking=True).index_select(0, codes.int()) * scales + offset


def _dense(shape, dtype, codes, absmax, *nested) -> torch.Tensor:
    return dequantize_nf4(codes, dequantize_absmax(absmax, *nested) if nested else absmax, shape, dtype)


# y = x W^T + b as one operator, opaque to torch.compile, with a backward of its own that dequantizes again.
# Autograd would keep every dense weight for the backward pass; so would the compiler, seeing two equal
# computations in one graph. `stored` are the tensors of NF4Linear._stored.


@torch.library.custom_op("seedling::nf4_linear", mutates_args=())
def nf4_linear(x: torch.Tensor, stored: list[torch.Tensor], bias: torch.Tensor | None,
               out_features: int) -> torch.Tensor:
    return F.linear(x, _dense((out_features, x.size(-1)), x.dtype, *stored), bias)


@torch.library.custom_op("seedling::nf4_linear_backward", mutates_args=())
def nf4_linear_backward(grad: torch.Tensor, stored: list[torch.Tensor], in_features: int) -> torch.Tensor:
    return grad @ _dense((grad.size(-1), in_features), grad.dtype, *stored)


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


class NF4Linear(nn.Module):
    """y = W x + b with W in 4 bits, frozen: (..., in) -> (..., out) in the compute dtype, autocast's or x's.

    codes (out * in / 2,) uint8, and absmax (out * in / 64,): float32, or with double quantization uint8 in
    units of nested_absmax (out * in / 64 / 256,) float32, around nested_offset () float32.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, double_quant: bool = True,
                 device=None):
        super().__init__()
        self.in_features, self.out_features, self.double_quant = in_features, out_features, double_quant
        n = in_features * out_features
        blocks = math.ceil(n / BLOCK)

        # Parameters and not buffers: those DDP would send to every rank in every step.
        def frozen(*size, dtype=torch.float32):
            return nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

        self.codes = frozen(math.ceil(n / 2), dtype=torch.uint8)
        self.absmax = frozen(blocks, dtype=torch.uint8 if double_quant else torch.float32)
        if double_quant:
            self.nested_absmax = frozen(math.ceil(blocks / NESTED_BLOCK))
            self.nested_offset = frozen()
        self.bias = frozen(out_features) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, double_quant: bool = True) -> "NF4Linear":
        """The quantized form of a linear layer; its bias is kept as it is."""
        weight = linear.weight
        new = cls(linear.in_features, linear.out_features, double_quant=double_quant, device=weight.device)
        codes, absmax = quantize_nf4(weight)
        new.codes.copy_(codes)
        if double_quant:
            for parameter, value in zip(new._stored()[1:], quantize_absmax(absmax), strict=True):
                parameter.copy_(value)
        else:
            new.absmax.copy_(absmax)
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return new.train(linear.training)

    def _stored(self) -> list[nn.Parameter]:
        names = ("codes", "absmax", "nested_absmax", "nested_offset")
        return [getattr(self, name) for name in names if name in self._parameters]

    @property
    def packed(self) -> int:
        """How many weights there are beyond the numbers that are stored for them: see count_parameters."""
        return self.in_features * self.out_features - sum(stored.numel() for stored in self._stored())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W as a new dense tensor (out, in)."""
        return _dense((self.out_features, self.in_features), dtype, *self._stored())

    def forward(self, x):
        dtype = matmul_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nf4_linear(x.to(dtype), self._stored(), bias, self.out_features)

    def _apply(self, fn, recurse=True):
        """What model.to(...) calls. The constants follow to a device, but no cast may round them."""
        exact = [(parameter, parameter.data) for parameter in self._stored()]
        super()._apply(fn, recurse)
        for parameter, data in exact:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        return self

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, double_quant={self.double_quant}")


class Int8Linear(nn.Module):
    """y = W x + b with W in 8 bits, frozen: each row of W is whole numbers from -127 to 127 times one scale.

        row [0.5, -1.27, 0.013] -> scale 1.27 / 127 = 0.01 -> codes [50, -127, 1], off by scale / 2 at most

    codes (out, in) int8, scale (out,) bfloat16. Decoding waits for weights to come from memory, and these are
    a quarter of float32's. On a CPU, few rows of x are multiplied with the codes as they are, by a kernel
    that takes and gives bfloat16; for many rows, and on other devices, W is made anew in the type of x.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
        codes = (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
        self.codes, self.scale = (nn.Parameter(stored, requires_grad=False) for stored in (codes, scale))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def packed(self) -> int:
        """As NF4Linear's: scales are stored, but are no weights."""
        return -self.scale.numel()

    def dequantize(self) -> torch.Tensor:
        """W as a new dense tensor (out, in) in float32."""
        return self.codes.float() * self.scale[:, None].float()

    def forward(self, x):
        dtype, bias = matmul_dtype(x), self.bias
        rows = x.reshape(-1, self.in_features)  # (N, in)
        if x.device.type == "cpu" and len(rows) <= FEW and self.in_features % KERNEL_WIDTH == 0:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.codes, self.scale).to(dtype)
        else:
            y = F.linear(rows.to(dtype), self.codes.to(dtype)) * self.scale.to(dtype)
        y = y if bias is None else y + bias.to(dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse=True):
        """What model.to(...) calls: it moves, but casts no scale."""
        scale = self.scale.data
        super()._apply(fn, recurse)
        self.scale.data = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def quantize_int8(model: nn.Module) -> nn.Module:
    """Every nn.Linear, lm_head too, becomes an Int8Linear, in place; embedding and norms stay as they are.

    Raises ModelError, the model untouched: as quantize_model.
    """
    for name, linear in _to_quantize(model, but=()).items():
        model.set_submodule(name, Int8Linear(linear.weight, linear.bias).train(linear.training))
    return model


def quantize_model(model: nn.Module, double_quant: bool = True) -> nn.Module:
    """Every nn.Linear but lm_head becomes an NF4Linear, in place; embedding, norms and head stay as they are.

    Raises ModelError, the model untouched: LoRA is there already, nothing to quantize, weights that are no
    numbers.
    """
    linears = _to_quantize(model, but=("lm_head",))
    for name in list(linears):
        model.set_submodule(name, NF4Linear.from_linear(linears.pop(name), double_quant))  # frees the old one
    return model


def _to_quantize(model: nn.Module, but: tuple[str, ...]) -> dict[str, nn.Linear]:
    linears = {name: module for name, module in model.named_modules()
               if type(module) is nn.Linear and name.split(".")[-1] not in ("", *but)}
    if any(".lora." in name for name in linears):
        raise ModelError("quantize the model before apply_lora, not after: adapters stay as they are")
    if any(isinstance(module, (NF4Linear, Int8Linear)) for module in model.modules()):
        raise ModelError("nothing to quantize: its linear layers are quantized already")
    if not linears:
        raise ModelError("nothing to quantize: it has no linear layers")
    for name, linear in linears.items():
        if not linear.weight.isfinite().all():
            raise ModelError(f"can't quantize {name}: its weights hold NaN or infinity")
    return linears


@torch.no_grad()
def dequantize_model(model: nn.Module) -> nn.Module:
    """Every NF4Linear becomes an nn.Linear in float32, in place; what rounding took is lost.

    Raises ModelError, the model untouched, where LoRA is in the way.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    if any(hasattr(layer, "lora") for layer in layers.values()):
        raise ModelError("dequantize the model before apply_lora or after remove_lora: LoRA would be lost")
    for name in list(layers):
        layer = layers.pop(name)
        with torch.device("meta"):  # no memory for weights that are replaced at once
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = nn.Parameter(layer.dequantize())
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().clone())
        model.set_submodule(name, linear.train(layer.training))
    return model


def _quantized(model: nn.Module) -> list[NF4Linear]:
    return [module for module in model.modules() if isinstance(module, NF4Linear)]


def _weights_and_bytes(model: nn.Module) -> tuple[int, int]:
    layers = _quantized(model)
    if not layers:
        raise ModelError("the model has no quantized layer: call quantize_model first")
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return weights, sum(stored.nbytes for layer in layers for stored in layer._stored())


def bits_per_parameter(model: nn.Module) -> float:
    """Bits that a quantized weight takes, its share of the constants included: 4.127, or 4.5 without double
    quantization. Raises ModelError where nothing is quantized."""
    weights, size = _weights_and_bytes(model)
    return 8 * size / weights


def memory_line(model: nn.Module) -> str:
    """What quantization saved, for a person to read. Raises ModelError where nothing is quantized."""
    weights, size = _weights_and_bytes(model)
    return (f"{weights:,} weights in NF4: {size / 2**20:.1f} MiB, {8 * size / weights:.3f} bits each "
            f"({2 * weights / 2**20:.1f} MiB in bfloat16)")


# --- on disk: the format of transformers with bitsandbytes ------------------------------------------------


def quantization_config(model: nn.Module) -> dict | None:
    """What config.json says about the quantized layers of the model; None where there are none."""
    layers = _quantized(model)
    if not layers:
        return None
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": layers[0].double_quant, "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": "float32",  # bitsandbytes takes it for "as the input"
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
        tensors[f"{weight}.quant_map"] = NF4.clone()
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32",
                 "shape": [layer.out_features, layer.in_features]}
        if layer.double_quant:
            tensors[f"{weight}.nested_absmax"] = tensors.pop(f"{name}.nested_absmax")
            tensors[f"{weight}.nested_quant_map"] = DYNAMIC.clone()
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
                      "nested_offset": tensors.pop(f"{name}.nested_offset").item()}
        tensors[f"{weight}.{_STATE}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def from_bitsandbytes(model: nn.Module, tensors: dict) -> dict:
    """The inverse: -> a state dict, and what `tensors` hold in 4 bits becomes an NF4Linear of the model.

    The new layers are on the meta device. Raises ModelError for another code, block size or shape, and for
    what is missing or damaged; the shapes of the tensors themselves are left to the caller.
    """
    tensors = dict(tensors)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for key in [key for key in tensors if ".weight.quant_state." in key]:
        name, kind = key.split(".weight.", 1)
        if kind != _STATE:
            raise ModelError(f"{name} is quantized as {kind.removeprefix('quant_state.')}; only NF4 is read")
        if name not in linears:
            raise ModelError(f"{name} is quantized, but is no linear layer of the model")
        linear = linears[name]
        try:
            if tensors[key].numel() > 10_000:  # bytes; it takes 150
                raise ValueError("its description is too long")
            state = json.loads(bytes(tensors.pop(key).tolist()))
            constants = {"quant_map": NF4}
            found = {"blocksize": state["blocksize"], "shape": list(state["shape"])}
            wanted = {"blocksize": BLOCK, "shape": [linear.out_features, linear.in_features]}
            nested = "nested_blocksize" in state
            if nested:
                constants["nested_quant_map"] = DYNAMIC
                found["nested_blocksize"] = state["nested_blocksize"]
                wanted["nested_blocksize"] = NESTED_BLOCK
                tensors[f"{name}.nested_offset"] = torch.tensor(float(state["nested_offset"]))
                tensors[f"{name}.nested_absmax"] = tensors.pop(f"{name}.weight.nested_absmax")
            for constant, table in constants.items():
                same = torch.equal(tensors.pop(f"{name}.weight.{constant}"), table)
                found[constant], wanted[constant] = "standard" if same else "its own", "standard"
            tensors[f"{name}.absmax"] = tensors.pop(f"{name}.weight.absmax")
            tensors[f"{name}.codes"] = tensors.pop(f"{name}.weight").flatten().view(torch.uint8)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{name}: its 4-bit weight is incomplete or damaged ({error})") from None
        if wrong := [f"{key} {found[key]}, not {wanted[key]}" for key in wanted if found[key] != wanted[key]]:
            raise ModelError(f"{name}: its 4-bit weight can't be read: {', '.join(wrong)}")
        layer = NF4Linear(linear.in_features, linear.out_features, linear.bias is not None, nested, "meta")
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        model.set_submodule(name, layer.train(linear.training))
    return tensors
