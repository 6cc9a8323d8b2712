"""Full supervised fine-tuning (SFT): a pretrained model learns to answer, all of its parameters trained.

    python trainer/train_full_sft.py                                    # the embedded chats, on out/pretrain
    python trainer/train_full_sft.py --data_path my_chats.jsonl --load_from out/pretrain --epochs 2
    torchrun --nproc_per_node 2 trainer/train_full_sft.py               # the same run on two processes
    python trainer/train_full_sft.py --resume                           # go on after a stop

Writes out/full_sft: a Hugging Face model directory, metrics.jsonl and loss.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.args import ROOT, parse_args, run_script, training_parser


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    from dataset.lm_dataset import SFTDataset
    from model.weights import load_model, load_tokenizer, save_model
    from trainer.checkpoint import drop_checkpoints
    from trainer.distributed import join_ranks, leave_ranks
    from trainer.loop import train
    from trainer.stage import check_vocabulary, describe, is_finished, load_data, require

    ranks = join_ranks(args.device)
    if is_finished(args, ranks):
        return
    # The model: pretrained weights
    require(args.load_from, ROOT / "out" / "pretrain", "python trainer/train_pretrain.py")
    tokenizer = load_tokenizer(args.load_from)
    model = load_model(args.load_from)
    check_vocabulary(tokenizer, model, args.load_from)
    # The data: conversations, of which only the assistant's words are predicted
    batches, eval_batches = load_data(SFTDataset, "sft", tokenizer, args, ranks)
    if ranks.is_main:
        print(f"{model.num_parameters():,} parameters, all of them trained")
    result = train(model, batches, eval_batches, args, ranks)
    if ranks.is_main:
        save_model(model, args.run_dir, tokenizer, training=describe("full_sft", args, result))
        drop_checkpoints(args.run_dir)
        print(f"saved {args.run_dir}")
    leave_ranks(ranks)


if __name__ == "__main__":
    parser = training_parser(__doc__)
    parser.set_defaults(name="full_sft", load_from=ROOT / "out" / "pretrain",
                        optimizer="muon", learning_rate=3e-3, batch_size=16, max_seq_len=256)
    run_script(main, parse_args(parser))
