"""Known symptoms in the log of a run: what is seen, what it means, what to try. A reader may skip this file.

    for symptom in find(read_run(Path("out/full_sft"))):
        print(symptom.name, symptom.seen, symptom.means, symptom.try_next)

A line of the log is a mean over --log_interval steps. Lines are noisy, so a symptom must be larger than the
noise of its own run: the median difference between two neighbouring lines.
"""

import math
from collections.abc import Callable
from statistics import mean, median
from typing import NamedTuple

from trainer.runs import Run, size_of_b


class Threshold(NamedTuple):
    value: float
    reason: str


# All limits, each with its reason. benchmarks/symptoms.py tests them on runs that were made after they were
# fixed. To change one is to test it anew.
THRESHOLDS = {
    "lines": Threshold(6, "with fewer lines a trend cannot be told from noise"),
    "tail": Threshold(0.2, "of the lines count as the end of the run: in the last fifth most schedules are "
                           "nearly at rest"),
    "flat_fall": Threshold(0.02, "of the first loss: any run that learns at all gains more, since its first "
                                 "line is a mean that begins before the first step"),
    "flat_loss": Threshold(0.1, "nats: below it there is nothing left to learn, and flat is as it should be"),
    "spike_ratio": Threshold(1.25, "times the three lines before: batches differ by less in difficulty"),
    "spike_nats": Threshold(0.3, "nats above the three lines before, for losses near 0"),
    "spike_noise": Threshold(6, "times the run's own noise: rarer than one line in thousands"),
    "norm_ratio": Threshold(10, "times the run's median norm; healthy runs stay within 3.3"),
    "norm_clips": Threshold(5, "times --grad_clip (1 where that is off): what is little above the limit is "
                               "clipped a little, and harms nothing"),
    "overfit_ratio": Threshold(1.05, "times the best validation loss: a twentieth cannot be rounding"),
    "overfit_nats": Threshold(0.02, "nats above the best validation loss, for losses near 0"),
    "overfit_evaluations": Threshold(3, "validations: two make no trend"),
    "adapter_b": Threshold(1e-4, "root mean square of B: AdamW moves each number by about the learning rate "
                                 "in a step, so that a few steps at 1e-3 already go beyond"),
    "skipped_share": Threshold(0.01, "of all batches: one broken record is rarer, a broken model is not"),
    "skipped_batches": Threshold(2, "batches: one may be an accident"),
    "skipped_float16": Threshold(0.05, "of all batches in float16, whose loss scale is found by skipping"),
    "worse_share": Threshold(0.2, "of the lines stand above the best loss before them: a spike is shorter"),
    "worse_ratio": Threshold(1.15, "times the best loss before: a healthy loss stays near its best"),
    "worse_nats": Threshold(0.2, "nats above the best loss, for losses near 0"),
    "worse_noise": Threshold(4, "times the run's own noise above the best loss"),
    "worse_than_guessing": Threshold(1.1, "times ln(vocabulary): with random weights a loss begins at 1.0, "
                                          "and only steps that are far too large lead beyond"),
    "better_than_guessing": Threshold(0.9, "times ln(vocabulary): a model that was so far below never has to "
                                           "come back to guessing, but for a spike"),
    "dpo_accuracy": Threshold(0.6, "of the pairs in the right order: 0.5 is chance, and a mean over the last "
                                   "fifth of 94 steps of 32 pairs strays by 0.02"),
    "dpo_margin": Threshold(0.05, "half a nat at beta 0.1; a run that learns passes it soon"),
    "signal": Threshold(0.1, "of the groups differ in reward: the rest of the rollout teaches nothing"),
    "cut_off": Threshold(0.3, "of the answers: a few long ones are normal, a third is not"),
    "slower": Threshold(0.5, "of the speed of the fastest quarter, the first or second, and slower in each "
                             "after it: the load of other programs comes and goes, and seldom only grows"),
    "slower_lines": Threshold(24, "lines: in a shorter log one burst of other work fills two quarters"),
}


