"""What happened in a training run: one HTML page with curves, cost, samples, and what to try next.

    python scripts/report.py out/full_sft                   # writes out/full_sft/report.html
    python scripts/report.py out/full_sft --no_samples      # from the log alone: no model is loaded
    python scripts/report.py out/my_sft --data_path old.jsonl --out page.html    # also the loss on old.jsonl

A run that is stopped, or killed, has a page too; its samples are those of its checkpoints. The page shows
whether answers go round in circles, whether the model learnt or memorised (the loss on its training file
beside that on held-out records), what was forgotten (with --retain_data_path), and eleven known symptoms:
trainer/symptoms.py has them with all their thresholds.
"""

import json
import sys
import tempfile
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from io import StringIO
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, run_script
from common.errors import DataError, ModelError, RunError, UsageError

MAX_RECORDS = 2000  # of a file are read: a page about a large run should not take as long as the run
RECORDS_OF_LOSS = 200  # of these, evenly spread, the loss is measured
PROMPTS, SHOWN_PROMPTS = 16, 6  # answered, and shown
MAX_NEW_TOKENS = 96
LONGEST_UNIT, UNITS = 32, 4  # an answer loops if it ends with a phrase of up to 32 tokens, 4 times
MISTAKES = (DataError, ModelError, RunError, UsageError, OSError)


@dataclass
class Asked:
    """A model of the run, and what became of it. answers: (tokens, text) to each prompt; losses: by file."""

    name: str  # before, step 500, after
    path: Path
    adapters: list[Path] = field(default_factory=list)
    rope_scaling: str | None = None
    answers: list[tuple[list[int], str]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)  # whether each answer came to its own end
    losses: dict[str, float] = field(default_factory=dict)


def main(args):
    # Imported here and not above, so that --help and a mistyped flag answer at once.
    from common.files import write_whole
    from trainer import report_page
    from trainer.runs import read_run
    from trainer.symptoms import find

    run = read_run(args.run)
    for path in args.data_path:
        if not is_file(path):
            raise UsageError(f"--data_path {path}: there is no such file")
    sections = [symptoms_section(run), "<h2>Curves</h2>" + report_page.curves(run),
                report_page.router_section(run), cost_section(run)]
    if not args.no_samples:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            sections += model_sections(run, args.data_path, Path(folder))
    sections.append(forgotten_section(run))
    state = "not finished" if run.is_unfinished else "finished"
    lead = f"stage {run.stage}, {run.last_step:,} step{'s' * (run.last_step != 1)}, {state}"
    out = args.out or args.run / "report.html"
    write_whole(out, report_page.page(args.run.resolve().name, report_page.text(lead), *sections))
    for symptom in find(run):
        print(f"{symptom.name}: {symptom.seen} {symptom.try_next}")
    print(f"report  {out}")


# --- what the log and training.json say ---------------------------------------------------------------------


def symptoms_section(run) -> str:
    """What is named, and behind it the table of thresholds."""
    from trainer.report_page import findings, table, text
    from trainer.symptoms import CHECKS, THRESHOLDS

    checked = table([[name.replace("_", " "), f"{threshold.value:g}", threshold.reason]
                     for name, threshold in THRESHOLDS.items()], ["threshold", "value", "of what, and why"])
    notes = "".join(f"<p>{text(note)}</p>" for note in run.notes)
    return (f"<h2>What shows, and what to try next</h2>{notes}{findings(run)}"
            f"<details><summary>Looked for: {text(', '.join(CHECKS))}</summary>{checked}</details>")


