"""Distillation: a large model teaches a small one. For each word the student learns all of the teacher's
probabilities, not only which word came next.

    python trainer/train_distillation.py      # out/full_sft teaches a new model of a third of its parameters
    python trainer/train_distillation.py --teacher out/my_sft --preset tiny --data_path my_chats.jsonl
    python trainer/train_distillation.py --on_policy 0.5 --divergence reverse_kl   # half of the answers its own
    python trainer/train_distillation.py --load_from out/small --lora_rank 16      # a student that knows something

metrics.jsonl and loss.png lie beside the weights. `torchrun --nproc_per_node 2` in the place of
`python` is the same run on two processes. After a stop the same command with --resume goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import number, positive
from trainer import args as flags

part = number(float, lambda x: 0 <= x <= 1, "a part of the whole, from 0 to 1")
inner_part = number(float, lambda x: 0 < x < 1, "a part of the whole, above 0 and below 1")


def main(args):
    # Imported here and not above, so that --help and the complaint about a mistyped flag come at once.
    from functools import partial

    import torch

    from dataset.chat import ensure_template
    from dataset.lm_dataset import SFTDataset
    from model.transformer import CausalLM
    from trainer import losses, stage
    from trainer.distributed import join_ranks, leave_ranks
    from trainer.loop import train
    from trainer.teacher import Lessons, check_same_vocabulary, load_teacher, student_config

    ranks = join_ranks(args.device)  # which process of torchrun this is, and its device
    if stage.is_finished(args.run_dir, args.resume, args.overwrite, ranks):
        return
    # The teacher, which stays as it is; and the student: a model that knows something, or random weights
    own_tokenizer = None if args.load_from else args.tokenizer
    teacher, tokenizer = load_teacher(args.teacher, ranks, own_tokenizer, args.dtype)
    if args.load_from:
        model, own_tokenizer = stage.load_weights(args.load_from, ranks, args.tokenizer)
        check_same_vocabulary(args.teacher, tokenizer, own_tokenizer)
        tokenizer = own_tokenizer
    else:
        torch.manual_seed(args.seed)
        model = CausalLM(student_config(args.preset, teacher))
    ensure_template(tokenizer)  # if a base model has no format for chats, it learns ours
    if args.lora_rank:
        stage.add_lora(model, ranks, **vars(args))  # then nothing but the adapters trains
    # The data: conversations, of which only the assistant's words are predicted
    batches, eval_batches, _ = stage.load_data(SFTDataset, tokenizer, ranks, **vars(args))
    if ranks.is_main:
        print(stage.what_trains(model))
    # The loss: how far the student's probabilities are from the teacher's, and from the data
    divergence = getattr(losses, args.divergence)
    if args.divergence == "jensen_shannon":
        divergence = partial(divergence, beta=args.beta)
    loss = partial(losses.distillation, teacher=teacher, divergence=divergence,
                   weight=args.distillation_weight, temperature=args.temperature)
    result = train(model, Lessons(batches, teacher), loss, eval_batches and Lessons(eval_batches, teacher), args, ranks)
    stage.save_result(model, tokenizer, args, result, ranks)
    leave_ranks(ranks)


if __name__ == "__main__":
    parser = flags.tuning_parser(__doc__)
    add = parser.add_argument_group("the teacher and its student").add_argument
    add("--teacher", type=Path, default=flags.ROOT / "out/full_sft", metavar="DIR",
        help="the model that teaches; the student has the same vocabulary")
    add("--preset", metavar="NAME", help="shape of a new student (default: the next smaller than the teacher's)")
    add("--divergence", choices=("forward_kl", "reverse_kl", "jensen_shannon"), default="forward_kl",
        help="how two lists of probabilities are compared: trainer/losses.py")
    add("--beta", type=inner_part, default=0.5, metavar="B", help="of jensen_shannon: near 0 it is forward_kl, near 1 reverse_kl")
    add("--distillation_weight", type=part, default=1.0, metavar="F",
        help="of the divergence; the rest is the cross-entropy of the data, as in SFT")
    add("--temperature", type=positive, default=1.0, metavar="T", help="divides the logits that are compared")
    # A new student learns from the built-in chats, without pretraining.
    parser.set_defaults(batch_size=16, max_seq_len=256, stage="distillation", world="sft", name="distillation",
                        learning_rate=5e-3, optimizer="muon")
    args = flags.parse_args(parser)
    flags.run_script(main, args)
