"""Prove that a change of the code changes no result: short fixed runs of every stage, and what they leave.

    python benchmarks/same_bits.py --json after.json                       # this checkout
    python benchmarks/same_bits.py --repo ../old --json before.json        # another one, with its own code
    python benchmarks/same_bits.py --json after.json --compare before.json # exit code 1 where they differ

Each line is a run: its name and a SHA-256 of the final weights, of the world's files, or of greedy answers
and scores. The runs take about eight minutes on two cores and write into a temporary folder only.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def runs() -> dict[str, list[str]]:
    """{name: command line}. A later run starts from what an earlier one left."""
    found = {"pretrain": ["trainer/train_pretrain.py", "--max_steps", "40"],
             "full_sft": ["trainer/train_full_sft.py", "--max_steps", "60", "--load_from", "{out}/pretrain"]}
    for dtype, optimizer, processes, packing in product(
            ("float32", "bfloat16"), ("muon", "adamw"), (1, 2), ("packing", "no-packing")):
        common = ["--max_steps", "5", "--batch_size", "8", "--eval_interval", "0", "--dtype", dtype,
                  "--optimizer", optimizer, f"--{packing}", *(["2 processes"] if processes == 2 else [])]
        kind = f"{dtype} {optimizer} {processes} {packing}"
        found[f"pretrain {kind}"] = ["trainer/train_pretrain.py", *common]
        found[f"full_sft {kind}"] = ["trainer/train_full_sft.py", "--load_from", "{out}/pretrain", *common]
        found[f"lora {kind}"] = ["trainer/train_lora.py", "--load_from", "{out}/full_sft", *common]
        if optimizer == "adamw":
            found[f"qlora {kind}"] = [*found[f"lora {kind}"], "--quantize", "nf4"]
    lora = ["trainer/train_lora.py", "--load_from", "{out}/full_sft", "--max_steps", "5", "--batch_size", "8"]
    found["accumulation"] = [*found["full_sft float32 adamw 1 packing"], "--micro_batch_size", "3"]
    found["checkpointing"] = [*found["full_sft bfloat16 muon 1 packing"], "--gradient_checkpointing"]
    found["lora dropout"] = [*lora, "--lora_dropout", "0.1", "--lora_rank", "4", "--lora_rslora"]
    found["lora pissa"] = [*lora, "--lora_init", "pissa", "--target_modules", "q_proj", "o_proj"]
    found["replay"] = [*lora, "--retain_data_path", "{out}/world/sft_eval.jsonl", "--replay", "0.3"]
    found["fsdp"] = [*found["full_sft bfloat16 adamw 2 packing"], "--parallel", "fsdp"]
    return found


def sha256_of_weights(folder: Path) -> str:
    """The names, types and numbers of all tensors in a folder; what else a file says may change."""
    import torch  # here, so that --help answers at once
    from safetensors.torch import load_file

    sha256 = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha256.update(tensor.contiguous().flatten().view(dtype=torch.uint8).numpy())
    return sha256.hexdigest()[:16]


def measure(repo: Path, python: str, out: Path, only: str) -> dict[str, str]:
    """{name: SHA-256} of each run with the code in `repo`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}

    def run(command: list[str]) -> None:
        done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")

    found = {}
    for seed in ("0", "7"):
        folder = out / ("world" if seed == "0" else "world_7")
        run([python, str(repo / "dataset/synthetic.py"), "--out_dir", str(folder), "--seed", seed])
        for file in sorted(folder.glob("*.jsonl")):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            found[f"world {seed} {file.name}"] = digest
    for name, words in runs().items():
        if only not in name and name not in ("pretrain", "full_sft"):
            continue
        folder = name.replace(" ", "_")
        start = [python]
        if "2 processes" in words:
            start += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
            words = [word for word in words if word != "2 processes"]
        script, *flags = (word.format(out=out) for word in words)
        run([*start, str(repo / script), *flags, "--out_dir", str(out), "--name", folder, "--overwrite"])
        found[name] = sha256_of_weights(out / folder)
        print(f"{name}: {found[name]}", flush=True)
    for name, flags in {"greedy": [], "int8": ["--quantize", "int8", "--limit", "60"],
                        "adapter": ["--lora", str(out / "lora_dropout"), "--limit", "60"]}.items():
        file = out / f"{name}.json"
        run([python, str(repo / "eval_model.py"), "--load_from", str(out / "full_sft"), *flags,
             "--data_path", str(out / "world/sft_test.jsonl"), "--max_new_tokens", "40", "--json", str(file)])
        scores = json.loads(file.read_text(encoding="utf-8"))
        kept = [scores["scores"], f"{scores['loss']:.5f}", [answer["answer"] for answer in scores["answers"]]]
        found[f"eval {name}"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]
        print(f"eval {name}: {found[f'eval {name}']}", flush=True)
    return found


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--repo", type=Path, default=ROOT, metavar="DIR", help="the checkout to run")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="the interpreter to use")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with TEXT in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="earlier results to compare with")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        found = measure(args.repo.resolve(), args.python, Path(out), args.only)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not args.compare:
        return 0
    before = json.loads(args.compare.read_text(encoding="utf-8"))
    shared = [name for name in found if name in before]
    different = [name for name in shared if found[name] != before[name]]
    print(f"{len(shared)} results compared, {len(different)} differ" + "".join(f"\n  {n}" for n in different))
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
