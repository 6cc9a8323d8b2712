"""Chinese names and words where an output can hold Latin letters alone, as in code page 1252 of Windows."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "inference"))

from small_chat_model import make_home, turns, write

import eval_model
from common import cli
from scripts import check_data, merge_lora

ROOT = Path(eval_model.__file__).parent
# The lines of shared/cases/windows_codepage, in a file that is named 文本.jsonl there, too.
TEXTS = ["The willow stood by the river long before the village had a name.",
         "A fox and a crow lived in the same wood and did not speak.",
         "In the morning the baker opens the shop and sells warm bread.",
         "The old clock on the wall strikes nine and the children run home."]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("模型"))


def run(monkeypatch, script, *flags, encoding="cp1252") -> tuple[str, str]:
    """stdout and stderr of a script in this process, through streams with this encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    cli.run_script(script.main, script.parse_args([str(flag) for flag in flags]))
    return tuple(stream.buffer.getvalue().decode(encoding) for stream in streams)


def test_training_ends_as_it_should(tmp_path):
    data = write(tmp_path / "文本.jsonl", *({"text": text} for text in TEXTS))
    flags = ["--data_path", data, "--out_dir", tmp_path / "输出", "--name", "模型", "--max_steps", 2,
             "--hidden_size", 32, "--num_hidden_layers", 1, "--max_seq_len", 64, "--device", "cpu"]
    done = subprocess.run([sys.executable, ROOT / "trainer" / "train_pretrain.py", *map(str, flags)],
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, timeout=120)
    shown = (done.stdout + done.stderr).decode("cp1252")
    assert done.returncode == 0 and "Traceback" not in shown, shown
    assert "saved" in shown and "\\u6a21\\u578b" in shown  # 模型
    assert (tmp_path / "输出" / "模型" / "model.safetensors").is_file()


def test_merging_ends_as_it_should(home, tmp_path, monkeypatch):
    out, _ = run(monkeypatch, merge_lora, "--load_from", home / "chat", "--lora", home / "lora_a",
                 "--out_dir", tmp_path / "合并")
    assert "\\u5408\\u5e76" in out and (tmp_path / "合并" / "model.safetensors").is_file()


def test_data_is_checked_and_scored(home, tmp_path, monkeypatch):
    data = write(tmp_path / "对话.jsonl", turns("你好", "你好！"), turns("Hé?", "b"))
    out, _ = run(monkeypatch, check_data, data)
    assert "\\u4f60\\u597d" in out and "Hé" in out  # é is in the code page
    out, err = run(monkeypatch, eval_model, "--load_from", home / "chat", "--data_path", data)
    assert "\\u5bf9\\u8bdd" in out and "Traceback" not in err


def test_a_file_or_a_pipe_gets_utf_8_unless_another_encoding_was_asked_for(monkeypatch):
    """On Windows a pipe has the code page of the machine, and no terminal is there to keep it for."""
    for asked, encoding in ((None, "utf-8"), ("cp1252", "cp1252"), (":strict", "utf-8")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.delenv("PYTHONIOENCODING", raising=False)
        if asked:
            monkeypatch.setenv("PYTHONIOENCODING", asked)
        cli.make_streams_safe()
        print("文 \udcff", flush=True)  # the second is a byte of a file name that is no UTF-8
        assert stream.encoding == encoding
        assert stream.buffer.getvalue().decode(encoding).split()[1] == "\\udcff"


def test_a_byte_order_mark_is_no_part_of_a_text(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeff文\n".encode()), encoding="ascii"))
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    cli.make_streams_safe()
    assert sys.stdin.read() == "文\n"


def test_closed_streams_are_empty_ones(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    cli.make_streams_safe()
    print("nobody reads this")
    streams = sys.stdin, sys.stdout, sys.stderr
    found = [stream.isatty() for stream in streams], sys.stdin.read()
    for stream in streams:
        stream.close()
    assert found == ([False] * 3, "")


def test_a_terminal_keeps_its_encoding(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="gbk")
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    cli.make_streams_safe()
    print("文é", end="", flush=True)
    assert stream.buffer.getvalue() == "文é".encode("gbk", "backslashreplace")
