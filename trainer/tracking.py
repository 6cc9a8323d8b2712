"""What a run tells: a line on the terminal, metrics.jsonl, loss.png and, if asked, Weights & Biases."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from trainer.args import UsageError


class Tracker:
    """Writes the log of one run. `metrics.jsonl` is the whole story; the rest is drawn from it.

    Only the main rank logs; on the others every method returns at once. What a full disk has no room for is
    kept and written with the next line: no log is worth a run.
    """

    def __init__(self, run_dir: Path, active: bool, start_step: int = 0, wandb_project: str | None = None,
                 config: dict | None = None):
        self.active, self.path, self.wandb = active, run_dir / "metrics.jsonl", None
        if not active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        # A resumed run forgets what was logged after its checkpoint: those steps are about to happen again.
        kept = [m for m in read_metrics(self.path) if m["step"] <= start_step] if start_step else []
        new = self.path.with_name(".metrics.jsonl.writing")
        new.write_text("".join(json.dumps(m) + "\n" for m in kept), encoding="utf-8", newline="\n")
        os.replace(new, self.path)  # a run that is killed right here has its log, too
        self.unwritten = ""
        if wandb_project:
            import wandb  # here, because it is slow to import and few need it

            try:
                self.wandb = wandb.init(project=wandb_project, name=run_dir.name, dir=run_dir, config=config)
            except wandb.Error as error:  # no account, no network
                raise UsageError(f"--use_wandb: {str(error).strip()}; with WANDB_MODE=offline in the "
                                 f"environment neither account nor network is needed") from None

    def log(self, metrics: dict) -> None:
        """Appends one object to metrics.jsonl, so that a killed run keeps it and others can watch it grow."""
        if not self.active:
            return
        self.unwritten += json.dumps(metrics) + "\n"
        size = None
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                size = file.tell()
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:
            if size is not None:
                os.truncate(self.path, size)  # a part of a line may be there
            self.say(f"warning: {self.path} can't be written ({error.strerror})", sys.stderr)
        if self.wandb:
            self.wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])

    def sync(self) -> None:
        """Puts on the disk what is logged: a power cut leaves no checkpoint that is ahead of its log."""
        if self.active:  # a log that is gone, or that can't be written, is no reason to save nothing
            with suppress(OSError), self.path.open("rb+") as file:
                os.fsync(file.fileno())

    def say(self, line: str, file=None) -> None:
        """Prints; where nobody reads it any more (`| head`), or its file is on a full disk, nothing."""
        if self.active:
            try:
                print(line, file=file, flush=True)
            except BrokenPipeError:  # from here on everything that is printed there goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())
            except OSError:
                pass

    def finish(self) -> None:
        """Draws loss.png and closes Weights & Biases."""
        if not self.active:
            return
        try:
            plot_loss(read_metrics(self.path), self.path.with_name("loss.png"))
        except OSError as error:
            self.say(f"warning: loss.png can't be written ({error.strerror})", sys.stderr)
        if self.wandb:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict]:
    """The objects of a metrics.jsonl; a line that a kill cut off, or that no run wrote, is left out."""
    if not path.exists():
        return []
    metrics = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("step"), int):
                metrics.append(found)
    return metrics


def plot_loss(metrics: list[dict], path: Path) -> None:
    """Draws training and validation loss against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: half a second that only the end needs
    from matplotlib.figure import Figure  # not pyplot, which takes another second

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(m["step"], m[key]) for m in metrics if key in m]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=path.parent.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def clock(seconds: float) -> str:
    """75 -> '1:15', 4000 -> '1:06:40'."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


class Stopwatch:
    """Seconds of training, carried over from before a resume."""

    def __init__(self, before: float = 0.0):
        self.start = time.perf_counter() - before

    def __call__(self) -> float:
        return time.perf_counter() - self.start
