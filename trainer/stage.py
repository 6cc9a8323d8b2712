"""What every stage does before and after its loop: finding weights and data, reporting the result."""

import platform
import subprocess
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from common.cli import ROOT
from common.device import choose_dtype
from common.errors import RunError, UsageError
from dataset.packing import Order
from model.lora import apply_lora, cast_frozen, count_line, freeze_all_but_lora, save_lora
from model.moe import set_penalties
from model.quantize import count_parameters, memory_line, quantize_model
from model.tokenizer_files import OWN_IS_TAKEN, check_vocabulary, gets_our_own, load_tokenizer
from model.weights import load_model, save_model
from trainer.batches import Batches, split
from trainer.checkpoint import checkpoints, drop_checkpoints
from trainer.defaults import tokens_seen
from trainer.distributed import Ranks, gather_weights
from trainer.interrupt import command_to_resume
from trainer.retention import TwoDatasets, hold_out


def is_finished(run_dir: Path, resume: bool, overwrite: bool, ranks: Ranks) -> bool:
    """Whether --resume asks to continue a run that has already reached its end. If so, a line says that.

    Raises UsageError where a stopped run would be lost because --resume is missing. A finished run may be
    trained anew: its result stays until the new result takes its place.
    """
    states = checkpoints(run_dir)
    if states and not (resume or overwrite):
        raise UsageError(f"{run_dir} holds an unfinished run ({states[-1].name}): give --resume to go "
                         f"on with it, another --name, or --overwrite to drop it")
    # From its beginning to its end a run has the folder "checkpoints", even without a checkpoint in it.
    finished = resume and (run_dir / "training.json").exists() and not (run_dir / "checkpoints").exists()
    # ranks.same makes all processes wait for each other. Otherwise process 0 of a finished run would end at
    # once, and a process that starts more slowly could not connect to it any more.
    if not ranks.same(finished):
        raise UsageError(f"--resume: hosts see different files in {run_dir}, which must be shared")
    if finished and ranks.is_main:
        drop_checkpoints(run_dir)  # for what is left if the first run was killed while dropping them
        print(f"{run_dir} is finished already; without --resume it is trained anew. To train its "
              "result further, start another run from it")
    return finished


def load_weights(path: Path, ranks: Ranks, /, *, tokenizer=None, rope_scaling=None, router_balance=None,
                 router_z_loss=None, flag="--load_from", **other_flags):
    """(model, tokenizer) of a folder that another stage left, or of a .pth file of MiniMind.

    Flags are passed by name, as in add_lora. A .pth file has no tokenizer; --tokenizer names one, and without
    it Seedling's own is taken. flag: with which the path was given. Raises UsageError where there is no such
    path, ModelError where weights and tokenizer do not fit, or a flag does not fit the weights.
    """
    if not path.exists():
        script = f"trainer/train_{path.name}.py"  # a stage writes to the folder with its own name
        is_ours = path.parent.name == "out" and (ROOT / script).is_file()
        raise UsageError(f"{flag} {path}: there is no such folder"
                         + (f"; make it first: python {script}" if is_ours else ""))
    if gets_our_own(path) and not tokenizer and ranks.is_main:
        print(OWN_IS_TAKEN.format(path))
    tokenizer, model = load_tokenizer(tokenizer or path), load_model(path, rope_scaling=rope_scaling)
    set_penalties(model.config, router_balance, router_z_loss, path)
    check_vocabulary(tokenizer, model.config.vocab_size, path)
    return model, tokenizer


def add_lora(model, ranks: Ranks, *, lora_rank, lora_alpha, lora_dropout, lora_rslora, lora_init,
             target_modules, quantize, dtype, seed, **other_flags) -> None:
    """Adds adapters in float32 to the model, whose own weights (the base) are frozen.

    The base is held in 4 bits (--quantize nf4), or in the type that the forward pass computes in. The caller
    passes all flags by name, as **vars(args). other_flags takes those that are not needed here.
    """
    if quantize == "nf4":
        quantize_model(model)
        if ranks.is_main:
            print(memory_line(model))
    torch.manual_seed(seed)
    apply_lora(model, lora_rank, lora_alpha, lora_dropout, target_modules, lora_rslora, lora_init)
    freeze_all_but_lora(model)
    cast_frozen(model, choose_dtype(dtype, ranks.device))


def what_trains(model) -> str:
    """How many parameters there are, and how many of them train. Raises UsageError where none can."""
    if all(p.requires_grad for p in model.parameters()):
        return f"{count_parameters(model):,} parameters, all of them trained"
    if not any(p.requires_grad and ".lora." in name for name, p in model.named_parameters()):
        # The model came in 4 bits and without adapters, so nothing in it can train.
        raise UsageError("weights in 4 bits can't be trained: train adapters over them, with train_lora.py")
    return count_line(model)


