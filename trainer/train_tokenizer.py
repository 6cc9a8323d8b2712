r"""Train the tokenizer: byte-level BPE over 256 bytes, a few control tokens and the merges that save most.

    python trainer/train_tokenizer.py                                   # the embedded world, to out/tokenizer
    python trainer/train_tokenizer.py --data_path my_en.jsonl my_zh.jsonl --weights 1 2 --vocab_size 12000
    python trainer/train_tokenizer.py --help

The tokenizer in model/tokenizer, which every stage uses unless another is named, was made by these commands:

    python dataset/synthetic.py --out_dir out/world
    python trainer/train_tokenizer.py --out_dir model/tokenizer --data_path \
        ../shared/data/pretrain_en.jsonl ../shared/data/pretrain_zh.jsonl \
        ../shared/data/sft_en.jsonl ../shared/data/sft_zh.jsonl \
        out/world/pretrain.jsonl out/world/sft.jsonl --weights 0.65 1 3.2 1.35 1 0.15

The weights say how often each file is read. Chats are read more often than books, because there are fewer of
them, and because chats are what the model will read and write. The texts are held in memory; a few hundred MB
are enough. A model is tied to its tokenizer: after training another tokenizer, pretrain again.

Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) starts from single characters and
makes the most frequent pair of neighbours a new entry, again and again. It starts from bytes, as GPT-2 does,
so that no text is unknown:

    "the cat"  ->  t h e _ c a t  ->  th e _ c a t  ->  the _ c a t  ->  the _c a t  ->  the _cat
"""

import json
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, fraction, not_negative, number, run_script
from common.errors import DataError, UsageError
from common.files import write_whole

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
# Their ids are 0, 1, 2, ... in this order. PAD is not TURN_END: a model padded with its end never stops.
CONTROL_TOKENS = [
    *(END_OF_TEXT, TURN_START, TURN_END, PAD),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *(f"<|reserved_{i}|>" for i in range(6)),  # free, so that a later format needs no larger vocabulary
]

# How text is cut before any merge: contractions; a word with the space or sign before it; each digit alone,
# which sums need; signs; line breaks; other spaces. It is the rule of Qwen2, which other runtimes know.
SPLIT_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# The prompt format for other people's tools (transformers, vLLM, ...); dataset/chat.py builds the same ids.
# Between generation and endgeneration stands what the assistant says, and so what training supervises.
CHAT_TEMPLATE = (ROOT / "dataset" / "chat_template.jinja").read_text(encoding="utf-8")

# How a program finds the thinking and the tool calls in an answer: transformers reads this description, and
# so do vLLM (its parsers named hf) and TRL. An answer is what follows start_anchor in the text.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": f"{TURN_START}assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {"open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True,
                       "content": "json", "transform": {"type": "function", "function": "{content}"}},
        # Spaces around the end belong to no field. Otherwise they would count as another, empty content.
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)\s*"},
    },
}


def record_texts(record):
    """The texts of a record as training reads them: those of its chat, or else its text. Raises DataError.

    Nothing else in it is text to learn from: no addresses, no ids, no names of roles.
    """
    from dataset.chat import chat_pieces
    from dataset.messages import to_messages

    try:
        messages, tools = to_messages(record)
    except DataError:
        if isinstance(record.get("text"), str) and record["text"].strip():
            return [record["text"]]
        raise
    headers = {f"{role}\n" for role in ("system", "user", "assistant")}
    pieces = chat_pieces(messages, tools, add_generation_prompt=False)
    return [text for text, is_control, _ in pieces if text.strip() and not is_control and text not in headers]


def hashed_fraction(texts, salt=""):
    """A number in [0, 1) from the record's words alone: the same split on any machine and in any order."""
    return zlib.crc32("\n".join([salt, *texts]).encode("utf-8")) / 2**32


def weighted(records, weight):
    """Yield the texts `weight` times: with 2.3 all of them twice, and three tenths (by hash) once more."""
    for texts in records:
        repeats = int(weight) + (hashed_fraction(texts, salt="repeat") < weight % 1)
        for _ in range(repeats):
            yield from texts


