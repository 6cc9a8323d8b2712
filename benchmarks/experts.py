"""What a mixture of experts costs and what it brings, beside a dense model that computes as much for a token.

    python benchmarks/experts.py --jobs speed                 # a step of tiny and 26m, dense and with experts
    python benchmarks/experts.py --jobs speed --minimind ../minimind --rounds 10       # a clone of MiniMind
    OMP_NUM_THREADS=1 python benchmarks/experts.py --jobs speed --clock cpu    # on a machine that others use
    python benchmarks/experts.py --jobs pays --out_dir out/experts --steps 2000
    python benchmarks/experts.py --jobs pays --out_dir out/experts --data_path en.jsonl zh.jsonl --steps 2000

All of them have equal active parameters: 4 experts of the dense size, of which a token uses one, or 8 of half
that size, of which it uses two.

speed: steps of 8 rows of 512 tokens. Each contender has a process of its own, and they take turns, round
after round. A ratio compares two contenders within the same round; shown is the median.

pays: train_pretrain.py, dense and with both kinds of experts, on the same data with the same seeds, for the
same tokens. Every run that is done is a line in OUT_DIR/results.jsonl. The same command goes on after a stop,
and prints the table at its end. With experts the validation loss is measured once more, with the scores of
each token dealt out to the experts at random: if a router has learnt anything, this loss is higher.
"""

import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import drop_gradients, markdown, output_of, take_turns
from common.cli import ROOT, Parser, count, run_script, seed
from common.files import json_text, read_json, write_whole

DENSE, LARGE, SMALL = "dense", "4 experts", "8 half experts"
THEIRS, MINIMIND = "transformers' experts", "MiniMind's experts"  # as large and as many as those of LARGE
MINIMIND_FILE = Path("model", "model_minimind.py")


def main(args):
    if args.contender:
        work(args)
        return
    from model.config import preset  # here, so that --help answers at once

    for name in args.presets:  # an unknown one would otherwise end a process minutes later
        preset(name)
    if "speed" in args.jobs:
        measured = {f"{preset}, {optimizer}": turns_of(preset, optimizer, args)
                    for preset in args.presets for optimizer in args.optimizers}
        print(f"\n{speed_table(measured)}", flush=True)
        if args.json:
            write_whole(args.json, json_text(measured))
    if "pays" in args.jobs:
        results = [run_once(kind, number, args) for number in args.seeds for kind in (DENSE, LARGE, SMALL)]
        print(f"\n{pays_table(results)}")


