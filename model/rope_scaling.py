"""--rope_scaling yarn:4: a model reads texts longer than those in its training. A reader may skip this file.

    load_model("out/full_sft", rope_scaling="yarn:4")       # 4 times as long as the rows it was trained on
    load_model("model.pth", rope_scaling="yarn:4:512")      # ... where no file says how long those were
    load_model("out/full_sft", rope_scaling="linear:4")     # every angle divided by 4
    load_model("out/full_sft", rope_scaling="none")         # as if its config named no scaling

`rope_frequencies` in model/config.py says what each kind computes. llama3 and yarn must know how long the
texts in training were: pairs that turned often within that length keep their angle. For our own models that
is not max_position_embeddings: they have 32,768 positions, and are trained on rows of 128 or 256 tokens.
"""

import math
from dataclasses import replace
from pathlib import Path

from common.cli import split_rope_scaling
from common.errors import ModelError
from common.files import read_json_if_there
from model.config import ModelConfig, rope_frequencies


def trained_length(path: Path, config: ModelConfig) -> int | None:
    """How many tokens a text had at most in the training of the model at `path`. None if no file says so.

    A model of ours says so in training.json (max_seq_len). A folder from elsewhere was trained on as many
    tokens as it has positions; a fine-tuning of ours on shorter rows takes nothing from it. .pth and GGUF
    files may be ours or not, and say nothing.
    """
    if not path.is_dir():
        return None
    training = read_json_if_there(path / "training.json")
    arguments = training.get("arguments")
    length = arguments.get("max_seq_len") if isinstance(arguments, dict) else None
    is_from_elsewhere = not training or "tokens_seen" in training and training["tokens_seen"] is None
    if is_from_elsewhere or not isinstance(length, int) or length < 1:
        return config.max_position_embeddings if is_from_elsewhere else None
    return min(length, config.max_position_embeddings)


def scale(config: ModelConfig, text: str | None, path: Path | None = None) -> ModelConfig:
    """The config with the scaling that `text` asks for, as in yarn:4; None leaves it as it is.

    path: of the model; None for a new one.

    A model that is scaled already keeps the length that its scaling names: the angles were made for it.
    max_position_embeddings grows where the longer texts need it, and never shrinks. Raises ModelError for
    yarn and llama3 where nothing says how long the texts in training were.
    """
    if text is None:
        return config
    kind, factor, length = split_rope_scaling(text)
    if kind == "none":
        return replace(config, rope_scaling=None)
    before, scaling = config.rope_scaling or {}, {"rope_type": kind, "factor": factor}
    if not length and before:
        length = before.get("original_max_position_embeddings")
    elif not length and path is not None:
        length = trained_length(path, config)
    if kind != "linear":
        if not length:
            raise ModelError(f"--rope_scaling {text}: nothing says how long the texts were on which "
                             f"{path or 'a new model'} was trained; name the tokens: {text}:512")
        scaling["original_max_position_embeddings"] = length
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # those of Llama 3.1
    positions = max(config.max_position_embeddings, math.ceil((length or 0) * factor))
    return replace(config, rope_scaling=scaling, max_position_embeddings=positions)


def check_same_scaling(scaling: dict | None, config: ModelConfig) -> None:
    """Raises ModelError where an adapter was trained under a scaling that the model here does not have.

    An adapter that was trained under none fits a model that is scaled later.
    """
    if scaling is None:
        return
    wanted = rope_frequencies(replace(config, rope_scaling=scaling), "cpu")
    here = rope_frequencies(config, "cpu")
    if not (wanted[0] * wanted[1]).allclose(here[0] * here[1], rtol=1e-5):
        parts = (scaling.get(key) for key in ("rope_type", "factor", "original_max_position_embeddings"))
        flag = ":".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts if part)
        raise ModelError(f"trained with --rope_scaling {flag}, without which the model is here: give it, too")


def reach(path: Path, config: ModelConfig, text: str | None) -> int:
    """How many tokens the model should be shown: those of its training, or what its scaling makes of them.

    config: as `scale` made it. text: the scaling, or None. A linear scaling does not say what it was scaled
    from, so without `text` the training decides.
    """
    scaling = config.rope_scaling or {}
    original = scaling.get("original_max_position_embeddings")
    length = trained_length(path, config) or config.max_position_embeddings
    if original or text:
        length = max(length, int((original or length) * (scaling.get("factor") or 1)))
    return min(length, config.max_position_embeddings)
