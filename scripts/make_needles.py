"""Writes chats that teach a model to find a fact in a text: each asks for a code that its text holds.

    python scripts/make_needles.py --max_tokens 68 128         # out/needle_68.jsonl and out/needle_128.jsonl
    python trainer/train_full_sft.py --data_path out/needle_68.jsonl --max_seq_len 68 --name short
    python trainer/train_full_sft.py --data_path out/needle_128.jsonl --load_from out/short --max_seq_len 128
    python eval_model.py --needle 64 128 256

A small model finds out what to look for where there is little to look through, so it begins with short texts.
The names of eval_model.py's test are in none of the chats, and every code is drawn anew. docs/long_texts.md.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, count, run_script, seed
from common.files import write_whole

SHORTEST, AROUND = 28, 28  # tokens of a question at least; of the answer and the marks of a chat at most


def main(args):
    import random

    from dataset.chat import encode_text
    from dataset.synthetic import World
    from dataset.world.needles import make_chats
    from model.tokenizer_files import OWN_TOKENIZER, load_tokenizer

    tokenizer, world = load_tokenizer(args.tokenizer or OWN_TOKENIZER), World(0)  # the World of the test
    for length in args.max_tokens:
        world.rng = random.Random(args.seed)
        chats = make_chats(world, args.count, SHORTEST, length - AROUND,
                           lambda text: len(encode_text(tokenizer, text)))
        file = args.out_dir / f"needle_{length}.jsonl"
        write_whole(file, "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats))
        print(f"wrote {file}: {len(chats):,} chats of at most {length} tokens")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--max_tokens", type=count, nargs="+", default=[68, 128], metavar="T",
                        help="of a chat; each makes a file, needle_T.jsonl")
    parser.add_argument("--count", type=count, default=12_000, metavar="N", help="chats in a file")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out", metavar="DIR", help="where they go")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="that counts tokens (default: our own)")
    parser.add_argument("--seed", type=seed, default=1, metavar="N", help="other texts, other codes")
    args = parser.parse_args(argv)
    if min(args.max_tokens) < SHORTEST + AROUND:
        parser.error(f"--max_tokens {min(args.max_tokens)}: a text, a question and an answer need at least "
                     f"{SHORTEST + AROUND}")
    if args.out_dir.is_file():
        parser.error(f"--out_dir {args.out_dir} is a file; name a folder")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
