"""GGUF files as containers: named fields and named tensors, read with care. A reader may skip this file.

    fields, tensors = read_gguf(Path("x.gguf"))
    fields["general.architecture"]             # "llama"
    tensors["token_embd.weight"].numbers()     # float32, whatever the file holds

The package gguf has a reader, too. That reader trusts what a file says of itself: a count of 2^60 keeps it
busy until the memory is full. Here every length is compared with the size of the file first. From the package
come the sizes of the types and the arithmetic that turns quantized numbers into floats.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from common import files
from common.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, unless the file says otherwise
MAX_DIMENSIONS = 4
SCALARS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))  # type in the file -> numpy's
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9


def package():
    """The package gguf. Raises ModelError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ModelError("GGUF files need the package gguf: pip install -r requirements-export.txt") from None
    return gguf


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, or has their ending."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC or path.suffix.lower() == ".gguf"


@dataclass
class StoredTensor:
    """One tensor of a file: its shape in torch's order, the name of its type, its bytes (rows, bytes)."""

    shape: tuple[int, ...]
    kind: str
    stored: np.ndarray

    def numbers(self) -> torch.Tensor:
        """float32, as the package gguf computes it. Raises ModelError for a type it has no arithmetic for."""
        gguf = package()
        try:
            with np.errstate(all="ignore"):  # a damaged file has NaN in it, which is refused elsewhere
                numbers = gguf.quants.dequantize(self.stored, gguf.GGMLQuantizationType[self.kind])
        except NotImplementedError:
            raise ModelError(f"tensors of type {self.kind} are not read") from None
        return torch.from_numpy(np.array(numbers, dtype=np.float32).reshape(self.shape))


def read_gguf(path: Path) -> tuple[dict, dict[str, StoredTensor]]:
    """The fields and the tensors of a file, which stays mapped: bytes are read when they are used.

    Raises ModelError for a file that is cut off, contradicts itself, or is of another version.
    """
    gguf = package()
    with files.explained(path), path.open("rb") as file:
        if what := files.kind_unlike_name(path):
            raise ModelError(f"no GGUF file but {what}")
        if path.stat().st_size < 24:
            raise ModelError("cut off: shorter than the head of a GGUF file")
        head = Head(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if head.take(4) != MAGIC:
            raise ModelError("no GGUF file: it begins with other bytes")
        if (version := head.scalar("<u4")) not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
                raise ModelError("big-endian, made for another kind of machine; only little-endian is read")
            raise ModelError(f"GGUF of version {version}; only {VERSIONS[0]} and {VERSIONS[1]} are read")
        num_tensors, num_fields = head.count(24), head.count(12)
        fields = {}
        for _ in range(num_fields):
            name = head.string()
            if name in fields:
                raise ModelError(f"holds the field {name[:100]} twice")
            fields[name] = head.value()
        if fields.get("split.count", 1) not in (0, 1):
            raise ModelError(f"one part of {fields['split.count']}: join them first, with llama.cpp's "
                             "llama-gguf-split --merge")
        places = [(head.string(), head.dimensions(), head.scalar("<u4"), head.scalar("<u8"))
                  for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
            raise ModelError(f"general.alignment is {alignment!r}")
        start = math.ceil(head.at / alignment) * alignment
        content = np.frombuffer(head.data, dtype=np.uint8)
        tensors, stretches = {}, []
        for name, shape, number, offset in places:
            if name in tensors:
                raise ModelError(f"holds the tensor {name[:100]} twice")
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError:
                raise ModelError(f"{name[:100]} has the unknown type {number}") from None
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise ModelError(f"{name[:100]}: rows of {shape[-1]} numbers can't be {kind.name}")
            rows, bytes_of_row = math.prod(shape[:-1]), shape[-1] // block * size
            end = start + offset + rows * bytes_of_row
            stretches.append((start + offset, end, name))
            if offset % alignment or end > len(content):
                raise ModelError(f"cut off, or damaged: {name[:100]} would end at byte {end:,} of "
                                 f"{len(content):,}")
            stored = content[start + offset : end].reshape(rows, bytes_of_row)
            tensors[name] = StoredTensor(shape, kind.name, stored)
        stretches.sort()
        for (_, end, before), (begin, _, name) in pairwise(stretches):
            if begin < end:  # else they could claim more than the file has, all of them together
                raise ModelError(f"damaged: {name[:100]} lies over {before[:100]}")
    return fields, tensors


class Head:
    """Reads the head of a file, from its first byte on. Every method raises ModelError at the file's end."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ModelError(f"cut off, or damaged: {size:,} bytes are asked for at byte {self.at:,} of "
                             f"{len(self.data):,}")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, kind: str):
        return np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0].item()

    def count(self, least: int) -> int:
        """How many things follow, each of `least` bytes or more."""
        number = int.from_bytes(self.take(8), "little")
        if number * least > len(self.data) - self.at:
            raise ModelError(f"cut off, or damaged: {number:,} entries from byte {self.at:,} on, of "
                             f"{len(self.data):,}")
        return number

    def string(self) -> str:
        return self.take(self.count(1)).decode("utf-8")

    def dimensions(self) -> tuple[int, ...]:
        """A shape. GGUF names the longest step last, and torch names it first."""
        number = self.scalar("<u4")
        if not 0 < number <= MAX_DIMENSIONS:
            raise ModelError(f"a tensor of {number} dimensions")
        shape = struct.unpack(f"<{number}Q", self.take(8 * number))[::-1]
        if not 0 < math.prod(shape) < 2**48:
            raise ModelError(f"a tensor of shape {list(shape)}")
        return shape

    def value(self):
        """A number, a text, a truth value, or a list of one of these."""
        kind = self.scalar("<u4")
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ModelError(f"a field of the unknown type {kind}")
        kind = self.scalar("<u4")
        if kind == STRING:
            return [self.string() for _ in range(self.count(8))]
        if kind not in SCALARS:
            raise ModelError(f"a list of the unknown type {kind}")
        number = self.count(np.dtype(SCALARS[kind]).itemsize)
        return np.frombuffer(self.take(number * np.dtype(SCALARS[kind]).itemsize), SCALARS[kind]).tolist()
