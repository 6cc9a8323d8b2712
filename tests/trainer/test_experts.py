"""Training with experts: the same on one process as on two, in any micro-batches, packed or not, resumed or
not; the flags; what the log says of the router."""

import json

import forks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dataset.lm_dataset import PretrainDataset, SFTDataset, collate
from model.config import ModelConfig
from model.transformer import CausalLM
from trainer.losses import cross_entropy
from trainer.optim import Muon, build_optimizers
from trainer.tracking import expert_use

SHAPE = {"num_experts": 3, "moe_intermediate_size": 32, "intermediate_size": None, "router_balance": 0.1,
         "micro_batch_size": 1, "max_steps": 12, "log_interval": 1, "save_interval": 5, "learning_rate": 1e-3}
ROUTER = ("balance", "router_entropy", "least_used", "most_used")


@pytest.fixture(scope="module")
def trained(workshop):
    """Folders of the same run: on one process in one forward pass a step, on two (ddp), on two (fsdp), and on
    one process that stopped after each of its first steps and went on."""
    flags = {way: workshop.flags("pretrain", workshop.folder / f"experts_{way}", **SHAPE | changes)
             for way, changes in {"one": {"micro_batch_size": None}, "ddp": {}, "fsdp": {"parallel": "fsdp"},
                                  "stopped": {"micro_batch_size": None}}.items()}
    running = [forks.start(workshop.command("pretrain", *flags[way]), processes=2) for way in ("ddp", "fsdp")]
    assert workshop.run("pretrain", *flags["one"]).code == 0
    assert "stopped at step 1" in workshop.run("pretrain", *flags["stopped"], "--max_minutes", "1e-9").out
    assert workshop.run("pretrain", *flags["stopped"], "--max_minutes", "1e-9", "--resume").code
    assert workshop.run("pretrain", *flags["stopped"], "--resume").code == 0
    for process in running:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
    return {way: workshop.folder / f"experts_{way}" / "pretrain" for way in flags}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not in this build")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_equal_one(way, trained, read_log):
    ours, theirs = read_log(trained[way]), read_log(trained["one"])
    assert len(ours) == len(theirs) == 12 + 2
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in {"loss", "cross_entropy", "eval_loss", *ROUTER} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (a["step"], name)
        if "router_load" in a:
            np.testing.assert_allclose(a["router_load"], b["router_load"], atol=1e-5)
    ours, theirs = (load_file(trained[run] / "model.safetensors") for run in (way, "one"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-5, rtol=0, msg=name)


def test_a_resumed_run_ends_with_the_same_bits(trained, read_log):
    ours, theirs = (load_file(trained[run] / "model.safetensors") for run in ("stopped", "one"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_log(trained["stopped"]) == read_log(trained["one"])


def test_the_log_says_what_the_router_did_and_validation_pays_nothing(trained, read_log):
    for line in read_log(trained["one"]):
        if "loss" in line:
            load = np.array(line["router_load"])
            assert load.shape == (2, 3) and load.sum(axis=1) == pytest.approx([1, 1])
            assert line["least_used"] == pytest.approx(3 * load.min()) and line["dead_experts"] == 0
            assert line["loss"] > line["cross_entropy"] and 1 <= line["balance"] <= 3
        else:
            assert not {"balance", "router_load", "eval_balance"} & line.keys()
    config = json.loads((trained["one"] / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"] and config["router_aux_loss_coef"] == 0.1


def test_expert_use_by_hand():
    assert expert_use([[0.25, 0.75], [1.0, 0.0]]) == {"least_used": 0.0, "most_used": 2.0, "dead_experts": 1}


@pytest.mark.parametrize("kind, data", [(PretrainDataset, "texts"), (SFTDataset, "chats")])
def test_packing_changes_nothing(kind, data, workshop, tokenizer):
    """Sums, and gradients, of rows of one document each, and of rows with several."""
    dataset = kind([getattr(workshop, data)], tokenizer, 64, cache_dir=workshop.folder / "cache")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, num_experts=3,
                         qk_norm=True, router_aux_loss_coef=0.5)
    model, found = CausalLM(config).train(), []
    for rows in ([[0], [1], [2], [3], [4]], [[0, 3], [1, 4, 2]]):
        model.zero_grad()
        loss, sums = cross_entropy(model, collate(dataset, rows, 3))
        loss.backward()
        found.append([loss.detach(), *(value.detach() for value in sums.values()),
                      *(parameter.grad for parameter in model.parameters())])
    assert found[0][0] > found[0][1]  # the routers pay
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_muon_takes_the_matrices_of_experts_and_not_the_router():
    model = CausalLM(ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1, intermediate_size=32, num_experts=3, qk_norm=True))
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon = next(o for o in build_optimizers(model, "muon", 1e-3, 0.1) if isinstance(o, Muon))
    taken = {names[parameter] for group in muon.param_groups for parameter in group["params"]}
    assert sum(".experts." in name for name in taken) == 9
    assert "model.layers.0.mlp.gate.weight" not in taken


@pytest.mark.parametrize("flags, complaint", [
    ({"experts_per_token": 2}, "--experts_per_token has no effect without experts"),
    ({"router_balance": 0.0}, "--router_balance has no effect without experts"),
    ({"num_experts": 4, "norm_topk_prob": True}, "no gradient tells the router which one to choose"),
    ({"num_experts": 1}, "a router with one expert has nothing to choose"),
    ({"num_experts": 2, "experts_per_token": 3}, "--experts_per_token 3 is more than --num_experts 2"),
    ({"num_experts": 2, "intermediate_size": None, "moe_intermediate_size": 2**40},
     "--moe_intermediate_size must be a positive integer"),
    ({"num_experts": 2, "sliding_window": 8, "full_attention_every": 2},
     "--num_experts and --full_attention_every, a window in some layers only"),
    ({"full_attention_every": 2}, "need a --sliding_window"),
    ({"sliding_window": 8, "full_attention_every": 1}, "--full_attention_every must be from 2 to 2"),
    ({"hidden_size": 0}, "--hidden_size must be a positive integer"),
    ({"num_key_value_heads": 3}, "no multiple of --num_key_value_heads 3"),
    ({"num_experts": 2, "moe_intermediate_size": 16}, "--intermediate_size has no effect beside"),
    ({"num_experts": 0}, "--num_experts"),
], ids=str)
def test_flags_that_make_no_sense(flags, complaint, workshop, tmp_path):
    ended = workshop.run("pretrain", *workshop.flags("pretrain", tmp_path, **flags))
    assert ended.code != 0 and complaint in ended.error
    assert not (tmp_path / "pretrain").exists() or not any((tmp_path / "pretrain").iterdir())


WITHOUT_SHAPE = {"hidden_size": None, "num_hidden_layers": None, "intermediate_size": None}


def test_experts_have_no_effect_on_weights_that_are_there(workshop, tmp_path):
    flags = workshop.flags("pretrain", tmp_path, load_from=workshop.base, num_experts=4, **WITHOUT_SHAPE)
    assert "--num_experts has no effect with --load_from" in workshop.run("pretrain", *flags).error


@pytest.mark.parametrize("stage", ["pretrain", "full_sft", "lora"])
def test_a_model_that_is_there_may_pay_other_penalties(stage, trained, workshop, tmp_path, read_log):
    """loss = cross_entropy + 7 * balance, since the other weight is 0; the saved config says the same."""
    shape = WITHOUT_SHAPE if stage == "pretrain" else {}
    shape |= {"lora_dropout": None} if stage == "lora" else {}
    flags = workshop.flags(stage, tmp_path, load_from=trained["one"], max_steps=2, log_interval=1,
                           router_balance=7, router_z_loss=0, **shape)
    ended = workshop.run(stage, *flags)
    assert ended.code == 0, ended
    lines = [line for line in read_log(tmp_path / stage) if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 7 * line["balance"], rel=1e-5)
    if stage != "lora":
        config = json.loads((tmp_path / stage / "config.json").read_text())
        assert config["router_aux_loss_coef"] == 7 and config["router_z_loss_coef"] == 0


@pytest.mark.parametrize("flag", ["router_balance", "router_z_loss"])
def test_a_dense_model_has_no_penalties(flag, workshop, tmp_path):
    flags = workshop.flags("full_sft", tmp_path, **{flag: 0.0})
    assert f"--{flag} has no effect on {workshop.base}" in workshop.run("full_sft", *flags).error


def test_adapters_over_experts_train_in_a_stage(trained, workshop, tmp_path):
    """What train_lora.py saves goes over the model that it was trained over."""
    from model.lora import load_lora
    from model.weights import load_model

    flags = workshop.flags("lora", tmp_path, load_from=trained["one"], max_steps=3, lora_rank=2)
    ended = workshop.run("lora", *flags)
    assert ended.code != 0 and "dropout over experts" in ended.error
    flags = workshop.flags("lora", tmp_path, load_from=trained["one"], max_steps=3, lora_rank=2,
                           lora_dropout=None)
    ended = workshop.run("lora", *flags)
    assert ended.code == 0, ended
    report = load_lora(load_model(trained["one"]), tmp_path / "lora")
    assert sum(".experts." in name for name in report.names) == 2 * 3 * 3 and report.relative_norm > 0
