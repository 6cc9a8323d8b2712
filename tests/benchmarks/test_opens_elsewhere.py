"""opens_elsewhere.py compares what it says it compares. The other programs are not installed here."""

import json

import pytest

from benchmarks import opens_elsewhere
from benchmarks.opens_elsewhere import compare, make_models, run_checks, summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opens_elsewhere, "SHAPES", {"qwen3": {"qk_norm": True}})
        make_models(folder, steps=3)
    return folder


def outcomes(folder, monkeypatch, capsys, *checks) -> dict[str, str]:
    monkeypatch.setattr(opens_elsewhere, "SHAPES", {"qwen3": {"qk_norm": True}})
    run_checks(list(checks), folder)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"model"')]
    return {line["what"]: line["outcome"] for line in lines}


def test_answers_are_compared_and_a_failure_is_a_row(folder, monkeypatch, capsys):
    found = outcomes(folder, monkeypatch, capsys, "transformers", "peft", "nothing")
    assert found["Qwen3ForCausalLM"] == found["PEFT"] == "6 of 6 answers equal"
    # After three steps the model knows no chat by heart, so the next check of the same function fails.
    assert found["transformers"].startswith("failed: ") and found["nothing"].startswith("failed: KeyError")


def test_a_difference_shows(folder):
    case = opens_elsewhere.cases(folder, "qwen3", "plain")[0]
    prompt, answer = case["prompt"], case["answer"]
    assert compare(case, prompt, answer) == compare(case, prompt, answer[:-1]) == ""
    assert compare(case, prompt[1:], answer) == "another prompt"
    other = compare(case, prompt, [1, *answer[1:]])
    assert other.startswith("another answer: [1, ")
    assert summary(["", other]) == f"1 of 2 answers equal; {other}"
