"""The one training loop, which all stages share: read `train` from top to bottom.

Stages differ in the batches, in the loss and in which parameters train. All of that is decided before
`train`.
"""

import math
import time
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from common.device import autocast, choose_dtype, to_device
from common.errors import UsageError
from trainer.checkpoint import lock_folder, resume_or_begin, save, settings_of, unlock
from trainer.diagnose import diagnose, refuse_too_many
from trainer.distributed import Ranks, full_tensor, leave_ranks, parallelise
from trainer.interrupt import command_to_resume, ignore_interrupts, stop_requests
from trainer.optim import build_optimizers, learning_rate_factor
from trainer.tracking import Tracker


@torch.no_grad()
def evaluate(model, batches, loss, dtype: torch.dtype, ranks: Ranks) -> dict[str, float]:
    """The means, over one epoch, of the loss and of what the loss function names: {"eval_loss": ...}.

    For text also its bits per UTF-8 byte = summed loss / ln 2 / bytes. Unlike the loss per token this can be
    compared between tokenizers.
    """
    was_training = model.training
    model.eval()
    sums, num_units = {}, 0
    for number in range(len(batches)):
        micro_batches, num_units_of_batch, _ = batches[number]
        num_units += num_units_of_batch
        for batch in micro_batches:
            with autocast(ranks.device, dtype):
                loss_sum, named_sums = loss(model, to_device(batch, ranks.device))
            for name, value in {"loss": loss_sum, **named_sums}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    model.train(was_training)
    totals = dict(zip(sums, ranks.sum(*sums.values()), strict=True))
    means = {f"eval_{name}": total / max(1, num_units) for name, total in totals.items()}
    if num_bytes := batches.num_bytes():
        means["bits_per_byte"] = totals["loss"] / math.log(2) / num_bytes
    return means


