"""The loop: a step's loss is the mean over all its supervised tokens, however the batch is cut up."""

import math
import pickle
import signal

import numpy as np
import pytest
import torch
from build import TokenSamples, make_batches
from torch.nn import functional as F

import trainer.diagnose
import trainer.loop
from common.errors import INTERRUPTED, TERMINATED, TIME_IS_UP, RunError
from model.lora import apply_lora, freeze_all_but_lora
from trainer.batches import Batches, split
from trainer.checkpoint import checkpoints
from trainer.distributed import Ranks
from trainer.loop import evaluate, train
from trainer.losses import cross_entropy
from trainer.optim import learning_rate_factor

ALONE = Ranks(0, 1, torch.device("cpu"))
VOCABULARY = 50


class Samples(TokenSamples):
    """A dataset in memory: ragged samples, the last `supervised` tokens of each trained on."""

    def __init__(self, shape: list[tuple[int, int]], seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.samples = []
        for length, supervised in shape:
            ids = torch.randint(4, VOCABULARY, (length,), generator=generator)
            self.samples.append((ids, torch.where(torch.arange(length) >= length - supervised, ids, -100)))
        self.lengths = np.array([length for length, _ in shape])
        self.num_targets = np.array([supervised for _, supervised in shape])
        self.num_bytes = self.num_targets * 3

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    identity = "samples in memory"

    def where(self, sample):
        return f"data.jsonl:{sample + 1}"


RAGGED = [(12, 3), (30, 25), (7, 1), (22, 2), (15, 14), (28, 9), (9, 8), (31, 4), (18, 1), (13, 12), (26, 20)]


@pytest.fixture
def go(make_model, arguments, read_log):
    """Trains a fresh tiny model: `go(samples, batch_size=2) -> (model, log)`."""

    def run(samples, model=None, eval_samples=None, **flags):
        args = arguments(**flags)
        model = model or make_model(VOCABULARY)
        batches = make_batches(samples, np.arange(len(samples)), args, 3, ALONE)
        held = None
        if eval_samples:
            held = make_batches(eval_samples, np.arange(len(eval_samples)), args, 3, ALONE)
        result = train(model, batches, cross_entropy, held, args, ALONE)
        return model, read_log(args.run_dir), result

    return run


def losses(log):
    return [line["loss"] for line in log if "loss" in line]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- the mean over supervised tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_accumulation_changes_nothing(go, packing):
    flags = {"packing": packing, "max_seq_len": 40, "epochs": 2}
    whole, log, _ = go(Samples(RAGGED), **flags)
    for size in (1, 2, 3):
        parts, other, _ = go(Samples(RAGGED), micro_batch_size=size, **flags)
        np.testing.assert_allclose(losses(other), losses(log), rtol=1e-5)
        for name, weight in weights(whole).items():
            torch.testing.assert_close(weights(parts)[name], weight, atol=1e-5, rtol=0, msg=name)


def test_loss_is_the_mean_over_tokens_not_a_mean_of_means(go, make_model):
    samples = Samples([(12, 1), (30, 25), (20, 10)])
    model = make_model(VOCABULARY)
    sums = [F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="sum").item()
            for ids, labels in samples.samples]  # cross_entropy ignores -100
    _, log, _ = go(samples, packing=False, batch_size=3, micro_batch_size=1, max_steps=1)
    assert losses(log)[0] == pytest.approx(sum(sums) / 36, rel=1e-5)
    assert abs(np.mean([sums[0] / 1, sums[1] / 25, sums[2] / 10]) - sum(sums) / 36) > 1e-3


def test_a_loss_may_name_other_sums_for_the_log(arguments, make_model, read_log):
    """They are divided by the same number of units as the loss, over micro-batches and steps."""
    def with_accuracy(model, batch):
        loss_sum, _ = cross_entropy(model, batch)
        supervised = (batch["labels"][:, 1:] != -100).sum()
        return loss_sum, {"supervised": 2.0 * supervised, "loss_again": loss_sum}

    args = arguments(packing=False, batch_size=5, micro_batch_size=2, log_interval=2)
    samples = Samples(RAGGED)
    before = dict(vars(args))
    batches = make_batches(samples, np.arange(len(samples)), args, 3, ALONE)
    train(make_model(VOCABULARY), batches, with_accuracy, None, args, ALONE)
    logged = [line for line in read_log(args.run_dir) if "loss" in line]
    assert len(logged) == 2 and all(line["supervised"] == 2.0 for line in logged)
    assert all(line["loss_again"] == pytest.approx(line["loss"]) for line in logged)
    assert vars(args) == before  # train reads the flags and never writes to them


