"""Distillation: the divergences, the loss, what the student writes itself, and the script that joins them."""

import json
import math
from functools import partial

import forks
import pytest
import torch
import torch.nn.functional as F
from build import make_batches
from safetensors.torch import load_file
from test_loop import RAGGED, VOCABULARY, Samples
from torch.distributions import Categorical, kl_divergence

import trainer.losses
from common.errors import UsageError
from dataset.lm_dataset import collate
from model.sample_many import sample_many
from model.transformer import PRESETS, CausalLM
from model.weights import load_model, load_tokenizer, save_model
from trainer.distributed import Ranks
from trainer.losses import cross_entropy, distillation, forward_kl, jensen_shannon, reverse_kl
from trainer.teacher import Lessons, OwnAnswers, check_same_vocabulary, student_config, up_to_last_answer

ALONE = Ranks(0, 1, torch.device("cpu"))
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl,
               "jensen_shannon": partial(jensen_shannon, beta=0.3)}


def opinionated(model):
    """New models find all tokens about equally likely. Larger weights make the two differ."""
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture
def student(make_model):
    return opinionated(make_model(VOCABULARY))


@pytest.fixture
def teacher(make_model):
    return opinionated(make_model(VOCABULARY, seed=1)).requires_grad_(False).eval()


def packed_batch():
    """Two rows of several documents, with padding and unsupervised tokens."""
    return collate(Samples(RAGGED), [[0, 1], [2, 3, 4]], 3)


def grads(model) -> dict:
    return {name: p.grad for name, p in model.named_parameters()}


# --- the divergences ---------------------------------------------------------------------------------------


def test_divergences_are_those_of_torch_distributions():
    torch.manual_seed(0)
    teacher, student = (torch.randn(6, 11, dtype=torch.float64) * 3 for _ in range(2))
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    p, q = Categorical(logits=teacher), Categorical(logits=student)
    torch.testing.assert_close(forward_kl(log_p, log_q), kl_divergence(p, q))
    torch.testing.assert_close(reverse_kl(log_p, log_q), kl_divergence(q, p))
    for beta in (0.1, 0.5, 0.8):
        middle = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
        wanted = beta * kl_divergence(p, middle) + (1 - beta) * kl_divergence(q, middle)
        found = jensen_shannon(log_p, log_q, beta)
        torch.testing.assert_close(found, wanted)
        assert (found <= math.log(2)).all()
    # For beta near its ends the generalised divergence becomes one of the two others, times a number.
    near = 1e-6
    for beta, wanted in (near, forward_kl(log_p, log_q)), (1 - near, reverse_kl(log_p, log_q)):
        torch.testing.assert_close(jensen_shannon(log_p, log_q, beta) / near, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name):
    logits = torch.randn(5, 9, requires_grad=True)
    log_q = logits.log_softmax(-1)
    found = DIVERGENCES[name](log_q.detach(), log_q)
    found.sum().backward()
    assert found.abs().max() < 1e-6 and logits.grad.abs().max() < 1e-6


def test_certainty_gives_no_nan():
    """A token that a model finds impossible has a probability of 0 and a logarithm of minus some hundreds."""
    sure, other = torch.tensor([[500.0, 0.0, 0.0]]), torch.tensor([[0.0, 500.0, 0.0]], requires_grad=True)
    for divergence in DIVERGENCES.values():
        found = divergence(sure.log_softmax(-1), other.log_softmax(-1)).sum()
        assert found.isfinite() and torch.autograd.grad(found, other)[0].isfinite().all()


# --- the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("weight, temperature", [(1.0, 1.0), (0.7, 2.5)])
def test_the_loss_is_its_equation(name, weight, temperature, student, teacher):
    """Spelled out token by token over the logits of both models."""
    batch = packed_batch()
    ours, theirs = (model(batch["input_ids"], document_ids=batch["document_ids"]).logits
                    for model in (student, teacher))
    data, distance, count = 0.0, 0.0, 0
    for row in range(2):
        for place in range(1, batch["labels"].size(1)):
            label = batch["labels"][row, place]
            if label == -100:
                continue
            q = (ours[row, place - 1] / temperature).softmax(-1)
            p = (theirs[row, place - 1] / temperature).softmax(-1)
            m = 0.3 * p + 0.7 * q
            terms = {"forward_kl": p * (p / q).log(), "reverse_kl": q * (q / p).log(),
                     "jensen_shannon": 0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()}
            distance = distance + temperature**2 * terms[name].sum()
            data = data - ours[row, place - 1].softmax(-1)[label].log()
            count += 1
    assert count == sum(supervised for _, supervised in RAGGED[:5])
    wanted = (1 - weight) * data + weight * distance
    wanted.backward()
    expected = grads(student)
    student.zero_grad()
    found, named = distillation(student, batch, teacher=teacher, divergence=DIVERGENCES[name], weight=weight,
                                temperature=temperature)
    found.backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(named["divergence"], distance)
    torch.testing.assert_close(named["cross_entropy"], data)
    for key, gradient in grads(student).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4, msg=key)
    assert all(p.grad is None for p in teacher.parameters())


