"""Talk to a model, or score it.

    python eval_model.py                                           # chat with out/full_sft, answers stream
    python eval_model.py --lora out/lora_identity out/lora_clinic  # with adapters: /lora NAME switches, mixes
    python eval_model.py --load_from out/pretrain                  # a base model continues what you write
    python eval_model.py --prompt "What sound does a frog make?"   # the answer alone on stdout
    python eval_model.py --prompts                                 # a list of built-in prompts
    python eval_model.py --data_path out/world/sft_test.jsonl      # loss, bits per byte, exact match
    python eval_model.py --tasks arc piqa ceval --download         # tasks that others publish, by lm-eval
    python eval_model.py --needle 128 256 512 --json needle.json   # a fact in a long text: is it found?
    python eval_model.py --quantize int8 --compile                 # in 8 bits, by a compiled step: faster

--load_from also takes the folder of any Llama, Mistral, Qwen2 or Qwen3 model. --lora takes folders, or names
of folders beside the model or in out/. --data_path takes every chat format, texts, multiple choice and sums:
inference/scoring.py lists them. What a model thinks is shown on stderr, and each tool call on a line.
"""

import argparse
import math
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common.cli import ROOT, Parser, add_rope_scaling, any_count, count, number, run_script, seed
from common.errors import DataError, ModelError, UsageError
from common.files import json_text, write_whole

PROMPTS = ["Who are you?", "What sound does a frog make?", "What is 27 + 15?", "What is the opposite of hot?",
           "Tell me a short story about a fox in the forest.", "Who is the king of the moon?", "你是谁？",
           "猫怎么叫？", "38 减 19 等于多少？", "“苹果”用英语怎么说？", "讲一个关于猫在磨坊里的故事。"]
SHORTEST_TEXT = 64  # tokens around a needle and its question
COMMANDS = """/help            this list
/reset           forget the conversation
/system TEXT     set the system message (without TEXT: none) and forget the conversation
/lora NAME       switch to an adapter; /lora none: the model itself; /lora: which there are
/lora A:0.7 B:0.3    mix adapters, each with its weight
/temperature X   0 = always the likeliest word, 1 = as learnt
/quit            leave (so does Ctrl-D; Ctrl-C stops an answer)"""


# ---------------------------------------------------------------- the command line


