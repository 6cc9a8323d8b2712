"""Rewards: what each part says, how parts add up, and one line for each mistake of a person."""

import argparse
import json
import logging
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from common.errors import ModelError, RunError, UsageError
from dataset.answers import AnswerTest
from dataset.prompts import Prompt
from trainer import args as flags
from trainer.rewards import Answer, Rewards

ASKED = [{"role": "user", "content": "What is 2 + 3?"}]
PROMPT = Prompt(ASKED, [1, 2], AnswerTest(number="5"), {"question": "2 + 3?", "level": 3}, "x.jsonl:7")


def judge(rewards: Rewards, text: str, num_tokens: int = 4, prompt: Prompt = PROMPT) -> dict:
    [found] = rewards([prompt], [Answer(text, num_tokens, False)])
    return found


def test_answers_asks_the_test_of_the_record():
    rewards = Rewards({"answers": 1.0})
    assert judge(rewards, "It is 5.") == {"reward": 1.0}
    assert judge(rewards, "It is 6.") == {"reward": 0.0}
    # What the model thinks before its answer is not its answer.
    assert judge(rewards, "<think>\nPerhaps 7?\n</think>\n\n5")["reward"] == 1.0
    assert judge(rewards, "<think>\n5\n</think>\n\n7")["reward"] == 0.0


def test_a_format_must_match_the_whole_answer():
    rewards = Rewards({"format": 1.0}, reward_format=r"<a>.*</a>")
    assert [judge(rewards, text)["reward"] for text in ("<a>2\n3</a> ", "<a>2</a> So.", "a")] == [1, 0, 0]


@pytest.mark.parametrize(("num_tokens", "reward"), [(1, 1.0), (10, 1.0), (15, 0.5), (20, 0.0), (99, 0.0)])
def test_length_falls_from_its_limit_to_twice_as_many_tokens(num_tokens, reward):
    assert judge(Rewards({"length": 1.0}, max_reward_tokens=10), "x", num_tokens)["reward"] == reward


def test_a_record_may_have_a_limit_of_its_own():
    rewards = Rewards({"length": 1.0})
    record = Prompt(ASKED, [1], AnswerTest(), {"max_reward_tokens": 4}, "x.jsonl:1")
    assert judge(rewards, "x", 6, record)["reward"] == 0.5 and judge(rewards, "x", 6)["reward"] == 1.0
    assert judge(Rewards({"length": 1.0}, max_reward_tokens=3), "x", 6, record)["reward"] == 0.5
    record.record["max_reward_tokens"] = None  # a column of a table, in which other records have a number
    assert judge(Rewards({"length": 1.0}, max_reward_tokens=3), "x", 6, record)["reward"] == 0.0


def test_parts_are_weighted_and_added():
    rewards = Rewards({"answers": 2.0, "length": -0.5}, max_reward_tokens=10)
    assert judge(rewards, "5", 15) == {"reward": 2.0 - 0.25, "reward_answers": 1.0, "reward_length": 0.5}


def own(tmp_path, body: str) -> str:
    path = tmp_path / "my.py"
    path.write_text(f"def score(messages, answer, record):\n    {body}\n", encoding="utf-8")
    return f"{path}:score"


def test_a_persons_own_function_sees_prompt_answer_and_record(tmp_path):
    body = "return len(answer) + record['level'] + 100 * (messages[0]['content'] == 'What is 2 + 3?')"
    assert judge(Rewards({"file": 1.0}, reward_file=own(tmp_path, body)), "four")["reward"] == 107.0


@pytest.mark.parametrize(("body", "says"), [
    ("return 1 / 0", "raised ZeroDivisionError: division by zero, for the prompt of x.jsonl:7"),
    ("return int('b')", "raised ValueError: invalid literal"),
    ("return len(3)", "raised TypeError: object of type 'int' has no len()"),
    ("return None", "returned None, no number, for the prompt of x.jsonl:7"),
    ("return 'good'", "returned 'good', no number, for the prompt of x.jsonl:7"),
    ("return [[1.0],\n        [2.0]]", "returned [[1.0], [2.0]], no number"),
    ("return score(messages)", "raised TypeError: score() missing 2 required positional arguments"),
    ("raise SystemExit(0)", "raised SystemExit: 0, for the prompt of x.jsonl:7"),
    ("return float('nan')", "returned nan, no finite number below 1e+30, for the prompt of x.jsonl:7"),
    ("return -1e300", "returned -1e+300, no finite number"),  # infinite in float32
    ("return 10**400", "no number"),  # float raises OverflowError
])  # fmt: skip
def test_a_function_that_fails_is_named_with_the_prompt(tmp_path, body, says):
    with pytest.raises(RunError) as error:
        judge(Rewards({"file": 1.0}, reward_file=own(tmp_path, body)), "a")
    assert says in str(error.value) and "my.py:score" in str(error.value) and "\n" not in str(error.value)


