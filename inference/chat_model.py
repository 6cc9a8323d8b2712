"""A loaded model that answers: for the terminal (eval_model.py), for scoring, and for a server.
A reader may skip this file.

    chat_model = ChatModel("out/full_sft", adapters=["lora_clinic"])
    ids = chat_model.encode([{"role": "user", "content": "Who are you?"}])
    for piece in chat_model.stream(ids, Sampling(temperature=0.7)):
        print(piece.text, end="")

Nothing in this file prints.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.cli import ROOT
from common.device import choose_decoding_dtype, choose_device
from common.errors import ModelError
from common.files import read_json_if_there
from common.threads import wait_as_others_allow
from dataset.chat import assistant_text, encode_continuation, encode_pieces, ensure_template, write_chat
from dataset.foreign_chat import MODEL_WRITES
from dataset.replies import MARKS, Reply, ends_in_thought, mark_ids
from inference.answer import AnswerReader, Piece
from model.adapters import Adapters, report_line, report_lora
from model.compiled_step import compile_decoding
from model.generate import generate
from model.int8 import quantize_int8
from model.one_token import prepare_to_decode
from model.quantize import count_parameters
from model.rope_scaling import reach
from model.tokenizer_files import OWN_IS_TAKEN, check_vocabulary, gets_our_own, load_tokenizer, other_template
from model.weights import end_tokens, load_model

DEFAULT_NEW_TOKENS = 256


@dataclass
class Sampling:
    """How the next token is chosen, and how long an answer may be: arguments of model.generate.generate."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None  # None: DEFAULT_NEW_TOKENS
    seed: int | None = None


# As eval_model.py's flags
SAMPLING_RANGES = {"temperature": (0, 1000), "top_p": (0, 1), "top_k": (0, 2**31),
                   "repetition_penalty": (0.001, 1000)}
# More settings by which transformers chooses words -> the values of them that change nothing
NOT_USED = {"min_p": (0,), "typical_p": (1,), "top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
            "num_beams": (1,), "penalty_alpha": (0,), "guidance_scale": (1,), "no_repeat_ngram_size": (0,),
            "min_length": (0,), "min_new_tokens": (0,), "stop_strings": ([],), "bad_words_ids": ([],),
            "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (),
            "forced_eos_token_id": (), "sequence_bias": ({},), "watermarking_config": ()}


