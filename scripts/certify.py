"""Whether a model is the same everywhere: here, in transformers, as a GGUF file, behind a server.

    python scripts/certify.py out/full_sft                                     # transformers reads the same
    python scripts/certify.py out/full_sft --gguf out/full_sft/full_sft-Q8_0.gguf
    python scripts/certify.py out/full_sft --lora out/my_lora --gguf merged.gguf adapter.gguf
    python scripts/certify.py out/full_sft --url http://127.0.0.1:8000 --data_path my_chats.jsonl --json c.json

The same prompts go through all of them: token ids, logits, greedy answers, and the loss on a file, side by
side. A GGUF file is run by llama.cpp where the package llama-cpp-python is installed, and else by our own
reader, and its tensors, shape, tokens, end tokens and chat template are compared one by one. How far numbers
may differ depends on their type. The exit code is 1 when anything is off, and the lines below the table name
what. docs/export.md has the limits.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, count, run_script
from common.errors import ModelError, RunError
from common.files import json_text, one_line, write_whole

# Type of the numbers -> how far the largest logit, the loss (nats) and a tensor (share of its size) may be off.
LIMITS = {"F32": (1e-3, 1e-4, 1e-6), "F16": (0.1, 0.005, 1e-3), "BF16": (1.0, 0.03, 8e-3),
          "Q8_0": (2.0, 0.05, 0.02), "Q4_0": (8.0, 1.0, 0.2)}
COARSE = (8.0, 1.0, 0.3)  # of all other types
ROW = 3  # a row of a tensor may be off by so many times more than the whole tensor
TEXTS = ["Once upon a time there was a fox who lived by the river.", "What is 27 + 15? 3.14, 1000000",
         "从前有一只狐狸，住在河边。", "it's we'LL\t\ttabs  and\n\n\nlines \r\n", "e\u0301 é ½ 😀👍🏽 \u200b\u00a0|",
         "<think>a</think> <tool_call>{}</tool_call> <|im_start|>user\nhi<|im_end|>", "x", " "]
TALKS = [[{"role": "user", "content": "What sound does a frog make?"}],
         [{"role": "user", "content": "你是谁？"}],
         [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"},
          {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "What is 7 + 8?"}]]
COLUMNS = ("ids", "logits", "greedy", "loss", "rest")


@dataclass
class Row:
    """What is found of one way to run the model. cells: {column: text}. off: what is wrong, one line each."""

    name: str
    cells: dict = field(default_factory=dict)
    off: list = field(default_factory=list)
    skipped: str = ""

    def check(self, column: str, text: str, problem: str | None = None) -> None:
        self.cells[column] = f"{self.cells[column]}; {text}" if column in self.cells else text
        if problem:
            self.off.append(problem)


class Reference:
    """Our model, with the adapter beside it and not merged, and what it says to all prompts."""

    def __init__(self, args):
        import torch

        from model.adapters import Adapters
        from model.generate import generate
        from model.tokenizer_files import check_vocabulary, load_tokenizer
        from model.weights import end_tokens, load_model

        self.model, self.tokenizer = load_model(args.model), load_tokenizer(args.model)
        check_vocabulary(self.tokenizer, self.model.config.vocab_size, args.model)
        self.adapters = Adapters(self.model)
        if args.lora:
            names = [self.adapters.load(path, str(path)) for path in args.lora]
            self.adapters.use(dict(zip(names, args.weights, strict=True)))
        self.ends = end_tokens(self.model, self.tokenizer)
        self.talks = [talk for talk in TALKS if self.can_write(talk)] if self.tokenizer.chat_template else []
        self.prompts = [self.tokenizer(text)["input_ids"] for text in TEXTS]
        self.prompts += [self.ids_of(self.written(talk, self.tokenizer)) for talk in self.talks]
        self.prompts = [ids or self.ends[:1] for ids in self.prompts]
        self.answers = []
        for ids in self.prompts:
            steps = generate(self.model, torch.tensor([ids]), max_new_tokens=args.max_new_tokens,
                             temperature=0.0, eos_token_id=self.ends)
            self.answers.append([step.item() for step in steps])
        self.sequences = [ids + answer for ids, answer in zip(self.prompts, self.answers, strict=True)]
        self.samples = samples_of(args, self)
        with torch.no_grad():
            self.logits = [forward_of(self.model)(ids) for ids in self.sequences]
            self.loss = loss_of(forward_of(self.model), self.samples)

    def ids_of(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @staticmethod
    def written(talk: list[dict], tokenizer) -> str:
        return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)

    def can_write(self, talk: list[dict]) -> bool:
        try:
            return bool(self.written(talk, self.tokenizer))
        except Exception:  # a template may refuse a system message
            return False


def forward_of(model) -> Callable:
    """ids -> logits (T, V) in float32, of our model or of transformers'."""
    import torch

    return lambda ids: model(torch.tensor([ids])).logits[0].detach().float()