def test_gradient_is_that_of_the_mean_over_tokens(go, make_model, monkeypatch):
    samples, seen = Samples([(12, 1), (30, 25), (20, 10)]), {}

    def look(parameters, limit):
        seen["gradients"] = [p.grad.clone() for p in parameters]
        return torch.zeros(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    go(samples, packing=False, batch_size=3, micro_batch_size=2, max_steps=1)
    model = make_model(VOCABULARY)
    sum(F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="sum")
        for ids, labels in samples.samples).div(36).backward()
    for (name, parameter), gradient in zip(model.named_parameters(), seen["gradients"], strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_batch_without_a_supervised_token_is_harmless(go):
    model, log, _ = go(Samples([(10, 0), (12, 0), (9, 0)]), packing=False, batch_size=1, max_steps=3)
    assert losses(log) == [0.0, 0.0, 0.0]
    assert all(weight.isfinite().all() for weight in weights(model).values())
    model, log, _ = go(Samples([(10, 0), (12, 5), (9, 0), (20, 3)]), packing=False, batch_size=1, epochs=2)
    assert sorted(losses(log))[:4] == [0.0] * 4 and sorted(losses(log))[4] > 0
    assert all(weight.isfinite().all() for weight in weights(model).values())


def test_partial_last_batch_is_trained_on(go, arguments):
    args = arguments(packing=False, batch_size=4, seed=1)
    batches = make_batches(Samples(RAGGED), np.arange(11), args, 3, ALONE)
    assert len(batches) == 3
    for epoch in (0, 3, 6):
        numbers = [batches[epoch + i] for i in range(3)]
        assert [sum(len(m["input_ids"]) for m in micro) for micro, _, _ in numbers] == [4, 4, 3]
        assert sum(targets for _, targets, _ in numbers) == sum(s for _, s in RAGGED)
    _, log, result = go(Samples(RAGGED), packing=False, batch_size=4, epochs=1)
    assert log[-1]["step"] == result["steps"] == 3
    assert log[-1]["tokens"] == result["tokens"] == sum(length for length, _ in RAGGED)


def test_each_epoch_has_an_order_of_its_own_and_any_batch_can_be_asked_for(arguments):
    batches = make_batches(Samples(RAGGED), np.arange(11), arguments(packing=False), 3, ALONE)
    forward = [batches[i] for i in range(6)]
    for i in (5, 0, 3):  # as a resumed run does
        for a, b in zip(batches[i][0], forward[i][0], strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])
    assert any(not torch.equal(a[0][0]["input_ids"], b[0][0]["input_ids"])
               for a, b in zip(forward[:3], forward[3:], strict=True))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, None])
def test_ranks_share_a_batch_without_loss_or_repetition(arguments, world, micro_batch_size):
    args = arguments(packing=False, batch_size=4)
    args.micro_batch_size = micro_batch_size
    ranks = [make_batches(Samples(RAGGED), np.arange(11), args, 3, Ranks(r, world, torch.device("cpu")))
             for r in range(world)]
    alone = make_batches(Samples(RAGGED), np.arange(11), args, 3, ALONE)
    for number in range(3):
        parts = [batches[number] for batches in ranks]
        assert len({(len(micro), targets, tokens) for micro, targets, tokens in parts}) == 1  # in step

        def rows(items):
            return sorted(tuple(ids[ids != 3].tolist()) for micro, _, _ in items for m in micro
                          for ids in m["input_ids"] if (ids != 3).any())

        assert rows(parts) == rows([alone[number]])


def test_split_is_whole_and_disjoint():
    train_part, eval_part = split(range(50), 0.2, seed=3)
    assert len(eval_part) == 10 and sorted([*train_part, *eval_part]) == list(range(50))
    assert np.array_equal(split(range(50), 0.2, seed=3)[1], eval_part)
    assert len(split(range(3), 0.0, seed=3)[1]) == 0


