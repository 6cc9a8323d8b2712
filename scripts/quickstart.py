"""From nothing to a chat: writes a small world, trains a model on it in five stages, scores every stage.

    python scripts/quickstart.py               # about 9 minutes on 2 CPU cores; uses a GPU if there is one
    python scripts/quickstart.py --minutes 20  # train longer
    python scripts/quickstart.py               # again: goes on where it was stopped, or shows the report
    python scripts/quickstart.py --fresh       # start over

Every step is a command that is printed first, so you can run and change any of them yourself. All results go
to out/quickstart: the world, the models, logs/, scores_*.json, loss.png, report.json and report.html.
"""

import argparse
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, run_script
from common.errors import INTERRUPTED, ModelError, RunError
from common.files import json_text, read_json, read_json_if_there, write_whole

DEFAULT_MINUTES = 8.9  # the steps and seconds below are for so many; --minutes scales the steps

# stage: its script, steps, seconds that they take on 2 CPU cores, and its flags
ROW_FLAGS = "--log_interval 20 --eval_interval 1000 --max_seq_len"  # ... and the rows of a step
CHAT_ROWS = f"{ROW_FLAGS} 256 --batch_size"  # a chat of about eight questions: the model remembers so many
MUON_FLAGS = "--optimizer muon --learning_rate"  # these two end with a flag whose value each stage gives
ADAPTER_FLAGS = f"--lora_rank 16 --lora_alpha 32 --learning_rate 3e-3 {CHAT_ROWS} 4"
# The questions are new, and nobody shows the answers. Old chats in each step keep what full_sft knew.
GRPO_FLAGS = ("--rewards answers length:0.2 --learning_rate 3e-4 --sft_weight 2 --lr_schedule wsd "
              "--group_size 4 --updates_per_rollout 2 --temperature 1.2 --max_new_tokens 48 --log_interval 4 "
              "--eval_interval 40 --max_seq_len 256 --batch_size 128")
STAGES = {
    "pretrain": ("train_pretrain.py", 300, 30,
                 f"--preset tiny {MUON_FLAGS} 1e-2 {ROW_FLAGS} 128 --batch_size 8 --lr_schedule cosine"),
    "full_sft": ("train_full_sft.py", 3850, 270, f"{MUON_FLAGS} 7e-3 {CHAT_ROWS} 8"),
    "grpo": ("train_grpo.py", 400, 97, GRPO_FLAGS),
    "lora_identity": ("train_lora.py", 420, 30, ADAPTER_FLAGS),
    "lora_clinic": ("train_lora.py", 800, 52, ADAPTER_FLAGS),
}
ADAPTERS = ("lora_identity", "lora_clinic")
PARENT = {"full_sft": "pretrain", "grpo": "full_sft", "lora_identity": "full_sft", "lora_clinic": "full_sft"}
DATA_OF_STAGE = {"full_sft": "sft"}  # the file of the world; the other stages have a file with their own name
# The test files that a stage answers
TESTS = {"pretrain": ["sft"], "full_sft": ["sft", "grpo", *ADAPTERS],
         "grpo": ["sft", "grpo"],
         "lora_identity": ["sft", "lora_identity"], "lora_clinic": ["sft", "lora_clinic"]}
# Questions of a test, where not all are asked: a model that never saw a chat answers none of them, and 30 of
# each family show whether an adapter forgets.
SCORED_AFTER = {"pretrain": 200, "lora_identity": 630, "lora_clinic": 630}
SCORED_PER_MINUTE = 600  # questions of a test, so that a trial of a few seconds does not score for minutes
SECONDS_TO_START = 5  # Python, torch and the tokenizer
SECONDS_TO_SCORE = 12  # one stage
SECONDS_TO_STOP = 60  # after Ctrl-C, for a stage to save its state
SHOWN_CHARACTERS = 160  # of an answer in the terminal


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--minutes", type=float, metavar="N",
                        help=f"time for everything on 2 CPU cores; scales the steps "
                             f"(default: {DEFAULT_MINUTES:g})")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run and start over")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "quickstart", metavar="DIR",
                        help="where everything goes")
    args = parser.parse_args()
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        parser.error(f"--minutes must be above 0 and below a million, not {args.minutes:g}")
    args.out_dir = args.out_dir.resolve()
    return args


