"""The flags of train_distillation.py, and what is checked before anything is loaded.
A reader may skip this file.
"""

import argparse
from pathlib import Path

from common.cli import count, number
from trainer.args import part, temperature, tuning_parser

inner_part = number(float, lambda x: 0 < x < 1, "above 0 and below 1")


def distillation_parser(description: str) -> argparse.ArgumentParser:
    """The flags of learning from a teacher."""
    parser = tuning_parser(description)
    add = parser.add_argument_group("the teacher and its student").add_argument
    add("--teacher", type=Path, metavar="DIR", help="a model of the same vocabulary, which stays as it is")
    add("--preset", metavar="NAME",
        help="shape of a new student (default: the largest with fewer parameters than the teacher)")
    add("--divergence", choices=("forward_kl", "reverse_kl", "jensen_shannon"), default="forward_kl",
        help="how the probabilities of teacher and student are compared: see trainer/losses.py")
    add("--beta", type=inner_part, default=0.5, metavar="B",
        help="of jensen_shannon: near 0 it acts like forward_kl, near 1 like reverse_kl")
    add("--temperature", type=temperature, default=1.0, metavar="T",
        help="both models' logits are divided by it before they are compared")
    add("--distillation_weight", type=part, default=1.0, metavar="F",
        help="weight of that comparison; the rest is the weight of the data's own words, as in SFT")
    add("--on_policy", type=part, default=0.0, metavar="F",
        help="part of the steps in which the student writes the answers itself")
    add("--max_new_tokens", type=count, default=128, metavar="N", help="tokens of such an answer at most")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """As trainer.args.check_combinations, for these flags."""
    for is_wrong, message in (
        (args.preset and args.load_from,
         "--preset has no effect with --load_from: weights bring their shape along"),
        (args.lora_rank and not args.load_from,
         "--lora_rank needs --load_from: adapters change a model that knows something already"),
        (args.divergence != "jensen_shannon" and args.beta != parser.get_default("beta"),
         f"--beta has no effect on --divergence {args.divergence}, only on jensen_shannon"),
        (not args.on_policy and args.max_new_tokens != parser.get_default("max_new_tokens"),
         "--max_new_tokens has no effect without --on_policy"),
        (args.on_policy == 1 and args.distillation_weight < 1,
         "--distillation_weight has no effect with --on_policy 1, which reads no answer of the data"),
        (args.on_policy and args.parallel == "fsdp",
         "--on_policy and --parallel fsdp don't work together: the student is in slices and can't answer"),
        (args.on_policy and args.num_workers,
         "--on_policy and --num_workers don't work together: what the student says can't be read ahead"),
        (args.on_policy and args.compile,
         "--on_policy and --compile don't work together: every answer has another length"),
        (args.teacher.resolve() == args.run_dir.resolve(),
         f"--name {args.name} would write over --teacher {args.teacher}: choose another name"),
    ):
        if is_wrong:
            parser.error(message)