def cost_section(run) -> str:
    """Steps, time, tokens, parameters, and the machine as far as the run tells."""
    from trainer.report_page import table, text

    trained, everything = trained_of_all(run)
    last = {name: run.values(name)[-1] for name in ("tokens", "seconds", "skipped") if run.values(name)}
    seconds, tokens = last.get("seconds"), last.get("tokens")
    rows = [["steps", f"{run.last_step:,} of {run.max_steps:,}"
             + (f", and {last['skipped']:,.0f} batches skipped" if last.get("skipped") else "")]]
    if seconds is not None:
        rows.append(["time", time_of(seconds)])
    if tokens is not None:
        speed = f", {tokens / seconds:,.0f} in a second" if seconds else ""
        rows.append(["tokens", f"{tokens:,.0f}{speed}"])
    if isinstance(run.training.get("tokens_seen"), int):
        rows.append(["tokens in its life", f"{run.training['tokens_seen']:,}, stages before included"])
    if trained is not None:
        of_all = f" of {everything:,} ({trained / max(1, everything):.2%})" if everything else ""
        rows.append(["parameters trained", f"{trained:,}{of_all}"])
    versions = run.training.get("versions")
    versions = [f"{k} {v}" for k, v in versions.items()] if isinstance(versions, dict) else []
    device = [f"--{name} {run.arguments[name]}" for name in ("device", "dtype", "parallel")
              if name in run.arguments]
    rows.append(["machine", ", ".join([*device, *versions, "more is not recorded"])])
    for name in ("finished", "git", "parent"):
        if run.training.get(name):
            rows.append([name, run.training[name]])
    content = run.training.get("content")
    rows += [[name, value] for name, value in content.items()] if isinstance(content, dict) else []
    flags = "".join(f"--{name} {value}\n" for name, value in run.arguments.items() if value is not None)
    more = f"<details><summary>All flags</summary><pre>{text(flags)}</pre></details>" if flags else ""
    return f"<h2>What it cost</h2>{table(rows)}{more}"


