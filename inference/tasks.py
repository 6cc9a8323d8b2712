"""The tasks that others publish scores for, by lm-eval's own definitions. A reader may skip this file.

    scores = evaluate(ChatModel("out/full_sft"), ["arc_easy", "gsm8k"])    # needs requirements-eval.txt

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) makes the questions, and judges the answers. A
model answers it in two ways: how probable is this continuation of a text, and what does it write itself?
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from common.errors import DataError, UsageError
from common.files import one_line
from dataset.chat import encode_continuation
from dataset.replies import Reply
from inference.answer import AnswerReader
from inference.chat_model import ChatModel
from model.batch import Batch, Row
from model.transformer import Output

# What people say -> lm-eval's names
NAMES = {"ceval": ["ceval-valid"], "arc": ["arc_easy", "arc_challenge"]}
SPLITS = ("train", "validation", "val", "dev", "test")
WHERE = ("--download fetches it, --task_data names a folder that holds it as the hub does, with its "
         "README.md, which names the files")
CHINESE = ("ceval", "cmmlu")
MAX_NEW_TOKENS, CACHE_TOKENS = 256, 2**15


def evaluate(chat_model: ChatModel, names: list[str], *, limit: int | None = None,
             num_fewshot: int | None = None, batch_size: int = 32, data: Path | None = None,
             download: bool = False) -> dict:
    """{"scores": {task: {"n", "acc", "acc_stderr", ..., "chance"}}, "versions": {...}, "samples": {...}}

    data: a folder in which data sets lie as on the hub (data/allenai/ai2_arc). download: what is not there is
    fetched; without it nothing is, and only what an earlier run has fetched is found.
    Raises UsageError where lm-eval is missing or knows no such task, DataError where a data set is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks needs the package lm-eval: pip install -r requirements-eval.txt")
    if not download:  # before the libraries are imported, which read this once
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    wanted = [found for name in names for found in NAMES.get(name, [name])]
    if unknown := [name for name in wanted if name not in manager.all_tasks]:
        raise UsageError(f"--tasks: lm-eval knows no task {unknown[0]!r}")
    try:
        with local_data(data):
            found = simple_evaluate(make_backend(chat_model, batch_size), tasks=wanted, limit=limit,
                                    num_fewshot=num_fewshot, task_manager=manager, bootstrap_iters=1000)
    except DataError:
        raise
    except (OSError, ValueError, KeyError) as error:
        is_split = isinstance(error, KeyError) and str(error.args[0]) in SPLITS
        if not is_split and not re.search("hub|find|offline|connect", str(error), re.IGNORECASE):
            raise
        reason = f"no split {error}" if is_split else one_line(error)[:200]
        raise DataError(f"--tasks: the data is not here ({reason}): {WHERE}") from None
    results, samples = found["results"], found["samples"]
    parts = found.get("group_subtasks", {})
    scores = {name: score_of(results[name], samples, parts.get(name) or [name]) for name in wanted}
    return {"scores": scores, "versions": found["versions"], "results": results, "samples": samples}


@contextlib.contextmanager
def local_data(folder: Path | None) -> Iterator[None]:
    """Within it, a data set that lies in the folder is read from there."""
    import datasets

    load = datasets.load_dataset

    def load_from_folder(path: str, *arguments, **options):
        is_there = folder is not None and (folder / path).is_dir()
        try:
            return load(str((folder / path).resolve()) if is_there else path, *arguments, **options)
        except Exception as error:  # of many libraries: datasets, pyarrow, the hub's
            raise DataError(f"--tasks: the data set {path} is not here, or can't be read "
                            f"({one_line(error)[:200]}): {WHERE}") from None

    datasets.load_dataset = load_from_folder
    try:
        yield
    finally:
        datasets.load_dataset = load


def make_backend(chat_model: ChatModel, batch_size: int):
    """Our model as lm-eval asks it. (Its class can only be made where lm-eval is installed.)"""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Backend(TemplateLM):
        tokenizer_name = str(chat_model.path)
        max_length = chat_model.max_positions
        eot_token_id = chat_model.stop_ids[0]

        @property
        def prefix_token_id(self) -> int:
            tokenizer = chat_model.tokenizer
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            return self.eot_token_id if first is None else first

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            ids = encode_continuation(chat_model.tokenizer, string)[0]
            start = encode_continuation(chat_model.tokenizer, "")[0]  # what begins every text; mostly nothing
            return ids[len(start):] if add_special_tokens is False else ids

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_) -> list[tuple[float, bool]]:
            found = [None] * len(requests)
            # Rows of similar length share a batch, the longest first: if memory is short, it fails at once.
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
            for begin in range(0, len(order), batch_size):
                places = order[begin:begin + batch_size]
                pairs = [requests[place][1:3] for place in places]
                for place, result in zip(places, likelihoods(chat_model, pairs), strict=True):
                    found[place] = result
            return found

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                    self.max_length, 1)
                pairs = [("", *make_disjoint_window(window)) for window in windows]
                sums.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
            return sums

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            asked = [(self.tok_encode(prompt), dict(settings)) for prompt, settings in
                     (request.args for request in requests)]
            return write_answers(chat_model, asked, batch_size)

    return Backend()