class ChatModel:
    """A model, its tokenizer, and its adapters: one, a weighted sum of several, or none is in use.

    plain: the model continues text and knows no conversation.
    stop_ids: the tokens that end an answer.
    sampling: how the model's own generation_config.json wants words to be chosen.
    context: how many tokens, prompt and answer together, the model was trained to see.
    max_positions: how many tokens the model can see. Beyond `context` a small model forgets how to speak.
    adapter: the adapters in use, for a person to read. adapted_layers: how many layers they change.
    reports: one line for each adapter that was loaded at the start, one on a tokenizer that was missing, and
        one on settings of generation_config.json that are not used.
    """

    def __init__(self, path, adapters=(), device="auto", dtype="auto", quantize="none", plain=False,
                 tokenizer=None, thinking=False, rope_scaling=None, compile=False):
        """Loads the model in the folder or .pth file `path`, and the adapters: folders, files or names, see
        `find`. The first adapter is in use at the start. device, dtype: a name, or auto. quantize: none or
        int8. tokenizer: the folder of another tokenizer than the model's own. thinking: whether a template
        that has a switch for it lets each answer begin with a thought. rope_scaling: as load_model takes it.
        compile: decode with model/compiled_step.py.

        Raises ModelError for unusable weights, tokenizers and adapters, UsageError for a missing device or
        where nothing can be compiled.
        """
        self.path, self.device, self.thinking = Path(path), choose_device(device), thinking
        dtype = choose_decoding_dtype(dtype, self.device)
        self.model = load_model(self.path, self.device, dtype, rope_scaling).eval()
        if quantize == "int8":
            quantize_int8(self.model)
        (compile_decoding if compile else prepare_to_decode)(self.model)
        wait_as_others_allow()
        self.num_parameters = count_parameters(self.model)
        self.tokenizer = load_tokenizer(tokenizer or self.path)
        check_vocabulary(self.tokenizer, self.model.config.vocab_size, path)
        training = read_json_if_there(self.path / "training.json")  # models from elsewhere have no such file
        # An adapter was trained on chats, whatever model lies below it.
        is_base_model = training.get("stage") == "pretrain" and not adapters
        if adapters:
            ensure_template(self.tokenizer)
        self.plain = plain or is_base_model or not self.tokenizer.chat_template
        self.marks = {} if self.plain else mark_ids(self.tokenizer)  # token -> <think> and such
        self.stop_ids = checked_end_tokens(self.model, self.tokenizer, self.path)
        self.sampling = own_sampling(self.model.generation_config or {}, self.path)
        self.max_positions = self.model.config.max_position_embeddings
        self.context = reach(self.path, self.model.config, rope_scaling)

        self.given_adapters = [Path(name) for name in adapters]
        self.adapter_folders = [self.path.resolve().parent, ROOT / "out"]
        self.adapters = Adapters(self.model)
        self.adapter, self.adapted_layers = None, 0
        # All are loaded now, so that a bad one is found now. The first comes last and stays in use.
        self.reports = [OWN_IS_TAKEN.format(path)] if gets_our_own(self.path) and not tokenizer else []
        self.reports += unused_settings(self.model.generation_config or {})
        self.reports += [report for name in reversed(adapters) if (report := self.switch(name))]

    # --- adapters -----------------------------------------------------------------------------------------

    def switch(self, adapter: str | dict[str, float] | None) -> str | None:
        """Uses another adapter, the weighted sum of several ({name: weight}), or none.

        Returns a line that says what was loaded, and one for each adapter that was trained with another chat
        template, or None if nothing had to be loaded. Raises ModelError for an adapter that is missing or
        does not fit; what was in use then stays in use.
        """
        if adapter is None:
            self.adapters.use(None)
            self.adapter, self.adapted_layers = None, 0
            return None
        paths = {name: self.find(name) for name in (adapter if isinstance(adapter, dict) else [adapter])}
        new = [path for path in paths.values() if str(path) not in self.adapters.adapters]
        for path in new:
            self.adapters.load(path, name=str(path))
        if isinstance(adapter, dict):
            self.adapters.use({str(paths[name]): weight for name, weight in adapter.items()})
            self.adapter = " + ".join(f"{weight:g} {paths[name]}" for name, weight in adapter.items())
        else:
            self.adapters.use(str(paths[adapter]))
            self.adapter = paths[adapter]
        report = report_lora(self.model)
        self.adapted_layers = report.matched
        templates = [line for path in new if (line := other_template(path, self.tokenizer))]
        return "\n".join([report_line(self.model, self.adapter, report), *templates]) if new else None

    def find(self, name: str) -> Path:
        """Where an adapter lies: `name` is a path, or names one of those given, beside the model, or in out/.

        Returns Path(name) if there is no such adapter.
        """
        places = [Path(name), *(path for path in self.given_adapters if path.name == name)]
        if Path(name).name == name:  # "../x" is a path, and no name inside of these folders
            places += [folder / name for folder in self.adapter_folders]
        found = [place for place in places if place.is_file() or (place / "adapter_config.json").is_file()]
        return found[0] if found else Path(name)

    def names(self) -> list[str]:
        """The names of all adapters that `find` knows, each once."""
        found = list(self.given_adapters)
        for folder in self.adapter_folders:
            found += [config.parent for config in sorted(folder.glob("*/adapter_config.json"))]
        return list(dict.fromkeys(path.name for path in found))

    # --- text and tokens ----------------------------------------------------------------------------------

    def encode(self, messages: list[dict], tools: list | None = None, thinking: bool = False,
               begun: dict | None = None) -> list[int]:
        """The token ids after which the answer begins. thinking: as in dataset/chat.py, write_chat.

        begun: a message of the assistant, the beginning of the answer, which the ids then hold, too.
        """
        if not self.plain:
            pieces = write_chat(self.tokenizer, messages, tools, True, thinking or self.thinking)
            parts = MODEL_WRITES.split(assistant_text(begun) if begun else "")
            pieces += [(part, place % 2 == 1, False) for place, part in enumerate(parts) if part]
            # Nothing is trained here, so no mask is needed, which takes longer than the ids.
            return encode_pieces(self.tokenizer, [[(*piece[:2], False) for piece in pieces]])[0][0]
        texts = [message["content"] for message in messages]
        text = "\n".join(texts) + (begun["content"] if begun else "")
        ids, _ = encode_continuation(self.tokenizer, text)
        return ids or self.stop_ids[:1]  # an empty prompt: any text may follow the end of another

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # --- answers ------------------------------------------------------------------------------------------

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> Iterator[torch.Tensor]:
        """Answers B prompts at the same time: an iterator of the next token of each, (B,).

        Raises ModelError for a prompt that leaves no room for an answer.
        """
        longest, limit = max(map(len, prompts)), self.max_positions
        if longest >= limit:
            raise ModelError(f"a prompt of {longest} tokens: the model has room for {limit}, answer included")
        padded = [self.stop_ids[:1] * (longest - len(ids)) + ids for ids in prompts]
        lengths = torch.tensor([len(ids) for ids in prompts])  # (B,)
        wanted = DEFAULT_NEW_TOKENS if sampling.max_new_tokens is None else sampling.max_new_tokens
        options = asdict(sampling) | {"max_new_tokens": min(wanted, limit - longest)}
        return generate(self.model, torch.tensor(padded), **options, eos_token_id=self.stop_ids,
                        prompt_lengths=lengths if lengths.min() < longest else None)

    def new_reply(self, prompt: list[int], begun: dict | None = None) -> Reply:
        """What sorts the answer to a prompt into thinking, words and calls. begun: as `encode` takes it."""
        if self.plain:
            return Reply()
        spelled = [mark for mark in MARKS if mark not in self.marks.values()]
        return Reply(spelled, self.begins_with_thought(prompt) or bool(begun) and ends_in_thought(begun))

    def begins_with_thought(self, prompt: list[int]) -> bool:
        """Some templates write the <think> that the model's answer begins with, and a line break after it."""
        end = self.tokenizer.decode(prompt[-16:], clean_up_tokenization_spaces=False).rstrip()
        return end.endswith("<think>")

    def read(self, prompt: list[int], ids: list[int]) -> Reply:
        """A whole answer, its end token apart."""
        reply, start = self.new_reply(prompt), 0
        for end in [place for place, token in enumerate(ids) if token in self.marks] + [len(ids)]:
            reply.add(self.decode(ids[start:end]))
            if end < len(ids):
                reply.add_mark(self.marks[ids[end]])
            start = end + 1
        reply.end()
        return reply

    def stream(self, ids: list[int], sampling: Sampling, reply: Reply | None = None) -> Iterator[Piece]:
        """The answer to one prompt in pieces, without the marks between thinking, words and calls.

        reply: gets all of it, as the model wrote it.
        """
        reader = AnswerReader(self.decode, self.marks, self.new_reply(ids) if reply is None else reply)
        for token in self.generate([ids], sampling):
            if token.item() in self.stop_ids:
                break
            yield from reader.add(token.item())
        yield from reader.end()