def read_data(read, ranks: Ranks, *, data_path, eval_data_path, eval_fraction, world, seed, **other_flags):
    """(training set, its samples, validation set, its samples). Samples are numbers, in any sequence.

    read: a function of paths that returns a dataset. world: which file of the built-in data
    (dataset/synthetic.py) is read if there is no --data_path. Validation data is the first of these that
    exists: --eval_data_path; the part --eval_fraction of the training data; the validation file of the
    built-in data; 0.01 of the training data.
    """
    if not data_path:
        from dataset.synthetic import ensure_world  # here, because this import reads the files of the world

        with ranks.main_first():
            files = ensure_world(ROOT / "out" / "world")
        data_path = [files[world]]
        if not eval_data_path and eval_fraction is None and f"{world}_eval" in files:
            eval_data_path = [files[f"{world}_eval"]]
    with ranks.main_first():
        train_set, eval_set = read(data_path), read(eval_data_path) if eval_data_path else None
    if eval_set is not None:  # an Order takes no memory: Order(3) holds 0, 1 and 2
        return train_set, Order(len(train_set)), eval_set, Order(len(eval_set))
    train_samples, eval_samples = split(train_set, 0.01 if eval_fraction is None else eval_fraction, seed)
    return train_set, train_samples, train_set, eval_samples


def load_data(kind, tokenizer, ranks: Ranks, /, *, data_path, eval_data_path, eval_fraction, world,
              retain_data_path, replay, strict, allow_unusable, split_documents=False, max_seq_len,
              batch_size, micro_batch_size, packing, seed,
              **other_flags) -> tuple[Batches, Batches | None, Batches | None]:
    """Returns three Batches: of training data, of validation data, and of held-out old data.

    Old data (--retain_data_path) is what the model learned before; trainer/retention.py measures how much of
    it is forgotten. The second and the third may be None.

    kind: the dataset class. Flags are passed as in add_lora. (`tokenizer` is also the name of a flag. Because
    of `/` that flag goes to other_flags and does not collide with the parameter.) `read_data` says which
    files are read, and what becomes validation data. Process 0 tokenises, and the others read its token
    cache.
    """
    def read(paths):
        settings = {"strict": strict, "allow_unusable": allow_unusable}
        settings |= {"split_documents": True} if split_documents else {}  # a flag of pretraining alone
        return kind(paths, tokenizer, max_seq_len, **settings)

    train_set, train_samples, eval_set, eval_samples = read_data(
        read, ranks, data_path=data_path, eval_data_path=eval_data_path, eval_fraction=eval_fraction,
        world=world, seed=seed)
    with ranks.main_first():
        old_set = read(retain_data_path) if retain_data_path else None
    rows = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "max_seq_len": max_seq_len,
            "packing": packing, "seed": seed, "pad_token_id": tokenizer.pad_token_id or 0}  # any id will do
    eval_batches = Batches(eval_set, eval_samples, ranks, **rows) if len(eval_samples) else None
    retained = replayed = None
    if old_set is not None:
        old_samples, measured_samples = hold_out(old_set, seed)
        retained = Batches(old_set, measured_samples, ranks, **rows)
        # One dataset of both; old samples have the last numbers. It is made without --replay, too: its
        # `identity` names both, and --resume refuses another identity. So old data stays the same in a run.
        replayed = (len(train_set) + old_samples) if replay else None
        train_set = TwoDatasets(train_set, old_set)
    batches = Batches(train_set, train_samples, ranks, replayed=replayed, replay=replay, **rows)
    return batches, eval_batches, retained


def save_result(model, tokenizer, args, result: dict, ranks: Ranks) -> None:
    """Saves what has trained: the adapters, or the whole model. For stages that train either."""
    gather_weights(model, ranks)  # --parallel fsdp cut the weights into slices
    if ranks.is_main:
        with last_save(args.run_dir):
            training = describe(args, result)
            if args.lora_rank:
                save_lora(model, args.run_dir, base=args.load_from, training=training)
            else:
                save_model(model, args.run_dir, tokenizer, training=training)


@contextmanager
def last_save(run_dir: Path):
    """A context for saving the result. Only after it is on the disk are the checkpoints dropped."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        line = f"the result can't be written to {run_dir} ({error}); its last checkpoint is safe"
        raise RunError(f"{line}; to go on when there is room: {command_to_resume()}") from None
    drop_checkpoints(run_dir)
    print(f"saved {run_dir}")


def describe(args, result: dict) -> dict:
    """The content of training.json: how these weights came to be.

    tokens_seen: in this stage and all before it; None after a model from elsewhere (trainer/defaults.py).
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    before = tokens_seen(args.load_from) if args.load_from else 0
    return {"stage": args.stage, "parent": args.load_from, **result,
            "tokens_seen": None if before is None else before + result["tokens"],
            "arguments": vars(args), "finished": finished, "git": git_hash(), "versions": versions}


def git_hash() -> str | None:
    """The commit of this source. None where git is not installed, or does not know the source."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.check_output(command, cwd=ROOT, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
