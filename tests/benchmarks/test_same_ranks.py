"""same_ranks.py: what counts as the same run, by hand; how near a random number lies to another token."""

import pytest
import torch

from benchmarks import same_ranks
from common.errors import UsageError
from model.generate import draw
from model.transformer import CausalLM, ModelConfig


def run(losses=(1.0, 2.0, 3.0, 4.0), weight=0.0, **answers):
    return {"losses": list(losses), "weights": {"w": torch.tensor([1.0, weight])}, "answers": answers}


def answer(call, ids, *borders):
    return {"call": call, "ids": ids, "borders": list(borders) or [0.1] * len(ids)}


def judged(first, other, steps_of_rollout=2):
    return same_ranks.compared(first, other, steps_of_rollout)


def test_losses_and_weights_must_agree():
    nothing = {"loss": 0, "weights": 0, "beyond": 0, "answers": 0, "flips": 0, "tie": None}
    assert judged(run(), run()) == nothing | {"right": True}
    assert judged(run(), run((1, 2, 3, 4 + 9e-6), 9e-6))["right"]
    assert not judged(run(), run((1, 2 + 1.1e-5, 3, 4)))["right"]
    assert not judged(run(), run(weight=1.1e-5))["right"]
    with pytest.raises(ValueError):
        judged(run(), run((1, 2, 3)))
    with pytest.raises(UsageError, match="other answers"):
        judged(run(a=answer(0, [1])), run(b=answer(0, [1])))


def test_a_flip_must_be_a_tie_and_all_before_it_equal():
    """Rollout 1 is learnt from in steps 2 and 3: there everything may differ, and before it nothing."""
    first = run(a=answer(0, [5, 6]), b=answer(1, [7, 8, 9], 0.1, 1e-6, 0.1), c=answer(2, [1, 2]))
    later = {"c": answer(2, [3, 4])}  # weights differ by now, so this is no tie and need not be one
    tie = {"a": answer(0, [5, 6]), "b": answer(1, [7, 4], 0.1, 2e-6), **later}
    row = judged(first, run((1, 2, 30, 40), 5.0, **tie))
    assert row["right"] and row["flips"] == 1 and row["tie"] == 2e-6 and row["steps"] == 2
    assert not judged(first, run((1, 2.1, 30, 40), 5.0, **tie))["right"]
    for no_tie in (answer(1, [7, 4], 0.1, 2e-5), answer(1, [6], 1e-9)):  # the second differs where 0.1 was
        assert not judged(first, run((1, 2, 30, 40), 5.0, **tie | {"b": no_tie}))["right"]
    both = {**tie, "a": answer(0, [5, 7])}
    assert not judged(first, run(**both))["right"]  # the first rollout differs, and by no tie


def test_the_distance_to_the_border_is_what_it_takes_to_draw_another_token():
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1, intermediate_size=16)).eval()
    prompt, numbers, ids, expected = [3, 4], torch.rand(6), [3, 4], []
    for number in numbers:
        with torch.no_grad():
            p = (model(torch.tensor([ids])).logits[:, -1] / 0.8).softmax(-1)
        token = draw(p, number[None]).item()
        steps = torch.arange(1, 20_000) * 1e-4  # away from the number, in both directions
        others = [draw(p.expand(len(steps), -1), number + sign * steps) != token for sign in (1, -1)]
        inside = [steps[found & (0 <= number + sign * steps) & (number + sign * steps < 0.999)]
                  for found, sign in zip(others, (1, -1), strict=True)]
        expected.append(min(float(found.min()) for found in inside if len(found)))
        ids.append(token)
    found = same_ranks.distances(model, prompt, torch.tensor(ids[2:]), numbers, 0.8)
    assert len(set(ids[2:])) > 1 and found == pytest.approx(expected, abs=2e-4)
