"""What we write as GGUF, beside what llama.cpp's own converter writes and what llama.cpp computes.

    pip install -r requirements-export.txt llama-cpp-python==0.3.36 sentencepiece
    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36     # unpack it: its vendor/llama.cpp
    python benchmarks/export.py --llama_cpp llama_cpp_python-0.3.36/vendor/llama.cpp --json export.json

Four questions: are the tensors the same bytes as the converter's (three architectures, an adapter, and the
model itself)? Are the logits the same in llama.cpp? Are the greedy answers to the chats of a file, and by how
little was another token likelier where they are not? Are the tokens of 2,000 texts the same, hostile ones
among them? Keys and values are float32 in llama.cpp here; its default of float16 is a row of its own.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import markdown
from common.cli import ROOT, Parser, count, run_script
from common.errors import UsageError
from common.files import json_text, write_whole

FAMILIES = {"llama": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True},
            "llama, untied, rope llama3": {"tie_word_embeddings": False, "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}}}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
CONVERTED = ("F32", "F16", "BF16", "Q8_0")  # what the converter writes, too
# The converter knows a tokenizer by a hash of its tokens, and it does not know ours. So it is told the rule.
CONVERT = """
import runpy, sys
folder, script = sys.argv[1:3]
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""
PIECES = ["<think>", "</think>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\n", "<tool_call>", "<|",
          "|>", "\u0301", "\u200d", "\ufeff", "\u00a0", "\u3000", "\r", "\n", "\t", "\x00", "\x1b", "\x7f",
          "'s", "'LL", "'ſ", "İ", "ß", "١٢٣", "一二", "½", "²", "😀", "👩‍👩‍👧", "\U0001f1e9\U0001f1ea",
          "e\u0301", "한국어", "ไทย", "\u202e", "\ue000", "\U0010ffff", "!!!", "   ", "a" * 200,
          "123456789", "_x", "ǅ", "\u2028", "\x85"]


# --- bytes --------------------------------------------------------------------------------------------------


def converted(args, script: str, flags: list, out: Path) -> Path:
    words = [sys.executable, "-c", CONVERT, args.llama_cpp, args.llama_cpp / script, *flags, "--outfile", out]
    ended = subprocess.run(list(map(str, words)), capture_output=True, encoding="utf-8")
    if ended.returncode:
        raise UsageError(f"llama.cpp's converter ended with: {ended.stderr[-300:]}")
    return out


def same_bytes(ours: Path, theirs: Path) -> str:
    """How many tensors of two files have the same type, shape and bytes."""
    from model.gguf_file import read_gguf

    mine, others = read_gguf(ours)[1], read_gguf(theirs)[1]
    equal = [name for name in mine if name in others and mine[name].kind == others[name].kind
             and mine[name].shape == others[name].shape
             and bytes(mine[name].stored) == bytes(others[name].stored)]
    different = sorted((mine.keys() | others.keys()) - set(equal))
    return f"{len(equal)}/{len(mine.keys() | others.keys())}" + (f" ({different[0]})" if different else "")


def compare_bytes(args, folder: Path) -> list[dict]:
    import torch

    from model.gguf import write_adapter, write_model
    from model.lora import apply_lora, lora_parameters, read_lora, save_lora
    from model.transformer import CausalLM, ModelConfig
    from model.weights import end_tokens, load_model, load_tokenizer, save_model

    tokenizer, models = load_tokenizer(ROOT / "model" / "tokenizer"), {str(args.model): args.model}
    for name, changes in FAMILIES.items():
        torch.manual_seed(0)
        model = CausalLM(ModelConfig(hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, intermediate_size=160, head_dim=32, **changes))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        models[name] = folder / name.replace(", ", "_").replace(" ", "_")
        save_model(model, models[name], tokenizer)
        apply_lora(model, rank=8, alpha=4)
        for parameter in lora_parameters(model):
            torch.nn.init.normal_(parameter, std=0.1)
        save_lora(model, models[name] / "lora")
    rows = []
    for name, path in models.items():
        row = {"model": name}
        model = load_model(path)
        for kind in CONVERTED:
            write_model(model, tokenizer, folder / "ours.gguf", kind, "x", end_tokens(model, tokenizer))
            theirs = converted(args, "convert_hf_to_gguf.py", [path, "--outtype", kind.lower()],
                               folder / "theirs.gguf")
            row[kind] = same_bytes(folder / "ours.gguf", theirs)
        for lora in [path / "lora"] if name in FAMILIES else args.lora:
            write_adapter(model, read_lora(model, lora), folder / "ours.gguf", "F32", "x")
            theirs = converted(args, "convert_lora_to_gguf.py", [lora, "--base", path, "--outtype", "f32"],
                               folder / "theirs.gguf")
            row["adapter" if name in FAMILIES else lora.name] = same_bytes(folder / "ours.gguf", theirs)
        rows.append(row)
    return rows


