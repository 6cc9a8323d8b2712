"""What a run must not import: each of these costs as long as torch itself, and is needed later or never."""

import subprocess
import sys
from pathlib import Path

import torch

from common.fast_start import AdamW

ROOT = Path(__file__).resolve().parents[1]
# PyTorch's compiler and what it brings along, and what draws, logs and reads tables
SLOW = ["torch._dynamo", "torch._inductor", "sympy", "pandas", "sklearn", "matplotlib", "wandb", "peft",
        "bitsandbytes", "transformers.models.auto.modeling_auto", "transformers.modeling_utils"]


def imported_by(script: str, *flags, until: str = "") -> list[str]:
    """Which of SLOW are there when the script has printed `until`, or at its end."""
    code = f"""
import builtins, runpy, sys
say = lambda: sys.stderr.write("FOUND " + " ".join(m for m in {SLOW!r} if m in sys.modules) + "\\n")
def print_(*texts, _print=print, **more):
    _print(*texts, **more)
    if {until!r} and {until!r} in str(texts):
        say()
builtins.print = print_
sys.argv = {[script, *map(str, flags)]!r}
runpy.run_path(sys.argv[0], run_name="__main__")
{'' if until else 'say()'}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("FOUND")).split()[1:]


def test_runs_import_nothing_slow_before_their_first_step(tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "A small red fox."}\n' * 8, encoding="utf-8")
    flags = ["--data_path", data, "--out_dir", tmp_path, "--max_steps", 1, "--eval_fraction", 0,
             "--device", "cpu"]
    assert imported_by("trainer/train_pretrain.py", *flags, until="step 1/1") == []
    base = tmp_path / "pretrain"  # weights are read
    flags += ["--load_from", base, "--name", "again"]
    assert imported_by("trainer/train_pretrain.py", *flags, until="step 1/1") == []
    assert imported_by("eval_model.py", "--load_from", base, "--prompt", "A", "--max_new_tokens", 2) == []


def test_adamw_without_the_compiler_is_pytorchs():
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    for fused in (False, True):
        trained = []
        for kind in (torch.optim.AdamW, AdamW):
            weight = torch.nn.Parameter(start.clone())
            optimizer = kind([weight], lr=0.1, weight_decay=0.1, fused=fused)
            for gradient in gradients:
                weight.grad = gradient.clone()
                optimizer.step()
            trained.append((weight, optimizer.state_dict()["state"][0]["exp_avg_sq"]))
        assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_optimizers_and_models_without_memory_import_nothing_slow(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import torch
from common.fast_start import AdamW, Optimizer, give_memory, without_initial_values

class Plain(Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        pass

with torch.device("meta"), without_initial_values():
    model = torch.nn.Linear(3, 2)
give_memory(model, "cpu")
torch.nn.init.ones_(model.weight)
assert model.weight.device.type == "cpu" and (model.weight == 1).all()
for optimizer in (AdamW(model.parameters()), Plain(model.parameters())):
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert model.weight.grad is None and len(optimizer.state_dict()["param_groups"]) == 2
""", encoding="utf-8")
    assert imported_by(str(script)) == []
