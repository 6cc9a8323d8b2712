"""--rope_scaling: equal to transformers, by the length in training, and refused where nobody knows it."""

import json
import re
from pathlib import Path

import pytest
import torch

from common.cli import split_rope_scaling
from common.errors import ModelError
from model.adapters import Adapters
from model.config import ModelConfig
from model.lora import apply_lora, load_lora, lora_parameters, save_lora
from model.rope_scaling import reach, scale
from model.transformer import CausalLM
from model.weights import load_model, save_model

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 48, "vocab_size": 97, "rope_theta": 1e4, "initializer_range": 0.2}
TRAINED_ON_16 = {"tokens_seen": 9, "arguments": {"max_seq_len": 16}}
IDS = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of ours that was trained on rows of 16 tokens."""
    return saved(tmp_path_factory.mktemp("models") / "m", TRAINED_ON_16)


def saved(path, training=None, **changes):
    torch.manual_seed(0)
    save_model(CausalLM(ModelConfig(**SHAPE | changes)), path, training=training)
    return path


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("text", "expected"), [
    ("linear:4", {"rope_type": "linear", "factor": 4.0}),
    ("yarn:4", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ("yarn:2.5:32", {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 32}),
    ("llama3:8", {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16,
                  "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
])
def test_a_scaled_model_opens_in_transformers_with_equal_logits(text, expected, qk_norm, tmp_path):
    from transformers import AutoModelForCausalLM

    path = saved(tmp_path / "m", TRAINED_ON_16, qk_norm=qk_norm)
    model = load_model(path, rope_scaling=text)
    assert model.config.rope_scaling == expected
    assert (logits(model) - logits(load_model(path))).abs().max() > 0.01  # the scaling changes something
    save_model(model, tmp_path / "scaled")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "scaled")
    assert (logits(model) - logits(twin)).abs().max() < 1e-4
    assert torch.equal(logits(load_model(tmp_path / "scaled")), logits(model))
    assert torch.equal(logits(load_model(tmp_path / "scaled", rope_scaling="none")), logits(load_model(path)))


@pytest.mark.parametrize(("training", "length"), [
    (None, 24),  # a model from elsewhere was trained on as many tokens as it has positions
    ({"tokens_seen": None, "arguments": {"max_seq_len": 16}}, 24),  # ... also after a fine-tuning of ours
    (TRAINED_ON_16, 16),
    ({"tokens_seen": 9, "arguments": {"max_seq_len": 99}}, 24),
])
def test_how_long_the_texts_in_training_were(training, length, tmp_path):
    path = saved(tmp_path / "m", training, max_position_embeddings=24)
    config = load_model(path, rope_scaling="yarn:4").config
    assert config.rope_scaling["original_max_position_embeddings"] == length
    assert config.max_position_embeddings == 4 * length  # more than the 24 that there were
    assert reach(path, config, "yarn:4") == 4 * length
    assert reach(path, load_model(path).config, None) == length


def test_what_no_file_says_must_be_said(folder, tmp_path):
    torch.save(load_model(folder).state_dict(), tmp_path / "m.pth")
    nothing = saved(tmp_path / "m", {"tokens_seen": 9, "arguments": {}})
    for path in (tmp_path / "m.pth", nothing):
        with pytest.raises(ModelError, match="name the tokens: yarn:4:512"):
            load_model(path, rope_scaling="yarn:4")
        assert load_model(path, rope_scaling="yarn:4:16").config.rope_scaling["factor"] == 4
        config = load_model(path, rope_scaling="linear:4").config
        assert (config.rope_scaling["factor"], reach(path, config, "linear:4")) == (4, 32768)
    config = load_model(folder, rope_scaling="linear:4").config
    assert (reach(folder, config, "linear:4"), reach(folder, config, None)) == (64, 16)
    with pytest.raises(ModelError, match="a new model was trained"):
        scale(ModelConfig(**SHAPE), "llama3:8")


def test_a_scaled_model_keeps_the_length_that_its_angles_were_made_for(folder, tmp_path):
    model = load_model(folder, rope_scaling="yarn:4")
    save_model(model, tmp_path / "m", training={"tokens_seen": 9, "arguments": {"max_seq_len": 64}})
    config = load_model(tmp_path / "m", rope_scaling="yarn:8").config
    assert config.rope_scaling["original_max_position_embeddings"] == 16
    assert (reach(tmp_path / "m", config, "yarn:8"), reach(tmp_path / "m", model.config, None)) == (128, 64)


def test_every_command_that_loads_a_model_has_the_flag():
    scripts = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "trainer").glob("train_*.py")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "eval_model.py", *scripts]}
    loading = [name for name, text in texts.items()
               if re.search(r"\b(load_model|load_weights|ChatModel|Engine)\(", text)]
    assert len(loading) > 12
    hands_on = ("rope_scaling", "load_weights(args.load_from, ranks, **vars(args))")  # the latter: all flags
    assert [name for name in loading if not any(words in texts[name] for words in hands_on)] == []


@pytest.mark.parametrize("text", ["", "yarn", "yarn:", "yarn:1", "yarn:x", "yarn:nan", "yarn:inf", "yarn:4:0",
                                  "yarn:4:x", "yarn:4:5:6", "linear:4:16", "dynamic:4", "none:4", ":4"])
def test_no_scaling(text):
    with pytest.raises((ValueError, IndexError)):
        split_rope_scaling(text)


def test_an_adapter_knows_the_scaling_it_was_trained_under(folder, tmp_path):
    def adapter(name, **options):
        model = load_model(folder, **options)
        apply_lora(model, rank=2)
        for parameter in lora_parameters(model):
            torch.nn.init.normal_(parameter, std=0.3)
        save_lora(model, tmp_path / name, base=folder)
        return logits(model)

    scaled = adapter("scaled", rope_scaling="yarn:4")
    adapter("plain")
    for other in (None, "yarn:8", "linear:4"):
        with pytest.raises(ModelError, match="scaled: trained with --rope_scaling yarn:4:16"):
            Adapters(load_model(folder, rope_scaling=other)).load(tmp_path / "scaled")
    model = load_model(folder, rope_scaling="yarn:4")
    load_lora(model, tmp_path / "scaled")
    assert torch.equal(logits(model), scaled)
    # An adapter of the model without scaling is no mistake: longer texts are what the scaling is for.
    Adapters(load_model(folder, rope_scaling="yarn:4")).load(tmp_path / "plain")


def test_peft_reads_an_adapter_over_a_scaled_model(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = load_model(folder, rope_scaling="yarn:4")
    save_model(model, tmp_path / "base")
    apply_lora(model, rank=2)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    save_lora(model, tmp_path / "a", base=tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "a")
    assert (logits(theirs) - logits(model)).abs().max() < 1e-4
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    assert config["rope_scaling"]["original_max_position_embeddings"] == 16
