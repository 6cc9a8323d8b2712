"""Rows that join and leave: each gets what `generate` gives to it alone, whoever is beside it."""

import math
import random
import shutil

import pytest
import torch

from model.adapters import Adapters
from model.batch import Batch, Row
from model.compiled_step import COMPILERS, compile_decoding
from model.generate import generate
from model.lora import apply_lora, lora_parameters, save_lora
from model.one_token import prepare_to_decode
from model.transformer import CausalLM, ModelConfig

ENDS, VOCAB = (5, 9, 20, 33), 97
NAMES = [None, "a", "b", {"a": 0.5, "b": -1.0}]


def small(**more) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(
        ModelConfig(
            **{
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 48,
                "vocab_size": VOCAB,
                "initializer_range": 0.2,
                "qk_norm": True,
            }
            | more
        )
    ).eval()


@pytest.fixture(scope="module", params=[lambda model: model, prepare_to_decode, compile_decoding],
                ids=["plain", "one_token", "compiled"])
def adapters(request, tmp_path_factory):
    """The adapters a and b on a small model; with the fast forward passes for single tokens, and without."""
    folder, model = tmp_path_factory.mktemp("adapters"), small()
    for name in ("a", "b"):
        other = small()
        apply_lora(other, rank=3 if name == "a" else 5)
        for parameter in lora_parameters(other):
            torch.nn.init.normal_(parameter, std=0.3)
        save_lora(other, folder / name)
    if request.param is compile_decoding and not any(map(shutil.which, COMPILERS)):
        pytest.skip("there is no C++ compiler")
    request.param(model)
    found = Adapters(model)
    for name in ("a", "b"):
        found.load(folder / name)
    return found


def batch_of(adapters, max_rows=8, max_tokens=2048):
    return Batch(adapters.model, adapters, max_rows, max_tokens)


def alone(adapters, row: Row) -> list[int]:
    adapters.use(row.adapter)
    tokens = generate(
        adapters.model,
        torch.tensor([row.prompt]),
        row.max_new_tokens,
        row.temperature,
        row.top_k,
        row.top_p,
        row.seed,
        row.repetition_penalty,
        list(row.end_tokens),
    )
    return [token.item() for token in tokens]


def some_row(rng: random.Random) -> Row:
    return Row(
        [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))],
        rng.choice([1, 3, 20, 60]),
        ENDS,
        temperature=rng.choice([0, 0.5, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 3]),
        top_p=rng.choice([1.0, 0.8]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        seed=rng.randrange(2**40),
        adapter=rng.choice(NAMES),
    )


def run(batch: Batch, rows: list[Row], rng: random.Random) -> None:
    """Lets all rows join at random moments, and grow until they end."""
    waiting = list(rows)
    while waiting or batch.rows:
        joining = []
        while waiting and rng.random() < 0.5 and batch.fits([*joining, waiting[0]]):
            joining.append(waiting.pop(0))
        if joining:
            batch.add(joining)
        if batch.rows:
            batch.step()


def test_whoever_joins_or_leaves_each_row_is_what_it_is_alone(adapters):
    rng = random.Random(1)
    rows = [some_row(rng) for _ in range(80)]
    run(batch_of(adapters), rows, rng)
    assert [row.tokens for row in rows] == [alone(adapters, row) for row in rows]
    for row in rows:
        assert row.finish == ("stop" if row.tokens[-1] in ENDS else "length")
    assert {row.finish for row in rows} == {"stop", "length"}


@pytest.mark.parametrize("fast", [False, True])
def test_a_window_in_some_layers_moves_along_with_each_row(fast):
    model, rng = small(sliding_window=6, full_attention_every=2), random.Random(3)
    if fast:
        prepare_to_decode(model)
    adapters = Adapters(model)
    rows = [Row([rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))], 20, temperature=0.0)
            for _ in range(12)]  # fmt: skip
    run(batch_of(adapters, max_rows=4), rows, rng)
    assert [row.tokens for row in rows] == [alone(adapters, row) for row in rows]


def test_a_small_cache_is_moved_and_divided_anew(adapters):
    """Rows of very different lengths share 512 tokens: the cache is moved, and fewer long rows fit."""
    rng = random.Random(2)
    rows = [
        Row(
            [rng.randrange(VOCAB) for _ in range(rng.choice([2, 100, 200]))],
            rng.choice([4, 60, 250]),
            temperature=1.0,
            seed=place,
        )
        for place in range(30)
    ]
    batch = batch_of(adapters, max_rows=4, max_tokens=512)
    lengths = set()
    move = batch._move
    batch._move = lambda by: (lengths.add("moved"), move(by))
    arrange = batch._arrange
    batch._arrange = lambda length: (lengths.add(length), arrange(length))
    run(batch, rows, rng)
    assert [row.tokens for row in rows] == [alone(adapters, row) for row in rows]
    assert {"moved", 256, 512} <= lengths
    assert all(memory.numel() == 2 * 2 * 8 * 512 for memory in batch.memory)  # layers, heads, width, tokens


