"""The command line that all training scripts share: one parser, grouped flags, every default in the help.

Nothing heavy is imported here, so that `--help` answers at once (importing torch alone takes over a second).
"""

import argparse
import errno
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # defaults hang from here; typed paths are relative to the cwd

# 75 is EX_TEMPFAIL of sysexits.h, "try again"; a shell reports 128 + n for a process that signal n ended.
TIME_IS_UP, INTERRUPTED, TERMINATED = 75, 128 + signal.SIGINT, 128 + signal.SIGTERM
EXIT_CODES = """exit codes:
  0    finished
  1    the run cannot go on: a full disk, numbers that are not finite, too little memory
  2    a mistake in the flags or the data
  75   stopped by --max_minutes   \\
  130  stopped by Ctrl-C           } a checkpoint is saved and the command that goes on is printed;
  143  stopped by SIGTERM, SIGHUP /  a second Ctrl-C or SIGTERM stops at once and saves nothing
(torchrun itself exits with 1 where a process of it did not exit with 0.)"""


class UsageError(ValueError):
    """A flag that cannot be honoured: its message is one line that says what to do."""


class RunError(RuntimeError):
    """A run that cannot go on, by no mistake of the command line: one line, exit code 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, for whatever handles Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """A mistake is one line, without argparse's screen of usage; of torchrun's ranks one says it."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": HelpFormatter} | options)

    def parse_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if not word.isascii() and word != word.encode("utf-8", "replace").decode("utf-8"):
                self.error(f"{word!a} is not valid UTF-8, which names of files must be here")
        return super().parse_args(args, namespace)

    def error(self, message: str):
        says = os.environ.get("RANK", "0") == "0"
        self.exit(2, f"error: {message} (--help lists the flags)\n" if says else None)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the commands at the top of each script as they are written, and shows every default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default in (argparse.SUPPRESS, None, []) or "%(default)" in action.help
        if isinstance(action.default, bool) and "--no-" not in str(action.option_strings):
            hidden = True  # a plain switch is off until it is named
        return action.help if hidden else f"{action.help} (default: %(default)s)"


