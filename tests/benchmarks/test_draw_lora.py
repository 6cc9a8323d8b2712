"""draw_lora.py: the numbers of its pictures are numpy's and the models'; the page shows what is there."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import draw_lora
from model.lora import apply_lora, lora_parameters, save_lora
from model.transformer import CausalLM, ModelConfig
from model.weights import load_tokenizer, save_model

PAGE = draw_lora.ROOT / "docs" / "lora.md"
SHAPE = dict(vocab_size=6400, hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
             num_key_value_heads=1, intermediate_size=40, max_position_embeddings=64)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two models of one shape, trained with Muon as they say; two chats; an adapter of the first."""
    home = tmp_path_factory.mktemp("draw")
    tokenizer = load_tokenizer(draw_lora.ROOT / "model" / "tokenizer")
    for seed, name in enumerate(("before", "after")):
        torch.manual_seed(seed)
        model = CausalLM(ModelConfig(**SHAPE))
        save_model(model, home / name, tokenizer, training={"arguments": {"optimizer": "muon"}})
    chats = [{"conversations": [{"role": "user", "content": f"What is {n}?"},
                                {"role": "assistant", "content": "A number. " * n}]} for n in (1, 3)]
    (home / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    model = draw_lora.load_pair(home / "before", home / "after", home / "chats.jsonl").base
    apply_lora(model, rank=3)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    save_lora(model, home / "lora")
    return home


@pytest.fixture
def pair(paths):
    return draw_lora.load_pair(paths / "before", paths / "after", paths / "chats.jsonl")


def test_energy_kept_is_that_of_numpy(pair):
    energy = np.zeros(24)
    for name in pair.changes:
        change = pair.tuned.state_dict()[name].double() - pair.base.state_dict()[name].double()
        sigma = np.linalg.svd(change.numpy(), compute_uv=False)
        energy[:len(sigma)] += sigma**2
    kept = draw_lora.energy_kept([sigma for _, sigma, _ in pair.changes.values()])
    np.testing.assert_allclose(kept, energy.cumsum() / energy.sum(), atol=1e-5)


def test_the_loss_comes_from_the_base_to_the_tuned_model(pair):
    def loss(model):  # one chat at a time
        rows = [pair.dataset[i] for i in range(len(pair.dataset))]
        with torch.no_grad():
            sums = [model(ids[None], labels=labels[None]).token_losses.sum() for ids, labels in rows]
        return (sum(sums) / sum(int((labels != -100).sum()) for _, labels in rows)).item()

    for rank, rest_too, model in ((0, False, pair.base), (24, True, pair.tuned)):
        shown = draw_lora.held_out_loss(pair, draw_lora.cut(pair, rank, rest_too))
        assert shown == pytest.approx(loss(model), abs=1e-4)
    assert abs(loss(pair.base) - loss(pair.tuned)) > 1e-3
    half = draw_lora.cut(pair, 12, False).state_dict()
    assert torch.equal(half["model.norm.weight"], pair.base.state_dict()["model.norm.weight"])


def test_it_draws_and_tells(paths, tmp_path, capsys):
    flags = ["--base", paths / "before", "--tuned", paths / "after", "--data_path", paths / "chats.jsonl",
             "--lora", paths / "lora", "--out_dir", tmp_path]
    draw_lora.main(draw_lora.parse_args([str(flag) for flag in flags]))
    out = capsys.readouterr().out
    assert "before → after (muon): energy kept: rank 1 " in out and "rank 24 1.000" in out
    assert re.search(r"an adapter trained at that rank: rank 3 \d", out)
    for name in ("product", "change", "energy", "loss"):
        with Image.open(tmp_path / f"lora_{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 8  # not a blank page


def test_mistakes_are_one_line(paths, tmp_path, refused):
    flags = ["--base", paths / "before", "--data_path", paths / "chats.jsonl", "--out_dir", tmp_path]
    flags.append("--tuned")
    refused(draw_lora, [*flags, paths / "nowhere"], "nowhere")
    refused(draw_lora, [*flags, paths / "after", paths / "after"], "go together")
    other = CausalLM(ModelConfig(**{**SHAPE, "intermediate_size": 48}))
    save_model(other, paths / "other", load_tokenizer(paths / "before"))
    refused(draw_lora, [*flags, paths / "other"], "same shape")
    flags[flags.index("--base") + 1] = paths / "after"
    refused(draw_lora, [*flags, paths / "before", "--lora", paths / "lora"], "fits no --base")


def test_the_page_shows_pictures_that_are_there_and_small():
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(path.name for path in PAGE.parent.glob("lora_*.png"))
    assert sum((PAGE.parent / name).stat().st_size for name in shown) < 150_000


def help_of(script):
    command = [sys.executable, draw_lora.ROOT / script, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_the_page_names_scripts_and_flags_that_exist():
    page = PAGE.read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    variables = dict(re.findall(r'^(\w+)="?(.*?)"?$', blocks, re.MULTILINE))
    commands = re.findall(r"python (\S+\.py)([^\n;]*)", blocks)
    assert len(commands) > 5
    for script, words in commands:
        for _ in range(2):  # variables within variables
            words = re.sub(r"\$(\w+)", lambda found: variables.get(found[1], ""), words)
        assert set(re.findall(r"--\w+", words)) <= set(help_of(script)), script
    variants = set(re.findall(r"\(`(--\w+)", page))
    assert len(variants) == 4 and variants <= set(help_of("trainer/train_lora.py"))
