"""What training minimises. A loss is a plain function `loss(model, batch)` of one micro-batch.

It returns a sum over the units of the micro-batch, and further named sums over the same units for the log,
such as {"accuracy": ...}. Units are tokens, pairs of answers, or answers. The loop divides all of them by the
number of units in the whole step, over all micro-batches and processes. So the loss of a step is one mean,
and never a mean of means. With tokens as units:

    10 tokens of loss 1 in one micro-batch, 30 tokens of loss 3 in another     (10 + 90) / 40 = 2.5
    the mean of the two means                                                  (1 + 3) / 2 = 2, which is wrong
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model.transformer import LOSS_ROWS


def cross_entropy(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum over the supervised tokens of -log p(token | the tokens before it), in nats.

    batch: input_ids, labels and document_ids, (B, T) each, as CausalLM.forward takes them. A batch without a
    supervised token gives 0. With experts the loss also holds what their routers must pay (model/moe.py).
    """
    output = model(**batch)
    loss = output.token_losses.sum()
    if output.routing is None:
        return loss, {}
    penalty, routing = output.routing
    return loss + penalty, {"cross_entropy": loss} | routing


# --- preferences: DPO and its kin ---------------------------------------------------------------------------


def dpo(model, batch: dict, *, kind: str = "dpo", beta: float = 0.1, label_smoothing: float = 0.0,
        sft_weight: float = 0.0, margin: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum over pairs of a loss that falls where the chosen answer gains on the rejected one.

    gap = the score of the chosen answer - the score of the rejected one, as in preference_scores.
    loss = preference_losses of the gap + sft_weight * -log p(chosen) / |chosen|

    A gap may also grow while both answers become unlikely. The second term keeps the chosen one likely (Pang
    et al. 2024, arXiv:2404.19733). kind: dpo, ipo, simpo or orpo. batch: see PreferenceDataset.collate; units
    are pairs. Named sums: preference (the first term alone), accuracy (gap > 0; a tie counts half), margin
    (the gap), chosen and rejected (log p of each side).
    """
    labels = batch["labels"]  # (2 P, T): first the chosen sides of P pairs, then the rejected sides
    num_tokens = (labels[:, 1:] != -100).sum(dim=1)  # (2 P,)
    log_probs = -model(batch["input_ids"], labels).token_losses.sum(dim=1)
    means = (log_probs / num_tokens.clamp(min=1)).clamp(max=-1e-7)  # at 0, orpo's score would be infinite
    scores = preference_scores(kind, beta, log_probs, means, num_tokens, batch.get("reference_log_probs"))
    gap = torch.sub(*scores.chunk(2))  # (P,)
    preference = preference_losses(kind, beta, gap, label_smoothing, margin)
    losses = preference - sft_weight * means.chunk(2)[0]
    (chosen, rejected), is_pair = log_probs.chunk(2), num_tokens.chunk(2)[0] > 0  # false: no pair at all
    named = {"preference": preference, "accuracy": (gap > 0) + 0.5 * (gap == 0), "margin": gap,
             "chosen": chosen, "rejected": rejected}
    return (losses * is_pair).sum(), {name: (value * is_pair).sum() for name, value in named.items()}


def preference_scores(kind: str, beta: float, log_probs, means, num_tokens, reference) -> torch.Tensor:
    """How an answer y of |y| tokens is scored, (2 P,). p is the model, p0 the reference that it began as.

        dpo     beta (log p(y) - log p0(y))                     Rafailov et al. 2023, arXiv:2305.18290
        ipo     (log p(y) - log p0(y)) / |y|                    Azar et al. 2023, arXiv:2310.12036
        simpo   beta log p(y) / |y|                             Meng et al. 2024, arXiv:2405.14734
        orpo    log(q / (1 - q)), q = exp(log p(y) / |y|)       Hong et al. 2024, arXiv:2403.07691

    log_probs: log p(y). means: log p(y) / |y|. reference: log p0(y), which simpo and orpo do without.
    """
    if kind == "dpo":
        return beta * (log_probs - reference)
    if kind == "ipo":
        return (log_probs - reference) / num_tokens.clamp(min=1)
    if kind == "simpo":
        return beta * means
    return means - torch.log(-torch.expm1(means))  # log(1 - exp(x)), exact also where exp(x) is nearly 1


def preference_losses(kind: str, beta: float, gap, label_smoothing: float, margin: float) -> torch.Tensor:
    """The loss of each pair, (P,), in the papers named above. s is label_smoothing, margin is SimPO's gamma.

        dpo, simpo   -(1 - s) log sigmoid(gap - margin) - s log sigmoid(margin - gap)
        ipo          (gap - 1 / (2 beta))^2
        orpo         -beta log sigmoid(gap)

    With no gap and no margin the first of them is log 2 = 0.6931: where DPO begins.
    """
    if kind == "ipo":
        return (gap - 1 / (2 * beta)) ** 2
    if kind == "orpo":
        return -beta * F.logsigmoid(gap)
    right, wrong = F.logsigmoid(gap - margin), F.logsigmoid(margin - gap)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


# --- rewards: GRPO, PPO and their kin -----------------------------------------------------------------------
#
# Their micro-batch holds answers that the model itself has sampled (trainer/rollouts.py), one in each row.
# Its tensors are (B, T) where nothing else is said:
#     input_ids, labels       labels are the tokens of the answer with its end token, and -100 elsewhere
#     advantages              how much better than expected a token was; 0 outside of the answer
#     old_log_probs           log p(token) by the model that sampled; 0 outside of the answer
#     reference_log_probs     by the model that the policy shall stay near; only where kl_beta is not 0
#     values, returns         only in PPO: the rewards to come as the model that sampled expected them, and as
#                             they came (trainer/values.py)
#     weights (B,)            what the term of one token counts in the loss
#     token_weights (B,)      number of answers / number of tokens in the rows of the whole step
#     sums                    {name: a sum over answers} for the log, handed on as they are
# Units are answers. The loop divides by their number, so sums with token_weights become means over tokens.


def answer_log_probs(model, batch: dict, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(token), entropy of the distribution it is drawn from) for each token of the answers, in nats.

    Both are (B, T): at the place of each label, as CausalLM.token_losses has it, and 0 where there is none.
    Logits are divided by the temperature, because the model samples from these. The entropy has no gradient.
    """
    return labelled_log_probs(model(batch["input_ids"]), batch["labels"], temperature)


def labelled_log_probs(output, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`answer_log_probs` of a forward pass that is done. output: of CausalLM. labels: (B, T)."""
    is_answer, states = before_labels(output.hidden, labels)  # (B, T), (N, C): N tokens have a label
    log_probs, entropies = [], []
    rows_of_states, rows_of_labels = states.split(LOSS_ROWS), labels[is_answer].split(LOSS_ROWS)
    for rows, wanted in zip(rows_of_states, rows_of_labels, strict=True):
        all_log_probs = (output.head(rows).float() / temperature).log_softmax(dim=-1)  # (N, V)
        log_probs.append(all_log_probs.gather(1, wanted[:, None]).squeeze(1))
        with torch.no_grad():
            entropies.append(-(all_log_probs.exp() * all_log_probs).sum(dim=-1))
    zeros = log_probs[0].new_zeros(labels.shape)
    return tuple(zeros.masked_scatter(is_answer, torch.cat(found)) for found in (log_probs, entropies))


def before_labels(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(which places have a label, (B, T); the states that predict these labels, (N, C))."""
    is_answer = F.pad(labels[:, 1:] != -100, (1, 0))  # the first token is never predicted
    return is_answer, hidden[:, :-1][is_answer[:, 1:]]


def policy_loss(model, batch: dict, *, objective, temperature: float = 1.0, kl_beta: float = 0.0):
    """The sum over all tokens of weight * (objective + kl_beta * KL). objective: a function from below."""
    log_probs, entropy = answer_log_probs(model, batch, temperature)
    terms, shown = objective(log_probs, batch)
    if kl_beta:
        shown["kl"] = kl_divergence(log_probs, batch)
        terms = terms + kl_beta * shown["kl"]
    return answer_sum(terms, batch), batch["sums"] | token_means({"entropy": entropy, **shown}, batch)


def kl_divergence(log_probs: torch.Tensor, batch: dict) -> torch.Tensor:
    """How far the model is from the reference, estimated from the sampled tokens alone: (B, T).

        r (exp(d) - d - 1),   d = log p_ref - log p,   r = p / p_old
        (Schulman 2020, http://joschu.net/blog/kl-approx.html, "k3")

    It is never negative, and its mean is right. The factor r makes its gradient right, too; without r, as in
    the paper of GRPO, the gradient is that of KL(p_ref || p)  (DeepSeek-V3.2 2025, arXiv:2512.02556).
    """
    difference, ratio = batch["reference_log_probs"] - log_probs, (log_probs - batch["old_log_probs"]).exp()
    return ratio * (difference.exp() - difference - 1)


def answer_sum(terms: torch.Tensor, batch: dict) -> torch.Tensor:
    """Terms (B, T) of all tokens of the answers, weighted and summed."""
    return (terms * (batch["labels"] != -100) * batch["weights"][:, None]).sum()


def token_means(shown: dict[str, torch.Tensor], batch: dict) -> dict[str, torch.Tensor]:
    """Sums for the log of values (B, T), each of which the loop turns into a mean over tokens."""
    return {name: answer_sum(values.detach(), batch | {"weights": batch["token_weights"]})
            for name, values in shown.items()}


def reinforce(log_probs: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict]:
    """-A log p(token)   (REINFORCE: Williams 1992, https://doi.org/10.1007/BF00992696)

    A token with an advantage A above 0 becomes likelier, a token with an advantage below 0 less likely.
    """
    return -batch["advantages"] * log_probs, {}


def clipped_ratio(log_probs, batch: dict, low: float = 0.2, high: float = 0.2) -> tuple[torch.Tensor, dict]:
    """-min(r A, clip(r, 1 - low, 1 + high) A),   r = p(token) / p_old(token)
    (PPO: Schulman et al. 2017, arXiv:1707.06347; with high > low, DAPO: Yu et al. 2025, arXiv:2503.14476)

    One rollout serves several updates. A token whose probability has moved far enough in the direction that
    its advantage asks for has no gradient any more. The minimum keeps the gradient of every way back.
    """
    ratio, advantages = (log_probs - batch["old_log_probs"]).exp(), batch["advantages"]
    free, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(free, clipped), {"clipped": (clipped < free).float()}


def cispo(log_probs: torch.Tensor, batch: dict, high: float = 0.2) -> tuple[torch.Tensor, dict]:
    """-min(r, 1 + high) A log p(token),   r = p(token) / p_old(token), a constant   (CISPO: MiniMax 2025,
    arXiv:2506.13585)

    Here the weight of a token is clipped, and not its gradient. Rare tokens, whose ratio moves first, go on
    learning.
    """
    ratio = (log_probs - batch["old_log_probs"]).exp().detach()
    terms = -ratio.clamp(max=1 + high) * batch["advantages"] * log_probs
    return terms, {"clipped": (ratio > 1 + high).float()}


def gspo(log_probs, batch: dict, low: float = 0.2, high: float = 0.2) -> tuple[torch.Tensor, dict]:
    """-min(s A, clip(s, 1 - low, 1 + high) A),   s = (p(answer) / p_old(answer)) ^ (1 / its number of tokens)
    (GSPO: Zheng et al. 2025, arXiv:2507.18071)

    A reward is for a whole answer, and so is the ratio s: the geometric mean of the ratios of the tokens. It
    moves far less than the ratio of one token, so low and high are far smaller than in clipped_ratio.
    """
    length = (batch["labels"] != -100).sum(dim=1, keepdim=True).clamp(min=1)
    change = (log_probs - batch["old_log_probs"]).sum(dim=1, keepdim=True) / length  # (B, 1)
    # clipped_ratio reads the ratio of each token as that of its answer.
    return clipped_ratio(change, batch | {"old_log_probs": torch.zeros_like(change)}, low, high)


def ppo(model, batch: dict, *, value_head, temperature: float = 1.0, low: float = 0.2, high: float = 0.2,
        value_clip: float = 0.2, value_weight: float = 0.1):
    """clipped_ratio + value_weight / 2 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)
    (Schulman et al. 2017, arXiv:1707.06347; the clipping of values: Engstrom et al. 2020, arXiv:2005.12729)

    V = value_head(state before the token) learns to predict the returns R. V may not leave V_old, what the
    same head said when the answer was sampled, by more than c = value_clip in one rollout.
    """
    output, old, returns = model(batch["input_ids"]), batch["values"], batch["returns"]
    log_probs, entropy = labelled_log_probs(output, batch["labels"], temperature)
    terms, shown = clipped_ratio(log_probs, batch, low, high)
    values = labelled_values(output, batch["labels"], value_head)
    near = values.clamp(old - value_clip, old + value_clip)
    value_loss = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
    shown |= {"entropy": entropy, "value_loss": value_loss}
    if "reference_log_probs" in batch:  # here the KL divergence lowers rewards and is no part of the loss
        shown["kl"] = kl_divergence(log_probs, batch)
    return answer_sum(terms + value_weight * value_loss, batch), batch["sums"] | token_means(shown, batch)


def labelled_values(output, labels: torch.Tensor, value_head) -> torch.Tensor:
    """The value of the state before each label, at the place of that label; 0 where there is none: (B, T)."""
    is_answer, states = before_labels(output.hidden, labels)
    values = value_head(states).float().squeeze(-1)
    return values.new_zeros(labels.shape).masked_scatter(is_answer, values)


# --- a teacher: trainer/train_distillation.py -----------------------------------------------------------
# p and q are what teacher and student say of the next token, for every token of the vocabulary. Each function
# takes log p and log q, (N, V), and returns a number for each of the N places. It is 0 where p = q.


def forward_kl(log_p, log_q) -> torch.Tensor:
    """KL(p || q) = sum over tokens of p (log p - log q)   (Hinton et al. 2015, arXiv:1503.02531)

    The student pays where the teacher finds a token likely and the student does not. So a small student
    spreads out, in order to cover all that the teacher might say.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p, log_q) -> torch.Tensor:
    """KL(q || p) = sum over tokens of q (log q - log p)   (MiniLLM: Gu et al. 2024, arXiv:2306.08543)

    The student pays where the student finds a token likely and the teacher does not. So a small student
    settles on some of what the teacher might say, and leaves the rest out.
    """
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(log_p, log_q, beta: float) -> torch.Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q   (GKD: arXiv:2306.13649)

    For beta near 0 this is beta times the forward KL, and for beta near 1 it is 1 - beta times the reverse
    one. It never exceeds ln 2, however wrong the student is.
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def distillation(model, batch: dict, *, teacher, divergence, weight: float, temperature: float = 1.0):
    """(1 - weight) * cross-entropy + weight * T^2 * divergence(p, q), summed over the supervised tokens.

    p and q are softmax(logits / T) of teacher and student. A temperature T above 1 makes likely tokens less
    likely and unlikely ones more. This also makes gradients about T^2 times smaller, for which T^2 makes up.
    If the batch has "by_student", the answers in it are the student's own. They are no example to follow, so
    there the divergence counts alone, and in full. Without that key the batch is as for `cross_entropy`.
    """
    inputs, labels = (batch["input_ids"], None, batch["document_ids"]), batch["labels"]
    with torch.no_grad():
        taught = teacher(*inputs)
    output = model(*inputs)
    is_target, states = before_labels(output.hidden, labels)  # (B, T), (N, C): N tokens have a label
    tokens = (states, before_labels(taught.hidden, labels)[1], labels[is_target])
    compare = partial(compare_tokens, output.head, taught.head, divergence, temperature)
    if len(states) > LOSS_ROWS:  # then no part keeps its logits: the backward pass computes them again
        compare = partial(checkpoint, compare, use_reentrant=False)
    parts = zip(*(rows.split(LOSS_ROWS) for rows in tokens), strict=True)
    data_loss, distance = (sum(found) for found in zip(*(compare(*part) for part in parts), strict=True))
    loss = distance if "by_student" in batch else (1 - weight) * data_loss + weight * distance
    return loss, {"cross_entropy": data_loss, "divergence": distance}


def compare_tokens(head, teacher_head, divergence, temperature: float, states, teacher_states, targets):
    """The summed cross-entropy and T^2 * divergence of N tokens; states (N, C) predict targets (N,)."""
    logits = head(states).float()  # (N, V)
    log_q = logits.log_softmax(-1)
    data_loss = F.nll_loss(log_q, targets, reduction="sum")
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_states).float()
        # Two models of one tokenizer may have different numbers of further logits, which stand for no token.
        size = min(logits.size(-1), teacher_logits.size(-1))
        log_p = (teacher_logits[:, :size] / temperature).log_softmax(-1)
    if temperature != 1 or size < logits.size(-1):
        log_q = (logits[:, :size] / temperature).log_softmax(-1)
    return data_loss, temperature**2 * divergence(log_p, log_q).sum()
