"""Distillation: a large model teaches a small one. At every token the student learns all of the teacher's
probabilities, and not only which token came next.

    python trainer/train_distillation.py   # out/full_sft teaches a new model of a third of its parameters
    python trainer/train_distillation.py --teacher out/my_sft --preset tiny --data_path my_chats.jsonl
    python trainer/train_distillation.py --on_policy 0.5   # half of the steps use answers of the student
    python trainer/train_distillation.py --load_from out/small --lora_rank 16

metrics.jsonl and loss.png lie beside the weights. `torchrun --nproc_per_node 2` in the place of
`python` is the same run on two processes. After a stop the same command with --resume goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer import args as flags
from trainer import teacher_args


def main(args):
    # Imported here and not above, so that --help and the complaint about a mistyped flag come at once.
    from functools import partial

    import torch

    from common.device import choose_dtype
    from dataset.chat import ensure_template
    from dataset.lm_dataset import SFTDataset
    from model.rope_scaling import scale
    from model.transformer import CausalLM
    from model.weights import end_tokens
    from trainer import losses, stage
    from trainer.checkpoint import identity_of_weights
    from trainer.distributed import join_ranks, leave_ranks
    from trainer.loop import train
    from trainer.teacher import Lessons, OwnAnswers, check_same_vocabulary, load_teacher, student_config

    ranks = join_ranks(args.device)  # which process of torchrun this is, and its device
    if stage.is_finished(args.run_dir, args.resume, args.overwrite, ranks):
        return
    # The teacher, which stays as it is, and its student: the model of --load_from, or a new one
    teacher, tokenizer = load_teacher(ranks, **vars(args))
    if args.load_from:
        model, own_tokenizer = stage.load_weights(args.load_from, ranks, **vars(args))
        check_same_vocabulary(args.teacher, tokenizer, own_tokenizer)
        tokenizer = own_tokenizer
    else:
        torch.manual_seed(args.seed)
        model = CausalLM(scale(student_config(args.preset, teacher), args.rope_scaling))
    ensure_template(tokenizer)  # if a base model has no format for chats, it learns ours
    if args.lora_rank:
        stage.add_lora(model, ranks, **vars(args))  # from here on nothing but the adapters trains
    # The data: conversations, of which only the assistant's words are predicted
    batches, eval_batches, _ = stage.load_data(SFTDataset, tokenizer, ranks, **vars(args))
    of_teacher = identity_of_weights(teacher)
    eval_batches = eval_batches and Lessons(eval_batches, of_teacher)
    batches = Lessons(batches, of_teacher) if not args.on_policy else OwnAnswers(
        batches, of_teacher, model, ranks, on_policy=args.on_policy, end_tokens=end_tokens(model, tokenizer),
        max_new_tokens=args.max_new_tokens, dtype=choose_dtype(args.dtype, ranks.device))
    # The loss: how far the student's probabilities are from those of the teacher, and from the data
    divergence = getattr(losses, args.divergence)
    if args.divergence == "jensen_shannon":
        divergence = partial(divergence, beta=args.beta)
    loss = partial(losses.distillation, teacher=teacher, divergence=divergence,
                   weight=args.distillation_weight, temperature=args.temperature)
    if ranks.is_main:
        print(stage.what_trains(model))
    result = train(model, batches, loss, eval_batches, args, ranks)
    stage.save_result(model, tokenizer, args, result, ranks)
    leave_ranks(ranks)


if __name__ == "__main__":
    parser = teacher_args.distillation_parser(__doc__)
    parser.set_defaults(batch_size=16, max_seq_len=256, stage="distillation", world="sft",
                        name="distillation", teacher=flags.ROOT / "out/full_sft", learning_rate=1e-2,
                        optimizer="muon")
    args = flags.parse_args(parser)
    teacher_args.check(parser, args)
    flags.run_script(main, args)
