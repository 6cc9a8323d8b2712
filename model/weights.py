"""Models on disk: Hugging Face directories, MiniMind's .pth files, GGUF. A reader may skip this file.

    model = load_model("out/full_sft")         # or a Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE or Mixtral one;
                                               # or "x.pth", or "x.gguf"
    save_model(model, "out/mine", tokenizer)   # AutoModelForCausalLM.from_pretrained("out/mine") opens it

Reading is strict: every tensor must be there, have the shape that the config says, and belong somewhere. All
of this is checked before memory is taken. No code from a file is run (see common/files.py), and nothing comes
from the network: a path that does not exist is an error, and never the name of a model on some hub.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from common import files
from common.errors import ModelError
from common.fast_start import give_memory, without_initial_values
from model.config import ModelConfig
from model.config_file import config_from_dict, config_to_dict
from model.expert_files import mixtral_names, our_names
from model.gguf import read_model as read_gguf_model
from model.gguf_file import is_gguf
from model.int8 import Int8Linear
from model.moe import ROUTER
from model.quantize import from_bitsandbytes, quantization_config, to_bitsandbytes
from model.rope_scaling import scale
from model.tokenizer_files import FILES as TOKENIZER_FILES
from model.tokenizer_files import load_tokenizer as load_tokenizer  # so that others find all three here
from model.tokenizer_files import refuse_adapter, write_tokenizer
from model.transformer import CausalLM

MINIMIND_HEADS = 8  # query heads of MiniMind's models without q_norm
MINIMIND_ROTARY_TABLES = ("freqs_cos", "freqs_sin", "freqs_cis")  # how the names of these tensors end
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION, TOKEN_IDS = "generation_config.json", ("bos_token_id", "eos_token_id", "pad_token_id")
# How transformers and vLLM choose words unless told otherwise: as eval_model.py does. top_k 0 means all.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}


# --- reading --------------------------------------------------------------------------------------------


def load_model(path, device="cpu", dtype: torch.dtype | None = None,
               rope_scaling: str | None = None) -> CausalLM:
    """Reads a Hugging Face directory, a .pth file of MiniMind or a GGUF file into a CausalLM, in eval mode.

    dtype None is float32, whatever the file holds. Training needs float32, because small updates are lost in
    bfloat16. rope_scaling: as in "yarn:4", for longer texts (model/rope_scaling.py). Raises ModelError, one
    line, for tensors that are missing, unknown or of the wrong shape, for files that are cut off, and for
    other architectures.
    """
    path = Path(path)
    readers = {}  # the name of each tensor that is read late -> the function that reads it
    generation = None
    with files.explained(path):
        if path.is_dir():
            refuse_adapter(path)
            raw = files.read_json(path / "config.json")
            with files.explained(path / "config.json"):
                config = config_from_dict(raw)
            generation = _generation_config(raw, files.read_json_if_there(path / GENERATION))
            tensors = {}
            for file in _weight_files(path):
                of_file, _ = files.read_safetensors(file)
                tensors |= files.with_plain_names(of_file)
                readers |= {files.without_wrappers(name): partial(_read_again, file, name)
                            for name in of_file}
            if config.num_experts:
                tensors, readers = our_names(tensors, readers, config.num_experts)
        elif is_gguf(path):
            config, shapes, readers, generation = read_gguf_model(path)
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        elif path.is_file():
            state = files.read_state_dict(path)
            tensors = {name: state[name] for name in state if not name.endswith(MINIMIND_ROTARY_TABLES)}
            config = _infer_config(tensors)
        else:
            raise ModelError(f"no model at {path}: neither a folder with config.json, nor .pth, nor .gguf")
        config = scale(config, rope_scaling, path)
        experts = config.num_experts * (config.num_hidden_layers - len(config.mlp_only_layers))
        if config.num_hidden_layers + experts > len(tensors):
            of_experts = f" with {experts} experts" if experts else ""
            raise ModelError(f"{config.num_hidden_layers} layers{of_experts} in the config, but "
                             f"{len(tensors)} tensors")
        model = _without_memory(config).to(dtype or torch.float32)  # so that a wrong file costs no memory
        # Layers that the file holds in 4 bits become NF4Linear before the names and shapes are compared.
        tensors = _check(from_bitsandbytes(model, tensors), model)
    model.generation_config = generation
    return _fill(model, tensors, readers, device, path)


def _read_again(file: Path, name: str) -> torch.Tensor:
    """A tensor of a safetensors file. The file is mapped again for each tensor, and the mapping ends with the
    tensor. So memory never holds more than the model and one tensor."""
    return files.read_safetensors(file, name)[0][name]


def _without_memory(config: ModelConfig) -> CausalLM:
    """The model with shapes alone, on the meta device."""
    with torch.device("meta"), without_initial_values():
        return CausalLM(config)


@torch.no_grad()
def _fill(model: CausalLM, tensors: dict, readers: dict[str, Callable], device, path: Path) -> CausalLM:
    """Gives memory and the numbers of the tensors to a model on the meta device."""
    try:
        give_memory(model, device)
    except (RuntimeError, MemoryError):
        size = sum(parameter.nbytes for parameter in model.parameters())
        raise ModelError(f"{path}: no memory on {device} for {size:,} bytes of weights") from None
    model.tie_weights()  # embedding and head have memory of their own now
    for name, parameter in model.named_parameters():
        tensor = readers[name]() if name in readers else tensors[name]
        files.check_finite({name: tensor}, f"load {path}")
        parameter.copy_(tensor)
    return model.eval()


def _check(tensors: dict, model: CausalLM) -> dict:
    """The tensors that the model needs. Raises ModelError where one is missing, unknown or misshapen."""
    wanted = model.state_dict()
    # Old files hold rotary tables. Ours are computed from the config.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        embedding = tensors["model.embed_tokens.weight"]
        head = tensors.setdefault("lm_head.weight", embedding)
        # torch.equal raises for unequal types.
        if head is not embedding and not torch.equal(head.float(), embedding.float()):
            raise ModelError("lm_head.weight is not the embedding, yet tie_word_embeddings is true")
    for names, problem in ((wanted.keys() - tensors.keys(), "has no"),
                           (tensors.keys() - wanted.keys(), "has an unknown")):
        if names:
            more = f" and {len(names) - 1} like it" if len(names) > 1 else ""
            raise ModelError(f"it {problem} {min(names)}{more}: the weights don't fit the config")
    for name, blank in wanted.items():
        tensor = tensors[name]
        if tensor.shape != blank.shape:
            raise ModelError(f"{name} is {list(tensor.shape)}, the config asks for {list(blank.shape)}")
        can_be_cast = tensor.is_floating_point() and blank.is_floating_point() and tensor.itemsize > 1
        if tensor.dtype != blank.dtype and not can_be_cast:
            raise ModelError(f"{name} holds {tensor.dtype}; of quantized weights only NF4 is read")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(f"no {WEIGHTS} in {folder} (pickled .bin weights are not read: they may run code)")
    weight_map = files.read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{INDEX} has no weight_map")
    names = sorted(set(weight_map.values()))
    # A stranger's index must not reach beyond its folder.
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # the cache of a hub, in which files are links to ../../blobs
        allowed.append(home.parent.parent / "blobs")
    for name in names:
        is_plain = name not in ("", ".", "..") and not re.search(r"[/\\:\0]", name)
        if not is_plain or (folder / name).resolve().parent not in allowed:
            raise ModelError(f"{INDEX} names {name[:100]!r}, which is outside of the folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, though {INDEX} names it")
    return [folder / name for name in names]


def _infer_config(tensors: dict) -> ModelConfig:
    """The ModelConfig that fits a state dict of MiniMind. The shapes of the tensors say all but the heads.

    MiniMind's newer models have a q_norm, which is as long as a head, and an eps of 1e-6. The older ones have
    no q_norm; they have 8 query heads, and an eps of 1e-5. The rows of k_proj give the key/value heads:
        26m: q_proj 512 rows / 8 heads = head_dim 64; k_proj 128 rows / 64 = 2 key/value heads
    """
    first = "model.layers.0."
    try:
        embedding = tensors["model.embed_tokens.weight"]
        vocab_size, hidden_size = embedding.shape
        q_rows = tensors[f"{first}self_attn.q_proj.weight"].shape[0]
        k_rows = tensors[f"{first}self_attn.k_proj.weight"].shape[0]
        router = tensors.get(f"{first}{ROUTER}")  # in a model with experts
        of_expert = "" if router is None else "experts.0."
        intermediate_size = tensors[f"{first}mlp.{of_expert}gate_proj.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ModelError(f"not a MiniMind state dict: {error} is missing") from None
    q_norm = tensors.get(f"{first}self_attn.q_norm.weight")
    head_dim = q_rows // MINIMIND_HEADS if q_norm is None else q_norm.shape[0]
    uneven = q_norm is None and q_rows % MINIMIND_HEADS
    if uneven or head_dim == 0 or q_rows % head_dim or k_rows % head_dim:
        raise ModelError(f"can't tell the heads from {q_rows} query and {k_rows} key rows: use a folder")
    matches = [re.match(r"model\.layers\.(\d{1,9})\.", name) for name in tensors]
    layers = [int(match[1]) for match in matches if match]
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=max(layers) + 1, num_attention_heads=q_rows // head_dim,
        num_key_value_heads=k_rows // head_dim, head_dim=head_dim,
        qk_norm=q_norm is not None, attention_bias=f"{first}self_attn.q_proj.bias" in tensors,
        tie_word_embeddings=torch.equal(tensors.get("lm_head.weight", embedding).float(), embedding.float()),
        rope_theta=1e6, rms_norm_eps=1e-5 if q_norm is None else 1e-6,
        # How many experts a token uses cannot be told. MiniMind's models use one, with normalised gates.
        num_experts=0 if router is None else router.shape[0], norm_topk_prob=router is not None)


# --- writing --------------------------------------------------------------------------------------------


def save_model(model: CausalLM, path, tokenizer=None, training: dict | None = None) -> None:
    """Writes a Hugging Face directory: weights, configs, tokenizer, and `training` as training.json.

    4-bit layers are written as transformers with bitsandbytes writes them, and open there. A process that is
    killed here leaves the old model, the new one, or a folder without config.json, and never the weights of
    one model with the config of another (see common/files.py). Other files in the folder (metrics.jsonl,
    checkpoints/) stay. Raises ModelError if there are adapters, if the folder holds one, or if a weight is
    NaN or infinite.
    """
    path = Path(path).resolve()
    if path.is_file():
        raise ModelError(f"{path} is a file; a model is saved as a folder")
    files.keep_apart(path, "adapter_config.json", "an adapter")
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ModelError("8-bit weights are not saved: save the model first, and then call quantize_int8")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    files.check_finite(tensors, f"save {path}")
    tensors = to_bitsandbytes(model, tensors)
    if model.config.num_experts and quantization_config(model):
        raise ModelError("experts in 4 bits are not saved, since transformers can't read them: save the "
                         "model as it is, and quantize it after loading")
    names = {name for name in tensors if ".weight." not in name}  # without the constants of 4-bit weights
    surplus = names ^ _without_memory(model.config).state_dict().keys()
    if surplus:
        raise ModelError(f"can't save a model because of {min(surplus)}: merge adapters, or save them alone")
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the config says that this is the embedding
    if model.config.num_experts and not model.config.qk_norm:
        tensors = mixtral_names(tensors)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")

    generation = _generation_to_save(model, tokenizer)
    tokens = {name: generation[name] for name in TOKEN_IDS}
    config = config_to_dict(model.config) | tokens | {"dtype": dtype, "torch_dtype": dtype}
    if quantized := quantization_config(model):
        config["quantization_config"] = quantized
    documents = {GENERATION: generation, "config.json": config, "training.json": training}
    with files.writing(path, last=("config.json", "training.json")) as temporary:
        temporary.mkdir()
        safetensors.torch.save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            write_tokenizer(tokenizer, temporary)
        for name, document in documents.items():
            if document is not None:
                (temporary / name).write_bytes(files.json_text(document).encode("utf-8"))
        surplus = {INDEX} if tokenizer is None else {INDEX, *TOKENIZER_FILES}
        surplus -= {file.name for file in temporary.iterdir()}
    for former in (*(path / name for name in surplus), *path.glob("model-*-of-*.safetensors")):
        files.remove(former)  # of another model that was here before


# --- what ends an answer, and how words are chosen: generation_config.json --------------------------------


def end_tokens(model: CausalLM, tokenizer) -> list:
    """The tokens that end an answer: those that the model's files list, unchecked, and those known by name.

    Both the end of a turn and the end of a text end an answer.
    """
    known = tokenizer.get_vocab()
    by_name = [tokenizer.eos_token_id, known.get("<|im_end|>"), known.get("<|endoftext|>")]
    return _ends(model.generation_config or {}, {"eos_token_id": by_name})


def _ends(*settings: dict) -> list:
    """All tokens under eos_token_id, which holds one, a list of some, or None; each token once."""
    values = [raw.get("eos_token_id") for raw in settings]
    ends = [end for value in values for end in (value if isinstance(value, list) else [value])]
    return [end for place, end in enumerate(ends) if end is not None and end not in ends[:place]]


def _generation_config(config: dict, generation: dict) -> dict:
    """The settings of generation_config.json, and the ids that stand only in config.json.

    Either file may list tokens that end an answer (Llama 3: two or three of them), and both lists count.
    """
    ids = {name: config.get(name) for name in TOKEN_IDS}
    return ids | generation | {"eos_token_id": _ends(generation, config)}


def _generation_to_save(model: CausalLM, tokenizer) -> dict:
    """The generation_config.json of a model. A model that was read hands on what it came with."""
    settings = dict.fromkeys(TOKEN_IDS)
    settings |= SAMPLING if model.generation_config is None else model.generation_config
    if tokenizer is not None:
        settings["eos_token_id"] = end_tokens(model, tokenizer)
        for name in ("bos_token_id", "pad_token_id"):
            settings[name] = getattr(tokenizer, name) if settings[name] is None else settings[name]
    ends = _ends(settings)
    if len(ends) < 2:
        settings["eos_token_id"] = ends[0] if ends else None
    return settings
