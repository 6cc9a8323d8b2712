"""Models from elsewhere: Llama, Mistral, Qwen2 and Qwen3 directories, each with its own chat template.

Everything is tiny and random, made here with transformers; ids, masks and logits are compared with what
transformers and PEFT make of the same files.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common.errors import DataError
from dataset import chat
from dataset.lm_dataset import SFTDataset
from model.lora import load_lora
from model.weights import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["What is the colour of the sky?", "The sky is blue.", "And of grass?", "Green, of course!",
         "小猫在睡觉。",
         "user assistant system Hello Hi 1 + 1 = 2", "You are a kind helper.", "def f(x):\n    return x\n"]

# Each in the words of its makers' templates, shortened where what is left out never happens here.
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}")
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{%- if loop.first and system is defined %}"
    "{{- ' [INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}{%- else %}"
    "{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}")
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN3 = (  # an empty thought before the last answer, none before those of earlier turns
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' }}{%- if loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- generation %}{{- message.content.lstrip('\n') + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}")

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64, "initializer_range": 0.3}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, LLAMA3, {"rope_theta": 5e5},
              ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
    "mistral": (MistralConfig, MistralForCausalLM, MISTRAL, {"sliding_window": 64}, ["<s>", "</s>"]),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, QWEN2, {"tie_word_embeddings": True},
              ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, QWEN3, {"head_dim": 16},
              ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"]),
}  # the first two control tokens are what begins a text and what ends a turn


def make_tokenizer(template: str, control: list[str], sentencepiece: bool, size: int = 330):
    """A small BPE: over bytes as GPT's, or over characters with a mark for the space, as Mistral's first."""
    if sentencepiece:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                             decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        control = ["<unk>", *control]
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=size + 100, special_tokens=[*control, *bytes_])
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=control,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(WORDS * 3, trainer)
    if sentencepiece:  # the bytes are ordinary pieces, the control tokens alone are added ones
        raw = json.loads(backend.to_str())
        raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in control]
        backend = Tokenizer.from_str(json.dumps(raw))
        control = control[1:]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=control[0], eos_token=control[1],
                                   chat_template=template, clean_up_tokenization_spaces=False,
                                   **({"unk_token": "<unk>"} if sentencepiece else {}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family, (make_config, make_model, template, extra, control) in FAMILIES.items():
        tokenizer = make_tokenizer(template, control, sentencepiece=family == "mistral")
        torch.manual_seed(len(family))
        model = make_model(make_config(**SHAPE | extra, vocab_size=len(tokenizer) + 3))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bias" in name or "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        made[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
    return made


def say(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CHATS = {
    "one turn": say("Hi", "Hello!"),
    "two turns": say("What is the sky?", "The sky is blue.", "And of grass?", "Green, of course!"),
    "system": say("Hi", "Hello", system="You are a kind helper."),
    "chinese and code": say("小猫", "在睡觉。", "f?", "def f(x):\n    return x\n"),
    "an answer that the prompt holds": say("blue", "blue", "blue", "blue"),
    "spaces": say("  Hi\n", "\nHello  there \n"),
    "looks like a mark": say("\ue0000\ue001 {0}", "\ue0001\ue001"),
    "words of the template": say("user\n[INST] Hi [/INST]", "assistant\n[/INST] Hello"),
}
WRITTEN = {"llama": str.strip, "mistral": str, "qwen2": str, "qwen3": lambda words: words.lstrip("\n")}
ENDS = {family: values[4][1] for family, values in FAMILIES.items()}


# --- ids and mask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_transformers_own_and_the_mask_is_the_answers(family, name, folders):
    tokenizer, messages = load_tokenizer(folders[family]), CHATS[name]
    ids, mask = chat.encode_chat(tokenizer, messages)
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == theirs and len(mask) == len(ids)
    # Independently of marks and spans: the runs of the mask, decoded, are the answers and their end.
    runs, before = [], 0
    for token, on in zip(ids, mask, strict=True):
        if on and not before:
            runs.append([])
        if on:
            runs[-1].append(token)
        before = on
    answers = [WRITTEN[family](m["content"]) for m in messages if m["role"] == "assistant"]
    said = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
    lead = " " if family == "mistral" else ""  # its prompt ends in [/INST], the answer begins with the space
    for text, answer in zip(said, answers, strict=True):
        assert text.removeprefix(lead) == (lead + answer + ENDS[family]).removeprefix(lead)
    end = tokenizer.convert_tokens_to_ids(ENDS[family])
    assert all(run[-1] == end and end not in run[:-1] for run in runs)


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_by_prefixes(family, folders):
    """What follows the prompt of a generation is what is supervised, up to the end of the turn."""
    tokenizer = load_tokenizer(folders[family])
    for words in (("Hi", "Hello!"), ("sky?", "The sky is blue."), ("小猫", "睡觉。")):
        ids, mask = chat.encode_chat(tokenizer, say(*words))
        prompt, none = chat.encode_chat(tokenizer, say(words[0]), add_generation_prompt=True)
        assert prompt == tokenizer.apply_chat_template(say(words[0]), tokenize=True, return_dict=False,
                                                       add_generation_prompt=True, enable_thinking=False)
        end = len(ids) - 1 - ids[::-1].index(tokenizer.convert_tokens_to_ids(ENDS[family]))
        assert ids[:len(prompt)] == prompt and not any(none)
        assert mask == [0] * len(prompt) + [1] * (end + 1 - len(prompt)) + [0] * (len(ids) - end - 1)


def test_where_a_template_marks_the_answers_we_agree(folders):
    tokenizer = load_tokenizer(folders["qwen3"])
    for messages in CHATS.values():
        theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True,
                                               return_assistant_tokens_mask=True)
        ids, mask = chat.encode_chat(tokenizer, messages)
        assert (ids, mask) == (theirs["input_ids"], theirs["assistant_masks"])


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_words_are_refused(family, folders):
    tokenizer = load_tokenizer(folders[family])
    for token in FAMILIES[family][4]:
        said = say("a", f"b{token}")
        if "think" in token:  # the assistant itself writes these
            assert sum(chat.encode_chat(tokenizer, said)[1]) >= 3
            said = say(f"{token} a", "b")
        for messages in (say(f"a {token} b", "c"), said, say("a", "b", system=token)):
            with pytest.raises(DataError, match="would take it for a control token") as error:
                chat.encode_chat(tokenizer, messages)
            assert "\n" not in str(error.value)
    ids, mask = chat.encode_chat(tokenizer, say("<|other|> </think", "<s"))  # looks like one, and is none
    assert sum(mask) > 1


@pytest.mark.parametrize("template, reason", [
    ("{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}", "no control token that ends"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}<|im_end|>{% endfor %}", "rewrites"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content[:3] }}<|im_end|>{% endfor %}", "rewrites"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", "leaves out"),
    ("{{ raise_exception('not today') }}", "refuses it: not today"),
    ("{% for m in messages %}{{ m.content", "refuses it")])
def test_templates_without_a_right_mask_are_refused(template, reason):
    tokenizer = make_tokenizer(template, ["<|endoftext|>", "<|im_end|>"], sentencepiece=False)
    with pytest.raises(DataError, match=reason) as error:
        chat.encode_chat(tokenizer, say("What is it?", "Something long"))
    assert "\n" not in str(error.value)


def test_bad_records_of_a_foreign_model_are_shown_with_their_line(folders, tmp_path, capsys):
    tokenizer, path = load_tokenizer(folders["mistral"]), tmp_path / "chats.jsonl"
    records = [{"messages": say("Hi", "Hello")}, {"messages": say("a </s>", "b")},
               {"messages": [*say("Hi", "Hello"), {"role": "assistant", "content": "again"}]},
               {"messages": [{"role": "user", "content": "x"},
                             {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}]
    records += records[:1] * 3  # most records of a file must be usable
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    data = SFTDataset(path, tokenizer, 64, cache_dir=tmp_path / "cache")
    err = capsys.readouterr().err
    assert len(data) == 4 and "skipped: 3" in err
    for line, reason in ((2, "'</s>' in a message"), (3, "roles must alternate"), (4, "tool calls")):
        assert any(f"{path}:{line}: " in text and reason in text for text in err.splitlines())
    ids, labels = data[0]
    ids, mask = ids.tolist(), (labels != -100).int().tolist()
    assert (ids, mask) == chat.encode_chat(tokenizer, records[0]["messages"])


# --- training, and PEFT both ways --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """Family -> the adapter that `train_lora.py --load_from DIR` wrote, and what it printed."""
    import dataset.token_cache

    out, made = tmp_path_factory.mktemp("out"), {}
    data = out / "chats.jsonl"
    records = [{"messages": say(a, b)} for a, b in zip(WORDS, WORDS[::-1], strict=True)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    for family, folder in folders.items():
        words = ["train_lora.py", "--load_from", folder, "--data_path", data, "--out_dir", out,
                 "--name", family, "--device", "cpu", "--dtype", "float32", "--lora_rank", 4,
                 "--lora_alpha", 8, "--batch_size", 4, "--max_steps", 6, "--learning_rate", 0.02,
                 "--log_interval", 1, "--eval_fraction", 0]
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", [str(word) for word in words])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(dataset.token_cache, "CACHE_DIR", out / "cache")
            runpy.run_path(str(ROOT / "trainer" / "train_lora.py"), run_name="__main__")
        made[family] = out / family, printed.getvalue()
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_the_adapter_over_transformers_own_class(family, folders, adapters):
    peft = pytest.importorskip("peft")
    path, printed = adapters[family]
    assert f"saved {path}" in printed
    ids = torch.tensor([chat.encode_chat(load_tokenizer(folders[family]), CHATS["two turns"])[0]])
    base = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).eval()
    ours = load_model(folders[family])
    with torch.no_grad():
        before = base(ids).logits
        load_lora(ours, path)
        theirs = peft.PeftModel.from_pretrained(base, path).eval()(ids).logits
        torch.testing.assert_close(ours(ids).logits, theirs, atol=1e-5, rtol=0)
    assert (theirs - before).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_an_adapter_that_peft_trained(family, folders, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"],
                             use_rslora=family == "qwen2", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config)
    ids, mask = chat.encode_chat(load_tokenizer(folders[family]), CHATS["two turns"])
    ids, mask = torch.tensor([ids]), torch.tensor([mask])
    optimizer = torch.optim.AdamW((p for p in theirs.parameters() if p.requires_grad), lr=0.02)
    for _ in range(4):
        theirs(ids, labels=torch.where(mask == 1, ids, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(folders[family])
    with torch.no_grad():
        before = ours(ids).logits
        load_lora(ours, tmp_path / "theirs")
        torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, atol=1e-5, rtol=0)
        assert (ours(ids).logits - before).abs().max() > 0.01
