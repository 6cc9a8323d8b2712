"""The OpenAI API over HTTP, and the web page, by FastAPI. A reader may skip this file.

    engine = Engine(...); engine.load()
    uvicorn.run(make_app(engine))

Source of the API: https://platform.openai.com/docs/api-reference
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from common.errors import DataError
from dataset.chat import encode_chat, encode_continuation
from inference import chunks, engine, protocol, rows
from inference.answer import Piece
from inference.manners import POST_PATHS, Manners
from inference.protocol import ChatRequest, CompletionRequest, Refused, Sampling, TokenizeRequest
from inference.rows import Asked
from model.batch import Choice

PAGE = Path(__file__).with_name("page")
# The page may load nothing but its own files, and no text that a model writes can become a script.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                               "img-src 'self' data:; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
ERROR_SCHEMA = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"},
        "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}}}}
MEANINGS = {400: "a field, or the body, is wrong", 401: "the key is missing or wrong",
            403: "a foreign Host or Origin", 404: "no such model", 408: "the body took too long",
            413: "the body is too large", 415: "the body is not application/json",
            429: "too many wait", 500: "the model failed",
            503: "the server is shutting down"}


def errors(*statuses: int) -> dict:
    """What a route may answer beside its result, for the OpenAPI page."""
    content = {"application/json": {"schema": ERROR_SCHEMA}}
    return {status: {"description": MEANINGS[status], "content": content} for status in statuses}


POST_ERRORS = errors(*MEANINGS)
GET_ERRORS = errors(401, 403, 404)
EVENT_SCHEMA = {"type": "object", "required": ["data"], "properties": {"data": {
    "type": "string", "description": "a chunk of the answer, as JSON; [DONE] comes last"}}}
STREAMS = {200: {"content": {"text/event-stream": {"schema": EVENT_SCHEMA}}}}


@dataclass
class News:
    """What came of one of the answers: pieces of text, log-probabilities of its tokens, and its end."""

    number: int
    pieces: list[Piece]
    choices: list[Choice]
    finish: str | None


class Service:
    """Passes requests to the engine, and what comes of them back to the event loop."""

    def __init__(self, decoder: engine.Engine):
        self.engine, self.loop, self.started = decoder, None, int(time.time())
        # One after the other: a long prompt holds up those that are read after it, but no open stream.
        self.reader = ThreadPoolExecutor(1, "reader")
        self.texts: dict[engine.Lane, chunks.TokenTexts] = {}
        decoder.deliver = self.deliver

    def deliver(self, requests: list[engine.Request]) -> None:
        """Called by the engine's thread. One call into the event loop tells all of them."""
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self.loop.call_soon_threadsafe(engine.set_events, requests)

    def token_texts(self, lane: engine.Lane) -> chunks.TokenTexts:
        if lane not in self.texts:
            self.texts[lane] = chunks.TokenTexts(lane.chat_model.tokenizer)
        return self.texts[lane]

    async def read(self, function: Callable, *arguments):
        """Calls the function in the reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.reader, function, *arguments)

    def submit(self, model: str, asked: Asked) -> engine.Request:
        """Raises Refused where the engine takes no more."""
        self.loop = asyncio.get_running_loop()
        request = engine.Request(asked.rows, asyncio.Event())
        try:
            self.engine.submit(model, request)
        except engine.EngineBusy as busy:
            status = 429 if self.engine.closes_at is None else 503
            raise Refused(str(busy), code="server_busy", status=status, kind="server_error") from None
        return request

    async def follow(self, asked: Asked, request: engine.Request) -> AsyncIterator[News]:
        """What comes of the answers, as it comes. When nobody listens any more, the rows are cancelled."""
        left, seen = set(range(len(asked.rows))), [0] * len(asked.rows)
        stop_ids = asked.lane.chat_model.stop_ids
        try:
            while left:
                await request.event.wait()
                request.event.clear()
                for number in sorted(left):
                    count, finish = request.told[number]
                    row, reader = asked.rows[number], asked.readers[number]
                    begin, pieces = seen[number], []
                    for token in row.tokens[begin:count]:
                        seen[number] += 1
                        if token not in stop_ids:
                            pieces += reader.add(token)
                        if reader.has_stopped:
                            self.engine.cancel(request, number)
                            finish = "stop"
                            break
                    if finish == "error":
                        if row.constraint and row.constraint.error:
                            raise Refused(row.error, "response_format")
                        raise Refused(row.error, status=500, kind="server_error")
                    if finish:
                        pieces += reader.end()
                        left.discard(number)
                    choices = row.logprobs[begin:seen[number]]
                    if pieces or choices or finish:
                        yield News(number, pieces, choices, finish)
                    if len(asked.rows) > 1:
                        await asyncio.sleep(0)  # a request of many answers lets others in between
        finally:
            if left:
                self.engine.cancel(request)
            asked.num_new_tokens = sum(seen)


class PageFiles(StaticFiles):
    """The files of the web page, each with PAGE_HEADERS."""

    def file_response(self, *arguments, **options) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(PAGE_HEADERS)
        return response


async def or_gone(connection: Request, work: Callable) -> Response:
    """Awaits work(), the answer as a dict, and gives it up when the client leaves.

    Without a stream nothing else would notice that it has left.
    """
    async def gone() -> None:
        while (await connection.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work()), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(await tasks[0]) if tasks[0].done() else Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def stream(events: AsyncIterator[str]) -> StreamingResponse:
    async def guarded() -> AsyncIterator[str]:
        try:
            async with contextlib.aclosing(events):
                async for text in events:
                    yield text
        except Refused as refused:  # the status is on its way already
            yield chunks.event(refused.body)
        yield "data: [DONE]\n\n"

    return StreamingResponse(guarded(), media_type="text/event-stream", headers=STREAM_HEADERS)


def usage(asked: Asked) -> dict:
    num_cached = {id(row.prompt): row.num_cached for row in asked.rows}  # every prompt counts once
    return chunks.usage(asked.num_prompt_tokens, sum(num_cached.values()), asked.num_new_tokens)


# --- chats --------------------------------------------------------------------------------------------------


async def whole_chat(service: Service, body: ChatRequest, asked: Asked, request) -> dict:
    messages = [chunks.Message() for _ in asked.rows]
    logprobs, finish = [[] for _ in asked.rows], [""] * len(asked.rows)
    async for news in service.follow(asked, request):
        for piece in news.pieces:
            messages[news.number].add(piece)
        logprobs[news.number] += news.choices
        finish[news.number] = news.finish
    texts = service.token_texts(asked.lane)
    choices = [{"index": number, "message": message.whole(), "finish_reason": message.finish(finish[number]),
                "logprobs": chunks.chat_logprobs(texts, logprobs[number]) if body.logprobs else None}
               for number, message in enumerate(messages)]
    return chunks.head("chat.completion", "chatcmpl", body.model) | {
        "choices": choices, "usage": usage(asked)}


async def chat_events(service: Service, body: ChatRequest, asked: Asked, request) -> AsyncIterator[str]:
    head = chunks.head("chat.completion.chunk", "chatcmpl", body.model)
    texts, messages = service.token_texts(asked.lane), [chunks.Message() for _ in asked.rows]

    def chunk(number: int, delta: dict, logprobs=None, finish: str | None = None) -> str:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return chunks.event(head | {"choices": [choice]})

    yield "".join(chunk(number, {"role": "assistant", "content": ""}) for number in range(len(asked.rows)))
    async with contextlib.aclosing(service.follow(asked, request)) as all_news:
        async for news in all_news:
            number, message = news.number, messages[news.number]
            logprobs = chunks.chat_logprobs(texts, news.choices) if body.logprobs and news.choices else None
            deltas = []
            for delta in [message.add(piece) for piece in news.pieces]:
                # Texts of the same kind that came together are one delta.
                if deltas and "tool_calls" not in delta and delta.keys() == deltas[-1].keys():
                    deltas[-1] = {name: deltas[-1][name] + delta[name] for name in delta}
                else:
                    deltas.append(delta)
            if logprobs and not deltas:
                deltas = [{"content": ""}]
            sent = [chunk(number, delta, None if place else logprobs) for place, delta in enumerate(deltas)]
            if news.finish:
                sent.append(chunk(number, {}, None, message.finish(news.finish)))
            yield "".join(sent)
    if body.stream_options and body.stream_options.include_usage:
        yield chunks.event(head | {"choices": [], "usage": usage(asked)})


# --- completions --------------------------------------------------------------------------------------------


def text_choice(number: int, text: str, logprobs: dict | None, finish: str | None) -> dict:
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}


def echoed(service: Service, body: CompletionRequest, asked: Asked, number: int) -> tuple[str, list[Choice]]:
    """The prompt that an answer repeats, and the log-probabilities of its tokens."""
    if not body.echo:
        return "", []
    row = asked.rows[number]
    return asked.lane.chat_model.decode(row.prompt), row.logprobs_of_prompt


async def whole_completion(service: Service, body: CompletionRequest, asked: Asked, request) -> dict:
    texts, choices = [""] * len(asked.rows), [[] for _ in asked.rows]
    finish = [""] * len(asked.rows)
    async for news in service.follow(asked, request):
        texts[news.number] += "".join(piece.text for piece in news.pieces)
        choices[news.number] += news.choices
        finish[news.number] = news.finish
    found = []
    for number, text in enumerate(texts):
        prompt, before = echoed(service, body, asked, number)
        logprobs = None
        if body.logprobs is not None:
            await asyncio.sleep(0)  # a long prompt takes a while
            of_tokens = before + choices[number]
            logprobs = chunks.completion_logprobs(service.token_texts(asked.lane), of_tokens, 0)
        found.append(text_choice(number, prompt + text, logprobs, finish[number]))
    return chunks.head("text_completion", "cmpl", body.model) | {
        "choices": found, "usage": usage(asked)}


async def completion_events(service: Service, body: CompletionRequest, asked: Asked,
                            request) -> AsyncIterator[str]:
    head = chunks.head("text_completion", "cmpl", body.model)
    offsets = [None] * len(asked.rows)
    async with contextlib.aclosing(service.follow(asked, request)) as all_news:
        async for news in all_news:
            number, text, choices = news.number, "".join(piece.text for piece in news.pieces), news.choices
            if offsets[number] is None:
                before = echoed(service, body, asked, number)
                text, choices, offsets[number] = before[0] + text, before[1] + choices, 0
            logprobs = None
            if body.logprobs is not None and choices:
                tokens = service.token_texts(asked.lane)
                logprobs = chunks.completion_logprobs(tokens, choices, offsets[number])
                offsets[number] += sum(map(len, logprobs["tokens"]))
            yield chunks.event(head | {"choices": [text_choice(number, text, logprobs, news.finish)]})
    if body.stream_options and body.stream_options.include_usage:
        yield chunks.event(head | {"choices": [], "usage": usage(asked)})


# --- everything else ----------------------------------------------------------------------------------------


def tokenized(service: Service, body: TokenizeRequest) -> dict:
    lane, _ = rows.find(service.engine, body.model)
    tokenizer = lane.chat_model.tokenizer
    try:
        if body.prompt is not None:
            ids, mask = encode_continuation(tokenizer, "", body.prompt)  # a plain text is learnt as a whole
        else:
            messages, tools = rows.read_messages(body.messages, protocol.as_records(body.tools))
            ids, mask = encode_chat(tokenizer, messages, tools, bool(body.add_generation_prompt))
    except DataError as error:
        raise Refused(str(error), "prompt" if body.messages is None else "messages") from None
    return {"tokens": ids, "texts": [service.token_texts(lane)[token][0] for token in ids], "mask": mask,
            "count": len(ids), "max_model_len": lane.max_length}


def model_card(service: Service, name: str) -> dict:
    lane, adapter = service.engine.names[name]
    chat_model = lane.chat_model
    parent = next(other for other, (of, path) in service.engine.names.items() if of is lane and path is None)
    own = chat_model.sampling
    defaults = {"temperature": own.temperature, "top_p": own.top_p, "max_tokens": rows.DEFAULT_NEW_TOKENS}
    return {"id": name, "object": "model", "created": service.started, "owned_by": "seedling",
            "parent": parent if adapter else None, "max_model_len": lane.max_length,
            "kind": "text" if chat_model.plain else "chat",
            "thinking": "<think>" in chat_model.marks.values(), "defaults": defaults}


def metrics_text(decoder: engine.Engine) -> str:
    """In the format of Prometheus."""
    counts = {"answers_waiting": decoder.num_waiting(), "answers_running": decoder.num_running()}
    lines = [f"# TYPE seedling_{name} gauge\nseedling_{name} {value}\n" for name, value in counts.items()]
    lines += [f"# TYPE seedling_{name}_total counter\nseedling_{name}_total {decoder.metrics[name]}\n"
              for name in ("prompt_tokens", "cached_prompt_tokens", "tokens", "first_tokens", "cancelled",
                           "first_token_seconds", "finished_stop", "finished_length", "finished_error")]
    return "".join(lines)


def make_app(decoder: engine.Engine, *, api_key: str | None = None, hosts: list[str] = (),
             origins: list[str] = (), max_body_bytes: int = 2**22, body_seconds: float = 30.0,
             log_prompts: bool = False) -> Callable:
    """The ASGI application. The arguments are those of scripts/serve_openai_api.py."""
    service = Service(decoder)
    app = FastAPI(title="Seedling", version="1", docs_url=None, redoc_url=None)

    async def answer(body: Sampling, connection: Request, ask: Callable, events: Callable, whole: Callable):
        """ask: a function of rows.py. events, whole: what makes of the answers a stream, or one object."""
        if log_prompts:
            said = json.dumps(body.model_dump(exclude_unset=True), ensure_ascii=False)
            print(said, file=sys.stderr, flush=True)
        asked = await service.read(ask, decoder, body)
        request = service.submit(body.model, asked)
        if body.stream:
            return stream(events(service, body, asked, request))
        return await or_gone(connection, lambda: whole(service, body, asked, request))

    @app.exception_handler(Refused)
    async def refused(_, error: Refused):
        return JSONResponse(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError):
        return JSONResponse(protocol.refusal(error.errors()).body, 400)

    @app.exception_handler(HTTPException)
    async def http(connection: Request, error: HTTPException):
        said = str(error.detail)
        if error.status_code == 404:
            paths = ", ".join(("/v1/models", *POST_PATHS))
            said += f": {connection.url.path[:100]!r}; there are {paths}, so a client's base_url ends in /v1"
        return JSONResponse(Refused(said).body, error.status_code, headers=error.headers)

    @app.exception_handler(RecursionError)
    async def too_deep(_, error: RecursionError):
        return JSONResponse(Refused("the request is nested too deep").body, 400)

    @app.exception_handler(Exception)
    async def failed(_, error: Exception):
        return JSONResponse(Refused("the server failed; its log says why", kind="server_error").body, 500)

    @app.post("/v1/chat/completions", responses=POST_ERRORS | STREAMS)
    async def chat(body: ChatRequest, connection: Request):
        return await answer(body, connection, rows.ask_chat, chat_events, whole_chat)

    @app.post("/v1/completions", responses=POST_ERRORS | STREAMS)
    async def complete(body: CompletionRequest, connection: Request):
        return await answer(body, connection, rows.ask_completion, completion_events, whole_completion)

    @app.post("/tokenize", responses=POST_ERRORS)
    async def tokenize(body: TokenizeRequest):
        return JSONResponse(await service.read(tokenized, service, body))

    @app.get("/v1/models", responses=GET_ERRORS)
    async def models():
        return {"object": "list", "data": [model_card(service, name) for name in decoder.names]}

    @app.get("/v1/models/{name:path}", responses=GET_ERRORS)
    async def one_model(name: str):
        rows.find(decoder, name)
        return model_card(service, name)

    @app.get("/health", responses=errors(403, 503))
    async def health():
        if not decoder.is_alive or decoder.closes_at is not None:
            raise Refused("the server is shutting down", status=503, kind="server_error")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=GET_ERRORS)
    async def metrics():
        return metrics_text(decoder)

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", PageFiles(directory=PAGE))
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return Manners(app, api_key, hosts, origins, max_body_bytes, body_seconds)
