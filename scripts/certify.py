"""Whether a model is the same everywhere: here, in transformers, as a GGUF file, behind a server.

    python scripts/certify.py out/full_sft                                # transformers reads the same
    python scripts/certify.py out/full_sft --gguf out/full_sft/full_sft-Q8_0.gguf
    python scripts/certify.py out/full_sft --lora out/my_lora --gguf merged.gguf adapter.gguf
    python scripts/certify.py out/full_sft --url http://127.0.0.1:8000 --data_path my_chats.jsonl

The same prompts go through all of them: token ids, logits, greedy answers, and the loss on a file, side by
side. A GGUF file is run by llama.cpp where the package llama-cpp-python is installed, and else by our own
reader, and its tensors, shape, tokens, end tokens and chat template are compared one by one. How far numbers
may differ depends on their type. The exit code is 1 when anything is off, and the lines below the table name
what. docs/export.md has the limits.
"""

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, add_rope_scaling, count, run_script
from common.errors import ModelError, RunError
from common.files import json_text, one_line, write_whole

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
COLUMNS = ("ids", "logits", "greedy", "loss", "rest")

# --- one way to run it --------------------------------------------------------------------------------------


def merged_row(args, reference):
    from inference.certificate import Row, compare_numbers, forward_of

    row = Row("ours, adapter merged")
    compare_numbers(row, forward_of(merged_model(args, reference)), "F32", reference)
    return row


def merged_model(args, reference):
    """A copy of the model with the adapter in its weights."""
    import copy

    import torch

    from model.lora import merge_lora

    model = copy.deepcopy(reference.model)
    if model.config.tie_word_embeddings and hasattr(model.lm_head, "lora"):  # head and embedding part here
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    if args.lora:
        merge_lora(model)
    return model


def transformers_row(args, reference):
    """transformers reads the folder, and PEFT the adapter."""
    from inference.certificate import Row, compare_numbers, compare_tokens, encoder_of, forward_of

    row = Row("transformers" + (" and PEFT" if args.lora else ""))
    if not args.model.is_dir():
        row.skipped = "it reads folders"
    elif args.lora and importlib.util.find_spec("peft") is None:
        row.skipped = "PEFT is not installed"
    elif len(args.lora) > 1 or args.weights not in ([], [1.0]) or any(map(Path.is_file, args.lora)):
        row.skipped = "one adapter, a folder of weight 1, can be compared"
    if row.skipped:
        return row
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from model.config_file import config_to_dict

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(str(args.model), local_files_only=True, trust_remote_code=False)
    if args.rope_scaling:
        config.rope_parameters = config_to_dict(reference.model.config)["rope_parameters"]
    model = AutoModelForCausalLM.from_pretrained(str(args.model), config=config, dtype=torch.float32,
                                                 local_files_only=True, trust_remote_code=False)
    if args.lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(args.lora[0]), local_files_only=True,
                                          trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(str(args.model), local_files_only=True, trust_remote_code=False)
    compare_tokens(row, encoder_of(tokenizer), reference, tokenizer)
    # bitsandbytes computes with weights of 4 bits in bfloat16.
    kind = "BF16" if getattr(model.config, "quantization_config", None) else "F32"
    compare_numbers(row, forward_of(model.eval()), kind, reference)
    return row


# --- a GGUF file --------------------------------------------------------------------------------------------


