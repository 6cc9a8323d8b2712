"""eval_model.py: what a person sees, with a tiny random model and the real tokenizer."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "inference"))

from small_chat_model import make_home, turns, write

import eval_model
from common.cli import run_script
from common.errors import ModelError, UsageError
from inference.chat_model import ChatModel, Sampling
from model.compiled_step import COMPILERS
from model.lora import apply_lora, save_lora
from model.quantize import quantize_model
from model.weights import load_model, load_tokenizer, save_model

ROOT = Path(eval_model.__file__).parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("models"))


def run(home, capsys, *flags, model="chat", stdin=None, monkeypatch=None):
    """stdout and stderr of eval_model with these flags, in this process."""
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    eval_model.main(eval_model.parse_args(["--load_from", str(home / model), *map(str, flags)]))
    return capsys.readouterr()


def script(*flags, stdin="", env=None):
    return subprocess.run(
        [sys.executable, str(ROOT / "eval_model.py"), *map(str, flags)],
        input=stdin,
        text=True,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | (env or {}),
        timeout=60,
    )


# ---------------------------------------------------------------- answers


def test_the_model_says_how_its_words_are_chosen_unless_a_flag_does(home, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "greedy"
    shutil.copytree(home / "chat", folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))

    def sampled(seed, *more, **changes):
        file.write_text(json.dumps(settings | changes), encoding="utf-8")
        flags = ("--prompt", "Hi", "--max_new_tokens", 8, "--seed", seed, *more)
        return run(tmp_path, capsys, *flags, model="greedy").out

    greedy = sampled(3, "--temperature", 0)
    for changes in ({"do_sample": False}, {"top_k": 1}, {"temperature": 1e-6}, {"top_p": 1e-9}):
        assert sampled(3, **changes) == sampled(4, **changes) == greedy, changes
    hot = {"do_sample": True, "temperature": 5.0, "top_p": 1.0}
    assert sampled(3, **hot) != sampled(4, **hot)
    assert sampled(3, "--temperature", 0, **hot) == greedy
    out = run(tmp_path, capsys, model="greedy", stdin="/quit\n", monkeypatch=monkeypatch)
    assert "temperature 5, top_p 1;" in out.err
    # Scores are greedy whatever the file says, so that those of two models can be compared.
    file.write_text(json.dumps(settings | hot | {"repetition_penalty": 5.0}), encoding="utf-8")
    scores = {}
    for model, name in ((home / "chat", "a.json"), (folder, "b.json")):
        data = write(tmp_path / "test.jsonl", turns("Hi", "Hello"), turns("Ho", "Hm"))
        run(model.parent, capsys, "--data_path", data, "--json", tmp_path / name, model=model.name)
        scores[name] = json.loads((tmp_path / name).read_text(encoding="utf-8"))["answers"]
    assert scores["a.json"] == scores["b.json"]


@pytest.mark.parametrize("setting", [
    {"temperature": "hot"}, {"temperature": -1}, {"top_p": 2}, {"top_k": 1.5}, {"repetition_penalty": 0}])
def test_settings_that_cannot_be(setting, home, tmp_path):
    shutil.copytree(home / "chat", tmp_path / "odd")
    file = tmp_path / "odd" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | setting), encoding="utf-8")
    with pytest.raises(ModelError, match=f"generation_config.json: {next(iter(setting))} "):
        ChatModel(tmp_path / "odd")


def test_prompt_gives_the_answer_alone_on_stdout(home, capsys):
    first = run(home, capsys, "--prompt", "Hi", "--max_new_tokens", 8, "--seed", 3)
    assert first.out.strip() and "tokens/s" not in first.out and "tokens/s" in first.err
    assert run(home, capsys, "--prompt", "Hi", "--max_new_tokens", 8, "--seed", 3).out == first.out
    assert run(home, capsys, "--prompt", "Hi", "--max_new_tokens", 8, "--seed", 4).out != first.out


def test_adapter_changes_the_answer_and_a_base_model_continues(home, capsys):
    greedy = ("--prompt", "Hi", "--max_new_tokens", 8, "--temperature", 0)
    answers = [
        run(home, capsys, *greedy).out,
        run(home, capsys, *greedy, "--lora", home / "lora_a").out,
        run(home, capsys, *greedy, "--lora", "lora_b").out,  # beside the model
        run(home, capsys, *greedy, model="base").out,
    ]
    assert len(set(answers)) == 4
    assert run(home, capsys, *greedy, "--plain").out == answers[3]


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")
def test_a_compiled_step_answers_the_same(home, capsys):
    ask = ("--prompt", "What sound does a cow make?", "--temperature", 0, "--max_new_tokens", 8)
    for adapter in ((), ("--lora", "lora_a")):
        plain = run(home, capsys, *ask, *adapter).out
        assert plain.strip() and run(home, capsys, *ask, *adapter, "--compile").out == plain
    with pytest.raises(UsageError, match="--compile needs a model without experts"):
        run(home, capsys, *ask, "--compile", "--dtype", "bfloat16")


def test_int8_answers_and_scores_nearly_as_float32(home, capsys, tmp_path):
    ask = ("--prompt", "What sound does a cow make?", "--temperature", 0, "--max_new_tokens", 8)
    assert run(home, capsys, *ask, "--quantize", "int8").out.strip()
    adapted = run(home, capsys, *ask, "--quantize", "int8", "--lora", "lora_a")
    assert "lora_a" in adapted.err and adapted.out.strip()
    data, losses = write(tmp_path / "texts.jsonl", {"text": "A small red fox."}), []
    for kind in ("none", "int8"):
        run(home, capsys, "--data_path", data, "--json", tmp_path / "s.json", "--quantize", kind)
        losses.append(json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["loss"])
    assert losses[0] != losses[1] and abs(losses[1] / losses[0] - 1) < 0.02
    save_model(quantize_model(load_model(home / "chat")), tmp_path / "nf4", load_tokenizer(home / "chat"))
    with pytest.raises(ModelError, match="quantized already"):
        run(tmp_path, capsys, *ask, "--quantize", "int8", model="nf4")


def test_with_an_adapter_a_base_model_is_asked_and_answers(home, capsys):
    """Adapters are trained on chats, whatever lies below them."""
    greedy = ("--prompt", "Hi", "--max_new_tokens", 8, "--temperature", 0, "--lora", home / "lora_a")
    assert run(home, capsys, *greedy, model="base").out == run(home, capsys, *greedy).out


def test_builtin_prompts_are_all_answered(home, capsys):
    out = run(home, capsys, "--prompts", "--max_new_tokens", 2).out
    assert all(f"> {prompt}\n" in out for prompt in eval_model.PROMPTS)



# ---------------------------------------------------------------- the conversation


def test_chat_obeys_every_command(home, capsys, monkeypatch):
    lines = [
        "hi",
        "/help",
        "/nonsense",
        "/lora",
        "/lora lora_b",
        "hi",
        "/lora none",
        "/lora missing",
        "/temperature 0",
        "/temperature hot",
        "/system Be kind.",
        "",
        "hello",
        "/reset",
        "/quit",
        "never asked",
    ]
    got = run(
        home,
        capsys,
        "--lora",
        home / "lora_a",
        home / "lora_b",
        "--max_new_tokens",
        4,
        "--seed",
        1,
        stdin="\n".join(lines),
        monkeypatch=monkeypatch,
    )
    for text in (
        eval_model.COMMANDS,
        "unknown command /nonsense",
        f"on: {home / 'lora_a'}",
        "(temperature 0)",
        f"{home / 'lora_b'}: 14 layers adapted",
        "(no adapter)",
        "not 'hot'",
        "system message: Be kind.",
        "conversation is forgotten",
    ):
        assert text in got.out, text
    assert got.err.count("tokens/s") == 3  # three questions, nothing after /quit
    assert got.err.count("error: missing") == 1


def answers(home, capsys, monkeypatch, lines, *adapters):
    """{line: what is printed for it} of a greedy conversation that forgets after each answer."""
    text = "\n".join(f"{line}\n/reset" for line in lines)
    flags = ["--lora", *adapters] if adapters else []
    got = run(
        home,
        capsys,
        *flags,
        "--max_new_tokens",
        8,
        "--temperature",
        0,
        stdin=text,
        monkeypatch=monkeypatch,
    )
    return got.out.split("(the conversation is forgotten)\n"), got.err


def test_a_conversation_in_utf_16_is_refused(home, capsys, monkeypatch):
    text = "hi\n".encode("utf-16").decode("utf-8", errors="replace")
    with pytest.raises(UsageError, match="no UTF-8 text"):
        run(home, capsys, stdin=text, monkeypatch=monkeypatch)


def test_adapters_switch_and_mix_in_a_conversation(home, capsys, monkeypatch):
    lines = ["hi", "/lora lora_b", "hi", "/lora", "/lora none", "hi", "/lora lora_a:1 lora_b:0", "hi"]
    lines += ["/lora lora_a:0.5 lora_b:0.5", "hi", "/lora lora_a:1 missing:1", "hi", "/lora lora_a", "hi"]
    out, err = answers(home, capsys, monkeypatch, lines, home / "lora_a", home / "lora_b")
    said = dict(zip([f"{i} {line}" for i, line in enumerate(lines)], out, strict=False))
    (first, _), (second, _), (none, _) = (
        answers(home, capsys, monkeypatch, ["hi"], *adapters)
        for adapters in ([home / "lora_a"], [home / "lora_b"], [])
    )
    assert len({first[0], second[0], none[0]}) == 3
    assert said["0 hi"] == said["7 hi"] == said["13 hi"] == first[0]
    assert said["2 hi"] == second[0] and said["5 hi"] == none[0]
    assert said["9 hi"] == said["11 hi"] and said["9 hi"] not in (first[0], second[0], none[0])
    a, b = home / "lora_a", home / "lora_b"
    assert f"on: {b}; loaded: {b}, {a}; there is: lora_a, lora_b" in said["3 /lora"]
    assert f"({b}: 14 layers adapted)" in said["1 /lora lora_b"]
    assert f"(0.5 {a} + 0.5 {b}: 14 layers adapted)" in said["8 /lora lora_a:0.5 lora_b:0.5"]
    assert err.count("error: missing: not found") == 1
    for path in (a, b):  # loading says once what was found and what the adapter does
        assert err.count(f"{path}: 14/14 layers matched") == 1
    assert "KL" in err and "/lora A:0.7 B:0.3" in eval_model.COMMANDS


def test_an_adapter_that_changes_nothing_is_called_out(home, capsys, tmp_path):
    model = load_model(home / "chat")
    apply_lora(model, rank=2)
    save_lora(model, tmp_path / "idle")
    got = run(home, capsys, "--lora", tmp_path / "idle", "--prompt", "Hi", "--max_new_tokens", 2)
    assert "idle: 14/14 layers matched, but it changes nothing" in got.err


def test_chat_remembers_and_forgets(home, capsys, monkeypatch):
    """What was said is in the next prompt; beyond the trained length the oldest turns go."""
    chat_model, seen = ChatModel(home / "chat"), []

    def say(chat_model, ids, sampling, in_chat):
        seen.append(chat_model.tokenizer.decode(ids))
        return {"role": "assistant", "content": "fine"}

    monkeypatch.setattr(eval_model, "say", say)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("my name is Mia\nmy dog is Rex\n" + "and I have a cat too\n" * 4)
    )
    eval_model.chat(chat_model, Sampling(max_new_tokens=4), [{"role": "system", "content": "Be kind."}])
    assert "Mia" in seen[1] and "fine" in seen[1] and "Mia" not in seen[-1]
    assert all("Be kind." in prompt and prompt.endswith("<|im_start|>assistant\n") for prompt in seen)
    assert "are forgotten" in capsys.readouterr().err


def test_each_answer_has_a_seed_of_its_own(home, capsys, monkeypatch):
    flags = ("--max_new_tokens", 8, "--temperature", 1, "--seed")
    lines = "hi\n/reset\nhi\n/reset\n"
    first, second, _ = run(home, capsys, *flags, 3, stdin=lines, monkeypatch=monkeypatch).out.split("(the c")
    again, _, _ = run(home, capsys, *flags, 4, stdin=lines, monkeypatch=monkeypatch).out.split("(the c")
    assert first != again and second.endswith(again)


def test_base_model_continues_each_line(home, capsys, monkeypatch):
    got = run(
        home,
        capsys,
        "--max_new_tokens",
        3,
        model="base",
        stdin="once upon\n/system x\n",
        monkeypatch=monkeypatch,
    )
    assert "continues what you write" in got.err and "no system message" in got.out


@pytest.mark.skipif(os.name != "posix", reason="signals as on Linux and macOS")
def test_ctrl_c_stops_an_answer_and_not_the_conversation(home):
    flags = [
        "--load_from",
        home / "chat",
        "--max_new_tokens",
        110,
        "--temperature",
        1,
        "--repetition_penalty",
        1.1,
    ]
    code = (
        "import sys, time, eval_model\nfrom inference.chat_model import ChatModel\n"
        "stream = ChatModel.stream\n"
        "def slow(*arguments):\n"
        "    for x in stream(*arguments):\n        time.sleep(0.05); yield x\n"
        "ChatModel.stream = slow\neval_model.main(eval_model.parse_args(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, flags)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"hi\n")
    process.stdin.flush()
    process.stdout.read(5)  # the answer is on its way
    process.send_signal(2)
    out, err = process.communicate(b"/temperature 0\n/quit\n", timeout=30)
    assert b" ..." in out and b"(temperature 0)" in out and process.returncode == 0, err


# ---------------------------------------------------------------- scoring


def test_scoring_counts_what_the_model_answers(home, capsys, tmp_path):
    """References are made from the model's own greedy answers, so the right scores are known."""
    questions = ["a", "what is this?", "你好", "one more question that is a little longer than the others"]
    own = [
        run(home, capsys, "--prompt", q, "--temperature", 0, "--max_new_tokens", 12).out.strip()
        for q in questions
    ]
    data = write(
        tmp_path / "test.jsonl",
        turns(questions[0], own[0], family="exact"),
        turns(questions[1], "no", family="exact"),
        turns(questions[1], "x", answers=["no", own[1]], family="several"),
        turns(questions[2], "x", contains=[own[2][:3], own[2][-2:]], family="parts"),
        turns(questions[2], "x", contains=[own[2][:3], "absent"], family="parts"),
    )
    more = write(tmp_path / "plain.jsonl", turns(questions[3], own[3]))
    samples = write(tmp_path / "samples.jsonl", {"prompt": questions[0]})
    out = run(
        home,
        capsys,
        "--data_path",
        data,
        more,
        samples,
        "--json",
        tmp_path / "new" / "s.json",
        "--max_new_tokens",
        12,
        "--batch_size",
        3,
    ).out
    result = json.loads((tmp_path / "new" / "s.json").read_text(encoding="utf-8"))
    assert result["scores"] == {"exact": 0.5, "several": 1, "parts": 0.5, "plain": 1, "all": 4 / 6}
    assert result["n"] == {"exact": 2, "several": 1, "parts": 2, "plain": 1, "all": 6}
    assert result["tokens_per_second"] > 0 and "bits per byte" in out
    low, high = result["intervals"]["all"]
    assert low < 4 / 6 < high
    assert result["answers"][-1] == {
        "prompt": questions[0],
        "reference": None,
        "reference_tool_calls": [],
        "answer": own[0],
        "reasoning": None,
        "tool_calls": [],
        "ok": None,
        "skipped": None,
        "line": 1,
        "family": "samples",
        "file": str(samples),
    }


