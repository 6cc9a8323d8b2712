"""The two READMEs: every command on them runs, in the order of the page; every file they name is there."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forks
import httpx
import openai
import pytest
from test_architecture import SPINE, code_lines

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README_zh.md")
# What the page's commands need less of here: enough to run each from its first line to its last.
SHORTER = {"train": "--max_steps 2 --batch_size 2 --eval_interval 0 --device cpu --dtype float32",
           "eval_model.py": "--max_new_tokens 4 --device cpu"}  # a script that trains nothing needs none


def blocks(name: str, language: str) -> list[str]:
    """Lines of the README's code blocks in a language."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in found for line in block.splitlines() if line.strip()]


def commands(name: str) -> list[str]:
    """Every command: the lines of code blocks, and `python ...` within a sentence."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return blocks(name, "bash") + re.findall(r"(?<!`)`((?:python|bash|torchrun) [^`\n]+)`", text)


def tracked() -> list[str]:
    """The files of the repository that git knows of."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository as a clone has it, with the README's records as own files and a stand-in quickstart."""
    folder = tmp_path_factory.mktemp("readme") / "seedling"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    records = blocks("README.md", "jsonl")
    texts = [line for line in records if line.startswith('{"text"')]
    chats = [line for line in records if line not in texts]
    assert len(texts) == 1 and len(chats) == 4
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    pair, prompt = re.findall(r'`({"prompt": [^`]+})`', page)
    for name, lines in (("my_text", texts * 40), ("my_chats", chats * 10), ("my_test", chats),
                        ("my_pairs", [pair] * 10), ("my_prompts", [prompt] * 10)):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    plant_quickstart(folder / "out" / "quickstart")
    return folder


def plant_quickstart(out: Path) -> None:
    """What the quickstart leaves (tests/test_quickstart.py runs it), here with random weights."""
    from model.lora import apply_lora, save_lora
    from model.transformer import CausalLM, ModelConfig
    from model.weights import load_tokenizer, save_model

    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    model = CausalLM(ModelConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=1, intermediate_size=64))
    save_model(model, out / "full_sft", tokenizer)
    save_model(model, out / "pretrain", tokenizer, training={"stage": "pretrain"})
    apply_lora(model, 2)
    for name in ("lora_identity", "lora_clinic"):
        save_lora(model, out / name, base=out / "full_sft")


def as_run(command: str) -> list[str]:
    """A command as this test runs it: this interpreter, and few steps."""
    program, *words = shlex.split(command, comments=True)
    if program == "torchrun":  # --standalone: a free port, as other tests may train at this moment
        program, words = "python", ["-m", "torch.distributed.run", "--standalone", *words]
    assert program == "python", command
    script = next(word for word in words if word.endswith(".py"))
    kind = "train" if Path(script).name.startswith("train_") else script
    strict = ["--strict"] if kind == "train" and "--data_path" in words else []
    less = {"train_pretrain.py": ["--num_hidden_layers", "1"] if "--preset" in words else [],
            "train_grpo.py": ["--group_size", "2"]}.get(Path(script).name, [])
    return [sys.executable, *words, *SHORTER.get(kind, "").split(), *strict, *less]


def test_both_languages_show_the_same_commands_records_and_figures():
    english, chinese = READMES
    assert commands(english) == commands(chinese) and len(commands(english)) > 10
    assert blocks(english, "jsonl") == blocks(chinese, "jsonl")
    figures = [set(re.findall(r"\d\.\d{2,3}|FILL_\w+", (ROOT / name).read_text(encoding="utf-8")))
               for name in READMES]
    assert figures[0] == figures[1]


def test_python_commands_run_in_the_order_of_the_page(copy):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"}
    environment.pop("PYTHONPATH", None)
    for command in commands("README.md"):
        if command.startswith("bash "):
            continue
        if "serve_openai_api.py" in command:  # it runs until somebody stops it
            assert_serves(as_run(command), copy, environment)
            continue
        said, code = run(as_run(command), copy, environment, "Hello\n/lora lora_clinic\n")
        assert code == 0, f"{command}\n{said}"
        assert "error:" not in said and "Traceback" not in said, f"{command}\n{said}"
        name = re.search(r"--name (\S+)", command)
        if name:
            assert (copy / "out" / name[1] / "training.json").exists(), command
        if "--resume" in command:
            assert "is finished already" in said


def run(command: list[str], folder: Path, environment: dict[str, str], typed: str) -> tuple[str, int]:
    """(what a command prints, its exit code). torchrun is started as it is, and a script in a fork."""
    if command[1] == "-m":
        ended = subprocess.run(command, cwd=folder, env=environment, input=typed, capture_output=True,
                               encoding="utf-8", timeout=300)
        return ended.stdout + ended.stderr, ended.returncode
    process = forks.start(command[1:], cwd=folder, env=environment, input=typed)
    return "".join(process.communicate(timeout=300)), process.returncode


def assert_serves(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """The server starts, answers OpenAI's client and a browser, and stops."""
    with subprocess.Popen([*command, "--port", "0"], cwd=folder, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8") as server:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any")
        names = [model.id for model in client.models.list()]
        assert names == ["full_sft", "lora_identity", "lora_clinic", "pretrain"]
        for name in names:
            messages = [{"role": "user", "content": "Hello"}]
            answer = client.chat.completions.create(model=name, messages=messages, max_tokens=4)
            assert answer.choices[0].finish_reason in ("stop", "length")
        assert "Seedling" in httpx.get(address).text
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 130 and "Traceback" not in server.stderr.read()


def test_shell_commands():
    shown = [shlex.split(command) for command in commands("README.md") if command.startswith("bash ")]
    assert {words[1] for words in shown} == {"scripts/quickstart.sh", "scripts/test.sh"}
    assert all(len(words) == 2 for words in shown), "flags of a shell script are checked by nobody"
    if shutil.which("bash"):
        for words in shown:
            subprocess.run(["bash", "-n", ROOT / words[1]], check=True)


@pytest.mark.parametrize("name", READMES)
def test_every_file_named_is_there_and_every_source_file_is_named(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    files = tracked()
    folders = "common|model|dataset|trainer|inference|scripts"
    sources = [f for f in files if re.fullmatch(rf"(({folders})/)?\w+\.(py|sh)", f)]
    named = set(re.findall(r"\w+\.(?:py|sh)\b", "\n".join(blocks(name, "text"))))
    assert named == {Path(f).name for f in sources if not f.endswith("__init__.py")}
    for path in re.findall(rf"\b(?:{folders}|benchmarks|tests)/[\w/]*(?:\.\w+)?", text):
        assert path in files or any(f.startswith(path.rstrip("/") + "/") for f in files), path
    assert len(text.splitlines()) <= 175


@pytest.mark.parametrize("name", READMES)
def test_the_lines_of_the_spine_are_counted(name):
    text, total = (ROOT / name).read_text(encoding="utf-8"), 0
    rows = re.findall(r"^\| (`[\w/.]+\.py`(?:, `[\w/.]+\.py`)*) \|.*\| (\d+) \|$", text, re.MULTILINE)
    for files, lines in rows:
        paths = re.findall(r"`([\w/.]+)`", files)
        assert sum(code_lines(ROOT / path) for path in paths) == int(lines), files
        total += int(lines)
    assert {path for files, _ in rows for path in re.findall(r"`([\w/.]+)`", files)} == set(SPINE)
    assert f"{total:,}" in text