# Below a temperature of 0.001 answers are greedy, except for ties, and logits overflow.
temperature = number(float, lambda x: x == 0 or 0.001 <= x <= 1000, "0, or from 0.001 to 1000")
penalty = number(float, lambda x: 0.001 <= x <= 1000, "from 0.001 to 1000")
share = number(float, lambda x: 0 < x <= 1, "above 0 and at most 1")


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("the model").add_argument
    add("--load_from", type=Path, metavar="DIR",
        help="the model, a folder or a .pth file (default: that of --lora, or out/full_sft)")
    add("--tokenizer", type=Path, metavar="DIR",
        help="its tokenizer (default: that of --load_from; for .pth files Seedling's own)")
    add("--lora", nargs="+", default=[], metavar="DIR", help="adapters, the first is on: folders or names")
    add("--plain", action="store_true", help="continue text, as a base model always does")
    add("--thinking", action="store_true", help="let a model think first whose template has a switch for it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights; auto: float32, on CUDA bfloat16 (old ones float16)")
    add("--quantize", choices=("none", "int8"), default="none", help="int8: in 8 bits, faster on a CPU")
    add("--compile", action="store_true",
        help="decode with C++ compiled for this CPU")
    add_rope_scaling(add)
    ask = parser.add_argument_group("what to ask (none of these: a conversation)")
    add = ask.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", help="answer this and exit")
    add("--prompts", action="store_true", help="answer built-in prompts and exit")
    add("--data_path", nargs="+", type=Path, metavar="FILE", help="score these files and exit")
    add("--tasks", nargs="+", metavar="NAME",
        help="score published tasks and exit: ceval, cmmlu, mmlu, arc, piqa, hellaswag, winogrande, gsm8k, "
             "or any other name of lm-eval's")
    add("--needle", nargs="+", type=count, metavar="TOKENS",
        help="look for a fact in texts of so many tokens, and exit: docs/long_texts.md")
    ask.add_argument("--system", metavar="TEXT", help="system message")
    add = parser.add_argument_group("scoring, with --data_path, --tasks or --needle").add_argument
    add("--limit", type=count, metavar="N",
        help="only N records of each file, evenly spread; of a task the first N; N needles of each length "
             "(default: all records, 200 needles)")
    add("--batch_size", type=count, metavar="N", help="answers decoded together (default: 32)")
    add("--json", type=Path, metavar="FILE",
        help="write the scores and every answer here; of needles a picture beside it, too")
    add("--num_fewshot", type=any_count, metavar="N",
        help="examples before each question of a task (default: what the task says)")
    add("--task_data", type=Path, metavar="DIR",
        help="data sets of tasks, in the layout of the hub: DIR/allenai/ai2_arc")
    add("--download", action="store_true", help="fetch data sets of tasks that are not here")
    rule = "In a chat the model's generation_config.json goes before these defaults."
    add = parser.add_argument_group("choosing words", rule).add_argument
    add("--max_new_tokens", type=count, metavar="N",
        help="of an answer; scoring: more where the right answer is longer (default: 256)")
    add("--temperature", type=temperature, metavar="X", help="0 = greedy (default: 0.7; scoring: 0)")
    add("--top_p", type=share, metavar="P", help="only the likeliest that make up P (default: 0.9)")
    add("--top_k", type=any_count, metavar="K", help="only the K likeliest; 0 = all (default: 0)")
    add("--repetition_penalty", type=penalty, metavar="X", help="1 = off (default: 1)")
    add("--seed", type=seed, help="makes sampled answers repeatable")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Impossible values and combinations are refused here, before anything is loaded."""
    parser = build_parser()
    args = parser.parse_args(argv)
    scores = args.data_path or args.tasks or args.needle
    if len(args.lora) > 1 and (args.prompt is not None or args.prompts or scores):
        parser.error("several --lora are for a conversation, which can switch between them; give one")
    if (args.limit or args.json or args.batch_size) and not scores:
        parser.error("--limit, --json and --batch_size belong to --data_path, --tasks or --needle")
    if (args.num_fewshot is not None or args.task_data or args.download) and not args.tasks:
        parser.error("--num_fewshot, --task_data and --download belong to --tasks")
    choice = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    typed = [f"--{name}" for name in choice if getattr(args, name) is not None]
    if typed and (args.tasks or args.needle):
        parser.error(f"{' '.join(typed)}: a task says itself how answers are chosen, and how long they are; "
                     "so does --needle")
    if args.needle and min(args.needle) < SHORTEST_TEXT:
        parser.error(f"--needle: {min(args.needle)} tokens are too few for a fact and a question; give at "
                     f"least {SHORTEST_TEXT}")
    if args.needle and args.json and args.json.suffix == ".png":
        parser.error("--json: the picture gets the name with .png; name a file that ends in .json")
    if args.task_data and not args.task_data.is_dir():
        parser.error(f"--task_data: {args.task_data} is no folder")
    if args.thinking and (args.plain or scores):
        parser.error("--thinking has no effect with --plain, or with --data_path, --tasks and --needle")
    if args.system is not None and (args.plain or scores):
        parser.error("--system has no effect with --plain, --data_path, --tasks or --needle")
    args.batch_size = args.batch_size or 32
    if args.max_new_tokens is None and not args.data_path:  # scoring knows how long right answers are
        args.max_new_tokens = 256
    if "" in args.lora:
        parser.error("--lora needs the name of an adapter, not an empty one")
    if args.load_from is None and args.lora:
        from model.lora_files import base_of  # here, because it imports torch

        args.load_from = base_of(Path(args.lora[0]))
    if args.load_from is None:
        args.load_from = ROOT / "out" / "full_sft"
        if not args.load_from.is_dir():
            parser.error("no out/full_sft yet: run python trainer/train_full_sft.py, or give --load_from")
    return args


# ---------------------------------------------------------------- the conversation


def chat(chat_model, sampling, system: list[dict]) -> None:
    """Reads lines until /quit or the end of stdin, from a terminal or a pipe.

    chat_model, sampling: a ChatModel and a Sampling, see inference/chat_model.py. system: no message or one.
    """
    with suppress(ImportError):  # arrow keys at the prompt; Windows has them without
        import readline  # noqa: F401
    turns = []  # questions and answers
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in ("/quit", "/exit"):
            return
        if "\0" in line:  # every other byte of English in UTF-16
            raise UsageError("the input is no UTF-8 text: save it as UTF-8 (it may be UTF-16)")
        try:
            if line.startswith("/"):
                obey(line, chat_model, sampling, system, turns)
            elif line:
                asked = [*turns, {"role": "user", "content": line}]
                asked = forget_oldest(chat_model, system, asked, sampling.max_new_tokens)
                if sampling.seed is not None:
                    sampling.seed += 1  # a question that is asked again may get another answer
                answer = say(chat_model, chat_model.encode(system + asked), sampling, in_chat=True)
                turns = [*asked, answer]
        except (DataError, ModelError) as error:
            note(f"error: {error}")


def say(chat_model, ids: list[int], sampling, in_chat: bool = False) -> dict:
    """Prints an answer as it comes. Its thinking and its speed go to stderr. Returns the message.

    In a chat Ctrl-C ends only the answer.
    """
    if len(ids) > chat_model.context:
        note(f"(a prompt of {len(ids)} tokens; the model was trained to see {chat_model.context})")
    began, reply, tokens, shown = time.perf_counter(), chat_model.new_reply(ids), 0, None
    dim, normal = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
    try:
        for part, text, tokens in chat_model.stream(ids, sampling, reply):  # noqa: B007 (used below)
            if part == "call":  # shown at the end, with those that Ctrl-C cuts off
                continue
            if shown == "reasoning" != part:
                note("")
            shown = part
            if part == "reasoning":
                print(f"{dim}{text}{normal}", end="", file=sys.stderr, flush=True)
            else:
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        if not in_chat:
            raise
        print(" ...", end="")
        reply.end()
    print(flush=True)
    for part, text in reply.parts:
        if part == "call":
            print(f"tool call: {text.strip()}", flush=True)
    speed = tokens / max(1e-9, time.perf_counter() - began)
    note(f"{dim}{tokens} tokens, {speed:.0f} tokens/s{normal}")
    return reply.turn(chat_model.tokenizer)


def note(text: str) -> None:
    """Prints beside the answers, on stderr."""
    print(text, file=sys.stderr, flush=True)


def forget_oldest(chat_model, system: list[dict], turns: list[dict], max_new_tokens: int) -> list[dict]:
    """The turns without the oldest questions and answers, so that an answer fits behind them.

    A base model knows no conversation and sees the last turn alone.
    """
    if chat_model.plain:
        return turns[-1:]
    room, kept = chat_model.context - min(max_new_tokens, chat_model.context // 4), turns
    while len(kept) > 1 and len(chat_model.encode(system + kept)) > room:
        kept = kept[2:]
    if len(kept) < len(turns):
        note(f"(longer than the {chat_model.context} tokens the model was trained to see: the oldest "
             f"{(len(turns) - len(kept)) // 2} of the answers, with their questions, are forgotten)")
    return kept


def obey(line: str, chat_model, sampling, system: list[dict], turns: list[dict]) -> None:
    """Carries out a /command, which may change `sampling`, `system` and `turns` in place.

    Raises ModelError for an adapter that is missing or does not fit.
    """
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/help":
        print(COMMANDS)
    elif name == "/reset":
        turns.clear()
        print("(the conversation is forgotten)")
    elif name == "/system" and chat_model.plain:
        print("(a base model has no system message)")
    elif name == "/system":
        turns.clear()
        system[:] = [{"role": "system", "content": value}] if value else []
        print(f"(system message: {value or 'none'}; the conversation is forgotten)")
    elif name == "/lora" and value:
        adapter = None if value == "none" else value
        if adapter and not chat_model.find(value).exists():  # a folder may have a colon in its name
            adapter = parse_mix(value)
        report = chat_model.switch(adapter)
        if report:
            note(report)
        layers = f"{chat_model.adapter}: {chat_model.adapted_layers} layers adapted"
        print(f"({layers})" if adapter else "(no adapter)")
    elif name == "/lora":
        loaded = ", ".join(chat_model.adapters.adapters) or "none"
        known = ", ".join(chat_model.names()) or "none"
        print(f"(on: {chat_model.adapter or 'none'}; loaded: {loaded}; there is: {known})")
    elif name == "/temperature":
        try:
            sampling.temperature = temperature(value)
            print(f"(temperature {sampling.temperature:g})")
        except (ValueError, argparse.ArgumentTypeError):
            print(f"/temperature takes 0, or a number from 0.001 to 1000, not {value!r}")
    else:
        print(f"unknown command {name}; /help lists the commands")


def parse_mix(value: str) -> dict[str, float] | str:
    """"a:0.7 b:0.3" -> {"a": 0.7, "b": 0.3}; "a" -> "a". Raises ModelError for what is neither."""
    if ":" not in value:
        return value
    mix = {}
    for part in value.split():
        name, _, weight = part.rpartition(":")
        try:
            mixed = float(weight)
        except ValueError:
            mixed = math.nan
        if not name or not abs(mixed) <= 100:  # NaN is not <= 100
            raise ModelError(f"/lora {value}: {part!r} is no NAME:WEIGHT with a number from -100 to 100")
        if name in mix:
            raise ModelError(f"/lora {value}: {name} is there twice")
        mix[name] = mixed
    return mix


# ---------------------------------------------------------------- the flags are carried out


def main(args: argparse.Namespace) -> None:
    if args.json:  # checked before the scoring, whose result would be lost otherwise
        args.json.parent.mkdir(parents=True, exist_ok=True)
        if args.json.is_dir():
            raise UsageError(f"--json {args.json} is a folder: name a file")
    # Imported here: torch, which takes a second, comes along, and --help does not need it.
    from inference.chat_model import ChatModel, Sampling

    chat_model = ChatModel(args.load_from, args.lora, args.device, args.dtype, args.quantize, args.plain,
                           args.tokenizer, args.thinking, args.rope_scaling, args.compile)
    for report in chat_model.reports:
        note(report)
    typed = {name: value for name, value in vars(args).items()
             if name in vars(chat_model.sampling) and value is not None}
    sampling = replace(Sampling(temperature=0.0) if args.data_path else chat_model.sampling, **typed)
    if args.system is not None and chat_model.plain:
        raise ModelError(f"--system: {args.load_from} is a base model, which knows no conversation")
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.data_path:
        from inference.scoring import score

        result = score(chat_model, args.data_path, sampling, args.limit, args.batch_size)
        if args.json:
            write_whole(args.json, json_text({"model": str(args.load_from), "lora": args.lora, **result}))
    elif args.tasks:
        from inference.tasks import evaluate, table_of

        result = evaluate(chat_model, args.tasks, limit=args.limit, num_fewshot=args.num_fewshot,
                          batch_size=args.batch_size, data=args.task_data, download=args.download)
        print(table_of(result["scores"]))
        if args.json:
            write_whole(args.json, json_text({"model": str(args.load_from), "lora": args.lora, **result}))
    elif args.needle:
        from inference.needles import draw, measure, table_of

        result = measure(chat_model, sorted(set(args.needle)), args.limit or 200, args.batch_size)
        print(table_of(result))
        if not any(answer["right"] for answer in result["answers"]):
            print("none is found: a model must have learnt the game, from chats of scripts/make_needles.py")
        if args.json:
            write_whole(args.json, json_text({"model": str(args.load_from), "lora": args.lora,
                                              "rope_scaling": args.rope_scaling, **result}))
            draw(result, args.json.with_suffix(".png"))
    elif args.prompts or args.prompt is not None:
        for prompt in PROMPTS if args.prompts else [args.prompt]:
            if args.prompts:
                print(f"\n> {prompt}")
            say(chat_model, chat_model.encode([*system, {"role": "user", "content": prompt}]), sampling)
    else:
        kind = "a base model: it continues what you write" if chat_model.plain else "/help lists the commands"
        note(f"{args.load_from}, {chat_model.num_parameters:,} parameters, temperature "
             f"{sampling.temperature:g}, top_p {sampling.top_p:g}; {kind}")
        if args.lora:
            note(f"adapters {', '.join(args.lora)}; {args.lora[0]} is on")
        chat(chat_model, sampling, system)


if __name__ == "__main__":
    run_script(main, parse_args())
