"""A model that has learnt its records by heart gives their answers: thinking, tool calls and later turns."""

import io
import json
import sys

import pytest
import torch
from small_chat_model import ROOT, write

import eval_model
from dataset.lm_dataset import SFTDataset, collate
from inference.chat_model import ChatModel, Sampling
from inference.scoring import score
from model.transformer import CausalLM, ModelConfig
from model.weights import load_tokenizer, save_model

GREEDY = Sampling(temperature=0)
RIVER, COLOUR, CLOCK = ({"name": name, "arguments": {}} for name in ("river", "colour", "clock"))


def chat(*texts, **last) -> dict:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    messages[-1].update(last)
    return {"messages": messages}


# The lines of shared/cases/reasoning_scored_wrong and think_history, each with another question.
RECORDS = {
    "inline": [chat("Name a river.", "<think>\nRivers are long.\n</think>\n\nThe Rhine."),
               chat("Name a colour.", "<think>short</think>Blue.")],
    "reason": [chat("And a longer river?", "The Nile.", reasoning_content="Rivers are long. " * 8)],
    "tool": [chat("A river, please.", '<tool_call>\n{"name": "river", "arguments": {}}\n</tool_call>'),
             chat("A colour, please.", "", tool_calls=[{"name": "colour", "arguments": {"n": 1, "a": "b"}}]),
             chat("Both!", "Yes.", reasoning_content="Two.", tool_calls=[RIVER, COLOUR])],
    "turns": [chat("River?", "<think>\nLong.\n</think>\n\nThe Rhine.", "Colour?",
                   "<think>\nThe sky.\n</think>\n\nBlue."),
              chat("Bird?", "<think>\nIt sings.\n</think>\n\nThe wren.", "Colour?",
                   "<think>\nA wren.\n</think>\n\nBrown.")],
}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """The folder of a tiny model that knows RECORDS by heart, and of the files with them."""
    folder = tmp_path_factory.mktemp("learnt")
    files = [write(folder / f"{name}.jsonl", *records) for name, records in RECORDS.items()]
    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=2, intermediate_size=128, max_position_embeddings=256,
                                 vocab_size=len(tokenizer)))
    dataset = SFTDataset([str(file) for file in files], tokenizer, 256, cache_dir=folder / "cache")
    batch = collate(dataset, [[i] for i in range(len(dataset))], 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):  # about 60 are needed
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.03:
            break
    save_model(model.eval(), folder / "model", tokenizer, training={"stage": "full_sft"})
    return folder


def test_what_was_learnt_by_heart_is_right(learnt, capsys):
    chat_model = ChatModel(learnt / "model")
    result = score(chat_model, [learnt / f"{name}.jsonl" for name in RECORDS], GREEDY)
    assert result["scores"] == {"inline": 1, "reason": 1, "tool": 1, "turns": 1, "all": 1}
    assert result["n"]["all"] == 8 and result["thought"] == 6 / 8
    assert "thought before 6 of 8 answers" in capsys.readouterr().out
    answers = {answer["prompt"]: answer for answer in result["answers"]}
    assert answers["Name a river."]["answer"] == "The Rhine."
    assert answers["Name a river."]["reasoning"] == "Rivers are long."
    assert answers["A colour, please."]["tool_calls"] == [{"name": "colour", "arguments": {"n": 1, "a": "b"}}]
    assert answers["A colour, please."]["answer"] == "" and not answers["A river, please."]["reasoning"]


def test_the_answer_counts_and_not_the_thought_before_it(learnt, tmp_path):
    data = write(tmp_path / "t.jsonl", chat("Name a river.", "The Rhine.", reasoning_content="Other " * 20),
                 chat("Name a colour.", "Green.", reasoning_content="Other " * 20),
                 chat("A colour, please.", "", tool_calls=[COLOUR | {"arguments": {"a": "b", "n": 1.0}}]),
                 chat("A colour, please.", "", tool_calls=[COLOUR | {"arguments": {"a": "b", "n": True}}]),
                 chat("Both!", "Yes.", tool_calls=[RIVER, COLOUR, CLOCK]),
                 chat("Both!", "Yes.", tool_calls=[COLOUR, RIVER]),
                 chat("Both!", "Yes."))  # the model calls tools, and should not
    result = score(ChatModel(learnt / "model"), [data], GREEDY)
    assert [answer["ok"] for answer in result["answers"]] == [True, False, True, False, False, False, False]


def test_both_turns_of_a_chat(learnt, monkeypatch, capsys):
    """The second answer is right only if its prompt holds the first answer as training wrote it."""
    for lines, answers in ((["River?", "Colour?"], ["The Rhine.", "Blue."]),
                           (["Bird?", "Colour?"], ["The wren.", "Brown."])):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        eval_model.main(eval_model.parse_args(["--load_from", str(learnt / "model"), "--temperature", "0"]))
        shown = capsys.readouterr()
        assert shown.out.split("\n")[:2] == answers
        assert "Long." in shown.err or "It sings." in shown.err  # the thought is shown, beside the answer
        assert "<think>" not in shown.out + shown.err


def test_the_terminal_shows_calls(learnt, capsys):
    eval_model.main(eval_model.parse_args(["--load_from", str(learnt / "model"), "--temperature", "0",
                                           "--prompt", "Both!"]))
    shown = capsys.readouterr()
    assert shown.out == ('Yes.\ntool call: {"name": "river", "arguments": {}}\n'
                         'tool call: {"name": "colour", "arguments": {}}\n')
    assert shown.err.startswith("Two.\n")


def test_json_holds_thinking_and_calls_apart(learnt, tmp_path):
    file = tmp_path / "scores.json"
    eval_model.main(eval_model.parse_args(["--load_from", str(learnt / "model"), "--json", str(file),
                                           "--data_path", str(learnt / "tool.jsonl")]))
    both = json.loads(file.read_text(encoding="utf-8"))["answers"][-1]
    assert (both["answer"], both["reasoning"]) == ("Yes.", "Two.")
    assert [call["name"] for call in both["tool_calls"]] == ["river", "colour"] and both["ok"]
