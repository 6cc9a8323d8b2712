"""The one training loop, for pretraining, SFT and LoRA alike: read `train` from top to bottom.

What differs between the stages is the data and which parameters train; both are decided before `train`.
"""

import math
import os
import signal
import time
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from dataset.lm_dataset import collate
from dataset.packing import Order, pack_rows, single_rows
from trainer.args import (
    INTERRUPTED,
    TERMINATED,
    TIME_IS_UP,
    RunError,
    Terminated,
    UsageError,
    command_to_resume,
)
from trainer.checkpoint import (
    begin_anew,
    complaint,
    hold,
    last_good,
    load_checkpoint,
    refuse_bad_weights,
    restore,
    save_checkpoint,
    settings,
    trained_state,
)
from trainer.distributed import Ranks, choose_dtype, leave_ranks
from trainer.optim import build_optimizers, learning_rate_factor
from trainer.tracking import Stopwatch, Tracker, clock

# Batches in a row without finite gradients before we call the run lost. One can be a broken record, five are
# the model's own; float16 starts with a loss scale that is halved until nothing overflows.
MAX_SKIPPED, MAX_SKIPPED_FLOAT16 = 5, 100
ECHO = 2.0  # seconds within which torchrun hands on a signal that its processes have had already


class Batches(Dataset):
    """Batch number b of the run, as micro-batches of this rank: item b -> (micro-batches, targets, tokens).

    Every rank knows the rows of every batch, so it knows the number of supervised tokens (`targets`) on all
    ranks without asking. The loss of a step is the sum over supervised tokens divided by that number, never a
    mean of means: with 10 tokens of loss 1 here and 30 of loss 3 there it is (10 + 90) / 40 = 2.5, not 2.

    `replayed` are the samples of old data of which --replay mixes rows into every epoch, in the part that the
    flag names: 90 rows of new data and a replay of 0.1 make epochs of 100 rows, 10 of them old.
    """

    def __init__(self, dataset, samples: np.ndarray, args, pad_token_id: int, ranks: Ranks,
                 replayed: np.ndarray | None = None):
        self.dataset, self.ranks, self.pad_token_id, self.seed = dataset, ranks, pad_token_id, args.seed
        self.batch_size, self.micro_batch_size = args.batch_size, args.micro_batch_size
        self.samples, self.replayed = samples, replayed

        def fill(samples):
            return (pack_rows(dataset.lengths, args.max_seq_len, args.seed, samples) if args.packing
                    else single_rows(len(samples), args.seed))

        self.rows, self.num_old = fill(samples), 0  # num_old: rows of old data in an epoch
        if replayed is not None:
            self.old_rows = fill(replayed)
            self.num_old = max(1, round(len(self.rows) * args.replay / (1 - args.replay)))
        self.epoch, self.order = -1, None

    def __len__(self) -> int:
        """Batches in one pass over the data; the last may be smaller, and counts by its tokens."""
        return math.ceil((len(self.rows) + self.num_old) / self.batch_size)

    def rows_of(self, number: int) -> list[list[int]]:
        """The sample numbers of each row of batch `number`."""
        epoch, number = divmod(number, len(self))
        if epoch != self.epoch:  # each pass has an order of its own, which the seed decides
            self.epoch = epoch
            self.order = Order(len(self.rows) + self.num_old, [self.seed, epoch])
            if self.num_old:
                self.old = shuffled_again(len(self.old_rows), epoch * self.num_old, self.num_old, self.seed)
        chosen = self.order[number * self.batch_size:(number + 1) * self.batch_size]
        new = len(self.rows)
        return [self.samples[self.rows[i]] if i < new else self.replayed[self.old_rows[self.old[i - new]]]
                for i in chosen]

    def __getitem__(self, number: int) -> tuple[list[dict], int, int]:
        rows = self.rows_of(number)
        samples = np.concatenate(rows)
        mine = rows[self.ranks.rank::self.ranks.world_size]
        share = math.ceil(len(rows) / self.ranks.world_size)  # rows of the fullest rank
        size = self.micro_batch_size or share
        # All ranks make the same number of forward passes; one with no rows left gets a row without targets.
        micro = [collate(self.dataset, mine[i:i + size], self.pad_token_id) for i in range(0, share, size)]
        return micro, int(self.dataset.num_targets[samples].sum()), int(self.dataset.lengths[samples].sum())


