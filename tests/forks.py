"""Scripts in processes of their own that start fast. Importing torch and transformers takes two seconds.

One process, the server, imports both, and nothing of ours. Each script then runs in a fork of it. Apart from
these imports the script finds what it would find in a new interpreter: its arguments, its folder in sys.path,
its environment, its streams. Real starts, and the real torchrun, are tested too: tests/test_start.py,
tests/test_quickstart.py, tests/trainer/test_distributed.py.

    process = forks.start([script, "--flag", "1"], processes=2)
    out, err = process.communicate()
    assert process.returncode == 0, err
"""

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

CAN_FORK = sys.platform == "linux"  # elsewhere a fork of a process with torch in it may crash
MAX_SECONDS = 600
server = None


class Fork:
    """What start() returns: as subprocess.Popen, as far as tests need it."""

    def __init__(self, folder: Path):
        self.folder, self.returncode = folder, None

    def communicate(self, timeout: float = MAX_SECONDS) -> tuple[str, str]:
        """(stdout, stderr) of all processes together, once the last one has ended."""
        deadline = time.monotonic() + timeout
        while not (self.folder / "code").exists():
            assert server.poll() is None, "the server of the forks has ended"
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.005)
        self.returncode = int((self.folder / "code").read_text())
        return tuple((self.folder / name).read_bytes().decode("utf-8", "replace") for name in ("out", "err"))


def start(words: list, processes: int = 1, cwd=None, env: dict | None = None, input: str = ""):
    """`python words...` in a fork. With several processes, what torchrun would start: they know each other.

    words: a script, not -c or -m, and its flags. If one process fails, the rest are ended, as by torchrun.
    """
    words, env = [str(word) for word in words], dict(env or os.environ | {"OMP_NUM_THREADS": "1"})
    if not CAN_FORK:
        return start_anew(words, processes, cwd, env, input)
    global server
    if server is None:
        server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, encoding="utf-8",
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
        atexit.register(server.communicate)  # closes its stdin, which ends it, and waits
    folder = Path(tempfile.mkdtemp(prefix="fork-"))
    (folder / "in").write_text(input, encoding="utf-8")
    asked = {"words": words, "processes": processes, "cwd": str(cwd or Path.cwd()), "env": env,
             "folder": str(folder)}
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    return Fork(folder)


def start_anew(words: list[str], processes: int, cwd, env: dict, input: str):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    stdin = tempfile.TemporaryFile()
    stdin.write(input.encode())
    stdin.seek(0)
    return subprocess.Popen([sys.executable, *(torchrun if processes > 1 else []), *words], cwd=cwd, env=env,
                            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


# --- the server ---------------------------------------------------------------------------------------------


def serve() -> None:
    """Starts what each line of stdin asks for, until stdin ends."""
    import safetensors.torch  # noqa: F401
    import torch.distributed  # noqa: F401
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    for line in sys.stdin:
        reap()
        if '"fsdp"' in line:  # half a second for each process that would import them
            import torch.distributed.checkpoint  # noqa: F401
            import torch.distributed.fsdp  # noqa: F401
        if not os.fork():
            look_after(**json.loads(line))
    reap()


def reap() -> None:
    """Forgets the forks that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def look_after(words: list[str], processes: int, cwd: str, env: dict, folder: str) -> None:
    """Starts the processes, waits for them, and writes the first exit code that is not 0 to folder/code."""
    ranks = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [{"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{processes}", "MASTER_ADDR":
                  "127.0.0.1", "MASTER_PORT": f"{port}", "LOCAL_WORLD_SIZE": f"{processes}"}
                 for rank in range(processes)]
    running, code = set(), 0
    for rank in ranks:
        pid = os.fork()
        if not pid:
            run(words, cwd, env | rank, Path(folder))
        running.add(pid)
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if not code and (code := os.waitstatus_to_exitcode(status)):
            for other in running:
                os.kill(other, signal.SIGTERM)
    Path(folder, "code.writing").write_text(str(code))
    os.replace(Path(folder, "code.writing"), Path(folder, "code"))
    os._exit(0)


def run(words: list[str], cwd: str, env: dict, folder: Path) -> None:
    """The script, in this process, as a new interpreter would run it."""
    signal.alarm(MAX_SECONDS)
    code = 1
    try:
        os.dup2(os.open(folder / "in", os.O_RDONLY), 0)
        for number, name in (1, "out"), (2, "err"):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False,
                                    buffering=1))
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
