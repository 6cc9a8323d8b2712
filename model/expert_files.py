"""The names that others have for the tensors of experts, on disk. A reader may skip this file.

    Qwen3-MoE, and ours    mlp.gate.weight               mlp.experts.3.gate_proj.weight, up_proj, down_proj
    Mixtral                block_sparse_moe.gate.weight  block_sparse_moe.experts.3.w1.weight, w3, w2
    transformers 5, fused  mlp.gate.weight               mlp.experts.gate_up_proj (E, 2 I, C)
                                                         mlp.experts.down_proj (E, C, I)

transformers 5 holds fused tensors in memory, and writes them if save_original_format is False. PEFT's
adapters are made for these: see `fuse_adapter` and `split_adapter`.
"""

import functools
import math
import re
from collections.abc import Callable

import torch

from common.errors import ModelError

MIXTRAL = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
FUSED = re.compile(r"(.{1,200}\.mlp\.experts)\.(gate_up_proj|down_proj)")


# --- weights ------------------------------------------------------------------------------------------------


def our_names(tensors: dict, readers: dict[str, Callable],
              num_experts: int) -> tuple[dict, dict[str, Callable]]:
    """The tensors of a file, and the functions that read them, under the names of Qwen3-MoE on disk.

    Other names stay. Fused tensors become views of one expert each.
    """
    new_tensors, new_readers = {}, {}
    for name, tensor in tensors.items():
        parts = {_renamed(name, MIXTRAL): lambda whole: whole}
        if (found := FUSED.fullmatch(name)) and tensor.ndim == 3 and len(tensor) == num_experts:
            parts = _parts_of_fused(found[1], found[2], *tensor.shape[:2])
        for part, cut in parts.items():
            new_tensors[part] = cut(tensor)
            if name in readers:
                new_readers[part] = lambda cut=cut, read=readers[name]: cut(read())
    return new_tensors, new_readers


def mixtral_names(tensors: dict) -> dict:
    """Tensors under our names -> the same under Mixtral's."""
    theirs = {ours: theirs for theirs, ours in MIXTRAL.items()}
    return {_renamed(name, theirs): tensor for name, tensor in tensors.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    """A name with each of its parts renamed. Names without experts or a router of Mixtral stay."""
    if ".experts." not in name and not re.search(r"\.(mlp|block_sparse_moe)\.gate\.", name):
        return name
    return ".".join(names.get(part, part) for part in name.split("."))


def _parts_of_fused(experts: str, kind: str, num_experts: int, rows: int) -> dict[str, Callable]:
    """{name of an expert's matrix: the function that cuts it out of the fused tensor}"""
    cuts = {"down_proj": slice(None)}
    if kind == "gate_up_proj":
        cuts = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, None)}
    return {f"{experts}.{number}.{matrix}.weight": lambda whole, number=number, cut=cut: whole[number, cut]
            for number in range(num_experts) for matrix, cut in cuts.items()}


# --- GGUF: one tensor for each matrix of all experts --------------------------------------------------------


def stack_experts(tensors: dict) -> dict:
    """mlp.experts.0.up_proj.weight (out, in), mlp.experts.1... -> mlp.experts.up_proj.weight (E, out, in)."""
    groups = {}
    for name, tensor in tensors.items():
        groups.setdefault(re.sub(r"\.mlp\.experts\.\d+\.", ".mlp.experts.", name), []).append(tensor)
    return {name: torch.stack(group) if ".mlp.experts." in name else group[0]
            for name, group in groups.items()}


def unstack_experts(shapes: dict[str, tuple], readers: dict[str, Callable]) -> tuple[dict, dict]:
    """The shapes of tensors, and the functions that read them, in a file with stacked experts -> the same for
    each expert.

    The experts of a layer are read one after the other, so the layer's last three tensors are kept.
    """
    read = functools.lru_cache(maxsize=3)(lambda name: readers[name]())
    new_shapes, new_readers = {}, {}
    for name, shape in shapes.items():
        parts = {name: readers[name]}
        if ".mlp.experts." in name and len(shape) == 3:
            shape = shape[1:]
            parts = {name.replace(".experts.", f".experts.{number}."):
                     lambda name=name, number=number: read(name)[number] for number in range(shapes[name][0])}
        new_shapes |= dict.fromkeys(parts, shape)
        new_readers |= parts
    return new_shapes, new_readers


# --- adapters -----------------------------------------------------------------------------------------------
#
# PEFT has one LoRA for a whole fused tensor. Its A holds the A of all experts, one below the other, and its B
# holds the columns of all experts. gate_proj and up_proj share this LoRA. Each of them has half of its rank,
# and the other half of its B is zero:
#
#     A of an expert = [A_gate]      B of an expert = [B_gate    0  ]      B A = [B_gate A_gate]
#                      [ A_up ]                       [  0     B_up ]            [  B_up A_up  ]