def test_a_function_of_other_arguments_is_named(tmp_path):
    (tmp_path / "my.py").write_text("def score(messages, answer):\n    return 1\n", encoding="utf-8")
    with pytest.raises(RunError, match="raised TypeError: score.. takes 2 positional arguments but 3"):
        judge(Rewards({"file": 1.0}, reward_file=f"{tmp_path / 'my.py'}:score"), "a")


def test_a_function_may_change_what_it_gets(tmp_path):
    body = "messages.append(answer); record.clear(); return len(messages) + 10 * len(record)"
    rewards = Rewards({"file": 1.0}, reward_file=own(tmp_path, body))
    assert [judge(rewards, "a")["reward"] for _ in range(2)] == [2.0, 2.0]
    assert len(PROMPT.messages) == 1 and len(PROMPT.record) == 2


def test_a_file_may_hold_dataclasses_and_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_my_rewards.py").write_text("SEVEN = 7\n", encoding="utf-8")
    (tmp_path / "json.py").write_text(  # the name of a module that others import
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from beside_my_rewards import SEVEN\n\n@dataclass\nclass Found:\n    number: int\n\n"
        "def score(messages, answer, record):\n    return Found(SEVEN).number\n", encoding="utf-8")
    assert judge(Rewards({"file": 1.0}, reward_file=f"{tmp_path / 'json.py'}:score"), "a")["reward"] == 7
    assert sys.modules["json"] is json


def test_the_identity_follows_the_file_that_judges_and_not_its_place(tmp_path):
    def identity(folder: str, body: str = "return 1") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        return Rewards({"file": 1.0}, reward_file=own(tmp_path / folder, body)).identity

    assert identity("a") == identity("b") != identity("b", "return 2")
    assert Rewards({"answers": 1.0}).identity == ""


def test_a_file_without_the_function_is_refused(tmp_path):
    path = own(tmp_path, "return 1")
    for name, says in ((path.replace("score", "judge"), "has no function 'judge'"),
                       ("no.py:score", "no file no.py"),
                       (path.removesuffix(":score"), "write it as my.py:function")):
        with pytest.raises(UsageError, match=says):
            Rewards({"file": 1.0}, reward_file=name)
    (tmp_path / "my.py").write_text("import nothing_like_it\n", encoding="utf-8")
    with pytest.raises(UsageError, match="can't be run: ModuleNotFoundError"):
        Rewards({"file": 1.0}, reward_file=path)
    (tmp_path / "my.py").write_text("import sys\nsys.exit()\n", encoding="utf-8")
    with pytest.raises(UsageError, match="can't be run: SystemExit"):
        Rewards({"file": 1.0}, reward_file=path)


def test_a_format_that_is_no_expression_is_refused():
    with pytest.raises(UsageError, match="no regular expression"):
        Rewards({"format": 1.0}, reward_format="(")


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory, tokenizer):
    """Folders of transformers: a model with a head for one number, one with two, one without a head."""
    folder, made = tmp_path_factory.mktemp("reward"), {}
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id)
    for name, cls, labels in (("one", LlamaForSequenceClassification, 1),
                              ("two", LlamaForSequenceClassification, 2), ("none", LlamaForCausalLM, 1)):
        made[name] = cls(LlamaConfig(**shape, num_labels=labels)).eval()
        made[name].save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder, made["one"]


