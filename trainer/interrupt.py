"""Stopping a run in good order, by a signal or by the clock, and the command that goes on after it.
A reader may skip this file.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.cli import STARTED
from common.errors import INTERRUPTED, TERMINATED, TIME_IS_UP, Terminated

MAX_SECONDS_TO_REPEAT = 2.0  # within which torchrun repeats a signal that its processes have received already


@contextmanager
def stop_requests(max_minutes: float | None = None) -> Iterator[Callable[[], int]]:
    """Within the block the first Ctrl-C, SIGTERM or SIGHUP asks the loop to stop; a second one stops at once.

    Gives a function that returns the exit code to stop with, or 0 to go on. It returns TIME_IS_UP when
    max_minutes have passed since this process began.
    """
    codes = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        codes[signal.SIGHUP] = TERMINATED  # the terminal was closed; nohup has the signal ignored
    received = []  # (exit code, time) of each signal

    def receive(number, frame):
        if not received and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # os.write and not print: the signal may have interrupted a print
                os.write(1, b"\nstopping after this step (again to stop at once)\n")
        # A terminal, or Slurm, signals torchrun and its processes, and then torchrun signals its processes
        # once more. Nobody asked for that second signal.
        if received:
            repeated = time.monotonic() - received[0][1] < MAX_SECONDS_TO_REPEAT
            if not (repeated and "TORCHELASTIC_RUN_ID" in os.environ):
                raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        received.append((codes[number], time.monotonic()))

    def requested() -> int:
        if received:
            return received[0][0]
        if max_minutes and time.monotonic() - STARTED > 60 * max_minutes:
            return TIME_IS_UP
        return 0

    handlers_before = {number: signal.signal(number, receive) for number in codes}
    try:
        yield requested
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


def ignore_interrupts(worker: int) -> None:
    """For the workers of a DataLoader. Ctrl-C reaches them too, but the loop needs them to end its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Makes Linux send SIGTERM to this process when torchrun dies, or the quickstart.

    If they are killed, they cannot end their processes. These would train on, and a run started to replace
    them would find the folder occupied.
    """
    if sys.platform == "linux" and {"TORCHELASTIC_RUN_ID", "SEEDLING_QUICKSTART"} & os.environ.keys():
        import ctypes  # here, because --help does not need it

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def command_to_resume() -> str:
    """The command line of this process with --resume at its end, to be copied into a shell.

    For a process of torchrun it is torchrun's own command line: Linux knows that one, and on other systems
    the variables that torchrun sets say enough.
    """
    words = [sys.orig_argv[0], *sys.argv]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        try:
            parent = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]
        except OSError:
            parent = []
        if sys.argv[0] not in parent:
            words = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}", *sys.argv]
        elif Path(parent[1]).name == "torchrun":  # the parent is `python /some/folder/torchrun ...`
            words = ["torchrun", *parent[2:]]
        else:
            words = parent
    # --overwrite has done its work. A flag may be shortened, as in --overw.
    words = [word for word in words if not (len(word) > 3 and "--overwrite".startswith(word))]
    if "--resume" not in words:
        words.append("--resume")
    return shlex.join(words) if os.name == "posix" else subprocess.list2cmdline(words)
