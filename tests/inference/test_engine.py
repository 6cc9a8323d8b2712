"""The thread that decodes: fairness, cancelling, closing, and what is counted."""

import threading
import time

import pytest
import torch

from common.errors import ModelError, UsageError
from inference.engine import Engine, EngineBusy, Request
from model.batch import Row
from model.generate import generate


@pytest.fixture
def start(home):
    """start(...): an engine over the chat model and its two adapters."""
    engines = []

    def run(models=("chat",), adapters=("lora_a", "lora_b"), **options):
        options = {"max_rows": 4, "cache_bytes": 2**20, "device": "cpu"} | options
        engine = Engine([home / name for name in models], [str(home / name) for name in adapters], **options)
        engine.load()
        engines.append(engine)
        return engine

    yield run
    for engine in engines:
        engine.close(0)
        engine.thread.join(10)
        assert not engine.is_alive


def row(tokens=20, prompt=(5, 6, 7), **more):
    return Row(list(prompt), tokens, seed=1, **more)


def ask(engine, *rows, name="chat"):
    request = Request(list(rows), threading.Event())
    engine.submit(name, request)
    return request


def wait(request, seconds=20):
    """Until all rows have ended."""
    end = time.monotonic() + seconds
    while not all(finish for _, finish in request.told):
        assert request.event.wait(end - time.monotonic()), request.told
        request.event.clear()
    return request


def test_many_threads_ask_and_each_gets_its_own_answer(start, home):
    engine = start(models=("chat", "base"))
    assert list(engine.names) == ["chat", "lora_a", "lora_b", "base"]
    found = {}

    def ask_one(number):
        name = list(engine.names)[number % 4]
        request = ask(engine, Row([number + 1, 7], 15, seed=number, adapter=engine.names[name][1]), name=name)
        found[number] = name, wait(request).rows[0].tokens

    threads = [threading.Thread(target=ask_one, args=[number]) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close(0)
    engine.thread.join()
    for number, (name, tokens) in found.items():
        lane, adapter = engine.names[name]
        lane.chat_model.adapters.use(adapter)
        alone = generate(lane.chat_model.model, torch.tensor([[number + 1, 7]]), 15, seed=number)
        assert tokens == [token.item() for token in alone]
    assert engine.metrics["tokens"] == 24 * 15 and engine.metrics["prompt_tokens"] == 48
    assert engine.metrics["finished_length"] == 24 and engine.num_running() == engine.num_waiting() == 0


def test_first_tokens_and_ends_are_told_at_once_and_others_in_bundles(start, monkeypatch):
    monkeypatch.setattr("inference.engine.BUNDLE_SECONDS", 1e6)
    told = []
    engine = start(deliver=lambda requests: told.extend((request, *request.told[0]) for request in requests))
    engine.told_at = time.monotonic()
    long, short = Request([row(100)], threading.Event()), Request([row(5)], threading.Event())
    for request in (long, short):
        engine.submit("chat", request)
    engine.close(20)
    engine.thread.join(20)
    assert {request: [news for who, *news in told if who is request] for request in (long, short)} == {
        long: [[1, None], [100, "length"]], short: [[1, None], [5, "length"]]}


def test_a_request_of_many_rows_does_not_hold_up_others(start):
    engine = start(max_rows=2)
    large = ask(engine, *[row(60, seed_free) for seed_free in [(5,)] * 12])
    small = ask(engine, row(3))
    wait(small)
    assert sum(finish is not None for _, finish in large.told) < 6
    wait(large)


def test_who_leaves_frees_the_place(start):
    engine = start(max_rows=1)
    endless, next_one = ask(engine, row(120)), ask(engine, row(2))
    endless.event.wait(20)
    engine.cancel(endless)
    wait(next_one)
    assert endless.rows[0].finish and len(endless.rows[0].tokens) < 120
    waiting = ask(engine, row(100), row(100), row(100))
    engine.cancel(waiting)  # one of them grows, the others have not begun
    wait(ask(engine, row(2)))
    assert engine.num_running() == engine.num_waiting() == 0 and not engine.lanes[0].owner


def test_who_leaves_while_the_prompt_is_read(start, monkeypatch):
    monkeypatch.setattr("model.batch.TOKENS_OF_A_PART", 1)
    engine = start(max_rows=2)
    streaming = ask(engine, row(110))
    streaming.event.wait(20)
    leaving = ask(engine, row(5, prompt=[7] * 100))
    while not engine.lanes[0].reading:
        pass
    engine.cancel(leaving)
    wait(streaming)
    wait(ask(engine, row(2)))
    assert leaving.rows[0].tokens == [] and engine.num_running() == 0 and engine.metrics["cancelled"] == 1


def test_one_row_of_a_request_is_cancelled_alone(start):
    engine = start()
    request = ask(engine, row(100), row(110))
    request.event.wait(20)  # both have begun
    engine.cancel(request, 0)
    wait(request)
    assert len(request.rows[0].tokens) < 100 and len(request.rows[1].tokens) == 110


def test_too_many_wait(start):
    engine = start(max_rows=1, max_waiting=3)
    first = ask(engine, row(120))
    first.event.wait(20)
    for _ in range(3):
        ask(engine, row(2))
    with pytest.raises(EngineBusy, match="3 answers wait already"):
        ask(engine, row(2))
    engine.cancel(first)


def test_closing_lets_answers_end_and_then_cuts_them_off(start):
    engine = start(max_rows=1)
    running, waiting = ask(engine, row(120)), ask(engine, row(5))
    running.event.wait(20)
    engine.close(0)
    with pytest.raises(EngineBusy, match="shutting down"):
        ask(engine, row(1))
    engine.thread.join(20)
    assert not engine.is_alive
    assert running.told[0][1] == "length" and waiting.rows[0].error == "the server is shutting down"
    patient = start()
    request = ask(patient, row(30))
    patient.close(30)
    assert len(wait(request).rows[0].tokens) == 30


def test_an_error_ends_the_answers_and_not_the_engine(start, capfd):
    engine = start()
    step = engine.lanes[0].batch.step

    def fail():
        engine.lanes[0].batch.step = step
        raise ValueError("something broke")

    engine.lanes[0].batch.step = fail
    request = wait(ask(engine, row(9)))
    assert request.told[0][1] == "error" and request.rows[0].error == "something broke"
    assert "ValueError" in capfd.readouterr().err  # a bug is not hidden
    assert len(wait(ask(engine, row(9))).rows[0].tokens) == 9


def test_what_can_not_be_loaded(start, home, tmp_path):
    with pytest.raises(ModelError):
        start(models=("missing",))
    with pytest.raises(UsageError, match="two of the models and adapters are called 'chat'"):
        start(models=("chat", "chat"))
    with pytest.raises(UsageError, match="--cache_gb is too small"):
        start(cache_bytes=1000)
