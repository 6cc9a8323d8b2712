"""Reading files that a stranger may have made: no code in them runs, and what they claim is checked before
memory is taken for it. Every function raises ModelError, one line, for a file that is missing or damaged."""

import json
import pickle
import re
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from model.transformer import ModelError

LARGEST_JSON = 64 * 2**20  # bytes; the index of the largest models is under one million


def one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def clean(name: str) -> str:
    """A parameter's name without what DDP and torch.compile put into it."""
    return re.sub(r"^(module\.)+|_orig_mod\.", "", name)


@contextmanager
def explained(where: Path):
    """Makes one ModelError that names the file of all that a damaged one can lead to: a dozen types."""
    try:
        yield
    except ModelError as error:
        prefix = "" if str(where) in str(error) else f"{where}: "
        raise ModelError(prefix + one_line(error)) from None
    except Exception as error:
        raise ModelError(f"{where}: damaged, or not what it should be ({one_line(error)})") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    if not path.is_file():  # nor a device or a pipe, which could be read for ever
        raise ModelError(f"no {path.name} in {path.parent}")
    if path.stat().st_size > LARGEST_JSON:
        raise ModelError(f"{path} is too large to be a config: {path.stat().st_size:,} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold one JSON object")
    return value


def read_safetensors(path: Path, *only: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors (all, or those named) and the metadata of a file. They are mapped: what isn't used is not
    read, and what was read stays in memory for as long as any tensor of the same call lives.

    The library checks first that they lie in the file, side by side.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing")
    try:
        with safe_open(path, "pt") as file:
            names = only or file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:
        raise ModelError(f"{path} is damaged or cut off: {one_line(error)}") from None


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The flat dict of tensors that torch.save wrote, or the one under "model"; names without wrappers."""
    if not path.is_file():
        raise ModelError(f"{path}: not found")
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing; a zip bomb does
                if sum(member.file_size for member in archive.infolist()) > size:
                    raise ModelError(f"{path}: refused, for it would unpack to more than the file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are not torch's, which are refused next
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(f"{path}: refused, for it is damaged, no torch file, or holds more than tensors: "
                         "loading it could run code") from None
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path} is damaged or no torch file: {one_line(error)}") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # a training state with the weights among other things
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} does not hold a state dict (a flat dict of tensors)")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ModelError(f"{path}: {name} is no plain tensor")
    # A view can claim any size over one stored number. Twice: embedding and head may be stored once.
    if sum(tensor.nbytes for tensor in state.values()) > 2 * size:
        raise ModelError(f"{path}: refused, for its tensors claim to be larger than the file")
    return {clean(str(name)): tensor for name, tensor in state.items()}


def check_finite(tensors: dict[str, torch.Tensor], doing: str) -> None:
    """Raises ModelError at the first tensor with NaN or infinity in it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"can't {doing}: {name} holds NaN or infinity")
