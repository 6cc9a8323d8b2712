"""Files: written whole or not at all, and read with care, since a stranger may have made them.
A reader may skip this file.

    with writing(Path("out/mine"), last=("config.json",)) as temporary:
        temporary.mkdir()
        ...                                  # files written below `temporary` appear in out/mine, all at once
    write_whole(Path("scores.json"), text)   # the same for one file

No function runs code from a file, and each checks what a file claims before it takes memory for it.
"""

import json
import os
import pickle
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from common.errors import ModelError

DAY = 86_400  # seconds
MAX_JSON_BYTES = 64 * 2**20  # the index of the largest models has less than one million bytes

# --- writing: whole or not at all ---------------------------------------------------------------------------


@contextmanager
def writing(path: Path, last: tuple[str, ...] = (), shared: bool = False) -> Iterator[Path]:
    """Gives a temporary path beside `path`. The block makes a file or folder there, which replaces `path`.

    last, shared: as in `publish` and `temporary_path`. If the block raises, `path` stays as it was.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path, shared)
    remove(temporary)
    try:
        yield temporary
        publish(temporary, path, last)
    finally:
        remove(temporary)


def write_whole(path: Path, content: str | bytes, shared: bool = False) -> None:
    """Writes one file, in UTF-8. A reader sees the old file or the new one, and never a mixture."""
    with writing(path, shared=shared) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def temporary_path(path: Path, shared: bool = False) -> Path:
    """Where `path` is prepared: on the same disk, so that a rename can put it in its place.

    The name is always the same, so a file left behind by a killed run is overwritten by the next run. If
    several processes may write `path` at the same time (shared), each has a random name of its own, and what
    killed processes left behind is removed after a day.
    """
    if not shared:
        return path.with_name(f".{path.name}.writing")
    for left in path.parent.glob(".*.????????.writing"):
        with suppress(OSError):  # another process may remove it at this moment
            files = [left, *left.iterdir()] if left.is_dir() else [left]
            if time.time() - max(file.stat().st_mtime for file in files) > DAY:
                remove(left)
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.writing")


def publish(temporary: Path, path: Path, last: tuple[str, ...] = ()) -> None:
    """Puts the file or folder `temporary` in the place of `path`, after all of it is on the disk.

    A folder that does not exist yet appears in one rename. A folder that exists keeps its other files, and
    the new files move into it one by one, those named in `last` at the end and in that order. last[0] is the
    file without which the folder counts as incomplete. The old last[0] is removed before anything moves. So a
    process that is killed in between leaves a folder that is visibly incomplete, and never a mixture.
    """
    # If `temporary` is itself a file, this list is empty.
    files = [file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (last.index(file.name) if file.name in last else -1, file.as_posix()))
    umask = os.umask(0o022)  # the only call that tells the umask also sets it
    os.umask(umask)
    for file in [temporary] if temporary.is_file() else [temporary / file for file in files]:
        # The library safetensors makes files that only their owner may read. They get the usual permissions.
        os.chmod(file, 0o666 & ~umask)
        sync(file)
    sync(temporary)
    if temporary.is_file():
        os.replace(temporary, path)
    elif not path.exists():
        os.rename(temporary, path)
    else:
        if last and Path(last[0]) in files:
            (path / last[0]).unlink(missing_ok=True)
        for file in files:
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / file, path / file)
        sync(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut."""
    if path.is_dir() and os.name != "posix":  # Windows has no such call for folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one. A folder vanishes at once, and never in parts."""
    dropped = path.with_name(f".{path.name}.dropped")
    shutil.rmtree(dropped, ignore_errors=True)  # left behind where a removal was interrupted
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            os.replace(path, dropped)
            shutil.rmtree(dropped, ignore_errors=True)
        else:
            path.unlink()


# --- reading files that a stranger may have made ------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# How files begin -> what they are, and the endings of names that say so, if there are any
BEGINNINGS = {
    b"version https://git-lfs": ("only a pointer of Git LFS: fetch the file itself with `git lfs pull`", ()),
    b"<!doctype html": ("a web page, as a failed download leaves one", ()),
    b"<html": ("a web page, as a failed download leaves one", ()),
    b"\x1f\x8b\x08": ("packed with gzip: its name must end in .gz", (".gz",)),
    b"PAR1": ("a Parquet file: its name must end in .parquet", (".parquet",)),
    b"(\xb5/\xfd": ("packed with Zstandard: unpack it first", (".zst",)),
}