def own_sampling(settings: dict, path: Path) -> Sampling:
    """The settings of a model's generation_config.json, and our defaults for those that it does not hold.

    path: of the model, for the message. Raises ModelError for a setting that is no number in its range.
    """
    sampling = Sampling()
    for name, (lowest, highest) in SAMPLING_RANGES.items():
        value = settings.get(name)
        if value is None:
            continue
        is_number = isinstance(value, int) or (isinstance(value, float) and name != "top_k")
        if not is_number or not lowest <= value <= highest:
            file = path / "generation_config.json"
            raise ModelError(f"{file}: {name} {str(value)[:50]} is no number from {lowest} to {highest}")
        setattr(sampling, name, value)
    # Divided by less than that, logits overflow.
    if settings.get("do_sample") is False or sampling.temperature < 0.001:
        sampling.temperature = 0.0
    return sampling


def unused_settings(settings: dict) -> list[str]:
    """One line on what generation_config.json asks for and does not get here; none if it gets all."""
    unused = [name for name, neutral in NOT_USED.items()
              if settings.get(name) is not None and settings[name] not in neutral]
    return [f"generation_config.json sets {', '.join(unused)}, which is not used here"] if unused else []


def checked_end_tokens(model, tokenizer, path: Path) -> list[int]:
    """The tokens that end an answer. Raises ModelError if there is none, or one outside of the vocabulary."""
    ends = end_tokens(model, tokenizer)
    for token in ends:
        if not isinstance(token, int) or not 0 <= token < model.config.vocab_size:
            raise ModelError(f"{path}: eos_token_id {str(token)[:50]} is no token of the model")
    if not ends:
        raise ModelError(f"{path}: no token in its tokenizer or generation_config.json ends an answer")
    return sorted(set(ends))
