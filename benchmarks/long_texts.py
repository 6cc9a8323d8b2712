"""Texts longer than those in training: YaRN, 100 steps at 512 tokens, both, neither. docs/long_texts.md.

    python benchmarks/long_texts.py                                 # 20 minutes on one busy thread
    python benchmarks/long_texts.py                                  # again: goes on where it was stopped
    python benchmarks/long_texts.py --table_only                     # of the runs that are there
    python benchmarks/long_texts.py --plot docs/long_texts.png

A tiny model is pretrained on the world's texts and on such texts joined to 128 tokens. It learns to find
needles (dataset/world/needles.py) in chats of 68 tokens and then of 128, and is asked for needles in 128, 256
and 512. The perplexity by position is that of the pretrained model, which has learnt to predict every word:
as it is, scaled, after 100 steps on texts of 512 tokens, and after such steps with the scaling.

Every step is a command of Seedling's own, which is printed first. All results go to out/long_texts.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import COLORS, markdown, new_figure, save_picture
from common.cli import ROOT, Parser, count, run_script, seed
from common.errors import RunError
from common.files import read_json, write_whole

YARN = ("--rope_scaling", "yarn:4")
LENGTHS = ("128", "256", "512")
# (what was done, the model that is asked, flags with which it is asked)
SETTINGS = (("neither", "at_128", ()), ("YaRN x4 alone", "at_128", YARN),
            ("100 steps at 512 alone", "at_512", ()), ("both", "at_512_yarn", ()))


def main(args):
    out = args.out_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not args.table_only:
        make_data(out, args)
        train(out, args)
        for _, model, flags in SETTINGS:
            for stage, lengths, number in (("needle", LENGTHS, "200"), ("text", LENGTHS[-1:], "5")):
                ask(out, f"{stage}_{model}", flags, lengths, number, args)
    results = {name: [read_json(result_file(out, f"{stage}_{model}", flags)) for stage in ("needle", "text")]
               for name, model, flags in SETTINGS}
    print(markdown([row(name, *result) for name, result in results.items()]))
    if args.plot:
        draw(results, args.plot)


# --- the commands -------------------------------------------------------------------------------------------


def run(*words, args) -> None:
    """A command of ours, shown and run. Raises RunError where it fails."""
    command = [str(word) for word in words]
    print("$ python " + shlex.join(command), flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
    if subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], env=environment).returncode:
        raise RunError("the command above failed; the same command as before goes on from there")


def make_data(out: Path, args) -> None:
    """The needles to train on, and plain texts of 512 tokens; the world itself comes with the first stage."""
    if not (out / "world" / "world.json").is_file():
        run("dataset/synthetic.py", "--out_dir", out / "world", args=args)
    if not (out / "needle_512.jsonl").is_file():
        run("scripts/make_needles.py", "--max_tokens", 68, 128, 512, "--out_dir", out, args=args)
    for length, texts in ((128, 10_000), (512, 1_700)):
        if not (out / f"text_{length}.jsonl").is_file():
            write_whole(out / f"text_{length}.jsonl", long_texts(texts, length))


def long_texts(number: int, length: int) -> str:
    """Records of plain texts that fill `length` tokens, of the sentences that are around a needle."""
    import random

    from dataset.chat import encode_text
    from dataset.synthetic import World
    from dataset.world.needles import hay
    from model.tokenizer_files import OWN_TOKENIZER, load_tokenizer

    tokenizer, world = load_tokenizer(OWN_TOKENIZER), World(0)
    world.rng, lines = random.Random(3), []
    sentences = hay(world, lambda text: len(encode_text(tokenizer, text)))
    for _ in range(number):
        text, left = [], length - 1  # <|endoftext|> takes one
        for sentence, tokens in sentences:
            if tokens > left:
                break
            text.append(sentence)
            left -= tokens
        lines.append(json.dumps({"text": " ".join(text)}) + "\n")
    return "".join(lines)


def train(out: Path, args) -> None:
    """All models. With --resume a stage that was stopped goes on, and a finished one says so and ends."""
    def stage(kind: str, length: int, steps: int, rate: str, files: list[str], parent=None, name=None, *more):
        script = "train_pretrain" if kind == "text" else "train_full_sft"
        begun = ("--load_from", out / parent) if parent else ()
        files = [out / file for file in files]
        run(f"trainer/{script}.py", "--data_path", *files, *begun, "--out_dir", out, "--name",
            name or f"{kind}_at_{length}", "--max_seq_len", length, "--max_steps", steps, "--batch_size",
            max(16, 2048 // length), "--optimizer", "muon", "--learning_rate", rate, "--lr_schedule", "wsd",
            "--seed", args.seed, *more, "--eval_interval", 0, "--log_interval", 50, "--save_interval", 200,
            "--resume", args=args)

    stage("text", 128, 600, "7e-3", ["world/pretrain.jsonl", "text_128.jsonl"])
    # A small model finds out what to look for where there is little to look through.
    stage("needle", 68, 500, "7e-3", ["needle_68.jsonl"], "text_at_128")
    stage("needle", 128, 800, "5e-3", ["needle_128.jsonl"], "needle_at_68")
    for kind, rate in (("text", "3e-3"), ("needle", "7e-3")):
        long = (kind, 512, 100, rate, [f"{kind}_512.jsonl"], f"{kind}_at_128")
        stage(*long)
        stage(*long, f"{kind}_at_512_yarn", *YARN)


def result_file(out: Path, model: str, flags: tuple) -> Path:
    return out / f"{model}{'_scaled' if flags else ''}.json"


def ask(out: Path, model: str, flags: tuple, lengths: tuple, number: str, args) -> None:
    file = result_file(out, model, flags)
    if not file.is_file():
        run("eval_model.py", "--load_from", out / model, *flags, "--needle", *lengths, "--limit", number,
            "--json", file, args=args)


# --- the table and the picture ------------------------------------------------------------------------------


def row(name: str, needles: dict, texts: dict) -> dict:
    """A line of the table: needles found in percent, and the perplexity near the end of 512 tokens."""
    right = {length: [a["right"] for a in needles["answers"] if str(a["length"]) == length]
             for length in LENGTHS}
    found = {f"found at {length}": f"{sum(hits) / len(hits):.1%}" for length, hits in right.items()}
    perplexity = {f"perplexity at {place}": f"{nearest(texts['perplexity'], place):.2f}"
                  for place in (120, 250, 500)}
    return {"": name} | found | perplexity


def nearest(curve: list, place: int) -> float:
    return min(curve, key=lambda point: abs(point[0] - place))[1]


def draw(results: dict, path: Path) -> None:
    """Found needles by depth, at 512 tokens; and the perplexity by position."""
    figure, [[bars, curves]] = new_figure(9, 3.2, 1, 2)
    for index, (name, (needles, texts)) in enumerate(results.items()):
        depths = needles["found"]["512"]
        places = [place + 0.2 * (index - 1.5) for place in range(len(depths))]
        bars.bar(places, [100 * share for share in depths.values()], 0.18, color=COLORS[index], label=name)
        curves.plot(*zip(*texts["perplexity"], strict=True), color=COLORS[index], label=name)
    bars.set(xticks=range(len(depths)), xticklabels=list(depths), xlabel="depth of the needle",
             ylabel="found, %", title="needles in 512 tokens")
    curves.axvline(128, color="black", linewidth=0.8, linestyle=":")
    curves.set(xlabel="position in the text", ylabel="perplexity", yscale="log", xlim=(0, 512),
               title="perplexity by position", yticks=(2, 3, 5, 10))
    curves.yaxis.set_major_formatter("{x:g}")
    curves.minorticks_off()
    curves.legend(frameon=False, fontsize=8)
    save_picture(figure, path)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "long_texts", metavar="DIR",
                        help="where all results go")
    parser.add_argument("--threads", type=count, metavar="N", help="of each command (default: all cores)")
    parser.add_argument("--seed", type=seed, default=42, metavar="N", help="of all trainings")
    parser.add_argument("--table_only", action="store_true", help="train and ask nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results into this PNG")
    run_script(main, parser.parse_args())
