"""The script that trains a tokenizer, run in this process: what it reads, writes, reports and refuses."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trainer.train_tokenizer import CONTROL_TOKENS, build_tokenizer, bytes_per_token, save_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "trainer" / "train_tokenizer.py"
WORDS = "the fox runs to river and owl sings in garden 小 狐狸 在 花园 里 唱歌 。".split()


def records(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    texts = (" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(count))
    return [{"text": f"{i}. {text}"} for i, text in enumerate(texts)]


def write(path: Path, lines: list) -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(flag, ...) -> (exit code, stdout, stderr); --out_dir is tmp_path/out."""

    def run(*flags):
        words = [SCRIPT, "--out_dir", tmp_path / "out", *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        monkeypatch.setattr(sys, "path", list(sys.path))
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_reported_bytes_per_token_are_those_of_what_was_held_out(run, tmp_path):
    """Counted again by transformers, from the files that were written."""
    paths = [write(tmp_path / "a.jsonl", records(300)), write(tmp_path / "b.jsonl", records(200, seed=1))]
    code, out, err = run("--data_path", *paths, "--vocab_size", 330, "--eval_fraction", 0.2)
    assert code == 0 and err == ""
    tokenizer, *lines = AutoTokenizer.from_pretrained(tmp_path / "out"), *out.splitlines()
    assert lines.pop() == f"330 entries saved to {tmp_path / 'out'}"
    from trainer.train_tokenizer import hashed_fraction

    for path, line, count in zip(paths, lines, (300, 200), strict=True):
        texts = [json.loads(text)["text"] for text in path.read_text(encoding="utf-8").splitlines()]
        held_out = [text for text in texts if hashed_fraction([text]) < 0.2]
        ratio = (sum(len(text.encode()) for text in held_out)
                 / sum(len(ids) for ids in tokenizer(held_out, add_special_tokens=False)["input_ids"]))
        assert 20 < len(held_out) < 80
        assert line == (f"{path}: {count - len(held_out)} records trained on; held out: "
                        f"{ratio:.3f} bytes per token on {len(held_out)}")


def test_what_is_held_out_is_not_trained_on(run, tmp_path):
    """A word that only the held-out records have becomes no entry, though there it is the most frequent."""
    from trainer.train_tokenizer import hashed_fraction

    def text(i):
        plain = f"{i} the fox"
        return plain if hashed_fraction([plain]) >= 0.3 else None

    trained = [{"text": t} for i in range(400) if (t := text(i))]
    rare = [{"text": t} for i in range(2000) if hashed_fraction([t := f"{i} zzqqxx"]) < 0.3]
    code, out, _ = run("--data_path", write(tmp_path / "a.jsonl", trained + rare), "--vocab_size", 275,
                       "--eval_fraction", 0.3)
    assert code == 0 and f"{len(trained)} records trained on" in out and f"on {len(rare)}\n" in out
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert not any("zz" in token or "qq" in token for token in vocabulary)


def test_the_same_data_give_the_same_bytes_and_nothing_beside_them(run, tmp_path):
    path = write(tmp_path / "a.jsonl", records(200))
    made = []
    for _ in range(2):
        assert run("--data_path", path, "--vocab_size", 325)[0] == 0
        made.append(files(tmp_path / "out"))
    assert made[0] == made[1] and sorted(made[0]) == ["tokenizer.json", "tokenizer_config.json"]
    assert run("--data_path", path, "--vocab_size", 325, "--weights", 3)[0] == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 325


def test_weights_decide_what_is_learnt(run, tmp_path):
    paths = [write(tmp_path / f"{word}.jsonl", [{"text": f"{word}{i % 7}" * 3} for i in range(60)])
             for word in ("fox", "owl")]
    for weights, learnt, other in (((1, 0), "fox", "owl"), ((0, 1), "owl", "fox")):
        flags = ["--data_path", *paths, "--weights", *weights, "--vocab_size", 274, "--eval_fraction", 0]
        assert run(*flags)[0] == 0
        vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
        assert learnt in vocabulary and other not in vocabulary


def test_odd_records_are_counted_or_read_and_the_rest_is_learnt(run, tmp_path):
    odd = ["no json", '{"text": "cut', '["a list"]', {"text": None}, {"n": 5}, {"text": ""},
           {"messages": [{"role": "user", "content": "<|im_end|> <think>"}]}, {"a": {"b": ["deep", 1, None]}}]
    path = write(tmp_path / "a.jsonl", [*odd, *records(200)])
    code, out, err = run("--data_path", path, "--vocab_size", 320, "--eval_fraction", 0)
    assert code == 0 and "201 records trained on; held out: none" in out
    assert f"{path}:1: not valid JSON" in err and f"{path}:3: a JSON list" in err and "skipped: 7" in err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(CONTROL_TOKENS) == list(range(len(CONTROL_TOKENS)))


@pytest.mark.parametrize("lines, flags, reason", [
    (["no json"], [], "no usable record"),
    ([{"text": None}], [], "1 of 1 records cannot be used"),
    ([{"text": "a"}, "no", "json"], [], "2 of 3 records cannot be used (first problem: line 2: not valid"),
    ([{"text": "a"}, "no", "json"], ["--allow_unusable"], "give only 272 entries"),  # bytes, control tokens
    (records(3), ["--eval_fraction", "0"], "give only"),
    (records(3), ["--weights", "-1"], "--weights must be at least 0"),
    (records(3), ["--weights", "nan"], "--weights"),
    (records(3), ["--weights", "inf"], "--weights"),
    (records(3), ["--eval_fraction", "nan"], "--eval_fraction"),
    (records(3), ["--vocab_size", "271"], "at least 272"),
    (records(3), ["--vocab_size", "many"], "--vocab_size"),
])
def test_what_can_not_be_done_is_one_line_and_nothing_is_written(run, tmp_path, lines, flags, reason):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("what was there")
    code, _, err = run("--data_path", write(tmp_path / "a.jsonl", lines), *flags)
    assert code == 2 and reason in err.strip().splitlines()[-1] and "Traceback" not in err
    assert files(out) == {"tokenizer.json": b"what was there"}


def test_what_is_not_text_becomes_no_entry(run, tmp_path):
    """Addresses, ids and dumps of web records; JSON in a cell is read as the chat that it is."""
    web = [{"text": f"the fox {i}", "url": f"https://example.org/zzqq{i}", "id": f"urn:zzqq:{i}",
            "dump": "ZZQQ", "meta": {"source": "zzqq"}} for i in range(60)]  # fmt: skip
    chats = [[{"role": "user", "content": f"the owl {i}"}, {"role": "assistant", "content": "yes"}]
             for i in range(60)]  # fmt: skip
    cells = ['"' + json.dumps(chat).replace('"', '""') + '"' for chat in chats]
    table = write(tmp_path / "b.csv", ["id,messages", *(f"zzqq{i},{cell}" for i, cell in enumerate(cells))])
    flags = ["--vocab_size", 280, "--eval_fraction", 0]
    code, out, err = run("--data_path", write(tmp_path / "a.jsonl", web), table, *flags)
    assert code == 0 and err == "" and out.count("60 records trained on") == 2
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    merged = [token for token in list(vocabulary) if len(token) > 1 and not token.startswith("<")]
    assert len(merged) == 280 - 272
    assert all(token.strip("\u0120") in "the fox owl yes 0123456789" for token in merged), merged


def test_a_models_own_tokenizer_stays(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    code, _, err = run("--data_path", write(tmp_path / "a.jsonl", records(200)), "--vocab_size", 300)
    assert code == 2 and "holds a model" in err and list(files(tmp_path / "out")) == ["config.json"]


def test_a_folder_that_can_not_be_written(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    code, _, err = run("--data_path", write(tmp_path / "a.jsonl", records(200)), "--vocab_size", 300)
    assert code == 2 and str(tmp_path / "out") in err and len(err.strip().splitlines()) == 1


def test_without_data_the_embedded_world_is_read(run, tmp_path, monkeypatch):
    """And what measures the models later, the questions of its evaluation, is not among it."""
    import dataset.synthetic

    names = ("pretrain", "sft", "sft_eval", "clinic_test")
    world = {name: write(tmp_path / f"{name}.jsonl", records(100, seed=len(name))) for name in names}
    monkeypatch.setattr(dataset.synthetic, "ensure_world", lambda folder: world)
    code, out, _ = run("--vocab_size", 300)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()[:-1]] == [str(world[n]) for n in names[:2]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_tokenizer(build_tokenizer([record["text"] for record in records(50)], 300), folder)
    return AutoTokenizer.from_pretrained(folder)


def test_every_character_comes_back_though_few_were_seen(small):
    """All 1,112,064 characters that UTF-8 can write, and every byte on its own."""
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    texts = [characters[start:start + 512] for start in range(0, len(characters), 512)]
    encodings = small.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    decoded = small.backend_tokenizer.decode_batch([encoding.ids for encoding in encodings])
    assert decoded == texts
    alphabet = {token for token in small.get_vocab() if len(token) == 1}
    assert len(alphabet) == 256


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text())
def test_a_text_is_the_sum_of_its_lines(small, a, b):
    """No merge crosses a line break before a letter, so what stands on another line changes no token."""
    def encode(text):
        return small.encode(text, add_special_tokens=False)

    assert small.decode(encode(a + b)) == a + b
    assert encode(f"a{a}x\ny{b}z")[:len(encode(f"a{a}x"))] == encode(f"a{a}x")


def test_bytes_per_token_by_hand(small):
    backend = small.backend_tokenizer
    assert bytes_per_token(backend, []) is None and bytes_per_token(backend, [""]) is None
    assert bytes_per_token(backend, ["猫"]) == 1.0  # not among the words above: three bytes, three tokens
    assert bytes_per_token(backend, ["1", "23"]) == 1.0
    tokens = len(backend.encode("the fox").ids) + 3
    assert bytes_per_token(backend, ["the fox", "猫"]) == 10 / tokens
