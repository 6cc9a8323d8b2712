"""How many answers a second GRPO samples, beside transformers' `generate` doing the same in the same run.

    python benchmarks/rollouts.py                               # the model and the prompts of the quickstart
    python benchmarks/rollouts.py --load_from DIR --data_path prompts.jsonl --threads 2

Each round takes 16 prompts and samples 16 answers to each, up to 64 tokens, at temperature 1. Both programs
take turns, so a busy machine slows both down. An answer counts with its end token.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, count, run_script

MAX_NEW_TOKENS = 64


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--load_from", type=Path, default=ROOT / "out/quickstart/full_sft", metavar="DIR")
    parser.add_argument("--data_path", type=Path, metavar="FILE",
                        default=ROOT / "out/quickstart/world/grpo.jsonl")
    parser.add_argument("--prompts", type=count, default=16, metavar="N", help="of a round")
    parser.add_argument("--group_size", type=count, default=16, metavar="N", help="answers to each prompt")
    parser.add_argument("--rounds", type=count, default=6, metavar="N")
    parser.add_argument("--threads", type=count, default=2, metavar="N")
    parser.add_argument("--compile", action="store_true", help="ours samples with the step in C++")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # Imported here, so that --help answers at once.
    import torch
    from transformers import AutoModelForCausalLM

    from dataset.prompts import PromptDataset
    from model.compiled_step import compile_decoding
    from model.sample_many import sample_many
    from model.weights import end_tokens, load_model, load_tokenizer

    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.load_from).eval(), load_tokenizer(args.load_from)
    if args.compile:
        compile_decoding(model)
    theirs, ends = AutoModelForCausalLM.from_pretrained(args.load_from).eval(), end_tokens(model, tokenizer)
    prompts = [prompt.ids for prompt in PromptDataset(args.data_path, tokenizer, 256).prompts]
    rows = args.prompts * args.group_size

    def of_ours(some: list[list[int]], seed: int) -> list[int]:
        numbers = torch.rand(rows, MAX_NEW_TOKENS, generator=torch.Generator().manual_seed(seed))
        return [len(answer) for answer in
                sample_many(model, some, MAX_NEW_TOKENS, ends, args.group_size, 1.0, numbers)]

    @torch.inference_mode()
    def of_theirs(some: list[list[int]], seed: int) -> list[int]:
        longest, pad = max(map(len, some)), tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in some])
        torch.manual_seed(seed)
        written = theirs.generate(ids, attention_mask=(ids != pad).long(), do_sample=True, temperature=1.0,
                                  top_k=0, top_p=1.0, num_return_sequences=args.group_size,
                                  max_new_tokens=MAX_NEW_TOKENS, eos_token_id=ends, pad_token_id=pad)
        is_end = torch.isin(written[:, longest:], torch.tensor(ends))
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, is_end.size(1))
        return lengths.tolist()

    speeds = {"ours": [], "transformers": []}
    for number in range(-1, args.rounds):  # the first round warms up
        first = (number + 1) * args.prompts
        some = prompts[first:first + args.prompts]
        for name, sample in (("ours", of_ours), ("transformers", of_theirs)):
            began = time.perf_counter()
            lengths = sample(some, number + 1)
            seconds = time.perf_counter() - began
            if number >= 0:
                speeds[name].append(rows / seconds)
                print(f"round {number}  {name:<12}  {rows / seconds:7.1f} answers/s, "
                      f"{sum(lengths) / rows:.1f} tokens each", flush=True)
    ours, other = (statistics.median(speeds[name]) for name in speeds)
    print(f"median: {ours:.0f} answers/s, transformers {other:.0f}: {ours / other:.1f} times as many")


if __name__ == "__main__":
    run_script(main, parse_args())