def time_of(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 120 else f"{seconds / 60:,.1f} minutes"


def forgotten_section(run) -> str:
    """Loss and exact answers on new and old data, before and after (--retain_data_path); "" without them."""
    from trainer.report_page import table

    retention, rows = run.training.get("retention"), []
    try:
        for name, before in retention["before"].items():
            after = retention["after"][name]
            exact = ["" if side["exact"] is None else f"{side['exact']:.1%}" for side in (before, after)]
            rows.append([f"{name} data", f"{before['samples']:,}", f"{before['loss']:.4f}",
                         f"{after['loss']:.4f}", *exact])
    except (TypeError, KeyError, AttributeError, ValueError):
        return "" if retention is None else "<p>The retention in training.json can't be read.</p>"
    head = ["", "samples", "loss before", "after", "exact answers before", "after"]
    return f"<h2>What was forgotten</h2>{table(rows, head)}"


def trained_of_all(run) -> tuple[int | None, int | None]:
    """How many parameters trained, and how many the model has with them; None where nobody knows."""
    from trainer.runs import count_parameters

    adapter, parent = run.folder / "adapter_model.safetensors", run.parent
    with suppress(ModelError):
        if not adapter.is_file():
            found = count_parameters(run.folder / "model.safetensors")
            return found, found
        trained = count_parameters(adapter)
        with suppress(ModelError):
            return trained, trained + count_parameters((parent or run.folder) / "model.safetensors")
        return trained, None
    return None, None


# --- the models of the run, and what they are asked ---------------------------------------------------------


def model_sections(run, given: list[Path], folder: Path) -> list[str]:
    """Samples, repetition, and learnt or memorised; or a sentence about why there are none."""
    notes: list[str] = []
    files = files_of(run, given)
    records = {}
    for role, path in files:
        try:
            records[f"{path.name} ({role})"] = read_some(path)
        except MISTAKES as error:
            notes.append(f"{path.name} ({role}): {error}")
    prompts = prompts_of(next(iter(records.values()), []))
    asked = models_of(run, folder, notes)
    answered = []
    for model in asked:
        try:
            ask(model, prompts, records, folder, notes)
            answered.append(model)
        except MISTAKES as error:
            notes.append(f"{model.name}: {error}")
    return [samples_section(prompts, answered, notes), repetition_section(answered),
            memory_section(run, answered)]


def files_of(run, given: list[Path]) -> list[tuple[str, Path]]:
    """(role, file), held-out records first. A file given takes the role of one of its name that is gone."""
    found, names = [], {path.name: path for path in given}
    world = run.flag("world", str) or ""
    for role, flag, own in (("held out", "eval_data_path", f"{world}_eval"),
                            ("training", "data_path", world)):
        paths = run.arguments.get(flag)
        if not paths and not run.arguments.get("data_path") and world.isidentifier():
            paths = [str(ROOT / "out" / "world" / f"{own}.jsonl")]  # the built-in data
        for path in paths if isinstance(paths, list) else []:
            path = Path(str(path))
            path = path if is_file(path) else names.get(path.name, path)
            if is_file(path):
                found.append((role, path))
    return found + [("given", path) for path in given if path not in [place for _, place in found]]


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds NUL
        return False


def read_some(path: Path) -> list[dict]:
    """Records of a file, evenly spread over its first MAX_RECORDS. Raises DataError where it holds none."""
    from dataset.records import Report, read_records
    from inference.scoring import spread

    found = [record for _, _, record in islice(read_records([path], report=Report(shown=0)), MAX_RECORDS)]
    if not found:
        raise DataError("holds no record that can be read")
    return [found[i] for i in spread(len(found), RECORDS_OF_LOSS)]


def prompts_of(records: list[dict]) -> list[tuple[list[dict], str]]:
    """(messages, what the file answers) of some records; of a plain text its beginning and the rest."""
    from dataset.chat import assistant_text
    from inference.scoring import parse_question, spread

    found = []
    for record in records:
        try:
            question = parse_question(record, Path("records"))
        except (DataError, RecursionError):
            continue
        messages, wanted = question.messages, assistant_text(question.last_turn) if question.last_turn else ""
        if question.kind == "text" and isinstance(record.get("text"), str):
            text = record["text"]
            cut = text.rfind(" ", 0, 40) if " " in text[:40] else min(12, len(text) // 2)
            messages, wanted = [{"role": "user", "content": text[:cut]}], text[cut:cut + 200]
        if messages and not question.tools:
            found.append((messages, wanted))
    found = found or [([{"role": "user", "content": text}], "") for text in ("Who are you?", "你是谁？")]
    return [found[i] for i in spread(len(found), PROMPTS)]


def models_of(run, folder: Path, notes: list[str]) -> list[Asked]:
    """The model before the run, those of its checkpoints, and the one after it."""
    from model.lora_files import base_of

    parent, found = run.parent, []
    if (run.folder / "adapter_config.json").is_file():
        try:
            parent = base_of(run.folder) or parent
        except MISTAKES as error:
            notes.append(str(error))
    if parent:
        found.append(Asked("before", parent))
    for checkpoint in run.checkpoints:
        name = f"step {int(checkpoint.name[5:]):,}"
        try:
            found.append(Asked(name, *unpack(run, checkpoint, parent, folder / checkpoint.name)))
        except MISTAKES as error:
            notes.append(f"{name}: {error}")
    if not run.is_unfinished:
        if not run.is_adapter:
            found.append(Asked("after", run.folder))
        elif parent:
            found.append(Asked("after", parent, [run.folder]))
        else:
            notes.append("the base model of the adapter is gone")
    for asked in found:
        if asked.adapters:  # they know the base under the scaling with which they were trained
            asked.rope_scaling = run.arguments.get("rope_scaling")
    return found


def unpack(run, checkpoint: Path, parent: Path | None, folder: Path) -> tuple[Path, list[Path]]:
    """Saves the weights of a checkpoint as a model folder, or as an adapter. Returns (model, adapters)."""
    from argparse import Namespace

    import torch

    from common.files import explained
    from dataset.chat import ensure_template
    from model.lora import apply_lora, save_lora
    from model.rope_scaling import scale
    from model.tokenizer_files import OWN_TOKENIZER, load_tokenizer, vocabulary_size
    from model.transformer import CausalLM, preset
    from model.weights import load_model, save_model
    from trainer.args import EXPERT_FLAGS, SHAPE, new_shape

    with explained(checkpoint):
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True, mmap=True)
        weights, flags = state["parameters"], run.arguments
        if not weights or flags.get("lora_init") == "pissa":
            raise ModelError("its weights are in several parts, or changed beside the adapter: no samples")
        if flags.get("load_from") and not parent:
            raise ModelError("the model that the run began with is gone")
        tokenizer = load_tokenizer(flags.get("tokenizer") or parent or OWN_TOKENIZER)
        if parent:
            model = load_model(parent, rope_scaling=flags.get("rope_scaling"))
        else:
            asked = Namespace(**dict.fromkeys([*SHAPE, *EXPERT_FLAGS]) | flags)
            shape = new_shape(asked, preset(flags["preset"]), vocabulary_size(tokenizer))
            model = CausalLM(scale(shape, flags.get("rope_scaling")))
        if flags.get("lora_rank"):
            apply_lora(model, flags["lora_rank"], flags["lora_alpha"], 0.0, flags["target_modules"],
                       flags["lora_rslora"])
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)
        if flags.get("lora_rank"):
            save_lora(model, folder, base=parent)
            return parent, [folder]
        if run.stage != "pretrain":
            ensure_template(tokenizer)
        save_model(model, folder, tokenizer, training={"stage": run.stage})
        return folder, []


