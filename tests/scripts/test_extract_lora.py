"""extract_lora.py: exact where the change has that rank, numpy's energies, and nothing hidden."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from model.lora import load_lora
from model.quantize import dequantize_model, quantize_model
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, save_model
from scripts import extract_lora

SCRIPT = Path(extract_lora.__file__)
SHAPE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=64, initializer_range=0.1)
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def linears(model):
    return {name: m for name, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and name != "lm_head"}


@pytest.fixture
def pair(tmp_path):
    """Folders of two models; each linear layer differs by a random change of rank 2, all else is equal."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**SHAPE))
    save_model(model, tmp_path / "base")
    with torch.no_grad():
        for linear in linears(model).values():
            out, width = linear.weight.shape
            linear.weight += 0.1 * torch.randn(out, 2) @ torch.randn(2, width)
    save_model(model, tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def extract(pair, out, *flags):
    extract_lora.main(extract_lora.parse_args([*map(str, pair), "--out_dir", str(out), *map(str, flags)]))
    return json.loads((out / "energy.json").read_text())


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def changes(pair):
    """{layer: W_tuned - W_base} in numpy."""
    base, tuned = (linears(load_model(folder)) for folder in pair)
    return {name: (tuned[name].weight - base[name].weight).detach().double().numpy() for name in base}


def test_a_change_of_rank_2_is_reproduced_exactly_at_rank_2(pair, tmp_path):
    report = extract(pair, tmp_path / "lora", "--rank", 2)
    adapted, tuned = load_model(pair[0]), load_model(pair[1])
    assert (logits(adapted) - logits(tuned)).abs().max() > 0.1
    load_lora(adapted, tmp_path / "lora")
    assert (logits(adapted) - logits(tuned)).abs().max() < 1e-5
    assert report["layers"].keys() == linears(tuned).keys() and report["not_held"] == {}
    assert all(row["kept"] > 1 - 1e-6 for row in report["layers"].values())


def test_peft_reads_what_it_wrote_with_a_rank_per_layer(pair, tmp_path):
    report = extract(pair, tmp_path / "lora", "--energy", 0.8)
    assert len({row["rank"] for row in report["layers"].values()}) > 1
    ours = load_model(pair[0])
    load_lora(ours, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[0]), tmp_path / "lora")
    assert (logits(ours) - logits(theirs.eval())).abs().max() < 1e-5


def test_energy_and_adapter_are_those_of_numpys_svd(pair, tmp_path):
    report = extract(pair, tmp_path / "lora", "--rank", 1)
    adapted = load_model(pair[0])
    load_lora(adapted, tmp_path / "lora")
    for name, change in changes(pair).items():
        u, sigma, vh = np.linalg.svd(change)
        assert report["layers"][name]["kept"] == pytest.approx(sigma[0] ** 2 / (sigma**2).sum(), abs=1e-6)
        lora = adapted.get_submodule(name).lora
        best = sigma[0] * np.outer(u[:, 0], vh[0])
        assert np.abs((lora.B.weight @ lora.A.weight).detach().numpy() - best).max() < 1e-5


def test_energy_sets_the_least_rank_that_keeps_it(pair, tmp_path):
    report = extract(pair, tmp_path / "lora", "--energy", 0.7)
    for name, change in changes(pair).items():
        energy = np.linalg.svd(change, compute_uv=False) ** 2
        kept = energy.cumsum() / energy.sum()
        rank = report["layers"][name]["rank"]
        assert kept[rank - 1] >= 0.7 and (rank == 1 or kept[rank - 2] < 0.7)


def test_a_rank_above_a_thin_layers_own_is_cut_to_it(pair, tmp_path):
    report = extract(pair, tmp_path / "lora", "--rank", 32)
    assert report["layers"]["model.layers.0.self_attn.k_proj"]["rank"] == 16  # 2 heads of 8 rows
    assert report["layers"]["model.layers.0.self_attn.q_proj"]["rank"] == 32


def test_a_quantized_base_gets_back_what_rounding_took(pair, tmp_path):
    model, original = load_model(pair[0]), logits(load_model(pair[0]))
    save_model(quantize_model(model), tmp_path / "quantized")
    far = (logits(model) - original).abs().max()
    extract((tmp_path / "quantized", pair[0]), tmp_path / "lora", "--rank", 32)  # 32: all of it
    model = dequantize_model(load_model(tmp_path / "quantized"))
    load_lora(model, tmp_path / "lora")
    assert far > 0.01 and (logits(model) - original).abs().max() < 1e-5


def test_what_an_adapter_cannot_hold_is_named_with_its_change(pair, tmp_path, capsys):
    model = load_model(pair[1])
    with torch.no_grad():
        model.model.norm.weight *= 1.25
        model.model.embed_tokens.weight *= 0.5
    save_model(model, pair[1])
    report = extract(pair, tmp_path / "lora", "--target_modules", "q_proj", "down_proj")
    assert {name.split(".")[-1] for name in report["layers"]} == {"q_proj", "down_proj"}
    left_out = {name for name in linears(model) if not name.endswith(("q_proj", "down_proj"))}
    special = {"model.norm.weight": 0.25, "model.embed_tokens.weight": 0.5}
    assert report["not_held"].keys() == {f"{name}.weight" for name in left_out} | special.keys()
    out = capsys.readouterr().out
    for name, change in special.items():
        assert report["not_held"][name] == pytest.approx(change, rel=1e-5) and f"\n{name} " in out


@pytest.mark.parametrize("flags, words", [
    (["--rank", "0"], "rank"), (["--rank", "999"], "rank 999"), (["--target_modules", "nothing"], "nothing"),
    (["--energy", "1.5"], "--energy")])
def test_a_bad_flag_is_one_line(pair, tmp_path, refused, flags, words):
    refused(extract_lora, [*pair, "--out_dir", tmp_path / "lora", *flags], words)
    assert not (tmp_path / "lora").exists()


def test_models_of_other_shapes_or_no_difference_are_one_line(pair, tmp_path, refused):
    for change, words in (({"intermediate_size": 64}, "mlp.gate_proj"), ({"rope_theta": 1e4}, "rope_theta"),
                          ({"num_hidden_layers": 3}, "layers.2")):
        save_model(CausalLM(ModelConfig(**{**SHAPE, **change})), tmp_path / "other")
        refused(extract_lora, [pair[0], tmp_path / "other", "--out_dir", tmp_path / "lora"], words)
    refused(extract_lora, [pair[0], pair[0], "--out_dir", tmp_path / "lora"], "equal")
    refused(extract_lora, [pair[0], tmp_path / "nowhere", "--out_dir", tmp_path / "lora"], "nowhere")
    assert not (tmp_path / "lora").exists()


def test_a_model_or_a_full_folder_is_not_written_over(pair, tmp_path, refused):
    before = {file: file.read_bytes() for folder in pair for file in folder.iterdir()}
    refused(extract_lora, [*pair, "--out_dir", pair[1], "--overwrite"], "one of the two")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    refused(extract_lora, [*pair, "--out_dir", tmp_path / "mine"], "--overwrite")
    extract(pair, tmp_path / "mine", "--rank", 2, "--overwrite")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert before == {file: file.read_bytes() for folder in pair for file in folder.iterdir()}


def test_help_answers_without_torch():
    code = f"import sys; sys.argv = ['x', '--help']; sys.modules['torch'] = None\n" \
           f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--rank" in done.stdout
