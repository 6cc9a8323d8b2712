"""Models and adapters as GGUF files, the format of llama.cpp, ollama and LM Studio. A reader may skip this
file.

    write_model(model, tokenizer, Path("x.gguf"), "Q8_0")   # scripts/export_gguf.py
    load_model("x.gguf")                                    # calls `read_model` below
    write_adapter(model, loras, Path("a.gguf"), "F32")

The file has names of its own for everything, and for one architecture an order of its own: its `llama` turns
neighbours (x[0], x[1]) by RoPE, where Hugging Face turns halves (x[0], x[D/2]). So the rows of q and k are
stored interleaved there. docs/export.md says what the format cannot express.
"""

import errno
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from common import files
from common.errors import ModelError
from model.config import ModelConfig, rope_frequencies
from model.expert_files import stack_experts, unstack_experts
from model.gguf_file import StoredTensor, package, read_gguf
from model.gguf_tokenizer import token_ids, tokenizer_fields

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")  # Mistral and Mixtral are `llama`, too
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}  # general.file_type
LAYER = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps",  # all experts in one tensor
         "mlp.experts.up_proj": "ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps"}
OTHER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROPE_FACTORS = "rope_freqs.weight"  # what llama3's scaling divides the angle of each pair by, (D/2,)
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
PLAIN = ("F32", "F16", "BF16", "F64")  # types that need no dequantizing

# --- names and rows -----------------------------------------------------------------------------------------