def shuffled_again(size: int, start: int, count: int, seed: int) -> np.ndarray:
    """Items start .. start + count - 1 of an endless sequence: 0 .. size - 1 shuffled, shuffled anew, ..."""
    first, last = start // size, (start + count - 1) // size
    shuffles = [np.random.default_rng([seed, i, 1]).permutation(size) for i in range(first, last + 1)]
    return np.concatenate(shuffles)[start - first * size:][:count]


def split(dataset, eval_fraction: float, seed: int) -> tuple[Order, Order]:
    """Sample numbers for training and for validation, by a seeded shuffle; of n_train and of n_eval."""
    order = Order(len(dataset), seed)
    held_out = int(len(dataset) * eval_fraction)
    return order[held_out:], order[:held_out]


def to_device(batch: dict, device: torch.device) -> dict:
    return {k: v if v is None else v.to(device, non_blocking=True) for k, v in batch.items()}


@torch.no_grad()
def evaluate(model, batches: Batches, autocast, ranks: Ranks) -> dict[str, float]:
    """Loss (nats per supervised token) and bits per UTF-8 byte of supervised text, in one pass of `batches`.

    Bits per byte = summed loss / ln 2 / bytes: unlike the loss per token, comparable between tokenizers.
    """
    was_training = model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64)
    targets = 0
    for number in range(len(batches)):
        micro, batch_targets, _ = batches[number]
        targets += batch_targets
        for batch in micro:
            with autocast():
                loss_sum += model(**to_device(batch, ranks.device)).loss_sum.cpu()  # float64, which MPS lacks
    model.train(was_training)
    total = ranks.sum(loss_sum)[0]
    num_bytes = int(batches.dataset.num_bytes[batches.samples].sum())
    return {"eval_loss": total / max(1, targets), "bits_per_byte": total / math.log(2) / max(1, num_bytes)}


