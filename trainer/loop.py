"""The one training loop, for pretraining, SFT and LoRA alike: read `train` from top to bottom.

What differs between the stages is the data and which parameters train; both are decided before `train`.
"""

import math
import signal
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from dataset.lm_dataset import collate
from dataset.packing import pack_rows, single_rows
from trainer.args import UsageError
from trainer.checkpoint import begin_anew, load_checkpoint, restore, save_checkpoint, settings, trained_state
from trainer.distributed import Ranks, choose_dtype
from trainer.optim import build_optimizers, learning_rate_factor
from trainer.tracking import Stopwatch, Tracker, clock

MAX_SKIPPED = 100  # float16 steps in a row whose gradients overflow before we call the run lost


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
            return (pack_rows(dataset.lengths[samples], args.max_seq_len, args.seed) if args.packing
                    else single_rows(len(samples), args.seed))

        self.rows, self.num_old = fill(samples), 0  # num_old: rows of old data in an epoch
        if replayed is not None:
            self.old_rows = fill(replayed)
            self.num_old = max(1, round(len(self.rows) * args.replay / (1 - args.replay)))
        self.epoch, self.order = -1, None

    def __len__(self) -> int:
        """Batches in one pass over the data; the last may be smaller, and counts by its tokens."""
        return math.ceil((len(self.rows) + self.num_old) / self.batch_size)

    def __getitem__(self, number: int) -> tuple[list[dict], int, int]:
        epoch, number = divmod(number, len(self))
        if epoch != self.epoch:  # each pass has an order of its own, which the seed decides
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows) + self.num_old)
            if self.num_old:
                self.old = shuffled_again(len(self.old_rows), epoch * self.num_old, self.num_old, self.seed)
        chosen = self.order[number * self.batch_size:(number + 1) * self.batch_size]
        new = len(self.rows)
        rows = [self.samples[self.rows[i]] if i < new else self.replayed[self.old_rows[self.old[i - new]]]
                for i in chosen]
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