def train(model, batches, loss, eval_batches, args, ranks: Ranks) -> dict:
    """Trains the parameters of `model` that require gradients. One iteration is one optimizer step.

    model: a CausalLM on the CPU or already on `ranks.device`. Frozen parameters stay as they are.
    batches: batches[n] -> (micro-batches, number of units, number of tokens), such as trainer/batches.py.
    loss: loss(model, micro-batch) -> (sum over units, {name: another sum}), see trainer/losses.py.
    eval_batches: the validation data, or None. args: the flags of trainer/args.py; they are only read.
    Returns the report for training.json. Raises UsageError where a checkpoint or --max_seq_len does not fit,
    RunError where the run cannot go on, and SystemExit after a signal or --max_minutes (with a checkpoint).
    """
    device, dtype = ranks.device, choose_dtype(args.dtype, ranks.device)
    positions = model.config.max_position_embeddings
    if args.max_seq_len > positions:
        raise UsageError(f"--max_seq_len {args.max_seq_len}: the model has only {positions} positions")
    max_steps = args.max_steps or args.epochs * len(batches)
    settings = settings_of(vars(args), dtype, model, batches, eval_batches)
    model.train()
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.compile()  # in place, so the names of parameters stay as they are
    # All processes train together if forward passes go through `replica` (DDP or FSDP: distributed.py). FSDP
    # replaces the parameters, so the optimizers are built after it.
    replica = parallelise(model, args.parallel, dtype, ranks)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = build_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                  args.lora_plus_ratio, dtype)
    # float16 loses gradients below 6e-8, so the loss is multiplied up and the gradients are divided again.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    lock = lock_folder(args.run_dir) if ranks.is_main else None  # no other process trains here now
    run = resume_or_begin(args.run_dir, args.resume, settings, model, optimizers, scaler, batches, ranks)
    tracker = Tracker(args.run_dir, ranks, run, max_steps, args.use_wandb, args.wandb_project, settings)
    data = f"{batches.description()}, {max_steps:,} steps of {args.batch_size} rows"
    tracker.log_start(run, data, settings["--dtype"], args.parallel, args.resume, bool(eval_batches))
    loader = iter(DataLoader(batches, batch_size=None, sampler=range(run.batch, 2**62),  # without an end
                             num_workers=args.num_workers, worker_init_fn=ignore_interrupts,
                             pin_memory=device.type == "cuda"))
    began = time.perf_counter() - run.seconds  # so that a resumed run counts on
    skipped = 0  # consecutive batches whose gradient was not finite

    with stop_requests(args.max_minutes) as stop_requested:
        while run.step < max_steps:
            # 1. The learning rate of this step
            factor = learning_rate_factor(run.step, max_steps, args.warmup_ratio, args.lr_schedule)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.learning_rate * group["ratio"] * factor  # ratio: see optim.py

            # 2. Gradients of the whole batch, one micro-batch after the other
            micro_batches, num_units, num_tokens = next(loader)
            # Each batch seeds dropout anew, so that a resumed run drops the same elements.
            torch.manual_seed((args.seed * 1_000_003 + run.batch) * ranks.world_size + ranks.rank)
            means = {}
            for i, batch in enumerate(micro_batches):
                # DDP exchanges gradients in the last backward pass of a step only, FSDP in every one.
                no_exchange = i < len(micro_batches) - 1 and isinstance(replica, DistributedDataParallel)
                with replica.no_sync() if no_exchange else nullcontext():
                    with autocast(device, dtype):
                        loss_sum, named_sums = loss(replica, to_device(batch, device))
                    part = loss_sum / max(1, num_units)
                    # A finite loss is multiplied by 1. An infinite loss is multiplied by NaN (0 * infinity):
                    # then its gradient is NaN, too, and the check of the gradients below finds it.
                    part = part * (1 + 0 * part.detach())
                    # DDP and FSDP average gradients over processes. Times world_size the mean is the sum.
                    scaler.scale(part * ranks.world_size).backward()
                for name, value in {"loss": loss_sum, **named_sums}.items():
                    means[name] = means.get(name, 0.0) + value.detach() / max(1, num_units)
            run.batch += 1

            # 3. The optimizer step
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf))
            is_finite = math.isfinite(grad_norm)  # the same in all processes; here the CPU waits for the GPU
            skipped = 0 if is_finite else skipped + 1
            if is_finite:
                for optimizer in optimizers:
                    scaler.step(optimizer)
                run.step += 1
                run.tokens += num_tokens
                tracker.add(means)
            else:  # no optimizer may step, not even one whose own gradients are finite
                if not scaler.is_enabled():  # with GradScaler, in float16, this is normal
                    tracker.say(f"warning: step {run.step + 1}: batch {run.batch - 1} is skipped: "
                                + diagnose(model, batches, run.batch - 1, loss, dtype, ranks))
                refuse_too_many(skipped, run.step, scaler.is_enabled(), args.run_dir)
            scaler.update()
            model.zero_grad()

            # 4. Log, validate and save, but not after a skipped batch. If asked to, save and stop in any case
            run.seconds = time.perf_counter() - began
            if is_finite and run.is_due(args.log_interval, max_steps):
                tracker.log_step(run, args.learning_rate * factor, grad_norm.item())
            if is_finite and eval_batches and run.is_due(args.eval_interval or max_steps, max_steps):
                tracker.log_evaluation(run, evaluate(model, eval_batches, loss, dtype, ranks))
                run.logged_seconds += time.perf_counter() - began - run.seconds  # no part of tokens/s
            stop = int(ranks.max(stop_requested()))  # the exit code of a requested stop, or 0
            save_now = is_finite and run.is_due(args.save_interval, max_steps)
            if save_now or (stop and run.step > 0):
                run.seconds = time.perf_counter() - began
                save(args.run_dir, run, model, optimizers, scaler, batches, settings, args.keep_last, tracker,
                     required=stop > 0 or args.on_full_disk == "stop")
            if stop and run.step < max_steps:
                tracker.say(f"stopped at step {run.step}; to go on: {command_to_resume()}")
                leave_ranks(ranks)
                raise SystemExit(stop)

    tracker.finish()
    unlock(lock)
    return run.result(settings)