def test_a_row_that_leaves_early_disturbs_nobody(adapters):
    rng = random.Random(3)
    rows = [some_row(rng) for _ in range(6)]
    for row in rows:
        row.max_new_tokens, row.end_tokens = 20, ()
    batch = batch_of(adapters)
    batch.add(rows)
    for gone in (rows[0], rows[3]):
        batch.step()
        batch.remove(gone)
    while batch.rows:
        batch.step()
    assert [len(rows[0].tokens), len(rows[3].tokens)] == [2, 3]
    for row in (rows[1], rows[2], rows[4], rows[5]):
        assert row.tokens == alone(adapters, row)


def test_a_row_that_does_not_fit_waits(adapters):
    batch = batch_of(adapters, max_rows=2, max_tokens=600)
    long, short = Row([1] * 200, 150), Row([1], 10)
    assert batch.fits([short, Row([2], 10)]) and not batch.fits([short, short, short])
    assert batch.fits([long]) and not batch.fits([long, short])  # the cache is divided into equal rows
    batch.add([short])
    assert not batch.fits([long])
    while batch.rows:
        batch.step()
    assert batch.fits([long])


@torch.no_grad()
def test_penalties_and_biases_by_their_definitions(adapters):
    """presence and frequency: https://platform.openai.com/docs/api-reference"""
    prompt, model = [3, 4, 5], adapters.model
    batch = batch_of(adapters)
    row = Row(
        prompt, 25, temperature=0, presence_penalty=0.7, frequency_penalty=0.4, logit_bias={8: 3.0, 9: -100}
    )
    batch.add([row])
    while batch.rows:
        batch.step()
    adapters.use(None)
    ids = list(prompt)
    for _ in range(25):
        scores = model(torch.tensor([ids])).logits[0, -1].tolist()
        for token in range(VOCAB):
            count = ids[len(prompt) :].count(token)
            scores[token] -= 0.4 * count + (0.7 if count else 0)
        scores[8], scores[9] = scores[8] + 3, scores[9] - 100
        ids.append(max(range(VOCAB), key=scores.__getitem__))
    assert row.tokens == ids[len(prompt) :]
    assert len(set(row.tokens)) > len(set(alone(adapters, Row(prompt, 25, temperature=0))))


@torch.no_grad()
def test_log_probabilities_are_the_models_own(adapters):
    batch = batch_of(adapters)
    rows = [
        Row(
            [7, 8, 9, 10],
            6,
            temperature=0.5,
            seed=1,
            top_logprobs=3,
            prompt_logprobs=True,
            logit_bias={0: 50.0},
        ),
        Row([1] * 9, 4, temperature=0),
        Row([2], 6, seed=2, top_logprobs=0),
    ]
    batch.add(rows)
    while batch.rows:
        batch.step()
    adapters.use(None)
    for row in (rows[0], rows[2]):
        ids = row.prompt + row.tokens
        log_probs = adapters.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [*row.logprobs_of_prompt, *row.logprobs]
        begin = len(ids) - len(found)
        assert [choice.token for choice in found] == ids[begin:]
        for place, choice in enumerate(found, begin):
            if place == 0:
                assert choice.logprob is None and choice.top == []
                continue
            assert math.isclose(choice.logprob, log_probs[place - 1, choice.token].item(), abs_tol=1e-4)
            top = log_probs[place - 1].topk(row.top_logprobs)
            assert [token for token, _ in choice.top] == top.indices.tolist()
            torch.testing.assert_close(torch.tensor([value for _, value in choice.top]), top.values)
    assert (
        rows[0].tokens == [0] * 6 and len(rows[0].logprobs_of_prompt) == 4
    )  # the bias is not told
    assert not rows[1].logprobs


def test_a_constraint_rules_tokens_out_and_hears_what_came(adapters):
    class Even:
        heard, error = [], None

        def allowed(self):
            return torch.arange(VOCAB) % 2 == 0

        def accept(self, token):
            self.heard.append(token)

    row, free = Row([3], 30, seed=4, constraint=Even()), Row([3], 30, seed=4)
    batch = batch_of(adapters)
    batch.add([row, free])
    while batch.rows:
        batch.step()
    assert all(token % 2 == 0 for token in row.tokens) and Even.heard == row.tokens
    assert any(token % 2 for token in free.tokens)


def test_a_constraint_that_fails_ends_the_row(adapters):
    class Fails:
        error = None

        def allowed(self):
            return torch.ones(VOCAB, dtype=torch.bool)

        def accept(self, token):
            self.error = "too complex"

    row, other = Row([3], 30, seed=4, constraint=Fails()), Row([3], 3, seed=4)
    batch = batch_of(adapters)
    batch.add([row, other])
    while batch.rows:
        batch.step()
    assert (row.finish, row.error, len(row.tokens)) == ("error", "too complex", 1)
    assert (other.finish, len(other.tokens)) == ("length", 3)