def samples_of(args, reference: Reference) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of the first records of --data_path, as training would see them."""
    from dataset.lm_dataset import PretrainDataset, SFTDataset
    from dataset.records import read_records

    samples = []
    for path in args.data_path:
        _, _, first = next(iter(read_records([path])))
        kind = PretrainDataset if "text" in first else SFTDataset
        with tempfile.TemporaryDirectory() as cache:
            length = min(512, reference.model.config.max_position_embeddings)
            dataset = kind(path, reference.tokenizer, length, cache_dir=Path(cache))
            found = [dataset[i] for i in range(min(args.limit, len(dataset)))]
            samples += [(ids.tolist(), labels.tolist()) for ids, labels in found]
    return samples


def loss_of(forward: Callable, samples: list) -> float | None:
    """The mean of -log p(label), in nats; None without samples."""
    import torch

    losses = []
    for ids, labels in samples:
        targets = torch.tensor(labels[1:])
        losses.append(torch.nn.functional.cross_entropy(forward(ids)[:-1], targets, ignore_index=-100,
                                                        reduction="none")[targets != -100])
    return torch.cat(losses).double().mean().item() if losses else None


# --- one way to run it --------------------------------------------------------------------------------------


def compare_numbers(row: Row, forward: Callable, kind: str, reference: Reference) -> None:
    """Logits, greedy answers and loss of `forward`, beside the reference's.

    An answer is greedy where each of its tokens is the likeliest after the tokens before it. So one forward
    pass over prompt and answer shows where another runtime would leave ours. It may, where two tokens are
    nearly as likely as each other.
    """
    limit, loss_limit, _ = LIMITS.get(kind, COARSE)
    farthest, equal, ties = 0.0, 0, 0
    for ids, answer, expected in zip(reference.prompts, reference.answers, reference.logits, strict=True):
        logits = forward(ids + answer)
        if logits.shape != expected.shape:
            row.check("logits", "none", f"logits of shape {list(logits.shape)}, not {list(expected.shape)}")
            return
        farthest = max(farthest, (logits - expected).abs().max().item())
        picks = logits[len(ids) - 1 : -1].argmax(dim=-1).tolist()
        leaves = [place for place, (pick, token) in enumerate(zip(picks, answer, strict=True)) if pick != token]
        if not leaves:
            equal += 1
            continue
        here = expected[len(ids) - 1 + leaves[0]]
        gap = (here.max() - here[picks[leaves[0]]]).item()
        ties += gap <= 2 * limit
        if gap > 2 * limit:
            words = [reference.tokenizer.decode([token]) for token in (answer[leaves[0]], picks[leaves[0]])]
            row.off.append(f"greedy answer {reference.prompts.index(ids)}: {words[1]!r} and not {words[0]!r} at "
                           f"token {leaves[0]}, though that is {gap:.3g} less likely (logits)")
    number = len(reference.prompts)
    row.check("greedy", f"{equal}/{number}" + (f", {ties} ties" if ties else ""))
    row.check("logits", f"{farthest:.1e}", None if farthest <= limit else
              f"logits differ by up to {farthest:.3g}; {kind} may differ by {limit:g}")
    if reference.samples:
        difference = loss_of(forward, reference.samples) - reference.loss
        row.check("loss", f"{difference:+.1e}", None if abs(difference) <= loss_limit else
                  f"the loss differs by {difference:+.3g}; {kind} may differ by {loss_limit:g}")


def compare_tokens(row: Row, encode: Callable, reference: Reference, write: Callable | None) -> None:
    """encode(text, is_chat) -> ids. write(talk) -> the text of a prompt; None where a runtime writes none."""
    equal = 0
    for text, ids in zip(TEXTS, reference.prompts, strict=False):
        theirs = encode(text, False) or reference.ends[:1]
        equal += theirs == ids
        if theirs != ids:
            row.off.append(f"other tokens: {text!r} is {theirs[:12]} and not {ids[:12]}")
    for talk, ids in zip(reference.talks, reference.prompts[len(TEXTS):], strict=True):
        text = write(talk) if write else reference.written(talk, reference.tokenizer)
        if (expected := reference.written(talk, reference.tokenizer)) != text:
            row.off.append(f"another chat template: {text!r} and not {expected!r}")
        theirs = encode(expected, True)
        equal += theirs == ids
        if theirs != ids:
            row.off.append(f"other tokens: the chat {expected!r} is {theirs[:12]} and not {ids[:12]}")
    row.check("ids", f"{equal}/{len(reference.prompts)}")


def merged_row(args, reference: Reference) -> Row:
    row = Row("ours, adapter merged")
    compare_numbers(row, forward_of(merged_model(args, reference)), "F32", reference)
    return row


def merged_model(args, reference: Reference):
    """A copy of the model with the adapter in its weights."""
    import copy

    from model.lora import merge_lora

    model = copy.deepcopy(reference.model)
    if args.lora:
        merge_lora(model)
    return model


def transformers_row(args, reference: Reference) -> Row:
    """transformers reads the folder, and PEFT the adapter."""
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(args.model), dtype=torch.float32, local_files_only=True)
    if args.lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(args.lora[0]), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(str(args.model), local_files_only=True)
    compare_tokens(row, lambda text, is_chat: tokenizer(text, add_special_tokens=not is_chat)["input_ids"],
                   reference, lambda talk: reference.written(talk, tokenizer))
    compare_numbers(row, forward_of(model.eval()), "F32", reference)
    return row


# --- a GGUF file --------------------------------------------------------------------------------------------


def gguf_row(args, path: Path, reference: Reference) -> Row:
    from model.gguf import read_model
    from model.gguf_file import read_gguf
    from model.gguf_tokenizer import read_tokenizer
    from model.weights import load_model

    has_llama = importlib.util.find_spec("llama_cpp") is not None
    fields, tensors = read_gguf(path)
    row = Row(f"{path.name} in {'llama.cpp' if has_llama else 'our reader'}")
    if fields.get("general.type") == "adapter":
        return adapter_row(args, row, path, reference, has_llama)
    kind = kind_of(row, fields, tensors)
    config, _, readers, generation = read_model(path)
    compare_config(row, config, reference.model.config)
    model = load_model(path)
    if not row.off:
        compare_tensors(row, model, merged_model(args, reference), tensors)
    missing = [end for end in reference.ends if end not in generation["eos_token_id"]]
    if missing:
        names = ", ".join(reference.tokenizer.convert_ids_to_tokens(missing))
        row.check("rest", "ends", f"missing end token: {names}; the file has {generation['eos_token_id']}")
    tokenizer = read_tokenizer(path)
    if (theirs := tokenizer.get_vocab()) != (ours := reference.tokenizer.get_vocab()):
        token = min(ours.items() ^ theirs.items(), key=lambda item: item[1])
        row.check("rest", "vocabulary", f"other tokens: of {len(ours)} and {len(theirs)}, {token} is in one "
                  "vocabulary and not in the other")
    if has_llama:
        llama = LlamaCpp(path, reference)
        encode, forward = llama.encode, llama.forward
    else:
        encode, forward = lambda text, is_chat: tokenizer(text, add_special_tokens=not is_chat)["input_ids"], \
            forward_of(model)
    template = (lambda talk: reference.written(talk, tokenizer)) if tokenizer.chat_template else None
    if template is None and reference.talks:
        row.check("rest", "template", "another chat template: the file has none")
    compare_tokens(row, encode, reference, template)
    compare_numbers(row, forward, kind, reference)
    row.check("rest", f"{len(readers)} tensors, {kind}")
    return row


def adapter_row(args, row: Row, path: Path, reference: Reference, has_llama: bool) -> Row:
    """An adapter alone, over our base, or over our base as a GGUF file in llama.cpp."""
    from model.gguf import write_model
    from model.gguf_file import read_gguf
    from model.lora import adapted_layers, load_lora
    from model.weights import load_model

    kinds = {tensor.kind for tensor in read_gguf(path)[1].values()}
    kind = max(kinds, key=lambda kind: LIMITS.get(kind, COARSE))
    base = load_model(args.model)
    has_llama = has_llama and not args.model.is_file()
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
        row.check("rest", "layers", f"other layers: {min(ours.keys() ^ theirs.keys())} is in one adapter alone")
        return row
    compare_scale(row, [(ours[name], theirs[name]) for name in ours], kind)
    for name, update in ours.items():
        compare_matrix(row, name, theirs[name], update, 2 * LIMITS.get(kind, COARSE)[2])
    row.check("rest", f"{len(ours)} layers, {kind}")
    return row


def update_of(layer):
    b, a = layer.lora.factors()
    return (layer.lora.scaling * b @ a).detach()


def kind_of(row: Row, fields: dict, tensors: dict) -> str:
    """The type that a file says it is of, which most of its matrices must have."""
    from model.gguf import FILE_TYPES

    kinds = [tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1]
    most = max(sorted(set(kinds)), key=kinds.count)
    said = {number: name for name, number in FILE_TYPES.items()}.get(fields.get("general.file_type"))
    if said and said != most:
        row.check("rest", "type", f"another type: the file says {said}, and most of its matrices are {most}")
    return said or most


def compare_config(row: Row, theirs, ours) -> None:
    """Names each setting that differs, of those that change what a model computes."""
    theirs, ours = asdict(theirs), asdict(ours)
    for name, value in ours.items():
        if name in ("initializer_range", "max_position_embeddings", "tie_word_embeddings"):
            continue  # of the last one, the tensors tell
        if name == "rope_scaling" and value and theirs[name]:
            theirs[name] = value | theirs[name]  # a file has only what the runtimes read
            value = theirs[name] if all(theirs[name][key] == value[key] for key in value) else value
        if theirs[name] != value:
            row.check("rest", name, f"another {name}: {theirs[name]} and not {value}")


def compare_tensors(row: Row, model, merged, tensors: dict) -> None:
    """The numbers of a file beside ours, tensor by tensor and row by row."""
    from model.gguf import gguf_name
    from model.lora import adapted_layers

    theirs, ours = model.state_dict(), dict(merged.named_parameters(remove_duplicate=False))
    adapted = adapted_layers(merged, required=False)
    compare_scale(row, [(layer.weight.detach() - layer.lora.original, theirs[f"{name}.weight"]
                         - layer.lora.original) for name, layer in adapted.items()], kind_in(tensors))
    for name in theirs:
        stored = tensors.get(gguf_name(name)) or tensors["token_embd.weight"]
        limit = LIMITS.get(stored.kind, COARSE)[2]
        compare_matrix(row, name, theirs[name], ours[name].detach(), limit)


def kind_in(tensors: dict) -> str:
    return max({tensor.kind for tensor in tensors.values()}, key=lambda kind: LIMITS.get(kind, COARSE))


def compare_scale(row: Row, updates: list[tuple], kind: str) -> None:
    """updates: (ours, theirs) of each adapted layer. Their size shows whether alpha is the same."""
    size = sum(ours.square().sum().item() for ours, _ in updates)
    if size:
        scale = sum((ours * theirs).sum().item() for ours, theirs in updates) / size
        if abs(scale - 1) > (0.02 if kind in ("F32", "F16", "BF16", "Q8_0") else 0.1):
            row.check("rest", "alpha", f"wrong alpha, or another adapter: what the adapter adds is {scale:.3g} "
                      "times as large as it should be")


def compare_matrix(row: Row, name: str, theirs, ours, limit: float) -> None:
    if theirs.shape != ours.shape:
        row.check("rest", "shape", f"{name} is {list(theirs.shape)}, not {list(ours.shape)}")
        return
    theirs, ours = theirs.reshape(-1, theirs.shape[-1]), ours.reshape(-1, ours.shape[-1])
    sizes = ours.norm(dim=1)
    error = (theirs - ours).norm(dim=1) / sizes.clamp(min=0.05 * sizes.mean().item() + 1e-30)
    rows = (error > ROW * limit).nonzero().flatten().tolist()
    whole = ((theirs - ours).norm() / ours.norm().clamp(min=1e-30)).item()
    if rows or whole > limit:
        where = f" in row {', '.join(map(str, rows[:4]))}" if 0 < len(rows) < len(ours) else ""
        where += f" and {len(rows) - 4} more" if where and len(rows) > 4 else ""
        row.check("rest", "tensors", f"{name} differs{where}: by {whole:.2%} of its size")


class LlamaCpp:
    """A GGUF file in llama.cpp, with keys and values in float32: its default, float16, would cost 0.01."""

    def __init__(self, path: Path, reference: Reference, adapter: Path | None = None):
        import llama_cpp
        import torch

        longest = max(map(len, [*reference.sequences, *(ids for ids, _ in reference.samples)]))
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=longest + 8, n_batch=longest + 8, logits_all=True, type_k=0, type_v=0,
            n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(), verbose=False,
            lora_path=str(adapter) if adapter else None)

    def encode(self, text: str, is_chat: bool) -> list[int]:
        return self.llama.tokenize(text.encode("utf-8"), add_bos=not is_chat, special=True)

    def forward(self, ids: list[int]):
        import torch

        self.llama.reset()
        self.llama.eval(ids)
        return torch.tensor(self.llama.scores[: len(ids)])


# --- a server -----------------------------------------------------------------------------------------------


class Server:
    """Whatever speaks OpenAI's API."""

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
            raise ModelError(f"{path}: {error.code} {one_line(error.read().decode('utf-8', 'replace'))}") from None

    def logprobs(self, prompt: str | list[int]) -> list[float]:
        """log p of each token of a prompt but the first, which has none, and of one token after it."""
        body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1}
        found = self.call("/v1/completions", body)["choices"][0]["logprobs"]
        return found["token_logprobs"][1:]


