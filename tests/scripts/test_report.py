"""scripts/report.py and trainer/symptoms.py: symptoms from logs written by hand, and files of strangers."""

import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UsageError
from trainer import report_page
from trainer.runs import Run, count_parameters, read_run
from trainer.symptoms import CHECKS, THRESHOLDS, find

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("report", ROOT / "scripts" / "report.py")
report = importlib.util.module_from_spec(spec)
sys.modules["report"] = report
spec.loader.exec_module(report)

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checked(HTMLParser):
    """Raises AssertionError for elements that are not closed in turn, and for what makes a request."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.words = [], []
        assert page.startswith("<!doctype html>")
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base", "form"), tag
        assert not {"src", "href", "srcset", "action", "background"} & set(names), (tag, attrs)
        assert not any(name.startswith("on") for name in names), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            assert "url(" not in data and "@import" not in data
        else:
            self.words.append(data)


def write_run(folder: Path, lines: list[dict], finished=True, stage="full_sft", **arguments) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"step": 10 * (i + 1)} | line) + "\n" for i, line in enumerate(lines))
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if finished:
        training = {"stage": stage, "parent": None, "arguments": {"stage": stage} | arguments}
        (folder / "training.json").write_text(json.dumps(training), encoding="utf-8")
    return folder


def log(losses, **more) -> list[dict]:
    """Lines of a run with these losses. more: the values of a name, or one value for all lines."""
    steps = 10 * len(losses)
    return [
        {
            "max_steps": steps,
            "loss": loss,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "skipped": 0,
            "tokens": 100.0 * i,
            "tokens_per_second": 1000.0,
            "seconds": 1.0 * i,
        }
        | {name: value[i] if isinstance(value, list) else value for name, value in more.items()}
        for i, loss in enumerate(losses)
    ]


FALLING = [5.0, 4.0, 3.2, 2.7, 2.4, 2.2, 2.05, 1.95, 1.9, 1.84, 1.81, 1.8, 1.78, 1.77, 1.75]
STILL = [2.0] * 15
PAIRS = {"accuracy": 0.5, "margin": 0.001}
REWARDS = {"reward": 0.01, "signal": 0.5, "cut_off": 0.0}


def names(folder: Path) -> list[str]:
    found = find(read_run(folder))
    for (
        symptom
    ) in found:  # a sentence each; what is seen has its number, and what to try has a flag or script
        assert all(sentence.endswith(".") for sentence in symptom[1:]), symptom
        assert re.search(r"\d", symptom.seen) and re.search(r"--\w|scripts/|programs", symptom.try_next)
    return [symptom.name for symptom in found]


@pytest.mark.parametrize(
    ("symptom", "lines", "arguments"),
    [
        ("loss is flat", log([2.0, 2.02, 1.99, 2.01, 2.0, 2.0, 1.99]), {"learning_rate": 1e-7}),
        ("learning rate too high", log([5, 4, 3, 2.5, 6, 7, 7, 7, 6.5, 6.8, 7, 7, 7, 7, 7]), {}),
        (
            "learning rate too high",
            log([5, 4, 3, 2.5, 2.6, 7, 7.5, 7, 6, 5, 4, 3, 2.5, 2.4, 2.3]),
            {},
        ),  # it recovers
        ("spikes", log([*FALLING[:9], 4.5, *FALLING[10:]]), {}),
        ("spikes", log(FALLING, grad_norm=[1.0] * 10 + [40.0] + [1.0] * 4), {"grad_clip": 1.0}),
        (
            "overfitting",
            [
                line | ({"eval_loss": 2 + abs(i - 5) / 10} if i % 2 else {})
                for i, line in enumerate(log(FALLING))
            ],
            {},
        ),
        ("skipped batches", log(FALLING, skipped=list(range(15))), {}),
        ("preferences not learnt", log([0.693] * 15, **PAIRS), {"stage": "dpo"}),
        ("rewards without signal", log(STILL, **REWARDS | {"signal": 0.02}), {"stage": "grpo"}),
        ("answers cut off", log(STILL, **REWARDS | {"cut_off": 0.6}), {"stage": "grpo"}),
        ("slower and slower", log([0.05] * 30, tokens_per_second=[1000 - 30 * i for i in range(30)]), {}),
    ],
)
def test_each_symptom_is_named_and_nothing_else(tmp_path, symptom, lines, arguments):
    assert names(write_run(tmp_path, lines, **arguments)) == [symptom]
    assert symptom in report_page.findings(read_run(tmp_path))


@pytest.mark.parametrize(
    ("lines", "arguments"),
    [
        (log(FALLING), {}),
        (log([loss + 0.2 * (-1) ** i for i, loss in enumerate(FALLING)]), {}),  # noise
        (log([0.03] * 15), {}),  # there is nothing left to learn
        (log([2.0, 2.0, 2.0]), {}),  # too few lines for any trend
        ([line | {"eval_loss": 2 - i / 20} for i, line in enumerate(log(FALLING))], {}),
        (log(FALLING, skipped=1), {}),
        (log(FALLING, skipped=6), {"dtype": "float16"}),  # the loss scale is found by skipping
        (log([0.69 - i / 100 for i in range(15)], accuracy=0.95, margin=0.02), {"stage": "dpo"}),
        (
            log(STILL, **REWARDS | {"signal": [0.6] * 5 + [0.0] * 10}),
            {"stage": "grpo"},
        ),  # it has learnt all of it
        (
            log(STILL, **REWARDS | {"tokens_per_second": [1000 - 60 * i for i in range(15)]}),
            {},
        ),  # shorter answers
        (log([0.05] * 30, tokens_per_second=[1000, 300, 500, 200, 900] * 6), {}),  # other programs
        (log(FALLING, tokens_per_second=[1000 - 60 * i for i in range(15)]), {}),  # too short to tell
        (log(FALLING, grad_norm=[0.01] * 10 + [0.2] + [0.01] * 4), {}),
    ],
)
def test_healthy_runs_are_silent(tmp_path, lines, arguments):
    assert names(write_run(tmp_path, lines, **arguments)) == []


def test_a_short_log_says_that_little_can_be_seen(tmp_path):
    assert "most symptoms need 6" in report_page.findings(read_run(write_run(tmp_path, log(FALLING[:5]))))
    assert "need" not in report_page.findings(read_run(write_run(tmp_path, log(FALLING[:6]))))


def test_an_adapter_whose_b_stayed_at_zero(tmp_path):
    folder = write_run(tmp_path, log(STILL), stage="lora", lora_rank=2, learning_rate=1e-7)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    tensors = {"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.full((4, 2), 1e-6)}
    save_file(tensors, folder / "adapter_model.safetensors")
    assert names(folder) == ["adapter learnt nothing"]  # and the flat loss is no second symptom
    assert report.trained_of_all(read_run(folder)) == (16, None)
    tensors["x.lora_B.weight"] = torch.full((4, 2), 1e-2)
    save_file(tensors, folder / "adapter_model.safetensors")
    assert names(folder) == ["loss is flat"]


def test_a_loss_worse_than_guessing(tmp_path):
    """The damage was done before the first line of the log, and from there on the loss falls."""
    folder = write_run(tmp_path, log([13.5, 10.5, *FALLING]))
    assert names(folder) == []  # nobody knows the vocabulary
    (folder / "config.json").write_text('{"vocab_size": 6400}', encoding="utf-8")
    assert names(folder) == ["learning rate too high"]
    assert names(write_run(tmp_path, log([8.8, 8.7, *FALLING]))) == []  # with random weights
    noisy = [7.5, 8.1, 6.2, 8.3, 7.8, 8.6, 7.9, 12.0, 7.5, 9.6, 9.3, 8.8, 8.4, 7.4, 6.2, 6.7, 6.4, 6.3, 5.6]
    assert names(write_run(tmp_path, log(noisy))) == ["learning rate too high"]  # it was below, and came back
    assert names(write_run(tmp_path, log([*FALLING[:9], 19.0, *FALLING[9:]]))) == ["spikes"]


@pytest.mark.parametrize("state", ["killed", "checkpoints"])
def test_an_unfinished_run(tmp_path, state):
    lines = [line | {"max_steps": 500} for line in log(FALLING)]
    folder = write_run(tmp_path, lines, finished=state == "checkpoints")
    if state == "checkpoints":  # an earlier run had ended here, and another began
        (folder / "checkpoints" / "step_00000120").mkdir(parents=True)
    assert names(folder) == ["unfinished"]
    found = find(read_run(folder))[0]
    assert "step 150 of 500" in found.seen
    if state == "killed":  # nobody is sent to a checkpoint that is not there
        assert "it has no checkpoint" in found.seen and "--resume" not in found.try_next
    else:
        assert "step 120" in found.seen and "--resume goes on" in found.try_next


def test_every_threshold_is_used_and_has_a_reason():
    source = (ROOT / "trainer" / "symptoms.py").read_text(encoding="utf-8")
    for name, threshold in THRESHOLDS.items():
        assert f'"{name}"' in source.partition("class Symptom")[2], name
        assert len(threshold.reason) > 20
    assert len(CHECKS) == 11


# --- the page -----------------------------------------------------------------------------------------------


def make_page(folder: Path, *flags) -> str:
    report.main(report.parse_args([str(folder), "--no_samples", *flags]))
    page = (folder / "report.html").read_text(encoding="utf-8")
    return page if Checked(page) else page


def test_the_page_is_whole_valid_html_and_makes_no_request(tmp_path, capsys):
    lines = log([5.0] * 400, reward_answers=0.5, memory_gb=3.25)
    lines[200]["loss"] = 40.0
    lines[-1]["eval_loss"] = 5.5
    page = make_page(write_run(tmp_path, lines, max_seq_len=128, dtype="float32"))
    assert page.count("<svg") >= 5 and "memory gb" in page and "prefers-color-scheme: dark" in page
    assert "width=device-width" in page and len(page) < 100_000
    assert "4,000 of 4,000" in page and "--dtype float32" in page
    assert "5 to 5" in page and "<circle" in page
    assert "report  " in capsys.readouterr().out
    assert not list(tmp_path.glob(".*writing"))


def test_a_curve_keeps_the_highest_and_the_lowest_of_many_points():
    points = [(i, 1.0) for i in range(100_000)]
    points[77_777], points[33_333] = (77_777, 9.0), (33_333, 0.5)
    thinned = report_page.thinned(points)
    assert len(thinned) <= 1.1 * report_page.MAX_POINTS and {(77_777, 9.0), (33_333, 0.5)} <= set(thinned)
    assert thinned[0] == points[0] and thinned[-1] == points[-1]


HOSTILE = '</style></td><script>alert(1)</script><img src="http://evil/x" onerror=a>\x00\ud800"\'&amp;'


@pytest.mark.parametrize(
    "metrics",
    [
        "",
        "\n\n",
        "{",
        "[1]\n" * 3,
        '{"step": 1',
        "\x00\xff",
        "[" * 100_000,
        '{"step": "a"}\n{"step": -1, "loss": 1}',
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity, "eval_loss": -Infinity}',
        '{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}\n{"step": 3, "loss": 5e-324}',
        '{"step": 1, "loss": 1' + "0" * 400 + "}",
        '{"step": 1' + "0" * 400 + ', "loss": 1}',
        '{"step": true, "loss": 2}',
        "".join(json.dumps({"step": i, f"name {i}": i}) + "\n" for i in range(300)),
        "".join(
            json.dumps({"step": i, "loss": {}, "max_steps": "x", "grad_norm": None}) + "\n" for i in range(20)
        ),
        json.dumps({"step": 3, "loss": 1.0, HOSTILE: 2.0, f"eval_{HOSTILE}": 3}),
        "".join(
            json.dumps({"step": 30 - i, "loss": -1.0 * i, "max_steps": -5, "skipped": -3}) + "\n"
            for i in range(30)
        ),
        "".join(
            json.dumps({"step": i, "loss": 0.0, "grad_norm": 0, "eval_loss": 0}) + "\n" for i in range(30)
        ),
    ],
)
def test_damaged_logs_give_a_page(tmp_path, metrics):
    write_run(tmp_path, [])
    (tmp_path / "metrics.jsonl").write_text(metrics, encoding="utf-8", errors="surrogatepass")
    page = make_page(tmp_path)
    assert "<script" not in page and "evil" not in page.replace("http://evil/x&quot;", "")


@pytest.mark.parametrize(
    "training",
    [
        "",
        "{",
        "[]",
        "null",
        '{"arguments": 3, "content": [], "versions": "x", "parent": 7, "tokens_seen": "a"}',
        json.dumps(
            {
                "stage": HOSTILE,
                "parent": "\x00" + "x" * 9000,
                "git": HOSTILE,
                "content": {HOSTILE: HOSTILE},
                "arguments": {HOSTILE: HOSTILE, "learning_rate": "x", "lora_rank": [], "grad_clip": True},
                "versions": {HOSTILE: HOSTILE},
                "finished": HOSTILE,
                "retention": {"before": {"new": HOSTILE}},
            }
        ),
        json.dumps(
            {
                "retention": {
                    "before": {HOSTILE: {"samples": 3, "loss": 1.0, "exact": None}},
                    "after": {HOSTILE: {"samples": 3, "loss": 2.0, "exact": 0.5}},
                }
            }
        ),
    ],
)
def test_damaged_and_hostile_training_json_gives_a_page(tmp_path, training):
    write_run(tmp_path, log(FALLING))
    (tmp_path / "training.json").write_text(training, encoding="utf-8")
    page = make_page(tmp_path)
    assert "<script" not in page and 'src="http' not in page


def test_what_was_forgotten_is_shown(tmp_path):
    write_run(tmp_path, log(FALLING))
    sides = {
        "new": {"loss": 2.5, "exact": 0.25, "answers": 4, "samples": 1234},
        "old": {"loss": 0.5, "exact": None, "answers": 0, "samples": 99},
    }
    training = {"stage": "full_sft", "retention": {"before": sides, "after": sides}}
    (tmp_path / "training.json").write_text(json.dumps(training), encoding="utf-8")
    page = make_page(tmp_path)
    assert "What was forgotten" in page and "1,234" in page and "25.0%" in page


@pytest.mark.parametrize("what", ["absent", "empty", "a file", "runs inside"])
def test_no_run_is_one_clear_line(tmp_path, what):
    folder = tmp_path / "here"
    if what == "a file":
        folder.write_text("x", encoding="utf-8")
    elif what != "absent":
        folder.mkdir()
    if what == "runs inside":
        write_run(folder / "my_sft", log(FALLING))
    with pytest.raises(
        UsageError, match="my_sft" if what == "runs inside" else "no run|no such folder"
    ) as error:
        make_page(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not (folder / "report.html").exists()


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    folder = write_run(tmp_path / "run", log(FALLING))
    (folder / "p.html").mkdir()
    with pytest.raises(OSError, match="directory"):
        report.main(report.parse_args([str(folder), "--no_samples", "--out", str(folder / "p.html")]))
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "p.html", "training.json"]


def test_the_page_replaces_no_weights(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.parse_args([str(tmp_path), "--out", str(tmp_path / "model.safetensors")])
    assert "must end in .html" in capsys.readouterr().err


def test_damaged_weights_have_no_parameters(tmp_path):
    from common.errors import ModelError

    for content in (b"", b"\xff" * 8, b"\x05" + bytes(7) + b"[1,2]", b"\x02" + bytes(7) + b"{}"):
        (tmp_path / "model.safetensors").write_bytes(content)
        try:
            assert count_parameters(tmp_path / "model.safetensors") == 0
        except ModelError as error:
            assert "\n" not in str(error)


# --- samples ------------------------------------------------------------------------------------------------


def test_what_goes_round_in_circles():
    assert report.loops([1, 2] + [7, 8, 9] * 4) and report.loops([5] * 12) and report.loops([3] + [7, 8] * 6)
    assert (
        not report.loops([7, 8, 9] * 3) and not report.loops([5] * 11) and not report.loops(list(range(60)))
    )
    assert not report.loops([7, 8, 9] * 8 + [1]) and not report.loops([])
    phrase = list(range(32))
    assert report.loops(phrase * 4) and not report.loops([*phrase, 32] * 4)  # too long a phrase
    assert report.distinct([[1, 2, 1, 2]], 1) == 0.5 and report.distinct([[1, 2, 1, 2]], 2) == 2 / 3
    assert report.distinct([[1], []], 2) == 1.0


@pytest.fixture
def tiny(tmp_path):
    """A model folder with random weights, and chats for it whose words are hostile."""
    from model.transformer import CausalLM, ModelConfig
    from model.weights import load_tokenizer, save_model

    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
        )
    )
    save_model(model, tmp_path / "base", tokenizer)
    asked = '<script>alert("asked")</script> \x01'
    chats = tmp_path / "chats.jsonl"
    chat = {
        "conversations": [{"role": "user", "content": asked}, {"role": "assistant", "content": "<b>Yes</b>"}]
    }
    chats.write_text(f"{json.dumps(chat)}\nbroken\n" * 3, encoding="utf-8")
    return tmp_path / "base", chats, model, tokenizer


def run_with(tmp_path, tiny) -> Path:
    from model.weights import save_model

    base, chats, model, tokenizer = tiny
    folder = write_run(tmp_path / "run", log(FALLING))
    training = {
        "stage": "full_sft",
        "parent": str(base),
        "arguments": {
            "data_path": [str(chats)],
            "eval_data_path": [str(tmp_path / "moved.jsonl")],
            "max_seq_len": 128,
        },
    }
    save_model(model, folder, tokenizer, training=training)
    return folder


def test_samples_losses_and_repetition_of_a_real_model(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(report, "MAX_NEW_TOKENS", 16)
    folder = run_with(tmp_path, tiny)
    report.main(
        report.parse_args([str(folder), "--data_path", str(tiny[1]), "--out", str(tmp_path / "p.html")])
    )
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    words = " ".join(Checked(page).words)
    assert '<script>alert("asked")</script> \ufffd' in words and "<b>Yes</b>" in words
    assert "before" in words and "after" in words and "go round in circles" in words
    assert "chats.jsonl (training)" in words and "Learnt, or memorised?" in words
    assert not (folder / "report.html").exists()
    held = tmp_path / "moved.jsonl"  # a file that has moved, and is named, takes its old role
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / "elsewhere" / held.name
    place.write_bytes(tiny[1].read_bytes())
    assert report.files_of(read_run(folder), [place]) == [("held out", place), ("training", tiny[1])]


def test_no_model_no_samples_but_a_page(tmp_path, tiny):
    folder = run_with(tmp_path, tiny)
    (folder / "model.safetensors").write_bytes(b"cut off")
    (tiny[0] / "config.json").write_text("{", encoding="utf-8")
    report.main(report.parse_args([str(folder)]))
    page = (folder / "report.html").read_text(encoding="utf-8")
    words = " ".join(Checked(page).words)
    assert "model.safetensors" in words and "Curves" in words and "go round in circles" not in words


def test_a_checkpoint_answers(tmp_path, tiny):
    """The state of a run that stopped is unpacked to the model that it holds."""
    from trainer.checkpoint import save_checkpoint

    _, _, model, _ = tiny
    folder = write_run(tmp_path / "run", log(FALLING), finished=False)
    settings = {
        "--stage": "full_sft",
        "--load_from": str(tiny[0]),
        "--learning_rate": "0.007",
        "--lora_rank": "0",
        "--data_path": f"['{tiny[1]}']",
        "training data of": "x",
    }
    changed = {name: p.detach() + 0.5 for name, p in model.named_parameters()}
    save_checkpoint(folder, 120, {"parameters": changed, "settings": settings}, keep_last=2)
    run = read_run(folder)
    assert run.stage == "full_sft" and run.flag("learning_rate") == 0.007 and run.is_unfinished
    notes = []
    found = report.models_of(run, tmp_path / "unpacked", notes)
    assert [asked.name for asked in found] == ["before", "step 120"] and not notes
    from model.weights import load_model

    loaded = load_model(found[1].path)
    assert all(torch.equal(p, changed[name]) for name, p in loaded.named_parameters())


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    folder = write_run(tmp_path, log(FALLING))
    with pytest.raises(UsageError, match="gone.jsonl: there is no such file"):
        report.main(report.parse_args([str(folder), "--data_path", str(tmp_path / "gone.jsonl")]))


def test_samples_need_a_model():
    with pytest.raises(SystemExit):
        report.parse_args(["run", "--no_samples", "--data_path", "x.jsonl"])


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([[3.0, 0.5], [3.0, 0.52]], "equally well"),
        ([[3.0, 0.5], [3.0, 0.7]], "some of its examples"),
        ([[3.0, 0.05], [3.0, 0.9]], "memorised many"),
        # Held-out records were twice as hard from the start, and the page says so.
        ([[1.0, 0.5], [2.0, 1.0]], "the model before the run found harder, too (1.000 and 2.000), about"),
        ([[0.889, 0.903], [1.13, 1.14]], "was 0.889 before the run and is 0.903 now: it learnt next to"),
        ([[0.01, 0.005], [0.01, 0.006]], "equally well"),
        ([[3.0, 0.5]], "--data_path"),
    ],
)
def test_whether_it_learnt_or_memorised(losses, said):
    names = ["a.jsonl (training)", "b.jsonl (held out)"]
    assert said in report.verdict(Run(Path(".")), dict(zip(names, losses, strict=False)))


def test_the_benchmark_plants_every_symptom():
    from benchmarks.symptoms import FAULTS, HARM, HEALTHY, PLANTED

    assert {name.partition(" (")[0] for name in PLANTED} == set(CHECKS)
    assert len(HEALTHY) == 4 and {*FAULTS, *HARM} <= set(PLANTED)