def train(model, batches: Batches, eval_batches: Batches | None, args, ranks: Ranks) -> dict:
    """Trains the parameters of `model` that require gradients; one iteration is one optimizer step.

    Args:
        model: a CausalLM on the CPU or already on `ranks.device`; frozen parameters stay as they are.
        batches: the training data; eval_batches: the validation data, or None for no validation.
        args: the flags of `trainer/args.py`.
    Returns: steps, tokens, seconds, and the last loss, eval_loss and bits_per_byte, for training.json.
    Raises UsageError where a checkpoint does not fit, RunError where the run can't go on, and SystemExit,
    after saving a checkpoint, when stopped by Ctrl-C, SIGTERM or --max_minutes (codes: trainer/args.py).
    """
    device = ranks.device
    dtype = choose_dtype(args.dtype, device)

    def autocast():
        return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()

    max_steps = args.max_steps or args.epochs * len(batches)
    model.to(device).train()
    model.gradient_checkpointing = args.gradient_checkpointing
    optimizers = build_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                  args.lora_plus_ratio, dtype)
    # float16 gradients underflow below 6e-8: the loss is multiplied up, the gradients divided down again.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parameters = [p for p in model.parameters() if p.requires_grad]

    step = batch_number = tokens = 0  # steps taken; batches drawn: more than steps where float16 skipped some
    loss_sum, logged_step, logged_tokens, logged_seconds = 0.0, 0, 0, 0.0  # loss_sum: since the last log line
    metrics, seconds_before = {}, 0.0
    identity = settings(args) | {"--dtype": str(dtype).removeprefix("torch.")}  # not "auto"
    lock = hold(args.run_dir) if ranks.is_main else None  # as long as this process lives  # noqa: F841
    state = load_checkpoint(args.run_dir, identity, ranks.is_main) if args.resume else None
    if state:
        restore(state, model, optimizers, scaler)
        step, batch_number, tokens = state["step"], state["batch"], state["tokens"]
        loss_sum, logged_step, logged_tokens, logged_seconds = state["unlogged"]
        metrics, seconds_before = state["metrics"], state["seconds"]
    if not ranks.agree(step):
        raise UsageError(f"--resume: hosts see different checkpoints in {args.run_dir}, which must be shared")
    if ranks.is_main and not state:
        begin_anew(args.run_dir)
    wandb_project = (args.wandb_project or "seedling") if args.use_wandb else None
    tracker = Tracker(args.run_dir, ranks.is_main, step, wandb_project, identity)
    old_rows = f" and {batches.num_old:,} old" if batches.num_old else ""
    tracker.say(f"{len(batches.rows):,}{old_rows} rows, {max_steps:,} steps of {args.batch_size} rows, "
                f"{str(dtype).removeprefix('torch.')} on {device} x {ranks.world_size}"
                + (f", resumed at step {step:,}" if state else "")
                + ", from the start: no checkpoint to resume from" * bool(args.resume and not state))
    if args.compile:
        model.compile()  # in place: names of parameters stay as they are
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.world_size > 1 else model
    ahead = iter(DataLoader(batches, batch_size=None, sampler=range(batch_number, 2**62),
                            num_workers=args.num_workers, worker_init_fn=ignore_interrupts,
                            pin_memory=device.type == "cuda"))
    clock_now = Stopwatch(seconds_before)
    # The sum of a resumed run is already that of all ranks: one of them carries it on. In float64 (which MPS
    # lacks) float32 losses add up to the same whatever their order.
    loss_sum = torch.tensor(loss_sum if ranks.is_main else 0.0, device=device,
                            dtype=torch.float32 if device.type == "mps" else torch.float64)
    skipped = 0

    with stop_signals() as signalled:
        while step < max_steps:
            # 1. The learning rate of this step
            factor = learning_rate_factor(step, max_steps, args.warmup_ratio)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.learning_rate * group["ratio"] * factor

            # 2. Gradients of the whole batch, one micro-batch after the other
            micro_batches, targets, batch_tokens = next(ahead)
            # Dropout depends on the batch's number alone: a resumed run draws what the first would have.
            torch.manual_seed((args.seed * 1_000_003 + batch_number) * ranks.world_size + ranks.rank)
            step_loss = torch.zeros((), device=device)
            for i, batch in enumerate(micro_batches):
                last = i == len(micro_batches) - 1  # ranks exchange gradients once a step, with the last one
                with nullcontext() if last or replica is model else replica.no_sync():
                    with autocast():
                        loss = replica(**to_device(batch, device)).loss_sum / max(1, targets)
                    loss = loss * (1 + 0 * loss.detach())  # times 1; but an infinite loss has gradient NaN
                    scaler.scale(loss * ranks.world_size).backward()  # DDP averages over ranks; we want sums
                step_loss += loss.detach()
            batch_number += 1

            # 3. The optimizer step
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
            sound = math.isfinite(grad_norm)  # the same on all ranks; here the CPU waits for the GPU
            if sound:  # else no optimizer may step, not even one whose own gradients are sound
                for optimizer in optimizers:
                    scaler.step(optimizer)
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            if not sound:  # no weight moved, so the schedule waits too
                skipped += 1
                if ranks.is_main and not scaler.is_enabled():
                    tracker.say(f"warning: step {step + 1}: batch {batch_number - 1} is skipped: "
                                + diagnose(model, batches, batch_number - 1, autocast, device))
                if skipped >= (MAX_SKIPPED_FLOAT16 if scaler.is_enabled() else MAX_SKIPPED):
                    raise RunError(f"{skipped} batches in a row had gradients that are not finite after step "
                                   f"{step}: lower --learning_rate, raise --warmup_ratio, or use --dtype "
                                   f"float32 or bfloat16; {last_good(args.run_dir)}")
                continue
            step, tokens, skipped = step + 1, tokens + batch_tokens, 0
            loss_sum += step_loss

            # 4. What the outside sees: log, validate, save
            if step % args.log_interval == 0 or step == max_steps:
                mean_loss = ranks.sum(loss_sum)[0] / (step - logged_step)
                now = clock_now()
                speed = (tokens - logged_tokens) / max(1e-9, now - logged_seconds)
                metrics |= {"step": step, "max_steps": max_steps, "loss": mean_loss,
                            "learning_rate": args.learning_rate * factor, "grad_norm": grad_norm.item(),
                            "skipped": batch_number - step, "tokens": tokens,
                            "tokens_per_second": speed, "seconds": now}
                tracker.log({k: v for k, v in metrics.items() if k not in ("eval_loss", "bits_per_byte")})
                left = (now - logged_seconds) / (step - logged_step) * (max_steps - step)
                tracker.say(f"step {step:>{len(str(max_steps))}}/{max_steps} | loss {mean_loss:.4f} | "
                            f"lr {args.learning_rate * factor:.2e} | grad {grad_norm.item():.2f} | "
                            f"{speed:,.0f} tokens/s | {clock(left)} left")
                loss_sum, logged_step, logged_tokens = torch.zeros_like(loss_sum), step, tokens
                logged_seconds = clock_now()
            if eval_batches and (step == max_steps or args.eval_interval and step % args.eval_interval == 0):
                before = clock_now()
                metrics |= {"step": step, **evaluate(model, eval_batches, autocast, ranks)}
                tracker.log({k: metrics[k] for k in ("step", "eval_loss", "bits_per_byte")})
                tracker.say(f"step {step:>{len(str(max_steps))}}/{max_steps} | validation loss "
                            f"{metrics['eval_loss']:.4f} | {metrics['bits_per_byte']:.4f} bits per byte")
                logged_seconds += clock_now() - before  # not the training's time
            stop = agree(ranks, signalled() or TIME_IS_UP * (time.monotonic() > args.stop_at))
            if stop or step % args.save_interval == 0 or step == max_steps:
                refuse_bad_weights(model, step, args.run_dir)
                unlogged, failed = (ranks.sum(loss_sum)[0], logged_step, logged_tokens, logged_seconds), ""
                if ranks.is_main:
                    state = {"parameters": trained_state(model), "scaler": scaler.state_dict(),
                             "optimizers": [o.state_dict() for o in optimizers],
                             "step": step, "batch": batch_number, "tokens": tokens, "seconds": clock_now(),
                             "metrics": metrics, "unlogged": unlogged, "settings": identity}
                    try:
                        tracker.sync()
                        save_checkpoint(args.run_dir, step, state, args.keep_last)
                    except OSError as error:
                        failed = complaint(error, args.run_dir, step, state)
                        tracker.say(f"warning: {failed}")
                if ranks.any(bool(failed), ranks.patient) and (stop or args.on_full_disk == "stop"):
                    raise RunError(f"{failed}; to go on when there is room: {command_to_resume()}")
            if stop and step < max_steps:
                tracker.say(f"stopped at step {step}; to go on: {command_to_resume()}")
                leave_ranks(ranks)
                raise SystemExit(stop)

    tracker.finish()
    return {"steps": step, "skipped": batch_number - step, "tokens": tokens, "seconds": clock_now(),
            **{k: metrics[k] for k in ("loss", "eval_loss", "bits_per_byte") if k in metrics}}


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the processes that prepare batches too: they go on, so the loop can end its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_signals():
    """Within the block the first Ctrl-C, SIGTERM or SIGHUP asks the loop to stop; a second one stops at once.

    Gives a function that returns the exit code that was asked for, or 0.
    """
    codes, seen = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}, []
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # ignored under nohup
        codes[signal.SIGHUP] = TERMINATED  # the terminal was closed

    def ask(number, frame):
        if not seen and os.environ.get("RANK", "0") == "0":  # no print: it may be one that was interrupted
            with suppress(OSError):
                os.write(1, b"\nstopping after this step (again to stop at once)\n")
        # A terminal, or Slurm, signals torchrun and its processes, and torchrun hands it on to them: that
        # second one is nobody's wish.
        if seen and ("TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - seen[0][1] > ECHO):
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        seen.append((codes[number], time.monotonic()))

    before = {number: signal.signal(number, ask) for number in codes}
    try:
        yield lambda: seen[0][0] if seen else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(ranks: Ranks, code: int) -> int:
    """The exit code that any rank was asked to stop with, the same on all; 0: go on."""
    codes = (INTERRUPTED, TERMINATED, TIME_IS_UP)
    votes = [float(code == c) for c in codes]
    votes = ranks.sum(*votes) if ranks.world_size > 1 else votes
    return next((c for c, vote in zip(codes, votes, strict=True) if vote), 0)


def diagnose(model, batches: Batches, number: int, autocast, device: torch.device) -> str:
    """What is not finite about batch `number`: its samples, each run alone once more, and the activations.

    One rank finds out for all: every rank has all the weights, and knows all the rows.
    """
    samples = [int(sample) for row in batches.rows_of(number) for sample in row]
    largest: dict[str, float] = {}  # module -> its largest output, in the order of computation

    def look(name):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
                size = output.abs().max().nan_to_num(math.inf, math.inf).item()
                largest[name] = max(largest.get(name, 0.0), size)
        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    guilty, was_training = [], model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast():
            for sample in samples:
                batch = collate(batches.dataset, [[sample]], batches.pad_token_id)
                if not math.isfinite(model(**to_device(batch, device)).loss_sum):
                    guilty.append(sample)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    top = sorted(largest, key=largest.get, reverse=True)[:3]
    named = list(dict.fromkeys(batches.dataset.where(sample) for sample in guilty or samples))
    return (f"{'the loss' if guilty else 'the gradient, not the loss,'} of "
            f"{', '.join(named[:8])}{', ...' * (len(named) > 8)} is not finite; largest activations: "
            + ", ".join(f"{name} {largest[name]:.3g}" for name in top)
            + f"; weights that are not finite: {', '.join(bad[:3])}" * bool(bad))
