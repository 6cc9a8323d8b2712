"""Resumable training states: what a run needs to go on as if it had never stopped.

out/NAME/checkpoints/step_00000500/state.pt holds the parameters that train (float32), the optimizers, the
loss scaler and the position in the data; state.pt.sha256 beside it tells whether it is whole (`sha256sum -c`
reads it). Random states are not needed: the loop seeds each batch by its number.

Under --parallel fsdp parameters and optimizers lie beside it in one safetensors file a rank, which
torch.distributed.checkpoint writes and reads, in other slices where the number of ranks has changed.
"""

import hashlib
import os
import pickle
import re
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from trainer.args import RunError, UsageError
from trainer.distributed import Ranks, is_sharded, local_shard

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Flags that may differ between the first part of a run and its continuation: the result is the same, with
# the third line to float rounding, and to what --lora_dropout draws.
FREE = {"resume", "overwrite", "save_interval", "keep_last", "on_full_disk", "max_minutes", "log_interval",
        "num_workers", "device", "use_wandb", "wandb_project", "out_dir", "name", "run_dir", "strict",
        "micro_batch_size", "gradient_checkpointing", "compile",
        "stop_at", "content"}  # no flags
# Flags that name files, which may lie elsewhere by now: what is in them is compared (args.content).
PLACES = {"--data_path", "--eval_data_path", "--retain_data_path", "--load_from", "--tokenizer"}
OTHER_VERSION = ("--resume: the checkpoint was written by another version of this code: go on with that one, "
                 "or start anew with --overwrite")
OTHER_PARAMETERS = ("--resume: the checkpoint holds other parameters than this model; start anew with "
                    "--overwrite")


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that train, by name: everything in full training, the adapters alone in LoRA."""
    if is_sharded(model):
        model.reshard()  # a validation leaves the weights outside of the blocks put together
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@dataclass
class Progress:
    """How far a run is; every checkpoint tells."""

    step: int = 0  # optimizer steps taken
    batch: int = 0  # batches drawn: more than steps where some were skipped
    tokens: int = 0
    seconds: float = 0.0  # of training
    metrics: dict = field(default_factory=dict)  # the newest of each
    logged_step: int = 0  # where the last log line was written
    logged_tokens: int = 0
    logged_seconds: float = 0.0
    loss_sum: float = 0.0  # of the steps since, over all ranks


def training_state(model: nn.Module, optimizers: list, scaler, run: Progress, settings: dict) -> dict:
    """What state.pt holds; of a sharded model the tensors lie beside it (sharded_state)."""
    state = {"parameters": None, "optimizers": None, "scaler": scaler.state_dict(), "settings": settings}
    if not is_sharded(model):
        state["parameters"], state["optimizers"] = trained_state(model), [o.state_dict() for o in optimizers]
    return state | vars(run)


def sharded_state(model: nn.Module, optimizers: list) -> dict[str, torch.Tensor]:
    """The parameters that train and what the optimizers keep of each, by name: mostly DTensors."""
    found = trained_state(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, kept in optimizer.state.items():
            found |= {f"{names[parameter]}.{what}": tensor for what, tensor in kept.items()}
    return found


def settings_of(args, dtype: torch.dtype) -> dict[str, str]:
    """What decides the result, as text, to be compared when a run is resumed: flags, data and weights.

    dtype: what --dtype auto stands for here.
    """
    flags = {f"--{k}": str([str(v) for v in value] if isinstance(value, list) else value)
             for k, value in vars(args).items() if k not in FREE}
    return flags | {"--dtype": str(dtype).removeprefix("torch.")} | args.content


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; one whose writing never ended is not among them."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name))


class _Hashing:
    """A file that is written from its beginning to its end, and the SHA-256 of what was meant to be in it."""

    def __init__(self, file):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:  # torch.save replaces it by one that says nothing of the disk
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08}"


def save_checkpoint(run_dir: Path, step: int, state: dict, keep_last: int,
                    shards: dict[str, torch.Tensor] | None = None, ranks: Ranks | None = None) -> Path:
    """Writes `state` whole or not at all (temporary folder, fsync, rename); then drops all but the newest.

    Called by rank 0 alone; where there are shards, by all ranks.
    Raises OSError where it can't be written; the other checkpoints are as they were then.
    """
    target = folder_of(run_dir, step)
    temporary = target.with_name(f".{target.name}.writing")
    if ranks is None or ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    if shards:
        write_shards(temporary, shards, ranks)
        if not ranks.is_main:
            return target
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        sums = checksums(sorted(temporary.glob("*.safetensors")))
        with (temporary / "state.pt").open("wb") as file:
            hashing = _Hashing(file)
            try:
                torch.save(state, hashing)
            except Exception:
                raise hashing.error or sys.exception() from None
            file.flush()
            os.fsync(file.fileno())
        with (temporary / "state.pt.sha256").open("w", encoding="ascii", newline="\n") as file:
            sums["state.pt"] = hashing.sha256.hexdigest()
            file.writelines(f"{digest}  {name}\n" for name, digest in sums.items())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(temporary)
        if not target.exists() or damage(target):  # else it holds the same: a step of a run has one state
            drop(target)
            os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(run_dir)[:-keep_last]:
        drop(old)
    return target


def write_shards(folder: Path, shards: dict[str, torch.Tensor], ranks: Ranks) -> None:
    """Each rank writes its slices into one safetensors file. Raises OSError on all where one can't."""
    from torch.distributed import checkpoint as dcp  # here, because it imports slowly

    ranks.barrier()  # until rank 0 has removed what a killed run left
    try:
        dcp.save(shards, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True),
                 process_group=ranks.patient)
    except dcp.api.CheckpointException as failure:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        known = (e for e, _ in failure.failures.values() if isinstance(e, (OSError, KeyboardInterrupt)))
        raise next(known, failure) from None


