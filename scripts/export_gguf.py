"""A model, or an adapter, as a GGUF file: for llama.cpp, ollama, LM Studio and what else reads that format.

    python scripts/export_gguf.py out/full_sft                            # out/full_sft/full_sft-Q8_0.gguf
    python scripts/export_gguf.py out/full_sft --type F16 Q4_0            # two files
    python scripts/export_gguf.py out/full_sft --lora out/my_lora             # with the adapter merged in
    python scripts/export_gguf.py out/full_sft --lora out/my_lora --adapter   # the adapter alone

Needs requirements-export.txt. Beside a model lies a Modelfile, with which `ollama create NAME -f FILE` takes
it. What was written is then compared with the model (scripts/certify.py); --no-certify leaves that out.
docs/export.md says what the format cannot express.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, add_rope_scaling, run_script
from common.errors import ModelError, RunError
from common.files import read_json_if_there, write_whole

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
# Words that stand in no template, so that its own text around them can be seen.
TALK = [{"role": role, "content": f"@{role}-{number}@"} for number, role in
        enumerate(("system", "user", "assistant", "user", "assistant", "user"))]


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    from dataset.chat import ensure_template
    from model.gguf import write_adapter, write_model
    from model.gguf_file import package
    from model.lora import read_lora
    from model.tokenizer_files import check_vocabulary, load_tokenizer
    from model.weights import end_tokens, load_model

    package()  # so that a missing package is known before anything is loaded
    model, tokenizer = load_model(args.model, rope_scaling=args.rope_scaling), load_tokenizer(args.model)
    check_vocabulary(tokenizer, model.config.vocab_size, args.model)
    written = []
    if args.adapter:
        loras = read_lora(model, args.lora[0])
        for kind in args.type:
            out = args.out or beside(args.lora[0]) / f"{name_of(args.lora[0])}-{kind}.gguf"
            check_out(args, out)
            write_adapter(model, loras, out, kind, name_of(args.lora[0]))
            written.append(out)
            print(f"wrote {out} ({out.stat().st_size:,} bytes), for llama.cpp's --lora")
        if model.config.rope_scaling:
            print("an adapter file can't name the scaling of rotary positions: export the base with it, too")
    else:
        make_plain(model, args)
        what = args.lora[0] if args.lora else args.model
        name = name_of(what)
        if args.lora:
            ensure_template(tokenizer)
        ends = end_tokens(model, tokenizer)
        say_what_is_lost(model, tokenizer)
        for kind in args.type:
            out = args.out or beside(what) / f"{name}{'-merged' if args.lora else ''}-{kind}.gguf"
            check_out(args, out)
            write_model(model, tokenizer, out, kind, name, ends)
            text = modelfile(args, model, tokenizer, out, ends)
            write_whole(out.with_suffix(".Modelfile"), text)
            written.append(out)
            print(f"wrote {out} ({out.stat().st_size:,} bytes), and a Modelfile for ollama")
    if args.certify:
        certify(args, written)


def name_of(path: Path) -> str:
    return path.stem if path.is_file() else path.resolve().name


def beside(path: Path) -> Path:
    return path.parent if path.is_file() else path


def check_out(args, out: Path) -> None:
    if out.resolve() in [path.resolve() for path in (args.model, *args.lora)]:
        raise ModelError(f"{out} is what is exported; name another file with --out")


def make_plain(model, args) -> None:
    """Dequantizes weights of 4 bits, and merges the adapters."""
    from model.adapters import Adapters, remove_lora
    from model.lora import merge_lora
    from model.quantize import NF4Linear, dequantize_model

    for path in args.lora:
        trained = read_json_if_there(path / "training.json").get("arguments")
        if isinstance(trained, dict) and trained.get("quantize") == "nf4":
            raise ModelError(f"{path} was trained over 4 bits: merge it first, with scripts/merge_lora.py")
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        dequantize_model(model)
        print(f"{args.model} holds weights in 4 bits (NF4), which GGUF has not: they are dequantized")
    if args.lora:
        adapters = Adapters(model)
        names = [adapters.load(path, str(path)) for path in args.lora]
        adapters.use(dict(zip(names, args.weights, strict=True)))  # the weighted sum, as one adapter
        merge_lora(model)
        remove_lora(model, keep_merged=True)


def say_what_is_lost(model, tokenizer) -> None:
    from model.gguf_tokenizer import missing_bytes

    window = model.config.sliding_window
    if window is not None:
        print(f"llama.cpp has no sliding window for this architecture: the file asks for at most {window:,} "
              "tokens, which is the window")
    if "NFC" in str(tokenizer.backend_tokenizer.normalizer):
        print("this tokenizer composes accents first (NFC), which llama.cpp does not: text in which they are "
              "separate characters gets other tokens there")
    if missing := missing_bytes(tokenizer):
        print(f"this tokenizer has no token for the bytes {', '.join(map(str, missing))}: llama.cpp leaves "
              f"them out, where {tokenizer.unk_token or 'nothing'} stands here")


# --- the Modelfile ------------------------------------------------------------------------------------------


def modelfile(args, model, tokenizer, out: Path, ends: list[int]) -> str:
    """What `ollama create` reads: the file, the chat template in Go's language, and when an answer ends.

    ollama guesses a template where it is told none, and repeats less than a model was trained to. So all of
    this is said.
    """
    own_name = out.with_suffix(".Modelfile").name
    lines = [f"# ollama create {out.stem.lower()} -f {own_name}", f"FROM ./{out.name}"]
    pieces = pieces_of_template(tokenizer)
    if not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')  # a base model continues text
    elif pieces is None:
        print("the chat template does not fit into a Modelfile: add a TEMPLATE to it, or ollama guesses one")
        lines.append("# Its chat template is more than words around each message: add a TEMPLATE here.")
    else:
        around, before_answer, system = pieces
        cases = [f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
                 for role, (before, after) in around.items()]
        lines.append(f'TEMPLATE """{{{{ range .Messages }}}}{"".join(cases)}{{{{ end }}}}{before_answer}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(end)}"' for end in ends]
    from model.rope_scaling import reach

    length = reach(args.model, model.config, args.rope_scaling)
    lines.append(f"PARAMETER num_ctx {min(length, model.config.sliding_window or length)}")
    sampling = model.generation_config or {}
    for key in ("temperature", "top_p", "top_k"):
        if isinstance(sampling.get(key), (int, float)) and sampling[key] > 0:
            lines.append(f"PARAMETER {key} {sampling[key]}")
    lines.append(f"PARAMETER repeat_penalty {sampling.get('repetition_penalty') or 1}")
    return "\n".join(lines) + "\n"


