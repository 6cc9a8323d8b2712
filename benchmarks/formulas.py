"""What training costs on paper: parameters, FLOPs, bytes of memory, bytes that processes send each other.

benchmarks/growth.py holds these formulas against what a machine really took, and prints the tables of
docs/scaling.md with them. Readers of the code may skip this file.

In all functions C is the width, F the width inside of the feed-forward, Q and K the widths of all query heads
and of all key/value heads, V the vocabulary, T the tokens of a row.
"""

from benchmarks.shared import markdown
from model.attention import MAX_BLOCKED_TOKENS, QUERIES_PER_BLOCK
from model.config import ModelConfig
from model.transformer import LOSS_ROWS, MAX_KEPT_LOGITS
from trainer.optim import MAX_NUMBERS_AT_ONCE

PARTS = ("weights, optimizer", "gradients", "bf16 copies of weights", "activations", "work space")
STATE, GRADIENTS, COPIES, ACTIVATIONS, WORK = PARTS
LORA_RANK = 16  # of the adapters on paper
GB = 1e9  # bytes


def shape(width: int) -> ModelConfig:
    """The 26m preset, wider or narrower: heads of 64, a quarter as many key/value heads."""
    return ModelConfig(hidden_size=width, num_attention_heads=width // 64,
                       num_key_value_heads=max(1, width // 256), intermediate_size=width * 11 // 4)


def matrices_of_block(config: ModelConfig) -> list[tuple[int, int]]:
    """The shapes of q, o, k, v, gate, up and down, each as (out, in)."""
    c, f = config.hidden_size, config.intermediate_size
    q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return [(q, c), (c, q), (k, c), (k, c), (f, c), (f, c), (c, f)]


# --- numbers and FLOPs --------------------------------------------------------------------------------------


def count(config: ModelConfig) -> dict[str, int]:
    """Parameters by kind: matrices of the blocks, vectors (gains, biases), embedding, head unless tied."""
    c, d = config.hidden_size, config.head_dim
    matrices = sum(out * into for out, into in matrices_of_block(config))
    vectors = 2 * c
    if config.qk_norm:
        vectors += 2 * d
    if config.attention_bias:
        vectors += (config.num_attention_heads + 2 * config.num_key_value_heads) * d
    return {"matrices": config.num_hidden_layers * matrices,
            "vectors": config.num_hidden_layers * vectors + c,
            "embedding": config.vocab_size * c,
            "head": 0 if config.tie_word_embeddings else config.vocab_size * c}


def multiplied(config: ModelConfig) -> int:
    """Weights that each token is multiplied by: the matrices of the blocks, and the head, tied or not."""
    return count(config)["matrices"] + config.vocab_size * config.hidden_size


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Of a training step: 2 FLOPs a weight forward, 4 backward; and causal attention, of T / 2 keys each."""
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6 * (multiplied(config) + attention)


def muon_flops(config: ModelConfig) -> int:
    """Of one optimizer step, whatever the batch: five times X X^T, its square, and their product with X."""
    flops = 0
    for matrix in matrices_of_block(config):
        short, long = sorted(matrix)
        flops += 5 * 2 * (2 * short**2 * long + short**3)
    return config.num_hidden_layers * flops


# --- bytes --------------------------------------------------------------------------------------------------


def state(config: ModelConfig, method: str) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer between two steps. LoRA is on all linear layers."""
    kinds = count(config)
    total, matrices, vectors = sum(kinds.values()), kinds["matrices"], kinds["vectors"]
    if method in ("lora", "qlora"):
        widths = sum(out + into for out, into in matrices_of_block(config))
        adapters = config.num_hidden_layers * LORA_RANK * widths  # A (rank, in) and B (out, rank)
        # NF4: half a byte, a byte of scale for 64 weights, and 4 bytes for 256 scales.
        frozen = matrices * (2 if method == "lora" else 1 / 2 + 1 / 64 + 4 / 64 / 256)
        return {"weights": frozen + 2 * (total - matrices - vectors) + 4 * vectors + 4 * adapters,
                "gradients": 4 * adapters, "optimizer": 8 * adapters}
    optimizer = {"adamw": 8 * total,  # two moments in float32
                 "muon": 4 * matrices + 8 * (total - matrices),  # one moment for the matrices
                 # Two bytes, and for 256 of each a float32 scale. Small tensors stay in float32.
                 "adamw8bit": (2 + 8 / 256) * (total - vectors) + 8 * vectors}[method]
    return {"weights": 4 * total, "gradients": 4 * total, "optimizer": optimizer}


def block_activations(config: ModelConfig, length: int, device: str) -> int:
    """Bytes a token that one block keeps for its backward pass under bfloat16 autocast."""
    c, f = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k = heads * config.head_dim, kv_heads * config.head_dim
    norms = 2 * (4 * c + 4 + 2 * c)  # each keeps its result in float32 and hands on a bfloat16 copy
    if config.qk_norm:
        norms += 4 * (q + k) + 4 * (heads + kv_heads)
    attention = 2 * (2 * q + 2 * k)  # q, k, v and the output in bfloat16
    if device == "cpu" and length <= MAX_BLOCKED_TOKENS:
        # Blocks of queries keep a probability for each key that they may see: half of the row, and half a
        # block.
        attention += 2 * heads * (length + min(length, QUERIES_PER_BLOCK)) // 2
    else:  # fused attention, which long rows and GPUs take, keeps one float32 for each query instead
        attention += 4 * heads
    return norms + attention + 2 * 4 * f  # gate, silu(gate), up and their product


def activations(config: ModelConfig, rows: int, length: int, device: str, checkpointing=False) -> int:
    """Bytes that a forward pass keeps.

    Checkpointing: the input of each block, and all of one block at a time; no block while the head's are
    there.
    """
    c, layers, block = config.hidden_size, config.num_hidden_layers, block_activations(config, length, device)
    head = 6 * c + 4  # the last norm
    if keeps_logits(config, rows * length, device):
        head += 4 * config.vocab_size  # log-probabilities in float32
    kept = layers * 4 * c + max(block, head) if checkpointing else layers * block + head
    return rows * length * kept


def keeps_logits(config: ModelConfig, tokens: int, device: str) -> bool:
    """Whether the backward pass is given the logits of so many tokens, and does not compute them again."""
    return device == "cpu" or tokens * config.vocab_size <= MAX_KEPT_LOGITS


def peak(config: ModelConfig, rows: int, length: int, optimizer: str, device: str, ddp: bool) -> dict:
    """Predicted bytes by part, at whichever of two moments takes more.

    One moment is when the loss is known: all activations are there and no gradient yet, of which DDP keeps
    the memory. The other is the optimizer step: all gradients are there and no activations.
    """
    sizes = state(config, optimizer)
    fixed = sizes["weights"] + sizes["optimizer"]
    at_loss = {STATE: fixed, GRADIENTS: sizes["gradients"] if ddp else 0, COPIES: 2 * multiplied(config),
               ACTIVATIONS: activations(config, rows, length, device),
               WORK: 8 * config.vocab_size * min(rows * length, LOSS_ROWS)}  # two gradients in float32
    at_step = {STATE: fixed, GRADIENTS: sizes["gradients"], COPIES: 0, ACTIVATIONS: 0, WORK: 0}
    if optimizer == "muon":  # all gates and ups at once: gradients looked ahead, stacked, in bfloat16
        gates_and_ups = 2 * config.num_hidden_layers * config.hidden_size * config.intermediate_size
        at_step[WORK] = (4 + 4 + 2) * min(gates_and_ups, MAX_NUMBERS_AT_ONCE)
    return at_loss if sum(at_loss.values()) >= sum(at_step.values()) else at_step


def sent(config: ModelConfig, processes: int, engine: str, micro_batches: int = 1, muon=False) -> float:
    """Bytes that each process sends in a step, in rings, as NCCL and gloo do: of all but its own part.

    DDP all-reduces float32 gradients, which go round twice, 4 + 4 bytes. FSDP2 gathers a block's bfloat16
    weights before its forward and its backward pass (those of embedding and head once, in float32), and
    reduces and scatters float32 gradients, 2 + 2 + 4 bytes: for each micro-batch anew. With Muon the
    processes exchange bfloat16 updates of the matrices, 2 bytes; and before that, where the matrices are cut
    up, what is to be orthogonalised, 4 bytes.
    """
    kinds = count(config)
    total = 8 * sum(kinds.values()) * (1 if engine == "DDP" else micro_batches)
    if muon:
        total += (2 if engine == "DDP" else 6) * kinds["matrices"]
    return (processes - 1) / processes * total


# --- the tables of docs/scaling.md: models and clusters that we do not have ---------------------------------


LLAMA = {"vocab_size": 32000, "tie_word_embeddings": False, "rope_theta": 1e4}
MODELS = {  # public shapes, so that what others measured can be held against the formulas
    "1B": ModelConfig(2048, 22, 32, 4, 5632, **LLAMA),  # TinyLlama
    "7B": ModelConfig(4096, 32, 32, 32, 11008, **LLAMA),  # Llama 2
}
LLAMA3 = ModelConfig(4096, 32, 32, 8, 14336, vocab_size=128256, tie_word_embeddings=False)  # 8B
METHODS = {"AdamW": "adamw", "Muon": "muon", "8-bit AdamW": "adamw8bit", "LoRA, rank 16": "lora",
           "QLoRA, rank 16": "qlora"}
PEAK_FLOPS, SHARE_OF_FLOPS = 989e12, 0.4  # FLOP/s of an H100 SXM in dense bfloat16; what training reaches
GPU_BYTES, SHARE_OF_MEMORY = 80e9, 0.9  # bytes of an H100; the rest is CUDA's, NCCL's, lost between tensors
NVLINK, INFINIBAND = 450e9, 8 * 50e9  # bytes/s one way: of a GPU in its node, of a node's eight cards
SHARE_OF_NETWORK = 0.8  # what rings reach of it
CLUSTERS = [(model, gpus, engine) for model in MODELS for gpus, engine in (
    (1, "none"), (8, "DDP"), (8, "FSDP2"), (64, "DDP"), (64, "FSDP2"))]
LENGTH, ROWS = 4096, 4  # tokens of a row, rows of a GPU in a step
ROWS_AT_ONCE = [(False, 4), (False, 2), (False, 1), (True, 4), (True, 2), (True, 1)]  # checkpointing, rows
PUBLISHED = [  # model, its shape, tokens of a row, tokens/s of one GPU, that GPU's FLOP/s, who says so
    ("TinyLlama 1.1B, 16 A100", MODELS["1B"], 2048, 24_000, 312e12, "its README"),
    ("Llama 2 7B, A100s", MODELS["7B"], 4096, 2e12 / (184_320 * 3600), 312e12, "arXiv:2307.09288, table 2"),
    ("Llama 3.1 8B, 8 H100, FSDP2", LLAMA3, 8192, 5_762, 989e12, "torchtitan, benchmarks/"),
]


def per_gpu(config: ModelConfig, gpus: int, engine: str, rows: int, checkpointing: bool) -> dict[str, float]:
    """Bytes that training with AdamW holds on each GPU: weights, gradients and optimizer, and all at most.

    DDP holds all of the state on every GPU. FSDP2 shards it, and gathers what it computes with. Of two blocks
    (one in use, one on its way) these are bfloat16 weights, their gradients, and the gradients in float32 to
    be reduced; of embedding and head float32 weights, their gradients, and autocast's copy of the head.
    """
    sizes, kinds = state(config, "adamw"), count(config)
    shards = gpus if engine == "FSDP2" else 1
    total = sum(sizes.values()) / shards
    within = 2 * multiplied(config)  # autocast's copies
    if engine == "FSDP2":
        within = (2 + 2 + 4) * 2 * kinds["matrices"] / config.num_hidden_layers
        within += (4 + 4) * (kinds["embedding"] + kinds["head"]) + 2 * config.vocab_size * config.hidden_size
    within += activations(config, rows, LENGTH, "cuda", checkpointing)
    # Of one chunk: two gradients, and the log-probabilities where they are computed again.
    bytes_of_logit = 6 if keeps_logits(config, rows * LENGTH, "cuda") else 6 + 4
    within += bytes_of_logit * config.vocab_size * min(rows * LENGTH, LOSS_ROWS)
    if gpus == 1 or engine == "FSDP2":  # gradients come when activations go; DDP keeps their memory
        within -= sizes["gradients"] / shards
    return {"state": total, "peak": total + max(0, within)}


def cost(config: ModelConfig, gpus: int, engine: str) -> dict[str, float] | None:
    """Of a step of ROWS x LENGTH tokens on each GPU, in the fastest way that fits. None where none fits.

    Network and computing overlap: the longer one counts.
    """
    for checkpointing, rows in ROWS_AT_ONCE:
        sizes = per_gpu(config, gpus, engine, rows, checkpointing)
        if sizes["peak"] <= SHARE_OF_MEMORY * GPU_BYTES:
            break
    else:
        return None
    tokens = ROWS * LENGTH
    flops = flops_per_token(config, LENGTH) * tokens
    compute = flops * (4 / 3 if checkpointing else 1) / (PEAK_FLOPS * SHARE_OF_FLOPS)  # one more forward pass
    traffic = sent(config, gpus, engine, ROWS // rows)
    network = traffic / (SHARE_OF_NETWORK * (NVLINK if gpus <= 8 else INFINIBAND))
    seconds = max(compute, network)
    return sizes | {"rows": rows, "checkpointing": checkpointing, "sent": traffic, "compute": compute,
                    "network": network, "tokens/s": gpus * tokens / seconds,
                    "mfu": flops / seconds / PEAK_FLOPS}


def about(x: float) -> str:
    """Two digits, because no figure on paper is more exact."""
    return f"{float(f'{x:.2g}'):,.{1 if x < 10 else 0}f}"


def state_table() -> str:
    rows = []
    for name, method in METHODS.items():
        totals = {model: sum(state(config, method).values()) for model, config in MODELS.items()}
        rows.append({"state held by": name,
                     "bytes a parameter (7B)": totals["7B"] / sum(count(MODELS["7B"]).values()),
                     "1B (GB)": totals["1B"] / GB, "7B (GB)": totals["7B"] / GB})
    return markdown(rows, {"bytes a parameter (7B)": ".2f", "1B (GB)": ".1f", "7B (GB)": ".1f"})


def memory_table() -> str:
    rows = []
    for model, gpus, engine in CLUSTERS:
        sizes, fits = cost(MODELS[model], gpus, engine), "no"
        if sizes is None:
            sizes = per_gpu(MODELS[model], gpus, engine, 1, True)
        else:
            fits = f"yes: {sizes['rows']} rows at once"
            if sizes["checkpointing"]:
                fits += ", checkpointing"
        rows.append({"model": model, "GPUs": gpus, "engine": engine, "GB of state": sizes["state"] / GB,
                     "GB at most": sizes["peak"] / GB, "fits in 80 GB": fits})
    return markdown(rows, {"GB of state": ".1f", "GB at most": ".1f"})


def time_table() -> str:
    import pandas as pd

    rows = []
    for model, gpus, engine in CLUSTERS:
        found = cost(MODELS[model], gpus, engine)
        if found is None:
            continue
        row = [model, gpus, engine, f"{found['sent'] / GB:.1f}", f"{found['network']:.2f}",
               f"{found['compute']:.2f}", about(found["tokens/s"]), f"{found['mfu']:.0%}"]
        for tokens in (20 * sum(count(MODELS[model]).values()), 1e12):
            days = tokens / found["tokens/s"] / 86_400
            row += [about(days), about(24 * gpus * days)]
        rows.append(row)
    head = ["model", "GPUs", "engine", "GB sent by each", "s of network", "s of computing", "tokens/s", "MFU",
            "20 tokens/parameter: days", "GPU-hours", "1e12 tokens: days", "GPU-hours"]
    return markdown(pd.DataFrame(rows, columns=head))


def published_table() -> str:
    rows = [{"run": name, "tokens/s of a GPU, published": rate,
             "MFU by our formula": rate * flops_per_token(config, length) / flops, "source": source}
            for name, config, length, rate, flops, source in PUBLISHED]
    return markdown(rows, {"tokens/s of a GPU, published": ",.0f", "MFU by our formula": ".0%"})


def on_paper() -> str:
    """The tables of docs/scaling.md, in Markdown."""
    return "\n\n".join([state_table(), memory_table(), time_table(), published_table()])
