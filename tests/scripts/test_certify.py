"""certify.py passes what is the same, and names each of eight planted faults."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.serving_clients import Server
from common.errors import RunError
from inference.certificate import Reference, Row, compare_numbers, forward_of, samples_of
from model import gguf as our_gguf
from model.adapters import Adapters, remove_lora
from model.gguf import write_adapter, write_model
from model.lora import apply_lora, lora_parameters, merge_lora, read_lora, save_lora
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, load_tokenizer, save_model
from scripts import certify

ROOT = Path(certify.__file__).resolve().parents[1]
ENDS = [2, 0]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base/, lora/, chats.jsonl, and GGUF files that are right: base, merged, Q8_0 of both, adapter."""
    folder = tmp_path_factory.mktemp("certify")
    torch.manual_seed(0)
    tokenizer = load_tokenizer(ROOT / "model" / "tokenizer")
    tokenizer.chat_template = (ROOT / "dataset" / "chat_template.jinja").read_text(encoding="utf-8")
    model = CausalLM(ModelConfig(vocab_size=6400, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1, intermediate_size=96, max_position_embeddings=256,
                                 initializer_range=0.2, qk_norm=True, rope_theta=1e4))
    save_model(model, folder / "base", tokenizer)
    apply_lora(model, rank=4, alpha=8)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    save_lora(model, folder / "lora")
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A frog."}]}
    (folder / "chats.jsonl").write_text((json.dumps(record) + "\n") * 3, encoding="utf-8")
    for kind in ("F32", "Q8_0"):
        write(folder, f"base-{kind}.gguf", kind, lora=None)
        write(folder, f"merged-{kind}.gguf", kind)
    base = load_model(folder / "base")
    write_adapter(base, read_lora(base, folder / "lora"), folder / "adapter.gguf", "F32", "a")
    return folder


def write(home, name, kind="F32", lora=1.0, change=None, change_tokens=None, ends=ENDS) -> Path:
    """A GGUF file of base/ with `lora` times the adapter in it; None: without."""
    model, tokenizer = load_model(home / "base"), load_tokenizer(home / "base")
    if lora is not None:
        adapters = Adapters(model)
        adapters.use({adapters.load(home / "lora"): lora})
        merge_lora(model)
        remove_lora(model, keep_merged=True)
    if change:
        change(model)
    if change_tokens:
        tokenizer = change_tokens(tokenizer)
    write_model(model, tokenizer, home / name, kind, "x", ends)
    return home / name


def run(home, *flags):
    certify.main(certify.parse_args([str(flag) for flag in (home / "base", *flags)]))


def test_the_same_everywhere_at_a_longer_length(home, capsys):
    write_model(load_model(home / "base", rope_scaling="yarn:4"), load_tokenizer(home / "base"),
                home / "scaled.gguf", "F32", "x", ENDS)
    run(home, "--gguf", home / "scaled.gguf", "--rope_scaling", "yarn:4")
    assert "OFF" not in capsys.readouterr().out
    with pytest.raises(RunError):  # without the flag the file has another scaling
        run(home, "--gguf", home / "scaled.gguf")
    assert "another rope_scaling" in capsys.readouterr().out


def test_the_same_everywhere(home, capsys):
    run(home, "--gguf", home / "base-F32.gguf", home / "base-Q8_0.gguf", "--data_path", home / "chats.jsonl")
    printed = capsys.readouterr().out
    assert "OFF" not in printed and "off:" not in printed
    assert re.search(r"transformers +11/11 .* 11/11 ", printed)


def test_the_adapter_merged_and_not(home, capsys):
    run(home, "--lora", home / "lora", "--gguf", home / "merged-F32.gguf", home / "merged-Q8_0.gguf",
        home / "adapter.gguf", "--json", home / "c.json", "--data_path", home / "chats.jsonl")
    found = json.loads((home / "c.json").read_text(encoding="utf-8"))
    assert found["passed"] and found["prompts"] == 11
    names = [way["name"] for way in found["ways"]]
    assert names[:2] == ["ours, adapter merged", "transformers and PEFT"] and len(names) == 5
    assert all(set(way["cells"]) >= {"logits", "greedy", "loss"} for way in found["ways"])
    assert float(found["ways"][2]["cells"]["logits"]) < 1e-3


