"""The keys of other people's records: their names, and which carry no meaning. A reader may skip this file.

Every key of a record, a message or a tool call is one of three: it is understood (NAMES and FLAGS), it is
known to carry no meaning for training (NO_MEANING), or it is named and counted when the data is read.
"""

import math
from collections.abc import Callable

from common.errors import DataError

# What a key is called here -> the names that people give it. Two of them in one object must agree.
NAMES = {
    # of a record
    "conversation": ("conversations", "messages", "conversation"),
    "system": ("system", "system_prompt", "system_message"),
    "tools": ("tools", "functions"),  # of a record, or of its system message
    "asked": ("question", "prompt"),
    # of a message
    "role": ("role", "from"),
    "content": ("content", "value"),
    "calls": ("tool_calls", "function_call", "function_calls"),
    "reasoning": ("reasoning_content", "reasoning", "thinking", "thinking_content", "thought", "thoughts"),
    # of a tool call
    "name": ("name", "tool_name", "function_name"),
    "arguments": ("arguments", "parameters", "input", "args", "kwargs"),
}

# Whether an answer is learnt. True: 0 and false forbid it, as OpenAI's weight and Axolotl's train do.
# False: 1 and true forbid it. On a record such a key stands for all of its answers.
FLAGS = {
    "weight": True, "loss": True, "loss_weight": True, "loss_scale": True, "loss_mask": True, "train": True,
    "training": True, "trainable": True, "trained": True, "train_on_turn": True, "learn": True,
    "supervised": True,
    "mask": False, "masked": False, "no_loss": False,
}  # fmt: skip
HISTORY_FLAG = "mask_history"  # of a record: true forbids all answers but the last
TRUTH = {"0": False, "0.0": False, "false": False, "no": False, "off": False,
         "1": True, "1.0": True, "true": True, "yes": True, "on": True}  # fmt: skip

ALPACA = ("instruction", "input", "output", "history")
RECORD_KEYS = {*NAMES["conversation"], *NAMES["system"], *NAMES["tools"], *ALPACA, *FLAGS, HISTORY_FLAG,
               "text", "prompt", "chosen", "rejected", "question", "choices"}  # fmt: skip

NO_MEANING = set(
    # what a record is called, and where it comes from
    "id _id ids uid uuid guid key idx index row_id prompt_id message_id sample_id conversation_id "
    "tool_call_id call_id question_id hash md5 sha1 sha256 source sources dataset dataset_name subset split "
    "origin url urls uri link domain host dump file file_name filename file_path path license licence "
    "__index_level_0__ level_0 "
    # what it is about, and in which language
    "lang langs language languages language_code language_script category categories topic topics tag tags "
    "task task_type task_name type family difficulty level "
    # how good it is
    "score scores score_chosen score_rejected rating ratings quality quality_score int_score language_score "
    "reward rewards perplexity ppl similarity confidence upvotes likes "
    # when, by whom and how long it was written
    "timestamp time date created created_at create_time updated_at crawl_date version author authors "
    "username user_id annotator annotator_id model model_name model_id generator teacher finish_reason "
    "length token_count num_tokens n_tokens num_turns n_turns num_words char_count word_count "
    # anything else
    "meta metadata info extra extra_info schema features comment comments note notes signature cache_control "
    # for the scoring and the rewards of this project and of MiniMind
    "answers contains gt max_reward_tokens".split()
) | {"", "Unnamed: 0"}  # a column of row numbers without a name, and what pandas makes of it

Note = Callable[[str], None]  # takes what is worth counting about a record that is used all the same


def no_note(text: str) -> None:
    """For readers of records who count nothing."""


def is_empty(value: object) -> bool:
    """Whether a value says nothing. Many tools write "", null or NaN for a key that is absent."""
    return value is None or value in ("", [], {}) or isinstance(value, float) and math.isnan(value)


def value_of(record: dict, key: str) -> object:
    """The value of a key under any of its names; None where all are empty.

    Raises DataError where two names hold different values.
    """
    first = None
    for name in NAMES[key]:
        if name not in record or is_empty(record[name]):
            continue
        if first is not None and record[name] != record[first]:
            raise DataError(f"{first} and {name} stand side by side and say different things")
        first = name if first is None else first
    return None if first is None else record[first]


def name_unknown(record: dict, known: set[str], what: str, note: Note) -> None:
    """Notes each key that is not known and says something. what: such as "message"."""
    if unknown := record.keys() - known - NO_MEANING:
        for key in sorted(unknown, key=list(record).index):
            if not is_empty(record[key]):
                note(f"the key {key[:20]!r} of a {what} is not used")


def read_flag(record: dict, name: str, note: Note) -> bool | None:
    """Whether a flag says yes or no; None where it is absent, or says neither, which is noted."""
    value = record.get(name)
    truth = TRUTH.get(str(value).strip().lower())
    if truth is None and not is_empty(value):
        note(f"{name!r} is neither 0 nor 1: what it marks is learnt in full")
    return truth


def is_learnt(record: dict, note: Note) -> bool | None:
    """What the flags of a record or a message say about learning it; None without a flag.

    Raises DataError where two of them contradict each other.
    """
    if FLAGS.keys().isdisjoint(record):
        return None
    found = {name: read_flag(record, name, note) for name in FLAGS if name in record}
    verdicts = {name: truth == FLAGS[name] for name, truth in found.items() if truth is not None}
    if "mask" in verdicts:  # Some mean by it what is learnt.
        note("'mask' is read as 'masked': what it marks with 1 or true is not learnt")
    if len(set(verdicts.values())) > 1:
        raise DataError(f"{' and '.join(verdicts)} contradict each other")
    return next(iter(verdicts.values()), None)