class Symptom(NamedTuple):
    """A symptom that a run shows; one sentence for each part."""

    name: str
    seen: str  # with the number
    means: str
    try_next: str  # with a flag of ours


def find(run: Run) -> list[Symptom]:
    """All symptoms that a run shows, in the order of CHECKS."""
    found = [Symptom(name, *parts) for name, check in CHECKS.items() if (parts := check(run))]
    names = {symptom.name for symptom in found}
    # The narrower of two names for one thing is kept.
    hidden = {"loss is flat"} if "adapter learnt nothing" in names else set()
    hidden |= {"spikes"} if "learning rate too high" in names else set()
    return [symptom for symptom in found if symptom.name not in hidden]


# --- what several checks need -------------------------------------------------------------------------------


def limit(name: str) -> float:
    return THRESHOLDS[name].value


def tail(values: list[float]) -> list[float]:
    """The last fifth, and one value at least."""
    return values[-max(1, round(len(values) * limit("tail"))):]


def noise(values: list[float]) -> float:
    """The median difference between neighbours."""
    return median(abs(b - a) for a, b in zip(values, values[1:], strict=False)) if len(values) > 1 else 0.0


def losses(run: Run) -> list[tuple[float, float]]:
    """(step, loss) where the loss is what is to fall, and there are lines enough; else nothing."""
    series = [] if run.learns_from_rewards else run.series("loss")
    return series if len(series) >= limit("lines") else []


def rate_times(run: Run, factor: float) -> str:
    """The flag of the learning rate, with another value if the present one is known."""
    rate = run.flag("learning_rate")
    return f"--learning_rate {rate * factor:.1g} (it was {rate:g})" if rate else "another --learning_rate"


# --- the checks: each returns (seen, means, try next), or None ----------------------------------------------


def unfinished(run: Run):
    if not run.is_unfinished:
        return None
    saved = f"its newest checkpoint is of step {int(run.checkpoints[-1].name[5:]):,}" if run.checkpoints \
        else "it has no checkpoint"
    goes_on = "The same command with --resume goes on from the newest checkpoint" if run.checkpoints else \
        "There is nothing to go on from, unless it is still running: start it again"
    return (f"The log ends at step {run.last_step:,} of {run.max_steps:,}, and {saved}.",
            "The run was stopped or killed, or it is still running: what follows shows a part of it.",
            f"{goes_on}; a smaller --save_interval loses less in a kill.")


def skipped(run: Run):
    counts = [int(value) for value in run.values("skipped")]
    if not counts or run.last_step < 1:
        return None
    is_float16 = run.flag("dtype", str) == "float16"
    share = counts[-1] / (counts[-1] + run.last_step)
    least = limit("skipped_float16" if is_float16 else "skipped_share")
    if counts[-1] < limit("skipped_batches") or share <= least:
        return None
    return (f"{counts[-1]:,} batches ({share:.0%}) were skipped, because their gradient was not finite.",
            "Some number overflows: in a broken record, in a layer whose values grow, or in float16.",
            "The warnings of the run name records and layers; " + ("--dtype float32 or bfloat16 has a wider "
            "range." if is_float16 else f"look at the records with scripts/check_data.py, then try "
            f"{rate_times(run, 1 / 3)}."))


def adapter_learnt_nothing(run: Run):
    if not run.is_adapter or run.flag("lora_init", str) == "pissa":  # whose B does not start at 0
        return None
    size = size_of_b(run)
    if size is None or size >= limit("adapter_b"):
        return None
    return (f"The numbers in the adapter's B have a root mean square of {size:.1e}, and B starts at 0.",
            "The adapter changes next to nothing: the model answers as it did before.",
            f"Give it a higher rate or more steps: {rate_times(run, 100)}, --max_steps.")