def gguf_row(args, path: Path, reference):
    from inference.certificate import LlamaCpp, Row, compare_numbers, compare_tokens, encoder_of, forward_of
    from model.gguf_file import read_gguf
    from model.gguf_tokenizer import read_tokenizer
    from model.weights import load_model

    has_llama = importlib.util.find_spec("llama_cpp") is not None
    fields, tensors = read_gguf(path)
    row = Row(f"{path.name} in {'llama.cpp' if has_llama else 'our reader'}")
    if fields.get("general.type") == "adapter":
        return adapter_row(args, row, path, reference, has_llama)
    kind = kind_of(row, fields, tensors)
    model = load_model(path)
    compare_config(row, model.config, reference.model.config)
    if not row.off:
        compare_tensors(row, model, merged_model(args, reference), tensors)
    ends = model.generation_config["eos_token_id"]
    if missing := [end for end in reference.listed_ends if end not in ends]:
        names = ", ".join(reference.tokenizer.convert_ids_to_tokens(missing))
        row.check("rest", "ends", f"missing end token: {names}; the file has {ends}")
    if surplus := [end for end in ends if end not in reference.ends]:
        row.check("rest", "ends", f"another end token: {surplus}; an answer ends with {reference.ends} alone")
    tokenizer = read_tokenizer(path)
    if (theirs := tokenizer.get_vocab()) != (ours := reference.tokenizer.get_vocab()):
        token = min(ours.items() ^ theirs.items(), key=lambda item: item[1])
        row.check("rest", "vocabulary", f"other tokens: of {len(ours)} and {len(theirs)}, {token} is in one "
                  "vocabulary and not in the other")
    if has_llama:
        llama = LlamaCpp(path, reference)
        encode, forward = llama.encode, llama.forward
    else:
        encode, forward = encoder_of(tokenizer), forward_of(model)
    if not tokenizer.chat_template and reference.talks:
        row.check("rest", "template", "another chat template: the file has none")
    compare_tokens(row, encode, reference, tokenizer if tokenizer.chat_template else None)
    compare_numbers(row, forward, kind, reference)
    row.check("rest", f"{len(tensors)} tensors, {kind}")
    return row


def adapter_row(args, row, path: Path, reference, has_llama: bool):
    """An adapter alone, over our base: in llama.cpp over a GGUF file of it."""
    from inference.certificate import COARSE, LIMITS, LlamaCpp, compare_numbers, forward_of
    from model.gguf import write_model
    from model.gguf_file import read_gguf
    from model.lora import adapted_layers, load_lora
    from model.quantize import dequantize_model
    from model.weights import load_model

    kind = coarsest(read_gguf(path)[1])
    base = dequantize_model(load_model(args.model, rope_scaling=args.rope_scaling))
    if has_llama:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "base.gguf"
            write_model(base, reference.tokenizer, file, "F32", "base", reference.ends)
            compare_numbers(row, LlamaCpp(file, reference, path).forward, kind, reference)
    load_lora(base, path)
    if not has_llama:
        compare_numbers(row, forward_of(base), kind, reference)
    ours = {name: update_of(layer) for name, layer in adapted_layers(reference.model, required=False).items()}
    theirs = {name: update_of(layer) for name, layer in adapted_layers(base).items()}
    if ours.keys() != theirs.keys():
        row.check("rest", "layers", f"other layers: {min(ours.keys() ^ theirs.keys())} is in one alone")
        return row
    compare_scale(row, [(ours[name], theirs[name]) for name in ours], kind)
    wrong = {}
    for name, update in ours.items():
        wrong |= compare_matrix(name, theirs[name], update, 2 * LIMITS.get(kind, COARSE)[2])
    name_wrong(row, wrong)
    row.check("rest", f"{len(ours)} layers, {kind}")
    return row


def update_of(layer):
    b, a = layer.lora.factors()
    return (layer.lora.scaling * b @ a).detach()


def kind_of(row, fields: dict, tensors: dict) -> str:
    """The type that a file says it is of. Most of its matrices must have it."""
    from model.gguf import FILE_TYPES

    kinds = [tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1]
    most = max(sorted(set(kinds)), key=kinds.count)
    said = {number: name for name, number in FILE_TYPES.items()}.get(fields.get("general.file_type"))
    if said and said != most:
        row.check("rest", "type", f"another type: the file says {said}, and most of its matrices are {most}")
    return said or most


def compare_config(row, theirs, ours) -> None:
    """Names each setting that differs, of those that change what a model computes."""
    from model.config import rope_frequencies

    (turn, scale), (our_turn, our_scale) = (rope_frequencies(config, "cpu") for config in (theirs, ours))
    same_rope = turn.shape == our_turn.shape and (turn * scale).allclose(our_turn * our_scale, rtol=1e-5)
    ignored = {"initializer_range", "max_position_embeddings", "tie_word_embeddings",  # tensors tell the last
               "router_aux_loss_coef", "router_z_loss_coef"}
    length = min(ours.max_position_embeddings, ours.sliding_window or math.inf)  # as docs/export.md says
    if theirs.max_position_embeddings not in (length, ours.max_position_embeddings):
        row.check("rest", "context", f"another context length: {theirs.max_position_embeddings} and not "
                  f"{length}")
    for name, value in asdict(ours).items():
        other = getattr(theirs, name)
        # A file has 32 bits for a number, and may spell out a factor that we compute.
        is_same = same_rope if name == "rope_scaling" and theirs.rope_theta == ours.rope_theta else \
            math.isclose(value, other, rel_tol=1e-6) if isinstance(value, float) else value == other
        if name not in ignored and not is_same:
            row.check("rest", name, f"another {name}: {other} and not {value}")


