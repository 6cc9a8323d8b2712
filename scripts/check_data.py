"""Shows a data file as training will see it: which lines are unusable, how long samples are, what is learnt.

    python scripts/check_data.py my_chats.jsonl                                # with Seedling's own tokenizer
    python scripts/check_data.py my_chats.jsonl --load_from out/my_sft --show 5    # with that model's

Counts the lines that would be skipped and names the first of them. Says how much each --max_seq_len would cut
and how full its packed rows would be. Shows the beginning of a few samples, with the supervised tokens, of
which the loss is taken, in [[double brackets]]. Leaves nothing behind: its token cache is in a temporary
folder.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, run_script
from common.errors import UsageError

ROW_LENGTHS = [2**power for power in range(7, 16)]  # 128 to 32,768
MAX_SHOWN_TOKENS = 600  # of a sample
# Characters that would steer a terminal: control characters, and those that turn the direction of text
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    import tempfile

    from model.weights import load_tokenizer

    tokenizer = load_tokenizer(args.load_from)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        look(args, tokenizer, folder)


def look(args, tokenizer, folder: str) -> None:
    """Prints everything; `folder` is for the token cache."""
    dataset_class = class_for(args.data_path)
    settings = {"split_documents": True} if args.split_documents else {}
    if args.split_documents and dataset_class.kind != "pretrain":
        raise UsageError("--split_documents is for plain text, and this is none")
    # The dataset cuts nothing. `lengths_in_rows` computes below what many values of --max_seq_len would cut.
    dataset = dataset_class(args.data_path, tokenizer, sys.maxsize, strict=args.strict, allow_unusable=True,
                            cache_dir=folder, **settings)  # fmt: skip
    describe(dataset)
    print_rows(dataset, folder)
    number_shown = min(args.show, len(dataset))
    for i in range(number_shown):
        sample = i * len(dataset) // number_shown
        ids, labels = dataset[sample]
        text = marked(ids[:MAX_SHOWN_TOKENS], labels[:MAX_SHOWN_TOKENS], tokenizer)
        if len(ids) > MAX_SHOWN_TOKENS:
            text += f" ... ({len(ids):,} tokens in all)"
        print(UNPRINTABLE.sub("\ufffd", f"\n--- {dataset.where(sample)}\n{text}"))
    if dataset.kind != "pretrain" and args.show:
        print("\n[[...]] is learnt, and nothing else.")


def class_for(paths: list[Path]):
    """The dataset class for the first usable record: pairs, chats, or plain text."""
    from common.errors import DataError
    from dataset.lm_dataset import PretrainDataset, SFTDataset
    from dataset.messages import to_messages
    from dataset.preference import PairSides
    from dataset.records import Report, read_records

    for _, _, record in read_records(paths, report=Report(shown=0)):
        if "chosen" in record and "rejected" in record:
            return PairSides
        try:
            to_messages(record)
            return SFTDataset
        except (DataError, RecursionError):
            if isinstance(record.get("text"), str):
                return PretrainDataset
    return SFTDataset  # it will say why no record is usable


def describe(dataset) -> None:
    """Prints how much data there is, and for which script."""
    import numpy as np

    tokens, targets = int(dataset.lengths.sum()), int(dataset.num_targets.sum())
    use = {"pretrain": "plain text, for train_pretrain.py",
           "sft": "chats, for train_full_sft.py and train_lora.py",
           "preference": "the chosen and the rejected sides of pairs, for train_dpo.py"}[dataset.kind]
    print(f"{len(dataset):,} samples ({use})")
    print(f"{tokens:,} tokens, {targets:,} of them learnt ({targets / tokens:.1%}); "
          f"{dataset.num_bytes.sum() / max(1, targets):.2f} UTF-8 bytes a learnt token")
    half, most = np.percentile(dataset.lengths, [50, 90], method="inverted_cdf")
    print(f"tokens of a sample: half have up to {half:,}, nine in ten up to {most:,}, "
          f"the longest {dataset.lengths.max():,}")


def keeps(dataset, size: int):
    """Which samples a row of `size` tokens does not drop, bool (n,); the dataset has cut nothing.

    A chat is dropped if no word of the assistant comes before the cut (see SFTDataset), a pair if one of its
    sides would be. A text is never dropped.
    """
    import numpy as np

    cache = dataset.cache
    if dataset.kind == "pretrain":
        return np.ones(len(dataset), dtype=bool)
    learnt = np.flatnonzero(cache.mask)  # places in the whole cache; every sample has at least one
    starts = cache.offsets[:-1]
    kept = learnt[np.searchsorted(learnt, starts)] - starts < size
    return kept.reshape(-1, 2).all(axis=1).repeat(2) if dataset.kind == "preference" else kept


def lengths_in_rows(dataset, size: int):
    """Lengths of the samples that rows of `size` tokens would hold, int (n,); the dataset has cut nothing.

    A longer chat is cut. A longer text is read in windows that overlap by one token (see PretrainDataset).
    """
    import numpy as np

    lengths = dataset.lengths
    if dataset.kind != "pretrain":
        return np.minimum(lengths, size)[keeps(dataset, size)]
    windows = (lengths - 2) // (size - 1) + 1  # of each text
    found = np.full(windows.sum(), size)
    found[np.cumsum(windows) - 1] = lengths - (windows - 1) * (size - 1)  # the last window has the rest
    return found


def print_rows(dataset, folder: str) -> None:
    """A table of row lengths, up to the first length that holds the longest sample."""
    from dataset.packing import pack_rows

    chats, tokens = dataset.kind != "pretrain", int(dataset.lengths.sum())
    packs = dataset.kind != "preference"  # a row of train_dpo.py holds one pair
    print(f"\n| --max_seq_len | samples {'cut' if chats else 'divided'} | dropped | tokens lost |"
          + " packed rows | filled |" * packs + "\n|---|---|---|---|" + "---|---|" * packs)
    for size in ROW_LENGTHS:
        lengths, kept = lengths_in_rows(dataset, size), keeps(dataset, size)
        longer, filled = dataset.lengths > size, int(lengths.sum())
        lost = 1 - filled / tokens if chats else 0  # windows lose nothing
        line = f"| {size:,} | {(longer & kept).sum():,} | {(~kept).sum():,} | {lost:.1%} |"
        if packs:
            rows = len(pack_rows(lengths, size, seed=0, cache_dir=folder))
            line += f" {rows:,} | {filled / max(1, rows) / size:.0%} |"
        print(line)
        if not longer.any():
            break


def marked(input_ids, labels, tokenizer) -> str:
    """The text of a sample, its learnt parts as [[part]]."""
    text, shown, learnt = "", 0, (labels != -100).tolist()
    for end in range(1, len(learnt) + 1):
        if end == len(learnt) or learnt[end] != learnt[end - 1]:
            # Each time the whole text is decoded: a character may take several tokens, and some tokenizers
            # write a blank only after another token. An incomplete character goes to the next part.
            whole = tokenizer.decode(input_ids[:end], clean_up_tokenization_spaces=False).rstrip("\ufffd")
            part, shown = whole[shown:], len(whole)
            text += f"[[{part}]]" if learnt[end - 1] else part
    return text


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("data_path", nargs="+", type=Path, metavar="FILE", help="the data, as for training")
    parser.add_argument("--load_from", type=Path, default=ROOT / "model" / "tokenizer", metavar="DIR",
                        help="a folder with the tokenizer: that of the model to be trained")
    parser.add_argument("--show", type=int, default=2, metavar="N", help="samples to print")
    parser.add_argument("--split_documents", action="store_true",
                        help="as in train_pretrain.py: <|im_start|>...<|im_end|> is a document")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad line")
    args = parser.parse_args(argv)
    if args.show < 0:
        parser.error(f"--show must not be negative, but is {args.show}")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
