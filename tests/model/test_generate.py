"""Decoding: the cache, ragged batches, seeds, and transformers' meaning of every sampling setting."""

import pytest
import torch

from common.errors import ModelError, RunError
from model.generate import LIKELIEST, draw, generate, likely_tokens, penalize
from model.one_token import prepare_to_decode
from model.transformer import CausalLM, ModelConfig


@pytest.fixture(scope="module", params=[lambda model: model, prepare_to_decode], ids=["plain", "one token"])
def model(request):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=48, vocab_size=97, qk_norm=True, initializer_range=0.3)
    return request.param(CausalLM(config).eval())


def prompt(rows=2, length=7):
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(3))


def decode(model, ids, count=12, **settings):
    """All new tokens as (B, count)."""
    return torch.stack(list(generate(model, ids, count, **settings)), dim=1)


def test_greedy_equals_decoding_without_a_cache(model):
    ids = prompt()
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(decode(model, prompt(), temperature=0), ids[:, 7:])


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_ragged_batch_equals_its_rows_alone(model, penalty):
    ids, lengths = prompt(3), torch.tensor([7, 2, 4])
    ids[1, :5] = ids[2, :3] = 0  # what the padding is must not matter
    settings = {"temperature": 0, "repetition_penalty": penalty}
    batch = decode(model, ids, prompt_lengths=lengths, **settings)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(batch[row:row + 1], decode(model, ids[row:row + 1, 7 - length:], **settings))


def test_equals_transformers_generate(model, tmp_path):
    from transformers import AutoModelForCausalLM

    from model.weights import save_model

    save_model(model, tmp_path / "m")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    settings = {"do_sample": False, "repetition_penalty": 1.2, "pad_token_id": 0}
    theirs = twin.generate(prompt(), max_new_tokens=12, **settings)
    assert torch.equal(decode(model, prompt(), temperature=0, repetition_penalty=1.2), theirs[:, 7:])


def test_the_seed_decides(model):
    settings = {"top_p": 0.9, "temperature": 1.5}
    first = decode(model, prompt(), seed=5, **settings)
    torch.manual_seed(99)
    global_state = torch.get_rng_state()
    assert torch.equal(decode(model, prompt(), seed=5, **settings), first)
    assert not torch.equal(decode(model, prompt(), seed=6, **settings), first)
    assert torch.equal(torch.get_rng_state(), global_state)  # a seed leaves the global randomness alone
    decode(model, prompt(), **settings)
    assert not torch.equal(torch.get_rng_state(), global_state)


def test_rows_stop_at_eos_and_wait_for_the_others(model):
    free = decode(model, prompt(), 20, temperature=0)
    eos = free[0, 3].item()  # row 0 meets it at its fourth token at the latest
    unused = min(set(range(97)) - set(free.flatten().tolist()))
    stopped = decode(model, prompt(), 20, temperature=0, eos_token_id=[eos, unused])
    first = free[0].tolist().index(eos)
    assert torch.equal(stopped[0, :first + 1], free[0, :first + 1])
    assert (stopped[0, first:] == eos).all()
    other = free[1].tolist().index(eos) if eos in free[1] else 19
    assert stopped.size(1) == max(first, other) + 1


def test_one_eos_ends_a_single_row(model):
    eos = decode(model, prompt(1), 1, temperature=0)[0, 0].item()
    assert decode(model, prompt(1), 20, temperature=0, eos_token_id=eos).tolist() == [[eos]]


def test_it_is_an_iterator_of_tokens(model):
    stream = generate(model, prompt(), 3, temperature=0)
    token = next(stream)
    assert token.shape == (2,) and token.dtype == torch.int64
    assert len(list(stream)) == 2
    assert list(generate(model, prompt(), 0)) == []


def chances(logits, **settings):
    """The probability of each token (B, V) by `likely_tokens`."""
    found, tokens = likely_tokens(logits, **settings)
    assert all(len(row) == found.size(1) for row in map(torch.unique, tokens))  # none is named twice
    return torch.zeros_like(logits).scatter(1, tokens, found / found.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("settings", [
    {"temperature": 0.7}, {"top_k": 1}, {"top_k": 5}, {"top_k": 500}, {"top_p": 0.0}, {"top_p": 0.3},
    {"top_p": 0.95}, {"temperature": 1.7, "top_k": 20, "top_p": 0.6},
])
def test_filters_mean_what_transformers_means(settings):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, 97) * 3
    logits[0, 10:20] = logits[0].max()  # ties: which of them stay is nowhere said, but how many
    expected = TemperatureLogitsWarper(float(settings.get("temperature", 1.0)))(None, logits)
    if "top_k" in settings:
        expected = TopKLogitsWarper(settings["top_k"])(None, expected)
    if "top_p" in settings:
        expected = TopPLogitsWarper(settings["top_p"])(None, expected)
    found, expected = chances(logits, **settings), expected.softmax(dim=-1)
    torch.testing.assert_close(found[1:], expected[1:])
    torch.testing.assert_close(found[0].sort().values, expected[0].sort().values)