def kind_unlike_name(path: Path) -> str | None:
    """What a file is that is not what its name says, such as "a web page"; None where that is unknown."""
    with suppress(OSError), path.open("rb") as file:
        beginning = file.read(32)
        for mark, (what, endings) in BEGINNINGS.items():
            begins_so = beginning.lower().startswith(mark.lower())
            if begins_so and not str(path).lower().endswith(endings):  # with (), endswith is False
                return what
    return None


def without_wrappers(name: str) -> str:
    """The name of a parameter without what DDP, FSDP, torch.compile and checkpointing add."""
    inside = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    return re.sub(rf"^(module\.|{inside})+|{inside}", "", name)


def with_plain_names(tensors: dict) -> dict:
    """The tensors by their names `without_wrappers`. Raises ModelError where two have the same name then."""
    found = {without_wrappers(str(name)): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        raise ModelError("holds tensors twice, with and without the names of DDP or torch.compile")
    return found


def keep_apart(folder: Path, config: str, what: str) -> None:
    """Raises ModelError where the folder holds `config`, and so a model or an adapter.

    transformers reads an adapter beside a model as a part of it. So only one of both may be in a folder.
    """
    if (folder / config).exists():
        raise ModelError(f"{folder} holds {what}, and others would read both as one: name another folder")


@contextmanager
def explained(where: Path) -> Iterator[None]:
    """Turns whatever a damaged file makes other code raise into one ModelError that names the file."""
    try:
        yield
    except ModelError as error:
        prefix = "" if str(where) in str(error) else f"{where}: "
        raise ModelError(prefix + one_line(error)) from None
    except Exception as error:
        if what := kind_unlike_name(where):
            raise ModelError(f"{where} is {what}") from None
        raise ModelError(f"{where} is damaged or cut off, or of another kind ({one_line(error)})") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ModelError where there is none."""
    if not path.is_file():  # a device or a pipe is no file either: reading one may never end
        raise ModelError(f"no {path.name} in {path.parent}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ModelError(f"{path} is too large to be a config: {path.stat().st_size:,} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        what = kind_unlike_name(path) or f"not valid JSON: {one_line(error)}"
        raise ModelError(f"{path} is {what}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold one JSON object")
    return value


def read_json_if_there(path: Path) -> dict:
    """The object in a JSON file, or {} where there is no such file. Raises ModelError for a damaged one."""
    return read_json(path) if path.exists() else {}


def json_text(value: object) -> str:
    """JSON as our own files hold it: indented, with every character as itself."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def read_safetensors(path: Path, *only: str) -> tuple[dict, dict]:
    """The tensors (all, or those named) and the metadata of a safetensors file.

    The file is mapped: a tensor is read when it is used, and its memory is held for as long as any tensor of
    the same call lives. The library checks first that all tensors lie within the file, side by side. Raises
    ModelError.
    """
    from safetensors import safe_open  # here, because it imports torch

    if not path.is_file():
        raise ModelError(f"{path} is missing")
    with explained(path), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in only or file.keys()}, file.metadata() or {}


def read_state_dict(path: Path) -> dict:
    """The flat dict of tensors that torch.save wrote, or the one under its key "model", by plain names.

    Raises ModelError for whatever is damaged, holds more than tensors, or would need more memory than the
    file has bytes.
    """
    import torch

    if not path.is_file():
        raise ModelError(f"{path}: not found")
    size = path.stat().st_size
    with explained(path), warnings.catch_warnings():
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing, but a zip bomb does
                if sum(member.file_size for member in archive.infolist()) > size:
                    raise ModelError("refused, for it would unpack to more than the file")
        warnings.simplefilter("ignore")  # torch warns of foreign pickles, which are refused below
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ModelError("refused, for it is damaged, no torch file, or holds more than tensors: "
                             "loading it could run code") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # a training state holds the weights among other things
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} does not hold a state dict (a flat dict of tensors)")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ModelError(f"{path}: {name} is no plain tensor")
    # A view can claim any size over one stored number. An embedding and a head may share what is stored, so
    # twice the file's size is the honest limit.
    if sum(tensor.nbytes for tensor in state.values()) > 2 * size:
        raise ModelError(f"{path}: refused, for its tensors claim to be larger than the file")
    with explained(path):
        return with_plain_names(state)


def check_finite(tensors: dict, doing: str) -> None:
    """Raises ModelError at the first tensor with NaN or infinity. doing: "load x.pth", for the message."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"can't {doing}: {name} holds NaN or infinity")
