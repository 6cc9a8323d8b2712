"""How the threads of PyTorch wait for each other on a busy machine. A reader may skip this file.

On a CPU an operation is cut into parts, one for each thread, and the threads that are ready wait for the last
one. GNU's OpenMP, which PyTorch uses on Linux, lets them look again and again for some milliseconds before
they sleep. On an idle machine that is the fastest way: nobody has to be woken. But where other programs run,
a thread that looks again and again holds a core, and the thread that it waits for may need that core. Then a
small model trains at a quarter of its speed, while threads that sleep at once would keep more than half.

So a watcher looks four times a second how much of the cores other programs use, and lets the threads wait
in the way that suits. Their number stays the same, and so does every result.
"""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

import torch

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # a person who sets one of them has chosen already
INTERVAL = 0.25  # seconds between two looks
CROWDED, FREE = 0.3, 0.15  # cores that are missing: from CROWDED on threads sleep, below FREE they stay awake

_watcher = None  # one for the whole process


def wait_as_others_allow() -> None:
    """Starts the watcher, once in a process.

    It does nothing where there is one thread only, where the person has chosen how threads wait, and on
    systems other than Linux, which have another OpenMP.
    """
    global _watcher
    if _watcher or sys.platform != "linux" or torch.get_num_threads() == 1 or set(SETTINGS) & set(os.environ):
        return
    openmp = ctypes.CDLL(None)  # the functions of all libraries that this process has loaded
    if hasattr(openmp, "GOMP_parallel") and not hasattr(openmp, "kmp_set_blocktime"):  # GNU's, and not LLVM's
        watched = (Waiting(openmp), torch.get_num_threads())
        _watcher = threading.Thread(target=watch, args=watched, daemon=True)
        _watcher.start()


class Waiting:
    """Switches between waiting awake and asleep, for which GNU's OpenMP has no function.

    It looks 300,000 times before a thread sleeps, but 100 times only as soon as it manages more threads than
    there are cores. So an idle team of as many threads as there are cores makes all others sleep at once.
    When that team is gone, they stay awake again.
    """

    def __init__(self, openmp: ctypes.CDLL):
        self.openmp = openmp
        self.end_team = None  # an event, as long as there is a team

    def asleep(self, yes: bool) -> None:
        if yes and self.end_team is None:
            self.end_team = threading.Event()
            threading.Thread(target=self.hold_team, args=(self.end_team,), daemon=True).start()
        elif not yes and self.end_team is not None:
            self.end_team.set()
            self.end_team = None

    def hold_team(self, end: threading.Event) -> None:
        """A team belongs to the thread that made it, and ends with that thread."""
        work = ctypes.cast(self.openmp.getppid, ctypes.c_void_p)  # any function that does next to nothing
        self.openmp.GOMP_parallel(work, None, os.cpu_count() + 1, 0)
        end.wait()


def watch(waiting: Waiting, threads: int) -> None:
    """Runs as long as the process does. threads: how many of ours compute."""
    cores = os.sched_getaffinity(0)
    mean, others, now = 0.0, seconds_of_others(cores), time.monotonic()
    while True:
        time.sleep(INTERVAL)
        others_before, before = others, now
        others, now = seconds_of_others(cores), time.monotonic()
        missing = threads + (others - others_before) / (now - before) - len(cores)
        mean = (mean + missing) / 2  # a single look says little
        if mean >= CROWDED or mean < FREE:
            waiting.asleep(mean >= CROWDED)


def seconds_of_others(cores: set[int]) -> float:
    """The time for which all programs but this one have used these cores since the system started."""
    ticks = 0
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _, _, interrupts, soft_interrupts, *_ = map(int, numbers)
            ticks += user + nice + system + interrupts + soft_interrupts
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
