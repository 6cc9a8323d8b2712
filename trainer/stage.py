"""What every stage does before and after its loop: find the data, find the weights, say what was done."""

import hashlib
import platform
import subprocess
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from dataset.packing import Order
from dataset.synthetic import ensure_world
from model.lora import apply_lora, cast_frozen, count_line, freeze_all_but_lora
from model.quantize import memory_line, quantize_model
from trainer.args import ROOT, RunError, UsageError, command_to_resume
from trainer.batches import Batches, split
from trainer.checkpoint import checkpoints, drop_checkpoints
from trainer.distributed import Ranks, choose_dtype
from trainer.retention import Both, hold_out


def require(folder: Path) -> None:
    """Raises UsageError, naming the command that makes them, where the weights to start from are missing."""
    if not folder.is_dir():
        script = f"trainer/train_{folder.name}.py"  # which writes to out/ under its own name
        ours = folder.parent.name == "out" and (ROOT / script).is_file()
        raise UsageError(f"--load_from {folder}: there is no such folder"
                         + (f"; make it first: python {script}" if ours else ""))


def check_vocabulary(tokenizer, model, folder: Path) -> None:
    """Raises UsageError where the tokenizer has ids that the embedding has no row for."""
    if len(tokenizer) > model.config.vocab_size:
        raise UsageError(f"--load_from {folder}: its tokenizer has {len(tokenizer):,} entries, its weights "
                         f"{model.config.vocab_size:,}: they do not belong together")


def add_lora(model, args, ranks: Ranks) -> None:
    """Adapters in float32 over a frozen base, which is held in 4 bits (--quantize nf4) or in the type that
    the forward pass computes in."""
    if args.quantize == "nf4":
        quantize_model(model)
        if ranks.is_main:
            print(memory_line(model))
    torch.manual_seed(args.seed)
    apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.target_modules,
               args.lora_rslora, args.lora_init)
    freeze_all_but_lora(model)
    cast_frozen(model, choose_dtype(args.dtype, ranks.device))


def what_trains(model) -> str:
    """How many parameters there are, and how many of them train. Raises UsageError where none can."""
    if all(p.requires_grad for p in model.parameters()):
        return f"{model.num_parameters():,} parameters, all of them trained"
    if not any(p.requires_grad and ".lora." in name for name, p in model.named_parameters()):
        raise UsageError("weights in 4 bits can't be trained: train adapters over them, with train_lora.py")
    return count_line(model)


def is_finished(args, ranks: Ranks) -> bool:
    """With --resume: True, and a line that says so, where the run was carried to its end before.

    Raises UsageError where a run that was stopped would be lost for want of --resume. A finished one may be
    trained anew: what it made stays until the new result takes its place.
    """
    saved, unfinished = args.run_dir / "training.json", args.run_dir / "checkpoints"
    if (states := checkpoints(args.run_dir)) and not (args.resume or args.overwrite):
        raise UsageError(f"{args.run_dir} holds an unfinished run ({states[-1].name}): give --resume to go "
                         f"on with it, another --name, or --overwrite to drop it")
    done = args.resume and saved.exists() and not unfinished.exists()
    if not ranks.same(done):  # all meet here: without rank 0, which holds the store, none could join any more
        raise UsageError(f"--resume: hosts see different files in {args.run_dir}, which must be shared")
    if done and ranks.is_main:
        drop_checkpoints(args.run_dir)  # what is left of them where that was interrupted
        print(f"{args.run_dir} is finished already; without --resume it is trained anew")
    return done


def load_data(kind, tokenizer, args, ranks: Ranks) -> tuple[Batches, Batches | None, Batches | None]:
    """Batches for training, for validation, and of the old data that is measured (--retain_data_path).

    `kind` is the dataset class; `args.world` names the embedded file used where no --data_path is given.
    Rank 0 tokenises into the cache on disk, the others then map the same file. Validation data is
    --eval_data_path, or the world's own, or --eval_fraction of the training data.
    """
    with ranks.main_first():
        paths, eval_paths = args.data_path, args.eval_data_path
        if not paths:
            world = ensure_world(ROOT / "out" / "world")
            paths = [world[args.world]]
            if not eval_paths and args.eval_fraction is None and f"{args.world}_eval" in world:
                eval_paths = [world[f"{args.world}_eval"]]
        train_set = kind(paths, tokenizer, args.max_seq_len, strict=args.strict)
        eval_set = train_set
        if eval_paths:
            eval_set = kind(eval_paths, tokenizer, args.max_seq_len, strict=args.strict)
        if args.retain_data_path:
            old_set = kind(args.retain_data_path, tokenizer, args.max_seq_len, strict=args.strict)
    args.content["training data of"] = identify(train_set)
    args.content["validation data of"] = identify(eval_set)
    if eval_paths:
        train_samples, eval_samples = Order(len(train_set)), Order(len(eval_set))
    else:
        fraction = 0.01 if args.eval_fraction is None else args.eval_fraction
        train_samples, eval_samples = split(train_set, fraction, args.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    eval_batches = Batches(eval_set, eval_samples, args, pad, ranks) if len(eval_samples) else None
    retained = replayed = None
    if args.retain_data_path:
        args.content["old data of"] = identify(old_set)
        replayed, measured = hold_out(old_set, args.seed)
        retained = Batches(old_set, measured, args, pad, ranks)
        if args.replay:
            train_set, replayed = Both(train_set, old_set), len(train_set) + replayed
    batches = Batches(train_set, train_samples, args, pad, ranks, replayed if args.replay else None)
    return batches, eval_batches, retained


def identify(dataset) -> str:
    """What tells a dataset from others, and from itself after a change: its sizes and its checksum."""
    return (f"{len(dataset):,} samples of {int(dataset.lengths.sum()):,} tokens, "
            f"sha256 {dataset.cache.meta['sha256'][:16]}")


def note_weights(model, args) -> None:
    """Remembers which weights a run starts from: one that is resumed must start from the same."""
    sha256 = hashlib.sha256(str(model.config).encode())
    for name, tensor in model.state_dict().items():
        sha256.update(name.encode())
        sha256.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    args.content["weights in --load_from of"] = f"sha256 {sha256.hexdigest()[:16]}"


@contextmanager
def last_save(args):
    """Around the saving of the result: the checkpoints are dropped when it is on the disk, not before."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"the result can't be written to {args.run_dir} ({error}); its last checkpoint is "
                       f"safe; to go on when there is room: {command_to_resume()}") from None
    drop_checkpoints(args.run_dir)
    print(f"saved {args.run_dir}")


def git_hash() -> str | None:
    """The commit of this source, or None: it may lie outside of git, or git may not be installed."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def describe(args, result: dict) -> dict:
    """training.json: how these weights came to be."""
    def plain(value):
        if isinstance(value, list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return {"stage": args.stage, "parent": plain(args.load_from), **result,
            "arguments": {name: plain(value) for name, value in vars(args).items() if name != "stop_at"},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"), "git": git_hash(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__}}