def training_parser(description: str) -> argparse.ArgumentParser:
    """The flags of every stage. A stage states its character with `parser.set_defaults(...)`."""
    parser = Parser(description=description, epilog=EXIT_CODES)

    data = parser.add_argument_group("data")
    data.add_argument("--data_path", nargs="+", type=Path, metavar="FILE",
                      help="JSONL file(s) to train on (default: the embedded world, written to out/world)")
    data.add_argument("--eval_data_path", nargs="+", type=Path, metavar="FILE",
                      help="file(s) for the validation loss (default: --eval_fraction of the training data)")
    data.add_argument("--eval_fraction", type=float, metavar="F",
                      help="part of the training samples kept for validation instead (default: 0.01)")
    data.add_argument("--max_seq_len", type=int, default=512, metavar="T", help="tokens in a row at most")
    data.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True,
                      help="fill rows with whole documents that cannot see each other, not with one each")
    data.add_argument("--strict", action="store_true", help="stop at the first bad line, do not skip it")
    data.add_argument("--num_workers", type=int, default=0, metavar="N",
                      help="processes that prepare batches ahead")

    run = parser.add_argument_group("the run")
    run.add_argument("--load_from", type=Path, metavar="DIR", help="the weights to start from")
    run.add_argument("--out_dir", type=Path, default=ROOT / "out", metavar="DIR", help="where runs are kept")
    run.add_argument("--name", metavar="NAME", help="the run's folder below --out_dir")
    run.add_argument("--resume", action="store_true", help="continue this run from its newest checkpoint")
    run.add_argument("--overwrite", action="store_true",
                     help="start anew although --name holds an unfinished run, whose checkpoints are dropped")
    run.add_argument("--save_interval", type=int, default=500, metavar="N",
                     help="steps between resumable checkpoints")
    run.add_argument("--keep_last", type=int, default=2, metavar="K", help="checkpoints kept")
    run.add_argument("--on_full_disk", choices=("stop", "continue"), default="stop",
                     help="where a checkpoint cannot be written: end the run, or go on until the next one")
    run.add_argument("--max_minutes", type=float, metavar="M",
                     help="after M minutes finish the step, save and stop (default: no limit)")
    run.add_argument("--seed", type=int, default=42, metavar="N",
                     help="of the initial weights, the data order and dropout")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over the data")
    optim.add_argument("--max_steps", type=int, metavar="N", help="optimizer steps; overrides --epochs")
    optim.add_argument("--batch_size", type=int, default=32, metavar="N",
                       help="rows per optimizer step, over all ranks")
    optim.add_argument("--micro_batch_size", type=int, metavar="N",
                       help="rows per forward pass on one device (default: the whole of its share)")
    optim.add_argument("--optimizer", choices=("adamw", "muon", "adamw8bit", "paged_adamw8bit"),
                       default="adamw", help="muon: Muon on the matrices of the blocks, AdamW on the rest; "
                       "adamw8bit: AdamW with its state in 8 bits, paged: moves to the CPU's memory if the "
                       "GPU's is full, but not after --resume (both need bitsandbytes)")
    optim.add_argument("--learning_rate", type=float, default=5e-4, metavar="LR", help="at its peak")
    optim.add_argument("--warmup_ratio", type=float, default=0.02, metavar="F",
                       help="part of the steps that warms up")
    optim.add_argument("--lr_schedule", choices=("cosine", "wsd"), default="cosine",
                       help="how the learning rate falls; wsd: not before half of the steps, then linearly")
    optim.add_argument("--weight_decay", type=float, default=0.1, metavar="F", help="on matrices only")
    optim.add_argument("--grad_clip", type=float, default=1.0, metavar="F",
                       help="largest gradient norm; 0 = no limit")

    device = parser.add_argument_group("device")
    device.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    device.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of the forward pass; what trains, and the optimizer, stay float32")
    device.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp",
                        help="under torchrun: ddp copies the model to every process; fsdp cuts weights, "
                             "gradients and optimizer up over them, for models too large for one device")
    device.add_argument("--compile", action="store_true",
                        help="torch.compile the model: slower start, faster steps")
    device.add_argument("--gradient_checkpointing", action="store_true",
                        help="recompute activations in the backward pass: less memory, a third slower")

    log = parser.add_argument_group("logging")
    log.add_argument("--log_interval", type=int, default=20, metavar="N", help="steps between log lines")
    log.add_argument("--eval_interval", type=int, default=250, metavar="N",
                     help="steps between validations; 0 = at the end only")
    log.add_argument("--use_wandb", action="store_true",
                     help="log to Weights & Biases too (obeys WANDB_MODE)")
    log.add_argument("--wandb_project", metavar="NAME", help="the project there (default: seedling)")
    parser.set_defaults(retain_data_path=None, replay=0.0, lora_plus_ratio=1.0)  # not of every stage
    return parser


def fine_tuning_parser(description: str) -> argparse.ArgumentParser:
    """The flags of every stage that changes a model which knows something already."""
    parser = training_parser(description)
    memory = parser.add_argument_group("what it should not forget")
    memory.add_argument("--retain_data_path", nargs="+", type=Path, metavar="FILE",
                        help="old data: a table of loss and exact answers, before and after (default: none)")
    memory.add_argument("--replay", type=float, default=0.0, metavar="F",
                        help="part of the rows of each epoch that comes from the old data")
    return parser


