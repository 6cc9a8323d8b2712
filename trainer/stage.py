"""What every stage does before and after its loop: find the data, find the weights, say what was done."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers

from dataset.synthetic import ensure_world
from trainer.args import ROOT, UsageError
from trainer.distributed import Ranks
from trainer.loop import Batches, split


def require(folder: Path, default: Path, command: str) -> None:
    """Raises UsageError, naming the command that makes them, where the weights to start from are missing."""
    if not folder.is_dir():
        made_by = f"; make it first: {command}" if folder == default else ""
        raise UsageError(f"--load_from {folder}: there is no such folder{made_by}")


def check_vocabulary(tokenizer, model, folder: Path) -> None:
    """Raises UsageError where the tokenizer has ids that the embedding has no row for."""
    if len(tokenizer) > model.config.vocab_size:
        raise UsageError(f"--load_from {folder}: its tokenizer has {len(tokenizer):,} entries, its weights "
                         f"{model.config.vocab_size:,}: they do not belong together")


def is_finished(args, ranks: Ranks) -> bool:
    """With --resume: True, and a line that says so, where the run was carried to its end before."""
    saved, unfinished = args.run_dir / "training.json", args.run_dir / "checkpoints"
    done = args.resume and saved.exists() and not unfinished.exists()
    if done and ranks.is_main:
        print(f"{args.run_dir} is finished already; without --resume it is trained anew")
    return done


def load_data(kind, world_name: str, tokenizer, args, ranks: Ranks) -> tuple[Batches, Batches | None]:
    """Batches for training and validation. `kind` is the dataset class; `world_name` the embedded file used
    where no --data_path is given. Rank 0 tokenises into the cache on disk, the others then map the same file.

    Validation data is --eval_data_path, or the world's own, or --eval_fraction of the training data.
    """
    with ranks.main_first():
        paths, eval_paths = args.data_path, args.eval_data_path
        if not paths:
            world = ensure_world(ROOT / "out" / "world")
            paths = [world[world_name]]
            if not eval_paths and f"{world_name}_eval" in world:
                eval_paths = [world[f"{world_name}_eval"]]
        train_set = kind(paths, tokenizer, args.max_seq_len, strict=args.strict)
        eval_set = train_set
        if eval_paths:
            eval_set = kind(eval_paths, tokenizer, args.max_seq_len, strict=args.strict)
    if eval_paths:
        train_samples, eval_samples = np.arange(len(train_set)), np.arange(len(eval_set))
    else:
        train_samples, eval_samples = split(train_set, args.eval_fraction, args.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = Batches(train_set, train_samples, args, pad, ranks)
    return batches, Batches(eval_set, eval_samples, args, pad, ranks) if len(eval_samples) else None


def git_hash() -> str | None:
    """The commit of this source, or None: it may lie outside of git, or git may not be installed."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def describe(stage: str, args, result: dict) -> dict:
    """training.json: how these weights came to be."""
    def plain(value):
        if isinstance(value, list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return {"stage": stage, "parent": plain(args.load_from), **result,
            "arguments": {name: plain(value) for name, value in vars(args).items()},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"), "git": git_hash(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__}}
