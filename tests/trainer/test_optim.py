"""Muon against torch's own, which parameters decay, and the learning rate over time."""

import copy
import math

import pytest
import torch
from torch import nn

from trainer.optim import Muon, build_optimizers, learning_rate_factor, orthogonalise


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_is_torchs_muon(weight_decay):
    torch.manual_seed(0)
    shapes = [(32, 64), (64, 32), (32, 64), (16, 16)]  # wide, tall, a second one of a shape, square
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.02, weight_decay=weight_decay)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in ours]
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        # Both iterate in bfloat16, in products of another order: equal to a few of its last places.
        assert (p - q).norm() < 0.02 * (q - before).norm()


def test_orthogonalise_keeps_singular_vectors_and_evens_the_values():
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 60)
    result = orthogonalise(matrices).float()
    values = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape and values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    torch.testing.assert_close(result, u @ v, atol=0.1, rtol=0.5)
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_in_float32_muon_carries_rounding_on_and_does_not_blow_it_up():
    torch.manual_seed(0)
    weight, moved = torch.randn(64, 32), {}  # dtype of the iteration -> how far rounding moved a weight
    gradient, noise = torch.randn(64, 32), 1e-5 * torch.randn(64, 32)
    for dtype in (torch.float32, torch.bfloat16):
        ends = []
        for g in (gradient, gradient + noise):
            model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.Linear(32, 64, bias=False)})})
            model.load_state_dict({"model.layers.weight": weight})
            (optimizer,) = build_optimizers(model, "muon", 1.0, 0.0, dtype=dtype)
            model.model.layers.weight.grad = g
            optimizer.step()
            ends.append(model.model.layers.weight.detach())
        moved[dtype] = (ends[0] - ends[1]).abs().max().item()
    assert moved[torch.float32] < 1e-3 < moved[torch.bfloat16]
    assert build_optimizers(model, "muon", 1.0, 0.0, dtype=torch.float16)[0].dtype == torch.float32


def test_muon_takes_many_matrices_in_parts(monkeypatch):
    torch.manual_seed(0)
    start, ends = torch.randn(5, 8, 16), []
    for at_once in (5, 2, 0):  # all five; two, two and one; one by one
        monkeypatch.setattr("trainer.optim.MAX_NUMBERS_AT_ONCE", at_once * 8 * 16)
        weights = [nn.Parameter(matrix.clone()) for matrix in start]
        for w in weights:
            w.grad = w.detach().sin()
        Muon(weights, lr=0.1, dtype=torch.float32).step()
        ends.append(torch.stack([w.detach() for w in weights]))
    assert (ends[0] - start).abs().amax(dim=(1, 2)).min() > 0.01
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-6, rtol=0)


def test_muon_resumes_from_its_state():
    torch.manual_seed(0)
    first, second = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
    gradients = torch.randn(4, 8, 8)
    a, b = Muon([first], lr=0.1), Muon([second], lr=0.5)
    for i, gradient in enumerate(gradients):
        if i == 2:
            second.data.copy_(first)
            b.load_state_dict(copy.deepcopy(a.state_dict()))  # its learning rate too
        first.grad = second.grad = gradient
        a.step()
        if i >= 2:
            b.step()
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_place_and_only_matrices_decay(make_model, name):
    model = make_model()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    optimizers = build_optimizers(model, name, 1e-3, 0.1)
    names = {p: n for n, p in model.named_parameters()}
    seen = [names[p] for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(seen) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                decays = parameter.ndim == 2 and "embed" not in names[parameter]
                assert group["weight_decay"] == (0.1 if decays else 0), names[parameter]
                in_blocks = parameter.ndim == 2 and ".layers." in names[parameter]
                assert isinstance(optimizer, Muon) == (name == "muon" and in_blocks), names[parameter]


def test_nothing_but_matrices_of_the_blocks_makes_muon_alone(make_model):
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name and parameter.ndim == 2)
    (optimizer,) = build_optimizers(model, "muon", 1e-3, 0.1)
    assert isinstance(optimizer, Muon)


def test_schedule_warms_up_then_falls_as_half_a_cosine():
    factors = [learning_rate_factor(step, 100, 0.02) for step in range(100)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[51] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.001
    assert all(a >= b for a, b in zip(factors[1:], factors[2:], strict=False))
    assert factors[26] == pytest.approx(0.5 * (1 + math.cos(math.pi * 24 / 98)))


def test_wsd_holds_until_the_middle_and_then_falls_straight():
    factors = [learning_rate_factor(step, 100, 0.02, "wsd") for step in range(100)]
    assert factors[:2] == [0.5, 1.0] and set(factors[2:51]) == {1.0}
    assert factors[75] == 0.5 and factors[99] == pytest.approx(0.02)
    assert {round(a - b, 9) for a, b in zip(factors[50:], factors[51:], strict=False)} == {0.02}


@pytest.mark.parametrize("max_steps, warmup", [(1, 0.0), (1, 0.9), (3, 0.02), (10, 0.99), (7, 0.5)])
def test_schedule_never_wastes_a_step(max_steps, warmup):
    for schedule in ("cosine", "wsd"):
        factors = [learning_rate_factor(step, max_steps, warmup, schedule) for step in range(max_steps)]
        assert all(0 < factor <= 1 for factor in factors)
