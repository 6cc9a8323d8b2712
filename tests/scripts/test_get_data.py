"""get_data.py against local hosts that speak the hub's protocol, and fail in every way that hosts can."""

import gzip
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import close_session

from scripts import get_data
from scripts.get_data import Source

ROOT = Path(__file__).resolve().parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"
CHATS = "".join(json.dumps({"conversations": [{"role": "user", "content": f"Tell me {n}."},
                                              {"role": "assistant", "content": f"{n} 柳树" * 40}]},
                           ensure_ascii=False) + "\n" for n in range(300)).encode()
PAGE = b"<html><body>Please log in to this network</body></html>"


class Handler(BaseHTTPRequestHandler):
    """One of the two hosts: the hub, and the store of large files that the hub sends people to."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer takes 40 ms

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body: bool):
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append((self.command, self.path, dict(self.headers), self.server is hub.store))
        kind, _, name = path.rpartition(f"/resolve/{REVISION}/")
        hub.done.wait(hub.silent)
        if path.startswith("/api/") and hub.api_fault:
            self.send(*hub.api_fault, with_body)
        elif path.startswith("/api/v1/"):
            self.modelscope(path, with_body)
        elif path.startswith("/api/"):
            described = json.dumps(hub.description()).encode()
            self.send(200, described, {"Content-Type": "application/json"}, with_body)
        elif kind:
            self.resolve(name, with_body)
        else:
            self.send_bytes(path.removeprefix("/store/"), with_body)

    def resolve(self, name: str, with_body: bool):
        hub = self.server.hub
        if name not in hub.files:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        elif hub.file_fault and (with_body or hub.fails_head):
            self.send(*hub.file_fault, with_body)
        elif name in hub.small:  # a file in git itself, whose ETag is its sha1 there
            content = hub.files[name]
            etag = hub.etags.get(name) or hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            headers = {"X-Repo-Commit": REVISION, "ETag": f'"{etag}"'}
            self.send(200, content, headers, with_body)
        else:
            size, etag = len(hub.files[name]), hashlib.sha256(hub.files[name]).hexdigest()
            where = f"{hub.store_url}/store/{name}" if not hub.circle else f"{hub.url}{self.path}"
            headers = {"X-Repo-Commit": REVISION, "X-Linked-Size": str(size), "Location": where}
            headers |= {"X-Linked-Etag": f'"{hub.etags.get(name, etag)}"'} if hub.states_hash else {}
            self.send(302, b"", headers, with_body)

    def modelscope(self, path: str, with_body: bool):
        hub, asked = self.server.hub, parse_qs(urlsplit(self.path).query)
        if path.endswith("/repo"):
            self.send_bytes(asked["FilePath"][0], with_body)
            return
        found = [{"Path": name, "Type": "blob", "Size": len(content),
                  "Sha256": hashlib.sha256(content).hexdigest()} for name, content in hub.files.items()]
        page, size = int(asked["PageNumber"][0]), int(asked["PageSize"][0])
        answer = {"Code": 200, "Data": {"Files": found[(page - 1) * size : page * size]}}
        self.send(200, json.dumps(answer).encode(), {}, with_body)

    def send_bytes(self, name: str, with_body: bool):
        """A file, or its rest; another content, or less of it, where the test says so."""
        hub = self.server.hub
        content = hub.served.get(name, hub.files.get(name))
        if content is None:
            self.send(404, b"", {}, with_body)
            return
        start, status, headers = 0, 200, {}
        if "Range" in self.headers and hub.knows_range:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            status, headers = 206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if start and hub.wrong_rest:
            status, headers = hub.wrong_rest
            start = 0
        break_after = hub.breaks.pop(0) if hub.breaks and with_body else None
        self.send(status, content[start:], headers, with_body, break_after)

    def send(self, status: int, body: bytes, headers: dict, with_body: bool,
             break_after: tuple[int, float] | None = None):
        """break_after: (bytes, seconds). After these bytes comes a pause, or the end if it has 0 seconds."""
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        number, seconds = break_after or (len(body), 0)
        if with_body:
            self.wfile.write(body[:number])
        if break_after and seconds:
            self.server.hub.done.wait(seconds)
            self.wfile.write(body[number:])
        elif break_after:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass


class Hub:
    """What the hosts hold, and how they fail."""

    def __init__(self):
        self.files, self.served, self.small, self.etags = {"chats.jsonl": CHATS}, {}, set(), {}
        self.licence, self.requests, self.breaks = "apache-2.0", [], []
        self.api_fault = self.file_fault = None  # (status, body, headers)
        self.fails_head, self.circle, self.knows_range, self.states_hash = True, False, True, True
        self.wrong_rest = None  # (status, headers) of the answer to whoever asks for the rest of a file
        self.silent, self.done = 0, threading.Event()  # silent: seconds before any answer
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.store = self.servers[1]
        # To the library a host of another name is a store, and whatever has the hub's name is the hub.
        self.url, self.store_url = (f"http://{name}:{server.server_port}" for name, server in
                                    zip(("127.0.0.1", "localhost"), self.servers, strict=True))
        for server in self.servers:
            server.hub, server.daemon_threads = self, True
            server.handle_error = lambda *args: None  # a client that goes away is part of these tests
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def description(self) -> dict:
        names = [{"rfilename": name} for name in self.files]
        described = {"id": "some/where", "sha": REVISION, "siblings": names, "tags": [], "private": False,
                     "downloads": 1, "likes": 1}
        return described | ({"cardData": {"license": self.licence}} if self.licence else {})

    def bodies(self) -> list[str | None]:
        """The Range of each request for the bytes of a large file."""
        return [headers.get("Range") for command, _, headers, of_store in self.requests
                if command == "GET" and of_store]

    def close(self):
        self.done.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture(scope="module", autouse=True)
def no_proxy():
    """The library keeps one client, which is made after this, and made anew for whoever comes next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        close_session()
        yield
    close_session()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(get_data, "WAIT", 0.001)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(get_data.MIRRORS, "modelscope", hub.url)
    yield hub
    hub.close()


