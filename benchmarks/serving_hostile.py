"""Requests that are wrong in every way that we could think of, and what the server must make of them.

Each is made of a seed and its number, so that it can be made again. For benchmarks/serving.py.
"""

import argparse
import asyncio
import http.client
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.serving_clients import (
    PROMPTS,
    Server,
    chat,
    copy_with_context,
    get,
    is_idle,
    post,
    read_reply,
    send,
)

CLIENTS, TIMEOUT, SLOWEST_HEALTH = 12, 20.0, 2.0  # seconds
BODY_SECONDS = 2
NOT_OURS = b"Range header: "  # what Starlette says itself
CONTEXT = 1024  # of the model: short, so that no answer takes long
ODD_VALUES = (None, True, False, 0, -1, 1, 0.5, 1e308, -1e308, 2**31, 2**63, 2**64, 10**400, "", "x", "\0",
              "\u202e", [],
              [[]], [None], {}, {"a": 1}, [{}], "1", "NaN", [1, "a"], {"": ""}, "a" * 3000, "<|im_end|>",
              -(2**63))
RAW_VALUES = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, '"\\ud800"', '"\\udfff\\ud800"',
              "'x'",
              "01", "+1", ".5", "0x10", "undefined", '"\t"', '{"a":1,"a":2}', "[1,]", '"\\u00"', "-0",
              "1E400", '"\\x"')
FIELDS = ("model", "messages", "stream", "stream_options", "temperature", "top_p", "top_k",
          "repetition_penalty",
          "presence_penalty", "frequency_penalty", "logit_bias", "n", "seed", "stop", "max_tokens",
          "adapters",
          "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
          "response_format", "continue_final_message", "chat_template_kwargs", "reasoning_effort", "prompt",
          "echo",
          "user", "metadata", "store", "best_of", "suffix", "min_p", "no_such_field", "",
          "add_generation_prompt")
PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/models", "/health", "/metrics", "/",
         "/page/",
         "/page/page.css", "/v1/models/full_sft", "/openapi.json", "/v1/models/" + "x" * 3000,
         "/page/../api.py",
         "/page/%2e%2e/api.py", "/page/..%2fapi.py", "/page/%00", "/%ff%fe", "//", "/v1//models",
         "/v1/models/%00",
         "/page/" + "a" * 4000, "/v1/chat/completions/", "*", "http://127.0.0.1/health", "/?a=%zz",
         "/page/%ed%a0%80")
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW", "post", "G\0T",
           "POST")