# ---------------------------------------------------------------- mistakes, and speed


def test_scores_have_a_place_before_they_are_counted(home, tmp_path):
    path = write(tmp_path / "t.jsonl", turns("a", "b"))
    done = script("--load_from", home / "chat", "--data_path", path, "--json", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is a folder" in done.stderr
    assert not done.stdout


@pytest.mark.skipif(os.name != "posix", reason="a closed pipe as on Linux and macOS")
def test_a_reader_that_leaves_gets_no_traceback(home):
    flags = ["--load_from", str(home / "chat"), "--prompts", "--max_new_tokens", "2"]
    with subprocess.Popen([sys.executable, str(ROOT / "eval_model.py"), *flags], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 1 and "Traceback" not in errors and "Broken pipe" not in errors


def test_mistakes_are_one_line_and_a_nonzero_exit(home, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    out = tmp_path / "s.json"
    out.write_text("kept", encoding="utf-8")
    cases = [
        (["--load_from", tmp_path / "nowhere"], "no model at"),
        (["--load_from", home / "chat", "--lora", tmp_path / "nowhere", "--prompt", "x"], "nowhere"),
        (["--load_from", home / "chat", "--data_path", empty, "--json", out], "empty"),
        (["--load_from", home / "base", "--system", "x", "--prompt", "y"], "base model"),
    ]
    if not torch.cuda.is_available():
        cases.append((["--load_from", home / "chat", "--device", "cuda"], "--device cuda"))
    for flags, words in cases:
        done = script(*flags)
        assert done.returncode == 2 and done.stdout == "", flags
        assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )
    assert out.read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", "a", "--prompts"],
        ["--limit", "3"],
        ["--json", "x"],
        ["--top_p", "0"],
        ["--temperature", "-1"],
        ["--temperature", "1e-40"],
        ["--temperature", "inf"],
        ["--repetition_penalty", "1e-300"],
        ["--seed", "99999999999999999999"],
        ["--lora", ""],
        ["--system", "x", "--plain"],
        ["--bogus"],
        ["--prompt", "x", "--lora", "a", "b"],
        ["--max_new_tokens", "0"],
    ],
)
def test_impossible_flags_are_refused_before_anything_is_loaded(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        eval_model.parse_args(["--load_from", "x", *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_no_model_yet_names_the_command_that_makes_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(eval_model, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        eval_model.parse_args([])
    assert "python trainer/train_full_sft.py" in capsys.readouterr().err


def test_help_is_quick_grouped_and_shows_defaults():
    began = time.perf_counter()
    done = script("--help")
    assert time.perf_counter() - began < 1.5
    assert (
        "choosing words:" in done.stdout
        and "(default: 256)" in done.stdout
        and "(default: 0.9)" in done.stdout
        and "generation_config.json" in done.stdout
    )


def test_piped_chat_as_a_script_in_chinese(home):
    done = script(
        "--load_from", home / "chat", "--max_new_tokens", 3, stdin="你好\n/quit\n", env={"LC_ALL": "C"}
    )
    assert done.returncode == 0 and "tokens/s" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "value, part",
    [("a:x", "'a:x'"), (":0.5", "':0.5'"), ("a:nan", "'a:nan'"), ("a:1e38", "'a:1e38'"), ("a:1 b", "'b'"),
     ("a:0.5 a:0.5", "a is there twice")],
)
def test_what_is_no_mix_says_which_part(value, part):
    with pytest.raises(ModelError, match=part):
        eval_model.parse_mix(value)


def test_a_mix():
    assert eval_model.parse_mix("a:0.7 out/b:-0.3") == {"a": 0.7, "out/b": -0.3}
    assert eval_model.parse_mix("a") == "a"


@pytest.mark.parametrize("flags", [["--prompt", "Hi", "--temperature", 0], ["--prompt", "Hi"], ["--prompts"],
                                   ["--data_path", "DATA"], []])
def test_a_model_that_overflows_is_one_line_and_exit_code_1(home, tmp_path, capsys, monkeypatch, flags):
    broken = tmp_path / "broken"
    shutil.copytree(home / "chat", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # finite, or the file would be refused
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    data = write(tmp_path / "t.jsonl", turns("a", "b"))
    flags = [str(data) if flag == "DATA" else str(flag) for flag in flags]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nHo\n"))
    with pytest.raises(SystemExit) as ended:
        run_script(eval_model.main, eval_model.parse_args(["--load_from", str(broken), *flags]))
    shown = capsys.readouterr()
    *before, line = shown.err.splitlines()
    assert ended.value.code == 1 and not any("error" in other for other in before)
    assert line.startswith("error: token 1 of the answer: the model's numbers are not finite in float32")
    assert "nan" not in shown.out
