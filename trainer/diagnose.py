"""What is wrong when a number is not finite: which records, which layers, which weights.
A reader may skip this file.
"""

import math

import torch

from common.device import autocast, to_device
from common.errors import RunError
from trainer.checkpoint import bad_weights, last_good
from trainer.distributed import Ranks

# Batches in a row without finite gradients after which a run counts as lost. One bad batch can come from a
# broken record; five come from the model. float16 begins with a large loss scale, and halves it until no
# gradient overflows.
MAX_SKIPPED, MAX_SKIPPED_FLOAT16 = 5, 100


def refuse_too_many(skipped: int, step: int, is_float16: bool, run_dir) -> None:
    """Raises RunError when `skipped` batches in a row, after that step, are too many."""
    if skipped >= (MAX_SKIPPED_FLOAT16 if is_float16 else MAX_SKIPPED):
        advice = "lower --learning_rate, raise --warmup_ratio, or use --dtype float32 or bfloat16"
        line = f"{skipped} batches in a row had gradients that are not finite after step {step}: {advice}"
        raise RunError(f"{line}; {last_good(run_dir)}")


def diagnose(model, batches, number: int, loss, dtype: torch.dtype, ranks: Ranks) -> str:
    """A sentence about batch `number`: its samples are run alone once more, and activations measured.

    Every process runs all samples and finds the same. With FSDP none could do so alone.
    """
    largest: dict[str, float] = {}  # module -> its largest output, in the order of computation

    def watch(name):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
                size = output.abs().max().nan_to_num(math.inf, math.inf).item()
                largest[name] = max(largest.get(name, 0.0), size)
        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    records, guilty, was_training = [], [], model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(ranks.device, dtype):
            for record, batch in batches.singly(number):
                records.append(record)
                loss_sum, _ = loss(model, to_device(batch, ranks.device))
                if not math.isfinite(loss_sum):
                    guilty.append(record)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    named = list(dict.fromkeys(guilty or records))
    line = f"{'the loss' if guilty else 'the gradient, not the loss,'} of {', '.join(named[:8])}"
    line += ", ..." if len(named) > 8 else ""
    top = sorted(largest, key=largest.get, reverse=True)[:3]
    line += " is not finite; largest activations: " + ", ".join(f"{name} {largest[name]:.3g}" for name in top)
    if bad := bad_weights(dict(model.named_parameters()), ranks):
        line += f"; weights that are not finite: {', '.join(bad[:3])}"
    return line
