"""The server's benchmark tells right answers from wrong ones, and makes the same requests again."""

import json
import subprocess
import sys

import pytest

from benchmarks import clients, serving
from benchmarks.serving_clients import post, read_reply
from benchmarks.serving_hostile import KINDS, make, problem_of
from common.cli import ROOT


def answer(status: int, body: str | bytes, length: int | None = None) -> bytes:
    body = body if isinstance(body, bytes) else body.encode()
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status,
                                                             len(body) if length is None else length) + body


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    sent = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + sent + end


def chunk(text: str | None, finish: str | None = None) -> bytes:
    choice = {"delta": {"content": text} if text else {}, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


def test_whole_answers():
    body = {"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]}
    assert serving.answer_of(read_reply(answer(200, json.dumps(body))), False) == ("Hi", "stop")
    events = [chunk(None), chunk("H"), chunk("i"), chunk(None, "length"), b'data: {"choices": []}\n\n']
    stream = b"".join(events[:4]) + b"data: [DONE]\n\n"
    assert serving.answer_of(read_reply(chunked(stream[:50], stream[50:])), True) == ("Hi", "length")
    for cut in (chunked(stream[:-14]), chunked(stream, end=b""), answer(200, "{}", 10), b"HTTP/1",
                answer(429, "{}")):
        with pytest.raises(ValueError):
            serving.answer_of(read_reply(cut), True)


def test_what_a_hostile_request_may_be_answered():
    error = {"error": {"message": "a: must be b", "type": "t", "param": None, "code": None}}
    good = (b"", answer(200, "{}"), answer(400, json.dumps(error)), answer(416, "Range header: wrong"),
            answer(503, json.dumps(error)), b"HTTP/1.1 100 Continue\r\n\r\n" + answer(404, json.dumps(error)))
    assert [problem_of(each) for each in good] == [None] * len(good)
    assert problem_of(answer(200, "", 10), b"HEAD / HTTP/1.1") is None
    lines = {"error": error["error"] | {"message": "a\nb"}}
    for bad in (answer(500, json.dumps(error)), answer(400, '{"detail": []}'), answer(400, json.dumps(lines)),
                answer(422, "x"), answer(200, "{", 2), b"nonsense"):
        assert problem_of(bad)


def test_requests_are_made_again():
    made = [make(3, number) for number in range(200)]
    assert made == [make(3, number) for number in range(200)]
    assert {kind for kind, _ in made} == {kind.__name__ for kind in KINDS}
    assert len({data for _, data in made}) > 150
    assert b"Host" in post({"a": 1}) and b"Host" not in post({"a": 1}, headers={"Host": None})


def test_of_openais_page_what_is_served_remains():
    def a_page() -> dict:
        paths = {path: {method: {"responses": {"200": {"content": {}}}} for method in ("get", "post", "put")}
                 for path in (*clients.SERVED, "/audio/speech")}
        part = {"properties": {"seed": {"type": "integer"}, "audio": {"type": "object"}, "model": {}}}
        schemas = {"CreateCompletionRequest": dict(part), "ModelResponseProperties": dict(part),
                   "CreateChatCompletionRequest": {"allOf": [{"$ref": "#"}, dict(part)]},
                   "CreateModelResponseProperties": {"allOf": [{"$ref": "#"}, dict(part)]}}
        return {"openapi": "3.1.0", "paths": paths, "components": {"schemas": schemas}}

    whole = clients.published(a_page(), "mine", None)
    assert {path: list(methods) for path, methods in whole["paths"].items()} == {
        path: [method] for path, method in clients.SERVED.items()}
    for operation in (method for methods in whole["paths"].values() for method in methods.values()):
        assert operation["responses"].keys() == {"200", "4XX"}  # and no 5XX
    completion = whole["components"]["schemas"]["CreateCompletionRequest"]["properties"]
    assert completion["model"] == {"enum": ["mine"]} and "audio" in completion
    few = clients.published(a_page(), "mine", {"model", "seed"})["components"]["schemas"]
    assert few["CreateCompletionRequest"]["properties"].keys() == {"model", "seed"}
    assert few["CreateChatCompletionRequest"]["allOf"][1]["properties"].keys() == {"model", "seed"}


def test_help_answers_at_once():
    script = ROOT / "benchmarks" / "serving.py"
    code = (f"import runpy, sys; sys.argv = ['serving.py', '--help']\ntry: runpy.run_path({str(script)!r}, "
            "run_name='__main__')\nexcept SystemExit: print('torch' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8").stdout
    assert "--trials" in said and said.endswith("False\n")
