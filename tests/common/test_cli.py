"""What all command lines share: numbers in their limits, and errors that become one line."""

import argparse
import errno

import pytest
from safetensors import SafetensorError

from common import cli
from common.errors import DataError, ModelError, RunError, UsageError


@pytest.mark.parametrize("kind, good, bad", [
    (cli.count, ["1", "7"], ["0", "-1", "1.5", "x", "nan"]),
    (cli.any_count, ["0", "3"], ["-1", "x"]),
    (cli.positive, ["0.1", "1e9"], ["0", "-1", "inf", "nan", "x"]),
    (cli.not_negative, ["0", "2.5"], ["-0.1", "inf", "nan"]),
    (cli.fraction, ["0", "0.99"], ["1", "-0.1", "nan"]),
    (cli.seed, ["0", "4294967295"], ["-1", "4294967296"]),
])
def test_numbers_in_their_limits(kind, good, bad, capsys):
    parser = cli.Parser()
    parser.add_argument("--x", type=kind)
    for text in good:
        assert parser.parse_args(["--x", text]).x == float(text)
    for text in bad:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["--x", text])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert "--x must be" in error or "invalid" in error


@pytest.mark.parametrize("error, code, says", [
    (UsageError("a flag"), 2, "error: a flag"), (DataError("a record"), 2, "error: a record"),
    (ModelError("a model"), 2, "error: a model"), (RunError("a run"), 1, "error: a run"),
    (SafetensorError("No space left"), 1, "error: No space left"),
    (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
    (MemoryError(), 1, "error: out of memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed"), 1, "error: a process that this one works with"),
])
def test_an_error_is_one_line_and_an_exit_code(error, code, says, capsys):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run_script(main, argparse.Namespace())
    line = capsys.readouterr().err
    assert ended.value.code == code and line.startswith(says) and line.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    def main(args):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        cli.run_script(main, argparse.Namespace())


def test_advice_is_added_to_the_line(capsys):
    def main(args):
        raise MemoryError

    with pytest.raises(SystemExit):
        cli.run_script(main, argparse.Namespace(), advice=lambda problem: f"; about {problem}")
    assert capsys.readouterr().err.endswith("; about out of memory\n")
