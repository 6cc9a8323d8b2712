"""The one training loop, for pretraining, SFT and LoRA alike: read `train` from top to bottom.

What differs between the stages is the data and which parameters train; both are decided before `train`.
"""

import math
import os
import signal
import time
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dataset.lm_dataset import collate
from trainer.args import (
    INTERRUPTED,
    TERMINATED,
    TIME_IS_UP,
    RunError,
    Terminated,
    UsageError,
    command_to_resume,
)
from trainer.batches import Batches, to_device
from trainer.checkpoint import (
    Progress,
    bad_weights,
    begin_anew,
    complaint,
    hold,
    last_good,
    load_checkpoint,
    refuse_bad_weights,
    restore,
    save_checkpoint,
    settings_of,
    sharded_state,
    training_state,
)
from trainer.distributed import (
    Ranks,
    autocast,
    choose_dtype,
    full_tensor,
    is_sharded,
    leave_ranks,
    parallelise,
)
from trainer.optim import build_optimizers, learning_rate_factor
from trainer.tracking import Stopwatch, Tracker, clock

# Batches in a row without finite gradients before we call the run lost. One can be a broken record, five are
# the model's own; float16 starts with a loss scale that is halved until nothing overflows.
MAX_SKIPPED, MAX_SKIPPED_FLOAT16 = 5, 100
ECHO = 2.0  # seconds within which torchrun hands on a signal that its processes have had already