def test_a_reward_model_gives_what_transformers_computes(reward_models, tokenizer):
    folder, model = reward_models
    rewards = Rewards({"model": 1.0}, reward_model=folder / "one")
    answers = [Answer(text, 3, False) for text in ("5", "I think that it is 6, or 7.")]
    found = [one["reward"] for one in rewards([PROMPT, PROMPT], answers)]  # padded to one length
    for value, answer in zip(found, answers, strict=True):
        ids = tokenizer.apply_chat_template([*ASKED, {"role": "assistant", "content": answer.text}],
                                            return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            assert abs(model(ids).logits.item() - value) < 1e-5
    assert found[0] != found[1]
    assert "rewarded by a model of sha256" in rewards.identity


def test_a_reward_model_that_knows_no_padding_reads_one_text_at_a_time(reward_models):
    rewards, answers = Rewards({"model": 1.0}, reward_model=reward_models[0] / "one"), [
        Answer(text, 3, False) for text in ("5", "I think that it is 6, or 7.")]
    padded = [one["reward"] for one in rewards([PROMPT, PROMPT], answers)]
    for token in (None, 7):  # the tokenizer pads, and the model does not know with what
        rewards.parts["model"].model.config.pad_token_id = token
        found = [one["reward"] for one in rewards([PROMPT, PROMPT], answers)]
        assert found == pytest.approx(padded, abs=1e-5)


def test_the_template_of_a_reward_model_gets_calls_as_transformers_has_them_and_may_refuse(reward_models):
    model = Rewards({"model": 1.0}, reward_model=reward_models[0] / "one").parts["model"]
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %} {% endfor %}")
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": {}}]}
    asked = [*ASKED, call, {"role": "tool", "content": "12"}]
    text = model.text(Prompt(asked, [1], AnswerTest(), {}, "x.jsonl:3"), Answer("Noon.", 3, False))
    assert text.split()[-3:] == ["clock", "12", "Noon."]
    with pytest.raises(RunError, match="refuses the prompt of x.jsonl:4: no system"):
        model.text(Prompt([{"role": "system", "content": "S"}, *ASKED], [1], AnswerTest(), {}, "x.jsonl:4"),
                   Answer("5", 1, False))


def test_a_reward_model_sees_the_answer_to_a_long_prompt(reward_models):
    rewards = Rewards({"model": 1.0}, reward_model=reward_models[0] / "one")
    rewards.parts["model"].tokenizer.model_max_length = 16
    long = Prompt([{"role": "user", "content": "word " * 50}], [1], AnswerTest(), {}, "x.jsonl:1")
    assert judge(rewards, "5", prompt=long) != judge(rewards, "seven", prompt=long)


@pytest.mark.parametrize(("name", "says"), [("none", "has no head that gives a number"),
                                            ("two", "gives 2 numbers"),
                                            ("absent", "there is no model in that folder")])
def test_a_reward_model_without_a_number_is_refused(reward_models, name, says, monkeypatch):
    told, log = [], logging.getLogger("transformers")
    monkeypatch.setattr(log, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(log.handlers[0], "handle", told.append)
    log.setLevel(logging.WARNING)  # as transformers begins
    with pytest.raises((UsageError, ModelError), match=says):
        Rewards({"model": 1.0}, reward_model=reward_models[0] / name)
    assert not told  # transformers would print a table of what is missing


@pytest.mark.parametrize(("given", "weights"), [
    ([], {"answers": 1.0, "length": 0.2}),
    (["--data_path", "x.jsonl"], {"answers": 1.0}),
    (["--max_reward_tokens", "9"], {"length": 1.0}),
    (["--rewards", "answers", "length:0.5", "--max_reward_tokens", "9"], {"answers": 1.0, "length": 0.5}),
])  # fmt: skip
def test_the_flags_say_which_parts_count(given, weights):
    parser = flags.rollout_parser("a test")
    args = parser.parse_args(given)
    flags.choose_rewards(parser, args)
    assert args.rewards == weights


@pytest.mark.parametrize(("given", "says"), [
    (["--rewards", "answer"], "'answer' is none of answers, format, length, file, model"),
    (["--rewards", "answers:0"], "a weight that is not 0"),
    (["--rewards", "answers:much"], "'answers:much' is none of answers, format"),
    (["--rewards", "answers", "answers:2"], "--rewards names a part twice"),
    (["--rewards", "format"], "--rewards format needs --reward_format"),
    (["--rewards", "answers", "--max_reward_tokens", "9"], "no effect: add length to --rewards"),
    (["--rewards", "answers", "--reward_format", "a"], "no effect: add format to --rewards"),
])  # fmt: skip
def test_a_part_without_its_flag_and_a_flag_without_its_part_are_refused(given, says, capsys):
    parser = flags.rollout_parser("a test")
    with pytest.raises(SystemExit):
        args = parser.parse_args(given)
        flags.choose_rewards(parser, args)
    assert says in capsys.readouterr().err


def test_a_weight_is_a_number_behind_a_colon():
    assert flags.weighted("length:-2") == ("length", -2.0)
    with pytest.raises(argparse.ArgumentTypeError):
        flags.weighted("length:nan")
