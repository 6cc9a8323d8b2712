"""Pretraining: a model that has seen nothing learns to predict the next token of plain text.

    python trainer/train_pretrain.py                                    # the built-in texts, the tiny model
    python trainer/train_pretrain.py --data_path my.jsonl --preset 26m --max_seq_len 512 --epochs 2
    torchrun --nproc_per_node 2 trainer/train_pretrain.py               # the same run on two processes
    python trainer/train_pretrain.py --resume                           # go on after a stop

Writes out/pretrain: a Hugging Face model directory, metrics.jsonl and loss.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer import args as flags


def main(args):
    # Imported here and not above, so that --help and the complaint about a mistyped flag come at once.
    import torch

    from dataset.lm_dataset import PretrainDataset
    from model.rope_scaling import scale
    from model.tokenizer_files import OWN_TOKENIZER, load_tokenizer, vocabulary_size
    from model.transformer import CausalLM, preset
    from model.weights import save_model
    from trainer import stage
    from trainer.distributed import gather_weights, join_ranks, leave_ranks
    from trainer.loop import train
    from trainer.losses import cross_entropy

    ranks = join_ranks(args.device)  # which process of torchrun this is, and its device
    if stage.is_finished(args.run_dir, args.resume, args.overwrite, ranks):
        return
    # The model: random weights in the shape of a preset, or weights to go on from
    if args.load_from:
        model, tokenizer = stage.load_weights(args.load_from, ranks, **vars(args))
    else:
        tokenizer = load_tokenizer(args.tokenizer or OWN_TOKENIZER)
        config = flags.new_shape(args, preset(args.preset), vocabulary_size(tokenizer))
        torch.manual_seed(args.seed)
        model = CausalLM(scale(config, args.rope_scaling))
    # The data: plain text, every token of which is predicted
    batches, eval_batches, _ = stage.load_data(PretrainDataset, tokenizer, ranks, **vars(args))
    if ranks.is_main:
        print(stage.what_trains(model))
    result = train(model, batches, cross_entropy, eval_batches, args, ranks)
    gather_weights(model, ranks)  # --parallel fsdp cut the weights into slices
    if ranks.is_main:
        with stage.last_save(args.run_dir):
            save_model(model, args.run_dir, tokenizer, training=stage.describe(args, result))
    leave_ranks(ranks)


if __name__ == "__main__":
    parser = flags.training_parser(__doc__)
    parser.add_argument("--split_documents", action="store_true", help="<|im_start|>..<|im_end|>: a document")
    flags.add_shape_flags(parser)
    # With these settings a model learns most from few tokens: docs/speedrun.md compares them with others.
    # world: without --data_path this file of the built-in data, a small world, is read.
    parser.set_defaults(stage="pretrain", world="pretrain", name="pretrain", optimizer="muon",
                        learning_rate=5e-3, lr_schedule="wsd", batch_size=16, max_seq_len=256)
    args = flags.parse_args(parser)
    flags.check_shape_flags(parser, args)
    flags.run_script(main, args)
