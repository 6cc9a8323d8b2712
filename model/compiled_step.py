"""Decoding on a CPU with a step that is compiled for this machine. A reader may skip this file.

    model = compile_decoding(load_model("out/full_sft"))  # or quantize_int8(...) of it; then generate

model/one_token.cpp is the forward pass for one token in each row, in C++. It is compiled once (some seconds)
by the C++ compiler of the system, and kept among the user's cached files. The step reads a copy of the
weights, so a model takes twice the memory. Adapters are added in each step, and never merged into that copy.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import RunError, UsageError
from model.adapters import RowLoRA
from model.generate import KVCache
from model.int8 import Int8Linear
from model.one_token import count_writes
from model.transformer import CausalLM, RMSNorm

SOURCE = Path(__file__).with_name("one_token.cpp")
COMPILERS = ("c++", "g++", "clang++")

Pointer, Size = ctypes.c_void_p, ctypes.c_int64


class LinearInC(ctypes.Structure):
    _fields_ = [("weight", Pointer), ("scale", Pointer), ("bias", Pointer), ("in", Size), ("out", Size)]


class UpdateInC(ctypes.Structure):
    _fields_ = [*((name, Pointer) for name in ("a", "b", "places")),
                *((name, Size) for name in ("rank", "begin", "out")),
                ("factor", ctypes.c_float)]


class UpdatesInC(ctypes.Structure):
    _fields_ = [("first", ctypes.POINTER(UpdateInC)), ("count", Size)]


class LayerInC(ctypes.Structure):
    _fields_ = [*((name, LinearInC) for name in ("qkv", "o", "gate", "up", "down")),
                *((name, Pointer) for name in ("input_norm", "mlp_norm", "q_norm", "k_norm")),
                ("window", Size)]


class ModelInC(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(LayerInC)),
                *((name, Size) for name in ("num_layers", "width", "heads", "kv_heads", "head_dim",
                                            "intermediate_size")),
                ("eps", ctypes.c_float), ("embedding", Pointer), ("norm", Pointer), ("head", LinearInC)]


class CacheInC(ctypes.Structure):
    _fields_ = [*((name, Pointer) for name in ("keys", "values")),
                *((name, Size) for name in ("layer_stride", "row_stride", "head_stride")),
                *((name, Pointer) for name in ("cos", "sin")), ("length", Size), ("start", Pointer)]


class CompiledStep:
    """`CausalLM.forward` for one new token in each row: float32 or int8 weights, on a CPU."""

    def __init__(self, model: CausalLM):
        self.model = model
        self.library = load_library()
        self.packed = None  # the state of the weights when they were copied, see `state`
        self.updates = None  # of the adapters in use, see `find_updates`
        self.lock = threading.Lock()  # two threads may begin a text at the same time

    def __reduce__(self):
        """Copied or pickled, it is a new step, since the addresses that C++ knows mean nothing there."""
        return CompiledStep, (self.model,)

    def weights(self) -> list[nn.Parameter]:
        """The parameters of the model, without those of adapters."""
        return [weight for name, weight in self.model.named_parameters() if "lora" not in name.split(".")]

    def state(self) -> list[tuple[int, int]]:
        """Where each weight lies, and its `count_writes`: a change of the weights changes one of them."""
        return [(weight.data_ptr(), count_writes(weight)) for weight in self.weights()]

    def get_ready(self, batch_size: int) -> bool:
        """Copies weights that have changed, and finds the adapters in use. Called before each text. False if
        the ordinary forward pass must be used, because the model has another type or device now."""
        if not is_float32_on_cpu(self.model):
            return False
        with self.lock:
            if (state := self.state()) != self.packed:
                self.pack()
                self.packed = state
            self.updates = self.find_updates()
        return True

    @torch.no_grad()
    def pack(self) -> None:
        """Copies the weights into the order in which the step reads them."""
        config, decoder = self.model.config, self.model.model
        # Tensors that C++ knows the addresses of, and the weights themselves: as long as these are kept, no
        # other weights can come to their addresses.
        self.kept = [weight.detach() for weight in self.weights()]
        *linears, head = [self.linear(*layers) for layers in linear_groups(self.model)]
        layers = []
        for number, (block, window) in enumerate(zip(decoder.layers, config.windows, strict=True)):
            layers.append(LayerInC(
                *linears[5 * number:5 * number + 5], self.norm(block.input_layernorm),
                self.norm(block.post_attention_layernorm), self.norm(block.self_attn.q_norm),
                self.norm(block.self_attn.k_norm), window or 0))
        self.in_c = ModelInC(
            (LayerInC * len(layers))(*layers), len(layers), config.hidden_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, config.intermediate_size, config.rms_norm_eps,
            self.address(decoder.embed_tokens.weight), self.norm(decoder.norm), head), self.kept

    @torch.no_grad()
    def find_updates(self) -> tuple | None:
        """(what the adapters in use add, as C++ reads it; how many rows they are for, or None for any number;
        the tensors that C++ knows the addresses of). None if no adapter is in use."""
        found, kept, rows = [], [], None
        for layers in linear_groups(self.model):
            updates, begin = [], 0
            for layer in layers:
                lora = getattr(layer, "lora", None)
                if lora is not None and lora.active:
                    if isinstance(lora, RowLoRA):
                        tensors, factor, rows = [lora.a, lora.b, lora.places], 1.0, len(lora.places)
                    else:
                        b, a = lora.factors()
                        tensors, factor = [a, b.mT], lora.scaling
                    # detach: a Parameter whose type changes gets other memory, and would free this
                    tensors = [tensor.detach().contiguous() for tensor in tensors]
                    kept += tensors
                    a, b, places = [*(tensor.data_ptr() for tensor in tensors), None][:3]
                    updates.append(UpdateInC(a, b, places, tensors[0].size(-2), begin, layer.out_features,
                                             factor))
                begin += layer.out_features
            found.append(UpdatesInC((UpdateInC * len(updates))(*updates), len(updates)))
        return ((UpdatesInC * len(found))(*found), rows, kept) if kept else None

    def address(self, tensor: torch.Tensor) -> int:
        """Of these numbers, in float32 or int8. Frozen weights may be in bfloat16 beside norms in float32."""
        tensor = tensor if tensor.dtype == torch.int8 else tensor.float()
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def norm(self, module: RMSNorm | nn.Identity) -> int | None:
        return self.address(module.weight) if isinstance(module, RMSNorm) else None

    def linear(self, *layers: nn.Linear | Int8Linear) -> LinearInC:
        """Several layers with the same input as one: their outputs stand side by side."""
        quantized = isinstance(layers[0], Int8Linear)
        weight = torch.cat([layer.codes if quantized else layer.weight for layer in layers])  # (out, in)
        out, width = weight.shape
        size, group = self.library.block_size(), self.library.group_size() if quantized else 1
        more = -out % size  # outputs to fill up the last block
        blocks = F.pad(weight, (0, -width % group, 0, more)).view(-(-out // size), size, -1, group)
        blocks = blocks.transpose(1, 2)  # (blocks, in / group, size, group)
        if group > 1:
            blocks = blocks.bitwise_xor(-128)  # the byte of code + 128

        def fill(parts):  # (out,), padded likewise
            return self.address(F.pad(torch.cat(parts), (0, more)))

        scale = fill([layer.scale for layer in layers]) if quantized else None
        bias = None if layers[0].bias is None else fill([layer.bias for layer in layers])
        return LinearInC(self.address(blocks), scale, bias, width, out)

    @torch.inference_mode()
    def __call__(self, ids, cache: KVCache):
        """The logits (B, V) after ids (B,), which are appended to the cache."""
        # These names keep the tensors, since another thread may begin a text with other weights meanwhile.
        model_in_c, _weights = self.in_c
        updates, rows, _adapters = self.updates or (None, None, None)
        if rows not in (None, len(ids)) or cache.k.size(1) != len(ids):  # the forward pass says what is wrong
            return self.model(ids[:, None], cache=cache).logits[:, 0]
        if cache.length == cache.max_length:
            raise RunError(f"the KV cache holds {cache.max_length} tokens, and all are in use")
        ids = ids.long().contiguous()
        start = None if cache.start is None else cache.start.long().contiguous()
        in_c = CacheInC(cache.k.data_ptr(), cache.v.data_ptr(), *cache.k.stride()[:3],
                        *(table.data_ptr() for table in cache.rope), cache.length,
                        None if start is None else start.data_ptr())
        logits = torch.empty(len(ids), self.model.config.vocab_size, dtype=torch.float32, device="cpu")
        if self.library.one_token(
                ctypes.byref(model_in_c), ctypes.byref(in_c), updates, Pointer(ids.data_ptr()),
                Size(len(ids)), Pointer(logits.data_ptr()), Size(torch.get_num_threads())):
            raise IndexError(f"ids outside of the vocabulary: {ids.tolist()}")
        cache.length += 1
        return logits


def compile_decoding(model: CausalLM) -> CausalLM:
    """Instead of prepare_to_decode: lets the model decode with the compiled step, also while it trains.

    Raises UsageError where the step does not fit the model, and where no C++ compiler is found or it fails.
    """
    fits = not model.config.num_experts and is_float32_on_cpu(model) and any(
        all(isinstance(layer, kind) for layers in linear_groups(model) for layer in layers)
        for kind in (nn.Linear, Int8Linear))
    if not fits:
        raise UsageError("--compile needs a model without experts, on a CPU, in float32 or --quantize int8")
    model.one_token = CompiledStep(model)
    return model


def linear_groups(model: CausalLM) -> list[tuple]:
    """The linear layers in the order of C++: 5 for each block, where q, k and v are one, and the head."""
    groups = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        groups += [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
                   (mlp.gate_proj,), (mlp.up_proj,), (mlp.down_proj,)]
    return [*groups, (model.lm_head,)]


def is_float32_on_cpu(model: CausalLM) -> bool:
    """Looks at one norm: the other weights lie on the same device, in this type or in fewer bits."""
    weight = model.model.norm.weight
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def load_library() -> ctypes.CDLL:
    """The compiled step: from the user's cached files, or compiled now."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise UsageError("--compile needs a C++ compiler, and none is here (on Debian, Ubuntu: apt install "
                         "g++; on macOS: xcode-select --install)")
    native = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"
    command = [compiler, "-std=c++17", "-O3", native, "-fno-math-errno", "-fno-trapping-math", "-shared",
               "-fPIC"]
    if sys.platform.startswith("linux"):
        command.append("-fopenmp")  # elsewhere the compilers have no OpenMP of their own: one thread computes
    # What the compiler knows of itself and of this CPU: another machine with the same home compiles anew.
    about = run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    source = SOURCE.read_text(encoding="utf-8")
    name = "one_token_" + checksum("\n".join([*command, about, source]).encode())
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(folder).expanduser() / "seedling"
        folder.mkdir(parents=True, exist_ok=True)
        # The end of a file's name is the checksum of what the file holds: a damaged one is not loaded.
        library = next((path for path in folder.glob(f"{name}_*.so")
                        if path.stem == f"{name}_{checksum(path.read_bytes())}"), None)
        if library is None:
            with tempfile.TemporaryDirectory(dir=folder) as unfinished:
                made = Path(unfinished) / "one_token.so"
                run([*command, "-o", str(made), str(SOURCE)])
                library = made.replace(folder / f"{name}_{checksum(made.read_bytes())}.so")
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where ~ is
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--compile: {folder} can't hold a library ({reason}): set XDG_CACHE_HOME to "
                         "another folder") from error


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def run(command: list[str]) -> str:
    """What the compiler prints. Raises UsageError with the first error that it finds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UsageError(f"--compile: {command[0]} can't be started: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        complaint = next((line for line in lines if "error" in line.lower()), lines[0])  # not a warning
        raise UsageError(f"--compile: {command[0]} could not compile {SOURCE.name}: {complaint}")
    return done.stdout
