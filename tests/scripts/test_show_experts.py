"""show_experts.py: the words of each expert, where the right answer is known; the table of a run's report."""

import json
from pathlib import Path

import pytest
import torch

from common.errors import DataError, ModelError, UsageError
from model.lora import apply_lora, save_lora
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, load_tokenizer, save_model
from scripts import show_experts
from trainer.report_page import router_section
from trainer.runs import Run, is_load, read_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def planted(tmp_path):
    """A model whose router sends each token to expert id % 2, by the sign of one number of its embedding."""
    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
                                 qk_norm=True, num_experts=2))
    with torch.no_grad():
        block = model.model.layers[0]
        block.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = torch.where(torch.arange(len(tokenizer)) % 2 == 0, -1.0, 1.0)
        block.mlp.gate.weight.zero_()
        block.mlp.gate.weight[:, 0] = torch.tensor([-1.0, 1.0])
    save_model(model, tmp_path / "model", tokenizer)
    return tmp_path, tokenizer


def test_words_go_where_the_router_sends_them(planted, capsys):
    folder, tokenizer = planted
    words = "the river and the fox walked home in winter".split()
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps(record) + "\n" for record in (
        {"text": " ".join(words * 8)}, {"messages": [{"role": "user", "content": " ".join(words)},
                                                     {"role": "assistant", "content": "the end"}],
                                        "text": None})))
    picture = folder / "experts.png"
    show_experts.main(show_experts.parse_args(
        [str(folder / "model"), "--data_path", str(texts), "--words", "50", "--plot", str(picture)]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  expert ")]
    assert len(lines) == 2 and picture.stat().st_size > 1000
    for number, line in enumerate(lines):
        for token in set(tokenizer(" " + " ".join(words))["input_ids"]):  # frequent ones
            shown = f"{tokenizer.decode([token])!r} 100%" in line
            assert shown == (token % 2 == number), (number, token)


def test_what_can_not_be_shown_is_one_line(planted, tmp_path):
    folder, tokenizer = planted
    dense = CausalLM(ModelConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=1, intermediate_size=16))
    save_model(dense, tmp_path / "dense", tokenizer)
    with pytest.raises(UsageError, match="has no experts"):
        show_experts.main(show_experts.parse_args([str(tmp_path / "dense")]))
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "why"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: "):
        show_experts.main(show_experts.parse_args([str(folder / "model"), "--data_path", str(file)]))


def test_an_adapter_stands_over_the_model_that_it_changes(planted, tmp_path, capsys):
    """The adapter turns the sign that the router reads, so every token goes to the other expert."""
    folder, _ = planted
    model = load_model(folder / "model")
    apply_lora(model, rank=1, target_modules=["v_proj", "o_proj"])
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for layer, a, b in ((attention.v_proj, 1.0, 1.0), (attention.o_proj, 1.0, -10.0)):
            layer.lora.A.weight.zero_()[0, 0] = a
            layer.lora.B.weight.zero_()[0, 0] = b
    save_lora(model, tmp_path / "adapter", base=folder / "model")
    texts = folder / "texts.jsonl"
    texts.write_text(json.dumps({"text": " the" * 9}) + "\n")
    flags, shown = ["--data_path", str(texts), "--words", "1"], []
    for path in (folder / "model", tmp_path / "adapter"):
        show_experts.main(show_experts.parse_args([str(path), *flags]))
        shown.append(capsys.readouterr().out.splitlines())
    loads = [[line.split()[2] for line in lines if line.startswith("  expert ")] for lines in shown]
    assert sorted(loads[0]) == ["0.00", "2.00"] and loads[1] == loads[0][::-1]
    assert shown[1][0].startswith(f"{tmp_path / 'adapter'}: 2/2 layers matched")
    (folder / "model").rename(folder / "elsewhere")
    with pytest.raises(ModelError, match="adapter holds an adapter and no model: name the model"):
        show_experts.main(show_experts.parse_args([str(tmp_path / "adapter"), *flags]))


def test_a_runs_report_has_a_table_of_loads(tmp_path):
    loads = [[[0.5, 0.5], [0.9, 0.1]], [[0.25, 0.75], [1.0, 0.0]]]
    lines = [{"step": 10 * (i + 1), "loss": 1.0, "router_load": load} for i, load in enumerate(loads)]
    lines += [{"step": 40, "loss": 1.0, "router_load": [[2, "x"]]}, {"step": 50, "router_load": []}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    assert run.router_loads == [(10, loads[0]), (20, loads[1])]
    section = router_section(run)
    rows = [row.split("<td")[1:] for row in section.split("<tr>")[2:]]
    assert len(rows) == 4 and ">layer 1, expert 1<" in rows[3][0]
    assert ">0.20<" in rows[3][1] and ">0.00<" in rows[3][2] and ">1.50<" in rows[1][2]
    assert router_section(Run(tmp_path)) == ""
    many = Run(tmp_path, router_loads=[(5, [[1 / 200] * 200, [1.0] + [0.0] * 199])])
    assert router_section(many).count("<tr>") == 1 + 1 + 2  # of each layer the least and the most used one


@pytest.mark.parametrize("value", [None, 3, [], [[]], [[0.5], [0.5, 0.5]], [["a"]], [[2.0]], [[-1.0]],
                                   [[float("nan")]], "x"], ids=str)
def test_what_is_no_load(value):
    assert not is_load(value)
