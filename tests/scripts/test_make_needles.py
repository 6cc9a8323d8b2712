"""make_needles.py: chats that fit into their rows, and are learnt as they are asked."""

import json

import pytest

from dataset.chat import encode_chat
from model.tokenizer_files import OWN_TOKENIZER, load_tokenizer
from scripts import make_needles


def test_every_chat_fits_into_a_row_of_its_length(tmp_path, capsys):
    flags = ["--max_tokens", "68", "200", "--count", "60", "--out_dir", str(tmp_path)]
    make_needles.main(make_needles.parse_args(flags))
    assert "needle_68.jsonl: 60 chats of at most 68 tokens" in capsys.readouterr().out
    tokenizer, longest = load_tokenizer(OWN_TOKENIZER), {}
    for length in (68, 200):
        lines = (tmp_path / f"needle_{length}.jsonl").read_text(encoding="utf-8").splitlines()
        chats = [json.loads(line)["conversations"] for line in lines]
        sizes = [len(encode_chat(tokenizer, chat)[0]) for chat in chats]
        assert len(chats) == 60 and max(sizes) <= length
        longest[length] = max(sizes)
        assert all(answer["content"] in question["content"] for question, answer in chats)
    assert longest[68] > 50 and longest[200] > 150


def test_too_few_tokens_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        make_needles.parse_args(["--max_tokens", "128", "40"])
    assert ended.value.code == 2 and "--max_tokens 40" in capsys.readouterr().err
