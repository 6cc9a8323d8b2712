"""What the trainer's tests share: a tiny model, ragged data, and the scripts run inside this process."""

import contextlib
import io
import json
import random
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "full_sft", "lora")


@dataclass
class Ended:
    """How a script ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one complaint. Fails where there is another number of them, or a traceback."""
        lines = [line for line in self.err.splitlines() if "error:" in line]
        assert len(lines) == 1 and "Traceback" not in self.out + self.err, self.out + self.err
        return lines[0]


class Workshop:
    """A folder with data files and a base model, and the training scripts to run on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        rng = random.Random(0)
        words = "the cat sat on a warm stone and the small owl sang 小 猫 在 河 边 睡 觉 of rivers".split()

        def phrase(shortest, longest):
            return " ".join(rng.choices(words, k=rng.randint(shortest, longest)))

        def chat(answers):
            turns = [[("user", phrase(1, 9)), ("assistant", phrase(1, 14))] for _ in range(answers)]
            return {"conversations": [{"role": r, "content": c} for turn in turns for r, c in turn]}

        self.texts = self.write("pretrain.jsonl", [{"text": phrase(3, 40)} for _ in range(45)])
        self.chats = self.write("sft.jsonl", [chat(rng.choice((1, 1, 2))) for _ in range(41)])
        self.base = folder / "base"
        self.launcher = folder / "launch.py"  # runs the script named first, its token caches in our folder
        self.launcher.write_text(
            f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"import dataset.token_cache\ndataset.token_cache.CACHE_DIR = {str(folder / 'cache')!r}\n"
            f"if __name__ == '__main__':\n    del sys.argv[0]\n"
            f"    runpy.run_path(sys.argv[0], run_name='__main__')\n", encoding="utf-8")

    def write(self, name: str, records: list) -> Path:
        """A JSONL file; a record that is text already is written as it is."""
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        path = self.folder / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
        return path

    def command(self, stage: str, *flags) -> list[str]:
        """What follows `python` for a process of its own."""
        return [str(word) for word in (self.launcher, ROOT / "trainer" / f"train_{stage}.py", *flags)]

    def flags(self, stage: str, out_dir: Path, **changes) -> list[str]:
        """A run of a second or less, which logs, validates and saves often, at intervals out of step."""
        flags = {"data_path": self.texts if stage == "pretrain" else self.chats, "out_dir": out_dir,
                 "name": stage, "max_seq_len": 64, "batch_size": 4, "device": "cpu", "dtype": "float32",
                 "eval_fraction": 0.2, "max_steps": 24, "log_interval": 4, "save_interval": 5,
                 "eval_interval": 9, "optimizer": "muon", "learning_rate": 0.01}
        if stage == "pretrain":
            flags |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        else:
            flags |= {"load_from": self.base}
        if stage == "lora":
            flags |= {"lora_rank": 4, "lora_dropout": 0.1, "optimizer": "adamw"}
        words = []
        for name, value in (flags | changes).items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None:
                words += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
        return words

    def run(self, stage: str, *flags) -> Ended:
        """`python trainer/train_STAGE.py FLAGS` in this process, where torch is loaded already."""
        import dataset.token_cache

        script = ROOT / "trainer" / f"train_{stage}.py"
        out, err, code = io.StringIO(), io.StringIO(), 0
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), *(str(flag) for flag in flags)])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(dataset.token_cache, "CACHE_DIR", self.folder / "cache")
            torch.set_num_threads(1)  # as the runs in processes of their own, for results equal to the bit
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    runpy.run_path(str(script), run_name="__main__")
            except SystemExit as ended:
                code = ended.code
            finally:
                torch.set_num_threads(threads)
        return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def tokenizer():
    from model.weights import load_tokenizer

    return load_tokenizer(ROOT / "model" / "tokenizer")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory, tokenizer) -> Workshop:
    from model.weights import save_model

    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    young = {"stage": "pretrain", "parent": None, "tokens": 1000}  # see trainer/defaults.py
    save_model(tiny_model(len(tokenizer)), workshop.base, tokenizer, training=young)
    return workshop


@pytest.fixture(scope="session")
def finished(workshop) -> dict[str, tuple[Path, Ended]]:
    """Stage -> (folder of its run, how it ended): each stage once, from beginning to end, undisturbed."""
    out_dir = workshop.folder / "finished"
    ended = {stage: workshop.run(stage, *workshop.flags(stage, out_dir)) for stage in STAGES}
    for stage in STAGES:
        assert ended[stage].code == 0, ended[stage]
    return {stage: (out_dir / stage, ended[stage]) for stage in STAGES}


def tiny_model(vocab_size: int = 50, seed: int = 0):
    from model.transformer import CausalLM, ModelConfig

    torch.manual_seed(seed)
    return CausalLM(ModelConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2,
                                intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
                                qk_norm=True)).train()


@pytest.fixture(scope="session")
def make_model():
    return tiny_model


@pytest.fixture
def arguments(tmp_path):
    """Flags as parsed, for calling `train` itself: `arguments(batch_size=2)`; run_dir is a fresh folder."""
    from trainer.args import parse_args, training_parser

    def parse(**flags):
        flags = {"out_dir": tmp_path, "name": "run", "device": "cpu", "dtype": "float32", "log_interval": 1,
                 "learning_rate": 1e-3, "warmup_ratio": 0, "eval_interval": 0, "batch_size": 4} | flags
        argv = []
        for name, value in flags.items():
            if value is False and name == "packing":
                argv.append("--no-packing")
            elif value is not False:
                argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return parse_args(training_parser("a test"), argv)

    return parse


def read_log(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")}
            for line in lines]


@pytest.fixture(name="read_log")
def read_log_fixture():
    return read_log
