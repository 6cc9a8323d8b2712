"""What is wrong, huge, deep, slow or cut off, and clients that leave: the server stays well, and says why."""

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import time

import pytest
import torch
import uvicorn
from small_chat_model import ROOT
from uvicorn.server import ServerState

from benchmarks.serving_clients import Server, chat, get, is_idle, leave, metrics, post, read_reply, send
from common.errors import ModelError, UsageError
from inference.chat_model import ChatModel
from inference.manners import LimitedConnection, Manners
from model.batch import Batch, Row
from model.lora import apply_lora, save_lora
from model.transformer import CausalLM, ModelConfig

LONG = {"max_tokens": 6000, "logit_bias": {"0": -100, "2": -100}}  # an answer that goes on and on
SHORT = {"model": "chat", "max_tokens": 4}


@pytest.fixture(scope="module")
def folder(home, tmp_path_factory):
    """The models of `home` with room for long answers."""
    folder = tmp_path_factory.mktemp("hostile") / "models"
    shutil.copytree(home, folder)
    for name in ("chat", "base"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"max_position_embeddings": 8192}
        path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def start(folder, *flags):
    models = ["--load_from", folder / "chat", folder / "base", "--lora", folder / "lora_a", folder / "lora_b"]
    return Server("--device", "cpu", "--cache_gb", "0.02", *models, *flags)


@pytest.fixture(scope="module")
def server(folder):
    with start(folder, "--body_seconds", "0.5", "--max_body_mb", "0.5") as server:
        yield server
        assert "Traceback" not in server.log() and "rubbish" not in server.log()


def ask(server, data: bytes):
    return asyncio.run(send(server.port, data))


def error_of(reply) -> dict:
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"].strip()
    assert "\n" not in error["message"] and len(error["message"]) < 600
    return error


# ---------------------------------------------------------------- requests that are refused


def shaped(schema, **more):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return chat("rubbish", **SHORT | {"response_format": form} | more)


def with_text(text: str) -> bytes:
    """A request into which the text of a field is written as it is, whether that is JSON or not."""
    begin = json.dumps(chat("rubbish", model="chat"))[:-1]
    return post(f"{begin}, {text}}}".encode())


