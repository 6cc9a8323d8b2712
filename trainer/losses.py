"""What training minimises. A loss is a plain function `loss(model, batch)` of one micro-batch.

It returns a sum over the units of the micro-batch (here tokens), and further named sums over the same units
for the log, such as {"accuracy": ...}. The loop divides all of them by the number of units in the whole
step, over all micro-batches and processes. So the loss of a step is one mean, and never a mean of means:

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
    supervised token gives 0.
    """
    return model(**batch).token_losses.sum(), {}


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
    inputs = {name: batch[name] for name in ("input_ids", "document_ids")}
    with torch.no_grad():
        taught = teacher(**inputs)
    output, targets = model(**inputs), batch["labels"][:, 1:]  # (B, T - 1)
    states = [out.hidden[:, :-1][targets != -100] for out in (output, taught)]  # (N, C) of each model's own C
    parts = zip(*(rows.split(LOSS_ROWS) for rows in (*states, targets[targets != -100])), strict=True)
    compare = partial(compare_tokens, output.head, taught.head, divergence, temperature)
    if len(states[0]) > LOSS_ROWS:  # then no part keeps its logits: the backward pass computes them again
        compare = partial(checkpoint, compare, use_reentrant=False)
    entropies, distances = zip(*(compare(*part) for part in parts), strict=True)
    entropy, distance = sum(entropies), sum(distances)
    loss = distance if "by_student" in batch else (1 - weight) * entropy + weight * distance
    return loss, {"cross_entropy": entropy, "divergence": distance}


def compare_tokens(head, teacher_head, divergence, temperature: float, states, teacher_states, targets):
    """The summed cross-entropy and T^2 * divergence of N tokens; states (N, C) predict targets (N,)."""
    logits = head(states).float()  # (N, V)
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_states).float()
    # Models of one tokenizer may pad the vocabulary to different sizes. No text has the tokens of the padding.
    size = min(logits.size(-1), teacher_logits.size(-1))
    log_p, log_q = ((x[:, :size] / temperature).log_softmax(-1) for x in (teacher_logits, logits))
    distance = temperature**2 * divergence(log_p, log_q).sum()
    return F.cross_entropy(logits, targets, reduction="sum"), distance
