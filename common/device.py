"""Which device computes, and in which number type: the only file that knows what hardware can do.
A reader may skip this file.
"""

import ctypes
import sys

import torch

from common.errors import UsageError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name. `auto` takes CUDA, then Apple's MPS, then the CPU.

    local_rank: the number of this process on its machine; "cuda" means the GPU of that number.
    Raises UsageError for a device that is not here.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available = [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), *available]
    chosen = available[0].split(":")[0] if name == "auto" else name
    chosen = f"cuda:{local_rank}" if chosen == "cuda" else chosen
    if chosen not in available and chosen.removesuffix(":0") not in available:
        raise UsageError(f"--device {name}: there is no {chosen} here, only {', '.join(available)}")
    return torch.device(chosen)


def fast_half(device: torch.device) -> torch.dtype | None:
    """The 16-bit type that the device multiplies faster than float32; None where there is no such type.

    GPUs since NVIDIA's Ampere (8.0) and CPUs with AVX512-BF16 have bfloat16; older GPUs have float16 alone.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return torch.bfloat16
    return None


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that the forward pass of training computes in. `auto`: whatever the device does fast."""
    if name != "auto":
        return getattr(torch, name)
    return fast_half(device) or torch.float32


def choose_decoding_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the weights of a model that only answers. `auto`: 16 bits on CUDA, float32 elsewhere."""
    if name == "auto" and device.type != "cuda":
        return torch.float32
    return choose_dtype(name, device)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products compute in dtype; with float32 it changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The type of a matrix product of x: autocast's type where autocast is on, else the type of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch with its tensors on the device, also those of a dictionary in it; None stays None."""
    return {name: to_device(value, device) if isinstance(value, dict)
            else value if value is None else value.to(device, non_blocking=True)
            for name, value in batch.items()}


def keep_freed_memory() -> None:
    """Makes glibc keep memory that was freed, which saves about 5 % of a small model's step on a CPU.

    Each step frees and asks for the same large tensors. Otherwise the kernel zeroes all their pages anew.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl, another C library, has no such function
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: larger blocks are mapped from the kernel one by one
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: as much may lie unused at the top