@torch.inference_mode()
def likelihoods(chat_model: ChatModel, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """pairs: ids of a text, and ids that follow. Returns the log-probability of the latter, and whether each
    of them is the likeliest."""
    model, longest = chat_model.model, chat_model.max_positions
    rows = [(before + after)[-(longest + 1):][:-1] for before, after in pairs]
    size = max(map(len, rows))
    ids = torch.tensor([row + [0] * (size - len(row)) for row in rows], device=chat_model.device)
    hidden, results = model(ids).hidden, []
    for row, (_, after), states in zip(rows, pairs, hidden, strict=True):
        targets = torch.tensor(after[-len(row):], device=ids.device)
        output = Output(states[len(row) - len(targets):len(row)], model.lm_head)
        log_probs = output.logits.float().log_softmax(dim=-1)  # (targets, V)
        value = log_probs.gather(1, targets[:, None]).sum().item()
        results.append((value, bool((log_probs.argmax(dim=-1) == targets).all())))
    return results


def write_answers(chat_model: ChatModel, asked: list[tuple[list[int], dict]], max_rows: int) -> list[str]:
    """What the model writes after each prompt, up to a text that ends it.

    asked: the ids of each prompt, and lm-eval's settings for it.
    """
    max_tokens = max(CACHE_TOKENS, chat_model.max_positions)
    batch = Batch(chat_model.model, chat_model.adapters, max_rows, max_tokens)
    rows, readers, adapter = [], {}, chat_model.adapters.in_use
    for ids, settings in asked:
        limit = settings.get("max_gen_toks", MAX_NEW_TOKENS)
        until = settings.get("until") or []
        greedy = not settings.get("do_sample", settings.get("temperature", 0) > 0)
        prompt = ids[-max(1, chat_model.max_positions - limit):] or chat_model.stop_ids[:1]
        row = Row(prompt, limit, tuple(chat_model.stop_ids), adapter=adapter, seed=len(rows),
                  temperature=0.0 if greedy else settings.get("temperature", 1.0))
        rows.append(row)
        stops = [until] if isinstance(until, str) else until
        readers[row] = AnswerReader(chat_model.decode, {}, Reply(), [stop for stop in stops if stop])
    texts, waiting = dict.fromkeys(rows, ""), list(reversed(rows))
    while waiting or batch.rows:
        joining = []
        while waiting and batch.fits([*joining, waiting[-1]]):
            joining.append(waiting.pop())
        grown = (batch.add(joining) if joining else []) + (batch.step() if batch.rows else [])
        for row in dict.fromkeys(grown):
            reader = readers[row]
            for token in row.tokens[len(reader.tokens):]:
                if token not in row.end_tokens:
                    texts[row] += "".join(piece.text for piece in reader.add(token))
            if row.finish:
                texts[row] += "".join(piece.text for piece in reader.end())
            elif reader.has_stopped:
                batch.remove(row)
    return list(texts.values())


# --- scores -------------------------------------------------------------------------------------------------


def score_of(result: dict, samples: dict, parts: list[str]) -> dict:
    """What lm-eval found for a task, and what guessing would have found. parts: of a group its tasks."""
    of_all = [sample for part in parts for sample in samples.get(part, ())]
    choices = {(sample["doc_hash"], sample["doc_id"]): len(sample["arguments"]) for sample in of_all}
    found = {key.removesuffix(",none").replace(",", " "): value for key, value in result.items()
             if isinstance(value, float)}
    chance = {}
    if choices and min(choices.values()) > 1:
        chance["chance"] = sum(1 / count for count in choices.values()) / len(choices)
    return {"n": len(choices), **found, **chance}


def table_of(scores: dict[str, dict]) -> str:
    """The scores for a person to read: value, standard error, and chance."""
    rows = []
    for task, found in scores.items():
        for metric, value in found.items():
            if metric in ("n", "chance") or "stderr" in metric:
                continue
            name, _, kind = metric.partition(" ")
            error = found.get(f"{name}_stderr {kind}".strip())
            rows.append({"task": task, "metric": metric, "n": found["n"], "score": value, "± (1 s.e.)": error,
                         "chance": found.get("chance")})
    lines = [pd.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format, na_rep="")]
    near_chance = [task for task, found in scores.items() if task.startswith(CHINESE) and "chance" in found
                   and abs(found["acc"] - found["chance"]) < 2 * (found.get("acc_stderr") or 0)]
    if near_chance:
        lines.append(f"{', '.join(near_chance)}: no more than guessing. At these sizes Chinese multiple "
                     "choice mostly measures whether a model knows the format.")
    return "\n".join(lines)