@torch.no_grad()
def evaluate(model, batches: Batches, dtype: torch.dtype, ranks: Ranks) -> dict[str, float]:
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
            with autocast(ranks.device, dtype):
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
    Raises UsageError where a checkpoint or --max_seq_len does not fit, RunError where the run can't go on,
    and SystemExit, after saving a checkpoint, when stopped by Ctrl-C, SIGTERM or --max_minutes (codes:
    trainer/args.py).
    """
    device, dtype = ranks.device, choose_dtype(args.dtype, ranks.device)
    if args.max_seq_len > model.config.max_position_embeddings:
        raise UsageError(f"--max_seq_len {args.max_seq_len}: the model has only "
                         f"{model.config.max_position_embeddings} positions")
    max_steps = args.max_steps or args.epochs * len(batches)
    model.train()
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.compile()  # in place: names of parameters stay as they are
    replica = parallelise(model, args.parallel, dtype, ranks)  # before the optimizers, who hold what it makes
    optimizers = build_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                  args.lora_plus_ratio, dtype)
    # float16 gradients underflow below 6e-8: the loss is multiplied up, the gradients divided down again.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parameters = [p for p in model.parameters() if p.requires_grad]

    lock = hold(args.run_dir) if ranks.is_main else None  # as long as this process lives  # noqa: F841
    settings = settings_of(args, dtype)
    state = load_checkpoint(args.run_dir, settings, ranks.is_main) if args.resume else None
    if not ranks.same(state["step"] if state else 0):
        raise UsageError(f"--resume: hosts see different checkpoints in {args.run_dir}, which must be shared")
    run = restore(state, model, optimizers, scaler, args.run_dir, ranks) if state else Progress()
    if ranks.is_main and not state:
        begin_anew(args.run_dir)
    wandb_project = (args.wandb_project or "seedling") if args.use_wandb else None
    tracker = Tracker(args.run_dir, ranks.is_main, run.step, wandb_project, settings)
    begins = ", from the start: no checkpoint to resume from" * args.resume
    tracker.say(first_line(batches, max_steps, settings["--dtype"], args, ranks)
                + (f", resumed at step {run.step:,}" if state else begins))
    ahead = iter(DataLoader(batches, batch_size=None, sampler=range(run.batch, 2**62),
                            num_workers=args.num_workers, worker_init_fn=ignore_interrupts,
                            pin_memory=device.type == "cuda"))
    # The sum of a resumed run is already that of all ranks: one of them carries it on. In float64 (which MPS
    # lacks) float32 losses add up to the same whatever their order.
    loss_sum = torch.tensor(run.loss_sum if ranks.is_main else 0.0, device=device,
                            dtype=torch.float32 if device.type == "mps" else torch.float64)
    stopwatch, skipped = Stopwatch(run.seconds), 0

    with stop_signals() as signalled:
        while run.step < max_steps:
            # 1. The learning rate of this step
            factor = learning_rate_factor(run.step, max_steps, args.warmup_ratio, args.lr_schedule)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.learning_rate * group["ratio"] * factor

            # 2. Gradients of the whole batch, one micro-batch after the other
            micro_batches, targets, batch_tokens = next(ahead)
            # Dropout depends on the batch's number alone: a resumed run draws what the first would have.
            torch.manual_seed((args.seed * 1_000_003 + run.batch) * ranks.world_size + ranks.rank)
            step_loss = torch.zeros((), device=device)
            for i, batch in enumerate(micro_batches):
                # DDP: ranks exchange gradients once a step. FSDP: each time, to keep only slices of them.
                last = i == len(micro_batches) - 1 or not isinstance(replica, DistributedDataParallel)
                with nullcontext() if last else replica.no_sync():
                    with autocast(device, dtype):
                        loss = replica(**to_device(batch, device)).loss_sum / max(1, targets)
                    loss = loss * (1 + 0 * loss.detach())  # times 1; but an infinite loss has gradient NaN
                    scaler.scale(loss * ranks.world_size).backward()  # ranks are averaged; we want sums
                step_loss += loss.detach()
            run.batch += 1

            # 3. The optimizer step
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf))
            sound = math.isfinite(grad_norm)  # the same on all ranks; here the CPU waits for the GPU
            if sound:  # else no optimizer may step, not even one whose own gradients are sound
                for optimizer in optimizers:
                    scaler.step(optimizer)
                run.step, run.tokens, skipped = run.step + 1, run.tokens + batch_tokens, 0
                loss_sum += step_loss
            else:  # no weight moved, so the schedule waits too
                skipped += 1
                if not scaler.is_enabled():
                    tracker.say(f"warning: step {run.step + 1}: batch {run.batch - 1} is skipped: "
                                + diagnose(model, batches, run.batch - 1, dtype, ranks))
                if skipped >= (MAX_SKIPPED_FLOAT16 if scaler.is_enabled() else MAX_SKIPPED):
                    raise RunError(f"{skipped} batches in a row had gradients that are not finite after step "
                                   f"{run.step}: lower --learning_rate, raise --warmup_ratio, or use --dtype "
                                   f"float32 or bfloat16; {last_good(args.run_dir)}")
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)

            # 4. What the outside sees: log, validate, save; after a step, not after a batch that was skipped
            ended, run.seconds = run.step == max_steps, stopwatch()
            if sound and (ended or run.step % args.log_interval == 0):
                mean_loss = ranks.sum(loss_sum)[0] / (run.step - run.logged_step)
                log_step(run, mean_loss, args.learning_rate * factor, grad_norm.item(), max_steps, tracker)
                loss_sum.zero_()
            eval_interval = args.eval_interval or max_steps
            if sound and eval_batches and (ended or run.step % eval_interval == 0):
                started = stopwatch()
                log_evaluation(run, evaluate(model, eval_batches, dtype, ranks), max_steps, tracker)
                run.logged_seconds += stopwatch() - started  # not the training's time
            stop = int(ranks.max(signalled() or TIME_IS_UP * (time.monotonic() > args.stop_at)))
            if stop and run.step or sound and (ended or run.step % args.save_interval == 0):
                run.loss_sum, run.seconds = ranks.sum(loss_sum)[0], stopwatch()
                save(model, optimizers, scaler, run, settings, bool(stop), args, ranks, tracker)
            if stop and not ended:
                tracker.say(f"stopped at step {run.step}; to go on: {command_to_resume()}")
                leave_ranks(ranks)
                raise SystemExit(stop)

    tracker.finish()
    return {"steps": run.step, "skipped": run.batch - run.step, "tokens": run.tokens, "seconds": stopwatch(),
            **{k: run.metrics[k] for k in ("loss", "eval_loss", "bits_per_byte") if k in run.metrics}}


def first_line(batches: Batches, max_steps: int, dtype: str, args, ranks: Ranks) -> str:
    """What is about to be done."""
    old_rows = f" and {batches.num_old:,} old" if batches.num_old else ""
    return (f"{len(batches.rows):,}{old_rows} rows, {max_steps:,} steps of {args.batch_size} rows, "
            f"{dtype} on {ranks.device} x {ranks.world_size}" + " (fsdp)" * (args.parallel == "fsdp"))


def log_step(run: Progress, loss: float, learning_rate: float, grad_norm: float, max_steps: int,
             tracker: Tracker) -> None:
    """Tells of the steps since the last log line, of which `loss` is the mean."""
    steps, seconds = run.step - run.logged_step, run.seconds - run.logged_seconds
    speed = (run.tokens - run.logged_tokens) / max(1e-9, seconds)
    left = clock(seconds / steps * (max_steps - run.step))
    found = {"step": run.step, "max_steps": max_steps, "loss": loss, "learning_rate": learning_rate,
             "grad_norm": grad_norm, "skipped": run.batch - run.step, "tokens": run.tokens,
             "tokens_per_second": speed, "seconds": run.seconds}
    run.metrics |= found
    tracker.log(found)
    tracker.say(f"step {run.step:>{len(str(max_steps))}}/{max_steps} | loss {loss:.4f} | "
                f"lr {learning_rate:.2e} | grad {grad_norm:.2f} | {speed:,.0f} tokens/s | {left} left")
    run.logged_step, run.logged_tokens, run.logged_seconds = run.step, run.tokens, run.seconds


def log_evaluation(run: Progress, found: dict[str, float], max_steps: int, tracker: Tracker) -> None:
    run.metrics |= found
    tracker.log({"step": run.step} | found)
    tracker.say(f"step {run.step:>{len(str(max_steps))}}/{max_steps} | validation loss "
                f"{found['eval_loss']:.4f} | {found['bits_per_byte']:.4f} bits per byte")


def save(model, optimizers, scaler, run: Progress, settings: dict, stopping: bool, args, ranks: Ranks,
         tracker: Tracker) -> None:
    """Writes a checkpoint. Raises RunError where it can't, unless --on_full_disk says to go on."""
    refuse_bad_weights(model, run.step, args.run_dir, ranks)
    failed, state = "", training_state(model, optimizers, scaler, run, settings)
    shards = sharded_state(model, optimizers) if is_sharded(model) else {}
    try:
        tracker.sync()
        if ranks.is_main or shards:
            save_checkpoint(args.run_dir, run.step, state, args.keep_last, shards, ranks)
    except OSError as error:
        failed = complaint(error, args.run_dir, run.step, state | shards)
        tracker.say(f"warning: {failed}")
    if ranks.any(bool(failed), ranks.patient) and (stopping or args.on_full_disk == "stop"):
        raise RunError(f"{failed}; to go on when there is room: {command_to_resume()}")


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


def diagnose(model, batches: Batches, number: int, dtype: torch.dtype, ranks: Ranks) -> str:
    """What is not finite about batch `number`: its samples, each run alone once more, and the activations.

    Every rank knows all the rows and finds out the same: where weights are cut up none can do so alone.
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
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(ranks.device, dtype):
            for sample in samples:
                batch = collate(batches.dataset, [[sample]], batches.pad_token_id)
                if not math.isfinite(model(**to_device(batch, ranks.device)).loss_sum):
                    guilty.append(sample)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    bad = bad_weights(dict(model.named_parameters()), ranks)
    top = sorted(largest, key=largest.get, reverse=True)[:3]
    named = list(dict.fromkeys(batches.dataset.where(sample) for sample in guilty or samples))
    return (f"{'the loss' if guilty else 'the gradient, not the loss,'} of "
            f"{', '.join(named[:8])}{', ...' * (len(named) > 8)} is not finite; largest activations: "
            + ", ".join(f"{name} {largest[name]:.3g}" for name in top)
            + f"; weights that are not finite: {', '.join(bad[:3])}" * bool(bad))