def build_tokenizer(texts, vocab_size, max_token_length=16):
    """Train on an iterable of strings; returns a `tokenizers.Tokenizer` with exactly `vocab_size` entries."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # No normalizer, unlike Qwen2's NFC: any text must come back exactly.
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=CONTROL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, seen or not
        max_token_length=max_token_length)  # bytes: five characters of Chinese, words and not whole phrases
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer, out_dir):
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer.from_pretrained(out_dir) reads."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # What comes before a text, since it ends the document before. Nothing puts it there by itself. Some
        # programs cannot do without a bos token: ctranslate2's converter, and those that score a first word.
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,  # it would turn "hello ." into "hello."
        "model_max_length": 32768,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
        "chat_template": CHAT_TEMPLATE,
        "response_template": RESPONSE_TEMPLATE,
    }
    write_whole(out_dir / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_whole(out_dir / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def bytes_per_token(tokenizer, texts):
    """UTF-8 bytes per token: how much text one step of the model reads. None without text."""
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    return sum(len(text.encode("utf-8")) for text in texts) / tokens if tokens else None


def main(args):
    # Imported here, so that --help does not wait for it.
    from dataset.records import Report, read_records, reason_of

    if args.data_path:
        paths = args.data_path
    else:
        from dataset.synthetic import ensure_world

        world = ensure_world(ROOT / "out" / "world")
        paths = [path for name, path in world.items() if not name.endswith(("_eval", "_test"))]
    weights = args.weights or [1.0] * len(paths)
    training, held_out = {}, {}
    for path in paths:
        training[path], held_out[path], report = [], [], Report()
        for _, line, record in read_records([path], report=report):
            try:
                texts = record_texts(record)
            except (DataError, RecursionError) as error:
                report.add(path, line, reason_of(error))
                continue
            report.usable[str(path)] += 1
            (held_out if hashed_fraction(texts) < args.eval_fraction else training)[path].append(texts)
        refusal = report.refusal(str(path))
        if refusal and not args.allow_unusable:
            raise DataError(f"{refusal}; --allow_unusable uses the others all the same")
        if report.counts:
            print(f"warning: {path}: {report.summary()}", file=sys.stderr)

    pairs = zip(paths, weights, strict=True)
    texts = (text for path, weight in pairs for text in weighted(training[path], weight))
    tokenizer = build_tokenizer(texts, args.vocab_size)
    if tokenizer.get_vocab_size() < args.vocab_size:
        found = tokenizer.get_vocab_size()
        raise UsageError(f"these texts give only {found} entries: add text, or lower --vocab_size to {found}")
    save_tokenizer(tokenizer, args.out_dir)
    for path in paths:
        unseen = bytes_per_token(tokenizer, [text for texts in held_out[path] for text in texts])
        measured = f"{unseen:.3f} bytes per token on {len(held_out[path])}" if unseen else "none"
        print(f"{path}: {len(training[path])} records trained on; held out: {measured}")
    print(f"{tokenizer.get_vocab_size()} entries saved to {args.out_dir}")


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data_path", nargs="+", type=Path, metavar="FILE",
        help="texts or chats, every format that training reads (default: the embedded world)")
    # One number for each file, set by hand: more for a file that the figures show to be served badly.
    add("--weights", nargs="+", type=not_negative, metavar="W",
        help="how often each file of --data_path is read, such as 1 2.5 (default: once each)")
    add("--allow_unusable", action="store_true", help="go on though most records of a file cannot be used")
    add("--eval_fraction", type=fraction, default=0.05, metavar="F",
        help="part of the records, chosen by hash, that is measured and never trained on")
    add = parser.add_argument_group("the tokenizer").add_argument
    smallest = len(CONTROL_TOKENS) + 256
    size = number(int, lambda n: n >= smallest, f"at least {smallest} (bytes, control tokens)")
    add("--vocab_size", type=size, default=6400, metavar="N",  # small, like the models
        help="entries in all: control tokens, bytes and merges")
    add("--out_dir", type=Path, default=ROOT / "out" / "tokenizer", metavar="DIR", help="its folder")
    args = parser.parse_args()
    files = args.data_path or []
    if args.weights and len(args.weights) != len(files):
        parser.error(f"--weights needs one number for each file of --data_path, which are {len(files)}")
    if args.out_dir.exists() and not args.out_dir.is_dir():
        parser.error(f"--out_dir {args.out_dir} is no folder")
    if (args.out_dir / "config.json").exists():
        parser.error(f"--out_dir {args.out_dir} holds a model, which needs its own tokenizer: choose another")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
