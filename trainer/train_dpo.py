"""Direct preference optimisation (DPO): from pairs of answers a model learns which of the two is preferred.
A reader may skip this file.

    python trainer/train_dpo.py         # reads out/full_sft; built-in pairs: stories in a season
    python trainer/train_dpo.py --data_path my_pairs.jsonl --load_from out/my_sft --name my_dpo --lora_rank 16

metrics.jsonl and loss.png lie beside the weights. `torchrun --nproc_per_node 2` in the place of
`python` is the same run on two processes. After a stop the same command with --resume goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer import args as flags

BETA = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}  # as in their papers
HAS_REFERENCE = ("dpo", "ipo")


def main(args):
    # Imported here and not above, so that --help and the complaint about a mistyped flag come at once.
    from functools import partial

    from dataset.chat import ensure_template
    from dataset.preference import PreferenceDataset
    from trainer import stage
    from trainer.distributed import join_ranks, leave_ranks
    from trainer.loop import train
    from trainer.losses import dpo
    from trainer.reference import add_reference

    ranks = join_ranks(args.device)  # which process of torchrun this is, and its device
    if stage.is_finished(args.run_dir, args.resume, args.overwrite, ranks):
        return
    # The model that another stage left, and its tokenizer
    model, tokenizer = stage.load_weights(args.load_from, ranks, **vars(args))
    ensure_template(tokenizer)  # if a base model has no format for chats, it learns ours
    if args.lora_rank:
        stage.add_lora(model, ranks, **vars(args))  # from here on nothing but the adapters trains
    # The data: pairs of a chosen and a rejected answer
    batches, eval_batches, _ = stage.load_data(PreferenceDataset, tokenizer, ranks, **vars(args))
    if ranks.is_main:
        print(stage.what_trains(model))
    # The reference is the model as it is now. Its part of the loss is computed here, once for the whole run.
    if args.preference_loss in HAS_REFERENCE:
        datasets = [batches.dataset, *([eval_batches.dataset] if eval_batches else [])]
        add_reference(model, datasets, args.dtype, ranks)
    loss = partial(dpo, kind=args.preference_loss, beta=args.beta, label_smoothing=args.label_smoothing,
                   sft_weight=args.sft_weight, margin=args.margin)
    result = train(model, batches, loss, eval_batches, args, ranks)
    stage.save_result(model, tokenizer, args, result, ranks)
    leave_ranks(ranks)


if __name__ == "__main__":
    parser = flags.tuning_parser(__doc__)
    add = parser.add_argument_group("preferences (the equations: trainer/losses.py)").add_argument
    add("--preference_loss", choices=BETA, default="dpo", help="how a pair becomes a loss")
    add("--beta", type=flags.positive, metavar="B",
        help="how much a difference in log-probability counts (default: 0.1; simpo: 2)")
    add("--label_smoothing", type=flags.fraction, default=0.0, metavar="F",
        help="part of the pairs that may be the wrong way round, for dpo and simpo")
    add("--sft_weight", type=flags.not_negative, default=1.0, metavar="W",
        help="of SFT's loss of the chosen answer, which is added so that it stays likely; 0: none")
    add("--margin", type=flags.not_negative, metavar="M",
        help="by which simpo wants the chosen score to be larger (default: 1)")
    # One pair is a row. --max_seq_len holds for each of its sides.
    parser.set_defaults(batch_size=32, max_seq_len=256, packing=False, stage="dpo", world="dpo", name="dpo",
                        load_from=flags.ROOT / "out/full_sft", learning_rate=5e-5, weight_decay=0.0)
    args = flags.parse_args(parser)
    kind = args.preference_loss
    if args.label_smoothing and kind in ("ipo", "orpo"):
        parser.error(f"--label_smoothing has no effect on {kind}: it is for dpo and simpo")
    if args.margin is not None and kind != "simpo":
        parser.error(f"--margin has no effect on {kind}: it is for simpo")
    args.beta = BETA[kind] if args.beta is None else args.beta
    args.margin = (1.0 if kind == "simpo" else 0.0) if args.margin is None else args.margin
    flags.run_script(main, args)
