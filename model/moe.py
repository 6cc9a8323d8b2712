"""A mixture of experts: several feed-forward layers, of which a token uses a few. A reader may skip this
file.

A model with experts has more weights than one without, but a token passes through as many as before. A
router, one small matrix, chooses the experts of each token (Shazeer et al. 2017, arXiv:1701.06538). The
tensors have the names that Hugging Face's Qwen3MoeForCausalLM has on disk. docs/experts.md explains the rest.

Shapes: B batch, T tokens, N = B T, C width, E experts, k experts for each token, L layers that have experts
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common.device import matmul_dtype
from common.errors import ModelError

SETTINGS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
            "mlp_only_layers", "router_aux_loss_coef", "router_z_loss_coef")  # the fields of ModelConfig
ROUTER = "mlp.gate.weight"  # how the name of a router's matrix ends
MAX_EXPERTS = 2**16
ROWS_MULTIPLE = 64  # of the matrix that an expert reads
GROUPED_WIDTH_MULTIPLE = 8  # a grouped product in bfloat16 takes rows of a multiple of 16 bytes


def check_experts(config) -> None:
    """Raises ModelError for a mixture of experts that cannot exist. config: a ModelConfig with experts."""
    if not isinstance(config.num_experts, int) or not 0 < config.num_experts < MAX_EXPERTS:
        raise ModelError(f"num_experts must be a positive integer below {MAX_EXPERTS:,}, not "
                         f"{config.num_experts!r}")
    if config.num_experts_per_tok > config.num_experts:
        raise ModelError(f"num_experts_per_tok {config.num_experts_per_tok} is more than num_experts "
                         f"{config.num_experts}")
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if not isinstance(getattr(config, name), (int, float)) or not 0 <= getattr(config, name) < math.inf:
            raise ModelError(f"{name} must be a number from 0 up, not {getattr(config, name)!r}")
    if config.layer_types:
        raise ModelError("num_experts and layer_types, a window in some layers only: Hugging Face has no "
                         "class with both")
    is_mixtral = config.norm_topk_prob and not config.mlp_only_layers and not config.attention_bias
    if not config.qk_norm and not is_mixtral:
        raise ModelError("experts need qk_norm (as Qwen3-MoE has it), or norm_topk_prob and experts in every "
                         "layer (as Mixtral has it): Hugging Face has no other class for them")


def set_penalties(config, balance: float | None, z_loss: float | None, path) -> None:
    """Gives the two losses of the routers other weights, as --router_balance and --router_z_loss ask for.

    None leaves a weight as it is. path: of the model. Raises ModelError where there are no experts.
    """
    for flag, field, weight in (("router_balance", "router_aux_loss_coef", balance),
                                ("router_z_loss", "router_z_loss_coef", z_loss)):
        if weight is not None and not config.num_experts:
            raise ModelError(f"--{flag} has no effect on {path}, which has no experts: leave it out")
        if weight is not None:
            setattr(config, field, weight)


class Router(nn.Module):
    """r = W x: how well each expert suits a token, (B, T, C) -> (B, T, E), always computed in float32.

    It is no nn.Linear. So it gets no adapter and is never quantized: small errors here would send tokens to
    other experts.
    """

    def __init__(self, width: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Reorder(torch.autograd.Function):
    """rows[order]. `inverse` is the order that undoes it, so the gradient is grad[inverse].

    PyTorch does not know that no row occurs twice. It would add up gradients, which is slower, and on a GPU
    would not give the same bits each time.
    """

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


class MixtureOfExperts(nn.Module):
    """y = the sum over the k chosen experts e of p_e FFN_e(x),   p = softmax(r)

    (Switch: Fedus et al. 2021, arXiv:2101.03961.) The chosen experts are those with the largest p. Every
    token gets its k experts, however many tokens want the same one.

    norm_topk_prob: the p of the chosen experts are divided by their sum, as in Mixtral. With k = 1 the only p
    is then 1 whatever the router says, so no gradient reaches the router.

    Experts are layers like all others, and no tensors of three dimensions. So adapters, 4 bits and Muon take
    each of them as they take any layer, and on disk each has its own name.

    Tokens are sorted by expert, so that each expert reads its tokens as one matrix. With k = 1 and E = 2:
        token    a b c d e         order    0 2 3 | 1 4     sorted   a c d | b e
        expert   0 1 0 0 1         inverse  0 3 1 2 4       expert 0 reads a c d, expert 1 reads b e
    """

    def __init__(self, config, make_expert):
        """make_expert(width, intermediate_size): FeedForward of model/transformer.py."""
        super().__init__()
        self.gate = Router(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(make_expert(config.hidden_size, config.expert_size)
                                     for _ in range(config.num_experts))
        self.experts_per_token, self.normalise = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x):
        """x (B, T, C) -> y (B, T, C), and r (B, T, E), of which `routing_sums` makes the balancing loss."""
        scores = self.gate(x)  # (B, T, E)
        p, chosen = self.choose(scores)  # (B, T, k) each
        order = chosen.flatten().argsort(stable=True)  # (N k,), sorted by expert
        inverse = order.argsort()
        counts = F.one_hot(chosen.flatten(), len(self.experts)).sum(0)  # (E,): how many tokens each one gets
        copies = x.flatten(0, 1).repeat_interleave(chosen.size(-1), 0)  # (N k, C): k times each token
        rows = Reorder.apply(copies, order, inverse)
        y = self.grouped(rows, counts) if self.can_group(rows) else self.one_by_one(rows, counts)
        y = Reorder.apply(y, inverse, order).view(*chosen.shape, -1)  # (B, T, k, C)
        weighted = [of_rank * weight[..., None] for of_rank, weight in
                    zip(y.unbind(2), p.to(y.dtype).unbind(2), strict=True)]
        return sum(weighted), scores  # (B, T, C), from the likeliest expert of each token to the k-th

    def choose(self, scores):
        """(how much each chosen expert counts, which experts these are), (..., k) each, of r (..., E)."""
        p, chosen = scores.softmax(dim=-1).topk(self.experts_per_token, dim=-1)
        return (p / p.sum(dim=-1, keepdim=True) if self.normalise else p), chosen

    def one_by_one(self, rows, counts):
        """The experts in turn: rows (N k, C), sorted by expert -> (N k, C).

        An expert without a token computes with a matrix of no rows. So its weights get a gradient of zeros,
        as they must: all processes then exchange the same gradients, and optimizers see every weight.

        Rows of zeros fill a large matrix up, so that few sizes occur. A CPU prepares a product in bfloat16
        anew for each size that it has not met lately, which takes longer than the product of a small layer.
        """
        parts = rows.split(counts.tolist())  # here a CPU waits for a GPU
        results = []
        for expert, part in zip(self.experts, parts, strict=True):
            zeros = -len(part) % ROWS_MULTIPLE if len(part) > ROWS_MULTIPLE else 0
            results.append(expert(F.pad(part, (0, 0, 0, zeros)))[:len(part)])
        return torch.cat(results)

    def can_group(self, rows) -> bool:
        """Whether a GPU can compute all experts at once: in bfloat16, with plain weights and no adapters."""
        layers = [layer for expert in self.experts for layer in expert.children()]
        sizes = {size for layer in layers for size in (layer.in_features, layer.out_features)}
        return (rows.device.type == "cuda" and matmul_dtype(rows) == torch.bfloat16
                and torch.cuda.get_device_capability(rows.device) >= (9, 0)
                and all(type(layer) is nn.Linear for layer in layers)
                and all(size % GROUPED_WIDTH_MULTIPLE == 0 for size in sizes))

    def grouped(self, rows, counts):
        """The same as one_by_one, in three products for all experts together. The CPU does not wait."""
        ends = counts.cumsum(0).to(torch.int32)  # where the rows of each expert end

        def product(x, name):
            weights = [getattr(expert, name).weight.to(torch.bfloat16) for expert in self.experts]
            return F.grouped_mm(x, torch.stack(weights).mT, offs=ends)  # (E, in, out)

        rows = rows.to(torch.bfloat16)
        return product(F.silu(product(rows, "gate_proj")) * product(rows, "up_proj"), "down_proj")


def routing_sums(config, scores, labels, document_ids=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the routers must pay in a micro-batch, and what they did, as sums over its labels.

    scores (L, B, T, E), labels and document_ids (B, T) -> the penalty, and for the log:

    balance         E * the sum over experts of f_e P_e   (Switch: Fedus et al. 2021, arXiv:2101.03961).
                    f_e is the share of expert e in the choices of a document, P_e the mean of its p. It is 1
                    where all experts are used alike, and E / k where the same k serve every token.
    router_entropy  of p, in nats: log E where the router knows nothing, 0 where it is sure
    router_load     (L, E): f_e

    penalty = router_aux_loss_coef * balance + router_z_loss_coef * logsumexp(r)^2. The second term, the
    z-loss (ST-MoE: Zoph et al. 2022, arXiv:2202.08906), keeps r small.

    All of them are means over layers, router_load apart. Each value belongs to one document, and counts once
    for each label of the document. So all of it adds up over rows, micro-batches and processes, like the loss
    of tokens. Tokens after the last label of their document do not count, since they have no part in the
    loss. Padding is among them.
    """
    if document_ids is None:
        document_ids = torch.zeros_like(labels)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)  # (B, T)
    document = begins.flatten().cumsum(0) - 1  # (N,): which document of the batch a token belongs to
    is_label = ((labels != -100) & ~begins).flatten()  # the first token of a document is never predicted
    place = torch.arange(labels.numel(), device=labels.device)
    nowhere = torch.full_like(place, -1)
    label_places = torch.where(is_label, place, nowhere)
    last_label = nowhere.scatter_reduce(0, document, label_places, "amax")  # (N,), for at most N documents
    counts = (place < last_label[document]).float()  # (N,)

    def per_document(values):  # (N, ...), whole numbers, whose sums are exact in any order -> (N, ...)
        return torch.zeros_like(values).index_add(0, document, values)[document]

    # A token has this share of its document's value, times the document's number of labels.
    num_tokens = per_document(counts).clamp(min=1)  # (N,): in the token's document
    share = counts * per_document(is_label.float()) / num_tokens  # (N,)
    scores = scores.float().flatten(1, 2).transpose(0, 1)  # (N, L, E)
    p = scores.softmax(dim=-1)
    chosen = scores.detach().topk(config.num_experts_per_tok, dim=-1).indices
    is_chosen = torch.zeros_like(p).scatter(-1, chosen, 1.0) * counts[:, None, None]  # (N, L, E)
    f = per_document(is_chosen) / (num_tokens * config.num_experts_per_tok)[:, None, None]
    balance = (share * (f * p).sum(-1).mean(1)).sum() * config.num_experts
    z = (share * scores.logsumexp(dim=-1).square().mean(1)).sum()
    entropy = (share * torch.special.entr(p.detach()).sum(-1).mean(1)).sum()
    load = (share[:, None, None] * is_chosen).sum(0) / config.num_experts_per_tok  # (L, E)
    penalty = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
    return penalty, {"balance": balance.detach(), "router_entropy": entropy, "router_load": load}