def test_a_long_prompt_is_read_in_parts_while_others_grow(adapters, monkeypatch):
    monkeypatch.setattr("model.batch.TOKENS_OF_A_PART", 16)
    rng = random.Random(5)
    others = [some_row(rng) for _ in range(3)]
    for row in others:
        row.max_new_tokens, row.end_tokens = 60, ()
    long = [Row([rng.randrange(VOCAB) for _ in range(length)], 10, seed=length, adapter="b", top_logprobs=1,
                prompt_logprobs=length == 90) for length in (90, 70)]
    batch, num_parts = batch_of(adapters), 0
    batch.add(others)
    for _ in batch.read(long):
        num_parts += 1
        batch.step()
        if num_parts == 3:
            batch.remove(others[1])
    assert num_parts == 11  # 90 tokens of two prompts, 8 of each in a part
    while batch.rows:
        batch.step()
    for row in (others[0], others[2], *long):
        assert row.tokens == alone(adapters, row)
    assert [choice.token for choice in long[0].logprobs_of_prompt] == long[0].prompt


def answered(batch: Batch, *rows: Row) -> None:
    batch.add(list(rows))
    while batch.rows:
        batch.step()


def test_a_chat_that_goes_on_computes_what_is_new(adapters):
    """Four chats of mixed adapters, in changing company, against the answers without a cache."""
    rng = random.Random(7)
    batch = Batch(adapters.model, adapters, 6, 2048, max_kept=600)
    histories, known = [[rng.randrange(VOCAB) for _ in range(20)] for _ in NAMES], 0
    for turn in range(5):
        rows = [Row(list(history), 8, (), temperature=rng.choice([0, 1]), seed=turn, adapter=name)
                for history, name in zip(histories, NAMES, strict=True)]
        first = rng.randrange(1, 4)
        for some in (rows[:first], rows[first:]):
            answered(batch, *some, Row([turn] * 12, 3))  # and one that is known to nobody
        for row, history in zip(rows, histories, strict=True):
            assert row.tokens == alone(adapters, row)
            assert row.num_cached == (len(history) - 12 if turn else 0)  # all compute as many as that one
            known += row.num_cached
            history += row.tokens + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
    assert known > 400 and len(batch.prefixes.texts) <= 6 and batch.prefixes.num_tokens() <= 600


@pytest.mark.parametrize("more", [{}, {"sliding_window": 6, "full_attention_every": 2}])
def test_what_is_known_of_a_prompt_is_taken_and_nothing_else(more):
    model = small(**more)
    adapters = Adapters(model)
    batch = Batch(model, adapters, 4, 2048, max_kept=300)
    system, other = list(range(30)), [1, *range(1, 30)]
    first = Row([*system, 50, 51], 10, temperature=0)
    answered(batch, first)
    chat = [*system, 50, 51, *first.tokens, 60]

    def cached(prompt, **settings) -> int:
        row = Row(prompt, 10, temperature=0, **settings)
        answered(batch, row)
        assert row.tokens == alone(adapters, row)
        return row.num_cached

    assert cached(chat) == 32 + 9  # the last token of an answer is never computed
    assert cached(chat) == len(chat) - 1  # again: the last token of a prompt is computed always
    assert cached([*system, 70, 71, 72]) == 30  # another question
    assert cached([*other, 50, 51]) == 0  # another system message
    assert cached(system[:8]) == 0
    assert cached(chat, prompt_logprobs=True, top_logprobs=0) == 0
    for text in batch.prefixes.texts:  # what is taken decides: with wrong values the answer is another one
        text.v = text.v + 1
    row = Row(chat, 10, temperature=0)
    answered(batch, row)
    assert row.num_cached and row.tokens != alone(adapters, row)
    assert cached([3] * 290) == 0 and cached(chat) == 0  # the oldest have made room


def test_another_adapter_takes_nothing(adapters):
    batch = Batch(adapters.model, adapters, 4, 2048, max_kept=600)
    one, other = {"a": 0.5, "b": -1.0}, {"a": 0.5, "b": 1.0}
    for name, count in ((None, 0), ("a", 0), (one, 0), (other, 0), ("a", 39), (one, 39)):
        row = Row([4] * 40, 10, temperature=0, adapter=name)
        answered(batch, row)
        assert row.num_cached == count and row.tokens == alone(adapters, row)


def test_no_new_token_at_all(adapters):
    row = Row([4, 5, 6], 0, top_logprobs=0, prompt_logprobs=True)
    batch = batch_of(adapters)
    assert batch.add([row]) == [row] and not batch.rows
    assert (row.tokens, row.finish, len(row.logprobs_of_prompt)) == ([], "length", 3)


def test_a_row_that_computes_nonsense_ends_alone(adapters, tmp_path):
    broken = small()
    apply_lora(broken, rank=2)
    for parameter in lora_parameters(broken):
        torch.nn.init.constant_(parameter, 1e30)
    save_lora(broken, tmp_path / "broken")
    if "broken" not in adapters.adapters:
        adapters.load(tmp_path / "broken")
    bad, good = Row([1, 2], 10, seed=1, adapter="broken"), Row([1, 2], 10, seed=1)
    batch = batch_of(adapters)
    batch.add([bad, good])
    while batch.rows:
        batch.step()
    assert bad.finish == "error" and "not finite" in bad.error and bad.tokens == []
    assert good.tokens == alone(adapters, good)