def read_shards(folder: Path, model: nn.Module, optimizers: list, ranks: Ranks) -> None:
    """Reads back what `write_shards` wrote, maybe on another number of ranks, so in other slices."""
    from torch.distributed import checkpoint as dcp

    for optimizer in optimizers:  # any step makes it the tensors that are then read into
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    try:
        dcp.load(sharded_state(model, optimizers), process_group=ranks.patient,
                 storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except dcp.api.CheckpointException as failure:
        raise UsageError(OTHER_PARAMETERS) from failure


def checksums(files: list[Path]) -> dict[str, str]:
    """Name -> SHA-256, of several files at once."""
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as threads:
        return dict(zip((path.name for path in files), threads.map(digest, files), strict=True))


def sync_folder(folder: Path) -> None:
    """Makes renames within a folder survive a power cut; Windows has no call for that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def drop(folder: Path) -> None:
    """Removes a folder so that at no moment a part of it has its name."""
    dropped = folder.with_name(f".{folder.name}.dropped")
    shutil.rmtree(dropped, ignore_errors=True)
    with suppress(OSError):  # FileNotFoundError most often
        os.replace(folder, dropped)
        shutil.rmtree(dropped, ignore_errors=True)


def damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint; empty where they are as they were written."""
    try:
        text = (checkpoint / "state.pt.sha256").read_text(encoding="ascii", errors="replace")
        wanted = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
        found = checksums([checkpoint / name for name in wanted])
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except ValueError as error:  # NUL in what should be a name
        return str(error)
    if wanted != found:
        return f"its checksum is another, of {next((n for n in wanted if wanted[n] != found.get(n)), '')}"
    return "" if "state.pt" in wanted else "its checksums are cut off"  # that of state.pt is the last


def load_checkpoint(run_dir: Path, settings: dict[str, str], is_main: bool = True) -> dict | None:
    """The newest whole state of the run, or None where there is none at all.

    A damaged one is named, by the main rank, and the one before is taken. Raises UsageError where all are
    damaged, or where `settings` differ from those that the run began with.
    """
    found = checkpoints(run_dir)
    for checkpoint in reversed(found):
        reason = damage(checkpoint)
        if not reason:
            try:
                state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
                break
            except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
                reason = str(error).splitlines()[0]
        if is_main:
            print(f"warning: {checkpoint} is damaged ({reason}); the one before is taken", file=sys.stderr)
    else:
        if found:
            raise UsageError(f"--resume: every checkpoint is damaged: {', '.join(str(p) for p in found)}; "
                             f"start anew with --overwrite")
        return None
    if not isinstance(state, dict) or "settings" not in state:
        raise UsageError(OTHER_VERSION)
    for name, before in state["settings"].items():
        moved = name in PLACES and "None" not in (before, settings.get(name))
        if settings.get(name) != before and not moved:
            raise UsageError(f"--resume: this run began with {name} {before}, not {settings.get(name)}; "
                             f"give the same, or start anew with --overwrite")
    return state


def restore(state: dict, model: nn.Module, optimizers: list, scaler, run_dir: Path, ranks: Ranks) -> Progress:
    """Puts a loaded state back, strictly: every trained parameter must be there in its shape."""
    run = Progress()
    if not state.keys() >= {"parameters", "optimizers", "scaler", *vars(run)}:
        raise UsageError(OTHER_VERSION)
    scaler.load_state_dict(state["scaler"])
    run = Progress(**{name: state[name] for name in vars(run)})
    if is_sharded(model):
        read_shards(folder_of(run_dir, run.step), model, optimizers, ranks)
        return run
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in state["parameters"].items()}:
        raise UsageError(OTHER_PARAMETERS)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return run


