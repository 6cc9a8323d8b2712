"""Many answers at once: each is the answer that its prompt and its random numbers draw alone."""

import shutil
from copy import deepcopy

import pytest
import torch

from common.errors import RunError
from model.compiled_step import COMPILERS, compile_decoding
from model.generate import generate
from model.sample_many import sample_many
from model.transformer import CausalLM, ModelConfig

ENDS, LONGEST = [5, 9, 20, 33], 12
PROMPTS = [[7, 3, 60], [11, 2, 8, 40, 1, 77], [50], [30, 31, 32, 33]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=48, vocab_size=97, qk_norm=True, initializer_range=0.2)
    return CausalLM(config).eval()


def uniform(rows, seed=1):
    return torch.rand(rows, LONGEST, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def drawn_without_a_cache(model, prompt, numbers, temperature):
    """The definition: one forward pass over the whole text for each token, and the sum of probabilities."""
    ids = list(prompt)
    for number in numbers.tolist():
        probabilities = (model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1).tolist()
        below = [sum(probabilities[:token + 1]) <= number for token in range(len(probabilities))]
        ids.append(sum(below))  # the first token with which the sum exceeds the number
        if ids[-1] in ENDS:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_each_answer_is_the_one_that_its_numbers_draw_alone(model, temperature):
    numbers = uniform(len(PROMPTS) * 3)
    answers = sample_many(model, PROMPTS, LONGEST, ENDS, 3, temperature, numbers)
    expected = [drawn_without_a_cache(model, PROMPTS[row // 3], numbers[row], temperature)
                for row in range(12)]
    assert [answer.tolist() for answer in answers] == expected
    lengths = set(map(len, expected))
    assert len(lengths) > 3 and LONGEST in lengths  # rows left at several times, and one was cut off
    for row in (0, 4, 11):
        [alone] = sample_many(model, [PROMPTS[row // 3]], LONGEST, ENDS, 1, temperature, numbers[row:row + 1])
        assert alone.tolist() == expected[row]


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")
def test_a_step_in_cpp_draws_the_same_and_sees_new_weights(model):
    numbers, model = uniform(12), deepcopy(model)
    compiled = compile_decoding(deepcopy(model))
    for _ in range(2):
        answers = [sample_many(m, PROMPTS, LONGEST, ENDS, 3, 1.0, numbers) for m in (model, compiled)]
        assert [a.tolist() for a in answers[0]] == [a.tolist() for a in answers[1]]
        for m in (model, compiled):
            with torch.no_grad():
                m.model.layers[0].mlp.up_proj.weight.mul_(-2)
    assert compiled.one_token.packed  # the step was taken


def test_equal_numbers_draw_equal_answers_whatever_stands_beside_them(model):
    numbers = uniform(4)
    together = sample_many(model, PROMPTS, LONGEST, ENDS, 1, 1.0, numbers)
    turned = sample_many(model, PROMPTS[::-1], LONGEST, ENDS, 1, 1.0, numbers.flip(0))
    assert [a.tolist() for a in together] == [a.tolist() for a in turned[::-1]]


def test_greedy_answers_are_those_of_generate(model):
    answers = sample_many(model, PROMPTS, LONGEST, ENDS, 1, 0)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = generate(model, torch.tensor([prompt]), LONGEST, temperature=0, eos_token_id=ENDS)
        assert answer.tolist() == torch.cat(list(tokens)).tolist()


def test_tokens_are_drawn_as_often_as_they_are_probable(model):
    """Numbers 0.5/N, 1.5/N ... meet every token in proportion to its probability, up to 1/N."""
    count = 2000
    numbers = ((torch.arange(count) + 0.5) / count)[:, None].expand(-1, LONGEST)
    answers = sample_many(model, [PROMPTS[1]], 1, [96], count, 0.8, numbers)
    found = torch.bincount(torch.cat(answers), minlength=97) / count
    with torch.no_grad():
        right = (model(torch.tensor([PROMPTS[1]])).logits[0, -1] / 0.8).softmax(-1)
    assert (found - right).abs().max() <= 1.01 / count


def test_a_model_whose_numbers_are_not_finite_is_named(model):
    broken = CausalLM(model.config).eval()
    broken.model.norm.weight.data[3] = float("nan")
    for temperature in (0, 1.0):
        with pytest.raises(RunError, match="the weight model.norm.weight holds numbers that are not finite"):
            sample_many(broken, PROMPTS, LONGEST, ENDS, 1, temperature, uniform(4))


def test_half_precision_by_autocast(model):
    """Training under autocast samples under autocast: the cache then has its type."""
    with torch.autocast("cpu", torch.bfloat16):
        answers = sample_many(model, PROMPTS, LONGEST, ENDS, 2, 1.0, uniform(8))
    assert len(answers) == 8 and all(1 <= len(answer) <= LONGEST for answer in answers)