# --- what there is to do ------------------------------------------------------------------------------------


@dataclass
class Task:
    """One command. It is finished when its exit code was 0 and `product` exists."""

    name: str
    stage: str  # what its time counts for
    command: list[str]  # without the interpreter; paths are absolute, so that it works from any folder
    product: Path
    seconds: float  # expected


def plan(out: Path, minutes: float) -> list[Task]:
    """All tasks in order, for a run of that many minutes."""
    world, scale = out / "world", minutes / DEFAULT_MINUTES
    command = [f"{ROOT / 'dataset' / 'synthetic.py'}", "--out_dir", f"{world}"]
    tasks = [Task("world", "pretrain", command, world / "grpo_test.jsonl", 9)]
    for stage, (_, _, seconds, _) in STAGES.items():
        tasks.append(Task(stage, stage, training_command(out, stage, scale), out / stage / "training.json",
                          SECONDS_TO_START + seconds * scale))
        tasks.append(Task(f"scores_{stage}", stage, scoring_command(out, stage, minutes),
                          out / f"scores_{stage}.json", SECONDS_TO_SCORE))
    return tasks


def training_command(out: Path, stage: str, scale: float) -> list[str]:
    script, steps, _, flags = STAGES[stage]
    data = out / "world" / DATA_OF_STAGE.get(stage, stage)
    command = [f"{ROOT / 'trainer' / script}", "--data_path", f"{data}.jsonl"]
    if stage not in ADAPTERS:
        command += ["--eval_data_path", f"{data}_eval.jsonl"]
    if stage == "grpo":
        command += ["--sft_data_path", f"{out / 'world' / 'sft.jsonl'}"]
    if stage in PARENT:
        command += ["--load_from", f"{out / PARENT[stage]}"]
    command += ["--out_dir", f"{out}", "--name", stage, "--max_steps", f"{max(2, round(steps * scale))}"]
    return command + flags.split()


def scoring_command(out: Path, stage: str, minutes: float) -> list[str]:
    model = [f"{out / stage}"]
    if stage in ADAPTERS:
        model = [f"{out / PARENT[stage]}", "--lora", f"{out / stage}"]
    files = [f"{out / 'world' / test}_test.jsonl" for test in TESTS[stage]] + [f"{out / 'samples.jsonl'}"]
    command = [f"{ROOT / 'eval_model.py'}", "--load_from", *model, "--data_path", *files]
    limit = min(max(1, round(SCORED_PER_MINUTE * minutes)), SCORED_AFTER.get(stage, sys.maxsize))
    if limit < SCORED_PER_MINUTE * DEFAULT_MINUTES:
        command += ["--limit", f"{limit}"]
    return [*command, "--temperature", "0", "--json", f"{out / f'scores_{stage}.json'}"]


def shown(command: list[str], folder: Path | None = None) -> str:
    """A command to read and to type in `folder` (None: where the person stands): short paths, quoted."""
    folder = str(folder or Path.cwd())

    def short(word: str) -> str:
        if not os.path.isabs(word):
            return word
        try:
            return min(os.path.relpath(word, folder), word, key=len)
        except ValueError:  # another drive of Windows
            return word

    words = [short(word) for word in command]
    return shlex.join(words) if os.name == "posix" else subprocess.list2cmdline(words)


def python() -> str:
    """How the person would call this interpreter: by its name alone, where the PATH leads to it."""
    name = Path(sys.executable).name
    found = shutil.which(name)
    return name if found and Path(found).absolute() == Path(sys.executable).absolute() else sys.executable