def ask(asked: Asked, prompts: list, records: dict[str, list[dict]], folder: Path, notes: list[str]) -> None:
    """Lets one model answer the prompts greedily, and measures its loss on the records of each file."""
    import torch

    from inference.chat_model import ChatModel, Sampling
    from inference.scoring import forced_loss, parse_question

    adapters = [str(path) for path in asked.adapters]
    model = ChatModel(asked.path, adapters=adapters, rope_scaling=asked.rope_scaling)
    asked_ids = [model.encode(messages) for messages, _ in prompts]
    fits = [len(ids) + MAX_NEW_TOKENS <= model.max_positions for ids in asked_ids]
    with torch.inference_mode():
        short = [ids for ids, is_short in zip(asked_ids, fits, strict=True) if is_short]
        steps = model.generate(short, Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS)) if short else []
        rows = iter(torch.stack(list(steps), dim=1).tolist() if short else [])
    for is_short in fits:
        row = next(rows) if is_short else model.stop_ids[:1]  # a prompt that is too long is not answered
        end = next((place for place, token in enumerate(row) if token in model.stop_ids), len(row))
        asked.answers.append((row[:end], model.decode(row[:end]) if is_short else "(the prompt is too long)"))
        asked.ended.append(end < len(row))
    for name, some in records.items():
        try:
            kind = parse_question(some[0], Path(name)).kind
            if kind in ("chat", "text"):
                file = folder / "records.jsonl"
                file.write_text("".join(json.dumps(record) + "\n" for record in some), encoding="utf-8")
                with redirect_stderr(StringIO()):  # training has warned of these records already
                    asked.losses[name] = forced_loss(model, file, kind, None, 8)[0]
        except MISTAKES as error:
            notes.append(f"no loss on {name}: {str(error).replace(str(folder), '')}")


# --- what the models answered -------------------------------------------------------------------------------


def samples_section(prompts: list, answered: list[Asked], notes: list[str]) -> str:
    from trainer.report_page import table, text

    said = "".join(f"<p>{text(note)}</p>" for note in dict.fromkeys(notes))
    for place, (messages, wanted) in enumerate(prompts[:SHOWN_PROMPTS] if answered else []):
        said += f"<h3>{text(messages[-1]['content'])}</h3>"
        rows = [[model.name, model.answers[place][1] or "(nothing)"] for model in answered]
        said += table([*rows, ["the file", wanted]] if wanted else rows)
    return f"<h2>Samples, always the likeliest token</h2>{said or '<p>No model is there to answer.</p>'}"


def repetition_section(answered: list[Asked]) -> str:
    from trainer.report_page import table

    rows = []
    for model in answered:
        ids = [tokens for tokens, _ in model.answers]
        looping = sum(map(loops, ids)) / len(ids)
        rows.append([model.name, len(ids), f"{sum(map(len, ids)) / len(ids):.0f}",
                     f"{1 - sum(model.ended) / len(ids):.0%}", f"{looping:.0%}",
                     *(f"{distinct(ids, n):.2f}" for n in (1, 2, 3, 4))])
    head = ["", "answers", "tokens of one", "never end", "go round in circles",
            *(f"different {n}-grams" for n in (1, 2, 3, 4))]
    said = (f"An answer goes round in circles if it ends with {UNITS} times the same phrase of up to "
            f"{LONGEST_UNIT} tokens. After {MAX_NEW_TOKENS} tokens it is cut off. Different n-grams: 1 means "
            "that no sequence of n tokens stands in the answers twice.")
    return f"<h2>Does it repeat itself?</h2>{table(rows, head)}<p>{said}</p>" if rows else ""