SCHEMAS = (
    {"type": "integer"}, {"$ref": "#"}, {"$ref": "#/nowhere"}, {"$ref": "http://127.0.0.1:9/a"}, {"type": 5},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
    {"type": "string", "pattern": "^(a+)+$"}, {"type": "string", "pattern": "(?=a)"},
    {"type": "string", "pattern": "["},
    {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}, {"type": "string",
                                                                    "pattern": "^.*a.{1000}$"},
    {"type": "string", "pattern": "^" + "(.*a)" * 30 + ".{200}$"}, {"type": "string", "minLength": 10**6},
    {"type": "string", "maxLength": -1}, {"type": "array", "minItems": 10**6, "items": {"type": "null"}},
    {"enum": [f"word {number}" for number in range(20_000)]}, {"enum": []},
    {"const": {"a": [1, {"b": None}]}},
    {"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(8)]} for i in range(8)]},
    {"type": "integer", "minimum": 10, "maximum": 5}, {"type": "number", "multipleOf": 1e-300}, {"not": {}},
    {"type": "object", "properties": {f"a{number}": {"type": "string"} for number in range(5000)}},
    {"oneOf": [{"type": "string"}, {"type": "string"}]}, {"type": "string", "format": "date-time"}, {},
    {"x": "y"},
    {"type": "object", "patternProperties": {"^(a|b)*$": {}}},
    {"type": "object", "x-guidance": {"coerce_one_of": 7}},
    {"type": "object", "required": ["a"] * 1000}, {"type": ["string", "null", "object"]}, {"type": "nothing"})


# --- requests: each kind is a function of a random generator that returns the bytes to send -----------------


def a_body(rng: random.Random, **more) -> dict:
    return chat(rng.choice(PROMPTS), max_tokens=rng.choice((1, 4, 8)), stream=rng.random() < 0.3, seed=1,
                **more)


def send_json(rng: random.Random, body: dict) -> bytes:
    path = "/v1/chat/completions" if "messages" in body else rng.choice(PATHS[:3])
    return post(body, path)


def wrong_value(rng: random.Random) -> bytes:
    body = a_body(rng)
    for name in rng.sample(FIELDS, rng.choice((1, 1, 1, 2, 4))):
        body[name] = rng.choice(ODD_VALUES)
    if rng.random() < 0.3:
        body.pop("messages")
        body["prompt"] = rng.choice((*ODD_VALUES, "The frog"))
    return send_json(rng, body)


def no_json(rng: random.Random) -> bytes:
    name, value = rng.choice(FIELDS), rng.choice(RAW_VALUES)
    text = json.dumps(a_body(rng))[:-1] + f', "{name}": {value}}}'
    return post(text.encode("utf-8", "surrogatepass"))


def broken_bytes(rng: random.Random) -> bytes:
    body = bytearray(json.dumps(a_body(rng), ensure_ascii=False).encode())
    for _ in range(rng.choice((1, 2, 20))):
        place = rng.randrange(len(body))
        if rng.random() < 0.5:
            body[place] = rng.randrange(256)
        else:
            del body[place:place + rng.randrange(1, 9)]
    before = rng.choice((b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\0"))
    cut = rng.choice((len(body), rng.randrange(len(body) + 1)))
    return post(before + bytes(body[:cut]) + rng.choice((b"", b"\xe6\x96")))


def deep(rng: random.Random) -> bytes:
    depth = rng.choice((50, 150, 300, 400, 600, 900, 2000, 100_000))
    begin, end = rng.choice((("[", "]"), ('{"a":', "}"), ('{"type":"object","properties":{"a":', "}}"),
                             ('{"anyOf":[', "]}"), ('{"items":', "}")))
    value = begin * depth + "1" + end * depth
    place = rng.choice((f'"stop": {value}',
                        f'"tools": [{{"type":"function","function":{{"name":"f","parameters":{value}}}}}]',
                        f'"response_format": {{"type":"json_schema","json_schema":{{"schema":{value}}}}}',
                        f'"metadata": {value}', f'"messages": [{{"role":"user","content":{value}}}]',
                        f'"messages": [{{"role":"tool","content":"a","tool_calls":{value}}}]'))
    return post((json.dumps(a_body(rng))[:-1] + f", {place}}}").encode())


def wide(rng: random.Random) -> bytes:
    count = rng.choice((1000, 5000, 50_000, 250_000))
    body, numbers = a_body(rng), range(count)
    body |= rng.choice((
        {"stop": ["a"] * count}, {"stop": [1] * count}, {f"k{n}": 1 for n in numbers},
        {"logit_bias": {n: "x" for n in numbers}},
        {"logit_bias": {n: 100 for n in numbers}}, {"messages": [1] * count},
        {"messages": [{"role": "user", "content": "a"}] * (count // 10)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * (count // 10)}]},
        {"messages": [{f"k{n}": 1 for n in numbers}]}, {"adapters": {f"k{n}": 1 for n in numbers}},
        {"stop": "a" * count},
        {"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(count // 10)]},
        {"messages": [{"role": "user", "content": "the frog " * count}]},
        {"metadata": {n: n for n in numbers}},
        {"stream_options": {f"k{n}": n for n in numbers}}, {"messages": [{"role": "user",
                                                                          "content": "a" * count}]}))
    return post(body)


def schema(rng: random.Random) -> bytes:
    form = rng.choice(SCHEMAS)
    if rng.random() < 0.6:
        shaped = {"type": "json_schema", "json_schema": {"name": "a", "schema": form}}
        return post(a_body(rng, response_format=shaped, temperature=rng.choice((0, 2)),
                           n=rng.choice((1, 1, 3))))
    name = rng.choice(("f", "", 'f"\n%x', "<tool_call>", "f" * 65, "%json {}", "\u0000", "文"))
    tool = {"type": "function", "function": {"name": name, "parameters": form}}
    choice = rng.choice(("required", "auto", "none", "any", {"type": "function", "function": {"name": name}},
                         {"type": "function", "function": {"name": "g"}}))
    return post(a_body(rng, tools=[tool] * rng.choice((1, 2)), tool_choice=choice))


def sampling(rng: random.Random) -> bytes:
    return post(a_body(rng) | rng.choice((
        {"n": 128, "max_tokens": 2}, {"n": 129}, {"seed": -(2**63)}, {"seed": 2**63},
        {"temperature": 0.0011, "top_p": 0},
        {"temperature": 1e-9}, {"temperature": 2, "repetition_penalty": 1000}, {"repetition_penalty": 0.001},
        {"logit_bias": {n: -100 for n in range(4000)}}, {"logit_bias": {"6400": 1}},
        {"logit_bias": {"0": 100, "2": 100}}, {"logit_bias": {"\uff11": 1}}, {"logit_bias": {"-1": 1}},
        {"logit_bias": {"00001": 5, "1": -5}},
        {"top_logprobs": 20, "logprobs": True}, {"top_logprobs": 20}, {"top_k": 1}, {"max_tokens": 0},
        {"max_tokens": 2**31},
        {"max_tokens": None}, {"frequency_penalty": -2, "presence_penalty": -2, "max_tokens": 200},
        {"stop": ["\n", ""]},
        {"stop": "a" * 100_000}, {"stop": [" "] * 16}, {"stop": ["e", "ee"]}, {"model": "pretrain"},
        {"adapters": {"full_sft": 1}},
        {"chat_template_kwargs": {"enable_thinking": True}}, {"continue_final_message": True},
        {"reasoning_effort": "none"})))


def completion(rng: random.Random) -> bytes:
    prompt = rng.choice(("", "The frog", ["a"] * 512, ["a"] * 513, [1, 2, 3], [[1], [2, 3]], [[]], [-1],
                         [6400], [2**40],
                         [10**30], [[1], "a"], [1.5], [True], ["a", 1], [5] * 1000, [5] * (CONTEXT + 1),
                         "frog " * 100_000,
                         [[5] * 200] * 40, "\0", "<|im_end|>", "<|im_start|>", [0], [2], {"a": 1},
                         "文" * 900))
    body = {"model": "full_sft", "prompt": prompt, "max_tokens": rng.choice((0, 1, 5)),
            "n": rng.choice((None, 1, 2, 100)),
            "logprobs": rng.choice((None, 0, 20, 21)), "echo": rng.random() < 0.5,
            "stream": rng.random() < 0.3}
    return post(body, "/v1/completions")


def messages(rng: random.Random) -> bytes:
    def one() -> dict:
        content = rng.choice(("hi", "", None, "\0", "<|im_end|>\n<|im_start|>system\n", "<tool_call>",
                              "<think>", [], [{}],
                              [{"type": "text", "text": "a"}], 1, "文" * 500,
                              [{"type": "image_url", "image_url": {"url": "x"}}],
                              [{"type": "text", "text": None}], [{"type": "text"}], {"type": "text"}, ["a"]))
        roles = ("user", "assistant", "system", "tool", "developer", "function", "", None, 7)
        found = {"role": rng.choice(roles), "content": content}
        call = {"id": rng.choice(("a", None, 1)), "type": "function", "function": rng.choice((
            {"name": "f", "arguments": "{}"}, {"name": "f", "arguments": "{"}, {"name": 1}, {}, None,
            {"name": "f", "arguments": {"a": [1e308]}}, {"name": "f", "arguments": "[" * 3000}))}
        more = {"tool_calls": rng.choice(([call], [call] * 3, {}, "a", [1])),
                "tool_call_id": rng.choice(("a", 1)),
                "name": rng.choice(("a", 1, "")), "reasoning_content": rng.choice(("hm", 1, "</think>")),
                "x": 1}
        for name in rng.sample(list(more), rng.choice((0, 0, 1, 2))):
            found[name] = more[name]
        return found

    some = [one() for _ in range(rng.choice((1, 1, 2, 3, 8)))]
    some += [{"role": "user", "content": "hi"}] * (rng.random() < 0.7)
    body = a_body(rng, continue_final_message=rng.random() < 0.2) | {"messages": some}
    if rng.random() < 0.2:
        body = {"model": "full_sft", "messages": some}
        return post(body, "/tokenize")
    return post(body)


def heads(rng: random.Random) -> bytes:
    body = json.dumps(a_body(rng)).encode()
    headers = rng.choice((
        {"Host": None}, {"Host": "evil.example"}, {"Host": "["}, {"Host": "[::1"}, {"Host": "127.0.0.1:x:y"},
        {"Host": "\xff"},
        {"Host": ""}, {"Host": "a" * 5000}, {"Content-Type": None}, {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Length": "-1"},
        {"Content-Length": "abc"},
        {"Content-Length": "9" * 30}, {"Content-Length": str(len(body) - 9)}, {"Content-Length": "0"},
        {"Content-Length": "\xb2"},
        {"Content-Length": "5\r\nContent-Length: 6"}, {"Content-Length": str(2**23)},
        {"Content-Length": None},
        {"Transfer-Encoding": "chunked"}, {"Transfer-Encoding": "gzip"},
        {"Transfer-Encoding": "gzip, chunked"},
        {"Origin": "http://["}, {"Origin": "null"}, {"Origin": "http://evil.example"}, {"Origin": "\xe9"},
        {"Origin": "//"},
        {"Authorization": "Bearer \xff"}, {"Authorization": "x" * 9000}, {"Expect": "100-continue"},
        {"Expect": "200-ok"},
        {"X" * 9000: "a"}, {"A\0": "a"}, {"A b": "a"}, {"Cookie": "a" * 60_000}, {"Cookie": "a" * 200_000},
        {"Range": "bytes=9-1"},
        {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "A" * 22 + "==",
         "Sec-WebSocket-Version": "13"},
        {"Accept-Encoding": "gzip"}, {"Content-Encoding": "gzip"}, {"X-Forwarded-Host": "evil.example"}))
    return post(body, rng.choice(PATHS[:7]), headers, rng.choice(("POST", "POST", "POST", "GET")))


def paths(rng: random.Random) -> bytes:
    method, path = rng.choice(METHODS), rng.choice(PATHS)
    if rng.random() < 0.2:
        headers = rng.choice(({"Range": "bytes=0-0"}, {"Range": "bytes=a"}, {"If-None-Match": "*"},
                              {"If-Modified-Since": "x"}))
        return post(b"", path, headers, "GET")
    return post(a_body(rng), path, {}, method) if rng.random() < 0.5 else post(b"", path,
                                                                               {"Content-Type": None}, method)


def lines(rng: random.Random) -> bytes:
    return rng.choice((b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
                       b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
                       b"GET / HTTP/1.0\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"A" * 100_000,
                       b"\0" * 100,
                       b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n folded: x\r\n\r\n",
                       b"GET /\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
                       b"GET " + b"/a" * 40_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
                       rng.randbytes(500) + b"\r\n\r\n",
                       b"GET / HTTP/1.1\nHost: 127.0.0.1\nConnection: close\n\n",
                       b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\n"))


def chunked(rng: random.Random) -> bytes:
    body, sent = json.dumps(a_body(rng)).encode(), b""
    while body:
        size = rng.choice((1, 7, 100, len(body)))
        part, body = body[:size], body[size:]
        sent += b"%x%s\r\n%s\r\n" % (len(part), rng.choice((b"", b";a=b")), part)
    sent += rng.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b"", b"zz\r\n", b"-1\r\n",
                        b"ffffffffffffffffff\r\n"))
    return post(b"", headers={"Content-Length": None, "Transfer-Encoding": "chunked"}) + sent


def pipelined(rng: random.Random) -> bytes:
    keep = {"Connection": "keep-alive"}
    first = [rng.choice((post(a_body(rng), headers=keep), post(b"", "/health", keep, "GET"),
                         post(b"{", headers=keep)))
             for _ in range(rng.randrange(1, 9))]
    return b"".join(first) + rng.choice((get("/health"), b"\r\n\r\nrubbish\r\n\r\n"))


KINDS: dict[Callable, float] = {  # and how often each comes, beside the others
    wrong_value: 3, no_json: 1.5, broken_bytes: 1, deep: 1, wide: 0.3, schema: 1, sampling: 1.5,
                                completion: 1.5, messages: 3,
    heads: 1.5, paths: 1.5, lines: 0.5, chunked: 0.5, pipelined: 0.5}


def make(seed: int, number: int) -> tuple[str, bytes]:
    """The name of the kind, and the request with this number."""
    rng = random.Random(f"{seed} {number}")
    kind, = rng.choices(list(KINDS), list(KINDS.values()))
    return kind.__name__, kind(rng)


# --- what came of them --------------------------------------------------------------------------------------


def problem_of(answer: bytes, request: bytes = b"") -> str | None:
    """What is wrong with an answer. None where it is good, or where the server only closed the connection."""
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    if not answer:
        return None
    if request.startswith(b"HEAD "):  # the length without the body
        answer = answer.replace(b"content-length: ", b"length: ", 1)
    try:
        reply = read_reply(answer)
    except ValueError as error:
        return f"not whole: {error}"
    if reply.status >= 500 and reply.status not in (503, 505):
        return f"status {reply.status}: {reply.body[:200]!r}"
    if reply.status < 400 or not reply.body or reply.body.startswith(NOT_OURS):
        return None
    try:
        message = json.loads(reply.body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"status {reply.status} without an error in OpenAI's shape: {reply.body[:200]!r}"
    if not isinstance(message, str) or not message.strip() or "\n" in message or len(message) > 1000:
        return f"status {reply.status} without a line that says why: {message!r:.300}"
    return None


async def answer_to(port: int, data: bytes, is_slow: bool) -> bytes:
    """All that the server sends before it closes, also where the request promises more than comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = bytearray()

    async def write() -> None:
        step = max(1, len(data) // 40) if is_slow else len(data)
        for begin in range(0, len(data), step):
            writer.write(data[begin:begin + step])
            await writer.drain()
            await asyncio.sleep(0.1 * is_slow)

    async def read() -> None:
        while part := await reader.read(2**16):
            got.extend(part)

    writing = asyncio.create_task(write())
    try:
        await asyncio.wait_for(read(), TIMEOUT)
    except ConnectionError:
        pass  # what came before counts
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        writer.transport.abort()
    return bytes(got)


class Health(threading.Thread):
    """Asks for /health again and again, and keeps the longest time that it took."""

    def __init__(self, port: int):
        super().__init__(daemon=True)
        self.port, self.longest, self.has_ended = port, 0.0, False

    def run(self) -> None:
        while not self.has_ended:
            began = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
            try:
                connection.request("GET", "/health")
                connection.getresponse().read()
            except OSError:
                pass  # the time that it took tells
            connection.close()
            self.longest = max(self.longest, time.monotonic() - began)
            time.sleep(0.05)


def hostile(args: argparse.Namespace) -> list[str]:
    """Returns the problems."""
    problems, statuses, numbers = [], Counter(), iter(range(args.trials))

    async def client(port: int) -> None:
        for number in numbers:
            kind, data = make(args.seed, number)
            try:
                answer = await answer_to(port, data, number % 500 == 250)
                problem = problem_of(answer, data)
                statuses[answer[9:12].decode("latin-1") or "closed"] += 1
            except (OSError, TimeoutError) as error:
                problem = f"no answer: {error!r}"
            if problem:
                what = f"--seed {args.seed}, request {number} ({kind})"
                problems.append(f"{what}: {problem}\n    {data[:700]!r}")

    async def all_clients(port: int) -> None:
        await asyncio.gather(*[client(port) for _ in range(CLIENTS)])
        if not await is_idle(port, TIMEOUT):
            problems.append("rows are left behind")
        after = await send(port, post(chat(PROMPTS[0], max_tokens=8)))
        if after.status != 200:
            problems.append(f"the request after all others: status {after.status}")

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "full_sft"
        copy_with_context(args.load_from, model, CONTEXT)
        with Server("--load_from", model, "--body_seconds", str(BODY_SECONDS), "--cache_gb", "0.1") as server:
            health, began = Health(server.port), time.monotonic()
            health.start()
            try:
                asyncio.run(all_clients(server.port))
            except OSError as error:
                problems.append(f"the server does not answer any more: {error}")
            health.has_ended = True
            if "Traceback" in server.log():
                problems.append(f"a traceback in the log: {server.log()[-3000:]}")
    if health.longest > SLOWEST_HEALTH:
        problems.append(f"/health took {health.longest:.1f} s")
    counted = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    print(f"\nhostile: {args.trials} requests in {time.monotonic() - began:.0f} s: {counted}; /health took "
          f"{health.longest:.2f} s at most: {len(problems)} problems", flush=True)
    return problems
