"""What a training run left in its folder, read with care: a kill may have cut a file.
A reader may skip this file.

    run = read_run(Path("out/full_sft"))
    run.series("loss")          # [(20, 5.11), (40, 2.70), ...]
    run.flag("learning_rate")   # 0.007
"""

import ast
import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ModelError, UsageError
from common.files import MAX_JSON_BYTES, explained, one_line, read_json_if_there

LARGEST_STEP = 2**53  # a step beyond is a damaged line, and no float could tell it from its neighbours


@dataclass
class Run:
    """One run. metrics: the lines of metrics.jsonl, by step. Every value is a float, perhaps not finite.

    training: training.json, or {}. arguments: the flags, from training.json or from the newest checkpoint.
    checkpoints: the resumable states, oldest first. notes: what could not be read, a sentence each.
    """

    folder: Path
    metrics: list[dict[str, float]] = field(default_factory=list)
    training: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    checkpoints: list[Path] = field(default_factory=list)
    is_open: bool = False  # the folder "checkpoints" is there, which every run drops at its end
    notes: list[str] = field(default_factory=list)
    # (step, the share of each expert in the choices of each layer), of a model with experts
    router_loads: list[tuple[float, list[list[float]]]] = field(default_factory=list)

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of each line that has a finite value of this name."""
        return [(line["step"], line[name]) for line in self.metrics
                if math.isfinite(line.get(name, math.nan))]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.series(name)]

    def flag(self, name: str, kind: type | tuple = (int, float)):
        """The value of a flag of the run, or None where it is unknown or of another type."""
        value = self.arguments.get(name)
        return value if isinstance(value, kind) and not isinstance(value, bool) else None

    @property
    def stage(self) -> str:
        for found in (self.training.get("stage"), self.arguments.get("stage")):
            if isinstance(found, str):
                return found
        return "unknown"

    @property
    def last_step(self) -> int:
        return int(max((line["step"] for line in self.metrics), default=0))

    @property
    def max_steps(self) -> int:
        found = [value for value in self.values("max_steps") if value >= 1]
        return int(found[-1]) if found else self.last_step

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file() or bool(self.flag("lora_rank"))

    @property
    def learns_from_rewards(self) -> bool:
        """Then the loss says nothing: what it is the mean of changes with every rollout."""
        return any("reward" in line for line in self.metrics)

    @property
    def is_unfinished(self) -> bool:
        return self.is_open or (not self.training and self.last_step < self.max_steps)

    @property
    def guessing(self) -> float | None:
        """ln of the vocabulary's size: the loss of a model that finds all tokens equally likely."""
        for folder in filter(None, (self.folder, self.parent)):
            with suppress(ModelError, OSError):
                size = number(read_json_if_there(folder / "config.json").get("vocab_size"))
                if size and size > 1:
                    return math.log(size)
        return None

    @property
    def parent(self) -> Path | None:
        """The model that the run began with, if it is still there."""
        for found in (self.training.get("parent"), self.arguments.get("load_from")):
            with suppress(OSError, ValueError):  # a name that is too long, or holds NUL
                if isinstance(found, str) and Path(found).exists():
                    return Path(found)
        return None


def read_run(folder: Path) -> Run:
    """Reads a run, finished or not. Raises UsageError where the folder holds none."""
    from trainer.checkpoint import checkpoints  # here, because both import torch
    from trainer.tracking import read_metrics

    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    run = Run(folder, is_open=(folder / "checkpoints").is_dir(), checkpoints=checkpoints(folder))
    lines = [{str(name): number(value) for name, value in line.items() if number(value) is not None}
             for line in read_metrics(folder / "metrics.jsonl")]
    run.metrics = sorted((line for line in lines if 0 <= line.get("step", -1) <= LARGEST_STEP),
                         key=lambda line: line["step"])
    run.router_loads = [(line["step"], line["router_load"]) for line in read_metrics(folder / "metrics.jsonl")
                        if is_load(line.get("router_load")) and 0 <= line["step"] <= LARGEST_STEP]
    try:
        run.training = read_json_if_there(folder / "training.json")
    except (ModelError, OSError) as error:
        run.notes.append(f"training.json can't be read: {one_line(error)}")
    if isinstance(run.training.get("arguments"), dict):
        run.arguments = run.training["arguments"]
    elif run.checkpoints:
        run.arguments = arguments_in(run.checkpoints[-1], run.notes)
    if not (run.metrics or run.training or run.checkpoints):
        inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        others = f"; it holds runs, name one of them: {', '.join(inside[:8])}" if inside else ""
        raise UsageError(f"{folder} holds no run: no line in a metrics.jsonl, no training.json{others}")
    return run


def arguments_in(checkpoint: Path, notes: list[str]) -> dict:
    """The flags that a checkpoint names. They are text there: "0.01", "None", "['a.jsonl']"."""
    import torch

    try:
        with explained(checkpoint / "state.pt"):
            state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True, mmap=True)
            settings = {str(name): str(value) for name, value in state["settings"].items()}
    except ModelError as error:
        notes.append(str(error))
        return {}
    found = {}
    for name, text in settings.items():
        if name.startswith("--"):
            found[name[2:]] = text
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found[name[2:]] = ast.literal_eval(text)
    return found


def number(value) -> float | None:
    """A value of a JSON file as a float; None for anything but a number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer of hundreds of digits
            return float(value)
    return None


def is_load(value) -> bool:
    """Whether a value of the log is the load of each expert in each layer: equally long lists of shares."""
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(layer, list) and layer and len(layer) == len(value[0]) for layer in value)
            and all(number(share) is not None and 0 <= share <= 1.001 for layer in value for share in layer))


def count_parameters(weights: Path) -> int:
    """The parameters in a safetensors file: 8 bytes of length, then JSON with the shape of every tensor.

    Raises ModelError for a file that is missing or damaged.
    """
    with explained(weights), weights.open("rb") as file:
        header = json.loads(file.read(min(MAX_JSON_BYTES, int.from_bytes(file.read(8), "little"))))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def size_of_b(run: Run) -> float | None:
    """The root mean square of all numbers in the adapters' B, which starts at 0; None without such a file."""
    from common.files import read_safetensors  # here, because it imports torch when it is called

    try:
        tensors, _ = read_safetensors(run.folder / "adapter_model.safetensors")
    except ModelError:
        return None
    found = [tensor.double() for name, tensor in tensors.items() if "lora_B" in name and tensor.numel()]
    count = sum(tensor.numel() for tensor in found)
    size = math.sqrt(sum(tensor.square().sum().item() for tensor in found) / count) if count else math.nan
    return size if math.isfinite(size) else None
