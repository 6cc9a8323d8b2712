"""Models on disk: every family in both directions, every way a folder can be wrong, nothing half-written."""

import json
import os
import pickle

import pytest
import torch

import common.files
from common.errors import ModelError
from model import weights
from model.quantize import NF4Linear, quantize_model
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, load_tokenizer, save_model

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "vocab_size": 97}
FAMILIES = {  # what makes our config one of each family, and what transformers calls the same
    "Llama": ({}, {}),
    "Qwen2": ({"attention_bias": True}, {}),
    "Qwen3": ({"qk_norm": True}, {"head_dim": 8}),
    "Mistral": ({"sliding_window": 4}, {"sliding_window": 4}),
}
MIXED = ["sliding_attention", "full_attention"]
ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all set": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                      "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.3,
                      "truncate": False},
    "yarn, scale set": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                        "attention_factor": 1.2},
}


def shake(model):
    """Makes norms and biases random, too, so that a test notices if one of them is not read."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def ours(**changes) -> CausalLM:
    return shake(CausalLM(ModelConfig(**SHAPE | changes)))


def theirs(family="Llama", **changes):
    import transformers

    config = getattr(transformers, family + "Config")(**SHAPE | FAMILIES[family][1] | changes)
    return shake(getattr(transformers, family + "ForCausalLM")(config))


def open_with_transformers(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def ids():
    return torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def assert_equal_logits(left, right, tolerance=1e-4):
    with torch.no_grad():
        difference = (left(ids()).logits - right(ids()).logits).abs().max().item()
    assert difference < tolerance, difference


# --- both directions ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_transformers_opens(family, tied, tmp_path):
    model = ours(**FAMILIES[family][0], tie_word_embeddings=tied)
    save_model(model, tmp_path / "m")
    twin = open_with_transformers(tmp_path / "m")
    assert type(twin).__name__ == family + "ForCausalLM"
    assert_equal_logits(model, twin)
    assert_equal_logits(model, load_model(tmp_path / "m"), tolerance=1e-9)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_we_open(family, tied, tmp_path):
    twin = theirs(family, tie_word_embeddings=tied)
    twin.save_pretrained(tmp_path)
    assert_equal_logits(load_model(tmp_path), twin)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_dim_set_apart(family, tmp_path):
    twin = theirs(family, head_dim=16)
    twin.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (64, 32)
    assert_equal_logits(model, twin)
    save_model(model, tmp_path / "ours")
    assert_equal_logits(model, open_with_transformers(tmp_path / "ours"))


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_a_window_over_biases_and_norms(family, tmp_path):
    model = ours(**FAMILIES[family][0], sliding_window=4)
    save_model(model, tmp_path / "m")
    assert_equal_logits(model, open_with_transformers(tmp_path / "m"))
    assert load_model(tmp_path / "m").config == model.config


@pytest.mark.parametrize(("family", "switches"), [("Qwen2", {"use_sliding_window": True}), ("Ministral", {}),
                                                  ("Qwen3", {"use_sliding_window": True})])
@pytest.mark.parametrize("kinds", [MIXED, MIXED[::-1]])
def test_a_window_in_some_layers(family, switches, kinds, tmp_path):
    settings, changes = FAMILIES.get(family, ({}, {"head_dim": 8}))
    model = ours(**settings, sliding_window=4, layer_types=kinds)
    save_model(model, tmp_path / "ours")
    twin = open_with_transformers(tmp_path / "ours")
    assert type(twin).__name__ == family + "ForCausalLM"
    assert_equal_logits(model, twin)
    assert load_model(tmp_path / "ours").config == model.config
    for other in (MIXED[:1] * 2, MIXED[1:] * 2):  # the test can see which layers have the window
        model.config.layer_types = other
        with torch.no_grad():
            assert (model(ids()).logits - twin(ids()).logits).abs().max() > 0.01

    import transformers

    config = getattr(transformers, family + "Config")(**SHAPE | changes | switches | {
        "sliding_window": 4, "layer_types": kinds})
    twin = shake(getattr(transformers, family + "ForCausalLM")(config))
    twin.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.config.windows == [4 if kind == MIXED[0] else None for kind in kinds]
    assert_equal_logits(model, twin)


def test_qwen_names_its_first_layers_without_a_window(tmp_path):
    twin = theirs("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    twin.save_pretrained(tmp_path)
    change_config(tmp_path, layer_types=...)  # as files of older versions
    model = load_model(tmp_path)
    assert model.config.windows == [None, 4]
    assert_equal_logits(model, twin)


def test_layer_types_of_one_kind_are_no_kinds():
    for kinds, window in ((MIXED[:1] * 2, 4), (MIXED[1:] * 2, None), (None, 4)):
        config = ModelConfig(**SHAPE, sliding_window=4, layer_types=kinds)
        assert (config.layer_types, config.windows) == (None, [window] * 2)
    assert ModelConfig(**SHAPE, sliding_window=4, full_attention_every=2).layer_types == MIXED
    for kinds in (2, MIXED * 2, "full_attention", [["full_attention"], "full_attention"]):
        with pytest.raises(ModelError, match="layer_types must be"):
            ModelConfig(**SHAPE, sliding_window=4, layer_types=kinds)
    with pytest.raises(ModelError, match="need a sliding_window"):
        ModelConfig(**SHAPE, layer_types=MIXED)
    for number in (0, 1, 3):
        with pytest.raises(ModelError, match="full_attention_every must be from 2 to 2, the"):
            ModelConfig(**SHAPE, sliding_window=4, full_attention_every=number)


@pytest.mark.parametrize("tied", [True, False])
def test_shards(tied, tmp_path):
    twin = theirs("Qwen3", tie_word_embeddings=tied)
    twin.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_model(tmp_path)
    assert_equal_logits(model, twin)
    save_model(model, tmp_path)  # the shards must not stay beside the new file
    assert [file.name for file in tmp_path.glob("*safetensors*")] == ["model.safetensors"]
    assert_equal_logits(open_with_transformers(tmp_path), twin)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_settings_in_both_spellings(rope, tmp_path):
    parameters = {"rope_type": "default", "rope_theta": 5000.0} | (ROPES[rope] or {})
    twin = theirs("Llama", rope_parameters=dict(parameters), max_position_embeddings=64)
    twin.save_pretrained(tmp_path / "new")
    model = load_model(tmp_path / "new")
    assert_equal_logits(model, twin)

    save_model(model, tmp_path / "ours")  # writes both spellings; each of them alone must be enough
    config = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    for spelling in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        left = {key: value for key, value in config.items() if not key.startswith("rope_") or key in spelling}
        (tmp_path / "ours" / "config.json").write_text(json.dumps(left), encoding="utf-8")
        assert_equal_logits(load_model(tmp_path / "ours"), twin)
        assert_equal_logits(open_with_transformers(tmp_path / "ours"), twin)


def test_the_old_key_type_for_rotary_settings(tmp_path):
    model = ours(rope_scaling={"type": "linear", "factor": 2.0})
    save_model(model, tmp_path / "m")
    assert_equal_logits(model, open_with_transformers(tmp_path / "m"))


def test_old_files_with_extras(tmp_path):
    """Old files also hold rotary tables, and the tied head beside the embedding."""
    from safetensors.torch import load_file, save_file

    model = ours()
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal_logits(model, load_model(tmp_path))


def test_types(tmp_path):
    save_model(ours().to(torch.bfloat16), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert next(load_model(tmp_path).parameters()).dtype == torch.float32
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- legacy files ---


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_legacy_state_dict(prefix, qk_norm, tied, tmp_path):
    heads = 4 if qk_norm else 8  # without q_norm to tell, MiniMind's eight heads are assumed
    model = ours(hidden_size=64, num_attention_heads=heads, qk_norm=qk_norm, tie_word_embeddings=tied,
                 rms_norm_eps=1e-6 if qk_norm else 1e-5)
    state = {prefix + name: tensor.half() for name, tensor in model.state_dict().items()}
    state[prefix + "model.freqs_cos"] = state["freqs_sin"] = torch.ones(8, 4)
    torch.save(state, tmp_path / "x.pth")
    read = load_model(tmp_path / "x.pth")
    assert read.config == model.config
    assert_equal_logits(read, model, tolerance=2e-2)  # half precision in the file
    assert_equal_logits(read, model.half().float(), tolerance=1e-6)


def test_legacy_weights_inside_a_training_state(tmp_path):
    model = ours(hidden_size=64, num_attention_heads=8, rms_norm_eps=1e-5)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "x.pth")
    assert_equal_logits(load_model(tmp_path / "x.pth"), model, tolerance=1e-6)


def test_legacy_file_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken in"),)

    torch.save({"a": Evil()}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("x.pth", "y.pth"):
        with pytest.raises(ModelError, match="refused"):
            load_model(tmp_path / name)
    assert not (tmp_path / "broken in").exists()


@pytest.mark.parametrize(("state", "words"), [
    ([1, 2], "state dict"),
    ({"a": 1}, "state dict"),
    ({"a": torch.ones(1)}, "model.embed_tokens.weight"),
    ({name: tensor for name, tensor in CausalLM(ModelConfig(**SHAPE | {"head_dim": 6})).state_dict().items()}
     | {"model.layers.0.self_attn.k_proj.weight": torch.ones(7, 32)}, "can't tell the heads"),
    (CausalLM(ModelConfig(**SHAPE | {"num_attention_heads": 8})).state_dict()
     | {"model.layers.1.mlp.experts.0.up_proj.weight": torch.ones(2)}, "unknown model.layers.1.mlp.experts"),
])
def test_legacy_files_that_are_something_else(state, words, tmp_path):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path / "x.pth")


def test_legacy_file_cut_off(tmp_path):
    torch.save(ours().state_dict(), tmp_path / "x.pth")
    for size in (0, 10, 5000):
        (tmp_path / "y.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:size])
        with pytest.raises(ModelError, match="y.pth"):
            load_model(tmp_path / "y.pth")


# --- what can be wrong with a folder ---


@pytest.fixture
def folder(tmp_path):
    save_model(ours(), tmp_path / "m")
    return tmp_path / "m"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def assert_refused(path, words):
    with pytest.raises(ModelError, match=words) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "words"), [
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel, only LlamaForCausalLM, Mistral"),
    ({"architectures": ...}, "none named"),
    ({"hidden_size": ...}, "hidden_size is missing"),
    ({"hidden_size": 64}, r"\[97, 32\], the config asks for \[97, 64\]"),
    ({"vocab_size": 98}, "model.embed_tokens.weight"),
    ({"num_key_value_heads": 1}, "k_proj"),
    ({"num_key_value_heads": 3}, "config.json: num_attention_heads"),
    ({"num_hidden_layers": 3}, "has no model.layers.2.input_layernorm.weight and 8"),
    ({"num_hidden_layers": 1}, "unknown model.layers.1.input_layernorm.weight and 8"),
    ({"architectures": ["Qwen3ForCausalLM"]}, "has no model.layers.0.self_attn.k_norm.weight"),
    ({"tie_word_embeddings": False}, "has no lm_head.weight"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"mlp_bias": True}, "biases"),
    ({"attention_bias": True}, "biases"),
    ({"quantization_config": {"bits": 4}}, "only bitsandbytes' NF4"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "only bitsandbytes' NF4"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True,
                              "bnb_4bit_quant_type": "fp4"}}, "only bitsandbytes' NF4"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "rope_scaling": ...}, "between layers"),
    ({"architectures": ["MistralForCausalLM"], "layer_types": MIXED}, "MinistralForCausalLM"),
    ({"architectures": ["MinistralForCausalLM"], "sliding_window": 4, "layer_types": MIXED[:1]},
     "1 layers, but there are 2"),
    ({"architectures": ["MinistralForCausalLM"], "sliding_window": 4,
      "layer_types": ["linear_attention"] * 2}, "full_attention and sliding_attention"),
    ({"architectures": ["MinistralForCausalLM"], "sliding_window": 4, "layer_types": 10**9}, "layer_types"),
])
def test_configs_that_do_not_fit(folder, changes, words):
    change_config(folder, **changes)
    assert_refused(folder, words)


def test_missing_things(folder, tmp_path):
    assert_refused(tmp_path / "nowhere", "no model at .*nowhere")
    assert_refused(tmp_path, "no config.json in")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "out/base"}')
    words = r"holds an adapter and no model: name the model that it changes \(out/base\)"
    assert_refused(tmp_path, words)
    with pytest.raises(ModelError, match=words):
        load_tokenizer(tmp_path)
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "no model.safetensors in")
    with pytest.raises(ModelError, match="no tokenizer in"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_damaged_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert_refused(folder, "config.json")


@pytest.mark.parametrize("size", [0, 6, 100, -1])
def test_weights_cut_off(folder, size):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:size])
    assert_refused(folder, "damaged or cut off")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "..\\x", "C:x", ".."])
def test_an_index_stays_in_its_folder(folder, name):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_refused(folder, "outside of the folder")


def test_damaged_index(folder):
    (folder / "model.safetensors").unlink()
    for text, words in (('{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
                        ('{"weight_map": {"a": 1}}', "weight_map"), ("{}", "weight_map"), ("{", "JSON")):
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        assert_refused(folder, words)


def test_a_head_that_contradicts_the_tie(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(97, 32)}, folder / "model.safetensors")
    assert_refused(folder, "tie_word_embeddings")


def test_weights_that_are_no_floats(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert_refused(folder, "int8")


# --- 4-bit weights ---

# Multiples of 64: bitsandbytes' CPU kernels misread rows that end inside a block.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}


def quantize_with_transformers(plain, folder, double_quant, dtype):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                  bnb_4bit_use_double_quant=double_quant)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=dtype)
    model.save_pretrained(folder)
    return model.train()  # in eval() bitsandbytes repacks the weights for a bfloat16 kernel


def read_tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("double_quant", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_a_quantized_model_goes_both_ways(family, double_quant, dtype, tmp_path):
    plain = ours(**WIDE, **FAMILIES[family][0], tie_word_embeddings=family == "Qwen2")
    save_model(plain, tmp_path / "plain")
    twin = quantize_with_transformers(tmp_path / "plain", tmp_path / "theirs", double_quant, dtype)
    read = load_model(tmp_path / "theirs")
    assert sum(isinstance(module, NF4Linear) for module in read.modules()) == 7
    if dtype == torch.float32:
        assert_equal_logits(read, twin)
    # What we write equals what they wrote, name for name and bit for bit.
    save_model(read, tmp_path / "again")
    before, after = read_tensors(tmp_path / "theirs"), read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if ".quant_state." in name:  # its "dtype" is the type of the weights before
            before_state, after_state = (json.loads(bytes(t.tolist())) for t in (tensor, after[name]))
            assert before_state | {"dtype": 0} == after_state | {"dtype": 0}
        elif tensor.dtype == torch.uint8 or ".weight." in name:
            assert torch.equal(tensor, after[name]), name
    # What we quantized opens there.
    if dtype == torch.float32:
        quantize_model(plain, double_quant)
        save_model(plain, tmp_path / "ours")
        assert_equal_logits(load_model(tmp_path / "ours"), plain, tolerance=1e-9)
        assert_equal_logits(open_with_transformers(tmp_path / "ours").train(), plain)


@pytest.fixture
def quantized_folder(tmp_path):
    save_model(quantize_model(ours(num_hidden_layers=1)), tmp_path / "m")
    return tmp_path / "m"


STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(("changes", "words"), [
    ({"up_proj.weight": None}, "up_proj: its 4-bit weight is incomplete"),
    ({"up_proj.weight.absmax": None}, "up_proj: its 4-bit weight is incomplete"),
    ({"up_proj.weight.nested_absmax": None}, "up_proj: its 4-bit weight is incomplete"),
    ({"up_proj.weight.quant_state.bitsandbytes__nf4": None}, "unknown .*up_proj.weight.absmax"),
    ({"up_proj.weight.quant_state.bitsandbytes__nf4": as_bytes("{")}, "incomplete or damaged"),
    ({"up_proj.weight.quant_state.bitsandbytes__nf4": as_bytes("[1]")}, "incomplete or damaged"),
    ({"up_proj.weight.quant_state.bitsandbytes__nf4": torch.ones(3)}, "incomplete or damaged"),
    ({"up_proj.weight.quant_state.bitsandbytes__fp4": as_bytes("{}")}, "bitsandbytes__fp4; only NF4"),
    ({"other.weight.quant_state.bitsandbytes__nf4": as_bytes("{}")}, "other is quantized, but is no linear"),
    ({"up_proj.weight": torch.zeros(5, 1, dtype=torch.uint8)}, r"codes is \[5\], .* asks for \[768\]"),
    ({"up_proj.weight.absmax": torch.zeros(24)}, "absmax holds torch.float32"),
    ({"up_proj.weight.quant_map": torch.zeros(16)}, "quant_map its own, not standard"),
    ({"up_proj.weight.quant_map": torch.zeros(15)}, "quant_map its own, not standard"),
    ({"blocksize": 128}, "blocksize 128, not 64"),
    ({"nested_blocksize": 64}, "nested_blocksize 64, not 256"),
    ({"shape": [1, 2]}, r"shape \[1, 2\], not \[48, 32\]"),
])
def test_wrong_or_damaged_4_bit_weights(quantized_folder, changes, words):
    from safetensors.torch import save_file

    tensors = read_tensors(quantized_folder)
    for name, value in changes.items():
        if "weight" not in name:
            state = json.loads(bytes(tensors[STATE].tolist())) | {name: value}
            name, value = "up_proj.weight.quant_state.bitsandbytes__nf4", as_bytes(json.dumps(state))
        tensors["model.layers.0.mlp." + name] = value
    save_file({k: v for k, v in tensors.items() if v is not None}, quantized_folder / "model.safetensors")
    assert_refused(quantized_folder, words)


# --- saving ---


def test_other_files_of_a_run_survive(folder):
    (folder / "checkpoints" / "step_1").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    model = ours(num_hidden_layers=1)
    save_model(model, folder, training={"step": 3, "data": folder})
    assert (folder / "metrics.jsonl").exists() and (folder / "checkpoints" / "step_1").is_dir()
    assert json.loads((folder / "training.json").read_text(encoding="utf-8"))["step"] == 3
    assert_equal_logits(load_model(folder), model, tolerance=1e-9)
    assert [path.name for path in folder.parent.iterdir()] == ["m"]  # no temporary folder is left


@pytest.mark.parametrize("fails", ["save_file", "json_text"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, fails, exists):
    old = ours()
    if exists:
        save_model(old, tmp_path / "m")

    def fail(*arguments, **settings):
        raise OSError("disk full")

    where = weights.safetensors.torch if fails == "save_file" else common.files
    monkeypatch.setattr(where, fails, fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(ours(num_hidden_layers=1), tmp_path / "m")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == (["m"] if exists else [])
    if exists:
        assert_equal_logits(load_model(tmp_path / "m"), old, tolerance=1e-9)


def test_training_json_comes_last(folder, monkeypatch):
    order, replace = [], os.replace

    def record(source, target):
        if target.parent == folder:  # the temporary folder is removed by a rename, too
            order.append(target.name)
        replace(source, target)

    monkeypatch.setattr(common.files.os, "replace", record)
    save_model(ours(), folder, training={})
    assert order == ["generation_config.json", "model.safetensors", "config.json", "training.json"]


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_kill_while_files_are_replaced_never_pairs_old_with_new(folder, monkeypatch, moved):
    replace, left = os.replace, iter(range(moved))

    def die(a, b):
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(a, b)

    new = ours(rope_theta=123.0)  # the shapes are the same, and only the config differs
    monkeypatch.setattr(common.files.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_model(new, folder, training={})
    monkeypatch.undo()
    if moved < 3:
        with pytest.raises(ModelError, match=r"no config.json"):
            load_model(folder)
    else:
        assert_equal_logits(load_model(folder), new, tolerance=1e-9)
    save_model(new, folder)
    assert_equal_logits(load_model(folder), new, tolerance=1e-9)


def test_adapters_are_not_saved_as_a_plain_model(tmp_path):
    model = ours()
    model.model.layers[0].mlp.up_proj.lora = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="merge adapters"):
        save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        save_model(ours(), tmp_path / "file")


def test_tokenizer_goes_along(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": 0, "<|im_end|>": 1, "hello": 2, "<pad>": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "hello")),
                                        eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    save_model(ours(), tmp_path / "m", tokenizer)
    read = load_tokenizer(tmp_path / "m")
    assert read.get_vocab() == words and read.chat_template == tokenizer.chat_template
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"bos_token_id": None, "eos_token_id": [1, 0], "pad_token_id": 3,
                          "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    twin = open_with_transformers(tmp_path / "m")
    assert twin.generation_config.eos_token_id == [1, 0]
    (tmp_path / "m" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="can't be read"):
        load_tokenizer(tmp_path / "m")


@pytest.mark.parametrize("before", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_that_wrappers_left_in_a_folder(tmp_path, before):
    """transformers would make new weights for all of them."""
    from safetensors.torch import load_file, save_file

    model = ours()
    save_model(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({before + name: tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    right = model.state_dict()
    assert all(torch.equal(tensor, right[name]) for name, tensor in load_model(tmp_path).state_dict().items())
