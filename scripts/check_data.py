"""Look at a data file as training will see it, before a run: what is unusable, how long, and what is learnt.

    python scripts/check_data.py my_chats.jsonl                                # with Seedling's own tokenizer
    python scripts/check_data.py my_chats.jsonl --load_from out/my_sft --show 5    # with that model's

Names the lines that would be skipped, says what each --max_seq_len would cut and how full its packed rows
would be, and shows samples, with what the loss is taken of in double brackets. Writes nothing.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.args import ROOT, Parser, run_script

ROW_LENGTHS = [2**power for power in range(7, 16)]  # 128 to 32,768


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    import tempfile

    from dataset.jsonl import Report, read_records
    from dataset.lm_dataset import PretrainDataset, SFTDataset
    from model.weights import load_tokenizer

    tokenizer = load_tokenizer(args.load_from)
    _, _, first = next(read_records(args.data_path, report=Report(shown=0)))
    plain = "text" in first and not first.keys() & {"conversations", "messages", "instruction"}
    kind = PretrainDataset if plain else SFTDataset
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        dataset = kind(args.data_path, tokenizer, sys.maxsize, strict=args.strict, cache_dir=folder)
        describe(dataset, plain)
        print_rows(dataset.lengths, plain, folder)
        for i in range(min(args.show, len(dataset))):
            sample = i * len(dataset) // min(args.show, len(dataset))
            print(f"\n--- {dataset.where(sample)}\n{marked(*dataset[sample], tokenizer)}")


def describe(dataset, plain: bool) -> None:
    """How much there is, and for which script."""
    import numpy as np

    tokens, targets = int(dataset.lengths.sum()), int(dataset.num_targets.sum())
    use = "plain text, for train_pretrain.py" if plain else "chats, for train_full_sft.py and train_lora.py"
    print(f"{len(dataset):,} samples ({use})")
    print(f"{tokens:,} tokens, of which {targets:,} are learnt ({targets / tokens:.0%}); "
          f"{dataset.num_bytes.sum() / max(1, targets):.2f} UTF-8 bytes each")
    half, most = np.percentile(dataset.lengths, [50, 90], method="inverted_cdf")
    print(f"tokens of a sample: half have up to {half:,}, nine in ten up to {most:,}, "
          f"the longest {dataset.lengths.max():,}")


def lengths_in_rows(lengths, size: int, plain: bool):
    """Tokens of each sample where rows hold `size`: chats are cut, texts are read in windows that overlap by
    one token (see PretrainDataset). lengths: int array (samples,)."""
    import numpy as np

    if not plain:
        return np.minimum(lengths, size)
    windows = (lengths - 2) // (size - 1) + 1  # of each text
    found = np.full(windows.sum(), size)
    found[np.cumsum(windows) - 1] = lengths - (windows - 1) * (size - 1)  # the last one is what is left
    return found


def print_rows(lengths, plain: bool, folder: str) -> None:
    """What each length of the rows means, up to the first that holds the longest sample."""
    from dataset.packing import pack_rows

    what = "divided" if plain else "cut"
    print(f"\n| --max_seq_len | samples {what} | tokens lost | packed rows | filled |\n|---|---|---|---|---|")
    for size in ROW_LENGTHS:
        found = lengths_in_rows(lengths, size, plain)
        kept, rows = int(found.sum()), len(pack_rows(found, size, seed=0, cache_dir=folder))
        lost = 0.0 if plain else 1 - kept / int(lengths.sum())
        print(f"| {size:,} | {(lengths > size).sum():,} | {lost:.1%} | {rows:,} | {kept / rows / size:.0%} |")
        if size >= lengths.max():
            break


def marked(input_ids, labels, tokenizer) -> str:
    """The text of a sample, its learnt parts as [[part]]. What would steer the terminal shows as U+FFFD."""
    text, start = "", 0
    learnt = (labels != -100).tolist()
    for end in range(1, len(learnt) + 1):
        if end == len(learnt) or learnt[end] != learnt[start]:
            part = tokenizer.decode(input_ids[start:end], clean_up_tokenization_spaces=False)
            text += f"[[{part}]]" if learnt[start] else part
            start = end
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("data_path", nargs="+", type=Path, metavar="FILE", help="the data, as for training")
    parser.add_argument("--load_from", type=Path, default=ROOT / "model" / "tokenizer", metavar="DIR",
                        help="a folder with the tokenizer: that of the model to be trained")
    parser.add_argument("--show", type=int, default=2, metavar="N", help="samples to print")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad line, do not skip it")
    args = parser.parse_args(argv)
    if args.show < 0:
        parser.error(f"--show must not be negative, but is {args.show}")
    return args


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # Windows
    run_script(main, parse_args())
