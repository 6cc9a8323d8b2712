"""The types in config.json: whatever a person may have typed wrongly is one line, and what transformers
writes passes."""

import ast
import inspect
import json

import pytest

from common.errors import ModelError
from model import config_file
from model.config import rope_frequencies
from model.config_file import TYPES, config_from_dict, config_to_dict
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, save_model

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "vocab_size": 97}
RAW = config_to_dict(ModelConfig(**SHAPE))
KINDS = {name: says for says, (_, names) in TYPES.items() for name in names.split()}
ROTARY = ("factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor mscale "
          "mscale_all_dim truncate original_max_position_embeddings rope_type type").split()
# Values, as JSON, and for each kind those that are right
ODD = ('"4"', '"no"', "4", "4.5", "true", "[]", '["x"]', "[true]", '{"a": 1}')
RIGHT = {"a whole number": ["4"], "a number": ["4", "4.5"], "true or false": ["true"],
         "a text": ['"4"', '"no"'], "an object": ['{"a": 1}'], "a list of texts": ["[]", '["x"]'],
         "a list of whole numbers": ["[]"], "a whole number or a list of them": ["4", "[]"],
         "a list of full_attention and sliding_attention": ["[]"]}


@pytest.mark.parametrize("name", KINDS)
def test_every_other_type_is_refused_by_its_name(name):
    says, passed = KINDS[name], []
    for text in ODD:
        change = {name: json.loads(text)}
        if name in ROTARY:
            change = {"rope_scaling": {"rope_type": "linear", "factor": 2.0} | change}
        try:
            config_from_dict(RAW | change)
            passed.append(text)
        except ModelError as error:  # a value of the right type may be wrong in itself
            if not str(error).startswith(f"{name} must be {says}, not {json.loads(text)!r}"):
                passed.append(text)
    assert passed == RIGHT[says]


def test_null_is_a_setting_that_is_not_made():
    raw = RAW | {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 30, "use_sliding_window": True,
                 "sliding_window": 8}
    assert config_from_dict(raw | {"max_window_layers": None}) == config_from_dict(raw)
    assert config_from_dict(raw).windows == [None] * 28 + [8, 8]


def test_every_key_that_is_read_has_a_type():
    """The keys are collected from the code that reads config.json."""
    keys = set()
    for function in ("config_from_dict", "_experts", "_windows"):
        for node in ast.walk(ast.parse(inspect.getsource(getattr(config_file, function)))):
            gets = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "pop")
            key = node.args[0] if gets else node.slice if isinstance(node, ast.Subscript) else None
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                keys.add(key.value)
    assert len(keys) > 25 and keys - {"bnb_4bit_quant_type", "quant_method"} <= KINDS.keys()


LINES = [  # what is changed, the complaint, and whether transformers 5 refuses it, too
    ({"layer_types": ["x"]},
     "layer_types must be a list of full_attention and sliding_attention, not ['x']", True),
    ({"layer_types": ["full_attention"] * 3},
     "layer_types names the kinds of 3 layers, but there are 2 layers", True),
    ({"sliding_window": "a"}, "sliding_window must be a whole number, not 'a'", False),
    ({"use_sliding_window": "false"}, "use_sliding_window must be true or false, not 'false'", False),
    ({"rope_scaling": 5}, "rope_scaling must be an object, not 5", True),
    ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta must be a number, not '1e6'", False),
    ({"architectures": "LlamaForCausalLM"},
     "architectures must be a list of texts, not 'LlamaForCausalLM'", False),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'", True),
    ({"eos_token_id": "</s>"}, "eos_token_id must be a whole number or a list of them, not '</s>'", True),
]


@pytest.mark.parametrize(("changes", "line", "refused_by_transformers"), LINES, ids=str)
def test_a_folder_is_refused_in_one_line(changes, line, refused_by_transformers, tmp_path):
    from transformers import AutoConfig

    save_model(CausalLM(ModelConfig(**SHAPE)), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW | changes), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'}: {line}"
    if refused_by_transformers:
        with pytest.raises(Exception):  # noqa: B017 (of several kinds, from the library that checks its types)
            AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", [name.removesuffix("ForCausalLM") for name in config_file.ARCHITECTURES])
def test_what_transformers_writes_passes(family, tmp_path):
    import transformers

    config = getattr(transformers, f"{family}Config")(**SHAPE, architectures=[f"{family}ForCausalLM"])
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert config_from_dict(raw).hidden_size == 32
    unset = dict.fromkeys(("pad_token_id", "rope_scaling", "quantization_config", "router_jitter_noise"))
    assert config_from_dict(raw | unset) == config_from_dict(raw)


@pytest.mark.parametrize("family", [name.removesuffix("ForCausalLM") for name in config_file.ARCHITECTURES])
def test_a_missing_key_has_the_default_of_its_class(family):
    """Old and hand-made files name little. What they leave out is what transformers would fill in."""
    import transformers

    experts = {"num_experts_per_tok": 2, "num_local_experts": 4, "moe_intermediate_size": 24}
    short = SHAPE | (experts if family in ("Mixtral", "Qwen3Moe") else {})
    short |= {"architectures": [f"{family}ForCausalLM"], "head_dim": 8, "max_position_embeddings": 64,
              "layer_types": None}
    full = getattr(transformers, f"{family}Config")(**short).to_dict()
    unlike = {"initializer_range", "router_aux_loss_coef"}  # a trained model computes the same with any
    ours, theirs = (vars(config_from_dict(raw)) for raw in (short, full | {"layer_types": None}))
    assert {key for key in ours if ours[key] != theirs[key]} <= unlike


def test_rotary_settings_that_stand_in_two_places():
    """transformers gives a length beside the rotary settings precedence over one within them."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    raw = {key: value for key, value in RAW.items() if not key.startswith("rope")}
    raw |= {"max_position_embeddings": 64, "head_dim": 32}
    for inner in ({}, {"original_max_position_embeddings": 32}):
        change = {"rope_scaling": scaling | inner, "original_max_position_embeddings": 16}
        theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(json.loads(json.dumps(raw | change)))).inv_freq
        ours = config_from_dict(raw | change)
        assert rope_frequencies(ours, "cpu")[0].allclose(theirs)
        assert ours.rope_scaling["original_max_position_embeddings"] == 16
    with pytest.raises(ModelError, match="^rope_parameters and rope_scaling differ in factor: keep one of"):
        config_from_dict(raw | {"rope_scaling": scaling, "rope_parameters": scaling | {"factor": 8.0}})
    for parameters in ({"rope_type": "default"}, scaling):  # the scaling was added by hand, or both agree
        both = {"rope_scaling": scaling, "rope_parameters": parameters | {"rope_theta": 5000.0}}
        assert config_from_dict(raw | both).rope_theta == 5000.0
        assert config_from_dict(raw | both).rope_scaling["factor"] == 4.0