def loops(ids: list[int]) -> bool:
    """Whether an answer ends with one phrase UNITS times: [.., 7, 8, 9, 7, 8, 9, 7, 8, 9, 7, 8, 9].

    A phrase of one or two tokens must come more often, since "ha ha ha ha" is no fault: phrase and
    repetitions have 12 tokens at least.
    """
    for size in range(1, LONGEST_UNIT + 1):
        length = max((UNITS - 1) * size, 12 - size)  # that repeat what stands `size` before them
        if len(ids) >= length + size and ids[-length:] == ids[-length - size:-size]:
            return True
    return False


def distinct(answers: list[list[int]], n: int) -> float:
    """The share of different n-grams among all n-grams (Li et al. 2016, arXiv:1510.03055); 1 without any."""
    grams = [tuple(ids[i:i + n]) for ids in answers for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def memory_section(run, answered: list[Asked]) -> str:
    """The loss of each model on each file, and what the difference says about memory."""
    from trainer.report_page import table

    names = list(dict.fromkeys(name for model in answered for name in model.losses))
    losses = {name: [model.losses.get(name) for model in answered] for name in names}
    logged = run.values("eval_loss")
    if logged and answered and not run.is_unfinished and not any("(held out)" in name for name in names):
        losses["held out (the last value of the log)"] = [None] * (len(answered) - 1) + [logged[-1]]
    rows = [[name, *("" if loss is None else f"{loss:.4f}" for loss in found)]
            for name, found in losses.items()]
    body = table(rows, ["nats per token", *(model.name for model in answered)]) if rows else ""
    return f"<h2>Learnt, or memorised?</h2>{body}<p>{verdict(run, losses)}</p>"


def verdict(run, losses: dict[str, list[float | None]]) -> str:
    """A sentence or two. losses: of each model on each file, the model before the run first."""
    if run.learns_from_rewards:
        said = "A run from rewards sees no answers of its file, so no loss shows what it memorised."
        own, held_out = run.values("reward"), run.values("eval_reward")
        return said if not own or not held_out else (
            f"{said} The last reward is {own[-1]:.3g} on its own prompts, {held_out[-1]:.3g} on others.")
    seen, held = (next((found for name, found in losses.items() if role in name), [None])
                  for role in ("(training)", "held out"))
    if seen[-1] is None or held[-1] is None:
        return "There is no loss on both its training file and held-out records: --data_path names files."
    # Held-out records may be harder for every model. The model before the run shows by how much.
    harder = max(1.0, held[0] / seen[0]) if len(seen) > 1 and seen[0] and held[0] else 1.0
    both = f"its training file ({seen[-1]:.3f}) and held-out records ({held[-1]:.3f})"
    if len(seen) > 1 and seen[0] and seen[-1] > 0.98 * seen[0]:
        return (f"The loss on its training file was {seen[0]:.3f} before the run and is {seen[-1]:.3f} now: "
                "it learnt next to nothing of that file.")
    if harder > 1.1:
        both += f", which the model before the run found harder, too ({seen[0]:.3f} and {held[0]:.3f}),"
    if held[-1] <= seen[-1] * harder * 1.1 + 0.02:
        return f"It knows {both} about equally well: what it learnt holds for records that it never saw."
    if held[-1] <= seen[-1] * harder * 1.5 + 0.1:
        return f"Between {both} is some difference: it knows some of its examples by heart."
    return f"Between {both} is a large difference: it memorised many of its examples."


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as out/full_sft")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    parser.add_argument("--data_path", nargs="+", type=Path, default=[], metavar="FILE",
                        help="more files to measure the loss on; those of the run where they have moved")
    parser.add_argument("--no_samples", action="store_true", help="load no model: the log is enough")
    args = parser.parse_args(argv)
    if args.out and args.out.suffix.lower() not in (".html", ".htm"):  # so that it can replace no weights
        parser.error(f"--out {args.out} must end in .html")
    if args.no_samples and args.data_path:
        parser.error("--data_path has no effect with --no_samples: the model is needed for a loss")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
