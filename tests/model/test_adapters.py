"""Several adapters on one model: each equal to itself alone, combinations equal to PEFT's."""

import shutil

import pytest
import torch
from peft import PeftModel
from small_models import IDS, close, logits, twins
from torch import nn

from common.errors import ModelError
from model import lora as L
from model.adapters import Adapters, RowLoRA, set_lora
from model.generate import generate
from model.quantize import quantize_model

# a, b and c have the same layers; a and b the same rank; d has other layers
KINDS = {
    "a": dict(rank=4, alpha=8),
    "b": dict(rank=4, alpha=2, rslora=True),
    "c": dict(rank=3, init="pissa"),
    "d": dict(rank=2, target_modules=["q_proj", "lm_head"]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, options) in enumerate(KINDS.items()):
        model = twins()[0]
        L.apply_lora(model, **options)
        torch.manual_seed(seed)
        for linear in (m for m in model.modules() if isinstance(m, L.LoRALinear)):
            nn.init.normal_(linear.lora.B.weight, std=0.1)
        L.save_lora(model, folder / name)
    return folder


def alone(home, name, ids=IDS, model=None):
    """The logits of one adapter on a model of its own, or of the base."""
    model = twins()[0] if model is None else model
    if name is not None:
        L.load_lora(model, home / name)
    return logits(model, ids)


def loaded(home, names="abcd", model=None):
    adapters = Adapters(twins()[0] if model is None else model)
    assert [adapters.load(home / name) for name in names] == list(names)
    return adapters


# ---- switching


def test_switching_gives_each_to_the_bit_and_leaves_the_base_alone(home, tmp_path):
    for name in "abcd":
        shutil.copytree(home / name, tmp_path / name)
    adapters = loaded(tmp_path)
    base = {name: (p, p.detach().clone()) for name, p in adapters.model.named_parameters()}
    for name in "abcd":
        shutil.rmtree(tmp_path / name)  # nothing is read again
    for name in ("a", None, "d", "b", "c", "a", "a", None):
        adapters.use(name)
        assert adapters.in_use == name and torch.equal(logits(adapters.model), alone(home, name))
        state = {key for key in adapters.model.state_dict() if ".lora." in key}
        if name == "d":
            q = "model.layers.{}.self_attn.q_proj.lora.{}.weight"
            assert state == {q.format(i, k) for i in (0, 1) for k in "AB"} | {
                "lm_head.lora.A.weight",
                "lm_head.lora.B.weight",
            }
        else:
            assert len(state) == (0 if name is None else 28)
        now = dict(adapters.model.named_parameters())
        assert all(now[key] is p and torch.equal(p, values) for key, (p, values) in base.items())


def test_a_merge_or_a_switch_off_ends_with_the_switch(home):
    adapters = loaded(home, "ab")
    adapters.use("a")
    L.merge_lora(adapters.model)
    adapters.use("b")
    assert torch.equal(logits(adapters.model), alone(home, "b"))
    set_lora(adapters.model, False)
    adapters.use("a")
    adapters.use("b")
    assert torch.equal(logits(adapters.model), alone(home, "b"))


def test_training_one_leaves_the_others(home):
    adapters = loaded(home, "ab")
    adapters.use("a")
    L.freeze_all_but_lora(adapters.model)
    optimizer = torch.optim.AdamW(L.lora_parameters(adapters.model), lr=1e-2)
    adapters.model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = logits(adapters.model)
    adapters.use("b")
    assert torch.equal(logits(adapters.model), alone(home, "b"))
    adapters.use("a")
    assert torch.equal(logits(adapters.model), trained) and not close(trained, alone(home, "a"), 1e-3)


def test_adapters_follow_the_model_to_another_device(home):
    adapters = loaded(home, "ab")
    adapters.use("a")
    adapters.model.to("meta")
    adapters.use("b")
    assert all(p.device.type == "meta" for p in adapters.model.parameters())


def test_mistakes_are_one_line_and_change_nothing(home):
    adapters = loaded(home)
    adapters.use("a")
    model = adapters.model
    for action, message in (
        (lambda: adapters.use("e"), "adapter 'e' is not loaded; loaded: a, b, c, d"),
        (lambda: adapters.use({"a": 1.0, "e": 1.0}), "'e' is not loaded"),
        (lambda: adapters.use_rows(["a", "e"]), "'e' is not loaded"),
        (lambda: adapters.use({"a": float("nan")}), "a number for each"),
        (lambda: adapters.use({}), "a number for each"),
        (lambda: adapters.combine("x", {"a": 1, "d": 1}, "linear"), r"equal ranks.*q_proj has \[4, 2\]"),
        (lambda: adapters.combine("x", {"a": 1, "c": 1}, "linear"), r"equal ranks.*\[4, 6\]"),
        (lambda: adapters.combine("x", {"a": 1, "b": 1}, "ties"), "linear, cat, svd, not 'ties'"),
        (lambda: adapters.combine("x", {"a": 1, "b": 1}, "cat", 4), "rank"),
        (lambda: adapters.combine("x", {"a": 1, "b": 1}, "svd", 0), "rank must be from 1"),
        (lambda: adapters.combine("x", {"a": 1, "b": 1}, "svd", 33), "rank must be from 1"),
        (lambda: adapters.combine("b", {"a": 1}, "cat"), "'b' already"),
        (lambda: adapters.load(home / "a"), "'a' already"),
        (lambda: adapters.load(home / "nowhere"), "nowhere: not found"),
        (lambda: Adapters(model), "has LoRA already"),
    ):
        with pytest.raises(ModelError, match=message) as error:
            action()
        assert "\n" not in str(error.value)
        assert adapters.in_use == "a" and set(adapters.adapters) == set("abcd")
        assert torch.equal(logits(model), alone(home, "a"))


# ---- combining


def change(model):
    """{layer: scale B A} of the adapter in use."""
    layers = {name: m.lora for name, m in model.named_modules() if isinstance(m, L.LoRALinear)}
    return {name: lora.scaling * lora.B.weight @ lora.A.weight for name, lora in layers.items()}


def test_a_mix_is_the_weighted_sum_of_the_changes(home):
    adapters, weights = loaded(home), {"a": 0.7, "b": -0.3, "c": 0.5}
    changes = {}
    for name in weights:
        adapters.use(name)
        changes[name] = change(adapters.model)
    adapters.use(weights)
    for layer, sum_of_them in change(adapters.model).items():
        assert close(sum_of_them, sum(w * changes[name][layer] for name, w in weights.items()))
    adapters.use({"a": 1.0})
    assert close(logits(adapters.model), alone(home, "a"))
    adapters.use({"a": 0.0})
    assert close(logits(adapters.model), alone(home, None))


SAME = [dict(a=0.7, b=0.3), dict(a=1.5, b=-0.5)]  # adapters of equal ranks
OTHER = [dict(a=1.0, c=0.5), dict(a=0.5, d=2.0), dict(d=-1.0, a=0.5, c=0.3)]  # other ranks; d: other layers


@pytest.mark.parametrize(
    "how, rank, weights",
    [("linear", None, w) for w in SAME]
    + [(how, rank, w) for how, rank in (("cat", None), ("svd", None), ("svd", 2)) for w in SAME + OTHER],
)
def test_combinations_are_those_of_peft(home, tmp_path, how, rank, weights):
    peft = PeftModel.from_pretrained(twins()[1], home / "a", adapter_name="a")
    for name in weights.keys() - {"a"}:
        peft.load_adapter(home / name, name)
    peft.add_weighted_adapter(list(weights), list(weights.values()), "new", how, svd_rank=rank)
    peft.set_adapter("new")

    adapters = loaded(home)
    adapters.combine("new", weights, how, rank)
    adapters.use("new")
    assert close(logits(adapters.model), logits(peft.eval()))
    L.save_lora(adapters.model, tmp_path / "new")
    assert close(alone(tmp_path, "new"), logits(peft))
    again = PeftModel.from_pretrained(twins()[1], tmp_path / "new").eval()
    assert close(logits(again), logits(peft))
    if "d" not in weights:  # otherwise layers differ in rank
        ranks = [6 if name == "c" else 4 for name in weights]
        wanted = {"linear": 4, "cat": sum(ranks), "svd": rank or max(ranks)}
        assert again.peft_config["default"].r == wanted[how]


def test_svd_of_enough_rank_is_the_sum(home):
    adapters = loaded(home)
    adapters.use({"a": 0.7, "b": 0.3})
    expected = logits(adapters.model)
    adapters.combine("whole", {"a": 0.7, "b": 0.3}, "svd", rank=8)
    adapters.use("whole")
    assert close(logits(adapters.model), expected)


# ---- a batch whose rows differ


@pytest.mark.parametrize("rows", [["a", None, "b", "a"], ["c", "b", "a", None], [None] * 4])
def test_rows_equal_the_rows_alone(home, rows):
    adapters = loaded(home)
    adapters.use_rows(rows)
    together = logits(adapters.model)
    for i, name in enumerate(rows):
        assert close(together[i], alone(home, name, IDS[i : i + 1])[0])
    adapters.use("b")
    assert torch.equal(logits(adapters.model), alone(home, "b"))


def test_rows_of_different_layers_and_generation(home):
    adapters = loaded(home)
    rows = ["d", "a", None, "c"]
    adapters.use_rows(rows)
    together = torch.stack(list(generate(adapters.model, IDS, 6, temperature=0)), dim=1)
    for i, name in enumerate(rows):
        model = twins()[0]
        if name:
            L.load_lora(model, home / name)
        row = torch.stack(list(generate(model, IDS[i : i + 1], 6, temperature=0)), dim=1)
        assert torch.equal(together[i : i + 1], row)


def test_rows_over_4_bits_and_in_half_precision(home):
    adapters = loaded(home, "ab", quantize_model(twins()[0]))
    adapters.use_rows(["a", None, "b", "b"])
    together = logits(adapters.model)
    for i, name in enumerate(["a", None, "b", "b"]):
        assert close(together[i], alone(home, name, IDS[i : i + 1], quantize_model(twins()[0]))[0])
    adapters = loaded(home, "ab", twins()[0].to(torch.bfloat16))
    adapters.use_rows(["a", None, "b", "b"])
    half = logits(adapters.model)
    assert half.dtype == torch.bfloat16
    for i, name in enumerate(["a", None]):
        assert close(half[i], alone(home, name, IDS[i : i + 1])[0], 0.1)


def test_rows_cannot_be_merged_saved_or_fed_another_batch(home, tmp_path):
    adapters = loaded(home)
    adapters.use_rows(["a", "b"])
    model, before = adapters.model, [p.clone() for p in adapters.model.parameters()]
    assert any(isinstance(m, RowLoRA) for m in model.modules())
    for action in (
        lambda: L.merge_lora(model),
        lambda: L.save_lora(model, tmp_path / "x"),
        lambda: L.load_lora(model, home / "a"),
        lambda: logits(model),
    ):
        with pytest.raises(ModelError) as error:
            action()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    logits(model, IDS[:2])


def test_rows_follow_the_model_to_another_device(home, monkeypatch):
    adapters = loaded(home)
    adapters.use_rows(["a", "b"])
    logits(adapters.model, IDS[:2])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)  # it does not know "meta"
    assert adapters.model.to("meta")(IDS[:2].to("meta")).logits.is_meta
