"""What a model answers to a hundred things that people type first, for readers to judge.

    python benchmarks/typed_first.py --load_from out/quickstart/full_sft --json answers.json

benchmarks/typed_first.jsonl holds the prompts, and what an answer to each must do to be sensible. The list
was written before the world's wordings were widened, by somebody who knew the README alone, and it is never
tuned to: whoever widens the world does not read it. Two readers who don't know which model answered judge
each answer, and the lower of the two counts is the result.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, run_script, seed
from common.files import json_text, write_whole


def main(args):
    from dataclasses import replace

    from inference.chat_model import ChatModel

    chat_model = ChatModel(args.load_from)
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    answers = []
    for number, line in enumerate(lines):
        asked = json.loads(line)
        ids = chat_model.encode([{"role": "user", "content": asked["prompt"]}])
        sampling = replace(chat_model.sampling, seed=args.seed + number)
        said = "".join(piece.text for piece in chat_model.stream(ids, sampling))
        answers.append(asked | {"answer": said})
        print(f"> {asked['prompt']}\n{said}\n")
    if args.json:
        write_whole(args.json, json_text(answers))


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--load_from", type=Path, required=True, metavar="DIR", help="the model")
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling, which is the chat's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write prompts and answers here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
