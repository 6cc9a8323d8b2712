"""Resumable training states: what a run needs to go on as if it had never stopped.

out/NAME/checkpoints/step_00000500/state.pt holds the parameters that train (float32), the optimizers, the
loss scaler and the position in the data. Random states are not needed: the loop seeds each batch by its
number.
"""

import os
import re
import shutil
from pathlib import Path

import torch
from torch import nn

from trainer.args import UsageError

# Flags that may differ between the first part of a run and its continuation, because the result is the same.
FREE = {"resume", "save_interval", "keep_last", "log_interval", "num_workers", "device", "use_wandb",
        "wandb_project", "out_dir", "run_dir", "strict"}


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that train, by name: everything in full training, the adapters alone in LoRA."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def settings(args) -> dict[str, str]:
    """The flags that decide the result, as text, to be compared when a run is resumed."""
    return {k: str([str(v) for v in value] if isinstance(value, list) else value)
            for k, value in vars(args).items() if k not in FREE}


def checkpoints(run_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name))


def save_checkpoint(run_dir: Path, step: int, state: dict, keep_last: int) -> Path:
    """Writes `state` whole or not at all (temporary folder, fsync, rename); then drops all but the newest."""
    target = run_dir / "checkpoints" / f"step_{step:08}"
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with (temporary / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    for old in checkpoints(run_dir)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(run_dir: Path, args) -> dict | None:
    """The newest state of the run, or None where there is none. Raises UsageError where flags differ."""
    found = checkpoints(run_dir)
    if not found:
        return None
    state = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
    now = settings(args)
    for name, before in state["settings"].items():
        if now.get(name) != before:
            raise UsageError(f"--resume: this run began with --{name} {before}, not {now.get(name)}; "
                             f"give the same flags, or start anew without --resume")
    return state


def restore(state: dict, model: nn.Module, optimizers: list, scaler) -> None:
    """Puts a loaded state back, strictly: every trained parameter must be there in its shape."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in state["parameters"].items()}:
        raise UsageError("--resume: the checkpoint holds other parameters than this model; "
                         "start anew without --resume")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    scaler.load_state_dict(state["scaler"])


def begin_anew(run_dir: Path) -> None:
    """Drops what an earlier run left, lest it be taken for this one's. The folder stays, empty: it tells that
    this run is not finished, even before its first checkpoint."""
    drop_checkpoints(run_dir)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)


def drop_checkpoints(run_dir: Path) -> None:
    """Once the final weights are saved, the resumable states have no more use."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