def experts_of(kind: str, dense) -> dict:
    """{flag of train_pretrain.py: value} of DENSE, LARGE or SMALL. dense: a ModelConfig without experts."""
    return {DENSE: {}, LARGE: {"num_experts": 4},
            SMALL: {"num_experts": 8, "experts_per_token": 2, "norm_topk_prob": True,
                    "moe_intermediate_size": dense.intermediate_size // 2}}[kind]


# --- a step -------------------------------------------------------------------------------------------------


def turns_of(preset: str, optimizer: str, args) -> dict[str, list[float]]:
    """{contender: the seconds of its step in each round}. The first round warms up and is not counted."""
    names = [DENSE, LARGE, SMALL, THEIRS, *([MINIMIND] if args.minimind else [])]
    command = [sys.executable, __file__, "--presets", preset, "--optimizers", optimizer, "--dtype",
               args.dtype, "--rows", str(args.rows), "--tokens", str(args.tokens), "--clock", args.clock]
    command += ["--minimind", str(args.minimind)] if args.minimind else []
    workers = {name: subprocess.Popen([*command, "--contender", name], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True) for name in names}
    seconds = {name: [] for name in names}
    for _, name, answer in take_turns(workers, args.rounds):
        seconds[name].append(float(answer))
    print(f"{preset}, {optimizer}: {json.dumps(seconds)}", file=sys.stderr, flush=True)
    return seconds


def work(args) -> None:
    """The process of one contender: for each line that it reads it takes a step, and says how long it was."""
    import torch

    from common.device import keep_freed_memory

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is no answer
    torch.manual_seed(0)
    keep_freed_memory()
    step, clock = step_of(args), time.perf_counter if args.clock == "wall" else time.process_time
    for _ in sys.stdin:
        began = clock()
        step()
        print(clock() - began, file=answers, flush=True)


def step_of(args):
    """A function that takes one step with the model of args.contender."""
    import torch

    from common.device import autocast
    from trainer.losses import cross_entropy
    from trainer.optim import build_optimizers

    dtype, device = getattr(torch, args.dtype), torch.device("cpu")
    model = model_of(args).train()
    parameters = list(model.parameters())
    optimizers = build_optimizers(model, args.optimizers[0], 1e-4, 0.0, dtype=dtype)
    ids = torch.randint(6400, (args.rows, args.tokens))

    def loss():
        if args.contender == THEIRS:
            return model(input_ids=ids, labels=ids, output_router_logits=True).loss
        if args.contender == MINIMIND:
            output = model(input_ids=ids, labels=ids)
            return output.loss + output.aux_loss
        total, _ = cross_entropy(model, {"input_ids": ids, "labels": ids, "document_ids": None})
        return total / ids.numel()

    def step():
        with autocast(device, dtype):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        drop_gradients(optimizers)

    return step


def model_of(args):
    """The model of args.contender, its weights at random. All of them have norms of queries and keys."""
    from dataclasses import replace

    from model.transformer import CausalLM, preset
    from trainer.args import EXPERT_FLAGS

    dense = replace(preset(args.presets[0]), qk_norm=True)
    kind = LARGE if args.contender in (THEIRS, MINIMIND) else args.contender
    config = replace(dense, **{EXPERT_FLAGS[flag]: value for flag, value in experts_of(kind, dense).items()})
    if args.contender == THEIRS:
        import transformers

        from model.config_file import config_to_dict

        raw = config_to_dict(config) | {"use_cache": False}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**raw))
    if args.contender == MINIMIND:
        spec = importlib.util.spec_from_file_location("model_minimind", args.minimind / MINIMIND_FILE)
        theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        return theirs.MiniMindForCausalLM(theirs.MiniMindConfig(
            hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers, use_moe=True,
            num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
            intermediate_size=config.intermediate_size, moe_intermediate_size=config.intermediate_size,
            num_experts=config.num_experts, num_experts_per_tok=1, norm_topk_prob=False, vocab_size=6400))
    return CausalLM(config)


def speed_table(measured: dict) -> str:
    rows = []
    for name, seconds in measured.items():
        for contender, found in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(found, seconds[DENSE], strict=True))
            rows.append({"step of": name, "contender": contender, "ms": 1e3 * statistics.median(found),
                         "beside dense": ratio})
    return markdown(rows, {"ms": ",.0f", "beside dense": ".2f"})


# --- what it brings -----------------------------------------------------------------------------------------


def run_once(kind: str, number: int, args) -> dict:
    """The result of one run, of OUT_DIR/results.jsonl where it is there already."""
    from model.config import preset

    path = args.out_dir / "results.jsonl"
    settings = {"kind": kind, "seed": number, "steps": args.steps, "flags": args.flags,
                "data": [str(file) for file in args.data_path or []], "preset": args.presets[0]}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        found = json.loads(line)
        if {name: found.get(name) for name in settings} == settings:
            return found
    data = "_".join(Path(file).stem for file in settings["data"]) or "world"
    name = f"{args.presets[0]}_{kind}_{data}_{args.steps}_{number}".replace(" ", "_")
    command = [sys.executable, ROOT / "trainer" / "train_pretrain.py", "--preset", args.presets[0], "--name",
               name, "--out_dir", args.out_dir, "--seed", number, "--max_steps", args.steps,
               "--eval_interval", 0, "--resume", *shlex.split(args.flags)]
    for flag, value in experts_of(kind, preset(args.presets[0])).items():
        command += [f"--{flag}"] if value is True else [f"--{flag}", value]
    command += ["--data_path", *args.data_path] if args.data_path else []
    print(f"{name} ...", file=sys.stderr, flush=True)
    output_of(command)
    result = settings | result_of(args.out_dir / name)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return result