def swap_rows(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[[3, 5]] = weight[[5, 3]]


def other_template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\\n", "<|im_end|>")
    return tokenizer


def other_tokens(tokenizer):
    """"a" and "b" have each other's id."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), chat_template=tokenizer.chat_template,
        bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token)
    return changed


def other_tools(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<tool_call>", "<toolcall>")
    return tokenizer


def earlier_step(model):
    """All matrices are 1 % off, which is less than twice what 8 bits cost."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.01 * parameter.std() * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(0))


def shorter(model):
    model.config.max_position_embeddings = 64


def other_rope(model):
    model.config.rope_theta = 5e5


FAULTS = {  # what is planted -> how the file is made, and what must be named
    "a swapped row": (dict(change=swap_rows), r"model\.layers\.1\.mlp\.up_proj\.weight differs in rows 3, 5"),
    "a swapped row in 8 bits": (dict(change=swap_rows, kind="Q8_0"), r"up_proj\.weight differs in rows 3, 5"),
    "another template": (dict(change_tokens=other_template), "another chat template"),
    "another rope base": (dict(change=other_rope), r"another rope_theta: 500000\.0 and not 10000\.0"),
    "a missing end token": (dict(ends=[2]), r"missing end token: <\|endoftext\|>"),
    "a wrong alpha": (dict(lora=2.0), "wrong alpha, .* is 2 times as large"),
    "a wrong alpha in 8 bits": (dict(lora=0.5, kind="Q8_0"), r"wrong alpha, .* is 0\.\d+ times as large"),
    "no adapter": (dict(lora=None), "wrong alpha, or another adapter: .* is 0 times as large"),
    "another end token": (dict(ends=[2, 0, 300]), r"another end token: \[300\]"),
    "an earlier step in 8 bits": (dict(change=earlier_step, kind="Q8_0"), r"differs, by 1\.\d+% of its size"),
    "a shorter context": (dict(change=shorter), "another context length: 64 and not 256"),
    "other words around tools": (dict(change_tokens=other_tools), "another chat template: .*toolcall"),
    "other tokens": (dict(change_tokens=other_tokens), r"other tokens: .*\('[ab]', \d+\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault, home, capsys, monkeypatch):
    made, named = FAULTS[fault]
    path = write(home, "fault.gguf", **made)
    monkeypatch.setattr(certify, "transformers_row", lambda *given: Row("transformers"))  # takes long
    with pytest.raises(RunError, match="not the same: fault.gguf"):
        run(home, "--lora", home / "lora", "--gguf", home / "merged-F32.gguf", path, "--max_new_tokens", 6)
    printed = capsys.readouterr().out
    assert re.search(f"(?m)^off: fault.gguf .*{named}", printed), printed
    assert "off: merged-F32" not in printed and "off: ours" not in printed and "off: trans" not in printed


def test_another_type_than_the_file_says_is_named(home, capsys, monkeypatch):
    monkeypatch.setattr(our_gguf, "FILE_TYPES", our_gguf.FILE_TYPES | {"F16": 0})
    path = write(home, "fault.gguf", "F16", lora=None)
    monkeypatch.undo()
    with pytest.raises(RunError):
        run(home, "--gguf", path)
    assert "another type: the file says F32, and most of its matrices are F16" in capsys.readouterr().out


def test_a_truncated_file_is_named(home, capsys):
    content = (home / "base-F32.gguf").read_bytes()
    (home / "fault.gguf").write_bytes(content[: len(content) - 4000])
    with pytest.raises(RunError):
        run(home, "--gguf", home / "fault.gguf", home / "base-F32.gguf")
    printed = capsys.readouterr().out
    assert re.search(r"off: .*fault.gguf: can't be read or asked: .*cut off, or damaged", printed)
    assert printed.count("off: ") == 1  # the other file is compared all the same


@pytest.mark.parametrize("wrong", ["alpha", "row"])
def test_a_fault_of_an_adapter_alone_is_named(wrong, home, capsys):
    base = load_model(home / "base")
    loras = read_lora(base, home / "lora")
    if wrong == "alpha":
        for lora in loras.values():
            lora.scaling *= 2
    else:
        with torch.no_grad():
            loras["model.layers.0.mlp.up_proj"].B.weight[[1, 2]] = 0
    write_adapter(base, loras, home / "fault.gguf", "F32", "a")
    with pytest.raises(RunError):
        run(home, "--lora", home / "lora", "--gguf", home / "fault.gguf")
    named = {"alpha": "wrong alpha, .* is 2 times", "row": "mlp.up_proj differs in rows 1, 2,"}[wrong]
    assert re.search(f"off: fault.gguf .*{named}", capsys.readouterr().out)


@pytest.fixture(scope="module")
def address(home):
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"the server needs {package} (requirements-serve.txt)")
    with Server("--device", "cpu", "--load_from", home / "base", "--lora", home / "lora") as server:
        yield server.address


def test_a_server_that_is_the_same_and_one_that_is_not(home, address, capsys):
    run(home, "--lora", home / "lora", "--url", address, "--data_path", home / "chats.jsonl")
    assert re.search(r"http://\S+, lora +10/10 +\S+ +10/10 ", capsys.readouterr().out)
    with pytest.raises(RunError):
        run(home, "--lora", home / "lora", "--url", address, "--served", "base")
    printed = capsys.readouterr().out
    assert "log-probabilities differ" in printed and "greedy answers are others" in printed
    with pytest.raises(RunError):
        run(home, "--url", address, "--served", "nobody")
    assert "choose with --served" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_no_agreement(home):
    """Python's max(0.0, NaN) is 0.0, so a model that gives NaN once counted as the same."""
    reference = Reference(home / "base", {}, [], 1, 2)
    row = Row("NaN")
    compare_numbers(row, lambda ids: forward_of(reference.model)(ids) * float("nan"), "Q4_0", reference)
    assert row.cells["logits"] == "nan" and any("logits differ by up to nan" in line for line in row.off)


def test_nobody_there(home, capsys):
    with pytest.raises(RunError):
        run(home, "--url", "http://127.0.0.1:9")
    assert "can't be read or asked" in capsys.readouterr().out


def test_mistakes_are_one_line(home, refused):
    refused(certify, [home / "nothing"], "no model at")
    refused(certify, [home / "base", "--lora", "a", "b"], "--weights: 2 adapters need as many")
    refused(certify, [home / "base", "--json", home], "is a folder")
    refused(certify, [home / "base", "--json", home / "base" / "model.safetensors"], "must end in .json")


def test_a_chat_is_read_as_one_whatever_stands_beside_it(tmp_path):
    reference = SimpleNamespace(tokenizer=load_tokenizer(ROOT / "model" / "tokenizer"),
                                model=SimpleNamespace(config=ModelConfig()))
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (tmp_path / "b.jsonl").write_text(json.dumps(record | {"text": "Hi Hello!"}))
    [plain], [beside] = (samples_of([tmp_path / name], 1, reference) for name in ("a.jsonl", "b.jsonl"))
    assert plain == beside and -100 in plain[1]
