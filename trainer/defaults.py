"""What a stage does unasked to a model that has much to lose. A reader may skip this file.

The values in the stages' `set_defaults` are for models that grew here, from few tokens: Muon and a high
learning rate teach them most. A *grown* model has seen far more text than a run will show it: it comes from
elsewhere, or it has learnt here for long. The same values wipe out in ten steps what no data of the run
brings back. So for a grown model the flags below have other values, unless they are typed. The last part of
docs/speedrun.md shows what was measured.
"""

import math
from pathlib import Path

from common.errors import ModelError
from common.files import read_json_if_there

# A model is grown if it has seen this many tokens, and this many times the tokens that the run shows.
GROWN_TOKENS, GROWN_RATIO = 100_000_000, 10
BYTES_PER_TOKEN = 4  # about, in a file of records

# A step has as many tokens as over a young model, in fewer and longer rows: what people write is longer than
# the chats of the built-in world. One row in a forward pass bounds the memory. The warm-up is long, because
# AdamW's first steps are too large: it does not know yet how large gradients are. Data is shown once. Only
# where this makes very few steps it is shown again, up to MAX_EPOCHS times.
ROW, TOKENS_PER_STEP, MIN_STEPS, MAX_EPOCHS = 1024, 4096, 30, 10
GENTLE = {"optimizer": "adamw", "learning_rate": 1e-4, "warmup_ratio": 0.1, "epochs": 1, "max_seq_len": ROW,
          "batch_size": TOKENS_PER_STEP // ROW, "micro_batch_size": 1}
LORA_RATIO = 10  # an adapter learns this many times faster than the weights themselves would
# DPO only asks that one answer gains on the other. Large steps do that, too, and make both answers unlikely.
# A reward says little about each token, and what it says is partly chance.
RATIO_OF_STAGE = {"dpo": 0.1, "grpo": 0.1, "ppo": 0.1}
ROWS_OF_ANSWERS = 8  # in a forward pass over answers, which are much shorter than ROW
# AdamW changes each weight by about the learning rate. In a wide layer more of these changes add up. So the
# rate above is for layers up to this width. Beyond it the rate is smaller, in proportion.
WIDTH = 576


def gentle_defaults(flags: dict, typed: dict) -> tuple[dict, str]:
    """({flag: value}, why) if --load_from is a grown model; ({}, "") for any other model.

    flags: the value of every flag, defaults included. typed: for every flag what was typed, or None. Reads
    nothing but config.json and training.json.
    """
    folder = flags["load_from"]
    if not folder or not folder.exists():  # the stage says so
        return {}, ""
    seen, config = tokens_seen(folder), read(folder / "config.json")
    shown = tokens_shown(flags["data_path"])
    if seen is not None and seen < max(GROWN_TOKENS, GROWN_RATIO * shown * flags["epochs"]):
        return {}, ""
    chosen, row = gentle_values(flags), min(ROW, whole(config.get("max_position_embeddings")) or ROW)
    rate = chosen["learning_rate"] * min(1, WIDTH / (whole(config.get("hidden_size")) or WIDTH))
    chosen |= {"max_seq_len": row, "learning_rate": float(f"{rate:.0e}")}  # one digit: easy to type
    writes_answers = "group_size" in flags  # how many tokens a step shows is not known before
    if not writes_answers:
        chosen["batch_size"] = max(1, TOKENS_PER_STEP // (typed["max_seq_len"] or row))
    if flags["max_steps"] or writes_answers:
        chosen["epochs"] = flags["epochs"]
    elif shown:
        chosen["epochs"] = min(MAX_EPOCHS, math.ceil(MIN_STEPS * TOKENS_PER_STEP / shown))
    return chosen, "did not grow here" if seen is None else f"has seen {seen:,} tokens"


def gentle_values(flags: dict) -> dict:
    """GENTLE for a stage with these flags, over a model that is not wide."""
    ratio = (LORA_RATIO if flags.get("lora_rank") else 1) * RATIO_OF_STAGE.get(flags.get("stage"), 1)
    values = GENTLE | {"learning_rate": GENTLE["learning_rate"] * ratio}
    if "group_size" in flags:  # GRPO and PPO count answers, and need as many of them as over a young model
        values |= {"batch_size": flags["batch_size"], "micro_batch_size": ROWS_OF_ANSWERS}
    return values


def tokens_seen(folder: Path) -> int | None:
    """How many tokens the weights in a folder have learnt from, all stages together; None: nobody knows.

    training.json says it ("tokens_seen", which is null after a model from elsewhere). Older ones name the
    parent, whose training.json is read in turn.
    """
    seen = 0
    for _ in range(100):  # generations; training.json could name itself as its parent
        training = read(folder / "training.json")
        if "tokens_seen" in training:
            before = whole(training["tokens_seen"])
            return None if before is None else seen + before
        seen += whole(training.get("tokens")) or 0
        if training.get("stage") == "pretrain" and training.get("parent") is None:
            return seen
        if not isinstance(training.get("parent"), str):
            return None
        folder = Path(training["parent"])
    return None


def tokens_shown(data_path: list[Path] | None) -> float:
    """About how many tokens the files hold. The built-in data, which has no path, counts as none."""
    return sum(path.stat().st_size for path in data_path or [] if path.is_file()) / BYTES_PER_TOKEN


def read(file: Path) -> dict:
    """A JSON object; {} where the file is missing, or damaged, of which loading the model complains."""
    try:
        return read_json_if_there(file)
    except ModelError:
        return {}


def whole(value) -> int | None:
    """A value of a JSON file if it is a whole number above 0, else None: others may have written the file."""
    return value if isinstance(value, int) and value > 0 else None
