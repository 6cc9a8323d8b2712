"""LoRA fine-tuning: a chat model learns something new through small adapters, every weight of its own frozen.

    python trainer/train_lora.py                             # the embedded plant doctor, on out/full_sft
    python trainer/train_lora.py --data_path my_chats.jsonl --name lora_mine --lora_rank 16
    torchrun --nproc_per_node 2 trainer/train_lora.py        # the same run on two processes
    python trainer/train_lora.py --resume                    # go on after a stop

Writes out/lora_clinic (or --name): an adapter in PEFT's format, metrics.jsonl and loss.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.args import ROOT, parse_args, run_script, training_parser


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    import torch

    from dataset.lm_dataset import SFTDataset
    from model.lora import apply_lora, count_line, freeze_all_but_lora, save_lora
    from model.weights import load_model, load_tokenizer
    from trainer.checkpoint import drop_checkpoints
    from trainer.distributed import join_ranks, leave_ranks
    from trainer.loop import train
    from trainer.stage import check_vocabulary, describe, is_finished, load_data, require

    ranks = join_ranks(args.device)
    if is_finished(args, ranks):
        return
    # The model: a chat model with adapters in it, and nothing but the adapters trained
    require(args.load_from, ROOT / "out" / "full_sft", "python trainer/train_full_sft.py")
    tokenizer = load_tokenizer(args.load_from)
    model = load_model(args.load_from)
    check_vocabulary(tokenizer, model, args.load_from)
    torch.manual_seed(args.seed)
    apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.target_modules)
    freeze_all_but_lora(model)
    # The data: conversations, of which only the assistant's words are predicted
    batches, eval_batches = load_data(SFTDataset, "lora_clinic", tokenizer, args, ranks)
    if ranks.is_main:
        print(count_line(model))
    result = train(model, batches, eval_batches, args, ranks)
    if ranks.is_main:
        save_lora(model, args.run_dir, base=args.load_from, training=describe("lora", args, result))
        drop_checkpoints(args.run_dir)
        print(f"saved {args.run_dir}")
    leave_ranks(ranks)


if __name__ == "__main__":
    parser = training_parser(__doc__)
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--lora_rank", type=int, default=16, metavar="R", help="width of the adapters")
    lora.add_argument("--lora_alpha", type=float, metavar="A",
                      help="adapters are scaled by alpha / rank (default: the rank)")
    lora.add_argument("--lora_dropout", type=float, default=0.0, metavar="P",
                      help="on what enters the adapters")
    lora.add_argument("--target_modules", nargs="+", default="all-linear", metavar="NAME",
                      help="all-linear (all but the head), square, name suffixes such as q_proj o_proj, "
                           "or a regular expression")
    parser.set_defaults(name="lora_clinic", load_from=ROOT / "out" / "full_sft",
                        optimizer="adamw", learning_rate=5e-3, weight_decay=0.0,
                        batch_size=16, max_seq_len=256, epochs=3)
    run_script(main, parse_args(parser))