def deep(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def completion(prompt, **more) -> bytes:
    return post({"model": "chat", "prompt": prompt} | more, "/v1/completions")


DEEP = 600 if sys.version_info < (3, 12) else 2000  # json reads it, and what looks at it afterwards gives up
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}
REFUSED = {
    "wrong type": (post(chat("rubbish", **SHORT | {"temperature": "hot"})), 400, "temperature: .*number"),
    "NaN": (with_text('"temperature": NaN'), 400, "NaN is no number"),
    "infinite": (with_text('"top_p": 1e999'), 400, "top_p"),
    "long number": (with_text(f'"seed": {"9" * 5000}'), 400, "not valid JSON"),
    "half a character": (post(b'{"model": "\xe6\x96"}'), 400, "not valid UTF-8"),
    "half a pair": (with_text('"stop": "\\ud800"'), 400, "not valid UTF-8"),
    "cut off": (post(b'{"model": "chat", "messages": ['), 400, "not valid JSON"),
    "no body": (post(b""), 400, "not valid JSON"),
    "no object": (post(b"[1, 2]"), 400, "object|dict"),
    "deep": (post(('{"model": "chat", "messages": [{"role": "user", "content": "rubbish"}], "tools": '
                   '[{"type": "function", "function": {"name": "f", "parameters": ' + deep(DEEP)
                   + "}}]}").encode(), "/tokenize"), 400, "nested too deep"),
    "deeper": (with_text(f'"stop": {deep(40_000)}'), 400, "nested too deep"),
    "unknown fields": (post(chat("rubbish", **SHORT, **{f"k{n}": 1 for n in range(30_000)})), 400,
                       "k0: .*not know"),
    "many mistakes": (post(chat("rubbish", **SHORT, stop=[1] * 100_000)), 400, "stop"),
    "a prompt of both kinds": (completion(["a", [1]]), 400, "^prompt: must be a text, or token ids"),
    "an id below 0": (completion([1, -1]), 400, "^prompt: must be a text, or token ids, or a list"),
    "a number to stop at": (post(chat("rubbish", **SHORT, stop=5)), 400, "^stop: must be a text, or a list"),
    "no such choice": (post(chat("rubbish", **SHORT, tool_choice="f")), 400,
                       "^tool_choice: must be none, auto, required, or {"),
    "many mistakes in a prompt": (completion([[""] * 100_000]), 400, "prompt"),
    "many biases": (post(chat("rubbish", **SHORT, logit_bias={n: "x" for n in range(30_000)})), 400, "4096"),
    "many answers": (completion(["a"] * 512, n=3), 400, "1024"),
    "many log-probabilities": (completion([[5] * 1000] * 50, echo=True, logprobs=20), 400, "1,050,000"),
    "too long": (completion("rubbish " * 10_000), 400, "room for 8192"),
    "no token": (completion([1, 6400]), 400, "6400 is no token"),
    "no bias": (post(chat("rubbish", **SHORT, logit_bias={"6400": 1})), 400, "6400 is no token"),
    "seed": (post(chat("rubbish", **SHORT, seed=2**63)), 400, "seed"),
    "no tokens": (post(chat("rubbish", model="chat", max_completion_tokens=0)), 400, "max_completion_tokens"),
    "n": (post(chat("rubbish", **SHORT, n=129)), 400, "^n: "),
    "no model": (post(chat("rubbish", model="gpt")), 404, "there are: chat"),
    "pattern": (post(shaped({"type": "string", "pattern": "["})), 400, "unclosed character class"),
    "schema that grows": (post(shaped({"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}}
                                                            for j in range(8)]} for i in range(8)]})),
                          400, "too large"),
    "foreign reference": (post(shaped({"$ref": "http://127.0.0.1:9/"})), 400, "fetch"),
    "unmeetable": (post(shaped({"type": "integer", "minimum": 2, "maximum": 1})), 400, "minimum"),
    "growing pattern": (post(shaped({"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
                                    temperature=0,
                                    max_tokens=1000, logit_bias={"80": 100})), 400, "too complex"),
    # 80 is "a"
    "schema of a tool": (post(chat("rubbish", **SHORT, tools=[TOOL], tool_choice="required")), 400,
                         "^[^|]*type"),
    "body too large": (post(b" " * 600_000), 413, "524,288 bytes"),
    "length too large": (post(b"{", headers={"Content-Length": "99999999999"}), 413, "524,288 bytes"),
    "slow body": (post(b"{", headers={"Content-Length": "100"}), 408, "0.5 seconds"),
    "not JSON": (post(chat("rubbish"), headers={"Content-Type": "text/plain"}), 415, "application/json"),
    "no type": (post(chat("rubbish"), headers={"Content-Type": None}), 415, "application/json"),
    "packed": (post(b"x", headers={"Content-Encoding": "gzip"}), 415, "without the Content-Encoding 'gzip'"),
    "foreign Host": (post(chat("rubbish"), headers={"Host": "evil.example"}), 403, "--allowed_hosts"),
    "empty Host": (post(chat("rubbish"), headers={"Host": ""}), 403, "--allowed_hosts"),
    "foreign Origin": (post(chat("rubbish"), headers={"Origin": "http://evil.example"}), 403,
                       "--allowed_origins"),
    "broken Origin": (post(chat("rubbish"), headers={"Origin": "http://["}), 403, "--allowed_origins"),
    "wrong method": (post(b"{}", method="PUT"), 405, "Method"),
    "GET": (get("/v1/chat/completions"), 405, "Method"),
    "wrong path": (get("/v1/chat"), 404, "Not Found: '/v1/chat'; there are .*base_url ends in /v1"),
    "path of a model": (get("/v1/models/out/chat"), 404, "no model 'out/chat'; there are: chat"),
    "out of the folder": (get("/page/..%2fapi.py"), 404, "Not Found"),
    "zero in a path": (get("/page/%00"), 404, "Not Found")}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(server, name):
    data, status, words = REFUSED[name]
    reply = ask(server, data)
    assert reply.status == status, reply.body
    assert re.search(words, error_of(reply)["message"])
    assert reply.last < 3


def test_no_http(server):
    many = b"".join(b"X%d: a\r\n" % number for number in range(100_000))
    for data in (b"\x16\x03\x01\x02\0\x01\0\r\n\r\n", b"GET\r\n\r\n", b"A" * 100_000,
                 b"GET / HTTP/1.1\r\n" + many, b"GET / HTTP/1.1\r\nX: " + b"a" * 3_000_000):
        reply = ask(server, data)
        assert reply.status == 400 and "Invalid HTTP" in error_of(reply)["message"]