def test_with_weight_0_it_is_sft(make_model, teacher):
    sft, student, batch = make_model(VOCABULARY), make_model(VOCABULARY), packed_batch()
    wanted, _ = cross_entropy(sft, batch)
    found, _ = distillation(student, batch, teacher=teacher, divergence=forward_kl, weight=0.0)
    wanted.backward()
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for name, gradient in grads(student).items():
        torch.testing.assert_close(gradient, grads(sft)[name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_student_s_own_words_are_no_example(make_model, teacher):
    batch, how = packed_batch(), {"teacher": teacher, "divergence": reverse_kl, "weight": 0.25}
    loss, named = distillation(make_model(VOCABULARY), batch | {"by_student": torch.tensor(True)}, **how)
    assert loss == named["divergence"] > 0
    loss, named = distillation(make_model(VOCABULARY), batch, **how)
    torch.testing.assert_close(loss, 0.75 * named["cross_entropy"] + 0.25 * named["divergence"])


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_many_tokens_go_through_the_heads_in_parts(rows, make_model, teacher, monkeypatch):
    """Then no part keeps its logits, and the result stays the same."""
    batch = packed_batch()
    how = {"teacher": teacher, "divergence": forward_kl, "weight": 0.5, "temperature": 2}
    whole, parts = make_model(VOCABULARY), make_model(VOCABULARY)
    wanted, _ = distillation(whole, batch, **how)
    wanted.backward()
    monkeypatch.setattr(trainer.losses, "LOSS_ROWS", rows)
    largest = []
    hook = parts.lm_head.register_forward_hook(lambda module, inputs, output: largest.append(len(output)))
    found, _ = distillation(parts, batch, **how)
    in_forward_pass = len(largest)
    found.backward()
    hook.remove()
    assert max(largest) == rows and len(largest) == 2 * in_forward_pass > 2  # computed again
    torch.testing.assert_close(found, wanted)
    for name, gradient in grads(parts).items():
        torch.testing.assert_close(gradient, grads(whole)[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_batch_without_a_token_to_learn_gives_0_and_the_same_names(make_model, teacher):
    student = make_model(VOCABULARY)
    for batch in (collate(Samples(RAGGED), [], 3), packed_batch()):
        found, named = distillation(student, batch, teacher=teacher, divergence=forward_kl, weight=0.5)
        assert set(named) == {"cross_entropy", "divergence"}
        found.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
        assert (found == 0) == (batch["labels"].numel() == 1)
        student.zero_grad()


def test_the_padding_of_a_vocabulary_does_not_count(make_model, teacher):
    """Qwen2's models of one tokenizer have 151,936 or 152,064 logits."""
    batch, padded = packed_batch(), make_model(VOCABULARY + 14, seed=1).requires_grad_(False).eval()
    with torch.no_grad():
        padded.load_state_dict({name: torch.cat((tensor, padded.state_dict()[name][VOCABULARY:]))
                                if len(tensor) == VOCABULARY else tensor
                                for name, tensor in teacher.state_dict().items()})
    for student_size in (VOCABULARY, VOCABULARY + 6):
        student = make_model(student_size)
        losses = [distillation(student, batch, teacher=model, divergence=forward_kl, weight=1.0)[0]
                  for model in (teacher, padded)]
        if student_size == VOCABULARY:
            torch.testing.assert_close(*losses)
        assert losses[1].isfinite()


def test_a_teacher_of_another_family(tmp_path, make_model, tokenizer):
    """transformers' Llama teaches: the divergence from its own logits, in its own float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, intermediate_size=96))
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.randint(10, 6000, (2, 9))
    batch = {"input_ids": ids, "labels": ids.clone(), "document_ids": None}
    student = make_model(len(tokenizer))
    found, _ = distillation(student, batch, teacher=load_model(tmp_path), divergence=reverse_kl, weight=1.0)
    with torch.no_grad():
        p, q = llama(ids).logits[:, :-1].log_softmax(-1), student(ids).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(found, F.kl_div(p, q, log_target=True, reduction="sum"), rtol=1e-4, atol=1e-3)


# --- the student's own answers -----------------------------------------------------------------------------


def test_a_prompt_ends_where_the_last_answer_begins():
    for labels, length in (([-100, -100, 7, 8, -100, -100, 5, -100], 6), ([-100, 3], 1),
                           ([-100, 4, -100, 5, 6], 3)):
        labels = torch.tensor(labels)
        assert up_to_last_answer(torch.arange(len(labels)), labels).tolist() == list(range(length))


class Turns(Samples):
    max_length = 40


@pytest.fixture
def own_answers(arguments, make_model):
    """own_answers(on_policy, rank, world_size, **flags): OwnAnswers over ragged samples."""
    def build(on_policy=1.0, rank=0, world_size=1, **flags):
        ranks = Ranks(rank, world_size, torch.device("cpu"))
        args = arguments(batch_size=4, max_seq_len=40, **flags)
        batches = make_batches(Turns(RAGGED), torch.arange(len(RAGGED)).numpy(), args, 3, ranks)
        student = make_model(VOCABULARY)
        if world_size > 1:
            ranks = Ranks(0, 1, torch.device("cpu"))  # so that sums are those of this process alone
        return OwnAnswers(batches, "x", student, ranks, on_policy=on_policy, end_tokens=[3, 7],
                          max_new_tokens=12, dtype=torch.float32)
    return build


def documents(micro_batches) -> list[tuple]:
    """(input_ids, labels) of each document, as lists."""
    found = []
    for batch in micro_batches:
        for row in range(len(batch["input_ids"])):
            marks = batch["document_ids"]
            marks = torch.zeros_like(batch["input_ids"]) if marks is None else marks
            for mark in range(int(marks[row].max()) + 1):
                keep = marks[row] == mark
                found.append((batch["input_ids"][row][keep].tolist(), batch["labels"][row][keep].tolist()))
    return found


def test_the_student_answers_the_prompts_of_the_batch(own_answers):
    batches = own_answers()
    micro_batches, num_units, num_tokens = batches[0]
    samples = [sample for row in batches.rows_of(0) for sample in row.tolist()]
    written = documents(micro_batches)
    assert len(written) == len(samples)
    assert num_units == sum(label != -100 for _, labels in written for label in labels)
    assert num_tokens == sum(len(ids) for ids, _ in written)
    lengths = []
    for (ids, labels), sample in zip(written, samples, strict=True):
        prompt = up_to_last_answer(*batches.dataset[sample]).tolist()
        answer = ids[len(prompt):]
        assert ids[:len(prompt)] == prompt and labels == [-100] * len(prompt) + answer
        assert 1 <= len(answer) <= 12 and len(ids) <= 40
        assert not {3, 7} & set(answer[:-1])  # nothing after the end
        assert len(answer) == 12 or answer[-1] in (3, 7) or len(ids) == 40
        lengths.append(len(answer))
    assert len(set(lengths)) > 1 and batches[0][1:] == (num_units, num_tokens)  # some end early; repeatable
    assert documents(batches[len(batches)][0]) != written  # other numbers in the next epoch
    assert batches.student.training


def test_what_it_says_follows_from_weights_numbers_and_prompt(own_answers):
    """More forward passes, more processes: the same answers. Other weights: others."""
    whole = own_answers()
    wanted = {tuple(ids) for ids, _ in documents(whole[0][0])}
    parts = own_answers(micro_batch_size=1)
    assert len(parts[0][0]) == 4 and {tuple(ids) for ids, _ in documents(parts[0][0])} == wanted
    shares = [own_answers(rank=rank, world_size=3)[0] for rank in range(3)]
    assert {tuple(ids) for share in shares for ids, labels in documents(share[0]) if len(ids) > 1} == wanted
    assert sum(units for _, units, _ in shares) == whole[0][1]
    assert len({len(share[0]) for share in shares}) == 1  # as many forward passes in each process
    with torch.no_grad():
        whole.student.model.norm.weight.mul_(3)
    assert {tuple(ids) for ids, _ in documents(whole[0][0])} != wanted


def test_a_part_of_the_steps_is_on_policy(own_answers):
    for share, wanted in (0.25, [3, 7, 11]), (0.5, [1, 3, 5, 7, 9, 11]), (1, list(range(12))):
        batches = own_answers(share)
        assert [n for n in range(12) if "by_student" in batches[n][0][0]] == wanted
    plain = Lessons(batches, "x")
    assert "by_student" not in plain[0][0][0] and "teacher x" in plain.identity() and plain.num_bytes() == 0


# --- teacher and student -----------------------------------------------------------------------------------


def test_a_new_student_is_a_size_smaller_than_its_teacher():
    def shape_below(name):
        with torch.device("meta"):
            return student_config(None, CausalLM(PRESETS[name]))

    assert shape_below("tiny") == PRESETS["micro"] and shape_below("26m") == PRESETS["tiny"]
    assert shape_below("104m") == PRESETS["64m"]
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in CausalLM(PRESETS[name]).parameters()) for name in ("micro", "tiny")]
    assert 0.3 < sizes[0] / sizes[1] < 0.36
    with pytest.raises(UsageError, match="no preset has fewer parameters .* --load_from"):
        shape_below("micro")


def test_another_vocabulary_is_refused_also_of_the_same_size(tokenizer, tmp_path):
    check_same_vocabulary("t", tokenizer, load_tokenizer("model/tokenizer"))
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = raw["model"]["vocab"]
    first, second = (next(name for name, number in vocabulary.items() if number == n) for n in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    path.write_text(json.dumps(raw), encoding="utf-8")
    other = load_tokenizer(tmp_path)
    assert len(other) == len(tokenizer)
    with pytest.raises(UsageError, match="--teacher t has another vocabulary .*token 300 is "):
        check_same_vocabulary("t", other, tokenizer)


# --- the script --------------------------------------------------------------------------------------------


@pytest.fixture
def flags(workshop):
    """The flags of a short run; the teacher is the workshop's base model, the student half as large."""
    def build(out_dir, **changes):
        small = {"teacher": workshop.base, "load_from": None, "preset": "micro", "max_steps": 6,
                 "log_interval": 1, "eval_interval": 3, "save_interval": 2, "learning_rate": 1e-3,
                 "optimizer": "adamw"}
        return workshop.flags("distillation", out_dir, **small | changes)
    return build


def test_a_run_with_a_new_student(workshop, flags, tmp_path, read_log):
    ended = workshop.run("distillation", *flags(tmp_path))
    assert ended.code == 0 and "557,696 parameters, all of them trained" in ended.out, ended.err
    log = read_log(tmp_path / "distillation")
    assert set(log[0]) == {"step", "max_steps", "loss", "cross_entropy", "divergence", "learning_rate",
                           "grad_norm", "skipped", "tokens"}
    validated = [line for line in log if "eval_loss" in line]
    assert set(validated[0]) == {"step", "eval_loss", "eval_cross_entropy", "eval_divergence"}
    assert validated[-1]["eval_divergence"] == validated[-1]["eval_loss"] < validated[0]["eval_loss"]
    record = json.loads((tmp_path / "distillation/training.json").read_text(encoding="utf-8"))
    assert record["parent"] is None and "teacher sha256" in record["content"]["training data of"]
    assert load_model(tmp_path / "distillation").config.hidden_size == 64


ALL = {"on_policy": 0.5, "max_new_tokens": 8, "distillation_weight": 0.5, "temperature": 2,
       "divergence": "jensen_shannon", "beta": 0.3}


def same(one, two, tolerance=1e-5):
    one, two = (load_file(next(folder.glob("*model.safetensors"))) for folder in (one, two))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=tolerance, rtol=0, msg=name)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
def test_processes_accumulation_and_recomputing_change_nothing(workshop, flags, tmp_path, read_log):
    two = flags(tmp_path / "two", **ALL, micro_batch_size=1, gradient_checkpointing=True)
    sharded = flags(tmp_path / "fsdp", parallel="fsdp", temperature=2)
    running = [forks.start(workshop.command("distillation", *run), processes=2) for run in (two, sharded)]
    for name, changes in ("one", ALL), ("whole", {"temperature": 2}):
        ended = workshop.run("distillation", *flags(tmp_path / name, **changes))
        assert ended.code == 0, ended.err
    for process in running:
        _, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
    for ours, theirs in ("two", "one"), ("fsdp", "whole"):
        ours, theirs = tmp_path / ours / "distillation", tmp_path / theirs / "distillation"
        for a, b in zip(read_log(ours), read_log(theirs), strict=True):
            assert a == pytest.approx(b, rel=1e-3) and a.get("tokens") == b.get("tokens")
        same(ours, theirs)


@pytest.mark.parametrize("changes", [
    ALL, {"load_from": True, "lora_rank": 4, "lora_dropout": 0.1, "quantize": "nf4", **ALL},
    {"dtype": "float16", "on_policy": 1.0, "max_new_tokens": 4, "max_steps": 3, "batch_size": 2}])
def test_a_stopped_run_goes_on_to_the_same_bits(changes, workshop, flags, tmp_path, read_log):
    if "load_from" in changes:
        changes = changes | {"load_from": workshop.base, "preset": None}
    for name in ("whole", "stopped"):
        command = flags(tmp_path / name, **changes)
        if name == "stopped":
            ended = workshop.run("distillation", *command, "--max_minutes", "1e-9")
            assert "stopped at step 1; to go on" in ended.out + ended.err, ended
            command.append("--resume")
        ended = workshop.run("distillation", *command)
        assert ended.code == 0, ended.err
    whole, stopped = (tmp_path / name / "distillation" for name in ("whole", "stopped"))
    assert read_log(stopped) == read_log(whole)
    same(whole, stopped, tolerance=0)
    assert (whole / "adapter_config.json").exists() == ("lora_rank" in changes)


def test_a_resumed_run_must_have_the_same_teacher(workshop, flags, tmp_path, make_model, tokenizer):
    assert workshop.run("distillation", *flags(tmp_path), "--max_minutes", "1e-9").code != 0
    save_model(make_model(len(tokenizer), seed=5), tmp_path / "other", tokenizer)
    ended = workshop.run("distillation", *flags(tmp_path, teacher=tmp_path / "other"), "--resume")
    assert ended.code == 2 and "teacher sha256" in ended.error
    save_model(load_model(workshop.base), tmp_path / "moved", tokenizer)
    ended = workshop.run("distillation", *flags(tmp_path, teacher=tmp_path / "moved"), "--resume")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("changes, says", [
    ({"teacher": "none"}, "--teacher none: there is no such folder"),
    ({"teacher": "out/full_sft", "teacher_is_ours": True}, "make it first: python trainer/train_full_sft.py"),
    ({"preset": None}, "no preset has fewer parameters than the teacher"),
    ({"preset": "huge"}, "unknown preset 'huge'; there are micro, tiny"),
    ({"load_from": "base"}, "--preset has no effect with --load_from"),
    ({"lora_rank": 4}, "--lora_rank needs --load_from"),
    ({"beta": 0.3}, "--beta has no effect on --divergence forward_kl"),
    ({"beta": 1, "divergence": "jensen_shannon"}, "--beta"),
    ({"max_new_tokens": 9}, "--max_new_tokens has no effect without --on_policy"),
    ({"on_policy": 1, "distillation_weight": 0.5}, "--distillation_weight has no effect with --on_policy 1"),
    ({"on_policy": 1.5}, "--on_policy"), ({"on_policy": 0.5, "num_workers": 2}, "can't be read ahead"),
    ({"on_policy": 0.5, "compile": True}, "--on_policy and --compile"),
    ({"teacher": "distillation"}, "--name distillation would write over --teacher"),
    ({"max_seq_len": 40_000}, "has only 32768 positions")])
def test_what_cannot_be_is_refused_in_one_line(changes, says, workshop, flags, tmp_path, monkeypatch):
    changes = dict(changes)
    if changes.pop("teacher_is_ours", False):
        monkeypatch.setattr("trainer.stage.ROOT", tmp_path)
        (tmp_path / "trainer").mkdir()
        (tmp_path / "trainer/train_full_sft.py").touch()
    if changes.get("load_from"):
        changes["load_from"] = workshop.base
    if changes.get("teacher") == "distillation":
        changes["teacher"] = tmp_path / "distillation"
    ended = workshop.run("distillation", *flags(tmp_path, **changes))
    assert ended.code == 2 and says in ended.error


def test_on_policy_needs_the_whole_student(workshop, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = workshop.run("distillation", *flags(tmp_path, on_policy=0.5, parallel="fsdp"))
    assert ended.code == 2 and "--on_policy and --parallel fsdp don't work together" in ended.error


def test_its_answers_are_those_of_sample_many(own_answers):
    """The one place of the whole that is not spelled out above: which numbers draw which answer."""
    batches = own_answers()
    samples = [sample for row in batches.rows_of(2) for sample in row.tolist()]
    torch.manual_seed(0)
    numbers = torch.rand(len(samples), 12)
    prompts = [up_to_last_answer(*batches.dataset[sample]).tolist() for sample in samples]
    wanted = sample_many(batches.student.eval(), prompts, 12, [3, 7], numbers=numbers)
    written = batches.write(samples, numbers)
    for sample, prompt, answer in zip(samples, prompts, wanted, strict=True):
        assert written[sample][0].tolist() == (prompt + answer.tolist())[:40]