def test_ties_are_kept_by_their_ids_whatever_stands_beside_them():
    # Models in bfloat16 often give several tokens the same logit. A flat row has all rows sorted whole.
    torch.manual_seed(0)
    flat = torch.zeros(1, 2000)
    for _ in range(40):
        logits = (torch.randn(1, 2000) * 4).bfloat16().float()
        alone, together = chances(logits, top_p=0.6), chances(torch.cat([logits, flat]), top_p=0.6)
        assert torch.equal(alone[0] > 0, together[0] > 0)
        tied = logits[0] == logits[0][alone[0] > 0].min()
        kept = alone[0][tied] > 0
        assert torch.equal(kept, kept.sort(descending=True).values)  # the lower ids
    assert torch.equal(chances(flat, top_p=0.25)[0].nonzero()[:, 0], torch.arange(500))


def test_a_wide_nucleus_is_found_too():
    from transformers import TopPLogitsWarper

    logits = torch.randn(3, 1000)  # nearly flat: hundreds of tokens make up 0.9
    expected = TopPLogitsWarper(0.9)(None, logits)
    assert expected.isfinite().sum(dim=-1).min() > LIKELIEST
    torch.testing.assert_close(chances(logits, top_p=0.9), expected.softmax(dim=-1))


def test_no_number_draws_a_token_without_probability():
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).repeat(4, 1)
    numbers = torch.tensor([0.0, 0.49999, 0.5, 1 - 2**-24])
    assert draw(probabilities, numbers).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("penalty", [0.5, 1.4])
def test_repetition_penalty_means_what_transformers_means(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, ids = torch.randn(2, 97), prompt()
    ids[0, 1] = ids[0, 0]  # a token counts once
    seen = torch.zeros(2, 97, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    torch.testing.assert_close(penalize(logits, seen, penalty), expected)


def test_samples_follow_the_distribution(model):
    ids = prompt(1).expand(4000, 7)
    with torch.no_grad():
        expected = chances(model(ids[:1]).logits[:, -1], top_k=5)[0]
    counts = torch.bincount(decode(model, ids, 1, top_k=5, seed=0)[:, 0], minlength=97) / 4000
    assert (counts - expected).abs().max() < 0.04
    assert counts[expected == 0].sum() == 0


@pytest.mark.parametrize(("change", "words"), [
    ({"temperature": -1}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 1.1}, "top_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"input_ids": torch.zeros(1, 0)}, "input_ids"), ({"input_ids": torch.zeros(3)}, "input_ids"),
    ({"prompt_lengths": [7, 0]}, "prompt_lengths"), ({"prompt_lengths": [8, 7]}, "prompt_lengths"),
    ({"prompt_lengths": [7]}, "prompt_lengths"),
])
def test_senseless_settings_are_refused_at_the_call(model, change, words):
    with pytest.raises(ModelError, match=words):
        generate(model, **{"input_ids": prompt(), "max_new_tokens": 1} | change)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}])
@pytest.mark.parametrize("eos", [None, 0])  # 0: what argmax finds where all logits are NaN
def test_a_model_that_is_not_finite_gives_no_token(model, bad, settings, eos):
    weight = model.model.layers[1].mlp.down_proj.weight
    before = weight.data[0, 0].item()
    weight.data[0, 0] = bad
    try:
        with pytest.raises(RunError, match="token 1 of the answer: the weight model.layers.1.mlp.down_proj"):
            next(generate(model, prompt(), 3, eos_token_id=eos, **settings))
    finally:
        weight.data[0, 0] = before


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_finite_weights_that_overflow_are_told_from_damaged_ones(model, temperature, monkeypatch):
    table = model.model.norm.weight
    monkeypatch.setattr(table, "data", torch.full_like(table.data, 3e38))
    with pytest.raises(RunError, match="token 1 of the answer: the model's numbers .* in float32"):
        next(generate(model, prompt(1), 5, temperature=temperature, seed=0))