class FusedLoRA:
    """What model/lora_files.py stores of the LoRA of one fused tensor; rank and alpha are those of an expert.

    A (E, rank, in), B (E, out, rank)
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scaling: float, like):
        """like: a LoRA of an expert, for the settings that all of them share."""
        self.a, self.b = a, b
        self.num_experts, self.rank, _ = a.shape
        self.rslora, self.dropout = like.rslora, like.dropout
        self.alpha = scaling * (math.sqrt(self.rank) if like.rslora else self.rank)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B (out, rank E) and A (E rank, in), in PEFT's order: B has the experts innermost, A outermost."""
        return self.b.permute(1, 2, 0).flatten(1), self.a.flatten(0, 1)


def fuse_adapter(loras: dict, num_experts: int) -> dict:
    """{layer name: LoRA} -> the same with a FusedLoRA, by name, in the place of the LoRA of all experts.

    An expert without a LoRA gets one of zeros. Where ranks differ, rows and columns of zeros fill them up.
    """
    fused, groups = {}, {}
    for name, lora in loras.items():
        found = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)", name)
        if found is None:
            fused[name] = lora
        else:
            kind = "down_proj" if found[3] == "down_proj" else "gate_up_proj"
            groups.setdefault(f"{found[1]}.{kind}", {})[found[3], int(found[2])] = lora
    for name, group in groups.items():
        first, factors = next(iter(group.values())), {key: lora.factors() for key, lora in group.items()}
        matrices = ("down_proj",) if name.endswith("down_proj") else ("gate_proj", "up_proj")
        rank = max(len(a) for _, a in factors.values())
        b, a = factors[next(iter(group))]
        all_a = a.new_zeros(num_experts, len(matrices), rank, a.size(1))
        all_b = a.new_zeros(num_experts, len(matrices), len(b), len(matrices), rank)
        for (matrix, expert), (b, a) in factors.items():
            place = matrices.index(matrix)
            all_a[expert, place, :len(a)] = a
            all_b[expert, place, :, place, :len(a)] = b * (group[matrix, expert].scaling / first.scaling)
        fused[name] = FusedLoRA(all_a.flatten(1, 2), all_b.flatten(3, 4).flatten(1, 2), first.scaling, first)
    return fused


def peft_names(fused: dict) -> dict[str, str]:
    """{name of a layer or of a fused tensor: the name under which PEFT stores its LoRA}.

    PEFT puts a wrapper around the module `experts` for each fused tensor. With two of them the wrapper of
    gate_up_proj is the inner one, the base_layer of the other.
    """
    names = {}
    for name in fused:
        experts, _, kind = name.rpartition(".")
        if FUSED.fullmatch(name) is None:
            names[name] = name
        elif kind == "gate_up_proj" and f"{experts}.down_proj" in fused:
            names[name] = f"{experts}.base_layer"
        else:
            names[name] = experts
    return names


def split_adapter(name: str, a: torch.Tensor, b: torch.Tensor, num_experts: int,
                  expert_size: int) -> tuple[str, dict[str, dict]]:
    """-> (name of the fused tensor, {layer name: {"A": (rank, in), "B": (out, rank)}}): fuse_adapter undone.

    name: the name under which PEFT stored it. Its shape tells which tensor it is for. Experts and matrices
    without an update are left out. Raises ModelError where the shapes do not fit.
    """
    experts = name.removesuffix(".base_layer")
    kind = "gate_up_proj" if len(b) == 2 * expert_size else "down_proj"
    rank = len(a) // num_experts
    if len(a) != rank * num_experts or b.size(1) != len(a) or not rank:
        raise ModelError(f"{name}: lora A {tuple(a.shape)} and B {tuple(b.shape)} don't fit {num_experts} "
                         "experts")
    a, b = a.view(num_experts, rank, -1), b.view(len(b), rank, num_experts).permute(2, 0, 1)
    parts = {}
    for expert in range(num_experts):
        for matrix, rows in (("down_proj", slice(None)),) if kind == "down_proj" else (
                ("gate_proj", slice(0, expert_size)), ("up_proj", slice(expert_size, None))):
            parts[f"{experts}.{expert}.{matrix}"] = {"A": a[expert], "B": b[expert, rows]}
    half = rank // 2
    if kind == "gate_up_proj" and rank % 2 == 0 and not (
            b[:, :expert_size, half:].any() or b[:, expert_size:, :half].any()):  # then each has its half
        for layer, part in parts.items():
            own = slice(half) if layer.endswith("gate_proj") else slice(half, None)
            parts[layer] = {"A": part["A"][own], "B": part["B"][:, own]}
    parts = {layer: {key: matrix.contiguous() for key, matrix in part.items()}
             for layer, part in parts.items() if part["A"].any()}
    return f"{experts}.{kind}", parts
