"""What lm-eval asks of a model, answered by ours. (benchmarks/tasks.py compares whole scores.)"""

import sys

import pytest
import torch

import eval_model
from common.errors import DataError, UsageError
from inference.chat_model import ChatModel, Sampling
from inference.tasks import evaluate, likelihoods, local_data, score_of, table_of, write_answers


@pytest.fixture(scope="module")
def base(home):
    return ChatModel(home / "base", device="cpu")


@torch.no_grad()
def test_likelihoods_by_their_definition(base):
    pairs = [
        ([5, 6, 7], [8, 9]),
        ([3], [4]),
        (list(range(10, 40)), [50, 51, 52, 53]),
        (list(range(200)), [7, 8]),
    ]
    greedy = [token.item() for token in base.generate([[5, 6]], Sampling(temperature=0, max_new_tokens=3))]
    pairs.append(([5, 6], greedy))
    for (before, after), (value, is_greedy) in zip(pairs, likelihoods(base, pairs), strict=True):
        ids = (before + after)[-129:]  # the model sees 128 tokens
        log_probs = base.model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[-len(after) :]
        assert value == pytest.approx(
            sum(log_probs[i, token].item() for i, token in enumerate(after)), abs=1e-3
        )
        assert is_greedy == (log_probs.argmax(-1).tolist() == after)
    assert likelihoods(base, pairs)[-1][1]


def test_answers_end_where_the_task_says(base):
    prompts = [[5, 6, 7], [9], list(range(20, 60))]
    free = []
    for ids in prompts:
        tokens = [token.item() for token in base.generate([ids], Sampling(temperature=0, max_new_tokens=20))]
        free.append(base.decode([token for token in tokens if token not in base.stop_ids]))
    settings = {"max_gen_toks": 20, "do_sample": False, "until": ["never"]}
    assert write_answers(base, [(ids, settings) for ids in prompts], 2) == free
    stop = free[0][4:7]
    [cut] = write_answers(base, [(prompts[0], settings | {"until": [stop, "never"]})], 2)
    assert cut == free[0][: free[0].index(stop)]


def test_what_guessing_would_find_stands_beside_a_score():
    samples = {
        "x": [
            {"doc_hash": str(n), "doc_id": n, "arguments": [()] * count} for n, count in enumerate((2, 4, 4))
        ]
    }
    found = score_of({"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1}, samples, ["x"])
    assert found == {"n": 3, "acc": 0.5, "acc_stderr": 0.1, "chance": pytest.approx(1 / 3)}
    table = table_of({"ceval-valid": found | {"acc": 0.3}, "piqa": found})
    assert "ceval-valid: no more than guessing" in table and "0.333" in table and "piqa: no more" not in table
    written = {"w": [{"doc_hash": "a", "doc_id": 0, "arguments": [()]}] * 2}  # two ways to judge one answer
    assert score_of({"exact_match,strict-match": 0.0}, written, ["w"]) == {
        "n": 1,
        "exact_match strict-match": 0.0,
    }


def test_without_lm_eval_one_line_names_the_file(base, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install -r requirements-eval.txt"):
        evaluate(base, ["arc"])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tasks", "arc", "--temperature", "0"], "a task says itself"),
        (["--download"], "belong to --tasks"),
        (["--num_fewshot", "3"], "belong to --tasks"),
        (["--tasks", "arc", "--task_data", "/nowhere"], "is no folder"),
        (["--tasks", "arc", "--prompt", "x"], "not allowed with"),
        (["--tasks", "arc", "--system", "x"], "--system has no effect"),
    ],
)
def test_impossible_flags(home, capsys, flags, complaint):
    with pytest.raises(SystemExit) as end:
        eval_model.parse_args(["--load_from", str(home / "base"), *flags])
    assert end.value.code == 2 and complaint in capsys.readouterr().err
    assert "lm_eval" not in sys.modules


SETTINGS = (b"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n  - split: test\n"
            b"    path: ARC-Easy/*\n---\n")


@pytest.mark.parametrize("files, part", [
    ({}, "doesn't contain any data files"), ({"ARC-Easy/test-0.parquet": b""}, "ARC-Easy"),
    ({"README.md": SETTINGS, "ARC-Easy/test-0.jsonl": b"{"}, "can't be read")])
def test_data_that_is_not_as_on_the_hub_is_one_line(files, part, tmp_path):
    datasets = pytest.importorskip("datasets", reason="requirements-eval.txt")
    folder = tmp_path / "data" / "allenai" / "ai2_arc"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=part) as error, local_data(tmp_path / "data"):
        datasets.load_dataset("allenai/ai2_arc", "ARC-Easy", cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(error.value) and "README.md" in str(error.value)
