"""Tokenizers in GGUF files: the fields tokenizer.*, written and read. A reader may skip this file.

A GGUF file holds the tokens and the merges, but not the rule that splits text before the merges. It names the
rule, and the rule itself is code in llama.cpp. A wrong name gives other tokens, and so a worse model, without
any error. For this reason a name is written only for a tokenizer whose rule is the same, character by
character, and a file that names another rule is refused.
"""

import json
import re
from pathlib import Path

from common import files
from common.errors import ModelError
from model.gguf_file import read_gguf

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The name of a rule -> its steps. A text is a regular expression whose matches are cut out.
RULES = {
    "qwen2": (WORDS + r"\p{N}" + REST, "bytes"),
    "llama-bpe": (WORDS + r"\p{N}{1,3}" + REST, "bytes"),
    "smollm": ("digits", "gpt2 bytes"),
    "gpt-2": ("gpt2 bytes",),
}
SAME_RULE = {"deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
WHOLE_WORDS = ("llama-bpe",)  # here a word that is a token stays whole, whatever the merges say
NORMALIZER = "tokenizer.seedling.normalizer"  # a field of our own: llama.cpp normalises nothing
# Tokens that a model itself writes. Runtimes print a token of the kind USER_DEFINED, and hide a CONTROL one.
PRINTED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens
# Two tags of Hugging Face's alone. They mark what is learnt, and write nothing.
GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
SPACE = "▁"  # what sentencepiece writes for a blank
ENDS = ("eos", "eot", "eom")  # fields for tokens that end an answer: <prefix>_token_id

# --- writing ------------------------------------------------------------------------------------------------


def tokenizer_fields(writer, tokenizer, vocab_size: int, ends: list[int]) -> None:
    """Adds the tokenizer to a file. ends: tokens that end an answer; eos is the first of them.

    Raises ModelError for a tokenizer that llama.cpp would not imitate.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = rule_of(described)
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, i in tokenizer.get_vocab().items():
        tokens[i], kinds[i] = token, NORMAL
    for added in described["added_tokens"]:
        is_printed = added["content"] in PRINTED or not added["special"]
        kinds[added["id"]] = USER_DEFINED if is_printed else CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_string(NORMALIZER, (described["normalizer"] or {"type": "none"})["type"])
    begun = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(begun[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(begun[-1] == tokenizer.eos_token_id)
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
    ends = [end for end in ends if end is not None]
    if len(ends) > len(ENDS):
        raise ModelError(f"{len(ends)} tokens end an answer, and a GGUF file has room for {len(ENDS)}")
    ids = dict(zip(ENDS, ends, strict=False))
    ids |= {"bos": tokenizer.bos_token_id, "padding": tokenizer.pad_token_id,
            "unknown": tokenizer.unk_token_id}
    for name, token in ids.items():
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if tokenizer.chat_template:
        templates = tokenizer.chat_template
        if isinstance(templates, str):
            templates = {"default": templates}
        writer.add_chat_template([{"name": name, "template": portable_template(template)}
                                  for name, template in templates.items()])


def rule_of(described: dict) -> str:
    """The name of the rule of a tokenizer.json. Raises ModelError where llama.cpp has none that we know."""
    model, steps = described["model"], described["pre_tokenizer"] or {}
    steps = tuple(map(step_of, steps.get("pretokenizers", [steps])))
    names = [name for name, rule in RULES.items() if rule == steps]
    plain = model["type"] == "BPE" and not any(model.get(key) for key in (
        "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
    normalizer = described["normalizer"]
    if not names or not plain or normalizer not in (None, {"type": "NFC"}):
        raise ModelError("a GGUF file can't say how this tokenizer splits text: llama.cpp has no rule for it "
                         f"that we know; known are {', '.join(RULES)} over bytes")
    if bool(model.get("ignore_merges")) != (names[0] in WHOLE_WORDS):
        raise ModelError(f"a GGUF file can't say that ignore_merges is {bool(model.get('ignore_merges'))} "
                         f"where text is split by the rule {names[0]}")
    return names[0]


def step_of(step: dict) -> str:
    """A step of tokenizer.json's pre_tokenizer in the words of RULES, or one that is in none of them."""
    kind = step.get("type")
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex")
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt2 bytes" if step.get("use_regex", True) else "bytes"
    return f"unknown: {step}"


def missing_bytes(tokenizer) -> list[int]:
    """The bytes below 245 that no token stands for; above, UTF-8 has none. A tokenizer over bytes may lack
    some that its texts never had."""
    # A printable byte is spelled as its own character, and the others, in order, as those from 256 on.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in printed}
    spelled |= dict(zip(sorted(set(range(256)) - set(printed)), map(chr, range(256, 324)), strict=True))
    known = tokenizer.get_vocab()
    return [byte for byte in range(245) if byte not in (192, 193) and spelled[byte] not in known]


def portable_template(template: str) -> str:
    """A chat template without tags that only Hugging Face's library has. It writes the same text."""
    return GENERATION.sub(
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template)


# --- reading ------------------------------------------------------------------------------------------------


def token_ids(fields: dict) -> tuple[int | None, list[int], int | None]:
    """(bos, tokens that end an answer, padding) of a file."""
    named = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding", *ENDS)}
    for name, token in named.items():
        if token is not None and (not isinstance(token, int) or isinstance(token, bool)):
            raise ModelError(f"tokenizer.ggml.{name}_token_id is {str(token)[:50]!r}")
    return named["bos"], [named[name] for name in ENDS if named[name] is not None], named["padding"]


def read_tokenizer(path: Path):
    """transformers' tokenizer of a GGUF file, with its special tokens and its chat template.

    Raises ModelError for a kind of tokenizer, or a rule, that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    fields, _ = read_gguf(path)
    with files.explained(path):
        tokens, kinds = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ModelError("it holds no tokenizer")
        if not isinstance(kinds, list) or len(kinds) != len(tokens):
            raise ModelError(f"it has {len(tokens)} tokens and no kind for each of them")
        kind = fields.get("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama"):
            raise ModelError(f"a tokenizer of the kind {str(kind)[:50]!r} is not read, only gpt2 and llama")
        vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
        if len(vocabulary) != len(tokens) - kinds.count(UNUSED):
            raise ModelError("two of its tokens are the same text")
        if kind == "gpt2":
            tokenizer = byte_tokenizer(fields, vocabulary)
        else:
            tokenizer = sentencepiece_tokenizer(fields, vocabulary)
        add_special_tokens(tokenizer, tokens, kinds)
        bos, ends, pad = token_ids(fields)
        named = {"bos_token": bos, "eos_token": ends[0] if ends else None, "pad_token": pad,
                 "unk_token": fields.get("tokenizer.ggml.unknown_token_id")}
        if any(i is not None and not 0 <= i < len(tokens) for i in (*named.values(), *ends)):
            raise ModelError(f"one of its special tokens is beyond the {len(tokens)} that it has: {named}, "
                             f"an answer ends with {ends}")
        named = {name: None if i is None else tokens[i] for name, i in named.items()}
        usual = kind == "llama" or rule_name(fields) in WHOLE_WORDS
        add_bos = fields.get("tokenizer.ggml.add_bos_token", usual)
        add_eos = fields.get("tokenizer.ggml.add_eos_token", False)
        add_frame(tokenizer, (named["bos_token"], bos) if add_bos else None,
                  (named["eos_token"], ends[0]) if add_eos and ends else None)
        template = fields.get("tokenizer.chat_template")
        others = fields.get("tokenizer.chat_templates") or []
        found = {"default": template} if template else {}
        found |= {name: fields.get(f"tokenizer.chat_template.{name}") for name in others}
        if not all(isinstance(text, str) for text in found.values()):
            raise ModelError("one of its chat templates is missing, or no text")
        template = found if others else template
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, chat_template=template,
            model_input_names=["input_ids", "attention_mask"],
            **{name: token for name, token in named.items() if token is not None})


def rule_name(fields: dict) -> str:
    name = fields.get("tokenizer.ggml.pre", "none at all")
    return SAME_RULE.get(name, name)


def byte_tokenizer(fields: dict, vocabulary: dict[str, int]):
    """A tokenizer over bytes, as of GPT-2, Llama 3, Qwen and Seedling."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = rule_name(fields)
    if rule not in RULES:
        raise ModelError(f"its tokenizer splits text by the rule {str(rule)[:50]!r}; known are "
                         f"{', '.join([*RULES, *SAME_RULE])}")
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise ModelError("its tokenizer has no merges, tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule in WHOLE_WORDS))
    makers = {"bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
              "gpt2 bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
              "digits": lambda: pre_tokenizers.Digits(individual_digits=True)}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        makers[step]() if step in makers else pre_tokenizers.Split(Regex(step), "isolated")
        for step in RULES[rule]])
    # Qwen's own tokenizers compose accents first, which no GGUF file of theirs says.
    usual = "NFC" if rule == "qwen2" else "none"
    if (normalizer := fields.get(NORMALIZER, usual)) not in ("NFC", "none"):
        raise ModelError(f"{NORMALIZER} is {str(normalizer)[:50]!r}; known are NFC and none")
    if normalizer == "NFC":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_tokenizer(fields: dict, vocabulary: dict[str, int]):
    """A tokenizer of sentencepiece's BPE, as of Llama 2 and Mistral: of all pairs of neighbours that are a
    token together, the one with the highest score is merged first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) <= max(vocabulary.values(), default=0):
        raise ModelError("its tokenizer has no score for each token")
    merges = []
    for token, i in vocabulary.items():
        halves = ((token[:place], token[place:]) for place in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-scores[i], pair) for pair in pairs]
    merges.sort(key=lambda scored: scored[0])  # stable: equal scores keep the order of their tokens
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    names = {i: token for token, i in vocabulary.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, [pair for _, pair in merges], unk_token=names.get(unknown),
                                     fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Replace(" ", SPACE)]
    after = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(steps), decoders.Sequence(after)
    return tokenizer


def add_special_tokens(tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Makes tokens of two kinds ones that no splitting touches. A CONTROL token is left out of an answer's
    text, and a USER_DEFINED one is shown."""
    from tokenizers import AddedToken

    for wanted in ((CONTROL, UNKNOWN), (USER_DEFINED,)):
        add = tokenizer.add_special_tokens if CONTROL in wanted else tokenizer.add_tokens
        add([AddedToken(token, special=CONTROL in wanted, normalized=False)
             for token, kind in zip(tokens, kinds, strict=True) if kind in wanted])


def add_frame(tokenizer, first: tuple | None, last: tuple | None) -> None:
    """Lets every text begin with the token `first`, and end with `last`: (token, id), or None for none."""
    from tokenizers import processors

    frame = [token for token in (first, last) if token is not None and token[0] is not None]
    if frame:
        parts = [first[0] if first else None, "$A", last[0] if last else None]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(part for part in parts if part), special_tokens=frame)
