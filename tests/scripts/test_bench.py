"""The benchmarks run, compare like with like, and their tables add up. How fast is the machine's matter."""

import subprocess
import sys
from argparse import Namespace

import pytest

from model.transformer import preset
from scripts import bench_lora, bench_memory, bench_ranks

SETTINGS = {"preset": "tiny", "rank": 4, "batch_size": 1, "seq_len": 8, "device": "cpu"}


def cells(text: str) -> dict[str, list[str]]:
    """A printed table: the cells by the name of the row."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: row for name, *row in rows[1:]}


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_bench_memory(monkeypatch, capsys):
    def measure_here(method, checkpointing, args):
        arguments = Namespace(**vars(args) | {"measure": method, "gradient_checkpointing": checkpointing})
        return bench_memory.measure(arguments)

    monkeypatch.setattr(bench_memory, "measure_in_fresh_process", measure_here)
    methods = ["full fine-tuning", "LoRA", "QLoRA"]
    bench_memory.main(Namespace(**SETTINGS, methods=methods, measure=None))
    table = cells(capsys.readouterr().out)
    rows = {name: [float(cell.split()[0]) for cell in row] for name, row in table.items()}
    assert list(rows) == methods
    for _, weights, gradients, optimizer, state, *_ in rows.values():
        assert state == pytest.approx(weights + gradients + optimizer, abs=0.2)  # three rounded figures
    size = 4 * bench_memory.build(preset("tiny"), Namespace(**SETTINGS, measure="full fine-tuning",
                                                           gradient_checkpointing=False))[0].num_parameters()
    # AdamW keeps two numbers of float32 for each one that it trains; adapters are a small part.
    assert rows["full fine-tuning"][1:5] == pytest.approx([size / 1e6 * n for n in (1, 1, 2, 4)], abs=0.1)
    assert rows["QLoRA"][4] < rows["LoRA"][4] < 0.5 * rows["full fine-tuning"][4]
    assert rows["QLoRA"][0] == rows["LoRA"][0] < 0.2 * rows["full fine-tuning"][0]


def test_bench_lora_compares_equals():
    def trained(method):
        model, optimizers, vocab_size = bench_lora.build(Namespace(**SETTINGS, method=method))
        inside = {p for o in optimizers for group in o.param_groups for p in group["params"]}
        assert inside == {p for p in model.parameters() if p.requires_grad} and vocab_size == 6400
        return sorted((tuple(p.shape), p.dtype) for p in inside)

    assert trained("LoRA, q and o") == trained("PEFT, q and o")
    assert trained("LoRA, all linear") == trained("PEFT, all linear") == trained("QLoRA, all linear")
    assert len(trained("LoRA, q and o")) == 2 * 2 * 4  # A and B, q and o, layers


def test_bench_lora_runs():
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, bench_lora.__file__, *flags, "--rounds", "2", "--steps", "1"]
    methods = ["full fine-tuning", "LoRA, all linear"]
    done = subprocess.run([*command, "--methods", *methods], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(cells(done.stdout)) == methods and "2 rounds of 1 steps, wall time" in done.stdout


def test_bench_ranks_takes_the_best_rate_of_each_and_repeats_nothing(monkeypatch, capsys, tmp_path):
    losses = {"full_0.1": 2.0, "full_0.2": 1.0, "rank16_0.3": 1.5, "rank16_0.4": 1.01, "rank2_0.4": 1.2}
    tried = []

    def train(args, script, name, *flags):
        tried.append(name)
        return losses[name]

    monkeypatch.setattr(bench_ranks, "held_out_loss", train)
    rates = {"full_rates": [0.1, 0.2], "lora_rates": [0.3, 0.4]}
    bench_ranks.main(Namespace(load_from=tmp_path, ranks=[2, 16], **rates))
    printed = capsys.readouterr().out
    assert cells(printed) == {"full fine-tuning": ["0.2", "1.0000"], "rank 2": ["0.4", "1.2000", "+20.0%"],
                              "rank 16": ["0.4", "1.0100", "+1.0%"]}
    assert len(tried) == len(set(tried)) and printed.count("the last one tried") == 2
