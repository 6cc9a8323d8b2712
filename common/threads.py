"""How the threads of PyTorch wait for each other on a busy machine. A reader may skip this file.

On a CPU an operation is cut into parts, one for each thread, and the threads that are ready wait for the last
one. OpenMP, which starts them, lets them look again and again for some milliseconds before they sleep. On an
idle machine that is the fastest way: nobody has to be woken. But where other programs run, a thread that
looks again and again holds a core, and the thread that it waits for may need that core. Then a small model
trains at a quarter of its speed, while threads that sleep at once would keep more than half.

So a watcher looks four times a second how much of the cores other programs use, and lets the threads wait
in the way that suits. Their number stays the same, and so does every result.
"""

import ctypes
import os
import sys
import threading
import time

import psutil
import torch

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # who sets one of them has chosen already
INTERVAL = 0.25  # seconds between two looks
# Cores that are missing: from CROWDED on threads sleep, below FREE they stay awake. Where others use 0.6 of a
# core, both are equally fast. Where they use 0.3, sleep costs a quarter in training, two thirds in decoding.
CROWDED, FREE = 0.7, 0.5
MILLISECONDS_AWAKE = 200  # how long LLVM's OpenMP looks before a thread sleeps, unless it is told otherwise

_watcher = None  # one for the whole process


def wait_as_others_allow() -> None:
    """Starts the watcher, once in a process. It does nothing where there is one thread only, or where the
    person has chosen how threads wait. Call it in the main thread."""
    global _watcher
    if _watcher or torch.get_num_threads() == 1 or set(SETTINGS) & set(os.environ):
        return
    try:
        # None: the functions of all libraries that this process has loaded. Windows must be told which one.
        openmp = ctypes.CDLL("libiomp5md.dll" if sys.platform == "win32" else None)
        seconds_of_others(set())
    except OSError:  # no such library, or a system that does not tell how busy its cores are
        return
    if hasattr(openmp, "kmp_set_blocktime"):
        waiting = WaitingOfLLVM(openmp)
    elif hasattr(openmp, "GOMP_parallel"):
        waiting = WaitingOfGNU(openmp)
    else:
        return
    _watcher = threading.Thread(target=watch, args=(waiting, torch.get_num_threads()), daemon=True)
    _watcher.start()


class WaitingOfGNU:
    """Switches between waiting awake and asleep in GNU's OpenMP (Linux), which has no function for it.

    A thread looks 300,000 times before it sleeps. It looks only 100 times while OpenMP manages more threads
    than there are cores. So threads sleep almost at once as long as there is another team, which does
    nothing and has one thread more than there are cores. When that team is gone, they stay awake again.
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


class WaitingOfLLVM:
    """The same in LLVM's and Intel's OpenMP (macOS, Windows), which has a function for it.

    The function has an effect on the thread that calls it, and on no other. So Python is asked to call it in
    the main thread, which trains.
    """

    def __init__(self, openmp: ctypes.CDLL):
        self.set_blocktime, self.is_asleep = openmp.kmp_set_blocktime, False
        self.call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self.apply)  # kept: C calls it later

    def asleep(self, yes: bool) -> None:
        if yes != self.is_asleep:
            self.is_asleep = yes
            ctypes.pythonapi.Py_AddPendingCall(self.call, None)

    def apply(self, _) -> int:
        self.set_blocktime(0 if self.is_asleep else MILLISECONDS_AWAKE)
        return 0


def watch(waiting: WaitingOfGNU | WaitingOfLLVM, threads: int) -> None:
    """Runs as long as the process does. threads: how many of ours compute."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count()))
    mean, others, now = 0.0, seconds_of_others(cores), time.monotonic()
    while True:
        time.sleep(INTERVAL)
        others_before, before = others, now
        others, now = seconds_of_others(cores), time.monotonic()
        missing = threads + (others - others_before) / (now - before) - len(cores)
        mean = (mean + min(missing, 1.0)) / 2  # a single look says little, and more than 1 says nothing more
        if mean >= CROWDED or mean < FREE:
            waiting.asleep(mean >= CROWDED)


def seconds_of_others(cores: set[int]) -> float:
    """The time for which all programs but this one have used these cores since the system started."""
    of_each = psutil.cpu_times(percpu=True)
    used = sum(times.user + getattr(times, "nice", 0) + times.system
               for core, times in enumerate(of_each) if core in cores)
    return used - time.process_time()
