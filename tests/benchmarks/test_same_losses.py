"""same_losses.py hands TRL what our own losses read. TRL itself is not installed here."""

import pytest
import torch

from benchmarks import same_losses
from benchmarks.same_losses import as_trl, is_right, make_cases, masks, some_pairs
from common.cli import ROOT
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, load_tokenizer, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("same"), load_tokenizer(ROOT / "model" / "tokenizer")
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1, intermediate_size=48, qk_norm=True))
    model.lm_head.weight.data.mul_(20)  # so that the changed copies differ enough for clipping
    save_model(model, folder / "base", tokenizer, training={"stage": "full_sft"})
    make_cases(folder / "base", folder)
    return folder


def test_every_case_has_a_loss_and_gradients_of_the_names_of_transformers(folder):
    names = [*same_losses.POLICY, *same_losses.PREFERENCE, *same_losses.TEACHER, "ppo"]
    parameters = dict(load_model(folder / "model").named_parameters())
    for name in names:
        ours = torch.load(same_losses.file_of(folder, name), weights_only=True)
        assert ours["loss"].isfinite() and any((g != 0).any() for g in ours["gradients"].values()), name
        heads = {"value_head.weight", "value_head.bias"} if name == "ppo" else set()
        assert ours["gradients"].keys() == parameters.keys() | heads


def test_trl_reads_the_same_tokens_at_other_places(folder):
    answers = torch.load(folder / "inputs.pt", weights_only=True)["answers"]
    batch, moved = as_trl(answers)
    old = moved(answers["old_log_probs"])
    for row, labels in enumerate(answers["labels"]):
        place, seen = labels != -100, batch["completion_mask"][row].bool()
        start = int(place.int().argmax())
        assert batch["completion_ids"][row, seen].tolist() == labels[place].tolist()
        assert torch.equal(old[row, seen], answers["old_log_probs"][row, place])
        prompt = batch["prompt_ids"][row, batch["prompt_mask"][row].bool()]
        assert prompt.tolist() == answers["input_ids"][row, :start].tolist()
        assert batch["prompt_mask"][row, -1] == 1  # padded on the left


def test_a_few_pairs_keep_their_sides_together(folder):
    pairs = torch.load(folder / "inputs.pt", weights_only=True)["pairs"]
    some, count = some_pairs(pairs, 2), len(pairs["labels"]) // 2
    for name, values in some.items():
        assert torch.equal(values, pairs[name][[0, 1, count, count + 1]]), name
    mask, seen = masks(some)
    assert torch.equal(mask, (some["labels"] != -100).long()) and (seen >= mask).all() and seen[:, 0].all()


def test_a_difference_shows():
    row = {"ours": 0.5, "theirs": 0.5 + 1e-6, "gradient": 0.1, "difference": 1e-6}
    assert is_right(row) and is_right(row | {"gradient": 3.0, "difference": 2e-5})
    for wrong in ({"theirs": 0.5001}, {"difference": 2e-5}, {"gradient": 0.0}):
        assert not is_right(row | wrong)