def rate_too_high(run: Run):
    series = losses(run)
    if not series:
        return None
    values = [value for _, value in series]
    smooth = [median(values[max(0, i - 1):i + 2]) for i in range(len(values))]  # a spike is something else
    usual, lost, place = limit("worse_noise") * noise(values), [], 0  # place: of the best so far
    for i, value in enumerate(smooth):
        best = smooth[place]
        if value > best * limit("worse_ratio") and value - best > max(limit("worse_nats"), usual):
            lost.append((i, place))
        elif value < best:
            place = i
    tries = f"Try {rate_times(run, 1 / 5)}, or a longer --warmup_ratio."
    guessing = run.guessing
    if guessing and not run.values("margin") and is_worse_than_guessing(smooth[:-1], guessing):
        return (f"The loss was {max(values):.3g}, and a model that finds all tokens equally likely has "
                f"{guessing:.3g}.", "The steps were so large that they broke the model.", tries)
    if len(lost) < limit("worse_share") * len(values):
        return None
    worst, place = max(lost, key=lambda pair: smooth[pair[0]])
    return (f"The loss was {smooth[place]:.3g} at step {series[place][0]:,.0f}, and rose to "
            f"{smooth[worst]:.3g} at step {series[worst][0]:,.0f}; it is far above its best in "
            f"{len(lost) / len(values):.0%} of the log.",
            "The steps were too large: the model lost what it had learnt, at least while the rate was high.",
            tries)


def is_worse_than_guessing(smooth: list[float], guessing: float) -> bool:
    """Whether a loss is far above that of a guess, or above it after it was well below."""
    best = math.inf
    for value in smooth:
        best = min(best, value)
        has_learnt = best < limit("better_than_guessing") * guessing
        if value > guessing * (1 if has_learnt else limit("worse_than_guessing")):
            return True
    return False


def spikes(run: Run):
    """Of the loss, or else of the gradient."""
    after_warmup = (run.flag("warmup_ratio") or 0) * run.max_steps
    return spike_of_loss(run, after_warmup) or spike_of_gradient(run, after_warmup)


def spike_of_loss(run: Run, after: float):
    series = losses(run)
    values = [value for _, value in series]
    least = max(limit("spike_nats"), limit("spike_noise") * noise(values))
    for i in range(3, len(values) - 1):
        base, value = median(values[i - 3:i]), values[i]
        is_high = value > base * limit("spike_ratio") and value - base > least
        comes_back = min(values[i + 1:]) < (base + value) / 2
        if series[i][0] > after and is_high and comes_back:
            return (f"At step {series[i][0]:,.0f} the loss jumped from {base:.3g} to {value:.3g}, and came "
                    "back.",
                    "A batch unlike all others, or a step that was too large, threw the model off its way.",
                    f"Look for odd records with scripts/check_data.py; else {rate_times(run, 1 / 2)}, or a "
                    "smaller --grad_clip.")
    return None


def spike_of_gradient(run: Run, after: float):
    norms = run.series("grad_norm")
    if len(norms) < limit("lines"):
        return None
    usual = median(norm for _, norm in norms)
    step, norm = max(norms[3:], key=lambda point: point[1])
    least = max(limit("norm_ratio") * usual, limit("norm_clips") * (run.flag("grad_clip") or 1.0))
    if step <= after or norm <= least:
        return None
    return (f"At step {step:,.0f} the gradient norm was {norm:.3g}, {norm / max(usual, 1e-9):,.0f} times its "
            "median.",
            "The gradient explodes now and then, and --grad_clip alone keeps such a step small.",
            f"Try {rate_times(run, 1 / 2)}, --grad_clip 1, or a longer --warmup_ratio.")


def loss_is_flat(run: Run):
    values = [value for _, value in losses(run)]
    if not values or run.values("margin"):  # the loss of pairs is flat while they are learnt, see DPO below
        return None
    end = median(tail(values))
    if abs(values[0] - end) > limit("flat_fall") * values[0] or end < limit("flat_loss"):
        return None
    return (f"The loss was {values[0]:.4g} at the first line of the log and {end:.4g} at the end.",
            "Nothing was learnt: the steps are too small, or the model knew all of it before.",
            f"Try {rate_times(run, 30)}, more --epochs, or data that is new to the model.")