def test_validation_loss_and_bits_per_byte_by_hand(arguments, make_model):
    model, samples = make_model(VOCABULARY), Samples(RAGGED)
    batches = make_batches(samples, np.arange(11), arguments(packing=True, max_seq_len=40), 3, ALONE)
    model.eval()
    found = evaluate(model, batches, cross_entropy, torch.float32, ALONE)
    with torch.no_grad():
        total = sum(F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="sum").item()
                    for ids, labels in samples.samples)
    targets = sum(s for _, s in RAGGED)
    assert found["eval_loss"] == pytest.approx(total / targets, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / (3 * targets), rel=1e-5)
    assert not model.training


# --- float16 ----------------------------------------------------------------------------------------------


def scaler_from(monkeypatch, scale):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, **k, init_scale=scale))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_converges(go, optimizer):
    _, log, _ = go(Samples(RAGGED), packing=False, dtype="float16", optimizer=optimizer, learning_rate=0.01,
                   max_steps=30)
    assert np.mean(losses(log)[-3:]) < losses(log)[0] - 1


def test_bfloat16_is_near_float32(go):
    _, exact, _ = go(Samples(RAGGED), packing=False, max_steps=5)
    _, near, _ = go(Samples(RAGGED), packing=False, max_steps=5, dtype="bfloat16")
    assert losses(near) != losses(exact)
    np.testing.assert_allclose(losses(near), losses(exact), atol=0.05)


def test_overflow_skips_without_moving_schedule_or_count(go, monkeypatch, make_model):
    scaler_from(monkeypatch, 2.0**40)
    drawn = []
    real = Batches.__getitem__
    monkeypatch.setattr(Batches, "__getitem__", lambda self, n: drawn.append(n) or real(self, n))
    _, log, _ = go(Samples(RAGGED), packing=False, dtype="float16", max_steps=6)
    assert len(drawn) > 10  # batches were given up ...
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]  # ... and no step was counted for them
    assert [line["learning_rate"] for line in log] == [1e-3 * learning_rate_factor(s, 6, 0) for s in range(6)]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses(log))


def spoil(model, calls):
    """The gradient of one matrix overflows in those backward passes, and no other does."""
    count = iter(range(10**6))
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda g: g * math.inf if next(count) in calls else g)
    return model


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_skipped_step_changes_no_weight_at_all(go, make_model, monkeypatch, optimizer):
    monkeypatch.setattr(trainer.diagnose, "MAX_SKIPPED_FLOAT16", 4)
    model = spoil(make_model(VOCABULARY), range(100))
    before = weights(model)
    says = "4 batches in a row had gradients that are not finite after step 0"
    with pytest.raises(RunError, match=says) as error:
        go(Samples(RAGGED), model, packing=False, dtype="float16", optimizer=optimizer)
    assert "\n" not in str(error.value)
    for name, weight in weights(model).items():  # Muon's matrix overflowed: AdamW has to wait with it
        assert torch.equal(weight, before[name]), name


def test_skipped_step_does_not_spoil_the_logged_mean(go, make_model):
    """The mean over four good steps is logged, though the third of five batches overflowed."""
    runs = [go(Samples(RAGGED), spoil(make_model(VOCABULARY), {2}), packing=False, dtype="float16",
               max_steps=4, log_interval=interval)[1] for interval in (1, 4)]
    assert losses(runs[1]) == pytest.approx([np.mean(losses(runs[0]))], rel=1e-6)


# --- numbers that are not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_batch_is_as_if_it_had_not_been_drawn(go, make_model, dtype, optimizer, monkeypatch, capsys):
    flags = {"packing": False, "dtype": dtype, "optimizer": optimizer, "max_steps": 5}
    model, log, result = go(Samples(RAGGED), spoil(make_model(VOCABULARY), {2}), **flags)
    assert [line["skipped"] for line in log] == [0, 0, 1, 1, 1] and result["skipped"] == 1
    assert "step 3: batch 2 is skipped" in capsys.readouterr().out
    real = Batches.__getitem__
    monkeypatch.setattr(Batches, "__getitem__", lambda self, n: real(self, n + (n >= 2)))
    expected, other, _ = go(Samples(RAGGED), **flags)
    assert losses(log) == losses(other)
    for name, weight in weights(expected).items():
        assert torch.equal(weights(model)[name], weight), name


