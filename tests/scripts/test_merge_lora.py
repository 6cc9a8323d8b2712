"""merge_lora.py: the adapted model's logits from a directory that knows nothing of LoRA."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import ModelError
from model.lora import LoRA, apply_lora, load_lora, lora_parameters, save_lora
from model.quantize import NF4Linear, dequantize_model, quantize_model
from model.rope_scaling import reach
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, load_tokenizer, save_model
from scripts import merge_lora

SCRIPT = Path(merge_lora.__file__)
SHAPE = dict(vocab_size=6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, initializer_range=0.1)
IDS = torch.randint(0, 6400, (2, 9), generator=torch.Generator().manual_seed(0))


def adapter(model, path, seed=1, targets="all-linear"):
    apply_lora(model, rank=4, alpha=8, target_modules=targets)
    torch.manual_seed(seed)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    save_lora(model, path)


@pytest.fixture
def home(tmp_path):
    """base/ with the real tokenizer, and lora/ with an adapter of it."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**SHAPE))
    tokenizer = load_tokenizer(SCRIPT.parents[1] / "model" / "tokenizer")
    save_model(model, tmp_path / "base", tokenizer,
               training={"stage": "pretrain", "arguments": {"max_seq_len": 48}})
    adapter(model, tmp_path / "lora")
    return tmp_path


def merge(home, *flags, lora="lora"):
    flags = ["--load_from", home / "base", "--lora", home / lora, "--out_dir", home / "merged", *flags]
    merge_lora.main(merge_lora.parse_args([str(flag) for flag in flags]))
    return load_model(home / "merged")


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def adapted(home, lora="lora"):
    model = load_model(home / "base")
    load_lora(model, home / lora)
    return logits(model)


def test_merged_logits_equal_the_adapted_models_here_and_in_transformers(home):
    merged, expected = merge(home), adapted(home)
    assert (logits(load_model(home / "base")) - expected).abs().max() > 0.1
    assert (logits(merged) - expected).abs().max() < 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(home / "merged").eval()
    assert (logits(theirs) - expected).abs().max() < 1e-5


def test_an_adapter_of_a_scaled_base_is_merged_into_that_base_alone(home):
    scaled = load_model(home / "base", rope_scaling="yarn:4")
    adapter(scaled, home / "long")
    with pytest.raises(ModelError, match="trained with --rope_scaling yarn:4:48"):
        merge(home, lora="long")
    merged = merge(home, "--rope_scaling", "yarn:4", lora="long")
    assert (logits(merged) - logits(scaled)).abs().max() < 1e-5
    assert merged.config.rope_scaling == scaled.config.rope_scaling
    assert reach(home / "merged", merged.config, None) == 4 * 48


def test_nothing_of_lora_is_left_and_the_folder_is_complete(home):
    merged = merge(home)
    assert not any(isinstance(module, LoRA) for module in merged.modules())
    assert merged.state_dict().keys() == load_model(home / "base").state_dict().keys()
    ours, theirs = (AutoTokenizer.from_pretrained(home / name) for name in ("merged", "base"))
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template is not None
    training = json.loads((home / "merged" / "training.json").read_text())
    # eval_model.py speaks plain text with a pretrained model, and keeps within max_seq_len
    assert training["stage"] == "merge_lora" and training["arguments"]["max_seq_len"] == 48


def test_an_adapter_that_peft_made(home):
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    theirs = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"])).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(home / "theirs")
    assert (logits(merge(home, lora="theirs")) - logits(theirs)).abs().max() < 1e-5


