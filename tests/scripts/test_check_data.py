"""check_data.py shows what training would find in a file: its rows are those of the datasets."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import pack_rows
from dataset.preference import PairSides
from model.weights import load_tokenizer
from scripts import check_data

ROOT = Path(__file__).resolve().parents[2]
CHATS = [[("user", f"Count to {n}."), ("assistant", " ".join(map(str, range(1, n + 1))))]
         for n in range(5, 150, 5)]
CHATS[7] = [("user", "Say it again. " * 60), ("assistant", "It.")]  # whose answer a short row never reaches
TEXTS = ["The willow stood by the river. " * n for n in range(1, 58, 2)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "model" / "tokenizer")


@pytest.fixture
def files(tmp_path):
    chats = [{"conversations": [dict(role=role, content=text) for role, text in turns]} for turns in CHATS]
    for name, records in (("chats", chats), ("texts", [{"text": text} for text in TEXTS])):
        lines = [json.dumps(record) for record in records]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n", encoding="utf-8")
    return tmp_path


def check(*flags) -> None:
    check_data.main(check_data.parse_args([str(flag) for flag in flags]))


@pytest.mark.parametrize("name, kind", [("chats", SFTDataset), ("texts", PretrainDataset)])
def test_the_table_is_what_the_datasets_make(name, kind, files, tokenizer, tmp_path, capsys):
    check(files / f"{name}.jsonl", "--show", 0)
    out, err = capsys.readouterr()
    assert "bad lines skipped: 1" in err and f"{name}.jsonl:30: not valid JSON" in err
    rows = [[float(cell.strip("% ").replace(",", "")) for cell in line.strip("|").split("|")]
            for line in out.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == [128, 256, 512]  # the longest sample has more than 256 tokens
    whole = kind(files / f"{name}.jsonl", tokenizer, 10**6, cache_dir=tmp_path / "cache")
    for size, cut, dropped, lost, packed, filled in rows:
        dataset = kind(files / f"{name}.jsonl", tokenizer, int(size), cache_dir=tmp_path / "cache")
        found = check_data.lengths_in_rows(whole, int(size))
        assert sorted(found) == sorted(dataset.lengths)
        assert cut + dropped == sum(whole.lengths > size)
        assert dropped == (name == "chats" and size < 512)
        assert packed == len(pack_rows(dataset.lengths, int(size), 0))
        assert filled == pytest.approx(100 * dataset.lengths.sum() / packed / size, abs=0.51)
        kept = 1 if name == "texts" else dataset.lengths.sum() / whole.lengths.sum()
        assert lost == pytest.approx(100 * (1 - kept), abs=0.051)
    assert f"{whole.lengths.sum():,} tokens, {whole.num_targets.sum():,} of them learnt" in out
    assert f"the longest {max(whole.lengths)}" in out


def test_a_sample_shows_what_is_learnt(files, capsys):
    check(files / "chats.jsonl", "--show", 1)
    assert capsys.readouterr().out.endswith(
        f"--- {files / 'chats.jsonl'}:1\n<|im_start|>user\nCount to 5.<|im_end|>\n"
        "<|im_start|>assistant\n[[1 2 3 4 5<|im_end|>]]\n\n\n[[...]] is learnt, and nothing else.\n")


def test_what_nothing_is_left_of(tmp_path, capsys):
    chat = [{"role": "user", "content": "Why? " * 120}, {"role": "assistant", "content": "So."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    check(tmp_path / "a.jsonl")
    out = capsys.readouterr().out
    assert "| 128 | 0 | 1 | 100.0% | 0 | 0% |" in out and "| 512 | 0 | 0 | 0.0% | 1 |" in out


def test_the_first_usable_record_says_what_the_file_is(tmp_path, capsys):
    lines = [{"meta": 1}, {"text": "a fox", "messages": None, "instruction": ""}, {"text": "an owl"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    check(tmp_path / "a.jsonl")
    assert "2 samples (plain text" in capsys.readouterr().out


def test_characters_of_several_tokens_stay_whole(tmp_path, tokenizer, capsys):
    texts = ["\U00020bb7 is open", "\U0001f994 a hedgehog"]
    assert all(len(tokenizer.encode(text[0])) > 1 for text in texts)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "rare.jsonl").write_text(lines, encoding="utf-8")
    check(tmp_path / "rare.jsonl")
    out = capsys.readouterr().out
    assert all(f"[[{text}<|endoftext|>]]" in out for text in texts) and "\ufffd" not in out


def test_of_a_huge_sample_the_beginning_is_shown(tmp_path, capsys):
    (tmp_path / "huge.jsonl").write_text(json.dumps({"text": "fox " * 50_000}) + "\n", encoding="utf-8")
    check(tmp_path / "huge.jsonl")
    out = capsys.readouterr().out
    assert len(out) < 10_000 and " tokens in all)" in out


def test_a_file_cannot_steer_the_terminal(tmp_path, capsys):
    file = tmp_path / "evil\x1b[31m.jsonl"
    file.write_text(json.dumps({"text": "a\x1b]0;owned\x07b\r\x9bc\u202e"}) + "\n", encoding="utf-8")
    check(file)
    out = capsys.readouterr().out
    assert not set("\x1b\x07\r\x9b\u202e") & set(out) and "\ufffd" in out


@pytest.mark.parametrize("flags, part", [
    (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["chats.jsonl", "--strict"], "chats.jsonl:30: not valid JSON"),
    (["chats.jsonl", "--load_from", "empty"], "empty"),
    (["chats.jsonl", "--show", "-1"], "--show must not be negative"),
    (["\udcff.jsonl"], "is not valid UTF-8"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, part, files, refused, monkeypatch):
    (files / "empty").mkdir()
    monkeypatch.chdir(files)
    refused(check_data, flags, part)


def test_the_command_runs_where_nothing_but_ascii_is_known(files):
    (files / "zh.jsonl").write_text('{"text": "柳树在河边。"}\n', encoding="utf-8")
    ended = subprocess.run([sys.executable, check_data.__file__, "zh.jsonl"], cwd=files, capture_output=True,
                           env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PATH": "",
                                "SYSTEMROOT": "C:\\Windows"})
    assert ended.returncode == 0, ended.stderr
    assert "[[树在河边。<|endoftext|>]]" in ended.stdout.decode("utf-8")


def test_a_pth_file_has_our_own_tokenizer(files, capsys):
    (files / "x.pth").write_bytes(b"weights, which are not read")
    shown = []
    for flags in ([], ["--load_from", files / "x.pth"]):
        check(files / "chats.jsonl", *flags)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "29 samples" in shown[0]


def test_keys_that_are_not_used_are_named_and_counted(tmp_path, capsys):
    lines = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], **more}
             for more in ({}, {"foo": 1, "id": 7}, {"foo": 2})]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    check(tmp_path / "a.jsonl")
    out, err = capsys.readouterr()
    assert "3 samples (chats" in out and "'id'" not in err
    assert f"{tmp_path / 'a.jsonl'}:2: the key 'foo' of a record is not used (in 2 records)" in err


def test_of_a_file_that_training_refuses_the_report_is_shown_all_the_same(tmp_path, capsys):
    (tmp_path / "README.md").write_text('# Title\nwords\n{"text": "a fox"}\n', encoding="utf-8")
    check(tmp_path / "README.md")
    out, err = capsys.readouterr()
    assert "1 samples (plain text" in out
    assert "README.md: 2 of 3 records cannot be used (first problem: line 1" in err


def test_documents_are_split_as_in_pretraining(files, tmp_path, refused, capsys):
    text = "<|im_start|>a fox<|im_end|> <|im_start|>an owl<|im_end|>"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    check(tmp_path / "a.jsonl")
    out, err = capsys.readouterr()
    assert "1 samples" in out and "--split_documents" in err
    check(tmp_path / "a.jsonl", "--split_documents")
    out, err = capsys.readouterr()
    assert "2 samples" in out and "[[ fox<|endoftext|>]]" in out and err == ""
    refused(check_data, [files / "chats.jsonl", "--split_documents"], "--split_documents is for plain text")


def test_pairs_are_shown_side_by_side(tokenizer, tmp_path, capsys):
    def pair(number):
        ask, words = {"role": "user", "content": "Say it again. " * number}, "very " * number
        return {"chosen": [ask, {"role": "assistant", "content": f"It is {words}good."}],
                "rejected": [ask, {"role": "assistant", "content": "No."}]}

    path = tmp_path / "pairs.jsonl"
    same = pair(1) | {"rejected": pair(1)["chosen"]}
    path.write_text("".join(json.dumps(record) + "\n" for record in [*map(pair, range(1, 60, 4)), same]))
    check(path, "--show", 2)
    out, err = capsys.readouterr()
    assert "pairs.jsonl:16: a pair without a difference" in err
    assert "30 samples (the chosen and the rejected sides of pairs, for train_dpo.py)" in out
    assert "| --max_seq_len | samples cut | dropped | tokens lost |\n|---|---|---|---|\n| 128 |" in out
    assert "[[It is very good.<|im_end|>]]" in out and "and nothing else" in out
    whole = PairSides(path, tokenizer, 10**6, cache_dir=tmp_path / "cache")
    for line in re.findall(r"^\| \d.*", out, re.MULTILINE):
        size, cut, dropped, lost = (float(cell.strip("% ").replace(",", "")) for cell in line.split("|")[1:5])
        dataset = PairSides(path, tokenizer, int(size), cache_dir=tmp_path / "cache")
        assert len(whole) - len(dataset) == dropped and (size > 128 or dropped > 0)
        assert f"sides over {size:.0f} tokens cut: {cut:.0f}" in dataset.summary or cut == 0
        assert lost == pytest.approx(100 * (1 - dataset.lengths.sum() / whole.lengths.sum()), abs=0.051)
