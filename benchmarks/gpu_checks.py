"""The first question of gpu.py: is a GPU right? It is compared with a CPU, a definition, or other packages.

A part is a function that yields lines. A difference is measured in units of the largest number of what is
right, so an allowed difference of 1e-4 is about a float32 rounding in each of some hundred additions.
"""

import copy
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch

from common.device import autocast
from model.config import ModelConfig
from model.transformer import CausalLM
from trainer.distributed import Ranks
from trainer.losses import clipped_ratio, policy_loss

FLOAT32, HALF = 1e-4, 3e-2  # allowed differences
GRADIENT = 1e-3  # in float32: rounding adds up on the way back
SMALL = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 512, "vocab_size": 1000, "initializer_range": 0.05}
SHAPES = {"Llama": {}, "Qwen3 (norms of q and k)": {"qk_norm": True},
          "Qwen2 (biases)": {"attention_bias": True}, "Mistral (window of 40)": {"sliding_window": 40},
          "a head of its own": {"tie_word_embeddings": False}}


class Skip(Exception):
    """This part cannot run here; the message says why."""


@dataclass
class Run:
    """device: where to compute. smoke: tiny shapes. folder: of this run. seconds: what the part may take."""

    device: torch.device
    smoke: bool
    folder: Path
    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def ranks(self) -> Ranks:
        return Ranks(0, 1, self.device)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work, repeats: int = 5) -> float:
        """The median time of work(), after one call that warms up."""
        times = []
        for _ in range(1 if self.smoke else repeats + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append(1000 * (time.perf_counter() - began))
        return sorted(times[1:] or times)[len(times[1:]) // 2]

    def peak(self, work) -> float:
        """work(), and GB that it takes at most beyond what is there before."""
        if not self.on_gpu:
            work()
            return math.nan
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e9


# --- comparing ----------------------------------------------------------------------------------------------


def compare(what: str, found, wanted, allowed: float, **figures) -> dict:
    """A line: whether `found` is near `wanted`. Both are a tensor, or a dict of tensors by name."""
    if isinstance(wanted, torch.Tensor):
        found, wanted = {"": found}, {"": wanted}
    if found.keys() != wanted.keys():
        return check(what, False, missing=str(sorted(found.keys() ^ wanted.keys())[:3]))
    largest = 0.0
    for name, right in wanted.items():
        right, other = right.detach().double().cpu(), found[name].detach().double().cpu()
        difference = ((other - right).abs().max() / right.abs().max().clamp(min=1e-12)).item()
        largest = max(largest, math.inf if math.isnan(difference) else difference)
    return check(what, largest <= allowed, difference=largest, allowed=allowed, **figures)


def check(what: str, is_right: bool, **figures) -> dict:
    return {"what": what, "verdict": "right" if is_right else "WRONG", "figures": figures}


def note(what: str, **figures) -> dict:
    """A line that only tells something."""
    return {"what": what, "figures": figures}


def left_out(what: str) -> dict:
    return {"what": what, "verdict": "left out"}


def pair(run: Run, **changes) -> tuple[CausalLM, CausalLM]:
    """The same model on the CPU and on the device."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**SMALL | changes))
    return model, copy.deepcopy(model).to(run.device)


def adapted_pair(run: Run, prepare=lambda model: model) -> tuple[CausalLM, CausalLM]:
    """The same adapters over the same base, on the CPU and on the device. prepare(base) comes first."""
    from model.lora import apply_lora, freeze_all_but_lora, lora_parameters

    cpu, _ = pair(run)
    prepare(cpu)
    apply_lora(cpu, rank=8)
    freeze_all_but_lora(cpu)
    for parameter in lora_parameters(cpu):
        torch.nn.init.normal_(parameter, std=0.05)
    return cpu, copy.deepcopy(cpu).to(run.device)


def tokens(rows: int = 2, length: int = 200, vocabulary: int = SMALL["vocab_size"]) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def documents(rows: int, length: int, mean: int) -> torch.Tensor:
    """document_ids (rows, length): documents of random lengths around the mean."""
    rng, found = random.Random(0), []
    for _ in range(rows):
        row = []
        while len(row) < length:
            row += [row[-1] + 1 if row else 0] * rng.randint(mean // 2, mean * 3 // 2)
        found.append(row[:length])
    return torch.tensor(found)


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients, which leave the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step_gradients(model, batch: dict, dtype=torch.float32) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses of all tokens of a batch, and the gradients of their mean."""
    losses = backward(model, batch, dtype)
    return losses, gradients(model)


def backward(model, batch: dict, dtype) -> torch.Tensor:
    """The losses of all tokens of a batch. The gradients of their mean are in the model afterwards."""
    device = next(model.parameters()).device
    with autocast(device, dtype):
        output = model(**{name: value.to(device) for name, value in batch.items()})
    output.loss.backward()
    return output.token_losses.detach()


def plain_batch() -> dict:
    ids = tokens()
    return {"input_ids": ids, "labels": ids, "document_ids": documents(*ids.shape, mean=60)}


# --- the parts ----------------------------------------------------------------------------------------------


def logits(run: Run):
    """float32 on the device against float32 on the CPU, and against transformers' own class on the device."""
    from benchmarks.shared import transformers_model

    for name, changes in SHAPES.items():
        cpu, device = pair(run, **changes)
        batch = plain_batch()
        ids, packed = batch["input_ids"], batch["document_ids"]
        with torch.no_grad():
            right, found = cpu(ids).logits, device(ids.to(run.device)).logits
            yield compare(f"{name}: logits", found, right, FLOAT32)
            yield compare(f"{name}: logits of packed rows",
                          device(ids.to(run.device), document_ids=packed.to(run.device)).logits,
                          cpu(ids, document_ids=packed).logits, FLOAT32)
            twin = transformers_model(cpu.config).to(run.device).eval()
            twin.load_state_dict(device.state_dict())
            theirs = twin(ids.to(run.device)).logits
            yield compare(f"{name}: logits beside transformers", found, theirs, FLOAT32)
        losses, of_cpu = step_gradients(cpu, batch)
        found, of_device = step_gradients(device, batch)
        yield compare(f"{name}: gradients", of_device, of_cpu, GRADIENT)
        in_half, _ = step_gradients(device, batch, torch.bfloat16)
        yield compare(f"{name}: losses in bfloat16", in_half, losses, HALF)


def packing(run: Run):
    """Packed rows and windows in bfloat16, by whatever way CUDA takes, against the definition in float32."""
    rows, length, width = (2, 64, 64) if run.smoke else (4, 2048, 512)
    shape = SMALL | {"hidden_size": width, "num_attention_heads": width // 64,
                     "num_key_value_heads": max(1, width // 256)}
    ids, packed = tokens(rows, length).to(run.device), documents(rows, length, length // 6).to(run.device)
    for name, window, found in (("packed rows", None, packed), ("a window", length // 5, None),
                                ("packed rows and a window", length // 10, packed)):
        yield from masked(run, name, ModelConfig(**shape | {"sliding_window": window}), ids, found)
    _, model = pair(run)
    with autocast(run.device, torch.bfloat16):
        whole = model(ids, ids, packed).token_losses.detach()
        places = packed[0] == 1  # the second document of the first row, alone
        alone = model(ids[:1, places], ids[:1, places]).token_losses.detach()
    line = "a packed document has the losses that it has alone"
    yield compare(line, whole[0, places][1:], alone[0, 1:], HALF)


def masked(run: Run, name: str, config: ModelConfig, ids, packed):
    """One mask of `packing`."""
    from model import attention as A

    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    exact = [torch.randn(len(ids), count, ids.size(1), config.head_dim, device=run.device) for count in heads]
    half = [x.bfloat16() for x in exact]
    weight, visible = torch.randn_like(exact[0]), A.visible_keys(config.sliding_window, ids, packed)
    mask = A.make_mask(config, config.sliding_window, ids, packed, None, torch.bfloat16)
    dense = A.AttentionMask(visible)

    def results(way, inputs, mask):
        inputs = [x.detach().requires_grad_() for x in inputs]
        y = way(*inputs, mask)
        return {"y": y, **dict(zip("qkv", torch.autograd.grad((y * weight).sum(), inputs), strict=True))}

    right = results(A.plain_attention, [x.float() for x in half], visible)
    way = "flex_attention" if mask.flex is not None else "a mask"
    found = results(A.attention, half, mask)
    yield compare(f"{name}: attention and its gradients by {way}", found, right, HALF)
    times = {f"ms by {way}": run.milliseconds(lambda: results(A.attention, half, mask)),
             "ms by a mask": run.milliseconds(lambda: results(A.attention, half, dense))}
    yield note(f"{name}: forward and backward", **times)


def head(run: Run):
    """The loss whose logits are computed twice, against the loss that keeps them."""
    from model import transformer

    count, width, vocabulary = (48, 32, 100) if run.smoke else (16_384, 1024, 50_000)
    config = ModelConfig(hidden_size=width, num_hidden_layers=1, vocab_size=vocabulary)
    model = CausalLM(config).to(run.device)
    hidden = torch.randn(1, count, width, device=run.device, requires_grad=True)
    labels = torch.randint(vocabulary, (1, count), device=run.device)
    found, figures = [], {}
    for way, limit in (("kept", 2**60), ("computed again", 0)):
        def step(limit=limit):
            model.zero_grad()
            hidden.grad = None
            with patch.object(transformer, "MAX_KEPT_LOGITS", limit), autocast(run.device, torch.bfloat16):
                losses = model.token_losses(hidden, labels)
            losses.sum().backward()
            return losses.detach()

        figures[f"GB, {way}"] = run.peak(step)
        figures[f"ms, {way}"] = run.milliseconds(step)
        losses = step()
        found.append({"losses": losses, "hidden": hidden.grad.clone(), **gradients(model)})
    yield compare("logits computed again: losses and gradients", found[1], found[0], FLOAT32, **figures)


def decoding(run: Run):
    """Tokens on the device as on the CPU, greedy and sampled; by a recorded step as by an ordinary one."""
    from model.cuda_graph import record_decoding
    from model.generate import KVCache, generate
    from model.sample_many import sample_many

    length, new = (12, 4) if run.smoke else (40, 64)
    for name, changes in {"Llama": {}, "Mistral (window)": {"sliding_window": 16}}.items():
        cpu, device = (model.eval() for model in pair(run, **changes))
        settings = {"max_new_tokens": new, "temperature": 0, "prompt_lengths": [length, length // 2]}
        right = torch.stack(list(generate(cpu, tokens(2, length), **settings)))
        found = torch.stack(list(generate(device, tokens(2, length), **settings))).cpu()
        yield check(f"{name}: greedy tokens of two padded rows", torch.equal(found, right))
        if run.on_gpu:
            record_decoding(device)
            found = torch.stack(list(generate(device, tokens(2, length), **settings))).cpu()
            yield check(f"{name}: the same by a CUDA graph", torch.equal(found, right))
            device.one_token = None
        numbers = torch.rand(6, new, generator=torch.Generator().manual_seed(0))
        prompts = [row.tolist() for row in tokens(2, length)]
        right, found = (sample_many(model, prompts, new, [5], 3, 1.0, numbers) for model in (cpu, device))
        same = sum(torch.equal(a, b) for a, b in zip(right, found, strict=True))
        yield check(f"{name}: sampled answers by the same random numbers", same == 6, same=f"{same} of 6")
    if run.on_gpu:
        half = device.bfloat16()
        ids = tokens(2, length).to(run.device)
        caches = [KVCache(half.config, 2, length + 1, run.device, torch.bfloat16) for _ in range(2)]
        with torch.no_grad():
            for cache in caches:
                half(ids[:, :-1], cache=cache)
            right = half(ids[:, -1:], cache=caches[0]).logits[:, 0]
            record_decoding(half)
            half.one_token.get_ready(2)
            found = half.one_token(ids[:, -1], caches[1])
            yield compare("bfloat16: logits by a CUDA graph", found, right, HALF)


def lora(run: Run):
    """Gradients of adapters, and merging."""
    from model.lora import merge_lora

    cpu, device = adapted_pair(run)
    batch = plain_batch()
    losses, of_cpu = step_gradients(cpu, batch)
    found, of_device = step_gradients(device, batch)
    yield compare("losses", found, losses, FLOAT32)
    yield compare("gradients of A and B", of_device, of_cpu, GRADIENT)
    _, in_half = step_gradients(device, batch, torch.bfloat16)
    yield compare("the same in bfloat16", in_half, of_cpu, 3 * HALF)
    with torch.no_grad():
        ids = batch["input_ids"].to(run.device)
        before = device(ids).logits
        merge_lora(device)
        yield compare("logits after merging", device(ids).logits, before, FLOAT32)


def qlora(run: Run):
    """Weights in 4 bits: on the device as on the CPU, and as the kernels of bitsandbytes have them."""
    from model import quantize

    weight = torch.randn(256, 512) * 0.05
    codes, absmax = quantize.quantize_nf4(weight)
    on_device = weight.to(run.device)
    found = quantize.quantize_nf4(on_device)
    same = [torch.equal(a.cpu(), b) for a, b in zip(found, (codes, absmax), strict=True)]
    yield check("codes and scales as on the CPU", all(same))
    right = quantize.dequantize_nf4([codes, absmax], weight.shape, torch.float32)
    with patch.object(quantize, "bitsandbytes_operators", lambda device: None):
        again = quantize.dequantize_nf4(list(found), weight.shape, torch.float32)
        yield check("weights back by PyTorch", torch.equal(again.cpu(), right))
    if quantize.bitsandbytes_operators(run.device) is None:
        yield left_out("bitsandbytes is not installed here, or has no kernels for this device")
    else:
        import bitsandbytes.functional as theirs

        again = quantize.dequantize_nf4(list(found), weight.shape, torch.float32)
        yield check("weights back by bitsandbytes' kernel, to the bit", torch.equal(again.cpu(), right))
        their_codes, state = theirs.quantize_4bit(on_device, blocksize=64, quant_type="nf4")
        yield check("bitsandbytes' codes", torch.equal(their_codes.flatten().cpu(), codes),
                    differing=int((their_codes.flatten().cpu() != codes).sum()))
        theirs_back = theirs.dequantize_4bit(their_codes, state)
        yield compare("bitsandbytes' weights", again, theirs_back, 1e-6)
    cpu, device = adapted_pair(run, quantize.quantize_model)
    batch = plain_batch()
    losses, of_cpu = step_gradients(cpu, batch)
    found, of_device = step_gradients(device, batch)
    yield compare("losses of a QLoRA step", found, losses, FLOAT32)
    yield compare("gradients of A and B over 4 bits", of_device, of_cpu, GRADIENT)


def grpo(run: Run):
    """The gradient of a GRPO step for given answers. (Part "quickstart" trains with rewards.)"""
    cpu, device = pair(run)
    ids = tokens(4, 30)
    labels = ids.masked_fill(torch.arange(30) < 12, -100)
    labels[1, 20:] = -100
    is_answer = labels != -100
    batch = {"input_ids": ids, "labels": labels, "sums": {}, "weights": torch.full((4,), 0.1),
             "token_weights": torch.full((4,), 0.1), "advantages": torch.randn(4, 1) * is_answer,
             "old_log_probs": (-6.9 + 0.3 * torch.randn(4, 30)) * is_answer,
             "reference_log_probs": (-6.9 + 0.3 * torch.randn(4, 30)) * is_answer}
    found = []
    for model in (cpu, device):
        here = {name: value if name == "sums" else value.to(next(model.parameters()).device)
                for name, value in batch.items()}
        loss, named = policy_loss(model, here, objective=clipped_ratio, temperature=1.2, kl_beta=0.1)
        loss.backward()
        found.append(({name: value for name, value in {"loss": loss, **named}.items()}, gradients(model)))
    yield compare("loss, entropy, KL, clipped", found[1][0], found[0][0], GRADIENT)
    yield compare("gradients", found[1][1], found[0][1], GRADIENT)
