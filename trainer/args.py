"""The flags that all training scripts share, in one parser, and the checks before anything is loaded.
A reader may skip this file.

Nothing heavy is imported here, so that `--help` answers at once. Importing torch alone takes over a second.
"""

import argparse
import os
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from common import cli
from common.cli import ROOT, Parser, any_count, count, fraction, not_negative, number, positive, seed
from common.errors import EXIT_CODES, ModelError, UsageError
from trainer.defaults import gentle_defaults, gentle_values
from trainer.interrupt import command_to_resume

LORA_FLAGS = ("lora_alpha", "lora_rslora", "lora_dropout", "lora_init", "lora_plus_ratio", "target_modules",
              "quantize")
REWARD_FLAGS = {"answers": None, "format": "reward_format", "length": "max_reward_tokens",  # part: its flag
                "file": "reward_file", "model": "reward_model"}
# What train_pretrain.py may change of a preset: the flag, and its help
SHAPE = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                       "intermediate_size"), "instead of the preset's")
SHAPE |= {"sliding_window": "tokens that a token sees: itself and those before it (default: all)",
          "full_attention_every": "every N-th layer has no --sliding_window (default: all layers have it)"}
EXPERT_FLAGS = {"num_experts": "num_experts", "experts_per_token": "num_experts_per_tok",  # flag: its setting
                "moe_intermediate_size": "moe_intermediate_size", "norm_topk_prob": "norm_topk_prob",
                "router_balance": "router_aux_loss_coef", "router_z_loss": "router_z_loss_coef"}
ROUTER_FLAGS = ("router_balance", "router_z_loss")  # they change what is minimised, and no shape
part = number(float, lambda x: 0 <= x <= 1, "a part of the whole, from 0 to 1")
temperature = number(float, lambda x: 0.001 <= x <= 1000, "from 0.001 to 1000")
row_length = number(int, lambda n: n >= 2, "at least 2 (a token, and one to predict)")


