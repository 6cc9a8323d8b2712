"""The loss on data that a model does not train on: the one place where it is computed.
A reader may skip this file.
"""

from collections.abc import Iterable

import torch

from common.device import autocast, to_device


@torch.no_grad()
def mean_loss(model, batches: Iterable[dict], dtype: torch.dtype = torch.float32,
              add_up=lambda *values: values, look=None) -> tuple[float, int]:
    """-1/N * sum of log p(token) over the N supervised tokens of all batches, in nats, and N itself.

    model: a CausalLM, which is put in eval mode for the duration. dtype: of its matrix products.
    batches: dicts with input_ids, labels, document_ids (B, T), as dataset.lm_dataset.collate makes them.
    add_up(*values): the values summed over all processes (Ranks.sum), where each has a part of the batches.
    look(output, batch): is called after each forward pass, for whatever else a caller wants to measure.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64)  # on the CPU, since MPS has no float64
    num_targets = 0
    for batch in batches:
        with autocast(device, dtype):
            output = model(**to_device(batch, device))
            loss_sum += output.token_losses.sum().cpu()
            if look is not None:
                look(output, batch)
        num_targets += output.num_targets.item()
    model.train(was_training)
    loss_sum, num_targets = (float(total) for total in add_up(loss_sum, num_targets))
    return loss_sum / max(1.0, num_targets), int(num_targets)
