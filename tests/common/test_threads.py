"""Threads stay awake on an idle machine and sleep beside other programs, and their results stay the same."""

import os
import subprocess
import sys
import threading
import time

import pytest

from common import threads
from common.cli import ROOT

# Prints the processor time that threads spend on waiting: asleep, awake, asleep again. It prints also whether
# a product has the same bits.
SWITCH = """
import ctypes, time, torch
from common.threads import WaitingOfGNU
torch.set_num_threads(2)
x = torch.randn(512, 512)
waiting, products = WaitingOfGNU(ctypes.CDLL(None)), []
for yes in (True, False, True):
    waiting.asleep(yes)
    time.sleep(0.2)
    spent = 0.0
    for _ in range(20):
        products.append(x @ x)
        began = time.process_time()
        time.sleep(0.02)
        spent += time.process_time() - began
    print(spent)
print(all(torch.equal(product, products[0]) for product in products))
"""


def run(code, **environment):
    names = ("OMP_NUM_THREADS", *threads.SETTINGS)
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept | environment, text=True,
                          capture_output=True, check=True).stdout.split()


@pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() < 2, reason="GNU's OpenMP, two cores")
def test_a_waiting_thread_takes_time_when_awake_and_none_asleep():
    asleep, awake, asleep_again, same = run(SWITCH)
    assert float(awake) > 5 * float(asleep) and float(awake) > 5 * float(asleep_again)
    assert same == "True"


@pytest.mark.parametrize(("environment", "starts"), [
    ({}, "True"), ({"OMP_NUM_THREADS": "1"}, "False"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "False"),
    ({"GOMP_SPINCOUNT": "5"}, "False"),
])
def test_who_has_chosen_is_obeyed(environment, starts):
    environment = {"OMP_NUM_THREADS": "2"} | environment
    code = ("from common import threads; threads.wait_as_others_allow(); first = threads._watcher;"
            "threads.wait_as_others_allow(); print(first is not None and first is threads._watcher)")
    assert run(code, **environment) == [starts]


def test_others_are_counted_and_we_are_not():
    cores = os.sched_getaffinity(0)
    before = threads.seconds_of_others(cores)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(1)
    other.kill()
    other.wait()
    assert threads.seconds_of_others(cores) - before > 0.2
    assert threads.seconds_of_others(set()) == pytest.approx(-time.process_time(), abs=0.1)


def test_llvm_is_told_in_the_main_thread():
    told = []

    class OpenMP:
        def kmp_set_blocktime(milliseconds):
            told.append((milliseconds, threading.current_thread() is threading.main_thread()))

    waiting = threads.WaitingOfLLVM(OpenMP)
    for yes in (True, True, False):
        thread = threading.Thread(target=waiting.asleep, args=(yes,))
        thread.start()
        thread.join()
        time.sleep(0.01)
    assert told == [(0, True), (threads.MILLISECONDS_AWAKE, True)]


class Ended(Exception):
    pass


def decisions(monkeypatch, used, num_threads=2, cores=2):
    """What the watcher decides at each look, if other programs use so many cores at each look."""
    clock, seconds, told, looks = [0.0], [0.0], [], iter(used)

    def sleep(interval):
        share = next(looks, None)
        if share is None:
            raise Ended
        clock[0] += interval
        seconds[0] += share * interval

    monkeypatch.setattr(threads.time, "sleep", sleep)
    monkeypatch.setattr(threads.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(threads, "seconds_of_others", lambda cores: seconds[0])
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: set(range(cores)))

    class Waiting:
        def asleep(self, yes):
            told.append(yes)

    with pytest.raises(Ended):
        threads.watch(Waiting(), num_threads)
    return told


def test_threads_sleep_beside_a_busy_program_and_wake_after_it(monkeypatch):
    told = decisions(monkeypatch, [0, 0, 1, 1, 1, 0, 0, 0, 0])
    assert told[:2] == [False, False] and True in told and told[-1] is False


def test_many_busy_programs_are_forgotten_as_soon_as_one(monkeypatch):
    assert decisions(monkeypatch, [4] * 8 + [0] * 2)[-1] is False


def test_a_program_that_uses_half_a_core_disturbs_nobody(monkeypatch):
    assert True not in decisions(monkeypatch, [0.5] * 8)


def test_a_program_that_finds_a_free_core_disturbs_nobody(monkeypatch):
    assert True not in decisions(monkeypatch, [1] * 8, num_threads=2, cores=4)
    assert True in decisions(monkeypatch, [3] * 8, num_threads=2, cores=4)