def result_of(folder: Path) -> dict:
    """What a finished run says: loss, time, parameters; with experts their load, and the random routing."""
    from trainer.runs import count_parameters, read_run

    run = read_run(folder)
    last = {name: run.values(name)[-1] for name in ("eval_loss", "seconds", "tokens")}
    result = {"loss": last["eval_loss"], "seconds": last["seconds"], "tokens": last["tokens"],
              "parameters": count_parameters(folder / "model.safetensors")}
    if run.router_loads:
        load = run.router_loads[-1][1]
        result |= {"load": load, "least_used": min(map(min, load)) * len(load[0]),
                   "most_used": max(map(max, load)) * len(load[0]), "random_loss": random_loss(folder)}
    return result


def random_loss(folder: Path) -> float:
    """The validation loss of a run's model where each token goes to an expert chosen at random."""
    import torch

    from dataset.lm_dataset import PretrainDataset
    from model.held_out import mean_loss
    from model.moe import Router
    from model.weights import load_model, load_tokenizer
    from trainer.distributed import Ranks
    from trainer.stage import load_data

    arguments = read_json(folder / "training.json")["arguments"]
    ranks = Ranks(0, 1, torch.device("cpu"))
    _, batches, _ = load_data(PretrainDataset, load_tokenizer(folder), ranks, **arguments)
    model = load_model(folder)

    def deal_out(router, inputs, scores):
        return scores.gather(-1, torch.rand_like(scores).argsort(-1))

    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(deal_out)
    return mean_loss(model, batches.one_epoch())[0]


def pays_table(results: list[dict]) -> str:
    """A row for each run with experts beside the dense one of its seed, and what all of them say."""
    dense = {result["seed"]: result for result in results if result["kind"] == DENSE}
    rows, better = [], {LARGE: 0, SMALL: 0}
    for result in results:
        beside = dense[result["seed"]]
        if result["kind"] == DENSE:
            continue
        difference = result["loss"] - beside["loss"]
        better[result["kind"]] += difference < 0
        rows.append({"seed": result["seed"], "experts": result["kind"], "dense loss": beside["loss"],
                     "loss": result["loss"], "difference": difference,
                     "routed at random": result["random_loss"] - result["loss"],
                     "least used": result["least_used"], "most used": result["most_used"],
                     "time": result["seconds"] / beside["seconds"],
                     "parameters": result["parameters"] / beside["parameters"]})
    formats = {"dense loss": ".4f", "loss": ".4f", "difference": "+.4f", "routed at random": "+.4f",
               "least used": ".2f", "most used": ".2f", "time": ".2f", "parameters": ".2f"}
    words = "\n".join(f"{kind}: better with {count} of {len(dense)} seeds" for kind, count in better.items())
    return f"{markdown(rows, formats)}\n\n{words}"


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--jobs", nargs="+", choices=("speed", "pays"), default=["speed", "pays"], help="what is measured")
    add("--presets", nargs="+", default=["tiny", "26m"], metavar="NAME", help="shapes; pays takes the first")
    add("--optimizers", nargs="+", choices=("adamw", "muon"), default=["adamw", "muon"], help="of speed")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of speed")
    add("--clock", choices=("wall", "cpu"), default="wall", help="of speed")
    add("--rounds", type=count, default=5, metavar="N", help="of speed, after one that warms up")
    add("--rows", type=count, default=8, metavar="N", help="in a step of speed")
    add("--tokens", type=count, default=512, metavar="N", help="in a row of speed")
    add("--minimind", type=Path, metavar="DIR", help="a clone of MiniMind, whose model's code is run")
    add("--json", type=Path, metavar="FILE", help="all times of speed (default: none)")
    add("--out_dir", type=Path, default=ROOT / "out" / "experts", metavar="DIR", help="the runs of pays")
    add("--data_path", nargs="+", type=Path, metavar="FILE", help="of pays (default: the embedded world)")
    add("--steps", type=count, default=1000, metavar="N", help="of each run of pays")
    add("--seeds", nargs="+", type=seed, default=[0, 1, 2], metavar="N", help="of pays")
    add("--flags", default="", metavar="TEXT", help="more flags for both kinds of pays: '--batch_size 8'")
    add("--contender", metavar="NAME", help="for the processes of speed")
    args = parser.parse_args(argv)
    if args.minimind and not (args.minimind / MINIMIND_FILE).is_file():
        parser.error(f"--minimind {args.minimind}: there is no {MINIMIND_FILE} in it")
    for file in args.data_path or []:
        if not file.is_file():
            parser.error(f"--data_path {file}: no such file")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