def last_good(run_dir: Path) -> str:
    """For a message: the newest checkpoint."""
    found = checkpoints(run_dir)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def bad_weights(parameters: dict[str, torch.Tensor], ranks: Ranks) -> list[str]:
    """The names of those that hold, on any rank, a number that is not finite."""
    bad = ranks.sum(*(local_shard(p).isfinite().logical_not().any() for p in parameters.values()))
    return [name for name, where in zip(parameters, bad, strict=True) if where]


def refuse_bad_weights(model: nn.Module, step: int, run_dir: Path, ranks: Ranks) -> None:
    """Raises RunError where a weight is no finite number: such a state is worth nothing, and never saved."""
    if bad := bad_weights(trained_state(model), ranks):
        raise RunError(f"after step {step} {bad[0]} holds numbers that are not finite: lower --learning_rate "
                       f"or raise --warmup_ratio; {last_good(run_dir)}")


def complaint(error: OSError, run_dir: Path, step: int, state: dict) -> str:
    """For a message: why a checkpoint could not be written, what it takes and what is free."""
    free = ""
    with suppress(OSError):
        free = f", {shutil.disk_usage(run_dir).free / 1e6:,.1f} MB are free"
    return (f"the checkpoint of step {step} can't be written ({error.strerror or error}): it takes "
            f"{sum(t.nbytes for t in tensors(state)) / 1e6:,.1f} MB{free}; {last_good(run_dir)}")


def tensors(state) -> list[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        return [state]
    state = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in state for tensor in tensors(value)]


LOCK = ".lock"


def hold(run_dir: Path):
    """Keeps other processes from writing to this run for as long as what is returned is kept.

    Raises UsageError where one is at it. The system drops the lock with its process, however that ends.
    Windows has another kind of locks: there nothing is held.
    """
    folder = run_dir / "checkpoints"  # it also tells that the run is not finished
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return None
    file = (folder / LOCK).open("w", encoding="ascii")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UsageError(f"{run_dir}: another process trains there; wait for it, or choose another --name"
                         ) from None
    except OSError:
        pass  # a file system that has no locks
    return file


def begin_anew(run_dir: Path) -> None:
    """Drops what an earlier run left, lest it be taken for this one's; the folder and its lock stay."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    for left in (run_dir / "checkpoints").iterdir():
        if left.name != LOCK:
            drop(left)


def drop_checkpoints(run_dir: Path) -> None:
    """Once the final weights are saved, the resumable states have no more use."""
    drop(run_dir / "checkpoints")