def compare_tensors(row, model, merged, tensors: dict) -> None:
    """The numbers of a file beside ours, tensor by tensor and row by row."""
    from inference.certificate import COARSE, LIMITS
    from model.gguf import gguf_name
    from model.lora import adapted_layers

    theirs, ours = model.state_dict(), dict(merged.named_parameters(remove_duplicate=False))
    adapted = adapted_layers(merged, required=False)
    compare_scale(row, [(layer.weight.detach() - layer.lora.original, theirs[f"{name}.weight"]
                         - layer.lora.original) for name, layer in adapted.items()], coarsest(tensors))
    wrong = {}
    for name in theirs:
        stored = tensors.get(gguf_name(name)) or tensors["token_embd.weight"]
        limit = LIMITS.get(stored.kind, COARSE)[2]
        wrong |= compare_matrix(name, theirs[name], ours[name].detach(), limit, stored.kind)
    name_wrong(row, wrong)


def limit_of_rounding(ours, kind: str, limit: float) -> float:
    """How far a whole tensor may be off: by a quarter more than storing it in this type moves it. It is
    `limit` where the package gguf cannot write the type."""
    from model.gguf_file import package

    gguf = package()
    stored = gguf.GGMLQuantizationType[kind]
    try:
        rounded = gguf.quants.dequantize(gguf.quants.quantize(ours.numpy(), stored), stored)
    except NotImplementedError:
        return limit
    size = float((ours.numpy() ** 2).sum()) ** 0.5
    moved = float(((rounded.reshape(ours.shape) - ours.numpy()) ** 2).sum()) ** 0.5
    return min(limit, max(1e-6, 1.25 * moved / max(size, 1e-30)))


def coarsest(tensors: dict) -> str:
    from inference.certificate import COARSE, LIMITS

    return max({tensor.kind for tensor in tensors.values()}, key=lambda kind: LIMITS.get(kind, COARSE))


def compare_scale(row, updates: list[tuple], kind: str) -> None:
    """updates: (ours, theirs) of each adapted layer. Their size shows whether alpha is the same."""
    size = sum(ours.square().sum().item() for ours, _ in updates)
    if size:
        scale = sum((ours * theirs).sum().item() for ours, theirs in updates) / size
        if abs(scale - 1) > (0.02 if kind in ("F32", "F16", "BF16", "Q8_0") else 0.1):
            row.check("rest", "alpha", "wrong alpha, or another adapter: what the adapter adds is "
                      f"{scale:.3g} times as large as it should be")


def compare_matrix(name: str, theirs, ours, limit: float, kind: str | None = None) -> dict[str, str]:
    """{name: what is wrong} with a tensor or the update of a layer; empty where nothing is.

    kind: the type in which the numbers are stored, where the matrix itself is. Its rounding sets a limit to
    the whole tensor, which is narrower than `limit`.
    """
    from inference.certificate import ROW

    if theirs.shape != ours.shape:
        return {name: f"is {list(theirs.shape)}, not {list(ours.shape)}"}
    theirs, ours = theirs.reshape(-1, theirs.shape[-1]), ours.reshape(-1, ours.shape[-1])
    sizes = ours.norm(dim=1)
    error = (theirs - ours).norm(dim=1) / sizes.clamp(min=0.05 * sizes.mean().item() + 1e-30)
    rows = (error > ROW * limit).nonzero().flatten().tolist()
    whole = ((theirs - ours).norm() / ours.norm().clamp(min=1e-30)).item()
    if not rows and whole <= (limit_of_rounding(ours, kind, limit) if kind else limit):
        return {}
    where = f" in rows {', '.join(map(str, rows[:4]))}" if 0 < len(rows) < len(ours) else ""
    where += f" and {len(rows) - 4} more" if where and len(rows) > 4 else ""
    return {name: f"differs{where}, by {whole:.2%} of its size"}


def name_wrong(row, wrong: dict[str, str]) -> None:
    if wrong:
        shown = [f"{name} {what}" for name, what in wrong.items()][:3]
        shown += [f"and {len(wrong) - 3} more"] if len(wrong) > 3 else []
        row.check("rest", f"{len(wrong)} tensors differ", f"other numbers: {'; '.join(shown)}")