def test_a_request_that_does_not_end_holds_no_connection(server):
    """Whatever is sent bit by bit: after 0.5 seconds without the whole head of a request it is over."""
    health = post(b"", "/health", {"Connection": "keep-alive", "Content-Type": None}, "GET")

    async def hold(begin: bytes, more: bytes) -> tuple[bytes, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        began, answer = time.monotonic(), asyncio.create_task(reader.read())
        writer.write(begin)
        while not answer.done() and time.monotonic() < began + 5:
            writer.write(more)
            await asyncio.wait([answer], timeout=0.05)
        answer.cancel()
        writer.transport.abort()
        return (await asyncio.gather(answer, return_exceptions=True))[0], time.monotonic() - began

    async def all_of_them() -> list[tuple[bytes, float]]:
        long_body = health.replace(b"Content-Length: 0", b"Content-Length: 9999")
        chunks = health.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        return await asyncio.gather(*[hold(*case) for case in (
            (b"", b""), (b"GET /heal", b""), (b"GET /", b"a"), (b"GET /health HTTP/1.1\r\nX: ", b"a"),
            (b"GET /health HTTP/1.1\r\n", b"X: a\r\n"), (health, b"G"), (long_body, b"x"), (chunks, b"zz"))])

    found = asyncio.run(all_of_them())
    assert max(seconds for _, seconds in found) < 2.5
    # To go on sending after the end can reset the connection before the answer was read, on a busy machine.
    assert not any(isinstance(answer, Exception) for answer, _ in found[:2])  # these two send nothing more
    for answer, seconds in found[:5]:
        assert seconds > 0.4
        if not isinstance(answer, ConnectionError):
            assert read_reply(answer).status == 408
            assert "0.5 seconds" in error_of(read_reply(answer))["message"]
    for answer, _ in found[5:]:  # the request itself is whole, or needs no body
        if not isinstance(answer, ConnectionError):
            assert read_reply(answer[:answer.index(b"}") + 1]).status == 200


@contextlib.asynccontextmanager
async def long_answers(seconds: float, max_connections: int):
    """The port of a server whose answers have 3 million letters, and whose system sends nearly none ahead."""
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(30):
            await send({"type": "http.response.body", "body": b"a" * 100_000, "more_body": number < 29})

    config = uvicorn.Config(app, log_level="critical")
    config.load()
    state, limits = ServerState(), {"seconds": seconds, "max_connections": max_connections}
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.get_running_loop().create_server(
        lambda: LimitedConnection(config, state, {}, **limits), sock=listener)
    yield listener.getsockname()[1]
    server.close()


async def letters_of(port: int, pause: float) -> int:
    """How many letters come to a client that rests for `pause` seconds after every 200,000 bytes."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=4096)
    writer.write(get("/"))
    letters, rest = 0, pause
    try:
        while part := await reader.read(4096):
            letters += part.count(b"a")
            if letters > 200_000 * rest / pause:
                await asyncio.sleep(pause)
                rest += pause
    except ConnectionResetError:
        pass
    writer.transport.abort()
    return letters


def test_who_reads_nothing_of_an_answer_is_left_and_who_reads_slowly_is_not():
    async def work() -> list[int]:
        async with long_answers(0.3, 10) as port:
            return await asyncio.gather(letters_of(port, 0.1), letters_of(port, 1.5))

    slow, never = asyncio.run(work())
    assert slow > 2_999_999 and never < 1_000_000


def test_more_connections_than_allowed_are_refused():
    async def work():
        async with long_answers(10, 2) as port:
            first, second = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            refused = await send(port, get("/"))
            first[1].close()
            await first[1].wait_closed()
            await asyncio.sleep(0.1)
            answered = await send(port, get("/"))
            second[1].close()
            return refused, answered

    refused, answered = asyncio.run(work())
    assert refused.status == 503 and "2 connections are open" in error_of(refused)["message"]
    assert answered.status == 200


def test_what_looks_hostile_and_is_right(server):
    stops = ask(server, post(chat("rubbish", **SHORT, stop="a" * 200_000)))
    assert stops.status == 200 and stops.last < 3
    nothing = ask(server, completion("rubbish", max_tokens=0))
    assert nothing.json()["usage"]["completion_tokens"] == 0
    assert nothing.json()["choices"][0]["finish_reason"] == "length"
    body = json.dumps(chat("rubbish", **SHORT)).encode()
    parts = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    chunked = post(b"", headers={"Content-Length": None, "Transfer-Encoding": "chunked"}) + parts
    assert ask(server, chunked).status == 200
    one = post(body, headers={"Connection": "keep-alive"})

    async def all_that_comes(data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(data)
        found = await reader.read()
        writer.close()
        return found

    answers = re.split(rb"(?=HTTP/1\.1 )", asyncio.run(all_that_comes(one + one + post(body))))[1:]
    assert [read_reply(answer).status for answer in answers] == [200, 200, 200]


@pytest.mark.parametrize("path", ["//v1/completions", "/v1//completions", "/v1/completions/"])
def test_a_slash_too_many_and_a_byte_order_mark(server, path):
    reply = ask(server, post(b"\xef\xbb\xbf" + json.dumps(SHORT | {"prompt": "rubbish"}).encode(), path))
    assert reply.status == 200 and reply.json()["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/page/page.js", "/nowhere"])
def test_head_is_get_without_a_body(server, path):
    found = []
    for method in ("GET", "HEAD"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request(method, path)
        reply = connection.getresponse()
        found.append((reply.status, reply.getheader("content-length"), reply.read()))
        connection.close()
    assert found[0][:2] == found[1][:2] and found[0][2] and not found[1][2]


def test_nobody_waits_for_who_sends_too_much(server):
    """While a request is read that takes long, others are answered."""
    async def both():
        slow = asyncio.create_task(send(server.port, post({"model": "chat", "prompt": "rubbish " * 60_000},
                                                          "/tokenize")))
        slowest = 0.0
        while not slow.done():
            slowest = max(slowest, (await send(server.port, get("/health"))).last)
        return (await slow).status, slowest

    status, slowest = asyncio.run(both())
    assert status == 200 and slowest < 1


# ---------------------------------------------------------------- who leaves, and who is stopped


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_leaves_frees_the_row(server, is_stream):
    async def work():
        before = (await metrics(server.port))["cancelled_total"]
        data = post(chat("rubbish", model="chat", stream=is_stream, n=2, **LONG))
        await asyncio.gather(*[leave(server.port, data, after) for after in (0, 0.003, 0.3)])
        assert await is_idle(server.port, 5)
        after = await metrics(server.port)
        assert after["cancelled_total"] >= before + 2
        return after["tokens_total"]

    assert asyncio.run(work()) < 10_000  # nobody's answers were written to their end


def test_sigterm_ends_answers_properly(folder):
    with start(folder, "--grace_seconds", "0.5") as server:
        async def work():
            bodies = [chat("rubbish", model="chat", stream=is_stream, **LONG) for is_stream in (True, True,
                                                                                                False)]
            answers = [asyncio.create_task(send(server.port, post(body))) for body in bodies]
            await asyncio.sleep(0.05)
            while (await metrics(server.port))["answers_running"] < 3:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            os.kill(server.process.pid, signal.SIGTERM)
            found = await asyncio.gather(*answers)
            return found, time.monotonic() - began

        (*streams, whole), seconds = asyncio.run(work())
        server.process.wait(10)
        assert seconds < 3 and "Traceback" not in server.log()
    for reply in streams:
        assert reply.chunks()[-1]["choices"][0]["finish_reason"] == "length"
    assert whole.json()["choices"][0]["finish_reason"] == "length"
    assert 0 < whole.json()["usage"]["completion_tokens"] < 6000


def test_a_long_prompt_takes_no_short_ones_along(folder):
    chat_model = ChatModel(folder / "chat", device="cpu")
    batch = Batch(chat_model.model, chat_model.adapters, 32, 32 * 8192)
    short, long = Row([5], 4), Row([5] * 1000, 4)
    assert batch.fits([short] * 32) and batch.fits([long]) and batch.fits([Row([5] * 8000, 4)])
    assert not batch.fits([long, short, Row([6], 4)])  # 3000 tokens with the pads


def test_rows_of_one_prompt_share_its_way_through_the_model(folder, monkeypatch):
    chat_model = ChatModel(folder / "chat", ["lora_a"], device="cpu")
    adapter, = chat_model.adapters.adapters

    def rows() -> list[Row]:
        one, other = [5, 6, 7, 8], [9] * 30
        return [Row(one, 6, seed=1), Row(other, 6, seed=2, top_logprobs=2, prompt_logprobs=True),
                Row(one, 6, seed=3), Row(one, 6, seed=1, adapter=adapter),
                Row(other, 6, seed=4, top_logprobs=2, prompt_logprobs=True), Row(one, 6, temperature=0)]

    def decode(groups: list[list[Row]]) -> list[Row]:
        for some in groups:
            batch = Batch(chat_model.model, chat_model.adapters, 8, 8 * 256)
            batch.add(some)
            while batch.rows:
                batch.step()
        return [row for some in groups for row in some]

    sizes, forward = [], chat_model.model.forward
    monkeypatch.setattr(chat_model.model, "forward", lambda ids,
                        **more: sizes.append(len(ids)) or forward(ids, **more))
    together = decode([rows()])
    assert sizes[0] == 3  # one, other, and one with the adapter
    for row, alone in zip(together, decode([[row] for row in rows()]), strict=True):
        assert row.tokens == alone.tokens
        for found, right in ((row.logprobs, alone.logprobs), (row.logprobs_of_prompt,
                                                              alone.logprobs_of_prompt)):
            assert [choice.token for choice in found] == [choice.token for choice in right]
            assert [choice.logprob or 0 for choice in found] == pytest.approx(
                [choice.logprob or 0 for choice in right], abs=1e-4)


# ---------------------------------------------------------------- keys


def status_with(key: str | None, given: bytes | None, path: str = "/v1/models") -> int:
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent, headers = [], [(b"host", b"localhost")]
    if given is not None:
        headers.append((b"authorization", given))

    async def note(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    asyncio.run(Manners(app, key, [], [], 1, 1)(scope, None, note))
    return sent[0]["status"]


def test_keys():
    assert status_with(None, None) == status_with("k", b"Bearer k") == status_with("k", b"bearer  k ") == 200
    assert status_with("schlüssel 文", "Bearer schlüssel 文".encode()) == 200
    for given in (None, b"", b"k", b"Bearer", b"Bearer K", b"Basic k", b"Bearer kk", b"Bearer \xff"):
        assert status_with("k", given) == 401
        assert status_with("k", given, "/health") == status_with("k", given, "/page/page.css") == 200


# ---------------------------------------------------------------- mistakes on the command line


@pytest.fixture(scope="module")
def serve():
    script = runpy.run_path(str(ROOT / "scripts" / "serve_openai_api.py"))

    def run(*flags) -> None:
        script["main"](script["parse_args"](["--device", "cpu", *map(str, flags)]))

    return run


def test_mistakes_on_the_command_line(serve, folder, server, tmp_path, capsys, monkeypatch):
    model = ["--load_from", folder / "chat", "--port", "0"]
    with pytest.raises(UsageError, match=f"--port {server.port} can't be used: .*in use"):
        serve(*model, "--port", server.port)
    with pytest.raises(UsageError, match="can't be used: [^;]*service[^;]*$"):  # no port helps
        serve(*model, "--host", "no.such.host.invalid")
    with pytest.raises(UsageError, match="--cache_gb is too small"):
        serve(*model, "--cache_gb", "0.00001")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "chat").symlink_to(folder / "base")
    shutil.copytree(folder / "base", tmp_path / "chat")
    with pytest.raises(UsageError, match="two of the models and adapters are called 'chat'"):
        serve("--load_from", folder / "chat", tmp_path / "chat", "--port", "0")
    with pytest.raises(ModelError, match="base"):
        serve(*model, "--lora", folder / "base")
    torch.manual_seed(0)
    narrow = CausalLM(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=64,
                                  num_key_value_heads=1, intermediate_size=16))
    apply_lora(narrow, rank=2)
    save_lora(narrow, tmp_path / "narrow")
    with pytest.raises(ModelError, match="narrow"):
        serve(*model, "--lora", tmp_path / "narrow")
    capsys.readouterr()
    for flags, words in ((["--load_from", tmp_path / "nowhere"], "there is no .*nowhere"),
                         ([*model, "--port", "70000"], "--port must be"),
                         ([*model, "--cache_gb", "0"], "--cache_gb must be above 0"),
                         ([*model, "--api_key", " "], "--api_key needs a key")):
        with pytest.raises(SystemExit) as exit:
            serve(*flags)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and re.search(words, error) and error.count("\n") == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        serve(*model)
    assert "pip install -r requirements-serve.txt" in capsys.readouterr().err


def test_the_port_is_held_while_models_load(serve, folder):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match="in use"):
            serve("--load_from", folder / "chat", "--port", other.getsockname()[1])
