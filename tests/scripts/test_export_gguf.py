"""export_gguf.py: the files that it writes, the Modelfile beside them, and what it refuses."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch

from common.errors import ModelError, RunError
from model.lora import apply_lora, load_lora, lora_parameters, save_lora
from model.quantize import quantize_model
from model.transformer import CausalLM, ModelConfig
from model.weights import load_model, load_tokenizer, save_model
from scripts import export_gguf

SCRIPT = Path(export_gguf.__file__)
SHAPE = dict(vocab_size=6400, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, intermediate_size=64, max_position_embeddings=64,
             initializer_range=0.1, qk_norm=True)
IDS = torch.randint(0, 6400, (1, 9), generator=torch.Generator().manual_seed(0))


def make(folder: Path, template=None, **changes) -> Path:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(SCRIPT.parents[1] / "model" / "tokenizer")
    template = template or (SCRIPT.parents[1] / "dataset" / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template
    save_model(CausalLM(ModelConfig(**SHAPE | changes)), folder, tokenizer,
               training={"stage": "full_sft", "arguments": {"max_seq_len": 48}})
    return folder


@pytest.fixture
def home(tmp_path):
    """base/, and lora/ with an adapter of it."""
    model = load_model(make(tmp_path / "base"))
    apply_lora(model, rank=4, alpha=8)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    save_lora(model, tmp_path / "lora", base=tmp_path / "base")
    return tmp_path


def export(*flags, certify=False):
    flags = [str(flag) for flag in flags] + ([] if certify else ["--no-certify"])
    export_gguf.main(export_gguf.parse_args(flags))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_several_types_are_several_files_named_like_the_folder(home):
    export(home / "base", "--type", "F32", "Q8_0")
    names = sorted(path.name for path in (home / "base").iterdir() if "base-" in path.name)
    assert names == ["base-F32.Modelfile", "base-F32.gguf", "base-Q8_0.Modelfile", "base-Q8_0.gguf"]
    assert torch.equal(logits(load_model(home / "base" / "base-F32.gguf")), logits(load_model(home / "base")))


def test_the_modelfile_by_hand(home):
    export(home / "base", "--out", home / "x.gguf")
    assert (home / "x.Modelfile").read_text(encoding="utf-8") == '''\
# ollama create x -f x.Modelfile
FROM ./x.gguf
TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system
{{ .Content }}<|im_end|>
{{ end }}{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ end }}{{ if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
"""
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|endoftext|>"
PARAMETER num_ctx 48
PARAMETER temperature 0.7
PARAMETER top_p 0.9
PARAMETER repeat_penalty 1
'''


USUAL_SYSTEM = ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
                "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
                "{{ '<|im_end|>\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
NUMBERED = "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}Answer:"
IN_BRACES = "{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + '<|im_end|>' }}{% endfor %}"


def test_a_usual_system_message_becomes_a_line_of_its_own(tmp_path):
    export(make(tmp_path / "base", USUAL_SYSTEM), "--out", tmp_path / "x.gguf")
    text = (tmp_path / "x.Modelfile").read_text(encoding="utf-8")
    assert '\nSYSTEM """Be kind."""\n' in text and text.count("Be kind.") == 1


@pytest.mark.parametrize("template", [NUMBERED, IN_BRACES])
def test_a_template_that_go_cannot_say_is_left_out_and_said(template, tmp_path, capsys):
    export(make(tmp_path / "base", template), "--out", tmp_path / "x.gguf")
    assert "TEMPLATE \"" not in (tmp_path / "x.Modelfile").read_text(encoding="utf-8")
    assert "chat template does not fit" in capsys.readouterr().out


def test_a_merged_adapter_and_an_adapter_alone(home):
    expected = load_model(home / "base")
    load_lora(expected, home / "lora")
    export(home / "base", "--lora", home / "lora", "--type", "F32")
    assert (logits(load_model(home / "lora" / "lora-merged-F32.gguf")) - logits(expected)).abs().max() < 1e-4
    export(home / "base", "--lora", home / "lora", "--adapter")
    model = load_model(home / "base")
    load_lora(model, home / "lora" / "lora-F32.gguf")
    assert (logits(model) - logits(expected)).abs().max() < 1e-4
    assert not (home / "lora" / "lora-F32.Modelfile").exists()


def test_half_of_an_adapter(home):
    flags = ["--weights", "0.5", "--type", "F32", "--out", home / "x.gguf"]
    export(home / "base", "--lora", home / "lora", *flags)
    half, base = load_model(home / "x.gguf"), load_model(home / "base")
    full = load_model(home / "base")
    load_lora(full, home / "lora")
    name = "model.layers.1.mlp.up_proj"
    lora = full.get_submodule(name).lora
    b, a = lora.factors()
    expected = base.get_submodule(name).weight + 0.5 * lora.scaling * b @ a
    assert torch.allclose(half.get_submodule(name).weight, expected, atol=1e-6)


def test_weights_in_4_bits_are_dequantized_and_that_is_said(home, capsys):
    model = load_model(home / "base")
    quantize_model(model)
    save_model(model, home / "nf4", load_tokenizer(home / "base"))
    export(home / "nf4", "--type", "F32", "--out", home / "x.gguf")
    assert "4 bits (NF4), which GGUF has not" in capsys.readouterr().out
    assert (logits(load_model(home / "x.gguf")) - logits(load_model(home / "nf4"))).abs().max() < 1e-4


def test_a_gguf_file_is_exported_again(home):
    export(home / "base", "--type", "F32", "--out", home / "x.gguf")
    export(home / "x.gguf", "--type", "F32", "--out", home / "y.gguf")
    ours, theirs = load_model(home / "x.gguf"), load_model(home / "y.gguf")
    assert torch.equal(logits(ours), logits(theirs))
    assert load_tokenizer(home / "y.gguf").get_vocab() == load_tokenizer(home / "x.gguf").get_vocab()


@pytest.mark.parametrize("error", [  # the second is numpy's, which has words and no number
    OSError(errno.ENOSPC, "No space left on device"), OSError("870400 requested and 824480 written")])
def test_the_package_writes_nothing_half(error, home, monkeypatch):
    export(home / "base", "--out", home / "x.gguf", "--type", "F32")
    before = (home / "x.gguf").read_bytes()

    def full(*given):
        raise error

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError) as raised:
        export(home / "base", "--out", home / "x.gguf", "--type", "Q8_0")
    assert raised.value.errno == errno.ENOSPC  # which is reported as a full disk
    assert (home / "x.gguf").read_bytes() == before
    assert not list(home.glob(".*"))


def test_what_was_written_is_certified(home, capfd, monkeypatch):
    export(home / "base", "--type", "F32", "--out", home / "x.gguf", certify=True)
    printed = capfd.readouterr().out
    assert "x.gguf in" in printed and "OFF" not in printed
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(export_gguf.subprocess, "run", lambda command: failed)
    with pytest.raises(RunError, match="not certified"):
        export(home / "base", "--type", "F32", "--out", home / "x.gguf", certify=True)


def test_a_gguf_file_answers_as_its_model_does(home):
    from inference.chat_model import ChatModel, Sampling

    export(home / "base", "--type", "F32", "--out", home / "x.gguf")
    said = []
    for path in (home / "base", home / "x.gguf"):
        chat_model = ChatModel(path, device="cpu", adapters=[home / "lora"])
        ids = chat_model.encode([{"role": "user", "content": "Hi"}])
        pieces = chat_model.stream(ids, Sampling(temperature=0.0, max_new_tokens=12))
        text = "".join(text for _, text, _ in pieces)
        said.append((ids, text, chat_model.stop_ids, len(chat_model.reports)))
    assert said[0] == said[1] and said[0][1]


def test_mistakes_are_one_line(home, refused):
    base, lora = home / "base", home / "lora"
    refused(export_gguf, [home / "nothing"], "no model at")
    refused(export_gguf, [base, "--adapter"], "--adapter writes one adapter")
    refused(export_gguf, [base, "--lora", lora, lora], "--weights: 2 adapters need as many")
    refused(export_gguf, [base, "--type", "F32", "F16", "--out", home / "x.gguf"], "--out names one file")
    refused(export_gguf, [base, "--type", "Q5_K"], "invalid choice")
    refused(export_gguf, [base, "--out", home], "is a folder")
    refused(export_gguf, [base, "--out", base / "model.safetensors"], "must end in .gguf")
    refused(export_gguf, [base, "--out", home / "x.Modelfile"], "must end in .gguf")
    os.mkfifo(home / "pipe.gguf")
    refused(export_gguf, [base, "--out", home / "pipe.gguf"], "no plain file")
    refused(export_gguf, [base, "--lora", lora, "--out", base / "config.json" / "x.gguf", "--no-certify"], "")


def test_over_itself(home):
    export(home / "base", "--out", home / "x.gguf")
    with pytest.raises(ModelError, match="is what is exported"):
        export(home / "x.gguf", "--out", home / "x.gguf")


def test_an_adapter_that_was_trained_over_4_bits_is_merged_elsewhere(home):
    (home / "lora" / "training.json").write_text('{"arguments": {"quantize": "nf4"}}')
    with pytest.raises(ModelError, match="merge_lora.py"):
        export(home / "base", "--lora", home / "lora")


def test_help_needs_no_packages():
    command = [sys.executable, SCRIPT, "--help"]
    listed = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert "--adapter" in listed.stdout
