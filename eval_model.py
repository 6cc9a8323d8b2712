"""Talk to a model, or score it.

    python eval_model.py                                           # chat with out/full_sft, answers stream
    python eval_model.py --lora out/lora_identity out/lora_clinic  # with adapters: /lora NAME switches, mixes
    python eval_model.py --load_from out/pretrain                  # a base model continues what you write
    python eval_model.py --prompt "What sound does a frog make?"   # the answer alone on stdout
    python eval_model.py --prompts                                 # a list of built-in prompts
    python eval_model.py --data_path out/world/sft_test.jsonl      # loss, bits per byte, exact match
    python eval_model.py --quantize int8                           # weights in 8 bits: faster on a CPU

--load_from takes the directory of any Llama, Mistral, Qwen2 or Qwen3 model too. --data_path takes every chat
format, texts, multiple choice and sums: scoring.py lists them.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from trainer.args import ROOT, Parser, UsageError, run_script

PROMPTS = ["Who are you?", "What sound does a frog make?", "What is 27 + 15?", "What is the opposite of hot?",
           "Tell me a short story about a fox in the forest.", "Who is the king of the moon?",
           "你是谁？", "猫怎么叫？", "38 减 19 等于多少？", "“苹果”用英语怎么说？",
           "讲一个关于猫在磨坊里的故事。"]

COMMANDS = """/help            this list
/reset           forget the conversation
/system TEXT     set the system message (without TEXT: none) and forget the conversation
/lora NAME       switch to an adapter; /lora none: the model itself; /lora: which there are
/lora A:0.7 B:0.3    mix adapters, each with its weight
/temperature X   0 = always the likeliest word, 1 = as learnt
/quit            leave (so does Ctrl-D; Ctrl-C stops an answer)"""


# ---------------------------------------------------------------- the command line


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    model = parser.add_argument_group("the model")
    model.add_argument("--load_from", type=Path, metavar="DIR", help="the model (default: out/full_sft)")
    model.add_argument("--lora", nargs="+", default=[], metavar="DIR",
                       help="adapter(s), the first is on; folders, or names beside the model or in out/")
    model.add_argument("--plain", action="store_true", help="continue text, as a base model always does")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    model.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                       help="of the weights; auto: float32, on CUDA bfloat16 (old ones float16)")
    model.add_argument("--quantize", choices=("none", "int8"), default="none",
                       help="int8: weights in 8 bits, with which a CPU decodes faster")
    ask = parser.add_argument_group("what to ask (none of these: a conversation)")
    ask.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    ask.add_argument("--prompts", action="store_true", default=None, help="answer built-in prompts and exit")
    ask.add_argument("--data_path", nargs="+", type=Path, metavar="FILE", help="score these files and exit")
    ask.add_argument("--system", metavar="TEXT", help="system message")
    score = parser.add_argument_group("scoring, with --data_path")
    score.add_argument("--limit", type=int, metavar="N", help="only N records of each file, evenly spread")
    score.add_argument("--batch_size", type=int, default=32, metavar="N", help="answers decoded together")
    score.add_argument("--json", type=Path, metavar="FILE", help="write the scores and every answer here")
    words = parser.add_argument_group("choosing words")
    words.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="of the longest answer")
    words.add_argument("--temperature", type=float, metavar="X", help="0 = greedy (default: 0.7; scoring: 0)")
    words.add_argument("--top_p", type=float, default=0.9, metavar="P", help="the likeliest that make up P")
    words.add_argument("--top_k", type=int, default=0, metavar="K", help="only the K likeliest; 0 = all")
    words.add_argument("--repetition_penalty", type=float, default=1.0, metavar="X", help="1 = off")
    words.add_argument("--seed", type=int, help="makes sampled answers repeatable")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses, and refuses what can be refused before anything is loaded."""
    parser = build_parser()
    args = parser.parse_args(argv)
    modes = [f"--{name}" for name in ("prompt", "prompts", "data_path") if getattr(args, name) is not None]
    if len(modes) > 1:
        parser.error(f"{' and '.join(modes)} exclude each other")
    if modes and len(args.lora) > 1:
        parser.error(f"{modes[0]} takes one --lora; only a conversation can switch between several")
    for name in ("limit", "json"):
        if getattr(args, name) is not None and not args.data_path:
            parser.error(f"--{name} belongs to --data_path")
    if args.system is not None and (args.plain or args.data_path):
        parser.error(f"--system has no effect with {'--plain' if args.plain else '--data_path'}")
    if args.temperature is None:
        args.temperature = 0.0 if args.data_path else 0.7
    least_values = {"max_new_tokens": 1, "batch_size": 1, "limit": 1, "top_k": 0}
    for name, least in least_values.items():
        if getattr(args, name) is not None and not getattr(args, name) >= least:
            parser.error(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if not is_temperature(args.temperature):
        parser.error(f"--temperature must be 0, or from 0.001 to 1000, not {args.temperature}")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top_p must be above 0 and at most 1, not {args.top_p}")
    if not 0.001 <= args.repetition_penalty <= 1000:
        parser.error(f"--repetition_penalty must be from 0.001 to 1000, not {args.repetition_penalty}")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2^32 - 1, not {args.seed}")
    if "" in args.lora:
        parser.error("--lora needs the name of an adapter, not an empty one")
    if args.load_from is None:
        args.load_from = ROOT / "out" / "full_sft"
        if not args.load_from.is_dir():
            parser.error("there is no out/full_sft yet: make it with python trainer/train_full_sft.py, "
                         "or name a model with --load_from")
    return args


def is_temperature(number: float) -> bool:
    """Below 0.001 only ties would make it differ from greedy, and logits divided by it overflow."""
    return number == 0 or 0.001 <= number <= 1000


# ---------------------------------------------------------------- a model that answers


class Speaker:
    """A model, its tokenizer and the adapter that is on. `plain`: it continues text, without conversation."""

    def __init__(self, args: argparse.Namespace):
        """Raises ModelError for weights, tokenizers and adapters that fail, UsageError for a device."""
        import torch

        from model.adapters import Adapters
        from model.one_token import prepare_to_decode
        from model.quantize import quantize_int8
        from model.transformer import ModelError
        from model.weights import load_model, load_tokenizer
        from trainer.distributed import choose_device

        self.args, self.device, self.adapter = args, choose_device(args.device), None
        dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
        if args.dtype == "auto" and self.device.type == "cuda":
            native = torch.cuda.get_device_capability(self.device) >= (8, 0)
            dtype = torch.bfloat16 if native else torch.float16
        self.model = load_model(args.load_from, device=self.device, dtype=dtype).eval()
        if args.quantize == "int8":
            quantize_int8(self.model)
        prepare_to_decode(self.model)
        self.tokenizer = load_tokenizer(args.load_from)
        self.num_parameters, config = self.model.num_parameters(), self.model.config
        vocabulary = self.tokenizer.get_vocab()
        if max(vocabulary.values()) >= config.vocab_size:
            raise ModelError(f"{args.load_from}: its tokenizer has {len(vocabulary)} entries, the model only "
                             f"{config.vocab_size}: they do not belong together")
        training = read_if_there(args.load_from / "training.json")  # ours; models from elsewhere have none
        base = training.get("stage") == "pretrain" and not args.lora  # an adapter was trained on chats
        self.plain = args.plain or base or not self.tokenizer.chat_template
        self.stop = self.ends(vocabulary)
        # Beyond the length it was trained on, a small model forgets how to speak, though its positions go on.
        arguments, self.context = training.get("arguments"), config.max_position_embeddings
        trained = arguments.get("max_seq_len") if isinstance(arguments, dict) else None
        if isinstance(trained, int) and trained > 0:
            self.context = min(self.context, trained)
        self.adapters = Adapters(self.model)
        for name in reversed(args.lora):  # every one, so that a bad one is found now; the first stays
            self.switch(name)

    def ends(self, vocabulary: dict[str, int]) -> list[int]:
        """The tokens that end an answer: by name, and those that generation_config.json lists."""
        from model.transformer import ModelError

        file = self.args.load_from / "generation_config.json"
        listed = read_if_there(file).get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        known = [vocabulary.get("<|im_end|>"), vocabulary.get("<|endoftext|>"), self.tokenizer.eos_token_id]
        ends = [token for token in listed + known if token is not None]
        size = self.model.config.vocab_size
        if wrong := [token for token in ends if not isinstance(token, int) or not 0 <= token < size]:
            raise ModelError(f"{file}: eos_token_id {str(wrong[0])[:50]} is no token of the model")
        if not ends:
            raise ModelError(f"{self.args.load_from}: neither its tokenizer nor generation_config.json says "
                             "which token ends an answer")
        return sorted(set(ends))

    def switch(self, what: str | dict[str, float] | None):
        """Puts an adapter, or several with their weights, in the place of what is on (None: none).

        Returns what report_lora does. Raises ModelError, and leaves on what was on, where one does not fit.
        """
        from model.adapters import report_line
        from model.lora import report_lora

        places = {name: self.find(name) for name in (what if isinstance(what, dict) else [what]) if name}
        new = [path for path in places.values() if str(path) not in self.adapters.adapters]
        for path in new:
            self.adapters.load(path, name=str(path))
        if isinstance(what, dict):
            self.adapters.use({str(places[name]): weight for name, weight in what.items()})
            self.adapter = " + ".join(f"{weight:g} {places[name]}" for name, weight in what.items())
        else:
            self.adapters.use(str(places[what]) if what else None)
            self.adapter = places[what] if what else None
        report = report_lora(self.model) if what else None
        if new:
            print(report_line(self.model, self.adapter, report), file=sys.stderr)
        return report

    def find(self, name: str) -> Path:
        """Where that adapter lies: the name is a path, one of those given, beside the model, or in out/."""
        given = [path for path in map(Path, self.args.lora) if path.name == name]
        homes = self.homes() if Path(name).name == name else []  # "../x" is a path and no name in there
        places = [Path(name), *given, *(home / name for home in homes)]
        return next((p for p in places if p.is_file() or (p / "adapter_config.json").is_file()), Path(name))

    def homes(self) -> list[Path]:
        return [self.args.load_from.resolve().parent, ROOT / "out"]

    def names(self) -> list[str]:
        """The adapters that /lora NAME finds: those given, and the folders beside the model and in out/."""
        found = [path.parent for home in self.homes() for path in sorted(home.glob("*/adapter_config.json"))]
        return list(dict.fromkeys(path.name for path in [*map(Path, self.args.lora), *found]))

    def encode(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """The token ids after which the answer begins."""
        from dataset.chat import encode_chat, encode_text

        if not self.plain:
            return encode_chat(self.tokenizer, messages, tools, add_generation_prompt=True)[0]
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ids = bos + encode_text(self.tokenizer, "\n".join(message["content"] for message in messages))
        return ids or self.stop[:1]  # nothing to continue: any text may follow the end of another

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def generate(self, prompts: list[list[int]], max_new_tokens: int, seed: int | None = None):
        """Iterator of the next token of every prompt (B,). Raises ModelError where a prompt is too long."""
        import torch

        from model.generate import generate
        from model.transformer import ModelError

        longest, limit = max(map(len, prompts)), self.model.config.max_position_embeddings
        if longest >= limit:
            raise ModelError(f"a prompt of {longest} tokens: the model has room for {limit}, answer included")
        rows = torch.tensor([[self.stop[0]] * (longest - len(p)) + p for p in prompts])  # (B, T), padded left
        lengths = torch.tensor([len(p) for p in prompts])
        args = self.args
        return generate(self.model, rows.to(self.device), min(max_new_tokens, limit - longest),
                        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=seed,
                        repetition_penalty=args.repetition_penalty, eos_token_id=self.stop,
                        prompt_lengths=lengths.to(self.device) if lengths.min() < longest else None)

    def stream(self, ids: list[int], seed: int | None = None):
        """Iterator of (text, tokens so far). Text lags behind: 猫 is three bytes and may be two tokens."""
        new, start, shown = [], 0, 0
        for token in self.generate([ids], self.args.max_new_tokens, seed):
            if token.item() in self.stop:
                break
            new.append(token.item())
            # Decoded from one piece back, as some tokenizers drop the space at the start of what they decode.
            before, now = self.decode(new[start:shown]), self.decode(new[start:])
            if not now.endswith("\ufffd"):  # half a character waits for its other half
                yield now[len(before):], len(new)
                start, shown = shown, len(new)
        if shown < len(new):
            yield self.decode(new[start:])[len(self.decode(new[start:shown])):], len(new)

    def say(self, ids: list[int], seed: int | None = None) -> str:
        """Prints an answer as it comes, its speed on stderr. In a chat Ctrl-C ends only the answer."""
        if len(ids) > self.context:
            print(f"(a prompt of {len(ids)} tokens; the model was trained to see {self.context})",
                  file=sys.stderr)
        began, text, tokens = time.perf_counter(), "", 0
        try:
            for piece, tokens in self.stream(ids, seed):  # noqa: B007 (the last count is printed below)
                text += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if self.args.prompt is not None or self.args.prompts:
                raise
            print(" ...", end="")
        print(flush=True)
        dim, normal = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
        speed = tokens / max(1e-9, time.perf_counter() - began)
        print(f"{dim}{tokens} tokens, {speed:.0f} tokens/s{normal}", file=sys.stderr, flush=True)
        return text


# ---------------------------------------------------------------- the conversation


def chat(speaker: Speaker, messages: list[dict]) -> None:
    """Reads lines until /quit or the end of stdin, from a terminal or a pipe."""
    from dataset.jsonl import DataError
    from model.transformer import ModelError

    try:
        import readline  # noqa: F401  (arrow keys at the prompt; Windows has them without)
    except ImportError:
        pass
    args, turn = speaker.args, 0
    kind = "a base model: it continues what you write" if speaker.plain else "/help lists the commands"
    print(f"{args.load_from}, {speaker.num_parameters:,} parameters, {kind}", file=sys.stderr)
    if args.lora:
        print(f"adapters {', '.join(args.lora)}; {args.lora[0]} is on", file=sys.stderr)
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                messages = obey(speaker, line, messages)
            elif line:
                asked = fit(speaker, [*messages, {"role": "user", "content": line}])
                turn += 1
                answer = speaker.say(speaker.encode(asked), None if args.seed is None else args.seed + turn)
                messages = [*asked, {"role": "assistant", "content": answer}]
        except (DataError, ModelError) as error:
            print(f"error: {error}", file=sys.stderr)


def fit(speaker: Speaker, messages: list[dict]) -> list[dict]:
    """Forgets the oldest exchanges until an answer fits behind the rest; a base model, all but the last."""
    if speaker.plain:
        return messages[-1:]
    room = speaker.context - min(speaker.args.max_new_tokens, speaker.context // 4)
    system, turns = split_system(messages)
    kept = turns
    while len(kept) > 1 and len(speaker.encode(system + kept)) > room:
        kept = kept[2:]  # a question and its answer
    if len(kept) < len(turns):
        print(f"(longer than the {speaker.context} tokens the model was trained to see: the oldest "
              f"{(len(turns) - len(kept)) // 2} of the answers, with their questions, are forgotten)",
              file=sys.stderr)
    return system + kept


def split_system(messages: list[dict]) -> tuple[list[dict], list[dict]]:
    n = int(bool(messages) and messages[0]["role"] == "system")
    return messages[:n], messages[n:]


def obey(speaker: Speaker, line: str, messages: list[dict]) -> list[dict]:
    """Carries out a /command; returns the conversation as it is then. Raises ModelError for a bad adapter."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/help":
        print(COMMANDS)
    elif name == "/reset":
        print("(the conversation is forgotten)")
        return split_system(messages)[0]
    elif name == "/system" and not speaker.plain:
        print(f"(system message: {value or 'none'}; the conversation is forgotten)")
        return [{"role": "system", "content": value}] if value else []
    elif name == "/lora" and value:
        is_name = value == "none" or speaker.find(value).exists()
        found = speaker.switch(None if value == "none" else value if is_name else parse_mix(value))
        print(f"({speaker.adapter}: {found.matched} layers adapted)" if found else "(no adapter)")
    elif name == "/lora":
        print(f"(on: {speaker.adapter or 'none'}; loaded: {', '.join(speaker.adapters.adapters) or 'none'}; "
              f"there is: {', '.join(speaker.names()) or 'none'})")
    elif name == "/temperature":
        try:
            number = float(value)
            if not is_temperature(number):
                raise ValueError
            speaker.args.temperature = number
            print(f"(temperature {number:g})")
        except ValueError:
            print(f"/temperature takes 0, or a number from 0.001 to 1000, not {value!r}")
    elif name == "/system":
        print("(a base model has no system message)")
    else:
        print(f"unknown command {name}; /help lists the commands")
    return messages


def parse_mix(value: str) -> dict[str, float] | str:
    """"a:0.7 b:0.3" -> {"a": 0.7, "b": 0.3}; "a" -> "a". Raises ModelError for what is neither."""
    from model.transformer import ModelError

    if ":" not in value:
        return value
    mix = {}
    for part in value.split():
        name, _, weight = part.rpartition(":")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not name or not abs(number) <= 100:  # nan is not <= 100
            raise ModelError(f"/lora {value}: {part!r} is no NAME:WEIGHT with a number from -100 to 100")
        if name in mix:
            raise ModelError(f"/lora {value}: {name} is there twice")
        mix[name] = number
    return mix


def read_if_there(path: Path) -> dict:
    """The object in a JSON file that a model may have. Raises ModelError where it is damaged."""
    from model.files import read_json

    return read_json(path) if path.exists() else {}


def main(args: argparse.Namespace) -> None:
    from model.transformer import ModelError

    if args.json:  # before the work, that it can't be lost for this
        args.json.parent.mkdir(parents=True, exist_ok=True)
        if args.json.is_dir():
            raise UsageError(f"--json {args.json} is a folder: name a file")
    speaker = Speaker(args)
    if args.system is not None and speaker.plain:
        raise ModelError(f"--system: {args.load_from} is a base model, which knows no conversation")
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.data_path:
        from scoring import score

        result = {"model": str(args.load_from), "lora": args.lora, **score(speaker, args.data_path)}
        if args.json:
            part = args.json.with_name(args.json.name + ".part")
            with part.open("w", encoding="utf-8", newline="\n") as file:
                json.dump(result, file, ensure_ascii=False, indent=1)
            os.replace(part, args.json)
    elif args.prompts:
        for prompt in PROMPTS:
            print(f"\n> {prompt}")
            speaker.say(speaker.encode([*system, {"role": "user", "content": prompt}]), args.seed)
    elif args.prompt is not None:
        speaker.say(speaker.encode([*system, {"role": "user", "content": args.prompt}]), args.seed)
    else:
        chat(speaker, system)


if __name__ == "__main__":
    arguments = parse_args()
    for pipe in (sys.stdin, sys.stdout, sys.stderr):
        pipe.reconfigure(encoding="utf-8", errors="replace")  # Windows; half characters
    run_script(main, arguments)