# --- a server -----------------------------------------------------------------------------------------------


class Server:
    def __init__(self, args):
        self.url, self.key = args.url.rstrip("/").removesuffix("/v1"), args.api_key
        wanted = (args.lora[0] if args.lora else args.model).resolve()
        names = [model["id"] for model in self.call("/v1/models")["data"]]
        found = [name for name in names
                 if name in ([args.served] if args.served else [wanted.name, wanted.stem])]
        if not found and (len(names) > 1 or args.served):
            raise ModelError(f"it serves {', '.join(names)}: choose with --served")
        self.name = (found or names)[0]

    def call(self, path: str, body: dict | None = None) -> dict:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else json.dumps({"model": self.name, "temperature": 0} | body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = one_line(error.read().decode("utf-8", "replace"))
            raise ModelError(f"{path}: {error.code} {said}") from None

    def logprobs(self, prompt: str | list[int]) -> list[float]:
        """log p of each token of a prompt but the first, which has none, and of one token after it."""
        body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1}
        if not (found := self.call("/v1/completions", body)["choices"][0].get("logprobs")):
            raise ModelError("/v1/completions gives no log-probabilities of a prompt (echo)")
        return found["token_logprobs"][1:]


def server_row(args, reference):
    import torch

    from inference.certificate import LIMITS, TEXTS, Row, first_difference

    server = Server(args)
    row = Row(f"{args.url}, {server.name}")
    limit, loss_limit, _ = LIMITS[args.url_type]
    decode, equal, ties, asked, differences = reference.tokenizer.decode, 0, 0, 0, []
    other_tokens, other_answers, other_prompts = [], [], []
    texts = [text for text in TEXTS if "<" not in text]  # a server may protect control tokens in a text
    for prompt in [*texts, *reference.talks]:
        place = TEXTS.index(prompt) if isinstance(prompt, str) else len(TEXTS) + reference.talks.index(prompt)
        ids, answer, logits = reference.prompts[place], reference.answers[place], reference.logits[place]
        theirs = server.logprobs(prompt if isinstance(prompt, str) else ids)[:-1]
        ours = logits[: len(ids) - 1].log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
        if len(theirs) != len(ours):
            other_tokens.append(f"{prompt!r} has {len(theirs) + 1} and not {len(ids)}")
            continue
        differences += [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
        expected = decode(answer, skip_special_tokens=True)
        if any(mark in decode(answer) for mark in ("<think>", "<tool_call>")):
            continue  # these parts of an answer have fields of their own
        asked += 1
        body = {"max_tokens": args.max_new_tokens}
        if isinstance(prompt, str):
            said = server.call("/v1/completions", body | {"prompt": prompt})["choices"][0]["text"]
        else:
            whole = server.call("/v1/chat/completions", body | {"messages": prompt})
            said = whole["choices"][0]["message"]["content"] or ""
            number = (whole.get("usage") or {}).get("prompt_tokens", len(ids))
            if number != len(ids):
                other_prompts.append(f"{number} tokens and not {len(ids)} for {prompt!r}")
        if said.strip() == expected.strip():
            equal += 1
            continue
        picked = reference.ids_of(said) + reference.ends[:1]
        leaves = first_difference(answer, picked)
        gap = float("inf")
        if leaves is not None:
            here = logits[len(ids) - 1 + leaves]
            gap = (here.max() - here[picked[leaves]]).item()
        ties += gap <= 2 * limit
        if gap > 2 * limit:
            other_answers.append(f"{said!r} and not {expected!r} after {prompt!r}")
    if other_prompts:
        row.check("rest", "template", f"another chat template: {other_prompts[0]}")
    farthest = torch.tensor(differences or [0.0]).max().item()  # NaN if one is NaN, unlike Python's max
    number = len(texts) + len(reference.talks)
    row.check_tokens(number - len(other_tokens), number, other_tokens)
    row.check_greedy(equal, asked, ties, other_answers)
    row.check("logits", f"{farthest:.1e}", None if farthest <= limit else
              f"log-probabilities differ by up to {farthest:.3g}; {args.url_type} may differ by {limit:g}")
    losses = []
    for ids, labels in reference.samples:
        theirs = server.logprobs(ids)[: len(ids) - 1]
        losses += [-value for value, label in zip(theirs, labels[1:], strict=True) if label != -100]
    if losses:
        difference = torch.tensor(losses).double().mean().item() - reference.loss
        row.check("loss", f"{difference:+.1e}", None if abs(difference) <= loss_limit else
                  f"the loss differs by {difference:+.3g}; {args.url_type} may differ by {loss_limit:g}")
    return row


# --- the certificate ----------------------------------------------------------------------------------------


def main(args):
    import torch

    from inference.certificate import LIMITS, Reference, Row

    reference = Reference(args.model, dict(zip(args.lora, args.weights, strict=True)), args.data_path,
                          args.limit, args.max_new_tokens, args.rope_scaling)
    ways = [("transformers", lambda: transformers_row(args, reference))]
    ways += [(f"{path}", lambda path=path: gguf_row(args, path, reference)) for path in args.gguf]
    if args.lora:
        ways.insert(0, ("ours, adapter merged", lambda: merged_row(args, reference)))
    if args.url:
        ways.append((args.url, lambda: server_row(args, reference)))
    rows = []
    for name, way in ways:
        try:
            with torch.no_grad():
                rows.append(way())
        except (ModelError, OSError, ValueError, KeyError) as error:
            rows.append(Row(name, off=[f"can't be read or asked: {one_line(error)}"]))
    say(args, reference, rows)
    passed = not any(row.off for row in rows)
    if args.json:
        write_whole(args.json, json_text({
            "model": str(args.model), "lora": [str(path) for path in args.lora], "passed": passed,
            "prompts": len(reference.prompts), "loss": reference.loss, "limits": LIMITS,
            "ways": [asdict(row) for row in rows]}))
    if not passed:
        raise RunError(f"not the same: {', '.join(row.name for row in rows if row.off)}")


def say(args, reference, rows: list) -> None:
    """The table, and below it what is wrong."""
    what = str(args.model) + (f" with {', '.join(map(str, args.lora))}" if args.lora else "")
    loss = f", loss {reference.loss:.4f} on {len(reference.samples)} records" if reference.samples else ""
    print(f"{what}: {len(reference.prompts)} prompts{loss}; beside our model in float32:")
    lines = [(row.name, *(row.cells.get(column, "-") for column in COLUMNS)) for row in rows]
    lines.insert(0, ("", *COLUMNS))
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for row, cells in zip([None, *rows], lines, strict=True):
        end = f"  not compared: {row.skipped}" if row and row.skipped else "  OFF" if row and row.off else ""
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() + end)
    for row in rows:
        for problem in row.off:
            print(f"off: {row.name}: {problem}")
    sys.stdout.flush()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="DIR", help="the model: a folder, a .pth or a .gguf file")
    parser.add_argument("--lora", type=Path, nargs="+", default=[], metavar="DIR", help="adapter(s) on it")
    add_rope_scaling(parser.add_argument)
    parser.add_argument("--weights", type=float, nargs="+", metavar="W",
                        help="how much of each adapter; needed where there are several (default: 1)")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], metavar="FILE", help="GGUF files that "
                        "should be the same: models (with --lora: merged), or adapters")
    parser.add_argument("--url", metavar="URL", help="a server that speaks OpenAI's API")
    parser.add_argument("--served", metavar="NAME", help="the model's name there (default: its folder's)")
    parser.add_argument("--url_type", choices=TYPES, default="F32", help="what the server computes in")
    parser.add_argument("--api_key", metavar="KEY", help="of the server")
    parser.add_argument("--data_path", type=Path, nargs="+", default=[], metavar="FILE",
                        help="chats or texts, for the loss")
    parser.add_argument("--limit", type=count, default=32, metavar="N", help="records of each file")
    parser.add_argument("--max_new_tokens", type=count, default=24, metavar="N", help="of each answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the certificate here, too")
    args = parser.parse_args(argv)
    if args.weights is None:
        args.weights = [1.0] if len(args.lora) == 1 else []
    if len(args.weights) != len(args.lora):
        parser.error(f"--weights: {len(args.lora)} adapters need as many weights, not {len(args.weights)}")
    if args.json and args.json.is_dir():
        parser.error(f"--json {args.json} is a folder: name a file")
    if args.json and args.json.suffix.lower() != ".json":  # so that it can replace no weights
        parser.error(f"--json {args.json} must end in .json")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