def split(dataset, eval_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers for training and for validation, by a seeded shuffle. Shapes (n_train,), (n_eval,)."""
    order = np.random.default_rng(seed).permutation(len(dataset))
    held_out = int(len(dataset) * eval_fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


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
    Raises UsageError where a checkpoint does not fit or the loss is no longer a number, KeyboardInterrupt
    when stopped by Ctrl-C or SIGTERM (after saving a checkpoint).
    """
    device = ranks.device
    dtype = choose_dtype(args.dtype, device)

    def autocast():
        return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()

    max_steps = args.max_steps or args.epochs * len(batches)
    model.to(device).train()
    model.gradient_checkpointing = args.gradient_checkpointing
    optimizers = build_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                  args.lora_plus_ratio)
    # float16 gradients underflow below 6e-8: the loss is multiplied up, the gradients divided down again.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parameters = [p for p in model.parameters() if p.requires_grad]

    step = batch_number = tokens = 0  # steps taken; batches drawn: more than steps where float16 skipped some
    loss_sum, logged_step, logged_tokens, logged_seconds = 0.0, 0, 0, 0.0  # loss_sum: since the last log line
    metrics, seconds_before = {}, 0.0
    state = load_checkpoint(args.run_dir, args) if args.resume else None
    if state:
        restore(state, model, optimizers, scaler)
        step, batch_number, tokens = state["step"], state["batch"], state["tokens"]
        loss_sum, logged_step, logged_tokens, logged_seconds = state["unlogged"]
        metrics, seconds_before = state["metrics"], state["seconds"]
    elif ranks.is_main:
        begin_anew(args.run_dir)
    wandb_project = (args.wandb_project or "seedling") if args.use_wandb else None
    tracker = Tracker(args.run_dir, ranks.is_main, step, wandb_project, settings(args))
    old_rows = f" and {batches.num_old:,} old" if batches.num_old else ""
    tracker.say(f"{len(batches.rows):,}{old_rows} rows, {max_steps:,} steps of {args.batch_size} rows, "
                f"{str(dtype).removeprefix('torch.')} on {device} x {ranks.world_size}"
                + (f", resumed at step {step:,}" if state else ""))
    if args.compile:
        model.compile()  # in place: names of parameters stay as they are
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.world_size > 1 else model
    ahead = iter(DataLoader(batches, batch_size=None, sampler=range(batch_number, 2**62),
                            num_workers=args.num_workers, worker_init_fn=ignore_interrupts,
                            pin_memory=device.type == "cuda"))
    clock_now = Stopwatch(seconds_before)
    # The sum of a resumed run is already that of all ranks: one of them carries it on.
    loss_sum = torch.tensor(loss_sum if ranks.is_main else 0.0, dtype=torch.float32, device=device)
    skipped = 0

    with stop_signals() as stopped:
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
            step_loss = torch.zeros_like(loss_sum)
            for i, batch in enumerate(micro_batches):
                last = i == len(micro_batches) - 1  # ranks exchange gradients once a step, with the last one
                with nullcontext() if last or replica is model else replica.no_sync():
                    with autocast():
                        loss = replica(**to_device(batch, device)).loss_sum / max(1, targets)
                    scaler.scale(loss * ranks.world_size).backward()  # DDP averages over ranks; we want sums
                step_loss += loss.detach()
            batch_number += 1

            # 3. The optimizer step
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
            overflow = scaler.is_enabled() and not math.isfinite(grad_norm)
            if not overflow:  # else no optimizer may step, not even one whose own gradients are sound
                for optimizer in optimizers:
                    scaler.step(optimizer)
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            if overflow:  # no weight moved, so the schedule waits too
                skipped += 1
                if skipped >= MAX_SKIPPED:
                    raise UsageError(f"float16 gradients overflowed {skipped} times in a row at step {step}; "
                                     f"use --dtype bfloat16 or float32, or a lower --learning_rate")
                continue
            step, tokens, skipped = step + 1, tokens + batch_tokens, 0
            loss_sum += step_loss

            # 4. What the outside sees: log, validate, save
            if step % args.log_interval == 0 or step == max_steps:
                mean_loss = ranks.sum(loss_sum)[0] / (step - logged_step)
                if not math.isfinite(mean_loss):
                    raise UsageError(f"the loss became {mean_loss} before step {step}; lower --learning_rate,"
                                     f" raise --warmup_ratio, or use --dtype float32")
                now = clock_now()
                speed = (tokens - logged_tokens) / max(1e-9, now - logged_seconds)
                metrics |= {"step": step, "max_steps": max_steps, "loss": mean_loss,
                            "learning_rate": args.learning_rate * factor, "grad_norm": grad_norm.item(),
                            "tokens": tokens, "tokens_per_second": speed, "seconds": now}
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
            stop = ranks.any(stopped())
            if stop or step % args.save_interval == 0 or step == max_steps:
                unlogged = (ranks.sum(loss_sum)[0], logged_step, logged_tokens, logged_seconds)
                if ranks.is_main:
                    save_checkpoint(args.run_dir, step, {
                        "parameters": trained_state(model), "scaler": scaler.state_dict(),
                        "optimizers": [o.state_dict() for o in optimizers],
                        "step": step, "batch": batch_number, "tokens": tokens, "seconds": clock_now(),
                        "metrics": metrics, "unlogged": unlogged, "settings": settings(args)}, args.keep_last)
                ranks.barrier()
            if stop and step < max_steps:
                tracker.say(f"stopped at step {step}; the same command with --resume goes on from here")
                raise KeyboardInterrupt

    tracker.finish()
    return {"steps": step, "tokens": tokens, "seconds": clock_now(),
            **{k: metrics[k] for k in ("loss", "eval_loss", "bits_per_byte") if k in metrics}}


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the processes that prepare batches too: they go on, so the loop can end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def stop_signals():
    """Within the block the first Ctrl-C or SIGTERM only asks the loop to stop; a second one stops at once."""
    seen = []

    def ask(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        print("\nstopping after this step (again to stop at once)", flush=True)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