def server_row(args, reference: Reference) -> Row:
    import torch

    server = Server(args)
    row = Row(f"{args.url}, {server.name}")
    limit, loss_limit, _ = LIMITS[args.url_type]
    decode, equal, ties, asked, same, farthest = reference.tokenizer.decode, 0, 0, 0, 0, 0.0
    texts = [text for text in TEXTS if "<" not in text]  # a server may protect control tokens in a text
    for prompt in [*texts, *reference.talks]:
        place = TEXTS.index(prompt) if isinstance(prompt, str) else len(TEXTS) + reference.talks.index(prompt)
        ids, answer, logits = reference.prompts[place], reference.answers[place], reference.logits[place]
        theirs = server.logprobs(prompt if isinstance(prompt, str) else ids)[:-1]
        ours = logits[: len(ids) - 1].log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
        same += len(theirs) == len(ours)
        if len(theirs) != len(ours):
            row.off.append(f"other tokens: {prompt!r} has {len(theirs) + 1} and not {len(ids)}")
            continue
        farthest = max([farthest, *(abs(a - b) for a, b in zip(theirs, ours, strict=True))])
        expected = decode(answer, skip_special_tokens=True)
        if any(mark in decode(answer) for mark in ("<think>", "<tool_call>")):
            continue  # these parts of an answer have fields of their own
        asked += 1
        body = {"max_tokens": args.max_new_tokens}
        if isinstance(prompt, str):
            said = server.call("/v1/completions", body | {"prompt": prompt})["choices"][0]["text"]
        else:
            said = server.call("/v1/chat/completions", body | {"messages": prompt})["choices"][0]["message"]
            said = said["content"] or ""
        if said.strip() == expected.strip():
            equal += 1
            continue
        picked = reference.ids_of(said) + reference.ends[:1]
        leaves = next((i for i, (a, b) in enumerate(zip(answer, picked, strict=False)) if a != b), None)
        gap = float("inf")
        if leaves is not None:
            here = logits[len(ids) - 1 + leaves]
            gap = (here.max() - here[picked[leaves]]).item()
        ties += gap <= 2 * limit
        if gap > 2 * limit:
            row.off.append(f"greedy answer to {prompt!r}: {said!r} and not {expected!r}")
    row.check("ids", f"{same}/{len(texts) + len(reference.talks)}")
    row.check("greedy", f"{equal}/{asked}" + (f", {ties} ties" if ties else ""))
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

    reference = Reference(args)
    ways = [(f"{path}", lambda path=path: gguf_row(args, path, reference)) for path in args.gguf]
    ways.insert(0, ("transformers", lambda: transformers_row(args, reference)))
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


