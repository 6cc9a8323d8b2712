"""The benchmarks run, compare like with like, and their tables add up. How fast is the machine's matter."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest

from benchmarks import lora_ranks, memory, speed
from model.config import preset
from model.quantize import count_parameters

SETTINGS = {"preset": "tiny", "rank": 4, "batch_size": 1, "seq_len": 8, "device": "cpu"}


def cells(text: str) -> dict[str, list[str]]:
    """A printed table: the cells by the name of the row."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: row for name, *row in rows[1:]}


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_memory(monkeypatch, capsys):
    def measure_here(method, checkpointing, args):
        arguments = Namespace(**vars(args) | {"measure": method, "gradient_checkpointing": checkpointing})
        return memory.measure(arguments)

    monkeypatch.setattr(memory, "measure_in_fresh_process", measure_here)
    methods = ["full fine-tuning", "LoRA", "QLoRA"]
    memory.main(Namespace(**SETTINGS, methods=methods, measure=None))
    table = cells(capsys.readouterr().out)
    rows = {name: [float(cell.split()[0]) for cell in row] for name, row in table.items()}
    assert list(rows) == methods
    for _, weights, gradients, optimizer, state, *_ in rows.values():
        assert state == pytest.approx(weights + gradients + optimizer, abs=0.2)  # three rounded figures
    arguments = Namespace(**SETTINGS, measure="full fine-tuning", gradient_checkpointing=False)
    size = 4 * count_parameters(memory.build(preset("tiny"), arguments)[0])
    # AdamW keeps two numbers of float32 for each one that it trains; adapters are a small part.
    assert rows["full fine-tuning"][1:5] == pytest.approx([size / 1e6 * n for n in (1, 1, 2, 4)], abs=0.1)
    assert rows["QLoRA"][4] < rows["LoRA"][4] < 0.5 * rows["full fine-tuning"][4]
    assert rows["QLoRA"][0] == rows["LoRA"][0] < 0.2 * rows["full fine-tuning"][0]


def test_speed_trains_equals():
    def trained(contender, job="lora"):
        model, optimizers = speed.build(Namespace(**SETTINGS, job=job, contender=contender))
        inside = {p for o in optimizers for group in o.param_groups for p in group["params"]}
        assert inside == {p for p in model.parameters() if p.requires_grad}
        return sorted((tuple(p.shape), p.dtype) for p in inside)

    assert trained("LoRA, q and o") == trained("PEFT, q and o")
    assert trained("LoRA, all linear") == trained("PEFT, all linear") == trained("QLoRA, all linear")
    assert len(trained("LoRA, q and o")) == 2 * 2 * 4  # A and B, q and o, layers
    assert trained("Seedling", "pretrain") == trained("transformers", "pretrain")


def test_speed_gives_both_the_same_conversations(tmp_path):
    chats = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three", "four")]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    args = Namespace(**SETTINGS | {"batch_size": 4, "seq_len": 64}, data_path=[path])
    [(ours, our_targets)], [(theirs, their_targets)] = (speed.sft_batches(args, p) for p in (True, False))
    assert our_targets == their_targets > 0
    real = theirs["attention_mask"].bool()
    ours_real = ours["document_ids"] >= 0
    assert ours["input_ids"][ours_real].sort().values.equal(theirs["input_ids"][real].sort().values)
    assert theirs["input_ids"].shape == (4, 64) and ours["input_ids"].numel() < 4 * 64


def test_speed_runs_every_job(tmp_path):
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    path, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    command = [sys.executable, speed.__file__, *flags, "--rounds", "2", "--new_tokens", "2", "--json", path,
               "--plot", picture, "--jobs", "lora", "decode 1 x 32", "save",
               "--contenders", "full fine-tuning", "LoRA, all linear", *speed.JOBS["save"][1]]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {job: list(rows) for job, rows in report["jobs"].items()} == {
        "lora": ["full fine-tuning", "LoRA, all linear"], "decode 1 x 32": ["Seedling"],
        "save": ["Seedling", "write and fsync"]}
    for table in report["jobs"].values():
        for row in table.values():
            assert row["rate"] == sorted(row["rate"]) and row["rate"][0] > 0
    assert cells(done.stdout)["LoRA, all linear"] and picture.stat().st_size > 1000


@pytest.mark.parametrize("ratio, end", [(1.0, ""), (16.0, "_plus16")])
def test_lora_ranks_takes_the_best_rates_and_repeats_nothing(ratio, end, monkeypatch, capsys, tmp_path):
    losses = {"full_0.1": 2.0, "full_0.2": 1.0, f"rank16_0.3{end}": 1.5, f"rank16_0.4{end}": 1.01,
              f"rank2_0.4{end}": 1.2}
    tried = []

    def train(args, script, name, *flags):
        tried.append(name)
        return losses[name]

    monkeypatch.setattr(lora_ranks, "held_out_loss", train)
    rates = {"full_rates": [0.1, 0.2], "lora_rates": [0.3, 0.4]}
    lora_ranks.main(Namespace(load_from=tmp_path, ranks=[2, 16], lora_plus_ratio=ratio, **rates))
    printed = capsys.readouterr().out
    assert cells(printed) == {"full fine-tuning": ["0.2", "1.0000"], "rank 2": ["0.4", "1.2000", "+20.0%"],
                              "rank 16": ["0.4", "1.0100", "+1.0%"]}
    assert len(tried) == len(set(tried)) and printed.count("the last one tried") == 2
