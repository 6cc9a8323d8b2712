"""What training minimises. A loss is a plain function `loss(model, batch)` of one micro-batch.

It returns a sum over the units of the micro-batch (here tokens), and further named sums over the same units
for the log, such as {"accuracy": ...}. The loop divides all of them by the number of units in the whole
step, over all micro-batches and processes. So the loss of a step is one mean, and never a mean of means:

    10 tokens of loss 1 in one micro-batch, 30 tokens of loss 3 in another     (10 + 90) / 40 = 2.5
    the mean of the two means                                                  (1 + 3) / 2 = 2, which is wrong
"""

import torch


def cross_entropy(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum over the supervised tokens of -log p(token | the tokens before it), in nats.

    batch: input_ids, labels and document_ids, (B, T) each, as CausalLM.forward takes them. A batch without a
    supervised token gives 0.
    """
    return model(**batch).token_losses.sum(), {}
