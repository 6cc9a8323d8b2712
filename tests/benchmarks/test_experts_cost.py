"""benchmarks/experts.py: its tables by hand; equal active parameters; random routing changes the loss."""

import runpy
import sys
from argparse import Namespace

import pytest
import torch

import dataset.token_cache
from benchmarks import experts
from model.quantize import count_parameters


def routers_of(model):
    """How many parameters its routers have."""
    return sum(block.mlp.gate.weight.numel() for block in model.model.layers)


def test_equal_active_parameters():
    def model(contender):
        return experts.model_of(Namespace(contender=contender, presets=["micro"]))

    dense, theirs = model(experts.DENSE), model(experts.THEIRS)
    for name, k in ((experts.LARGE, 1), (experts.SMALL, 2)):
        ours = model(name)
        assert count_parameters(ours) - routers_of(ours) == sum(p.numel() for p in theirs.parameters()) - (
            routers_of(theirs))
        idle = sum(p.numel() for block in ours.model.layers for expert in block.mlp.experts[k:]
                   for p in expert.parameters())
        assert count_parameters(ours) - idle - routers_of(ours) == count_parameters(dense)


@pytest.mark.parametrize("contender", [experts.DENSE, experts.LARGE, experts.SMALL, experts.THEIRS])
def test_a_step_changes_every_weight(contender):
    args = Namespace(contender=contender, presets=["micro"], optimizers=["adamw"], dtype="float32", rows=2,
                     tokens=32)
    torch.manual_seed(0)
    made, real = [], experts.model_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "model_of", lambda args: made.append(real(args)) or made[0])
        step = experts.step_of(args)
    before = {name: p.detach().clone() for name, p in made[0].named_parameters()}
    step()
    still = [name for name, p in made[0].named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_tables():
    pytest.importorskip("pandas")
    seconds = {experts.DENSE: [0.1, 0.2, 0.4], experts.LARGE: [0.2, 0.3, 0.4]}
    text = experts.speed_table({"tiny, adamw": seconds})
    assert "| tiny, adamw | 4 experts | 300 | 1.50 |" in text
    dense = {"kind": experts.DENSE, "loss": 2.0, "seconds": 10.0, "parameters": 100}
    mixed = {"kind": experts.LARGE, "loss": 1.9, "seconds": 13.0, "parameters": 300, "random_loss": 2.5,
             "least_used": 0.5, "most_used": 2.0}
    text = experts.pays_table([dense | {"seed": 0}, mixed | {"seed": 0}, dense | {"seed": 1, "loss": 1.8},
                               mixed | {"seed": 1}])
    assert "| 0 | 4 experts | 2.0000 | 1.9000 | -0.1000 | +0.6000 | 0.50 | 2.00 | 1.30 | 3.00 |" in text
    assert text.endswith("4 experts: better with 1 of 2 seeds\n8 half experts: better with 0 of 2 seeds")


def test_a_run_that_is_done_is_not_run_again(tmp_path, capsys, monkeypatch):
    """One run of each kind, of two steps; the second time the line in results.jsonl is enough."""
    pytest.importorskip("pandas")

    def in_this_process(command):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(word) for word in command[1:]])
            patch.setattr(sys, "path", list(sys.path))
            runpy.run_path(sys.argv[0], run_name="__main__")

    monkeypatch.setattr(experts, "output_of", in_this_process)
    monkeypatch.setattr(dataset.token_cache, "CACHE_DIR", tmp_path / "cache")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(f'{{"text": "The {n} owls sang by the river, and then the small fox."}}\n'
                            for n in range(40)))
    flags = "--batch_size 2 --max_seq_len 32 --device cpu --eval_fraction 0.2"
    command = ["--jobs", "pays", "--presets", "micro", "--steps", "2", "--seeds", "5", "--flags", flags,
               "--out_dir", str(tmp_path), "--data_path", str(data)]
    experts.main(experts.parse_args(command))
    first = capsys.readouterr().out.split("\n\n", 1)[1]
    assert "8 half experts: better with" in first
    monkeypatch.setattr(experts, "output_of", lambda command: pytest.fail("it ran again"))
    experts.main(experts.parse_args(command))
    assert capsys.readouterr().out.lstrip("\n") == first.lstrip("\n")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("flags, line", [
    (["--minimind", "nowhere"], "error: --minimind nowhere: there is no model/model_minimind.py in it"),
    (["--data_path", "nowhere.jsonl"], "error: --data_path nowhere.jsonl: no such file"),
    (["--presets", "micro", "huge"], "unknown preset 'huge'"),
])
def test_a_mistake_is_found_before_anything_is_measured(flags, line, refused, monkeypatch):
    monkeypatch.setattr(experts, "turns_of", lambda *args: pytest.fail("it measures"))
    refused(experts, flags, line)