def pieces_of_template(tokenizer) -> tuple[dict, str, str] | None:
    """({role: (text before, text after)}, text before an answer, usual system message) of a chat template.

    None where the template is more than that, which is tried out on conversations.
    """
    def written(messages: list[dict], ask=False) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        start = tokenizer.bos_token or ""  # ollama writes it by itself where the file says so
        has_start = tokenizer.bos_token_id in tokenizer("a")["input_ids"]
        return text.removeprefix(start) if has_start else text

    try:
        whole = written(TALK)
        cut = re.split("@[a-z]+-[0-5]@", whole)
        alone = written(TALK[:1] + TALK[1:2])
        after_user = alone.partition(TALK[1]["content"])[2]
        if len(cut) != 7 or not cut[2].startswith(after_user):
            return None
        after_answer = written(TALK[:3]).partition(TALK[2]["content"])[2]
        before_user = cut[3].removeprefix(after_answer)
        around = {"system": (cut[0], cut[1].removesuffix(before_user)), "user": (before_user, after_user),
                  "assistant": (cut[2].removeprefix(after_user), after_answer)}
        before_answer = written(TALK[:2], ask=True).removeprefix(alone)
        first = written(TALK[1:2]).removesuffix(f"{before_user}{TALK[1]['content']}{after_user}")
        system = first.removeprefix(cut[0]).removesuffix(around["system"][1]) if first else ""
        usual = [{"role": "system", "content": system}] if system else []
        for messages in (TALK, TALK[:2], TALK[1:2], TALK[1:]):
            said = [*(usual if messages[0]["role"] != "system" else []), *messages]
            text = "".join(turn["content"].join(around[turn["role"]]) for turn in said)
            if text != written(messages) or text + before_answer != written(messages, ask=True):
                return None
    except Exception:  # a template may refuse a conversation, in its own words
        return None
    texts = [before_answer, system, *(text for pair in around.values() for text in pair)]
    return None if any("{{" in text or '"""' in text for text in texts) else (around, before_answer, system)


def certify(args, written: list[Path]) -> None:
    """Runs scripts/certify.py on what was written. Raises RunError where something is off."""
    command = [sys.executable, str(ROOT / "scripts" / "certify.py"), str(args.model), "--gguf",
               *map(str, written)]
    if args.lora:
        command += ["--lora", *map(str, args.lora), "--weights", *map(str, args.weights)]
    if args.rope_scaling:
        command += ["--rope_scaling", args.rope_scaling]
    sys.stdout.flush()
    if subprocess.run(command).returncode:
        raise RunError("written, but not certified, for the reasons above (--no-certify leaves this out)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="DIR", help="the model: a folder, a .pth or a .gguf file")
    parser.add_argument("--lora", type=Path, nargs="+", default=[], metavar="DIR",
                        help="adapter(s), which are merged in")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W",
                        help="how much of each adapter; needed where there are several (default: 1)")
    add_rope_scaling(parser.add_argument)
    parser.add_argument("--adapter", action="store_true", help="write the one adapter alone, and no model")
    parser.add_argument("--type", choices=TYPES, nargs="+", metavar="TYPE",
                        help=f"of the numbers: {', '.join(TYPES)}; several write several files "
                             "(default: Q8_0, for an adapter F32)")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="the file (default: in the folder of what is exported, named like it)")
    parser.add_argument("--no-certify", dest="certify", action="store_false",
                        help="do not compare what was written with the model")
    args = parser.parse_args(argv)
    args.type = list(dict.fromkeys(args.type or ["F32" if args.adapter else "Q8_0"]))
    if args.weights is None:
        args.weights = [1.0] if len(args.lora) == 1 else []
    if len(args.weights) != len(args.lora):
        parser.error(f"--weights: {len(args.lora)} adapters need as many weights, not {len(args.weights)}")
    if args.adapter and (len(args.lora) != 1 or args.weights != [1.0]):
        parser.error("--adapter writes one adapter: name it with --lora, without --weights")
    if args.out and len(args.type) > 1:
        parser.error("--out names one file: give one --type")
    if args.out and args.out.exists() and not args.out.is_file():
        parser.error(f"--out {args.out} is a folder, or no plain file: name a file")
    if args.out and args.out.suffix.lower() != ".gguf":  # so that it can replace no weights, and no Modelfile
        parser.error(f"--out {args.out} must end in .gguf")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