def test_the_message_names_the_record_and_the_module(go, make_model, capsys):
    samples, model = Samples(RAGGED), make_model(VOCABULARY)
    for ids, _ in samples.samples:
        ids[ids == 49] = 5
    samples.samples[6][0][2] = 49  # what no other sample holds, and the model can't bear

    def burst(module, inputs, output):
        return output.masked_fill((inputs[0] == 49)[..., None], math.inf)

    model.model.embed_tokens.register_forward_hook(burst)
    _, log, _ = go(samples, model, packing=False, batch_size=2, epochs=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    says = "is skipped: the loss of data.jsonl:7 is not finite; largest activations: model.embed_tokens inf"
    assert log[-1]["step"] == 6 and log[-1]["skipped"] == len(lines) > 0
    assert all(says in line for line in lines)


def test_the_message_names_the_weights(go, make_model, capsys):
    model = make_model(VOCABULARY)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(RunError, match="5 batches in a row"):
        go(Samples(RAGGED), model, packing=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(lines) == 5 and all("weights that are not finite: model.norm.weight" in line for line in lines)


def test_an_infinite_loss_is_caught_though_its_gradient_is_finite(go, make_model, monkeypatch):
    model = make_model(VOCABULARY)
    real = type(model).forward

    def forward(self, *args, **batch):
        output = real(self, *args, **batch)
        output.token_losses = output.token_losses + math.inf
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    before = weights(model)
    with pytest.raises(RunError, match="5 batches in a row"):
        go(Samples(RAGGED), model, packing=False)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_bad_batches_in_a_row_end_the_run_and_name_the_last_good_checkpoint(go, make_model, arguments):
    with pytest.raises(RunError) as error:
        model = spoil(make_model(VOCABULARY), range(7, 100))
        go(Samples(RAGGED), model, packing=False, epochs=9, save_interval=3)
    assert "5 batches in a row had gradients that are not finite after step 7" in str(error.value)
    last = arguments().run_dir / "checkpoints" / "step_00000006"
    assert str(error.value).endswith(f"the last good checkpoint is {last}") and last.is_dir()


def test_weights_that_are_not_finite_are_never_saved(go, arguments):
    with pytest.raises(RunError, match="not finite.*there is no checkpoint yet") as error:
        go(Samples(RAGGED), packing=False, learning_rate=1e38, max_steps=1, weight_decay=100)
    assert "after step 1 " in str(error.value)
    assert not checkpoints(arguments().run_dir)


# --- what else the flags promise ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_falls(go, optimizer):
    _, log, result = go(Samples(RAGGED), eval_samples=Samples(RAGGED[:4]), packing=True, max_seq_len=40,
                        optimizer=optimizer, learning_rate=0.01, max_steps=30, eval_interval=10)
    assert np.mean(losses(log)[-3:]) < losses(log)[0] - 1.5
    assert [line["step"] for line in log if "eval_loss" in line] == [10, 20, 30]
    assert result["eval_loss"] == log[-1]["eval_loss"] and result["loss"] == losses(log)[-1]


def test_gradient_checkpointing_changes_nothing(go):
    model, log, _ = go(Samples(RAGGED), packing=False, max_steps=5)
    other, log2, _ = go(Samples(RAGGED), packing=False, max_steps=5, gradient_checkpointing=True)
    assert other.gradient_checkpointing and not model.gradient_checkpointing
    np.testing.assert_allclose(losses(log2), losses(log), rtol=1e-6)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weights(other)[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_leaves_the_base_as_it_was(go, make_model, checkpointing):
    model = make_model(VOCABULARY)
    apply_lora(model, rank=4, dropout=0.1)
    freeze_all_but_lora(model)
    before = weights(model)
    go(Samples(RAGGED), model, packing=False, max_steps=6, gradient_checkpointing=checkpointing)
    for name, weight in weights(model).items():
        if ".lora." not in name:
            assert torch.equal(weight, before[name]), name
            assert model.get_parameter(name).grad is None
        elif name.endswith("lora.B.weight"):
            assert not torch.equal(weight, before[name]), name


def test_clipping_limits_the_gradient_but_logs_its_true_norm(go, monkeypatch):
    norms, step = [], trainer.optim.AdamW.step

    def look(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, closure)

    monkeypatch.setattr(trainer.optim.AdamW, "step", look)
    _, free, _ = go(Samples(RAGGED), packing=False, max_steps=1, grad_clip=0)
    _, tight, _ = go(Samples(RAGGED), packing=False, max_steps=1, grad_clip=0.01)
    assert free[0]["grad_norm"] == tight[0]["grad_norm"] > 0.01
    assert norms == pytest.approx([free[0]["grad_norm"], 0.01], rel=1e-3)


def test_batches_can_be_sent_to_workers_that_are_not_forks(arguments):
    """As where DataLoader starts them by spawn or forkserver; a process group can't be sent."""
    ranks = Ranks(1, 2, torch.device("cpu"), patient=lambda: "not to be pickled")
    batches = make_batches(Samples(RAGGED), np.arange(11), arguments(packing=False), 3, ranks)
    sent = pickle.loads(pickle.dumps(batches))
    for ours, theirs in zip(sent[0][0], batches[0][0], strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_workers_prepare_the_same_batches(go):
    _, log, _ = go(Samples(RAGGED), packing=False, max_steps=7)
    _, other, _ = go(Samples(RAGGED), packing=False, max_steps=7, num_workers=1)
    assert losses(other) == losses(log)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)])
def test_first_stop_signal_finishes_the_step_and_handlers_come_back(name, code, go, monkeypatch, arguments,
                                                                    capsys):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"this system has no {name}")
    before = signal.signal(number, signal.SIG_DFL)  # it may be ignored, as SIGHUP is under nohup

    def interrupt(step, *rest):
        if step == 3:
            signal.raise_signal(number)
        return learning_rate_factor(step, *rest)

    monkeypatch.setattr(trainer.loop, "learning_rate_factor", interrupt)
    try:
        with pytest.raises(SystemExit) as ended:
            go(Samples(RAGGED), packing=False, max_steps=9)
        assert ended.value.code == code and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert "stopped at step 4" in capsys.readouterr().out
    assert (arguments().run_dir / "checkpoints" / "step_00000004" / "state.pt").is_file()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_a_second_signal_stops_at_once(number, code, go, monkeypatch, arguments):
    calls = []

    def interrupt(step, *rest):
        calls.append(step)
        if step == 3:
            signal.raise_signal(number)
            signal.raise_signal(number)
        return learning_rate_factor(step, *rest)

    monkeypatch.setattr(trainer.loop, "learning_rate_factor", interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(Samples(RAGGED), packing=False, max_steps=9, save_interval=2)
    assert calls == [0, 1, 2, 3]
    assert [path.name for path in checkpoints(arguments().run_dir)] == ["step_00000002"]
    # torchrun hands on what its processes have had already: no second wish
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(SystemExit) as ended:
        go(Samples(RAGGED), packing=False, max_steps=9)
    assert ended.value.code == code


def test_a_stop_does_not_wait_for_the_end_of_bad_batches(go, make_model, monkeypatch, arguments, capsys):
    drawn, real = [], Batches.__getitem__

    def draw(self, number):
        drawn.append(number)
        if len(drawn) == 6:
            signal.raise_signal(signal.SIGINT)
        return real(self, number)

    monkeypatch.setattr(Batches, "__getitem__", draw)
    model = spoil(make_model(VOCABULARY), range(3, 100))
    with pytest.raises(SystemExit) as ended:
        go(Samples(RAGGED), model, packing=False, dtype="float16", max_steps=50)
    assert ended.value.code == INTERRUPTED and len(drawn) < 10
    assert "stopped at step 3; to go on: " in capsys.readouterr().out
    (checkpoint,) = checkpoints(arguments().run_dir)
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert state["step"] == 3 and state["batch"] == len(drawn)  # what is known to be bad is not drawn again


def test_a_stop_before_the_first_step_has_nothing_to_save(go, make_model, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        go(Samples(RAGGED), spoil(make_model(VOCABULARY), range(100)), packing=False, max_minutes=1e-9)
    assert ended.value.code == TIME_IS_UP and not checkpoints(arguments().run_dir)
    assert "stopped at step 0; to go on: " in capsys.readouterr().out


def test_time_is_up(go, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        go(Samples(RAGGED), packing=False, max_steps=9, max_minutes=1e-9)
    assert ended.value.code == TIME_IS_UP == 75
    assert "stopped at step 1; to go on: " in capsys.readouterr().out
    assert (arguments().run_dir / "checkpoints" / "step_00000001" / "state.pt").is_file()