def overfitting(run: Run):
    found, training = run.series("eval_loss"), run.series("loss")
    if run.learns_from_rewards or len(found) < limit("overfit_evaluations") or not training:
        return None
    best_step, best = min(found, key=lambda point: point[1])
    last = found[-1][1]
    before = [value for step, value in training if step <= best_step] or [training[0][1]]
    falls = training[-1][1] < before[-1]
    if not falls or last <= best * limit("overfit_ratio") or last - best <= limit("overfit_nats"):
        return None
    return (f"The validation loss rose from {best:.3g} at step {best_step:,.0f} to {last:.3g}, while the "
            f"training loss fell from {before[-1]:.3g} to {training[-1][1]:.3g}.",
            "The model learns its examples by heart, and gets worse on others.",
            f"Stop sooner (--max_steps {best_step:.0f}) or show the data less often (--epochs 1); more data "
            "is better than both.")


def preferences_not_learnt(run: Run):
    accuracies, margins = run.values("accuracy"), run.values("margin")
    if len(accuracies) < 3 or len(margins) < 3:
        return None
    accuracy, margin = mean(tail(accuracies)), mean(tail(margins))
    if accuracy >= limit("dpo_accuracy") or abs(margin) >= limit("dpo_margin"):
        return None
    return (f"At the end {accuracy:.0%} of the pairs are in the right order, and the margin is {margin:.1e}.",
            "The model is still its reference: a loss of 0.693 with such a margin is that of no preference.",
            f"Try {rate_times(run, 10)}, or more --epochs.")


def no_signal(run: Run):
    signals, rewards = run.values("signal"), run.values("reward")
    # A run that has learnt all there is has no signal either, but it had one at the start.
    if len(signals) < 3 or max(mean(signals), mean(signals[:len(signals) // 3])) >= limit("signal"):
        return None
    reward = f"{mean(rewards):.2g}" if rewards else "unknown"
    return (f"In {1 - mean(signals):.0%} of the groups all answers have the same reward (mean {reward}).",
            "Such a group teaches nothing: the model is never right here, or always.",
            "Try a higher --temperature, a larger --group_size, easier prompts, or a small reward for a "
            "first step, such as --rewards answers length:0.2.")


def cut_off(run: Run):
    shares = run.values("cut_off")
    if len(shares) < 3 or mean(tail(shares)) <= limit("cut_off"):
        return None
    return (f"At the end {mean(tail(shares)):.0%} of the answers are cut off at --max_new_tokens.",
            "What is cut off is judged unfinished, and the model never learns how to end.",
            f"Try a larger --max_new_tokens (it was {run.flag('max_new_tokens') or 'unknown'}), or reward "
            "brevity: --rewards answers length:0.2.")


def slower(run: Run):
    speeds = run.values("tokens_per_second")[1:]  # the first line has the start in it
    if run.learns_from_rewards or len(speeds) < limit("slower_lines"):  # whose speed changes with the answers
        return None
    size = len(speeds) / 4
    quarters = [median(speeds[round(i * size):round((i + 1) * size)]) for i in range(4)]
    fastest = quarters.index(max(quarters))
    falls = all(b < a for a, b in zip(quarters[fastest:], quarters[fastest + 1:], strict=False))
    if fastest > 1 or not falls or quarters[-1] >= limit("slower") * quarters[fastest]:
        return None
    return (f"The speed fell from {quarters[fastest]:,.0f} tokens/s in quarter {fastest + 1} of the run to "
            f"{quarters[-1]:,.0f} in the last, without a recovery.",
            "The machine gave it less and less: other programs, heat, memory that is full, or a slow disk.",
            "Look at other programs and at the temperature; on a GPU that is full try --micro_batch_size or "
            "--gradient_checkpointing, with slow files --num_workers 2.")


CHECKS: dict[str, Callable] = {
    "unfinished": unfinished,
    "skipped batches": skipped,
    "adapter learnt nothing": adapter_learnt_nothing,
    "learning rate too high": rate_too_high,
    "spikes": spikes,
    "loss is flat": loss_is_flat,
    "overfitting": overfitting,
    "preferences not learnt": preferences_not_learnt,
    "rewards without signal": no_signal,
    "answers cut off": cut_off,
    "slower and slower": slower,
}