def architecture(config: ModelConfig) -> str:
    if config.qk_norm:
        return "qwen3moe" if config.num_experts else "qwen3"
    return "qwen2" if config.attention_bias else "llama"


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight. All experts have the name of their tensor."""
    module, _, kind = name.rpartition(".")
    if module in OTHER:
        return f"{OTHER[module]}.{kind}"
    _, _, layer, rest = re.sub(r"\.experts\.\d+\.", ".experts.", module).split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def our_name(name: str) -> str:
    """blk.3.ffn_up.weight -> model.layers.3.mlp.up_proj.weight; a name that is not known stays."""
    module, _, kind = name.rpartition(".")
    others, layers = ({there: here for here, there in names.items()} for names in (OTHER, LAYER))
    if module in others:
        return f"{others[module]}.{kind}"
    parts = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)", module)  # no second spelling, such as blk.00
    return f"model.layers.{parts[1]}.{layers[parts[2]]}.{kind}" if parts and parts[2] in layers else name


def heads_to_reorder(name: str, config: ModelConfig) -> int | None:
    """The number of heads of a matrix whose rows have another order in the file; None for the others."""
    if architecture(config) == "llama":
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                return heads
    return None


def to_neighbours(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Within each head: a b c d, with the pairs (a, c) and (b, d), becomes a c b d. heads None: unchanged."""
    if heads is None:
        return rows
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def to_halves(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """The inverse of to_neighbours."""
    if heads is None:
        return rows
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


# --- writing ------------------------------------------------------------------------------------------------


def write_model(model, tokenizer, path: Path, kind: str, name: str, ends: list[int]) -> None:
    """Writes one file with weights, shape and tokenizer, whole or not at all.

    kind: a name in FILE_TYPES. ends: the tokens that end an answer. Raises ModelError where the format can't
    say what the model or its tokenizer is.
    """
    config = model.config
    with files.writing(path) as temporary:
        writer = new_writer(temporary, config, "model", name)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(2)
        add_shape(writer, config)
        add_rope(writer, config)
        tokenizer_fields(writer, tokenizer, config.vocab_size, ends)
        if (config.rope_scaling or {}).get("rope_type") == "llama3":
            add_tensor(writer, ROPE_FACTORS, llama3_factors(config), "F32")
        for tensor_name, tensor in stack_experts(model.state_dict()).items():
            if ".lora." in tensor_name or ".weight." in tensor_name:
                raise ModelError(f"can't export {tensor_name}: merge adapters, and dequantize weights")
            if tensor_name == "lm_head.weight" and config.tie_word_embeddings:
                continue  # a file without it says: the head is the embedding
            rows = to_neighbours(tensor.detach().float(), heads_to_reorder(tensor_name, config))
            files.check_finite({tensor_name: rows}, f"export to {path}")
            add_tensor(writer, gguf_name(tensor_name), rows, kind)
        finish(writer, path)


def write_adapter(model, loras: dict, path: Path, kind: str, name: str) -> None:
    """Writes an adapter alone, for --lora of llama.cpp. loras: {layer name: LoRA}, of read_lora.

    llama.cpp multiplies B A by alpha / rank with one alpha for all layers. Where layers differ, the
    difference goes into B. Raises ModelError for an adapter over a head that is the embedding, too.
    """
    if any(".experts." in layer for layer in loras):
        raise ModelError("this adapter changes experts: an adapter file can't say that; merge it first, with "
                         "scripts/merge_lora.py")
    if "lm_head" in loras and model.config.tie_word_embeddings:
        raise ModelError("this adapter changes the output head, which is the embedding, too: an adapter file "
                         "can't say that; merge it first, with scripts/merge_lora.py")
    alphas = {layer: lora.scaling * len(lora.factors()[1]) for layer, lora in loras.items()}
    alpha = next(iter(alphas.values()))
    with files.writing(path) as temporary:
        writer = new_writer(temporary, model.config, "adapter", name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for layer, lora in loras.items():
            b, a = (matrix.detach() for matrix in lora.factors())
            b = to_neighbours(b * (alphas[layer] / alpha), heads_to_reorder(layer, model.config))
            files.check_finite({layer: a, f"{layer} (B)": b}, f"export to {path}")
            add_tensor(writer, f"{gguf_name(layer + '.weight')}.lora_a", a, kind)
            add_tensor(writer, f"{gguf_name(layer + '.weight')}.lora_b", b, kind)
        finish(writer, path)


def new_writer(path: Path, config: ModelConfig, what: str, name: str):
    writer = package().GGUFWriter(path, architecture(config))
    writer.add_type(what)
    writer.add_name(name)
    return writer


def finish(writer, path: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    try:
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        if error.errno is None:  # numpy's words for a disk that is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


def add_tensor(writer, name: str, numbers: torch.Tensor, kind: str) -> None:
    gguf = package()
    kind = store_type(name, numbers.shape, kind)
    stored = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(numbers.contiguous().numpy(), stored), raw_dtype=stored)


def store_type(name: str, shape: tuple, wanted: str) -> str:
    """Norms, biases and routers stay float32. Rows that blocks of 32 don't divide become float16. In a Q4_0
    file embedding and head, which a small model feels most, have 8 bits."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    if wanted.startswith("Q") and shape[-1] % 32:
        return "F16"
    return "Q8_0" if wanted == "Q4_0" and name in ("token_embd.weight", "output.weight") else wanted


def add_shape(writer, config: ModelConfig) -> None:
    """The fields of the shape. llama.cpp knows no sliding window in these architectures. So where a model has
    one, the file asks for texts no longer than the window, on which both compute the same. Raises ModelError
    for a window in some layers only: the file could not be read back, and long texts would be lost."""
    window = config.sliding_window
    if config.layer_types:
        raise ModelError(f"a sliding window of {window} in some layers only: GGUF has no field for it in "
                         f"{architecture(config)}; vLLM and transformers read the folder")
    writer.add_context_length(min(window or math.inf, config.max_position_embeddings))
    if window is not None:
        writer.add_sliding_window(window)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    add_experts(writer, config)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_experts(writer, config: ModelConfig) -> None:
    """The fields of the experts. Raises ModelError for what llama.cpp computes in another way."""
    if not config.num_experts:
        return
    if not config.norm_topk_prob:
        raise ModelError("norm_topk_prob is false: in llama.cpp what a token's experts count always adds up "
                         "to 1, so it would answer otherwise; train with --experts_per_token 2 and "
                         "--norm_topk_prob for this format")
    if config.mlp_only_layers:
        raise ModelError("some layers have no experts: llama.cpp wants them in all layers")
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.expert_size)


def add_rope(writer, config: ModelConfig) -> None:
    """The fields of rope_scaling. Raises ModelError, which names the setting, for what llama.cpp can't do."""
    scaling = dict(config.rope_scaling or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", "default")
    if kind == "default":
        return
    arch, original = architecture(config), scaling.get("original_max_position_embeddings")
    if kind == "llama3":
        if arch != "llama":
            raise ModelError(f"rope_scaling llama3: llama.cpp has it for llama, not for {arch}")
        for key in LLAMA3:  # fields of our own, from which the settings can be read back
            writer.add_float32(f"{arch}.rope.scaling.llama3.{key}", scaling[key])
        writer.add_uint32(f"{arch}.rope.scaling.llama3.original_context_length",
                          original or config.max_position_embeddings)
        return
    gguf = package()
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    if kind == "linear":
        writer.add_rope_scaling_factor(scaling["factor"])
        return
    for key, usual in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if scaling.get(key) not in (None, usual):
            raise ModelError(f"rope_scaling yarn with {key} {scaling[key]}: llama.cpp has {usual} for {arch}")
    original = original or config.max_position_embeddings
    factor = scaling.get("factor") or config.max_position_embeddings / original
    if factor <= 1:
        raise ModelError(f"rope_scaling yarn with factor {factor}: it must be above 1")
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)
    # llama.cpp multiplies cos and sin by 1 + 0.1 ln(factor) in any case, and by this number on top.
    _, scale = rope_frequencies(config, "cpu")
    usual = 0.1 * math.log(factor) + 1
    if not math.isclose(scale, usual, rel_tol=1e-6):
        writer.add_float32(f"{arch}.rope.scaling.attn_factor", scale / usual)


def llama3_factors(config: ModelConfig) -> torch.Tensor:
    """What the angle of each pair is divided by, (D/2,): the formula of rope_frequencies in the steps of
    llama.cpp's converter, which give the same bits."""
    scaling, pairs = config.rope_scaling, torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    factor, low, high = (scaling[key] for key in LLAMA3)
    wavelength = 2 * math.pi / (1.0 / (config.rope_theta ** (pairs / config.head_dim)))
    kept = (original / wavelength - low) / (high - low)
    factors = 1 / ((1 - kept) / factor + kept)
    factors[wavelength < original / high] = 1
    factors[wavelength > original / low] = factor
    return factors


# --- reading ------------------------------------------------------------------------------------------------


def read_model(path: Path) -> tuple[ModelConfig, dict[str, tuple], dict[str, Callable], dict]:
    """(config, {name: shape}, {name: function that reads its numbers}, generation_config) of a file.

    Prints one line on stderr where numbers are dequantized. Raises ModelError for other architectures, for
    adapters, and for a file that is cut off or contradicts itself.
    """
    fields, tensors = read_gguf(path)
    with files.explained(path):
        config = config_of(fields, tensors)
        say_what_is_dequantized(path, tensors)
        shapes, readers = {}, {}
        for name, tensor in tensors.items():
            if name != ROPE_FACTORS:
                shapes[our_name(name)] = tensor.shape
                readers[our_name(name)] = reader(tensor, heads_to_reorder(our_name(name), config), path)
        shapes, readers = unstack_experts(shapes, readers)
    bos, ends, pad = token_ids(fields)
    return config, shapes, readers, {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": pad}


def reader(tensor: StoredTensor, heads: int | None, path: Path) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with files.explained(path):
            return to_halves(tensor.numbers(), heads)
    return read


def read_adapter_file(path: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The matrices of an adapter file, {"NAME.lora.A.weight": ...}, with alpha / rank multiplied into B."""
    fields, tensors = read_gguf(path)
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise ModelError(f"{path} is no LoRA adapter but a GGUF file of another kind")
    if (arch := fields.get("general.architecture")) != architecture(config):
        raise ModelError(f"{path} is an adapter for {arch}, and the model is {architecture(config)}")
    alpha = number(fields, "adapter.lora.alpha", float)
    state = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        layer = our_name(base).removesuffix(".weight")
        if part not in ("lora_a", "lora_b") or layer == our_name(base):
            raise ModelError(f"{path}: {name[:100]} is no LoRA matrix")
        matrix = tensor.numbers()
        if part == "lora_b":
            heads = heads_to_reorder(layer, config)
            if heads and matrix.shape[0] % (2 * heads):
                raise ModelError(f"{path}: {name} has {matrix.shape[0]} rows, for {heads} heads")
            matrix = to_halves(matrix, heads) * (alpha / matrix.shape[1])
        state[f"{layer}.lora.{part[-1].upper()}.weight"] = matrix
    return state


def number(fields: dict, name: str, kind: type, default=None):
    """A field that holds a number: int or float. A list of equal numbers, one for each layer, counts as one.

    Numbers of 32 bits get the shortest decimal that means them: 1e-6 and not 9.999999974752427e-07.
    """
    value = fields.get(name, default)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        if kind is float:
            short = float(f"{value:.7g}")
            return short if torch.tensor(short).item() == torch.tensor(value).item() else float(value)
        if value == int(value):
            return int(value)
    raise ModelError(f"{name} is {'missing' if value is None else f'{str(value)[:50]}: not one number'}")


def config_of(fields: dict, tensors: dict) -> ModelConfig:
    """The ModelConfig of a file. Raises ModelError for what our model cannot compute."""
    arch = fields.get("general.architecture")
    if fields.get("general.type", "model") != "model":
        raise ModelError(f"this GGUF file is no model but of the kind {str(fields['general.type'])[:50]!r}")
    if arch not in ARCHITECTURES:
        raise ModelError(f"can't read architecture {str(arch)[:50]}, only {', '.join(ARCHITECTURES)}")
    for key, harmless in (("expert_shared_count", 0), ("expert_weights_scale", 1),
                          ("attention.clamp_kqv", 0), ("attention.causal", True),
                          ("attention.sliding_window_pattern", 1), ("attn_logit_softcapping", 0),
                          ("final_logit_softcapping", 0), ("residual_scale", 0), ("attention.scale", 0),
                          ("rope.scaling.yarn_beta_fast", 32), ("rope.scaling.yarn_beta_slow", 1),
                          ("logit_scale", 0), ("embedding_scale", 0)):
        if fields.get(f"{arch}.{key}", harmless) != harmless:
            raise ModelError(f"{arch}.{key} is {str(fields[f'{arch}.{key}'])[:50]}: not supported")

    def of(key: str, default=None) -> int:
        return number(fields, f"{arch}.{key}", int, default)

    heads, width = of("attention.head_count"), of("embedding_length")
    if heads < 1 or width < 1:
        raise ModelError(f"{heads} heads in a width of {width}")
    head_dim = of("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if of(key, head_dim) != head_dim:
            raise ModelError(f"{arch}.{key} is {of(key)}, not {head_dim} as the heads: not supported")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError("it has no token_embd.weight, the embedding")
    if of("vocab_size", embedding.shape[0]) != embedding.shape[0]:
        raise ModelError(f"{arch}.vocab_size is {of('vocab_size')}, and the embedding has "
                         f"{embedding.shape[0]} rows")
    window = of("attention.sliding_window", 0)
    experts, num_experts = {}, of("expert_count", 0)
    if num_experts and arch not in ("llama", "qwen3moe"):
        raise ModelError(f"{arch}.expert_count is {num_experts}: not supported")
    if num_experts:  # for llama.cpp norm_topk_prob is always true
        size = of("expert_feed_forward_length", of("feed_forward_length"))
        experts = {"num_experts": num_experts, "num_experts_per_tok": of("expert_used_count"),
                   "moe_intermediate_size": size, "norm_topk_prob": True}
    return ModelConfig(
        hidden_size=width, num_hidden_layers=of("block_count"), num_attention_heads=heads,
        num_key_value_heads=of("attention.head_count_kv", heads), head_dim=head_dim,
        intermediate_size=of("feed_forward_length"), vocab_size=embedding.shape[0],
        qk_norm=arch in ("qwen3", "qwen3moe"), attention_bias=arch == "qwen2",
        tie_word_embeddings="output.weight" not in tensors,
        rope_theta=number(fields, f"{arch}.rope.freq_base", float, 10000.0),
        rope_scaling=rope_scaling_of(fields, tensors, arch, head_dim),
        rms_norm_eps=number(fields, f"{arch}.attention.layer_norm_rms_epsilon", float),
        max_position_embeddings=of("context_length"), sliding_window=window or None, **experts)


def rope_scaling_of(fields: dict, tensors: dict, arch: str, head_dim: int) -> dict | None:
    """rope_scaling of a file; None where it has none. Raises ModelError for another kind of scaling."""
    prefix = f"{arch}.rope.scaling"
    factors = tensors.get(ROPE_FACTORS)
    if factors is not None:
        if factors.shape != (head_dim // 2,):
            raise ModelError(f"{ROPE_FACTORS} is {list(factors.shape)}, not [{head_dim // 2}]")
        scaling = {"rope_type": "llama3"}
        # Files of others hold only the result. They are made of Llama 3's models, which all have these.
        usual = {"factor": factors.numbers().max().item(), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        for key in LLAMA3:
            scaling[key] = number(fields, f"{prefix}.llama3.{key}", float, usual[key])
        scaling["original_max_position_embeddings"] = number(
            fields, f"{prefix}.llama3.original_context_length", int, 8192)
        check = ModelConfig(head_dim=head_dim, rope_scaling=scaling, rope_theta=number(
            fields, f"{arch}.rope.freq_base", float, 10000.0))
        if not torch.allclose(llama3_factors(check), factors.numbers(), rtol=1e-4):
            raise ModelError(f"{ROPE_FACTORS} is no scaling of llama3's kind with its usual settings")
        return scaling
    kind = fields.get(f"{prefix}.type", "linear")
    factor = number(fields, f"{prefix}.factor", float, fields.get(f"{arch}.rope.scale_linear") or 1.0)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ModelError(f"rope scaling of type {str(kind)[:50]} is not supported")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": number(
        fields, f"{prefix}.original_context_length", int)}
    extra = number(fields, f"{prefix}.attn_factor", float, 1.0)
    if extra != 1 and factor > 1:
        scaling["attention_factor"] = extra * (0.1 * math.log(factor) + 1)
    return scaling


def say_what_is_dequantized(path: Path, tensors: dict[str, StoredTensor]) -> None:
    quantized = [tensor for tensor in tensors.values() if tensor.kind not in PLAIN]
    if quantized and os.environ.get("RANK", "0") == "0":
        kinds = ", ".join(sorted({tensor.kind for tensor in quantized}))
        before, after = (sum(sizes) / 2**20 for sizes in zip(
            *((tensor.stored.nbytes, 4 * math.prod(tensor.shape)) for tensor in quantized), strict=True))
        print(f"{path}: {len(quantized)} of {len(tensors)} tensors are quantized ({kinds}) and become "
              f"float32: {before:,.0f} MiB in the file, {after:,.0f} MiB in memory", file=sys.stderr)
