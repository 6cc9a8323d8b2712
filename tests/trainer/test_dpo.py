"""DPO and its kin: the equations, the reference, and the recipe from beginning to end."""

import json
import math
import random
from functools import partial

import forks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trainer.reference
from dataset.preference import PreferenceDataset
from model.adapters import set_lora
from model.lora import apply_lora, lora_parameters
from model.weights import load_model
from trainer.distributed import Ranks
from trainer.losses import dpo, preference_losses
from trainer.reference import add_reference, side_log_probs

ALONE = Ranks(0, 1, torch.device("cpu"))
KINDS = ("dpo", "ipo", "simpo", "orpo")
SETTINGS = {"dpo": {"beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.5}, "ipo": {"beta": 0.2},
            "simpo": {"beta": 2.0, "margin": 0.7}, "orpo": {"beta": 0.25, "sft_weight": 1.0}}


def pair_records(count, seed=0):
    rng = random.Random(seed)
    words = "the cat sat on a warm stone and the small owl sang 小 猫 在 河 边 睡 觉".split()

    def phrase(longest):
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    records = []
    while len(records) < count:
        prompt, chosen, rejected = phrase(8), phrase(12), phrase(12)
        if chosen != rejected:
            records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return records


@pytest.fixture(scope="module")
def data(workshop):
    """41 pairs: with a fifth held out, an epoch of 33 ends with a batch of one pair."""
    return workshop.write("pairs.jsonl", pair_records(41))


@pytest.fixture
def pairs(data, tokenizer, tmp_path):
    return PreferenceDataset(data, tokenizer, 64, cache_dir=tmp_path)


@pytest.fixture(autouse=True)
def cache_in_a_folder_of_ours(workshop, monkeypatch):
    monkeypatch.setattr("dataset.token_cache.CACHE_DIR", workshop.folder / "cache")


@pytest.fixture
def flags(workshop, data):
    """The flags of a short run; `flags(folder, beta=1)`."""
    def make(out_dir, **changes):
        given = {"data_path": data, "optimizer": "adamw", "learning_rate": 1e-3, "batch_size": 4} | changes
        return workshop.flags("dpo", out_dir, **given)

    return make


# --- the equations ------------------------------------------------------------------------------------------


def log_p(model, ids, labels):
    """log p of the answer, and its number of tokens, from the logits alone."""
    log_probs = model(ids[None]).logits[0].log_softmax(dim=-1)
    places = [t for t in range(1, len(ids)) if labels[t] != -100]
    return sum(log_probs[t - 1, labels[t]] for t in places), len(places)


def by_hand(kind, sides, reference, beta=0.1, label_smoothing=0.0, sft_weight=0.0, margin=0.0):
    """(loss, gap) of one pair as its paper writes it. sides: (log p, tokens) of chosen and rejected."""
    (won, won_tokens), (lost, lost_tokens) = sides
    won_before, lost_before = reference
    if kind == "dpo":
        gap = beta * (won - won_before) - beta * (lost - lost_before)
        loss = -(1 - label_smoothing) * torch.sigmoid(gap).log() - label_smoothing * torch.sigmoid(-gap).log()
    elif kind == "ipo":
        gap = (won - won_before) / won_tokens - (lost - lost_before) / lost_tokens
        loss = (gap - 1 / (2 * beta)) ** 2
    elif kind == "simpo":
        gap = beta / won_tokens * won - beta / lost_tokens * lost
        loss = -torch.sigmoid(gap - margin).log()
    else:
        q, r = (won / won_tokens).exp(), (lost / lost_tokens).exp()
        gap = ((q / (1 - q)) / (r / (1 - r))).log()
        loss = -beta * torch.sigmoid(gap).log()
    return loss - sft_weight * won / won_tokens, gap


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_equations(kind, pairs, make_model, tokenizer):
    model, base = make_model(len(tokenizer), seed=1).double(), make_model(len(tokenizer)).double()
    chosen_pairs = [3, 0, 7]
    batch = pairs.collate([[pair] for pair in chosen_pairs], 0)
    losses, gaps, reference = [], [], {}
    for pair in chosen_pairs:
        with torch.no_grad():
            reference[pair] = [log_p(base, *side)[0] for side in pairs[pair]]
        loss, gap = by_hand(kind, [log_p(model, *side) for side in pairs[pair]], reference[pair],
                            **SETTINGS[kind])
        losses.append(loss)
        gaps.append(gap)
    batch["reference_log_probs"] = torch.stack([reference[pair][side] for side in (0, 1)
                                                for pair in chosen_pairs])
    expected = torch.autograd.grad(sum(losses), list(model.parameters()))
    # token_losses are computed in float32, hence the tolerance
    total, named = dpo(model, batch, kind=kind, **SETTINGS[kind])
    torch.testing.assert_close(total.double(), sum(losses), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(named["margin"].double(), sum(gaps), rtol=1e-5, atol=1e-5)
    sft = SETTINGS[kind].get("sft_weight", 0.0)
    assert (named["preference"] < total) == (sft > 0)
    assert named["accuracy"].item() == sum(gap.item() > 0 for gap in gaps)
    for found, wanted in zip(torch.autograd.grad(total, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_without_a_pair_gives_zero_and_the_same_names(kind, pairs, make_model, tokenizer):
    model = make_model(len(tokenizer))
    add_reference(model, [pairs], "float32", ALONE)
    loss = partial(dpo, kind=kind, **SETTINGS[kind])
    empty, names = loss(model, pairs.collate([], 0))
    empty.backward()
    assert empty.item() == 0 and all(value.item() == 0 for value in names.values())
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
    assert list(names) == list(loss(model, pairs.collate([[0]], 0))[1])


def test_a_certain_answer_gives_orpo_no_infinite_loss(pairs):
    class Certain(torch.nn.Module):
        def forward(self, input_ids, labels):
            self.losses = torch.zeros(input_ids.shape, requires_grad=True)
            return type("Output", (), {"token_losses": self.losses})

    model = Certain()
    loss, _ = dpo(model, pairs.collate([[0]], 0), kind="orpo")
    loss.backward()
    assert math.isfinite(loss.item()) and model.losses.grad.isfinite().all()


def test_training_begins_at_log_2_with_every_accuracy_a_half(pairs, make_model, tokenizer):
    """No gap yet: the loss is 0.6931, and a tie counts half."""
    model = make_model(len(tokenizer)).eval()
    batch = pairs.collate([[0], [1], [2]], 0)
    with torch.no_grad():
        token_losses = model(batch["input_ids"], batch["labels"]).token_losses
        batch["reference_log_probs"] = -token_losses.sum(dim=1)
        loss, named = dpo(model, batch)
    assert loss.item() / 3 == pytest.approx(math.log(2), abs=1e-6)
    assert named["accuracy"] == 1.5 and named["margin"] == 0


def test_a_wrong_gap_pulls_harder_than_a_right_one():
    """The gradient of DPO's loss: -sigmoid(-gap). Where the order is right already, little is left to do."""
    gap = torch.tensor([-3.0, 0.0, 3.0], requires_grad=True)
    preference_losses("dpo", 0.1, gap, 0.0, 0.0).sum().backward()
    torch.testing.assert_close(gap.grad, -torch.sigmoid(-gap.detach()))


# --- the reference ------------------------------------------------------------------------------------------


def test_reference_holds_what_the_model_says_of_each_side(pairs, make_model, tokenizer):
    model = make_model(len(tokenizer))
    add_reference(model, [pairs], "float32", ALONE)
    with torch.no_grad():
        expected = [log_p(model.eval(), *side)[0].item() for pair in pairs for side in pair]
    np.testing.assert_allclose(pairs.reference.log_probs, expected, rtol=1e-5)
    batch = pairs.collate([[5], [2]], 0)
    np.testing.assert_allclose(batch["reference_log_probs"], np.array(expected)[[10, 4, 11, 5]], rtol=1e-5)


def test_reference_is_the_model_without_its_adapter_and_without_dropout(pairs, make_model, tokenizer):
    model = make_model(len(tokenizer))
    plain = side_log_probs(model, pairs, torch.float32, ALONE)
    apply_lora(model, 4, dropout=0.5)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.5)
    model.train()
    add_reference(model, [pairs], "float32", ALONE)
    np.testing.assert_array_equal(pairs.reference.log_probs, plain)
    assert model.training and all(layer.lora.enabled for layer in model.modules() if hasattr(layer, "lora"))
    set_lora(model, True)
    assert np.abs(side_log_probs(model, pairs, torch.float32, ALONE) - plain).max() > 0.1


def test_reference_is_computed_once_and_anew_for_other_weights_data_or_dtype(
        pairs, data, make_model, tokenizer, tmp_path, monkeypatch):
    computed, compute = [], side_log_probs

    def counted(*arguments):
        computed.append(arguments)
        return compute(*arguments)

    monkeypatch.setattr(trainer.reference, "side_log_probs", counted)
    monkeypatch.setattr("dataset.token_cache.CACHE_DIR", tmp_path / "references")
    model = make_model(len(tokenizer))
    other = PreferenceDataset(data, tokenizer, 32, cache_dir=tmp_path)
    add_reference(model, [pairs, pairs], "float32", ALONE)  # validation data may be a part of the same file
    assert len(computed) == 1
    before = pairs.reference.log_probs.copy()
    add_reference(make_model(len(tokenizer)), [pairs], "float32", ALONE)
    assert len(computed) == 1
    np.testing.assert_array_equal(pairs.reference.log_probs, before)
    add_reference(model, [other], "float32", ALONE)
    add_reference(model, [pairs], "bfloat16", ALONE)
    add_reference(make_model(len(tokenizer), seed=1), [pairs], "float32", ALONE)
    assert len(computed) == 4


def test_any_number_of_processes_computes_the_same_reference(pairs, make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(trainer.reference, "TOKENS_TOGETHER", 200)  # several groups
    model = make_model(len(tokenizer))
    alone = side_log_probs(model, pairs, torch.float32, ALONE)
    parts = []
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value])
    for rank in range(3):
        parts.append(side_log_probs(model, pairs, torch.float32, Ranks(rank, 3, torch.device("cpu"))))
    np.testing.assert_array_equal(sum(parts), alone)
    assert all((part != 0).any() for part in parts)


# --- the recipe ---------------------------------------------------------------------------------------------


def test_a_run_learns_the_pairs_by_heart(workshop, flags, tmp_path, read_log):
    records = pair_records(8)
    ended = workshop.run("dpo", *flags(tmp_path, data_path=workshop.write("eight.jsonl", records),
                                       eval_data_path=workshop.write("again.jsonl", records),
                                       eval_fraction=None, max_steps=30, batch_size=8, log_interval=1))
    assert ended.code == 0, ended.err
    log = read_log(tmp_path / "dpo")
    assert log[0]["preference"] == pytest.approx(math.log(2), abs=1e-4)
    assert log[0]["loss"] > log[0]["preference"] + 0.1  # and the SFT term
    last = json.loads((tmp_path / "dpo" / "training.json").read_text())
    assert last["eval_accuracy"] == 1 and last["eval_preference"] < 0.55 and last["eval_margin"] > 0.3
    assert "bits_per_byte" not in last and last["arguments"]["beta"] == 0.1
    assert {"preference", "accuracy", "margin", "chosen", "rejected"} <= log[0].keys()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_loss_widens_the_margin(kind, workshop, flags, tmp_path, read_log):
    ended = workshop.run("dpo", *flags(tmp_path, preference_loss=kind, max_steps=24, lora_rank=4,
                                       learning_rate=1e-2))
    assert ended.code == 0, ended.err
    steps = [line for line in read_log(tmp_path / "dpo") if "margin" in line]
    assert steps[-1]["margin"] > steps[0]["margin"] + 0.05
    arguments = json.loads((tmp_path / "dpo" / "training.json").read_text())["arguments"]
    assert arguments["margin"] == (1 if kind == "simpo" else 0)


def test_a_stopped_run_ends_with_the_same_bits(workshop, flags, tmp_path, read_log, monkeypatch):
    """With QLoRA, where the reference is the base in 4 bits without the adapter."""
    changes = {"max_steps": 14, "lora_rank": 4, "lora_dropout": 0.1, "quantize": "nf4"}
    assert workshop.run("dpo", *flags(tmp_path / "whole", **changes)).code == 0
    import trainer.loop

    save, steps = trainer.loop.save, []

    def stop(run_dir, run, *rest, **more):
        save(run_dir, run, *rest, **more)
        steps.append(run.step)
        if run.step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.loop, "save", stop)
        assert workshop.run("dpo", *flags(tmp_path / "stopped", **changes)).code == 130
    # The reference must come out the same even where its cache is gone.
    for folder in (workshop.folder / "cache").glob("reference-*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    ended = workshop.run("dpo", *flags(tmp_path / "stopped", **changes), "--resume")
    assert ended.code == 0 and steps == [5, 10], ended.err
    whole, stopped = (tmp_path / name / "dpo" for name in ("whole", "stopped"))
    a, b = (load_file(next(folder.glob("*model.safetensors"))) for folder in (whole, stopped))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert read_log(whole) == read_log(stopped)


def test_another_beta_is_another_run(workshop, flags, tmp_path):
    run = flags(tmp_path, max_steps=6)
    assert workshop.run("dpo", *run, "--max_minutes", "0.00001").code != 0  # stops after the first step
    ended = workshop.run("dpo", *run, "--resume", "--beta", "0.2")
    assert ended.code == 2 and "--beta 0.1, not 0.2" in ended.error


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not in this build")
def test_processes_and_accumulation_change_nothing(workshop, flags, tmp_path, read_log):
    """One process with all rows at once; two processes, a row in each forward pass, one of them without a
    row in the last batch of each epoch."""
    changes = {"max_steps": 10, "log_interval": 1, "learning_rate": 1e-3}
    assert workshop.run("dpo", *flags(tmp_path / "one", **changes)).code == 0
    two = flags(tmp_path / "two", micro_batch_size=1, gradient_checkpointing=True, **changes)
    process = forks.start(workshop.command("dpo", *two), processes=2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    ours, theirs = read_log(tmp_path / "two" / "dpo"), read_log(tmp_path / "one" / "dpo")
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:  # AdamW forgives gradients that are wrong by a factor, and their norm does not
            tolerance = 1e-3 if name == "grad_norm" else 1e-5
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-5), name
    one, two = (load_file(tmp_path / name / "dpo" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("words", "reason"), [
    (["--packing"], "--packing: the rows of this stage can't be packed"),
    (["--preference_loss", "ipo", "--label_smoothing", "0.1"], "--label_smoothing has no effect on ipo"),
    (["--margin", "1"], "--margin has no effect on dpo"),
    (["--beta", "0"], "--beta must be above 0"),
    (["--lora_alpha", "8"], "adapters need --lora_rank"),
    (["--replay", "0.1"], "unrecognized arguments"),
])
def test_flags_that_make_no_sense_are_refused_in_one_line(words, reason, workshop, flags, tmp_path):
    ended = workshop.run("dpo", *flags(tmp_path), *words)
    assert ended.code == 2 and reason in ended.error


def test_chats_in_the_place_of_pairs_are_refused_in_one_line(workshop, flags, tmp_path):
    ended = workshop.run("dpo", *flags(tmp_path, data_path=workshop.chats))
    assert ended.code == 2 and "no preference pair: there is no 'chosen' in it" in ended.error


def test_what_a_run_saves_opens_as_the_stage_says(workshop, flags, tmp_path, make_model, tokenizer):
    base = load_model(workshop.base)
    assert workshop.run("dpo", *flags(tmp_path, max_steps=2, learning_rate=1e-2)).code == 0
    assert load_file(tmp_path / "dpo" / "model.safetensors").keys() == base.state_dict().keys() - {
        "lm_head.weight"}
    assert workshop.run("dpo", *flags(tmp_path, max_steps=2, name="adapter", lora_rank=4)).code == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