def write_samples(out: Path) -> None:
    """Three prompts from the test files that every stage answers: a story, who are you, an ill plant."""
    prompts = []
    for file, word in (("sft", "story"), ("lora_identity", "name"), ("lora_clinic", "")):
        lines = (out / "world" / f"{file}_test.jsonl").read_text(encoding="utf-8").splitlines()
        chats = [json.loads(line)["conversations"] for line in lines]
        asked = [turns[0]["content"] for turns in chats if len(turns) == 2]
        matching = [text for text in asked if word in text and text not in prompts]
        prompts.append((matching or asked)[0])
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
    write_whole(out / "samples.jsonl", "".join(lines))


# --- running it ---------------------------------------------------------------------------------------------


class State:
    """state.json: the commands that were started and those that finished, and how long each took."""

    def __init__(self, out: Path):
        self.path = out / "state.json"
        nothing = {"minutes": None, "started": {}, "finished": [], "seconds": {}}
        try:
            self.data = read_json_if_there(self.path)
        except (OSError, ModelError):  # a damaged file
            self.data = {}
        if self.data.keys() != nothing.keys():
            self.data = nothing

    def save(self) -> None:
        write_whole(self.path, json_text(self.data))

    def knows(self, task: Task) -> bool:
        return self.data["started"].get(task.name) == shown(task.command, ROOT)

    def finished(self, task: Task) -> bool:
        return self.knows(task) and task.name in self.data["finished"] and task.product.exists()

    def forget(self, tasks: list[Task]) -> None:
        """Deletes what the tasks made."""
        for task in tasks:
            self.data["started"].pop(task.name, None)
            self.data["seconds"].pop(task.name, None)
            self.data["finished"] = [name for name in self.data["finished"] if name != task.name]
            if task.product.suffix == ".json" and task.product.parent == self.path.parent:
                task.product.unlink(missing_ok=True)
            else:
                shutil.rmtree(task.product.parent, ignore_errors=True)


class Progress:
    """One bar for the whole run; where the output is no terminal, a line every ten seconds."""

    def __init__(self, tasks: list[Task], state: State):
        self.tasks, self.state, self.terminal = tasks, state, sys.stdout.isatty()
        self.shown_at = 0.0

    def say(self, line: str) -> None:
        print(("\r\033[K" if self.terminal else "") + line, flush=True)

    def show(self, task: Task, spent: float, metrics: dict) -> None:
        """spent: seconds of the task so far; metrics: the last line of its metrics.jsonl, if it trains."""
        if time.monotonic() - self.shown_at < (0.5 if self.terminal else 10):
            return
        self.shown_at = time.monotonic()
        now = self.tasks.index(task)
        before = sum(self.state.data["seconds"].get(t.name, 0) for t in self.tasks[:now])
        expected = sum(t.seconds for t in self.tasks[:now]) + task.seconds
        left, detail = max(task.seconds - spent, 1), "scoring" if "scores" in task.name else "starting"
        if metrics:
            left = (metrics["max_steps"] - metrics["step"]) * metrics["seconds"] / metrics["step"] + 1
            detail = f"step {metrics['step']:,}/{metrics['max_steps']:,}"
            detail += f" | {metrics['tokens_per_second']:,.0f} tokens/s"
        # A machine that took twice as long as expected so far will take twice as long for the rest.
        slowness = (before + spent + left) / expected
        total_left = left + slowness * sum(t.seconds for t in self.tasks[now + 1:])
        share = (before + spent) / (before + spent + total_left)
        clock = f"{int(total_left) // 60}:{int(total_left) % 60:02} left"
        line = f"{share:4.0%} | {task.stage} {detail} | {clock}"
        if self.terminal:
            width = max(0, min(30, shutil.get_terminal_size().columns - len(line) - 4))
            bar = "#" * round(share * width)
            print(f"\r[{bar:.<{width}}] {line}\033[K", end="", flush=True)
        else:
            print(line, flush=True)