@pytest.fixture
def get(hub, tmp_path, capsys, monkeypatch):
    """get(files=..., kind=..., flags=...) runs the script for one source; (exit code, out, complaints)."""
    def run(*flags, files=("chats.jsonl",), kind="chats", mirror=None):
        source = Source(kind, "a test", "some/where", "some/where", "mit", list(files), False)
        monkeypatch.setitem(get_data.SOURCES, "x", source)
        code = 0
        try:
            get_data.run_script(get_data.main, get_data.parse_args(
                ["x", "--mirror", mirror or hub.url, "--out_dir", str(tmp_path / "data"), *map(str, flags)]))
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        complaints = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(complaints) == (code != 0), err
        return SimpleNamespace(code=code, out=out, error=complaints[0] if complaints else "", err=err,
                               folder=tmp_path / "data", file=tmp_path / "data" / "x.jsonl")

    return run


def left(folder: Path) -> list[str]:
    """The names in the folder, those of parts of a download among them."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def part_size(folder: Path) -> int:
    (part,) = folder.rglob("*.part")
    return part.stat().st_size


# --- what goes well -----------------------------------------------------------------------------------------


def test_a_data_set_becomes_jsonl_and_its_origin_is_noted(hub, get):
    result = get()
    assert result.code == 0 and result.file.read_bytes() == CHATS
    assert "licence  apache-2.0" in result.out and f"size     {len(CHATS) / 1000:.0f}kB" in result.out
    assert "size and hash are as 127.0.0.1 states" in result.out and "records: 300" in result.out
    assert left(result.folder) == ["x.jsonl", "x.source.json"]
    origin = json.loads((result.folder / "x.source.json").read_text())
    assert origin["revision"] == REVISION and origin["licence"] == "apache-2.0" and origin["records"] == 300
    assert origin["files"]["chats.jsonl"] == {"bytes": len(CHATS), "hash": hashlib.sha256(CHATS).hexdigest()}
    number = len(hub.requests)
    assert "is there already" in get().out and len(hub.requests) == number


def test_the_host_of_these_tests_is_one_for_the_library(hub, tmp_path):
    got = hf_hub_download("some/where", "chats.jsonl", repo_type="dataset", endpoint=hub.url,
                          local_dir=tmp_path, revision=REVISION)
    assert Path(got).read_bytes() == CHATS and hub.bodies() == [None]


def test_size_and_licence_come_before_the_question_and_a_no_downloads_nothing(hub, get, monkeypatch):
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=lambda a=answer: a))
        result = get()
        assert result.code == 0 and result.out.index("licence") < result.out.index("Download it? [y/N]")
        assert not hub.bodies() and not result.folder.exists()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: "y\n"))
    assert get().file.exists()


def test_yes_skips_the_question(get, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))  # reading it would fail
    assert get("--yes").file.read_bytes() == CHATS


def test_a_licence_that_the_host_does_not_state_or_states_twice(hub, get):
    hub.licence = None
    assert "licence  mit (the host states none)" in get("--max_records", 1).out
    hub.licence = ["apache-2.0", "cc-by-nc-2.0"]
    assert "licence  apache-2.0, cc-by-nc-2.0" in get("--max_records", 2).out


def test_max_records(get):
    result = get("--max_records", 7)
    assert (result.folder / "x-7.jsonl").read_bytes() == b"".join(CHATS.splitlines(keepends=True)[:7])


def test_records_that_cannot_be_read_are_counted(hub, get):
    texts = [{"text": "one", "url": "http://a"}, {"url": "no text"}, {"text": ""}, {"text": "二"},
             {"text": "three"}]
    lines = [json.dumps(text) for text in texts]
    hub.files = {"b.jsonl": "\n".join([*lines, "{broken", lines[0]]).encode(), "a.jsonl": lines[0].encode()}
    result = get(files=["*.jsonl"], kind="text")
    assert result.code == 0 and "records: 5; bad lines skipped: 3" in result.out
    assert "b.jsonl:6: not valid JSON" in result.err
    written = [json.loads(line) for line in result.file.read_text("utf-8").splitlines()]
    assert written == [{"text": text} for text in ("one", "one", "二", "three", "one")]  # a.jsonl comes first


def test_a_file_of_another_form_is_refused_and_nothing_is_written(hub, get):
    result = get(kind="text")
    assert result.code == 2 and "300 of 300 records cannot be used" in result.error
    assert not result.file.exists()
    hub.files["chats.jsonl"] = b"\0\1 no data at all"
    result = get()
    assert result.code == 2 and "no usable record" in result.error and not result.file.exists()


def test_memory_does_not_grow_with_the_file(get, hub, tmp_path):
    record = json.dumps({"text": "柳树 " * 200}, ensure_ascii=False) + "\n"
    hub.files = {"t.jsonl.gz": gzip.compress(record.encode() * 5_000, 1)}
    get("--max_records", 10, files=["t.jsonl.gz"], kind="text")  # imports what it needs
    tracemalloc.start()
    result = get(files=["t.jsonl.gz"], kind="text")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.file.stat().st_size > 3.5e6 and peak < 2e6


def test_parquet(hub, get, tmp_path, monkeypatch):
    monkeypatch.setattr(get_data, "find_spec", lambda name: None)
    result = get(files=["data/train-*.parquet"], kind="text")
    assert result.code == 2 and "pip install pyarrow" in result.error and not hub.requests
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    monkeypatch.setitem(get_data.SOURCES, "x", None)  # undone above
    hub.files = {}
    for part in range(2):
        texts = [f"story {part}.{n} 柳" for n in range(2000)]
        table = pyarrow.table({"text": texts, "score": list(range(2000))})
        parquet.write_table(table, tmp_path / "t.parquet", row_group_size=500)
        hub.files[f"data/train-0000{part}-of-00002.parquet"] = (tmp_path / "t.parquet").read_bytes()
    hub.files["data/validation.parquet"] = b"not asked for"
    result = get(files=["data/train-*.parquet"], kind="text")
    written = [json.loads(line) for line in result.file.read_text("utf-8").splitlines()]
    assert written == [{"text": f"story {part}.{n} 柳"} for part in range(2) for n in range(2000)]


def test_weights_are_a_folder_that_load_model_opens(hub, get, tmp_path):
    import torch

    from model.transformer import CausalLM, ModelConfig
    from model.weights import load_model, load_tokenizer, save_model

    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    model = CausalLM(ModelConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=1, intermediate_size=64))
    save_model(model, tmp_path / "made", tokenizer)
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    hub.small = set(hub.files) - {"model.safetensors", "tokenizer.json"}
    wanted = set(hub.files)
    hub.files |= dict.fromkeys(["onnx/a.json", "pytorch_model.bin", "../config.json", "..\\a.json"], b"{}")
    patterns = get_data.SOURCES["smollm2-135m"].files
    result = get(files=patterns, kind="weights")
    assert result.code == 0, result.error
    taken = {name for name in wanted if name.endswith((".json", ".safetensors"))}
    assert {path.name for path in (result.folder / "x").iterdir()} == taken
    ids = torch.arange(12)[None]
    got, made = (load_model(folder)(ids).logits for folder in (result.folder / "x", tmp_path / "made"))
    assert torch.equal(got, made)
    assert load_tokenizer(result.folder / "x").encode("柳树") == tokenizer.encode("柳树")
    assert "is there already" in get(files=patterns, kind="weights").out


def test_the_real_table_on_the_command_line(hub, tmp_path):
    hub.files = {"rlaif.jsonl": CHATS, "dpo.jsonl": b"{}"}
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, ROOT / "scripts" / "get_data.py", "minimind-rlaif", "--out_dir", tmp_path]
    ended = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8",
                           stdin=subprocess.DEVNULL)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert (tmp_path / "minimind-rlaif.jsonl").read_bytes() == CHATS
    # The token is for the hub, and not for its store. A client of an earlier test may ask at this port, too.
    told = {(of_store, "hf_mine" in headers.get("Authorization", headers.get("authorization", "")))
            for _, path, headers, of_store in hub.requests
            if of_store or "jingyaogong/minimind_dataset" in path}
    assert told == {(False, True), (True, False)}


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_download_that_is_stopped_goes_on(hub, tmp_path):
    hub.files, hub.breaks = {"rlaif.jsonl": CHATS}, [(10_000, 30)]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, ROOT / "scripts" / "get_data.py", "minimind-rlaif", "--out_dir", tmp_path]
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8") as process:
        while process.poll() is None and not any(part.stat().st_size for part in tmp_path.rglob("*.part")):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143 and process.stderr.read() == "stopped by SIGTERM\n"
    kept = part_size(tmp_path)
    assert 0 < kept <= 10_000 and not list(tmp_path.glob("*.jsonl"))
    subprocess.run(command, env=environment, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert (tmp_path / "minimind-rlaif.jsonl").read_bytes() == CHATS
    assert hub.bodies() == [None, f"bytes={kept}-"]


def test_a_mirror_gets_no_token(hub, get, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert get().code == 0 and hub.requests
    assert not [headers for _, _, headers, _ in hub.requests if "hf_mine" in str(headers)]


def test_modelscope(hub, get):
    hub.files = {f"{n:03}.jsonl": b"{}" for n in range(250)} | {"chats.jsonl": CHATS}  # two pages of names
    hub.breaks = [(5000, 0)]
    result = get(mirror="modelscope")
    assert result.code == 0 and result.file.read_bytes() == CHATS and "size and hash are" in result.out
    asked = [path for _, path, _, _ in hub.requests]
    assert all(path.startswith("/api/v1/datasets/some/where/repo") for path in asked)
    assert asked[-1] == "/api/v1/datasets/some/where/repo?Revision=master&FilePath=chats.jsonl"
    hub.files = {"config.json": b"{}"}
    get(mirror="modelscope", files=["config.json"], kind="weights")
    assert (result.folder / "x" / "config.json").read_bytes() == b"{}"
    assert hub.requests[-2][1].startswith("/api/v1/models/some/where/repo/files?Revision=master")


def test_the_list_needs_no_network_and_says_what_nobody_tried(capsys, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    get_data.main(get_data.parse_args(["--list"]))
    shown = capsys.readouterr().out
    for name, source in get_data.SOURCES.items():
        assert name in shown and source.repository in shown and source.licence and source.files
        assert source.kind in ("text", "chats", "pairs", "prompts", "weights")
    assert shown.count("not tried") == sum(not source.tried for source in get_data.SOURCES.values())


@pytest.mark.parametrize("flags, part", [
    (["tinystory"], "--list shows the names"), (["smollm2-135m", "--max_records", "3"], "is for data"),
    (["chinese-web", "--mirror", "modelscope"], "use --mirror hf-mirror"),
    (["tinystories", "--mirror", "file:///etc"], "https://"), (["tinystories", "--mirror", "me"], "https:"),
    (["tinystories", "--max_records", "0"], "at least 1")])
def test_flags_that_cannot_be_obeyed(refused, flags, part):
    refused(get_data, flags, part)


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_cut_is_resumed_at_once(hub, get):
    hub.breaks = [(10_000, 0), (20_000, 0)]
    result = get()
    assert result.code == 0 and result.file.read_bytes() == CHATS
    assert hub.bodies() == [None, "bytes=10000-", "bytes=30000-"]


def test_a_download_that_stays_cut_is_resumed_by_the_next_run(hub, get):
    hub.breaks = [(10_000, 0)] + [(0, 0)] * get_data.ATTEMPTS
    result = get()
    assert result.code == 1 and f"10,000 of {len(CHATS):,} bytes are here" in result.error
    assert "the same command goes on from there" in result.error
    assert part_size(result.folder) == 10_000 and not result.file.exists()
    hub.requests.clear()
    assert get().file.read_bytes() == CHATS and hub.bodies() == ["bytes=10000-"]


def test_a_host_that_cannot_go_on_in_the_middle_sends_all_of_it(hub, get):
    hub.breaks, hub.knows_range = [(10_000, 0)], False
    assert get().file.read_bytes() == CHATS


@pytest.mark.parametrize("answer", [(416, {"Content-Range": f"bytes */{len(CHATS)}"}),
                                    (206, {"Content-Range": f"bytes 0-{len(CHATS) - 1}/{len(CHATS)}"})])
def test_a_host_that_sends_no_rest_or_another_one_is_asked_for_all_of_it(answer, hub, get):
    """What had arrived was kept, and each further command failed in the same way."""
    hub.wrong_rest, hub.breaks = answer, [(3000, 0)]
    result = get()
    assert result.code == 0 and result.file.read_bytes() == CHATS
    assert hub.bodies() == [None, "bytes=3000-", None]


def test_two_files_of_one_name_do_not_replace_each_other(hub, get):
    hub.files = {"a/chats.jsonl": CHATS, "b/chats.jsonl": CHATS[:5000]}
    result = get(files=("a/*.jsonl", "b/*.jsonl"))
    assert result.code == 1 and "two files of the same name" in result.error and not result.file.exists()


def test_a_host_that_asks_for_a_pause_gets_it(hub, get, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    hub.file_fault, hub.fails_head, hub.small = (429, b"", {"Retry-After": "3600"}), False, {"chats.jsonl"}
    result = get()
    assert result.code == 1 and "answers 429, and asks for a pause of 3,600 seconds" in result.error
    assert waited and set(waited) == {get_data.LONGEST_WAIT}


def test_a_file_that_the_host_has_replaced_is_not_glued_to_the_old_half(hub, get):
    hub.breaks = [(10_000, 0)] + [(0, 0)] * get_data.ATTEMPTS
    get()
    hub.files["chats.jsonl"] = CHATS.replace("柳树".encode(), "松树".encode())
    hub.requests.clear()
    assert get().file.read_bytes() == hub.files["chats.jsonl"] and hub.bodies() == [None]


def test_a_wrong_hash(hub, get):
    hub.served["chats.jsonl"] = CHATS[:5000] + b"!" + CHATS[5001:]
    result = get()
    assert result.code == 1 and "its size or hash is not what 127.0.0.1 states" in result.error
    assert left(result.folder) == []
    hub.served.clear()
    assert get().file.read_bytes() == CHATS  # the damaged one was not resumed


def test_a_wrong_hash_of_a_small_file(hub, get):
    hub.small, hub.etags = {"chats.jsonl"}, {"chats.jsonl": "0" * 40}
    assert "its size or hash is not what" in get().error
    hub.etags = {}
    assert "size and hash are" in get().out


def test_too_many_bytes_are_not_taken_as_the_file(hub, get):
    hub.served["chats.jsonl"] = CHATS * 100
    assert "sends something else than was asked for" in get().error


def test_a_host_without_hashes_is_named(hub, get):
    hub.states_hash = False
    assert "no hash is stated, the size is as 127.0.0.1 states" in get().out


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX")
def test_a_disk_that_is_full_in_the_middle(hub, get):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        result = get()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.code == 1 and "the disk is full: make room and run the same command again" in result.error
    assert part_size(result.folder) == 20_000 and not result.file.exists()
    hub.requests.clear()
    assert get().file.read_bytes() == CHATS and hub.bodies() == ["bytes=20000-"]


def test_a_disk_that_is_full_while_the_jsonl_is_written(hub, get):
    import resource

    hub.files = {"t.jsonl.gz": gzip.compress(b'{"text": "the same again"}\n' * 20_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        result = get(files=["t.jsonl.gz"], kind="text")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.code == 1 and "the disk is full" in result.error
    assert left(result.folder) == [".x.download/t.jsonl.gz"]  # the download is kept, half of the JSONL is not
    hub.requests.clear()
    assert "records: 20,000" in get(files=["t.jsonl.gz"], kind="text").out and not hub.bodies()


def test_a_disk_that_is_too_small_is_named_before_anything_is_downloaded(hub, get, monkeypatch):
    for free, code in ((2 * len(CHATS) - 1, 1), (2 * len(CHATS), 0)):  # the file, and the JSONL
        monkeypatch.setattr(get_data.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        result = get()
        assert result.code == code and bool(hub.bodies()) == (code == 0)
        assert code == 0 or "are needed" in result.error and "--out_dir" in result.error


def test_no_disk(hub, get, tmp_path):
    (tmp_path / "data").write_text("a file where a folder should be")
    result = get()
    assert result.code == 2 and "name another --out_dir" in result.error and not hub.bodies()


@pytest.mark.parametrize("status, part", [(404, "it was moved"), (403, "hf auth login"),
                                          (401, "hf auth login"), (500, "try later"), (429, "try later")])
def test_what_the_host_refuses(hub, get, status, part):
    answer = (status, b'{"error": "no"}', {"X-Error-Code": "RepoNotFound"} if status == 404 else {})
    hub.api_fault = answer
    result = get()
    assert result.code == 1 and f"127.0.0.1 answers {status} when asked for some/where" in result.error
    assert part in result.error and not result.folder.exists()
    hub.api_fault, hub.file_fault = None, answer
    assert part in get().error
    hub.fails_head = False  # The file is described, but its bytes are refused.
    result = get()
    assert str(status) in result.error and not result.file.exists()
    hub.file_fault = None
    assert get().file.read_bytes() == CHATS


def test_a_file_that_is_not_there(hub, get):
    result = get(files=["other.jsonl"])
    assert result.code == 1 and "some/where has no file other.jsonl" in result.error
    assert "some/where has no file *.csv" in get(files=["*.csv"]).error


def test_a_host_that_does_not_answer(hub, get, monkeypatch):
    monkeypatch.setattr(get_data, "TIMEOUT", 0.05)
    hub.silent = 30
    result = get()
    assert result.code == 1 and "timed out" in result.error and "--mirror" in result.error
    assert not result.folder.exists()


def test_a_host_that_falls_silent_in_the_middle(hub, get, monkeypatch):
    monkeypatch.setattr(get_data, "TIMEOUT", 0.1)
    hub.breaks = [(10_000, 30)] + [(0, 30)] * get_data.ATTEMPTS
    result = get()
    assert result.code == 1 and "10,000 of" in result.error and "timed out" in result.error
    assert part_size(result.folder) == 10_000
    hub.requests.clear()
    hub.breaks = [(20_000, 30)]  # once more, and then it recovers
    assert get().file.read_bytes() == CHATS and hub.bodies() == ["bytes=10000-", "bytes=30000-"]


def test_a_slow_host_is_waited_for(hub, get):
    hub.breaks = [(10_000, 0.2)]
    assert get().file.read_bytes() == CHATS and hub.bodies() == [None]


def test_a_circle_of_redirects(hub, get):
    hub.circle = True
    result = get()
    assert result.code == 1 and "redirects" in result.error and "--mirror" in result.error


@pytest.mark.parametrize("body", [PAGE, b"[1, 2]", b'"text"', b"{}", b'{"id": "x", "siblings": 3}', b"\xff"])
def test_a_web_page_in_place_of_the_description(hub, get, body):
    hub.api_fault = (200, body, {"Content-Type": "text/html"})
    for mirror in (None, "modelscope"):
        result = get(mirror=mirror)
        assert result.code == 1 and "perhaps the web page of a proxy or of a login" in result.error


def test_a_web_page_in_place_of_the_data(hub, get):
    hub.fails_head = False
    for headers in ({"Content-Type": "text/html; charset=x", "Content-Length": None, "Connection": "close"},
                    {"Content-Type": "application/octet-stream"}):  # the second page says not what it is
        hub.file_fault = (200, PAGE, headers)
        result = get()
        assert result.code == 1 and "perhaps the web page of a proxy or of a login" in result.error
        assert not result.file.exists()
    hub.file_fault = None
    assert get().file.read_bytes() == CHATS


def test_no_network(hub, get, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for mirror in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid"):
        result = get(mirror=mirror)
        assert result.code == 1 and "is this machine on the network? If so, try later" in result.error
        assert not result.folder.exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = get()
    assert result.code == 1 and "HF_HUB_OFFLINE" in result.error and not hub.requests


def test_a_host_that_is_out_of_order_for_a_moment(hub, get, monkeypatch):
    answers = iter([503, 502, 429])
    resolve = Handler.resolve

    def sometimes(handler, name, with_body):
        status = next(answers, None) if with_body else None
        if status:
            handler.send(status, b"", {}, with_body)
        else:
            resolve(handler, name, with_body)

    monkeypatch.setattr(Handler, "resolve", sometimes)
    assert get().file.read_bytes() == CHATS


def test_the_page_names_only_what_is_in_the_list():
    page = (ROOT / "docs" / "data.md").read_text("utf-8")
    commands = re.findall(r"^python scripts/get_data.py (.*?)(?:#.*)?$", page, re.MULTILINE)
    for command in commands:
        get_data.parse_args(command.split())
    names = re.findall(r"out/data/([\w.-]+?)(?:\.jsonl)?[ `\n]", page)
    assert len(commands) > 5 and len(names) > 5 and set(names) <= set(get_data.SOURCES)
    assert len(page.splitlines()) < 80