def say(args, reference: Reference, rows: list[Row]) -> None:
    """The table, and below it what is wrong."""
    what = f"{args.model}" + (f" with {', '.join(map(str, args.lora))}" if args.lora else "")
    loss = "" if reference.loss is None else f", loss {reference.loss:.4f} on {len(reference.samples)} records"
    print(f"{what}: {len(reference.prompts)} prompts{loss}; beside our model in float32:")
    lines = [("", *COLUMNS), *((row.name, *(row.cells.get(column, "-") for column in COLUMNS)) for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for row, cells in zip([None, *rows], lines, strict=True):
        end = f"  not compared: {row.skipped}" if row and row.skipped else "  OFF" if row and row.off else ""
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() + end)
    for row in rows:
        for problem in row.off[:8]:
            print(f"off: {row.name}: {problem}")
        if len(row.off) > 8:
            print(f"off: {row.name}: and {len(row.off) - 8} more")
    sys.stdout.flush()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="DIR", help="the model: a folder, a .pth or a .gguf file")
    parser.add_argument("--lora", type=Path, nargs="+", default=[], metavar="DIR", help="adapter(s) on it")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W",
                        help="how much of each adapter; needed where there are several (default: 1)")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], metavar="FILE",
                        help="GGUF files that should be the same: models (with --lora: merged), or adapters")
    parser.add_argument("--url", metavar="URL", help="a server that speaks OpenAI's API")
    parser.add_argument("--served", metavar="NAME", help="the model's name there (default: its folder's)")
    parser.add_argument("--url_type", choices=LIMITS, default="F32", help="what the server computes in")
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
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