def training_parser(description: str) -> argparse.ArgumentParser:
    """The flags of every stage. A stage states its character with `parser.set_defaults(...)`."""
    parser = Parser(description=description, epilog=EXIT_CODES)

    add = parser.add_argument_group("data").add_argument
    add("--data_path", nargs="+", type=Path, metavar="FILE",
        help="JSONL file(s) to train on (default: the embedded world, written to out/world)")
    add("--eval_data_path", nargs="+", type=Path, metavar="FILE",
        help="file(s) for the validation loss (default: --eval_fraction of the training data)")
    add("--eval_fraction", type=fraction, metavar="F",
        help="part of the training samples kept for validation instead (default: 0.01)")
    add("--max_seq_len", type=row_length, default=512, metavar="T", help="tokens in a row at most")
    add("--packing", action=argparse.BooleanOptionalAction, default=True,
        help="fill rows with whole documents that cannot see each other, not with one each")
    add("--strict", action="store_true", help="stop at the first bad line, do not skip it")
    add("--allow_unusable", action="store_true", help="train though most records of a file cannot be used")
    add("--num_workers", type=any_count, default=0, metavar="N", help="processes that prepare batches ahead")

    add = parser.add_argument_group("the run").add_argument
    add("--load_from", type=Path, metavar="DIR", help="the weights to start from: a folder, or a .pth file")
    add("--tokenizer", type=Path, metavar="DIR",
        help="the model's tokenizer (default: that of --load_from; for new models and .pth files our own)")
    cli.add_rope_scaling(add)
    add("--out_dir", type=Path, default=ROOT / "out", metavar="DIR", help="where runs are kept")
    add("--name", metavar="NAME", help="the run's folder below --out_dir")
    add("--resume", action="store_true", help="continue this run from its newest checkpoint")
    add("--overwrite", action="store_true",
        help="start anew although --name holds an unfinished run, whose checkpoints are dropped")
    add("--save_interval", type=count, default=500, metavar="N", help="steps between resumable checkpoints")
    add("--keep_last", type=count, default=2, metavar="K", help="checkpoints kept")
    add("--on_full_disk", choices=("stop", "continue"), default="stop",
        help="where a checkpoint cannot be written: end the run, or go on until the next one")
    add("--max_minutes", type=positive, metavar="M", help="then save and stop (default: no limit)")
    add("--seed", type=seed, default=42, metavar="N", help="of initial weights, data order and dropout")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, default=1, metavar="N", help="passes over the data")
    add("--max_steps", type=count, metavar="N", help="optimizer steps; overrides --epochs")
    add("--batch_size", type=count, default=32, metavar="N", help="rows per optimizer step, over all ranks")
    add("--micro_batch_size", type=count, metavar="N",
        help="rows per forward pass on one device (default: the whole of its share)")
    add("--optimizer", choices=("adamw", "muon", "adamw8bit", "paged_adamw8bit"), default="adamw",
        help="muon: Muon on the matrices of the blocks, AdamW on the rest; 8bit: its state in 8 bits, and "
             "paged: on the CPU if the GPU is full, but not after --resume (both need bitsandbytes)")
    add("--learning_rate", type=positive, default=5e-4, metavar="LR", help="at its peak")
    add("--warmup_ratio", type=fraction, default=0.02, metavar="F", help="part of the steps that warms up")
    add("--lr_schedule", choices=("cosine", "wsd"), default="cosine",
        help="how the learning rate falls; wsd: not before half of the steps, then linearly")
    add("--weight_decay", type=not_negative, default=0.1, metavar="F", help="on matrices only")
    add("--grad_clip", type=not_negative, default=1.0, metavar="F", help="largest gradient norm; 0: no limit")

    add = parser.add_argument_group("device").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the forward pass; what trains, and the optimizer, stay float32")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp",
        help="under torchrun: ddp copies the model to every process; fsdp cuts weights, gradients and "
             "optimizer up over them, for models too large for one device")
    add("--compile", action="store_true", help="torch.compile the model: slower start, faster steps")
    add("--gradient_checkpointing", action="store_true", help="run blocks twice: less memory, a third slower")

    add = parser.add_argument_group("logging").add_argument
    add("--log_interval", type=count, default=20, metavar="N", help="steps between log lines")
    add("--eval_interval", type=any_count, default=250, metavar="N",
        help="steps between validations; 0 = at the end only")
    add("--use_wandb", action="store_true", help="log to Weights & Biases too (obeys WANDB_MODE)")
    add("--wandb_project", metavar="NAME", help="the project there (default: seedling)")
    parser.set_defaults(retain_data_path=None, replay=0.0, lora_plus_ratio=1.0)  # not of every stage
    return parser


def fine_tuning_parser(description: str) -> argparse.ArgumentParser:
    """The flags of every stage that changes a model which knows something already."""
    parser = training_parser(description)
    add = parser.add_argument_group("what it should not forget").add_argument
    add("--retain_data_path", nargs="+", type=Path, metavar="FILE",
        help="old data: a table of loss and exact answers, before and after (default: none)")
    add("--replay", type=fraction, default=0.0, metavar="F", help="part of an epoch's rows that is old data")
    add_router_flags(parser.add_argument_group("a model with experts").add_argument, "as its config says")
    return parser


def lora_parser(description: str) -> argparse.ArgumentParser:
    """The flags of fine-tuning through adapters."""
    parser = fine_tuning_parser(description)
    add_lora_flags(parser, rank=16)
    return parser


def tuning_parser(description: str) -> argparse.ArgumentParser:
    """The flags of a stage after SFT, in which all weights train, or adapters with --lora_rank."""
    parser = training_parser(description)
    add_lora_flags(parser, rank=0)
    return parser


