"""Full supervised fine-tuning (SFT): a pretrained model learns to answer. All of its parameters train.

    python trainer/train_full_sft.py                # built-in chats; reads out/pretrain, writes out/full_sft
    python trainer/train_full_sft.py --data_path my_chats.jsonl --load_from out/pretrain --epochs 2

metrics.jsonl and loss.png lie beside the weights. `torchrun --nproc_per_node 2` in the place of
`python` is the same run on two processes. After a stop the same command with --resume goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer import args as flags


def main(args):
    # Imported here and not above, so that --help and the complaint about a mistyped flag come at once.
    from dataset.chat import ensure_template
    from dataset.lm_dataset import SFTDataset
    from model.weights import save_model
    from trainer import stage
    from trainer.distributed import gather_weights, join_ranks, leave_ranks
    from trainer.loop import train
    from trainer.losses import cross_entropy
    from trainer.retention import compare, measure

    ranks = join_ranks(args.device)  # which process of torchrun this is, and its device
    if stage.is_finished(args.run_dir, args.resume, args.overwrite, ranks):
        return
    # The model that another stage left, and its tokenizer
    model, tokenizer = stage.load_weights(args.load_from, ranks, **vars(args))
    ensure_template(tokenizer)  # if a base model has no format for chats, it learns ours
    # The data: conversations, of which only the assistant's words are predicted
    batches, eval_batches, retained = stage.load_data(SFTDataset, tokenizer, ranks, **vars(args))
    if ranks.is_main:
        print(stage.what_trains(model))
    # `measure` and `compare` show how much old data is forgotten, or do nothing without --retain_data_path.
    before = measure(model, eval_batches, retained, args.dtype, ranks)
    result = train(model, batches, cross_entropy, eval_batches, args, ranks)
    result |= compare(before, measure(model, eval_batches, retained, args.dtype, ranks), ranks)
    gather_weights(model, ranks)  # --parallel fsdp cut the weights into slices
    if ranks.is_main:
        with stage.last_save(args.run_dir):
            save_model(model, args.run_dir, tokenizer, training=stage.describe(args, result))
    leave_ranks(ranks)


if __name__ == "__main__":
    parser = flags.fine_tuning_parser(__doc__)
    parser.set_defaults(batch_size=16, max_seq_len=256, stage="full_sft", world="sft", name="full_sft",
                        load_from=flags.ROOT / "out/pretrain", learning_rate=3e-3, optimizer="muon")
    flags.run_script(main, flags.parse_args(parser))
