"""Does a model find a fact in a long text? eval_model.py --needle 128 256 512. A reader may skip this file.

    result = measure(ChatModel("out/full_sft"), lengths=[128, 256, 512], count=200)
    print(table_of(result))
    draw(result, Path("needle.png"))

For each length, `count` texts are written that fill so many tokens, question and answer included. Each holds
one fact (dataset/world/needles.py), at the depths in turn. An answer is right if the code of the fact is in
it. The texts follow from the lengths alone, so all models get the same.

Also here: how well the model predicts the words at each position of a long text.
"""

import math
import random
from pathlib import Path

import torch

from common.errors import UsageError
from dataset.chat import encode_continuation, encode_text
from dataset.synthetic import World
from dataset.world.needles import Needle, hay, make_needle
from inference.chat_model import ChatModel, Sampling

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the needle: 0 is the beginning of the text
TOKENS_OF_ANSWER = 24  # at most; "The code of Ruth is 4821." has 12 of ours
TOKENS_AT_ONCE = 8192  # of prompts that are read together
TEXTS_WITHOUT_NEEDLE = 16  # for the perplexity
PLACES = 32  # into which the positions of these are grouped


@torch.inference_mode()
def measure(chat_model: ChatModel, lengths: list[int], count: int = 200, batch_size: int = 32) -> dict:
    """{"found": {length: {depth: share of right answers}}, "answers": [each answer], "perplexity": ...}

    perplexity: as `perplexity_by_place` gives it, for texts of the longest length. count: needles of each
    length. batch_size: how many answers are decoded together, at most. Raises UsageError where the model has
    fewer positions than a length.
    """
    if max(lengths) > chat_model.max_positions:
        raise UsageError(f"--needle {max(lengths)}: the model has only {chat_model.max_positions} positions")
    world, found, answers = World(0), {}, []  # this world's split of names is that of the training data
    for length in lengths:
        world.rng = random.Random(length)
        asked = [(depth, *ask(chat_model, world, length, depth))
                 for depth in (DEPTHS * math.ceil(count / len(DEPTHS)))[:count]]
        right = {depth: [] for depth in DEPTHS}
        at_once = max(1, min(batch_size, TOKENS_AT_ONCE // length))
        for i in range(0, count, at_once):
            batch = asked[i:i + at_once]
            for (depth, prompt, needle), answer in zip(batch, answer_all(chat_model, batch), strict=True):
                right[depth].append(needle.code in answer)
                answers.append({"length": length, "depth": depth, "tokens": len(prompt), "code": needle.code,
                                "answer": answer, "right": right[depth][-1]})
        found[length] = {depth: sum(hits) / len(hits) for depth, hits in right.items() if hits}
    world.rng = random.Random(max(lengths))
    return {"found": found, "perplexity": perplexity_by_place(chat_model, world, max(lengths)),
            "answers": answers}


def ask(chat_model: ChatModel, world: World, length: int, depth: float) -> tuple[list[int], Needle]:
    """A prompt with a needle, which fills `length` tokens together with its answer."""
    def length_of(text: str) -> int:
        return len(encode_text(chat_model.tokenizer, text))

    def prompt_of(content: str) -> list[int]:
        return chat_model.encode([{"role": "user", "content": content}])

    room = length - len(prompt_of("")) - TOKENS_OF_ANSWER
    needle = make_needle(world, hay(world, length_of), room, depth, length_of, for_test=True)
    if chat_model.plain:  # a base model knows no questions, and goes on with the fact
        return prompt_of(f"{needle.text} {needle.begun}"), needle
    return prompt_of(f"{needle.text}\n{needle.question}"), needle


def answer_all(chat_model: ChatModel, batch: list[tuple]) -> list[str]:
    """The greedy answers to prompts, (depth, prompt, needle) each."""
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=TOKENS_OF_ANSWER)
    steps = list(chat_model.generate([prompt for _, prompt, _ in batch], sampling))
    rows = torch.stack(steps, dim=1).tolist()  # (B, steps)
    ends = [next((place for place, token in enumerate(row) if token in chat_model.stop_ids), len(row))
            for row in rows]
    return [chat_model.decode(row[:end]).strip() for row, end in zip(rows, ends, strict=True)]


def perplexity_by_place(chat_model: ChatModel, world: World, length: int) -> list[tuple[int, float]]:
    """[(last position, perplexity)] of each part of texts with `length` tokens, which hold no needle."""
    sentences = hay(world, len)
    total = torch.zeros(length, dtype=torch.float64)
    for _ in range(TEXTS_WITHOUT_NEEDLE):
        ids, _ = encode_continuation(chat_model.tokenizer, "")  # what begins every text, or nothing
        while len(ids) < length:
            ids += encode_text(chat_model.tokenizer, " " + next(sentences)[0])
        ids = torch.tensor([ids[:length]], device=chat_model.device)  # (1, T)
        total += chat_model.model(ids, labels=ids).token_losses[0].double().cpu()
    parts = (total / TEXTS_WITHOUT_NEEDLE)[1:].chunk(PLACES)  # nothing predicts the first token
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    return [(end, math.exp(part.mean())) for end, part in zip(ends, parts, strict=True)]


# --- for a person to read -----------------------------------------------------------------------------------


def table_of(result: dict) -> str:
    """Found needles in percent: a line for each length, a column for each depth."""
    lines = ["tokens" + "".join(f"{f'depth {depth:g}':>12}" for depth in DEPTHS) + f"{'all':>8}"]
    for length, found in result["found"].items():
        right = [answer["right"] for answer in result["answers"] if answer["length"] == length]
        cells = "".join(f"{found[depth]:>12.0%}" if depth in found else " " * 12 for depth in DEPTHS)
        lines.append(f"{length:>6}{cells}{sum(right) / len(right):>8.1%}")
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Two pictures in one PNG: found needles by length and depth, and the perplexity by position."""
    # Imported here, because that takes half a second, and pyplot more.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = result["found"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid, curve = figure.subplots(1, 2)
    shares = [[found[length].get(depth, math.nan) for length in found] for depth in DEPTHS]
    grid.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for row, of_depth in enumerate(shares):
        for column, share in enumerate(of_depth):
            if not math.isnan(share):  # fewer needles than depths
                grid.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8)
    grid.set(xticks=range(len(found)), xticklabels=list(found), yticks=range(len(DEPTHS)), yticklabels=DEPTHS,
             xlabel="tokens of the text", ylabel="depth of the needle", title="needles found")
    curve.plot(*zip(*result["perplexity"], strict=True), linewidth=1.5)
    curve.set(xlabel="position in the text", ylabel="perplexity", title="perplexity by position")
    curve.set_yscale("log")
    curve.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