def rollout_parser(description: str) -> argparse.ArgumentParser:
    """The flags of a stage that learns from rewards for what the model itself writes."""
    parser = tuning_parser(description)
    add = parser.add_argument_group("rollouts").add_argument
    add("--group_size", type=count, default=16, metavar="N", help="answers to each prompt of a rollout")
    add("--updates_per_rollout", type=count, default=1, metavar="N", help="steps that learn from one rollout")
    add("--temperature", type=temperature, default=1.0, metavar="T", help="of sampling and training")
    add("--max_new_tokens", type=count, default=64, metavar="N", help="then an answer is cut off")
    add("--compile_rollouts", action="store_true", help="write the answers with C++ compiled for this CPU")
    add("--kl_beta", type=not_negative, default=0.0, metavar="F",
        help="weight of the KL divergence from the model at the start; 0: no such model is kept")
    add("--show_interval", type=any_count, default=50, metavar="N",
        help="rollouts between those of which some answers are printed; 0: none")
    add = parser.add_argument_group("old chats, against forgetting").add_argument
    add("--sft_data_path", nargs="+", type=Path, metavar="FILE",
        help="chats that every step learns beside the answers, as SFT does (default: none; without "
             "--data_path the chats of the built-in world)")
    add("--sft_weight", type=positive, default=1.0, metavar="W", help="of their loss")
    add("--sft_batch_size", type=count, default=16, metavar="N", help="rows of them in a step")
    add = parser.add_argument_group("rewards").add_argument
    add("--rewards", nargs="+", type=weighted, metavar="NAME[:WEIGHT]",
        help="what is added up: answers, format, length, file, model (default: what the flags below ask "
             "for, else answers; for the embedded world answers length:0.2)")
    add("--reward_format", metavar="REGEX", help="format: 1 if the whole answer matches (default: none)")
    add("--max_reward_tokens", type=count, metavar="N",
        help="length: 1 up to N tokens, 0 from 2 N on (default: what a record says)")
    add("--reward_file", metavar="FILE.py:NAME",
        help="file: your own function of the prompt's messages, the answer and the record; its file is run "
             "(default: none)")
    add("--reward_model", type=Path, metavar="DIR",
        help="model: a sequence-classification model of transformers (default: none)")
    parser.set_defaults(packing=False)  # each answer has a row of its own
    return parser


def weighted(text: str) -> tuple[str, float]:
    """"length:0.5" -> ("length", 0.5)."""
    name, _, weight = text.partition(":")
    try:
        value = float(weight or 1)
    except ValueError:
        value = 0
    if name not in REWARD_FLAGS or value == 0 or not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(REWARD_FLAGS)}, with or without a "
                                         "colon and a weight that is not 0")
    return name, value


