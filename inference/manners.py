"""What the server checks of every request before it reads what is asked. A reader may skip this file.

A page from elsewhere that is open in the same browser can send requests to this machine. It cannot read the
answers, but it could make the model work. By a domain name that suddenly means 127.0.0.1 ("DNS rebinding") it
could even read them. So the Host must be an address and not a stranger's name, the Origin must be this
server, and a body must be application/json: before a foreign page may send that, the browser asks us.
"""

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Callable
from urllib.parse import urlsplit

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from inference.protocol import Refused

POST_PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize")
OPEN_PATHS = ("/", "/health", "/openapi.json")  # these need no key, and so does the page


class Manners:
    """An ASGI application around another one. Refuses in OpenAI's shape what it does not let through.

    api_key: None, or what every call must bring. hosts: names by which this server may be called, beside
    addresses and localhost. origins: other servers whose pages may call it. body_seconds: in which a body
    must arrive.
    """

    def __init__(self, app: Callable, api_key: str | None, hosts: list[str], origins: list[str],
                 max_body_bytes: int, body_seconds: float):
        self.app, self.api_key, self.origins = app, api_key, origins
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.max_body_bytes, self.body_seconds = max_body_bytes, body_seconds

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # A base_url that ends in a slash gives /v1//models, and some clients end every path with one.
        path = "/" + "/".join(part for part in scope["path"].split("/") if part)
        scope = scope | {"path": path} if path.startswith("/v1/") else scope
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1")
                       for name, value in scope["headers"]}
            self.check_host(headers)
            self.check_key(scope["path"], scope["method"], headers)
            if scope["method"] == "POST" and scope["path"] in POST_PATHS:  # elsewhere a POST is refused
                self.check_type(headers)
                body = await self.read_body(headers, receive)
                check_json(body)
                receive = with_body(body, receive)
        except Refused as refused:
            return await refuse(refused, send)
        except ClientGone:
            return None
        if scope["method"] == "HEAD":  # as GET, of which uvicorn sends the head alone
            scope = scope | {"method": "GET"}
        return await self.app(scope, receive, send)

    def check_host(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        name = host_name(host)
        if name not in self.hosts and not is_address(name):
            raise Refused(f"the Host {host[:100]!r} is not one of this server's names (--allowed_hosts)",
                          status=403)
        origin = headers.get("origin")
        if origin and origin not in self.origins and host_of(origin) != host.lower():
            raise Refused(f"pages of {origin[:100]!r} may not call this server (--allowed_origins)",
                          status=403)

    def check_key(self, path: str, method: str, headers: dict[str, str]) -> None:
        if self.api_key is None or path in OPEN_PATHS or path.startswith("/page/") or method == "OPTIONS":
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # compare_digest takes the same time for every wrong key. A key may have any letters, in UTF-8.
        is_right = hmac.compare_digest(key.strip().encode("latin-1"), self.api_key.strip().encode())
        if scheme.lower() != "bearer" or not is_right:
            raise Refused("this server needs its key: Authorization: Bearer KEY", code="invalid_api_key",
                          status=401)

    def check_type(self, headers: dict[str, str]) -> None:
        kind = headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise Refused(f"the Content-Type must be application/json, not {kind[:50]!r}", status=415)
        if (coding := headers.get("content-encoding", "identity")).lower() != "identity":
            raise Refused(f"the body must come without the Content-Encoding {coding[:50]!r}", status=415)

    async def read_body(self, headers: dict[str, str], receive: Callable) -> bytes:
        too_large = Refused(f"the body has more than {self.max_body_bytes:,} bytes", status=413)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:18]) > self.max_body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > self.max_body_bytes:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise Refused(f"the body did not arrive within {self.body_seconds:g} seconds",
                          status=408) from None


class ClientGone(Exception):
    """Nobody waits for an answer any more."""


class LimitedConnection(H11Protocol):
    """uvicorn's connection, which nobody can hold for long without a use for it.

    Within `seconds` the head of a request must arrive, which is the request line and the headers. The
    application above does not see a request before its head is whole, so it cannot count this time. uvicorn
    limits only the size of a head (16 KiB of an unfinished one), and how long nothing at all may come between
    two requests. A client that reads nothing of a long answer for `seconds` is disconnected, too. While
    max_connections are open, further ones are refused.
    """

    def __init__(self, *of_uvicorn, seconds: float, max_connections: int, **more_of_uvicorn):
        super().__init__(*of_uvicorn, **more_of_uvicorn)
        self.seconds, self.max_connections = seconds, max_connections
        self.deadline: asyncio.TimerHandle | None = None  # of the head
        self.stuck: asyncio.TimerHandle | None = None  # runs while the reader takes less than there is

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self.answer(503, f"{self.max_connections:,} connections are open, which is the most: try later")
            return self.transport.close()
        self.watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.let_be()
        self.stop_waiting()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.wait_for_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stop_waiting()

    def wait_for_reader(self, size: int) -> None:
        """Looks again after `seconds`. By then some of these `size` bytes must have gone."""
        self.stuck = self.loop.call_later(self.seconds, self.look_again, size)

    def look_again(self, size: int) -> None:
        now = self.transport.get_write_buffer_size()
        self.wait_for_reader(now) if now < size else self.transport.abort()

    def stop_waiting(self) -> None:
        if self.stuck:
            self.stuck.cancel()

    def watch(self) -> None:
        """While no request is being answered, the next head is awaited. More bytes give no more time."""
        if self.cycle and not self.cycle.response_complete:
            self.let_be()
        elif self.deadline is None and not self.transport.is_closing():
            self.deadline = self.loop.call_later(self.seconds, self.give_up)

    def let_be(self) -> None:
        if self.deadline:
            self.deadline.cancel()
        self.deadline = None

    def give_up(self) -> None:
        self.deadline = None
        if self.conn.our_state is h11.IDLE:
            self.answer(408, f"the head of the request did not arrive within {self.seconds:g} seconds")
        self.transport.close()

    def send_400_response(self, message: str) -> None:
        """uvicorn calls this for what is no HTTP."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.answer(400, message)
        self.transport.close()

    def answer(self, status: int, message: str) -> None:
        body, headers = refusal_parts(Refused(message, status=status))
        for event in (h11.Response(status_code=status, headers=[*headers, (b"connection", b"close")]),
                      h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))


def host_name(host: str) -> str:
    """The name in a Host header: [::1]:8000 -> ::1"""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def host_of(origin: str) -> str | None:
    """The host of an Origin header, and its port. None where it names none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # such as http://[
        return None


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_json(body: bytes) -> None:
    """Raises Refused for what is no JSON, is nested too deep, or holds half a character.

    A byte order mark before it, as Windows writes one, is no mistake.
    """
    def no_constant(name: str):
        raise ValueError(f"{name} is no number in JSON")

    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=no_constant)
        if b"\\u" in body:  # such as "\ud800", which no text can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise Refused("the body is nested too deep") from None
    except UnicodeError:
        raise Refused("the body is not valid UTF-8") from None
    except ValueError as error:  # JSONDecodeError, and numbers of thousands of digits
        raise Refused(f"the body is not valid JSON: {error}") from None


def with_body(body: bytes, receive: Callable) -> Callable:
    """A `receive` that gives the body once, and then what the connection does."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> dict:
        return messages.pop() if messages else await receive()

    return receive_again


def refusal_parts(refused: Refused) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The body and the headers of an error."""
    body = json.dumps(refused.body, ensure_ascii=True).encode()
    return body, [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]


async def refuse(refused: Refused, send: Callable) -> None:
    body, headers = refusal_parts(refused)
    if refused.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