def last_metrics(path: Path) -> dict:
    """The newest training line of a metrics.jsonl that grows; {} where there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
            if "max_steps" in metrics:
                return metrics
        except (ValueError, TypeError):
            pass  # a line that is being written, or the end of one
    return {}


def run(task: Task, state: State, progress: Progress, out: Path) -> None:
    """Runs a task's command and waits. Raises RunError when it fails, KeyboardInterrupt when stopped."""
    resume = state.knows(task) and task.name in STAGES
    command = [*task.command, "--resume"] if resume else task.command
    progress.say(f"\n$ {shown([python(), *command])}")
    state.data["started"][task.name] = shown(task.command, ROOT)
    state.save()
    began, before = time.monotonic(), state.data["seconds"].get(task.name, 0.0)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8",
                                "SEEDLING_QUICKSTART": "1"}  # for `end_with_parent`
    # The output goes through a pipe to this process: on every system a child whose parent was killed ends
    # when it prints its next line. The child has a session of its own, so that Ctrl-C does not reach it
    # twice. (On Windows the console sends Ctrl-C to the child, and we do not.)
    process = subprocess.Popen(
        [sys.executable, *command], env=environment, start_new_session=os.name == "posix",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    last_lines: deque[str] = deque(maxlen=15)
    log = out / "logs" / f"{task.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)

    def copy_log():
        with log.open("a" if resume else "w", encoding="utf-8", newline="\n") as file:
            for raw in process.stdout:
                last_lines.append(raw.decode("utf-8", "replace").rstrip("\r\n"))
                file.write(last_lines[-1] + "\n")
                file.flush()

    copier = threading.Thread(target=copy_log, daemon=True)
    copier.start()
    try:
        while process.poll() is None:
            metrics = last_metrics(out / task.name / "metrics.jsonl") if task.name in STAGES else {}
            progress.show(task, time.monotonic() - began + before, metrics)
            time.sleep(0.1)
    except KeyboardInterrupt:
        progress.say(f"stopping; {task.name} saves its state (Ctrl-C again: at once)")
        stop(process)
        raise
    finally:
        state.data["seconds"][task.name] = before + time.monotonic() - began
        state.save()
    copier.join()
    if process.returncode or not task.product.exists():
        progress.say("")
        print("\n".join(last_lines), file=sys.stderr)
        raise RunError(f"{task.name} failed (exit code {process.returncode}): {shown([str(log)])}")
    state.data["finished"].append(task.name)
    state.save()


def stop(process: subprocess.Popen) -> None:
    """Asks the child to save and end, and waits for it; a second Ctrl-C ends it at once."""
    try:
        if os.name == "posix":
            process.send_signal(signal.SIGINT)
        process.wait(timeout=SECONDS_TO_STOP)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        process.kill()
        process.wait()


# --- the report ---------------------------------------------------------------------------------------------


def collect(out: Path, state: State) -> tuple[dict, dict]:
    """The content of report.json; and, for each family of questions that an adapter learns, the share of
    right answers that full_sft had before."""
    import pandas as pd  # here, because half a second is long for --help

    from trainer.runs import count_parameters

    seconds, scores, samples, before = dict.fromkeys(STAGES, 0.0), {}, {}, {}
    for task in plan(out, state.data["minutes"]):
        seconds[task.stage] = round(seconds[task.stage] + state.data["seconds"].get(task.name, 0), 1)
    for stage in STAGES:
        answers = pd.DataFrame(read_json(out / f"scores_{stage}.json")["answers"])
        answers["test"] = answers["file"].map(lambda file: Path(file).stem)
        for prompt, answer in answers.loc[answers["test"] == "samples", ["prompt", "answer"]].values.tolist():
            samples.setdefault(prompt, {})[stage] = answer
        scored = answers.dropna(subset="ok").astype({"ok": float})
        is_own = scored["test"].isin(["sft_test", f"{stage}_test"])
        own, others = scored[is_own], scored[~is_own]
        scores[stage] = own.groupby("family", sort=False)["ok"].mean().to_dict()
        scores[stage]["all"] = float(own["ok"].mean())
        before |= others.groupby("family", sort=False)["ok"].mean().to_dict()
    parameters = count_parameters(out / "full_sft" / "model.safetensors")
    report = {"seconds": seconds, "parameters": parameters, "scores": scores,
              "samples": [{"prompt": prompt, "answers": answers} for prompt, answers in samples.items()]}
    return report, before


def shares_of(report: dict, before: dict):
    """A DataFrame, families down and stages across. For what an adapter learns, full_sft has the share of
    right answers before it."""
    import pandas as pd

    found = pd.DataFrame(report["scores"])
    found["full_sft"] = found["full_sft"].fillna(pd.Series(before))
    return found.loc[[*found.index.drop("all"), "all"]]


def draw_losses(out: Path) -> None:
    """loss.png: the training and validation loss of all stages, side by side; of grpo the reward."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, because it takes half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, stage in zip(figure.subplots(1, len(STAGES)), STAGES, strict=True):
        lines = (out / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        shown = "reward" if stage == "grpo" else "loss"
        for key, style, label in ((shown, "-", "training"), (f"eval_{shown}", "o", "validation")):
            points = [(m["step"], m[key]) for m in metrics if key in m]
            axes.plot([step for step, _ in points], [loss for _, loss in points], style, label=label,
                      linewidth=1.3, markersize=4)
        axes.set(title=f"{stage}: reward" if shown == "reward" else stage, xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss (nats per token)")
    figure.axes[0].legend(frameon=False)
    figure.savefig(out / "loss.png", dpi=140)


def write_html(out: Path, report: dict, before: dict, tasks: list[Task]) -> None:
    """report.html: one file that needs nothing beside it, made of the parts of scripts/report.py's page."""
    from trainer.report_page import Cell, curves, findings, page, table, text
    from trainer.runs import read_run

    scores = []
    for family, row in shares_of(report, before).iterrows():
        cells = "".join('<td class="score"></td>' if math.isnan(share) else
                        f'<td class="score" style="--share: {share:.2f}">{share:.2f}</td>' for share in row)
        scores.append([family, Cell(cells)])
    samples = "".join(f"<h3>{text(sample['prompt'])}</h3>"
                      + table([[stage, said or "(nothing)"] for stage, said in sample["answers"].items()])
                      for sample in report["samples"])
    trained = ""
    for stage, seconds in report["seconds"].items():
        run = read_run(out / stage)
        names = ("reward" if run.learns_from_rewards else "loss", "grad_norm", "tokens_per_second")
        trained += f"<h3>{stage}, {seconds:.0f} s with its scoring</h3>{curves(run, *names)}{findings(run)}"
    commands = "\n".join(shown(["python", *task.command], ROOT) for task in tasks)
    lead = (f"{report['parameters']:,} parameters, trained from nothing and scored in "
            f"{sum(report['seconds'].values()) / 60:.1f} minutes.")
    write_whole(out / "report.html", page(
        "A model that did not exist before", lead,
        f"<h2>Talk to it</h2><pre>{text(chat_command(out, ROOT))}</pre>",
        f"<h2>Held-out questions answered exactly right</h2>{table(scores, ['family', *STAGES])}",
        '<p class="lead">1 means all of them. The questions that an adapter learns are also asked before it '
        "is trained: these shares stand under full_sft.</p>",
        f"<h2>The same question after every stage</h2>{samples}",
        f"<h2>How each stage went, and its symptoms</h2>{trained}",
        f"<h2>Every step, as commands</h2><pre>{text(commands)}</pre>"))


def chat_command(out: Path, folder: Path | None = None) -> str:
    model = ["--load_from", f"{out / 'full_sft'}", "--lora", *(f"{out / name}" for name in ADAPTERS)]
    return shown([python(), f"{ROOT / 'eval_model.py'}", *model], folder)


def serve_command(out: Path) -> str:
    models = [f"{out / name}" for name in ("full_sft", "pretrain")]
    adapters = [f"{out / name}" for name in ADAPTERS]
    script = f"{ROOT / 'scripts' / 'serve_openai_api.py'}"
    return shown([python(), script, "--load_from", *models, "--lora", *adapters])


def print_report(out: Path, report: dict, before: dict) -> None:
    shares = shares_of(report, before)
    shares.columns.name = "right answers"
    print("\n" + shares.to_string(float_format="{:.2f}".format, na_rep="", col_space=14))
    for sample in report["samples"]:
        print(f"\n> {sample['prompt']}")
        for stage, text in sample["answers"].items():
            text = " ".join(text.split())
            more = " ..." if len(text) > SHOWN_CHARACTERS else ""
            print(f"  {stage:<14} {text[:SHOWN_CHARACTERS]}{more}")
    minutes = sum(report["seconds"].values()) / 60
    print(f"\n{report['parameters']:,} parameters, {minutes:.1f} minutes of training and scoring")
    print(f"loss curves   {shown([str(out / 'loss.png')])}")
    print(f"report        {shown([str(out / 'report.html')])}")
    print(f"\nTalk to it, in the terminal:\n\n    {chat_command(out)}\n")
    requirements = shown([python(), "-m", "pip", "install", "-r", f"{ROOT / 'requirements-serve.txt'}"])
    print(f"or in a browser:\n\n    {requirements}\n    {serve_command(out)}\n")


# --- the whole run ------------------------------------------------------------------------------------------


def begin_or_go_on(args) -> tuple[list[Task], State]:
    """The tasks, and how far an earlier run came. Raises RunError for a folder that we must not change."""
    out, state = args.out_dir, State(args.out_dir)
    folder, recorded = shown([str(out)]), state.data["minutes"]
    if out.exists() and not out.is_dir():
        raise RunError(f"--out_dir {folder} is no folder")
    if recorded is None and out.exists() and any(out.iterdir()):
        raise RunError(f"{folder} holds other things; name a new folder with --out_dir")
    if recorded is not None and args.minutes not in (None, recorded) and not args.fresh:
        raise RunError(f"{folder} holds a run of --minutes {recorded:g}: leave --minutes out to go on with "
                       "it, or add --fresh to start over")
    if args.fresh and recorded is not None:
        print(f"Starting over: the earlier run in {folder} is deleted.")
        state.forget(plan(out, recorded))
    minutes = args.minutes or DEFAULT_MINUTES
    if args.minutes is None and recorded is not None and not args.fresh:
        minutes = recorded
    state.data["minutes"] = minutes
    tasks = plan(out, minutes)
    if any(task.name in state.data["started"] and not state.knows(task) for task in tasks):
        raise RunError(f"{folder} holds a run of other commands (of another version, or of another folder): "
                       "add --fresh to start over, or name a new one with --out_dir")
    return tasks, state


def run_all(tasks: list[Task], state: State, out: Path) -> None:
    """Runs the tasks that are not finished, and shows the report."""
    todo = [task for task in tasks if not state.finished(task)]
    if not todo:
        print("The quickstart is finished; --fresh starts over.")
    elif len(todo) < len(tasks):
        print(f"Going on with {todo[0].name}; {len(tasks) - len(todo)} of {len(tasks)} steps are done.")
    else:
        print(f"Training a small language model from nothing: about {state.data['minutes']:g} minutes on 2 "
              "CPU cores.")
    state.save()
    progress = Progress(tasks, state)
    for number, task in enumerate(tasks):
        if state.finished(task):
            continue
        if not task.name.startswith("scores"):
            # Everything that was made from an older result of this task goes. A task that is resumed keeps
            # its own.
            state.forget(tasks[number + 1:] if state.knows(task) else tasks[number:])
        if task.name == "pretrain":
            write_samples(out)
        run(task, state, progress, out)
    progress.say("")
    report, before = collect(out, state)
    if todo or not (out / "report.html").exists():
        draw_losses(out)
        write_whole(out / "report.json", json_text(report))
        write_html(out, report, before, tasks)
    print_report(out, report, before)


def main(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("torch") is None:
        raise RunError("this Python has no torch: bash scripts/quickstart.sh makes one that has, or "
                       "pip install -r requirements.txt")
    try:
        tasks, state = begin_or_go_on(args)
        run_all(tasks, state, args.out_dir)
    except KeyboardInterrupt:  # Ctrl-C, or SIGTERM
        again = [word for word in sys.argv if word != "--fresh"]
        print(f"\nStopped. To go on: {shown([python(), *again])}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    run_script(main, parse_args())