def choose_rewards(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Makes args.rewards a dictionary of weights. Each part and its flag need each other."""
    given = {name for name, flag in REWARD_FLAGS.items() if flag and getattr(args, flag) is not None}
    asked = [(name, 1.0) for name in REWARD_FLAGS if name in given] or [("answers", 1.0)]
    if not given and not args.data_path:  # the embedded prompts say how short an answer should be
        asked.append(("length", 0.2))
    weights = dict(args.rewards or asked)
    if len(weights) < len(args.rewards or ()):
        parser.error("--rewards names a part twice: give each of them one weight")
    for name, flag in REWARD_FLAGS.items():
        is_needed = name in weights and name != "length"  # records may have limits of their own
        if flag and (is_needed and name not in given or name in given and name not in weights):
            missing = (f"--rewards {name} needs --{flag}" if name in weights
                       else f"--{flag} has no effect: add {name} to --rewards")
            parser.error(missing)
    args.rewards = weights


def add_lora_flags(parser: argparse.ArgumentParser, rank: int) -> None:
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_rank", type=count if rank else any_count, default=rank, metavar="R",
        help="width of the adapters" + ("" if rank else "; 0: no adapters, all weights train"))
    add("--lora_alpha", type=positive, metavar="A",
        help="adapters are scaled by alpha / rank (default: rank)")
    add("--lora_rslora", action="store_true",
        help="scale by alpha / sqrt(rank): high ranks learn as fast as low ones")
    add("--lora_dropout", type=fraction, default=0.0, metavar="P", help="on what enters the adapters")
    add("--lora_init", choices=("gaussian", "pissa"), default="gaussian",
        help="pissa: begin with the largest singular directions of the weights")
    add("--lora_plus_ratio", type=positive, default=1.0, metavar="R",
        help="LoRA+: B learns R times faster than A")
    add("--target_modules", nargs="+", default="all-linear", metavar="NAME",
        help="all-linear (all but the head), square, suffixes such as q_proj o_proj, or a regular expression")
    add("--quantize", choices=("none", "nf4"), default="none", help="nf4: frozen layers in 4 bits (QLoRA)")


def add_shape_flags(parser: argparse.ArgumentParser) -> None:
    """The shape of a model that is made anew."""
    shape = parser.add_argument_group("the model's shape (later stages inherit it from the weights)")
    add = shape.add_argument
    add("--preset", default="tiny", help="micro, tiny, 26m, 64m, 104m; with experts: tiny-moe, 198m-a64m")
    for name, meaning in SHAPE.items():
        add(f"--{name}", type=int, metavar="N", help=meaning)
    add("--num_experts", type=count, metavar="N",
        help="feed-forward layers in each block, of which a token uses some (default: the preset's)")
    add("--experts_per_token", type=count, metavar="K", help="how many it uses (default: the preset's, 1)")
    add("--moe_intermediate_size", type=count, metavar="N", help="of one expert (default: intermediate_size)")
    add("--norm_topk_prob", action="store_true", default=None,
        help="what a token's experts count adds up to 1; needs two or more (default: it does not)")
    add_router_flags(add, "the preset's, 0.01 and 0.001; with --load_from as the model's config says")


def add_router_flags(add, default: str) -> None:
    add("--router_balance", type=not_negative, metavar="F",
        help=f"weight of the loss that keeps experts equally busy; 0: none (default: {default})")
    add("--router_z_loss", type=not_negative, metavar="F",
        help="weight of the loss that keeps the router's scores small (default: likewise)")


def check_shape_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """A flag of the shape has no effect on weights that are there."""
    for name in ("preset", *SHAPE, *EXPERT_FLAGS):
        if args.load_from and name not in ROUTER_FLAGS and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} has no effect with --load_from: weights bring their shape along")


def new_shape(args: argparse.Namespace, preset, vocab_size: int):
    """The ModelConfig that the flags of add_shape_flags ask for. preset: the ModelConfig that they change.

    Experts bring norms of queries and keys with them, since the class that they are saved as has these norms.
    Raises UsageError for a flag that would have no effect, and for a router that would learn nothing.
    """
    changes = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    of_experts = {flag: getattr(args, flag) for flag in EXPERT_FLAGS if getattr(args, flag) is not None}
    has_experts = args.num_experts or preset.num_experts
    if of_experts and not has_experts:
        raise UsageError(f"--{next(iter(of_experts))} has no effect without experts: add --num_experts, or "
                         "--preset tiny-moe")
    if args.intermediate_size and args.moe_intermediate_size:
        raise UsageError("--intermediate_size has no effect beside --moe_intermediate_size: give one of them")
    changes |= {EXPERT_FLAGS[flag]: value for flag, value in of_experts.items()}
    try:
        config = replace(preset, vocab_size=vocab_size, qk_norm=preset.qk_norm or has_experts > 0, **changes)
    except ModelError as error:
        raise UsageError(in_words_of_flags(str(error))) from None
    if has_experts and config.num_experts == 1:
        raise UsageError("--num_experts 1: a router with one expert has nothing to choose; leave it out")
    if has_experts and config.norm_topk_prob and config.num_experts_per_tok == 1:
        raise UsageError("--norm_topk_prob with one expert for each token: what that expert counts is then "
                         "always 1, so no gradient tells the router which one to choose; use "
                         "--experts_per_token 2 or more, or leave --norm_topk_prob out")
    return config


def in_words_of_flags(message: str) -> str:
    """A message about fields of ModelConfig, as somebody should read it who has typed flags."""
    flags = {name: name for name in SHAPE} | {field: flag for flag, field in EXPERT_FLAGS.items()}
    flags |= {"expert_size": "moe_intermediate_size", "layer_types": "full_attention_every"}
    return re.sub(rf"\b({'|'.join(flags)})\b", lambda found: f"--{flags[found[0]]}", message)


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the flags, checks all that needs no loading, and adds run_dir, the folder of the run.

    A stage's `set_defaults` is for young models. For a grown one some flags get other values (defaults.py),
    and a line says which.
    """
    explain_gentle_defaults(parser)
    args = parser.parse_args(argv)
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args)))))  # None: not typed
    chosen, why = gentle_defaults(vars(args), typed)
    changed = {name: value for name, value in chosen.items()
               if typed[name] is None and value != getattr(args, name)}
    if changed and os.environ.get("RANK", "0") == "0":
        before = {name: f" (not {value})" for name, value in vars(args).items() if value is not None}
        values = " ".join(f"--{name} {value}{before.get(name, '')}" for name, value in changed.items())
        print(f"{args.load_from} {why}, so it is treated gently: {values}; flags that you type win")
    vars(args).update(changed)
    check_combinations(parser, args)
    if hasattr(args, "rewards"):
        choose_rewards(parser, args)
    args.run_dir = args.out_dir / args.name
    check_folders(parser, args)
    return args