def lora_parser(description: str) -> argparse.ArgumentParser:
    """The flags of fine-tuning through adapters."""
    parser = fine_tuning_parser(description)
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--lora_rank", type=int, default=16, metavar="R", help="width of the adapters")
    lora.add_argument("--lora_alpha", type=float, metavar="A",
                      help="adapters are scaled by alpha / rank (default: the rank)")
    lora.add_argument("--lora_rslora", action="store_true",
                      help="scale by alpha / sqrt(rank): high ranks learn as fast as low ones")
    lora.add_argument("--lora_dropout", type=float, default=0.0, metavar="P",
                      help="on what enters the adapters")
    lora.add_argument("--lora_init", choices=("gaussian", "pissa"), default="gaussian",
                      help="pissa: begin with the largest singular directions of the weights")
    lora.add_argument("--lora_plus_ratio", type=float, default=1.0, metavar="R",
                      help="LoRA+: B learns R times faster than A")
    lora.add_argument("--target_modules", nargs="+", default="all-linear", metavar="NAME",
                      help="all-linear (all but the head), square, name suffixes such as q_proj o_proj, "
                           "or a regular expression")
    lora.add_argument("--quantize", choices=("none", "nf4"), default="none",
                      help="nf4: the frozen linear layers in 4 bits (QLoRA)")
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parses, checks what can be checked before anything is loaded, and adds what no flag says.

    run_dir: the run's folder; stop_at: when --max_minutes are over, as time.monotonic(); content: empty here,
    it will hold what identifies the data and the weights (see trainer/stage.py).
    """
    args = parser.parse_args(argv)
    if args.max_minutes is not None and not args.max_minutes > 0:
        parser.error(f"--max_minutes must be above 0, not {args.max_minutes}")
    args.stop_at = time.monotonic() + 60 * args.max_minutes if args.max_minutes else float("inf")
    args.content = {}
    if args.max_minutes and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        parser.error("--max_minutes and torchrun's --max-restarts don't go together: torchrun would start a "
                     "run that has ended in time once more")
    if args.resume and args.overwrite:
        parser.error("--resume continues a run and --overwrite starts it anew: give one of them")
    for name in ("max_seq_len", "save_interval", "keep_last", "epochs", "batch_size", "log_interval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("max_steps", "micro_batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("eval_interval", "num_workers", "weight_decay", "grad_clip"):
        if not 0 <= getattr(args, name) < float("inf"):  # nan is not
            parser.error(f"--{name} must not be negative, and finite, but is {getattr(args, name)}")
    for name in ("eval_fraction", "warmup_ratio", "replay"):
        if not 0 <= (getattr(args, name) or 0) < 1:
            parser.error(f"--{name} is a part of the whole, from 0 to below 1, not {getattr(args, name)}")
    if args.eval_data_path and args.eval_fraction is not None:
        parser.error("--eval_fraction has no effect with --eval_data_path: give one of them")
    if args.replay and not args.retain_data_path:
        parser.error("--replay needs --retain_data_path, the old data to replay")
    if args.wandb_project and not args.use_wandb:
        parser.error("--wandb_project has no effect without --use_wandb")
    if not 0 < args.lora_plus_ratio < float("inf"):
        parser.error(f"--lora_plus_ratio must be above 0 and finite, not {args.lora_plus_ratio}")
    if args.parallel == "fsdp":
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            parser.error("--parallel fsdp cuts a model up over several processes, and this is one: start "
                         "them with torchrun --nproc_per_node N, or leave it out")
        if args.compile:
            parser.error("--parallel fsdp and --compile don't work together: leave one of them out")
        if "8bit" in args.optimizer:
            parser.error(f"--parallel fsdp can't cut up the state of --optimizer {args.optimizer}: use adamw")
        if getattr(args, "quantize", "none") != "none":
            parser.error("--parallel fsdp can't cut up the weights of --quantize nf4: leave one of them out")
    if "8bit" in args.optimizer and not importlib.util.find_spec("bitsandbytes"):
        parser.error(f"--optimizer {args.optimizer} needs bitsandbytes: pip install bitsandbytes")
    if args.use_wandb and not importlib.util.find_spec("wandb"):
        parser.error("--use_wandb needs wandb: pip install wandb")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2^32 - 1, not {args.seed}")
    if not 0 < args.learning_rate < float("inf"):
        parser.error(f"--learning_rate must be above 0 and finite, not {args.learning_rate}")
    if args.max_seq_len < 2:
        parser.error("--max_seq_len must be at least 2: a token, and one to predict from it")
    if args.name in ("", ".", "..") or "/" in args.name or "\\" in args.name:
        parser.error(f"--name {args.name!r} must be a plain folder name; --out_dir says where it lies")
    if args.name in ("cache", "world") and args.out_dir.resolve() == ROOT / "out":
        parser.error(f"--name {args.name}: out/{args.name} holds what all runs share: choose another name")
    args.run_dir = args.out_dir / args.name
    if args.load_from and args.load_from.resolve() == args.run_dir.resolve():
        parser.error(f"--name {args.name} would write over --load_from {args.load_from}: choose another name")
    there = next(folder for folder in (args.run_dir.absolute(), *args.run_dir.absolute().parents)
                 if os.path.lexists(folder))
    if not there.is_dir():
        parser.error(f"--out_dir {args.out_dir}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        parser.error(f"--out_dir {args.out_dir}: {there} is not writable")
    return args


def run_script(main, args: argparse.Namespace) -> None:
    """Runs `main(args)`. What goes wrong becomes one line on stderr and an exit code (EXIT_CODES)."""
    def terminate(number, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        main(args)
        return
    except Terminated:
        code, line = TERMINATED, "stopped by SIGTERM"
    except KeyboardInterrupt:
        code, line = INTERRUPTED, "stopped by Ctrl-C"
    except BrokenPipeError as error:
        if reader_is_gone():
            raise SystemExit(1) from None
        code, line = explain(error, args)
    except Exception as error:
        code, line = explain(error, args)
    finally:
        signal.signal(signal.SIGTERM, before)
    if (rank := os.environ.get("RANK", "0")) != "0":
        # Most often all ranks fail alike and rank 0 says so: torchrun ends the others while they wait.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        time.sleep(3)
        line = f"rank {rank}: {line}"
    print(line, file=sys.stderr)
    raise SystemExit(code)


def reader_is_gone() -> bool:
    """Whether what read our output has left, as `| head -1` does; what else is printed then goes nowhere."""
    try:
        os.write(1, b"\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more at its end
        return True
    return False


def explain(error: Exception, args: argparse.Namespace) -> tuple[int, str]:
    """(exit code, one line) for a mistake or a misfortune. A bug is raised again and keeps its traceback."""
    from dataset.jsonl import DataError  # here, because --help needs neither
    from model.transformer import ModelError

    disk = error.__context__ if isinstance(error, DataError) else error  # a cache that could not be written
    if isinstance(disk, OSError) and disk.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return 1, f"error: {error}"
    # A killed worker of the DataLoader is noticed by its parent, or by the socket between them.
    vanished = isinstance(error, ConnectionError)
    if isinstance(error, (DataError, ModelError, UsageError, OSError)) and not vanished:
        return 2, f"error: {error}"
    if isinstance(error, RunError):
        return 1, f"error: {error}"
    # CUDA's is an OutOfMemoryError, the CPU's allocators raise a RuntimeError.
    if re.search(r"MemoryError|not enough memory|can't allocate memory", repr(error)):
        return 1, f"error: {out_of_memory(str(error), args)}"
    if vanished or re.search(r"Connection (closed|reset|refused)|gloo|NCCL|DataLoader worker", str(error)):
        line = f"error: a process that this one works with ended ({str(error).splitlines()[0]})"
        if hasattr(args, "run_dir"):
            from trainer.checkpoint import last_good

            line += f"; {last_good(args.run_dir)}; to go on: {command_to_resume()}"
        return 1, line
    raise error


def command_to_resume() -> str:
    """The command line of this process with --resume at its end, to be copied into a shell.

    Of torchrun's processes: torchrun's own, as Linux knows it; elsewhere what its variables tell of it.
    """
    words = [sys.orig_argv[0], *sys.argv]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        try:
            parent = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]
        except OSError:
            parent = []
        if sys.argv[0] in parent:
            words = ["torchrun", *parent[2:]] if Path(parent[1]).name == "torchrun" else parent
        else:
            words = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}", *sys.argv]
    # --overwrite, or as much of it as was typed, has done its work.
    words = [word for word in words if not (len(word) > 3 and "--overwrite".startswith(word))]
    words += [] if "--resume" in words else ["--resume"]
    return shlex.join(words) if os.name == "posix" else subprocess.list2cmdline(words)


def out_of_memory(message: str, args: argparse.Namespace) -> str:
    """One line: what was asked, what there is, and the flags that would need less."""
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", message, re.IGNORECASE)
    there = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", message)
    line = "out of memory"
    if asked:
        asked = f"{float(asked[1]) / 2**30:.2f} GiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
        line += f": {asked} were asked for"
    if there:
        line += f", of {there[1]} on the GPU {there[2]} are free"
    elif "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        total, free = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") / 2**30
                       for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        line += f", of {total:.1f} GiB in this machine {free:.1f} GiB are free"
    if not hasattr(args, "micro_batch_size"):
        return line  # not a training script
    rows = args.micro_batch_size or -(-args.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
    same = [f"--micro_batch_size {rows // 2}"] if rows > 1 else []
    same += ["--gradient_checkpointing"] if not args.gradient_checkpointing else []
    other = [f"--max_seq_len {args.max_seq_len // 2}"]
    other += ["--optimizer adamw8bit"] if "8bit" not in args.optimizer else []
    other += ["--quantize nf4"] if getattr(args, "quantize", "nf4") == "none" else []
    line += f"; less is needed with {' or '.join(same)} (same result; --resume goes on)" if same else ""
    return line + f"; or, trained anew, with {' or '.join(other)}"
