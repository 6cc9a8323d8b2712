"""What a run reports: a line on the terminal, metrics.jsonl, loss.png and, if asked, Weights & Biases.
A reader may skip this file.
"""

import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from common.errors import UsageError
from common.files import write_whole


class Tracker:
    """Writes the log of one run. `metrics.jsonl` holds all of it, and the rest is drawn from that file.

    The main process alone logs; in the others every method returns at once. A line for which a full disk has
    no room is kept, and written with the next line: no log is worth a run.
    """

    def __init__(self, run_dir: Path, ranks, run, max_steps: int, use_wandb: bool = False,
                 wandb_project: str | None = None, config: dict | None = None):
        """ranks: trainer.distributed.Ranks. run: trainer.checkpoint.Progress, to which log lines write."""
        self.active, self.path, self.wandb = ranks.is_main, run_dir / "metrics.jsonl", None
        self.ranks, self.max_steps = ranks, max_steps
        # Losses are float32. Summed in float64 they give the same in any order, but MPS has no float64. After
        # a resume run.sums belongs to all processes together, so the main process alone carries it on.
        self.sum_dtype = torch.float32 if ranks.device.type == "mps" else torch.float64
        self.sums = {name: torch.as_tensor(value, dtype=self.sum_dtype, device=ranks.device) * ranks.is_main
                     for name, value in run.sums.items()}
        if not self.active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        # A resumed run forgets the lines after its checkpoint, since those steps are about to happen again.
        kept = [line for line in read_metrics(self.path) if line["step"] <= run.step] if run.step else []
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.unwritten = ""
        if use_wandb:
            import wandb  # here, because it is slow to import and few need it

            try:
                self.wandb = wandb.init(project=wandb_project or "seedling", name=run_dir.name, dir=run_dir,
                                        config=config)
            except wandb.Error as error:  # no account, no network
                hint = "with WANDB_MODE=offline in the environment neither account nor network is needed"
                raise UsageError(f"--use_wandb: {str(error).strip()}; {hint}") from None

    def log_start(self, run, data: str, dtype: str, parallel: str, resume: bool, validates: bool) -> None:
        """Says what is about to be done."""
        line = f"{data}, {dtype} on {self.ranks.device} x {self.ranks.world_size}"
        line += " (fsdp)" if parallel == "fsdp" else ""
        if run.step:
            line += f", resumed at step {run.step:,}"
        elif resume:
            line += ", from the start: no checkpoint to resume from"
        self.say(line if validates else f"{line}, no validation: no sample is set apart for it")

    # The steps since the last log line

    def add(self, means: dict[str, torch.Tensor]) -> None:
        """Takes the loss of one step, this process's part, and whatever else the loss function named.

        Nothing is read from the GPU here, so the CPU does not wait for it.
        """
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.to(self.sum_dtype)

    def sums_of_all(self) -> dict[str, float | list]:
        """What `add` was given since the last log line, added up over steps and processes.

        A matrix, such as the load of each expert in each layer, becomes a list of lists.
        """
        values = [torch.as_tensor(value).cpu().double() for value in self.sums.values()]
        numbers = [number for value in values for number in value.flatten()]
        totals = torch.tensor(self.ranks.sum(*numbers) if numbers else [], dtype=torch.float64)
        parts = totals.split([value.numel() for value in values])
        return {name: part.view_as(value).tolist()
                for name, part, value in zip(self.sums, parts, values, strict=True)}

    def log_step(self, run, learning_rate: float, grad_norm: float) -> None:
        """Reports the means of all steps since the last log line."""
        steps, seconds = run.step - run.logged_step, run.seconds - run.logged_seconds
        means = {name: (torch.tensor(total, dtype=torch.float64) / steps).tolist()
                 for name, total in self.sums_of_all().items()}
        self.sums = {}
        load = {"router_load": means.pop("router_load")} if "router_load" in means else {}
        means |= expert_use(**load) if load else {}
        speed = (run.tokens - run.logged_tokens) / max(1e-9, seconds)
        found = {"step": run.step, "max_steps": self.max_steps, **means, "learning_rate": learning_rate,
                 "grad_norm": grad_norm, "skipped": run.batch - run.step, "tokens": run.tokens,
                 "tokens_per_second": speed, "seconds": run.seconds, **load}
        run.metrics |= found
        self.log(found)
        named = " | ".join(f"{name.replace('_', ' ')} {mean if isinstance(mean, int) else f'{mean:.4f}'}"
                           for name, mean in means.items())
        left = clock(seconds / steps * (self.max_steps - run.step))
        self.say(f"{self.place(run)} | {named} | lr {learning_rate:.2e} | grad {grad_norm:.2f} | "
                 f"{speed:,.0f} tokens/s | {left} left")
        run.logged_step, run.logged_tokens, run.logged_seconds = run.step, run.tokens, run.seconds

    def log_evaluation(self, run, found: dict[str, float]) -> None:
        run.metrics |= found
        self.log({"step": run.step} | found)
        named = [f"{name.replace('eval_', 'validation ').replace('_', ' ')} {value:.4f}"
                 for name, value in found.items()]
        self.say(" | ".join([self.place(run), *named]))

    def place(self, run) -> str:
        return f"step {run.step:>{len(str(self.max_steps))}}/{self.max_steps}"

    # The files

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
                os.truncate(self.path, size)  # the disk may have had room for a part of the line
            self.say(f"warning: {self.path} can't be written ({error.strerror})", sys.stderr)
        if self.wandb:
            self.wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])

    def sync(self) -> None:
        """Waits until the log is on the disk, so that a power cut leaves no checkpoint newer than its log."""
        if self.active:  # a log that is missing, or cannot be written, is no reason to save nothing
            with suppress(OSError), self.path.open("rb+") as file:
                os.fsync(file.fileno())

    def say(self, line: str, file=None) -> None:
        """Prints a line; nothing where nobody reads it any more (`| head`), or where its disk is full."""
        with suppress(OSError):
            try:
                if self.active:
                    print(line, file=file, flush=True)
            except BrokenPipeError:  # everything printed there from now on is thrown away
                os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())

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
    """The objects of a metrics.jsonl, without lines that a kill cut off or that no run wrote."""
    if not path.exists():
        return []
    metrics = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):  # nested without end
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("step"), int):
                metrics.append(found)
    return metrics


def expert_use(router_load: list[list[float]]) -> dict[str, float]:
    """The least and the most used expert of all layers, where 1 is its fair share, and how many are dead.

    router_load: the share of each expert in the choices of each layer. An expert is dead if it has less than
    a hundredth of its fair share.
    """
    shares = [share * len(layer) for layer in router_load for share in layer]
    return {"least_used": min(shares), "most_used": max(shares),
            "dead_experts": sum(share < 0.01 for share in shares)}


def plot_loss(metrics: list[dict], path: Path) -> None:
    """Draws training and validation loss against the step."""
    # Imported here, because that takes half a second, and pyplot more; only the end of a run needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
    with warnings.catch_warnings():  # the font has no Chinese letters for the name of a run
        warnings.simplefilter("ignore")
        figure.savefig(path, dpi=130)


def clock(seconds: float) -> str:
    """75 -> '1:15', 4000 -> '1:06:40'."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
