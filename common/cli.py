"""What every command line of ours shares: the parser, and how an error becomes one line and an exit code.
A reader may skip this file.

Nothing heavy is imported here, so that `--help` answers at once. Importing torch alone takes over a second.
"""

import argparse
import errno
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common.errors import INTERRUPTED, TERMINATED, DataError, ModelError, RunError, Terminated, UsageError

ROOT = Path(__file__).resolve().parents[1]  # default paths start here; typed ones, where the person is
STARTED = time.monotonic()  # seconds; about when this process began
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without argparse's screen of usage."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": HelpFormatter} | options)

    def parse_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if not word.isascii() and word != word.encode("utf-8", "replace").decode("utf-8"):
                self.error(f"{word!a} is not valid UTF-8, which names of files must be here")
        return super().parse_args(args, namespace)

    def error(self, message: str):
        # All processes of torchrun read the same flags. The first process alone reports the mistake.
        is_main = os.environ.get("RANK", "0") == "0"
        message = re.sub("^argument (--[a-z_]+): must ", r"\1 must ", message)  # from `number`
        self.exit(2, f"error: {message} (--help lists the flags)\n" if is_main else None)


def number(kind: type, is_allowed: Callable, says: str) -> Callable[[str], float]:
    """A type for add_argument: a finite number for which is_allowed(number) is true.

    says: what is allowed, such as "at least 1", for the message.
    """
    def parse(text: str):
        value = kind(text)
        if not is_allowed(value) or abs(value) == math.inf:  # a comparison with NaN is never true
            raise argparse.ArgumentTypeError(f"must be {says}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


count = number(int, lambda n: n >= 1, "at least 1")
any_count = number(int, lambda n: n >= 0, "at least 0")
positive = number(float, lambda x: x > 0, "above 0 and finite")
not_negative = number(float, lambda x: x >= 0, "at least 0 and finite")
fraction = number(float, lambda x: 0 <= x < 1, "a part of the whole, from 0 to below 1")
seed = number(int, lambda n: 0 <= n < 2**32, "from 0 to 2^32 - 1")


def split_rope_scaling(text: str) -> tuple[str, float, int | None]:
    """"yarn:4:512" -> ("yarn", 4.0, 512): kind, factor, and the tokens of a text in training, or None.

    Raises ValueError for what is no scaling.
    """
    kind, *numbers = text.split(":")
    if text == "none":
        return kind, 1.0, None
    factor, length = float(numbers[0]), int(numbers[1]) if len(numbers) > 1 else None
    is_length = length is None or (kind != "linear" and 1 < length < 2**31)
    if kind not in ("linear", "llama3", "yarn") or len(numbers) > 2 or not 1 < factor < 1e6 or not is_length:
        raise ValueError(text)
    return kind, factor, length


def rope_scaling(text: str) -> str:
    """A type for add_argument: the text, if it is a scaling."""
    try:
        split_rope_scaling(text)
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(
            f"must be KIND:FACTOR, as in yarn:4, linear:4 or llama3:8, or none, not {text}; a factor is "
            "above 1, and yarn and llama3 may name the tokens of a text in training: yarn:4:512") from None
    return text


def add_rope_scaling(add: Callable) -> None:
    """The flag of every command that loads a model. add: the add_argument of a parser or a group."""
    add("--rope_scaling", type=rope_scaling, metavar="KIND:FACTOR",
        help="read texts FACTOR times as long as in training: yarn:4, linear:4, llama3:8; none: without the "
             "model's own scaling (default: as its config says)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the commands at the top of each script as they are written, and shows every default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default in (argparse.SUPPRESS, None, []) or "%(default)" in action.help
        if isinstance(action.default, bool) and "--no-" not in str(action.option_strings):
            hidden = True  # a plain switch is always off by default
        return action.help if hidden else f"{action.help} (default: %(default)s)"


def make_streams_safe() -> None:
    """From now on no character can end a run because it cannot be printed.

    A terminal keeps its encoding, and so does a stream for which PYTHONIOENCODING names one. A file or a pipe
    gets UTF-8: on Windows it would get a code page, in which most languages cannot be written. A character
    that the encoding lacks, such as 文 in cp1252, is written as \\u6587.

    A byte order mark, which Windows writes before a text, is not read as a part of it. A stream that was
    closed, as by `<&-`, becomes an empty one.
    """
    sys.stdin, sys.stdout, sys.stderr = (
        stream or open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (open to the end of the process)
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w")))
    for stream, encoding, errors in ((sys.stdin, "utf-8-sig", "replace"),
                                     (sys.stdout, "utf-8", "backslashreplace"),
                                     (sys.stderr, "utf-8", "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # a test or a notebook may have put another object there
            keeps_encoding = stream.isatty() or os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
            stream.reconfigure(encoding=None if keeps_encoding else encoding, errors=errors)


def run_script(main: Callable, args: argparse.Namespace, advice: Callable[[str], str] | None = None) -> None:
    """Runs `main(args)`. An error becomes one line on stderr and an exit code (common/errors.py).

    advice: what a script can add to two of these lines; it is called with "out of memory" or "lost process"
    and returns the rest of the line.
    """
    def terminate(number, frame):
        raise Terminated

    make_streams_safe()
    handler_before = signal.signal(signal.SIGTERM, terminate)
    try:
        main(args)
        return
    except Terminated:
        code, line = TERMINATED, "stopped by SIGTERM"
    except KeyboardInterrupt:
        code, line = INTERRUPTED, "stopped by Ctrl-C"
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            raise SystemExit(1) from None
        code, line = explain(error, advice)
    finally:
        signal.signal(signal.SIGTERM, handler_before)
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # Most often all processes fail alike, and process 0 reports the error. torchrun then ends the others
        # during this pause, before they report the same error again.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        time.sleep(3)
        line = f"rank {rank}: {line}"
    print(line, file=sys.stderr)
    raise SystemExit(code)


def reader_is_gone() -> bool:
    """Whether the program that read our output has ended, as `| head -1` does.

    If so, everything printed from now on is thrown away: the interpreter flushes once more at its end.
    """
    try:
        os.write(1, b"\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
    return False


def explain(error: Exception, advice: Callable[[str], str] | None = None) -> tuple[int, str]:
    """(exit code, one line) for a mistake or a misfortune. A bug is raised again and keeps its traceback."""
    # A token cache that cannot be written raises a DataError whose context is the error of the disk.
    disk_error = error.__context__ if isinstance(error, DataError) else error
    disk_is_full = isinstance(disk_error, OSError) and disk_error.errno in DISK_IS_FULL
    # safetensors has an error of its own for a file that it cannot write.
    if disk_is_full or isinstance(error, RunError) or "SafetensorError" in repr(error):
        return 1, f"error: {error}"
    # When a worker of the DataLoader is killed, its parent notices, or the socket between the two closes.
    connection_lost = isinstance(error, ConnectionError)
    if isinstance(error, (DataError, ModelError, UsageError, OSError)) and not connection_lost:
        return 2, f"error: {error}"
    # CUDA raises an OutOfMemoryError, the allocators of the CPU raise a RuntimeError.
    if re.search(r"MemoryError|not enough memory|can't allocate memory", repr(error)):
        return 1, f"error: {out_of_memory(str(error))}" + (advice("out of memory") if advice else "")
    lost = r"Connection (closed|reset|refused)|gloo|NCCL|DataLoader worker"
    if connection_lost or re.search(lost, str(error)):
        line = f"error: a process that this one works with ended ({str(error).splitlines()[0]})"
        return 1, line + (advice("lost process") if advice else "")
    raise error


def out_of_memory(message: str) -> str:
    """How much memory an allocator asked for, according to its message, and how much there is."""
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", message, re.IGNORECASE)
    there = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", message)
    line = "out of memory"
    if asked:
        size = f"{float(asked[1]) / 2**30:.2f} GiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
        line += f": {size} were asked for"
    if there:
        line += f", of {there[1]} on the GPU {there[2]} are free"
    elif "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        total, free = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") / 2**30
                       for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        line += f", of {total:.1f} GiB in this machine {free:.1f} GiB are free"
    return line
