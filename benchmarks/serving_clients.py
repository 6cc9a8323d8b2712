"""Our server and vLLM's as processes, and lean clients that speak HTTP to them: for benchmarks/serving.py."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.cli import ROOT
from common.errors import UsageError

FIRST_WORDS = re.compile(rb'"content": ?"[^"]')  # the first chunk of an answer holds its role alone
PROMPTS = ("Who are you?", "What does a duck eat?", "Please tell me what a duck eats.", "你是谁？",
           "What sound does a frog make?", "What is 3 + 4?", "How many times frog: frog, duck, frog",
           "天空是什么颜色？")


class Server:
    """scripts/serve_openai_api.py in a process of its own, on a free port. What it reports goes to a file."""

    def __init__(self, *flags: str | Path, threads: int = 1):
        self.log_file = tempfile.TemporaryFile()
        command = [sys.executable, ROOT / "scripts" / "serve_openai_api.py", "--port", "0", *flags]
        self.process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                                        encoding="utf-8", stderr=self.log_file,
                                        env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        found = re.search(r":(\d+)$", self.process.stdout.readline().strip())
        if not found:
            raise UsageError(f"the server did not start: {self.log().strip()[-500:]}")
        self.port = int(found[1])
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log_file.close()

    def log(self) -> str:
        self.log_file.seek(0)
        return self.log_file.read().decode("utf-8", "replace")

    def memory(self) -> int:
        """The resident memory in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def num_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))


def copy_with_context(source: Path, target: Path, tokens: int) -> None:
    """A copy of a model with room for so many tokens, so that no answer takes long."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = tokens
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


class Vllm:
    """vLLM's server for the same folder, on the CPU, in a process group of its own.

    python: of an environment that has a CPU build of vLLM. vLLM's processes compute a little while they wait,
    so they stand still outside of `awake`.
    """

    def __init__(self, python: Path, model: Path, seconds: float = 600):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log_file = tempfile.TemporaryFile()
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1",
                   "--port", self.port, "--model", model, "--served-model-name", model.name,
                   "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "32",
                   "--disable-uvicorn-access-log"]
        settings = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_NO_USAGE_STATS": "1"} | os.environ
        for name in ("PYTHONPATH", "OMP_NUM_THREADS"):  # vLLM decides on its threads
            settings.pop(name, None)
        self.process = subprocess.Popen([str(word) for word in command], stdout=self.log_file, env=settings,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        until = time.monotonic() + seconds
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > until:
                self.log_file.seek(0)
                said = self.log_file.read().decode("utf-8", "replace").strip()[-1500:]
                self.__exit__()
                raise UsageError(f"vLLM's server did not start: {said}")
            time.sleep(0.5)
        self._signal(signal.SIGSTOP)

    def _is_ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    @contextmanager
    def awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        yield
        self._signal(signal.SIGSTOP)

    def __enter__(self) -> "Vllm":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._signal(signal.SIGKILL)
        except ProcessLookupError:  # it has ended by itself
            pass
        self.process.wait()
        self.log_file.close()


@dataclass
class Reply:
    """What the server answered. seconds: until the first word of the answer, and until its end."""

    status: int
    body: bytes
    first: float = 0.0
    last: float = 0.0

    def json(self) -> dict:
        return json.loads(self.body)

    def chunks(self) -> list[dict]:
        """The chunks of a stream. Raises ValueError where it does not end with [DONE]."""
        events = self.body.decode("utf-8").split("\n\n")
        if events[-2:] != ["data: [DONE]", ""]:
            raise ValueError("the stream has no end")
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def post(body: object, path: str = "/v1/chat/completions", headers: dict[str, str | None] | None = None,
         method: str = "POST") -> bytes:
    """The bytes of a request. headers: more of them, or None in the place of one that is left out."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    lines = {"Host": "127.0.0.1", "Connection": "close", "Content-Type": "application/json",
             "Content-Length": str(len(body))} | (headers or {})
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"{method} {path} HTTP/1.1\r\n{text}\r\n".encode("latin-1") + body


def get(path: str) -> bytes:
    return post(b"", path, {"Content-Type": None, "Content-Length": None}, "GET")


def chat(text: str, **more) -> dict:
    return {"model": more.pop("model", "full_sft"), "messages": [{"role": "user", "content": text}]} | more


async def send(port: int, data: bytes) -> Reply:
    """Sends one request, and reads what comes until the server closes. Raises OSError, ValueError."""
    began, first, got = time.perf_counter(), 0.0, bytearray()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        while part := await reader.read(2**16):
            got += part
            if not first and len(got) < 2**16 and FIRST_WORDS.search(got):
                first = time.perf_counter() - began
    except ConnectionResetError:
        if not got:  # a server that refuses a long body may close before it has read all of it
            raise
    finally:
        writer.close()
    return read_reply(bytes(got), first, time.perf_counter() - began)


async def leave(port: int, data: bytes, after: float) -> None:
    """Sends a request, and is gone after some seconds."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await asyncio.sleep(after)
    writer.transport.abort()


def read_reply(data: bytes, first: float = 0.0, last: float = 0.0) -> Reply:
    """The bytes of the last of some answers -> what it says. Raises ValueError where it is not whole."""
    head, _, body = data.partition(b"\r\n\r\n")
    found = re.match(rb"HTTP/1\.1 (\d+) ", head)
    if not found:
        raise ValueError(f"no HTTP: {data[:80]!r}")
    head = head.lower()
    if b"transfer-encoding: chunked" in head:
        body = without_chunks(body)
    elif length := re.search(rb"content-length: (\d+)", head):
        if len(body) < int(length[1]):
            raise ValueError(f"{len(body)} of {int(length[1])} bytes came")
        body = body[:int(length[1])]
    return Reply(int(found[1]), body, first, last)


def without_chunks(body: bytes) -> bytes:
    whole = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        if not count:
            return whole
        if len(body) < count + 2:
            raise ValueError("the last chunk is cut off")
        whole, body = whole + body[:count], body[count + 2:]


async def metrics(port: int) -> dict[str, float]:
    text = (await send(port, get("/metrics"))).body.decode()
    pairs = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("seedling_"): float(value) for name, value in pairs}


async def is_idle(port: int, seconds: float = 10.0) -> bool:
    """Whether no row runs or waits any more, at the latest after some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        now = await metrics(port)
        if not now["answers_running"] and not now["answers_waiting"]:
            return True
        await asyncio.sleep(0.05)
    return False