def explain_gentle_defaults(parser: argparse.ArgumentParser) -> None:
    """Adds to --help the values that a grown model gets."""
    names = [action.dest for action in parser._actions]
    values = gentle_values({name: parser.get_default(name) for name in [*names, "stage"]})
    for action in parser._actions:
        if action.dest in values:
            action.help += f"; {values[action.dest]} over a grown model"


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """A flag that has no effect, or that is impossible with another flag, is a mistake."""
    fsdp, is_8bit, rolls = args.parallel == "fsdp", "8bit" in args.optimizer, hasattr(args, "rewards")
    without_lora = [f"--{name}" for name in vars(args) if getattr(args, "lora_rank", None) == 0
                    and name in LORA_FLAGS and getattr(args, name) != parser.get_default(name)]
    for is_wrong, message in (
        (args.max_minutes and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)),
         "--max_minutes and torchrun's --max-restarts don't go together: an ended run would restart"),
        (args.resume and args.overwrite, "--resume goes on, --overwrite starts anew: give one of them"),
        (args.eval_data_path and args.eval_fraction is not None,
         "--eval_fraction has no effect with --eval_data_path: give one of them"),
        (args.replay and not args.retain_data_path, "--replay needs --retain_data_path, the old data"),
        (rolls and args.data_path and not args.sft_data_path and any(
            getattr(args, name) != parser.get_default(name) for name in ("sft_weight", "sft_batch_size")),
         "--sft_weight and --sft_batch_size need --sft_data_path, the old chats"),
        (args.wandb_project and not args.use_wandb, "--wandb_project has no effect without --use_wandb"),
        (args.use_wandb and not find_spec("wandb"), "--use_wandb needs wandb: pip install wandb"),
        (without_lora, f"{' '.join(without_lora)}: adapters need --lora_rank, such as --lora_rank 16"),
        (args.packing and not parser.get_default("packing"),
         "--packing: the rows of this stage can't be packed"),
        (is_8bit and not find_spec("bitsandbytes"),
         f"--optimizer {args.optimizer} needs bitsandbytes: pip install bitsandbytes"),
        (fsdp and int(os.environ.get("WORLD_SIZE", 1)) == 1,
         "--parallel fsdp needs several processes: torchrun --nproc_per_node N, or leave it out"),
        (fsdp and args.compile, "--parallel fsdp and --compile don't work together: leave one of them out"),
        (fsdp and is_8bit, f"--parallel fsdp can't cut up the state of {args.optimizer}: use adamw"),
        (fsdp and getattr(args, "quantize", "none") != "none",
         "--parallel fsdp can't cut up the weights of --quantize nf4: leave one of them out"),
        (rolls and fsdp, "--parallel fsdp can't write answers, for which each process needs the whole model: "
                         "use ddp"),
        (rolls and args.compile, "--compile would compile anew for each length of answers: leave it out, or "
                                 "take --compile_rollouts"),
        (rolls and args.num_workers, "--num_workers has no effect here: rollouts can't be prepared ahead"),
        (rolls and args.batch_size % args.group_size,
         f"--batch_size {args.batch_size} counts answers, so it must be a multiple of --group_size "
         f"{args.group_size}" if rolls else ""),
        (rolls and args.max_new_tokens >= args.max_seq_len,
         f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in --max_seq_len "
         f"{args.max_seq_len}" if rolls else ""),
        (getattr(args, "advantage", "") and args.group_size == 1,
         "--group_size 1: a group of one has no mean to compare with; give at least 2"),
    ):
        if is_wrong:
            parser.error(message)