def test_several_adapters_are_summed_with_their_weights_as_in_peft(home):
    adapter(load_model(home / "base"), home / "more", seed=2)
    theirs = AutoModelForCausalLM.from_pretrained(home / "base")
    theirs = PeftModel.from_pretrained(theirs, home / "lora", "a")
    theirs.load_adapter(home / "more", "b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, -0.5], "both", combination_type="cat")
    theirs.set_adapter("both")
    merged = merge(home, "--lora", home / "lora", home / "more", "--weights", 0.7, -0.5)
    assert (logits(merged) - logits(theirs.eval())).abs().max() < 1e-5
    assert (logits(merged) - adapted(home)).abs().max() > 0.1


def test_the_base_decides_the_precision_and_the_rounding_is_told(home, capsys):
    merge(home)
    assert "rounded" not in capsys.readouterr().out
    half = load_model(home / "base", dtype=torch.bfloat16)
    save_model(half, home / "base", load_tokenizer(home / "base"))
    merge(home, "--overwrite")
    out = capsys.readouterr().out
    assert json.loads((home / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    lost = float(out.split("rounded to bfloat16: by ")[1].split("%")[0]) / 100
    exact = merge(home, "--overwrite", "--dtype", "float32").state_dict()
    base = load_model(home / "base").state_dict()
    names = [name for name in base if "proj" in name]
    rounding = sum((exact[name] - exact[name].bfloat16()).square().sum() for name in names).sqrt()
    update = sum((exact[name] - base[name]).square().sum() for name in names).sqrt()
    assert 0 < lost == pytest.approx((rounding / update).item(), abs=6e-4)


@pytest.fixture
def over_4_bits(home):
    """The base in 4 bits with an adapter. In the folders: quantized/ and qlora/."""
    model = quantize_model(load_model(home / "base"))
    save_model(model, home / "quantized", load_tokenizer(home / "base"))
    adapter(model, home / "qlora")
    (home / "qlora" / "training.json").write_text('{"arguments": {"quantize": "nf4"}}')
    return model


def test_a_quantized_base_is_dequantized_and_what_it_lost_is_told(home, over_4_bits, capsys):
    base = load_model(home / "base").state_dict()
    rounded = dequantize_model(load_model(home / "quantized")).state_dict()
    names = [name for name in base if "proj" in name]
    lost = sum((rounded[name] - base[name]).square().sum() for name in names)
    lost = (lost / sum(base[name].square().sum() for name in names)).sqrt().item()
    assert 0.05 < lost < 0.15
    expected = logits(over_4_bits)
    told = f"by {lost:.2%} of"
    for base, flags, words in (("quantized", [], "--original DIR shows"),
                               ("quantized", ["--original", home / "base"], told),
                               ("base", [], told)):  # quantized here, as qlora/training.json says
        merged = merge(home, "--load_from", home / base, *flags, "--overwrite", lora="qlora")
        assert words in capsys.readouterr().out
        assert (logits(merged) - expected).abs().max() < 1e-5
        assert all(type(module) is not NF4Linear for module in merged.modules())


def test_the_unquantized_base_can_be_chosen_and_the_quantized_one(home, over_4_bits, capsys):
    exact = adapted(home)
    (home / "lora" / "training.json").write_text('{"arguments": {"quantize": "nf4"}}')
    assert (logits(merge(home, "--quantize", "none")) - exact).abs().max() < 1e-5
    assert "4-bit" not in capsys.readouterr().out
    model = load_model(home / "quantized")
    load_lora(model, home / "lora")  # trained over the unquantized base
    merged = merge(home, "--quantize", "nf4", "--overwrite")
    assert (logits(merged) - logits(model)).abs().max() < 1e-5


def test_neither_base_nor_adapter_nor_other_files_are_written_over(home, refused):
    before = {file: file.read_bytes() for file in home.rglob("*") if file.is_file()}
    flags = ["--load_from", home / "base", "--lora", home / "lora", "--out_dir"]
    for out, words in (("base", "is the base"), ("lora", "adapter"), (".", "--overwrite")):
        refused(merge_lora, [*flags, home / out], words)
        if out != ".":
            refused(merge_lora, [*flags, home / out, "--overwrite"], words)
    refused(merge_lora, [*flags, home / "lora" / "adapter_config.json"], "is a file; name a folder")
    assert before == {file: file.read_bytes() for file in home.rglob("*") if file.is_file()}


def test_mistakes_are_one_line(home, refused):
    several = ["--load_from", home / "base", "--out_dir", home / "m", "--lora", home / "lora", home / "qv"]
    adapter(load_model(home / "base"), home / "qv", targets=["q_proj", "v_proj"])
    for weights, words in (([], "need as many weights"), ([1], "need as many weights"),
                           ([1, "nan"], "number")):
        refused(merge_lora, [*several, *(["--weights", *weights] if weights else [])], words)
    (home / "lora" / "training.json").write_text('{"arguments": {"quantize": "nf4"}}')
    refused(merge_lora, [*several, "--weights", 1, 1], "choose with --quantize")
    other = CausalLM(ModelConfig(**{**SHAPE, "hidden_size": 64}))
    save_model(other, home / "other", load_tokenizer(home / "base"))
    for base, lora, words in (("base", "nowhere", "nowhere"), ("nowhere", "lora", "no model at"),
                              ("other", "lora", "lora")):
        flags = ["--load_from", home / base, "--lora", home / lora, "--out_dir", home / "m"]
        refused(merge_lora, flags, words)
    assert not (home / "m").exists()


def test_a_sum_that_overflows_is_not_saved(home, refused):
    flags = ["--load_from", home / "base", "--lora", home / "lora", "--weights", 1e38,
             "--out_dir", home / "merged"]
    refused(merge_lora, flags, "numbers that are not finite")
    assert not (home / "merged").exists()


def test_an_adapter_over_a_tied_head_gives_a_head_of_its_own(home, capsys):
    adapter(load_model(home / "base"), home / "head", targets=["lm_head", "q_proj"])
    merged = merge(home, lora="head")
    assert "204,800 parameters more" in capsys.readouterr().out and not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), adapted(home, "head"), atol=1e-5, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    peft = PeftModel.from_pretrained(base, home / "head").eval()
    twin = AutoModelForCausalLM.from_pretrained(home / "merged")
    with torch.no_grad():
        torch.testing.assert_close(twin(IDS).logits, peft(IDS).logits, atol=1e-5, rtol=0)


def test_the_base_is_found_after_a_move(home, tmp_path, refused):
    model = load_model(home / "base")
    apply_lora(model, rank=2)
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.lora.B.weight)
    save_lora(model, home / "lora", base=home / "base")
    expected = adapted(home)
    config = json.loads((home / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(home / "base")  # PEFT finds it from wherever one stands
    (tmp_path / "moved").mkdir()
    for name in ("base", "lora"):
        (home / name).rename(tmp_path / "moved" / name)
    flags = ["--lora", tmp_path / "moved" / "lora", "--out_dir", tmp_path / "merged"]
    merge_lora.main(merge_lora.parse_args([str(flag) for flag in flags]))
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), expected, atol=1e-5, rtol=0)
    (tmp_path / "moved" / "base").rename(tmp_path / "elsewhere")
    refused(merge_lora, [*flags[:2], "--out_dir", tmp_path / "m"], "name it with --load_from")


def test_weights_and_adapters_of_minimind(home):
    """.pth files without a tokenizer, in half precision; LoRA with keys such as ...q_proj.lora.A.weight."""
    model = load_model(home / "base")
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, home / "base.pth")
    rounded = load_model(home / "base.pth")
    lora = {f"model.layers.1.self_attn.{layer}.lora.{name}.weight": torch.randn(size).half() / 10
            for layer in ("q_proj", "o_proj") for name, size in (("A", (3, 32)), ("B", (32, 3)))}
    torch.save(lora, home / "lora.pth")
    for layer in ("q_proj", "o_proj"):
        weight = rounded.model.layers[1].self_attn.get_submodule(layer).weight.data
        a, b = (lora[f"model.layers.1.self_attn.{layer}.lora.{name}.weight"].float() for name in "AB")
        weight += b @ a
    flags = ["--load_from", home / "base.pth", "--lora", home / "lora.pth", "--out_dir", home / "m"]
    merge_lora.main(merge_lora.parse_args([str(flag) for flag in flags]))
    torch.testing.assert_close(logits(load_model(home / "m")), logits(rounded), atol=1e-5, rtol=0)
    assert load_tokenizer(home / "m").get_vocab() == load_tokenizer(home / "base").get_vocab()


def test_what_contradicts_a_quantized_base_is_one_line(home, over_4_bits, refused):
    save_model(CausalLM(ModelConfig(**{**SHAPE, "intermediate_size": 64})), home / "other")
    for base, flags, words in (("base", ["--original", home / "base"], "not quantized"),
                               ("quantized", ["--quantize", "nf4"], "4 bits"),
                               ("quantized", ["--original", home / "other"], "not the base's original"),
                               ("quantized", ["--quantize", "none"], "4 bits")):
        paths = ["--load_from", home / base, "--lora", home / "lora", "--out_dir", home / "m"]
        refused(merge_lora, [*paths, *flags], words)
    assert not (home / "m").exists()


def test_help_answers_without_torch():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['x', '--help']; " \
           f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--load_from" in done.stdout