# --- logits and answers -------------------------------------------------------------------------------------


def prompts_of(args, tokenizer) -> list[list[int]]:
    """The chats of the file up to their last answers, evenly spread, as ids."""
    from dataset.chat import encode_chat
    from dataset.messages import to_messages
    from dataset.records import read_records

    chats = [to_messages(record)[0] for _, _, record in read_records([args.chats])]
    chats = [chat[:-1] for chat in chats if chat[-1]["role"] == "assistant"]
    chats = [chats[i * len(chats) // args.limit] for i in range(min(args.limit, len(chats)))]
    return [encode_chat(tokenizer, chat, add_generation_prompt=True)[0] for chat in chats]


def llama(path: Path, lora: Path | None = None, half_cache=False):
    import llama_cpp

    cache = {} if half_cache else {"type_k": 0, "type_v": 0}
    return llama_cpp.Llama(str(path), n_ctx=1024, n_batch=1024, logits_all=True, verbose=False, n_threads=1,
                           n_threads_batch=1, lora_path=str(lora) if lora else None, **cache)


def answer(runtime, ids: list[int], ends: list[int], most: int) -> tuple[list[int], object]:
    """(the greedy answer, the logits of the prompt), decoded token by token."""
    import numpy

    runtime.reset()
    runtime.eval(ids)
    logits, said = numpy.array(runtime.scores[: len(ids)]), []
    last = logits[-1]
    while len(said) < most:
        said.append(int(last.argmax()))
        if said[-1] in ends:
            break
        runtime.eval(said[-1:])
        last = runtime.scores[len(ids) + len(said) - 1]
    return said, logits


def compare_answers(args, folder: Path) -> list[dict]:
    import torch

    from model.gguf import write_adapter, write_model
    from model.lora import load_lora, merge_lora, read_lora
    from model.weights import end_tokens, load_model, load_tokenizer

    tokenizer, rows = load_tokenizer(args.model), []
    prompts = prompts_of(args, tokenizer)
    for lora in [None, *args.lora]:
        base, model = load_model(args.model), load_model(args.model)
        ends = end_tokens(base, tokenizer)
        ways = [(kind, kind, False) for kind in (TYPES if lora is None else ("F32", "F16", "Q8_0"))]
        ways += [("F32, cache in float16", "F32", True)] if lora is None else [("adapter alone", None, False)]
        if lora is not None:
            load_lora(model, lora)
        expected = [ours(model, ids, ends, args.max_new_tokens) for ids in prompts]
        if lora is not None:
            write_model(base, tokenizer, folder / "base.gguf", "F32", "x", ends)
            write_adapter(base, read_lora(base, lora), folder / "adapter.gguf", "F32", "x")
            merge_lora(model)
            from model.adapters import remove_lora
            remove_lora(model, keep_merged=True)
        for name, kind, half_cache in ways:
            if kind is None:
                runtime = llama(folder / "base.gguf", folder / "adapter.gguf")
            else:
                write_model(model, tokenizer, folder / "x.gguf", kind, "x", ends)
                runtime = llama(folder / "x.gguf", half_cache=half_cache)
            farthest, equal, gaps = 0.0, 0, []
            for ids, (said, logits, gap_of) in zip(prompts, expected, strict=True):
                theirs, their_logits = answer(runtime, ids, ends, args.max_new_tokens)
                farthest = max(farthest, (torch.tensor(their_logits) - logits).abs().max().item())
                equal += theirs == said
                if theirs != said:
                    place = next(i for i, (a, b) in enumerate(zip(theirs, said, strict=False)) if a != b)
                    gaps.append(gap_of(place, theirs[place]))
            rows.append({"model": lora.name if lora else args.model.name, "in llama.cpp": name,
                         "logits": f"{farthest:.1e}", "answers": f"{equal}/{len(prompts)}",
                         "share": f"{equal / len(prompts):.1%}",
                         "largest gap of a first difference": f"{max(gaps):.2f}" if gaps else ""})
            print(rows[-1], flush=True)
            del runtime
    return rows


def ours(model, ids: list[int], ends: list[int], most: int) -> tuple:
    """(our greedy answer, logits of the prompt, function: place, token -> by how much ours was likelier)."""
    import torch

    from model.generate import generate

    said = [step.item() for step in generate(model, torch.tensor([ids]), max_new_tokens=most, temperature=0.0,
                                             eos_token_id=ends)]
    with torch.no_grad():
        logits = model(torch.tensor([ids + said])).logits[0]

    def gap(place: int, token: int) -> float:
        here = logits[len(ids) - 1 + place]
        return (here.max() - here[token]).item()

    return said, logits[: len(ids)].clone(), gap


# --- tokens -------------------------------------------------------------------------------------------------


def texts_of(args) -> list[str]:
    """Half of them real, from --texts, and half hostile: odd characters and control tokens in any order."""
    from dataset.records import read_records

    real, chance = [], random.Random(0)
    for path in args.texts:
        for _, _, record in read_records([path]):
            real += [value for value in record.values() if isinstance(value, str)]
            for turn in record.get("conversations", record.get("messages", [])):
                real += [value for value in turn.values() if isinstance(value, str)]
    real = chance.sample(real, min(len(real), args.num_texts // 2))
    hostile = []
    while len(real) + len(hostile) < args.num_texts:
        parts = chance.choices([*PIECES, *(real[:200] or ["word"])], k=chance.randint(1, 12))
        parts = [part[:60] if len(part) > 200 else part for part in parts]
        parts += [chr(code) for code in chance.choices(range(1, 0x11000), k=3) if not 0xd800 <= code < 0xe000]
        hostile.append("".join(chance.sample(parts, len(parts))))
    return real + hostile


def compare_tokens(args, folder: Path) -> dict:
    from model.gguf import write_model
    from model.weights import end_tokens, load_model, load_tokenizer

    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    write_model(model, tokenizer, folder / "x.gguf", "F32", "x", end_tokens(model, tokenizer))
    runtime, back, texts = llama(folder / "x.gguf"), load_tokenizer(folder / "x.gguf"), texts_of(args)
    expected = [tokenizer(text)["input_ids"] for text in texts]
    theirs = [runtime.tokenize(text.encode("utf-8"), add_bos=False, special=True) for text in texts]
    different = [text for text, a, b in zip(texts, expected, theirs, strict=True) if a != b]
    returned = sum(back(text)["input_ids"] == ids for text, ids in zip(texts, expected, strict=True))
    return {"texts": len(texts), "equal in llama.cpp": len(texts) - len(different),
            "equal in our reader": returned, "first that differs": ascii(different[:1])[:200]}


def main(args):
    if not (args.llama_cpp / "convert_hf_to_gguf.py").is_file():
        raise UsageError(f"--llama_cpp {args.llama_cpp}: there is no convert_hf_to_gguf.py in it")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            compare = {"tokens": compare_tokens, "bytes": compare_bytes, "answers": compare_answers}[name]
            found[name] = compare(args, Path(folder))
            print(f"\n{name}\n", flush=True)
            rows = found[name] if isinstance(found[name], list) else [found[name]]
            print(markdown(rows), flush=True)
    if args.json:
        write_whole(args.json, json_text(found))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    world = ROOT / "out" / "quickstart" / "world"
    parser = Parser(description=__doc__)
    parser.add_argument("--llama_cpp", type=Path, required=True, metavar="DIR", help="its source")
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "quickstart" / "full_sft", metavar="DIR")
    parser.add_argument("--lora", type=Path, nargs="*", default=[
        ROOT / "out" / "quickstart" / name for name in ("lora_identity", "lora_clinic")], metavar="DIR")
    parser.add_argument("--chats", type=Path, default=world / "sft_eval.jsonl", metavar="FILE")
    parser.add_argument("--limit", type=count, default=200, metavar="N", help="chats")
    parser.add_argument("--max_new_tokens", type=count, default=64, metavar="N", help="of an answer")
    parser.add_argument("--texts", type=Path, nargs="*", default=[world / "pretrain_eval.jsonl"],
                        metavar="FILE")
    parser.add_argument("--num_texts", type=count, default=2000, metavar="N")
    parser.add_argument("--only", nargs="+", choices=("tokens", "bytes", "answers"),
                        default=("tokens", "bytes", "answers"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