def check_folders(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The run's folder must be one of its own, and writable."""
    name, there = args.name, args.run_dir.absolute()
    other = "config.json" if getattr(args, "lora_rank", 0) else "adapter_config.json"
    while not os.path.lexists(there):
        there = there.parent  # in the end: the nearest folder, or file, that exists
    for is_wrong, message in (
        (name in ("", ".", "..") or "/" in name or "\\" in name,
         f"--name {name!r} must be a plain folder name; --out_dir says where it lies"),
        (name in ("cache", "world") and args.out_dir.resolve() == ROOT / "out",
         f"--name {name}: out/{name} holds what all runs share: choose another name"),
        (args.load_from and args.load_from.resolve() == args.run_dir.resolve(),
         f"--name {name} would write over --load_from {args.load_from}: choose another name"),
        ((args.run_dir / other).exists(),
         f"--name {name}: with {args.run_dir / other} a model and an adapter would lie in one folder, which "
         "other programs read as one: choose another name"),
        (not there.is_dir(), f"--out_dir {args.out_dir}: {there} is no folder"),
        (not os.access(there, os.W_OK | os.X_OK), f"--out_dir {args.out_dir}: {there} is not writable"),
    ):
        if is_wrong:
            parser.error(message)


def run_script(main, args: argparse.Namespace) -> None:
    """common.cli.run_script, which adds to an error what a training run can do about it."""
    def advice(problem: str) -> str:
        if problem == "out of memory":
            return flags_that_need_less_memory(args)
        from trainer.checkpoint import last_good  # here, because it imports torch

        return f"; {last_good(args.run_dir)}; to go on: {command_to_resume()}"

    cli.run_script(main, args, advice)


def flags_that_need_less_memory(args: argparse.Namespace) -> str:
    """The end of the message that memory ran out."""
    rows = args.micro_batch_size or -(-args.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
    is_float = getattr(args, "quantize", "nf4") == "none"
    same_result = {f"--micro_batch_size {rows // 2}": rows > 1,
                   "--gradient_checkpointing": not args.gradient_checkpointing}
    other_result = {f"--max_seq_len {args.max_seq_len // 2}": True,
                    "--optimizer adamw8bit": "8bit" not in args.optimizer, "--quantize nf4": is_float}
    same, other = (" or ".join(flag for flag, is_possible in flags.items() if is_possible)
                   for flags in (same_result, other_result))
    line = f"; less is needed with {same} (same result; --resume goes on)" if same else ""
    return f"{line}; or, trained anew, with {other}"
