"""What several benchmarks share: optional packages, processes of their own, steps, tables and pictures.

Readers of the code may skip this whole folder: it measures, and nothing else depends on it.
"""

import importlib.util
import io
import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import UsageError

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # colour-blind readers see four (Okabe & Ito 2008)


def installed(packages: dict[str, str | None]) -> list[str]:
    """The names that can be measured here. packages: {name: the package that it needs, or None}.

    A name whose package is not installed is left out, and one line says so.
    """
    kept = []
    for name, package in packages.items():
        if package is None or importlib.util.find_spec(package):
            kept.append(name)
        else:
            print(f"left out: {name} needs `pip install {package}`", flush=True)
    return kept


# --- processes of their own ---------------------------------------------------------------------------------


def output_of(command: list, **environment: str) -> str:
    """What a command prints. Its error messages go where ours go. Raises UsageError where it fails."""
    words = [str(word) for word in command]
    ended = subprocess.run(words, stdout=subprocess.PIPE, encoding="utf-8", errors="replace",
                           env=os.environ | environment)
    if ended.returncode:
        raise UsageError(f"a measurement ended with exit code {ended.returncode}, and its message is above: "
                         f"{shlex.join(words)}")
    return ended.stdout


def json_of(command: list, **environment: str) -> dict:
    """The JSON object on the last line that a command prints. Raises UsageError where the command fails."""
    return json.loads(output_of(command, **environment).splitlines()[-1])


def seconds_to_first_step(command: list) -> float:
    """Seconds from the start of a training script until it reports its first step. Then it is killed."""
    words, began = [str(word) for word in command], time.perf_counter()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, encoding="utf-8", env=environment) as process:
        stepped = any(line.startswith("step ") for line in process.stdout)
        seconds = time.perf_counter() - began
        process.kill()
    if not stepped:
        raise UsageError(f"a training run made no step, and its message is above: {shlex.join(words)}")
    return seconds


def take_turns(workers: dict[str, subprocess.Popen], rounds: int) -> Iterator[tuple[int, str, str]]:
    """(round, name, the line that the worker answers) of each turn. Round 0, which warms up, is left out.

    workers: {name: a process that works once for each line it reads}. They end with the last round.
    """
    try:
        for number in range(rounds + 1):
            for name, worker in workers.items():
                worker.stdin.write("\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    raise UsageError(f"{name} ended early, and its message is above")
                if number:
                    yield number, name, answer
    finally:
        for worker in workers.values():
            worker.stdin.close()  # which ends it
            worker.wait()


# --- a training step ----------------------------------------------------------------------------------------


def transformers_model(config):
    """transformers' own class in the shape of our config, its weights at random."""
    import transformers

    from model.config_file import config_to_dict

    raw = config_to_dict(config)
    family = raw["architectures"][0].removesuffix("ForCausalLM")
    theirs = getattr(transformers, f"{family}Config")(**raw)
    return getattr(transformers, f"{family}ForCausalLM")(theirs)


def take_step(model, optimizers: list, batch: dict, dtype, waits: bool = False):
    """A step as trainer/loop.py takes it: forward, backward, clip, optimizers. The gradients stay.

    waits: read the norm of the gradients before the optimizers step. The loop does so in order to leave out a
    step with gradients that are not finite, and a GPU has nothing to do in the meantime. Returns the norm.
    """
    import torch

    from common.device import autocast, to_device

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    with autocast(device, dtype):
        loss = model(**to_device(batch, device)).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if waits:
        norm.item()
    for optimizer in optimizers:
        optimizer.step()
    return norm


def drop_gradients(optimizers: list) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


# --- tables and pictures ------------------------------------------------------------------------------------


def markdown(table, formats: dict[str, str] | None = None) -> str:
    """A Markdown table of a pandas DataFrame, or of the dicts that make one. A missing value is left empty.

    formats: {column: how its numbers are written}, such as {"MB": ",.1f"}.
    """
    import pandas as pd

    table = pd.DataFrame(table)
    for column, form in (formats or {}).items():
        table[column] = table[column].map(f"{{:{form}}}".format, na_action="ignore")
    rows = [table.columns, *table.astype(object).fillna("").values.tolist()]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(table.columns))
    return "\n".join(lines)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **more):
    """A matplotlib figure of that size in inches, and its axes: an array of rows x columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def save_picture(figure, path: Path) -> None:
    """Writes a PNG of 128 colours, which looks the same and takes a third of the bytes."""
    from PIL import Image  # matplotlib requires it

    from common.files import write_whole

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    write_whole(path, small.getvalue())
