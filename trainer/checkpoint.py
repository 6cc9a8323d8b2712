"""Resumable training states: whatever a run needs in order to go on as if it had never stopped.
A reader may skip this file.

out/NAME/checkpoints/step_00000500/state.pt holds the parameters that train (float32), the optimizers, the
loss scaler and the position in the data. state.pt.sha256 beside it shows whether it is whole; `sha256sum -c`
reads that file. Random states are not needed, because the loop seeds each batch by its number.

Under --parallel fsdp parameters and optimizers lie beside state.pt in one safetensors file for each process.
torch.distributed.checkpoint writes these files, and reads them into other slices if the number of processes
has changed.
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
from torch.utils._pytree import tree_leaves

from common.errors import RunError, UsageError
from common.files import publish, remove, temporary_path
from trainer.distributed import Ranks, is_sharded, local_shard
from trainer.interrupt import command_to_resume

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
VERSION = 4  # of what a checkpoint holds; a run is resumed by code of the same version
# Flags that may differ between the first part of a run and its continuation. The last four change the result
# by float rounding alone, or by the elements that --lora_dropout draws.
FLAGS_FREE_TO_CHANGE = (
    "resume overwrite save_interval keep_last on_full_disk max_minutes log_interval show_interval "
    "num_workers device name use_wandb wandb_project out_dir strict run_dir micro_batch_size "
    "gradient_checkpointing compile compile_rollouts").split()
# Flags that name files. The files may lie elsewhere by now, so their content is compared and not their place.
FLAGS_OF_FILES = {"--data_path", "--eval_data_path", "--retain_data_path", "--load_from", "--tokenizer",
                  "--teacher", "--sft_data_path", "--reward_file", "--reward_model"}
OTHER_VERSION = "--resume: another version of this code wrote the checkpoint: use that one, or --overwrite it"
OTHER_PARAMETERS = "--resume: the checkpoint holds other parameters than this model; --overwrite starts anew"


# --- what a checkpoint holds --------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is. Every checkpoint holds all of it."""

    step: int = 0  # optimizer steps taken
    batch: int = 0  # batches drawn: more than steps, if some were skipped
    tokens: int = 0
    seconds: float = 0.0  # of training
    metrics: dict = field(default_factory=dict)  # the newest value of each
    # At the last log line:
    logged_step: int = 0
    logged_tokens: int = 0
    logged_seconds: float = 0.0
    # Since that line: the loss, and whatever else the loss function names, summed over steps
    sums: dict[str, float] = field(default_factory=dict)

    def is_due(self, interval: int, max_steps: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, happens after this step."""
        return self.step % interval == 0 or self.step == max_steps

    def result(self, settings: dict[str, str]) -> dict:
        """What training.json says about the run; settings: as settings_of gives them."""
        last = {name: value for name, value in self.metrics.items()
                if name in ("loss", "bits_per_byte") or name.startswith("eval_")}
        content = {name: value for name, value in settings.items() if not name.startswith("--")}
        return {"steps": self.step, "skipped": self.batch - self.step, "tokens": self.tokens,
                "seconds": self.seconds, **last, "content": content}


def settings_of(flags: dict, dtype: torch.dtype, model: nn.Module, batches, eval_batches) -> dict[str, str]:
    """Everything that decides the result, as text: flags, data, weights. A resumed run must have the same.

    dtype: the type that --dtype auto means here.
    """
    settings = {}
    for name, value in flags.items():
        if name not in FLAGS_FREE_TO_CHANGE:
            settings[f"--{name}"] = str([str(v) for v in value] if isinstance(value, list) else value)
    settings["--dtype"] = str(dtype).removeprefix("torch.")
    settings["training data of"] = batches.identity()
    if eval_batches is not None:
        settings["validation data of"] = eval_batches.identity()
    if flags["load_from"]:
        settings["weights in --load_from of"] = identity_of_weights(model)
    return settings


def identity_of_weights(model: nn.Module) -> str:
    """A checksum of all weights but those of adapters, which are not read from --load_from."""
    sha256 = hashlib.sha256(str(model.config).encode())
    for name, tensor in model.state_dict().items():
        if ".lora." not in name:
            sha256.update(name.encode())
            sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"sha256 {sha256.hexdigest()[:16]}"


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that train, by name: all of them in full training, the adapters alone in LoRA."""
    if is_sharded(model):
        model.reshard()  # a validation leaves the weights outside of the blocks in one piece
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def training_state(model: nn.Module, optimizers: list, scaler, batches, run: Progress,
                   settings: dict) -> dict:
    """The content of state.pt. The tensors of a sharded model lie beside it, see sharded_state."""
    state = {"version": VERSION, "parameters": None, "optimizers": None, "scaler": scaler.state_dict(),
             "batches": batches.state(), "settings": settings, "threads": torch.get_num_threads()}
    if not is_sharded(model):
        state["parameters"] = trained_state(model)
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    return state | vars(run)


def sharded_state(model: nn.Module, optimizers: list) -> dict[str, torch.Tensor]:
    """The parameters that train and the optimizers' numbers for each, by name. Most are DTensors."""
    found = trained_state(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, kept in optimizer.state.items():
            found |= {f"{names[parameter]}.{what}": tensor for what, tensor in kept.items()}
    return found


# --- writing ------------------------------------------------------------------------------------------------


def save(run_dir: Path, run: Progress, model, optimizers, scaler, batches, settings: dict, keep_last: int,
         tracker, required: bool) -> None:
    """Writes a checkpoint. Where that fails it warns, or raises RunError if the checkpoint is required."""
    ranks = tracker.ranks
    refuse_bad_weights(model, run.step, run_dir, ranks)
    run.sums = tracker.sums_of_all()
    failed, state = "", training_state(model, optimizers, scaler, batches, run, settings)
    shards = sharded_state(model, optimizers) if is_sharded(model) else {}
    try:
        tracker.sync()
        if ranks.is_main or shards:
            save_checkpoint(run_dir, run.step, state, keep_last, shards, ranks)
    except OSError as error:
        failed = complaint(error, run_dir, run.step, state | shards)
        tracker.say(f"warning: {failed}")
    if ranks.any(bool(failed), ranks.patient) and required:
        raise RunError(f"{failed}; to go on when there is room: {command_to_resume()}")


def save_checkpoint(run_dir: Path, step: int, state: dict, keep_last: int,
                    shards: dict[str, torch.Tensor] | None = None, ranks: Ranks | None = None) -> Path:
    """Writes `state` whole or not at all, then drops all but the newest `keep_last` checkpoints.

    Process 0 calls it; if there are shards, all processes do. Raises OSError where it cannot be written, and
    leaves the other checkpoints as they were.
    """
    target = folder_of(run_dir, step)
    temporary = temporary_path(target)
    if ranks is None or ranks.is_main:
        remove(temporary)
    if shards:
        write_shards(temporary, shards, ranks)
        if not ranks.is_main:
            return target
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            with (temporary / "state.pt").open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:
            # torch.save replaces an OSError, such as that of a full disk, by an error that does not name it.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        sums = checksums([*sorted(temporary.glob("*.safetensors")), temporary / "state.pt"])
        lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        (temporary / "state.pt.sha256").write_text(lines, encoding="ascii", newline="\n")
        # An undamaged checkpoint of this step stays. It holds the same, since equal runs have equal states.
        if not target.exists() or damage(target):
            remove(target)
            publish(temporary, target)
    finally:
        remove(temporary)
    for old in checkpoints(run_dir)[:-keep_last]:
        remove(old)
    return target


def write_shards(folder: Path, shards: dict[str, torch.Tensor], ranks: Ranks) -> None:
    """Each process writes its slices into one safetensors file. Raises OSError on all where one fails."""
    from torch.distributed import checkpoint as dcp  # here, because it imports slowly

    ranks.any(False, ranks.patient)  # waits until process 0 has removed the files of a killed run
    try:
        dcp.save(shards, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True),
                 process_group=ranks.patient)
    except dcp.api.CheckpointException as failure:
        if ranks.is_main:
            remove(folder)
        for error, _ in failure.failures.values():
            if isinstance(error, (OSError, KeyboardInterrupt)):
                raise error from None
        raise


def read_shards(folder: Path, model: nn.Module, optimizers: list, ranks: Ranks) -> None:
    """Reads what `write_shards` wrote, perhaps with another number of processes and so other slices."""
    from torch.distributed import checkpoint as dcp

    for optimizer in optimizers:  # any step makes an optimizer create the tensors to read into
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


# --- reading ------------------------------------------------------------------------------------------------


def resume_or_begin(run_dir: Path, resume: bool, settings: dict, model, optimizers, scaler, batches,
                    ranks: Ranks) -> Progress:
    """The state of the newest checkpoint, if `resume` and there is one. Else a run begins anew."""
    state = load_checkpoint(run_dir, settings, ranks.is_main) if resume else None
    if not ranks.same(state["step"] if state else 0):
        raise UsageError(f"--resume: hosts see different checkpoints in {run_dir}, which must be shared")
    if state:
        batches.load_state(state["batches"])
        keep_number_of_threads(state["threads"], ranks)
        return restore(state, model, optimizers, scaler, run_dir, ranks)
    if ranks.is_main:
        begin_anew(run_dir)
    return Progress()


def keep_number_of_threads(before: int, ranks: Ranks) -> None:
    """Goes on with as many threads as before: a sum that is cut into other parts is rounded in another way.

    OMP_NUM_THREADS, which torchrun sets, too, goes before. Then a line says that bits may differ.
    """
    if ranks.device.type == "cpu" and before != torch.get_num_threads():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(before)
        elif ranks.is_main:
            print(f"this run began with {before} threads and goes on with {torch.get_num_threads()}, as "
                  "OMP_NUM_THREADS says: the last bits of its weights may differ")


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, without any whose writing never ended."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name))


def last_good(run_dir: Path) -> str:
    """For a message: the newest checkpoint."""
    found = checkpoints(run_dir)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def checksums(files: list[Path]) -> dict[str, str]:
    """Name -> SHA-256, of several files at once."""
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as threads:
        return dict(zip((path.name for path in files), threads.map(digest, files), strict=True))


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
    for name, digest in wanted.items():
        if found.get(name) != digest:
            return f"its checksum is another, of {name}"
    return "" if "state.pt" in wanted else "its checksums are cut off"  # state.pt is the last in the list


def load_checkpoint(run_dir: Path, settings: dict[str, str], is_main: bool = True) -> dict | None:
    """The newest whole state of the run, or None where there is none at all.

    The main process names a damaged one, and the one before is taken. Raises UsageError where all are
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
            damaged = ", ".join(map(str, found))
            raise UsageError(f"--resume: every checkpoint is damaged: {damaged}; --overwrite starts anew")
        return None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise UsageError(OTHER_VERSION)
    for name, before in state["settings"].items():
        now = settings.get(name)
        is_compared_by_content = name in FLAGS_OF_FILES and "None" not in (before, now)
        if now != before and not is_compared_by_content:
            line = f"--resume: this run began with {name} {before}, not {now}"
            raise UsageError(f"{line}; give the same, or start anew with --overwrite")
    return state


def restore(state: dict, model: nn.Module, optimizers: list, scaler, run_dir: Path, ranks: Ranks) -> Progress:
    """Puts a loaded state back. Raises UsageError unless it holds each trained parameter, in its shape."""
    scaler.load_state_dict(state["scaler"])
    run = Progress(**{name: state[name] for name in vars(Progress())})
    if is_sharded(model):
        read_shards(folder_of(run_dir, run.step), model, optimizers, ranks)
        return run
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = state["parameters"]
    if {name: p.shape for name, p in parameters.items()} != {name: p.shape for name, p in saved.items()}:
        raise UsageError(OTHER_PARAMETERS)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return run


# --- complaints ---------------------------------------------------------------------------------------------


def bad_weights(parameters: dict[str, torch.Tensor], ranks: Ranks) -> list[str]:
    """The names of those that hold, in any process, a number that is not finite."""
    bad = ranks.sum(*(local_shard(p).isfinite().logical_not().any() for p in parameters.values()))
    return [name for name, where in zip(parameters, bad, strict=True) if where]


def refuse_bad_weights(model: nn.Module, step: int, run_dir: Path, ranks: Ranks) -> None:
    """Raises RunError where a weight is no finite number. Such a state has no use, and is never saved."""
    if bad := bad_weights(trained_state(model), ranks):
        advice = f"lower --learning_rate or raise --warmup_ratio; {last_good(run_dir)}"
        raise RunError(f"after step {step} {bad[0]} holds numbers that are not finite: {advice}")


def complaint(error: OSError, run_dir: Path, step: int, state: dict) -> str:
    """For a message: why a checkpoint cannot be written, how much room it takes, and how much is free."""
    free = ""
    with suppress(OSError):
        free = f", {shutil.disk_usage(run_dir).free / 1e6:,.1f} MB are free"
    size = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
    return (f"the checkpoint of step {step} can't be written ({error.strerror or error}): it takes "
            f"{size / 1e6:,.1f} MB{free}; {last_good(run_dir)}")


# --- one run at a time --------------------------------------------------------------------------------------


def lock_folder(run_dir: Path):
    """Keeps other processes from writing to this run until `unlock`, which takes what is returned.

    Raises UsageError where another process trains there. The system drops the lock with its process, however
    that ends. Windows has another kind of locks, and there nothing is held.
    """
    folder = run_dir / "checkpoints"  # while it exists, the run is not finished
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return None
    file = (folder / LOCK).open("w", encoding="ascii")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UsageError(f"{run_dir}: another process trains there; wait, or choose another --name") from None
    except OSError:
        pass  # a file system that has no locks
    return file


def unlock(lock) -> None:
    if lock:
        lock.close()


def begin_anew(run_dir: Path) -> None:
    """Drops what an earlier run left, so that nobody takes it for this run's; the lock stays."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    for left in (run_dir / "checkpoints").iterdir():
        if left.name != LOCK:
            remove(left)


def drop_checkpoints(run_dir: Path) -> None:
    """Once the final weights are saved, nobody needs the resumable states any more."""
    remove(run_dir / "checkpoints")
