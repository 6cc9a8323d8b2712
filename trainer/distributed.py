"""Where this process stands among all that train together: device, rank, the few collectives the loop needs.

`torchrun` starts one process a device and tells each its place through environment variables; without it
there is one process, and every function here does nothing but return.
"""

import ctypes
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.args import UsageError

TIMEOUT, PATIENCE = timedelta(minutes=10), timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world_size`, training on `device`.

    `patient` is the process group for waiting on what rank 0 does alone (caches, checkpoints), which may take
    hours. All other collectives end with an error after TIMEOUT: a host that vanished without closing its
    connections would otherwise never be missed.
    """

    rank: int
    world_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def main_first(self):
        """Rank 0 runs the block first (it builds caches on disk), the others once rank 0 is through.

        Where the block raises on rank 0 the others end silently: one complaint is enough.
        """
        if not self.is_main and self.any(False, self.patient):
            raise SystemExit(2)
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.is_main:
                self.any(failed, self.patient)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(self.patient)

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Each value summed over all ranks, in float64."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in values])
        if self.world_size > 1:
            dist.all_reduce(total)  # on the CPU, through gloo
        return total.tolist()

    def max(self, value: float, group: dist.ProcessGroup | None = None) -> float:
        """The largest of all ranks."""
        largest = torch.tensor(value, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        return largest.item()

    def any(self, flag: bool, group: dist.ProcessGroup | None = None) -> bool:
        """True on every rank if it is true on one."""
        return self.max(float(flag), group) > 0

    def same(self, value: float) -> bool:
        """Whether all ranks have the same value."""
        return self.max(value) == -self.max(-value)


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: each step frees and asks for the same large tensors, and the kernel would
    zero every page of them anew. About a twentieth of the time of a small model's step on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # not in musl
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: from what size on memory is mapped apart
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what may lie free at the top


def end_with_torchrun() -> None:
    """Has Linux send SIGTERM to this process when torchrun is killed, which can't do it then: training on,
    it would be in the way of the run that is started to go on with it."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises UsageError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch sees no CUDA GPU here; use --device cpu, or auto")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UsageError(f"--device cuda:{index}: there are {count} GPUs, counted from 0")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch sees no Apple GPU here; use --device cpu, or auto")
    if device.type not in ("cpu", "mps"):
        raise UsageError(f"--device {name}: use auto, cpu, cuda, cuda:N or mps")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass. `auto` picks what the hardware multiplies fast: bfloat16 where it is
    native, float16 on older CUDA GPUs, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products compute in dtype; with float32 it does nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def join_ranks(device_flag: str) -> Ranks:
    """Joins the process group that torchrun announces, if any: gloo for CPU tensors, NCCL for CUDA's."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ":" in device_flag and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UsageError(f"--device {device_flag}: torchrun's processes can't share a GPU; use --device cuda "
                         "(and CUDA_VISIBLE_DEVICES to choose among GPUs)")
    device = choose_device(device_flag, int(os.environ.get("LOCAL_RANK", 0)))
    keep_freed_memory()
    end_with_torchrun()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # torchrun on one host may give --max-restarts the store of the first start, where the addresses
            # of dead processes lie. (Several hosts count their restarts apart, and get a store each time.)
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world_size)
        return Ranks(rank, world_size, device, dist.new_group(backend="gloo", timeout=PATIENCE))
    return Ranks(rank, world_size, device)


def parallelise(model: nn.Module, kind: str, dtype: torch.dtype, ranks: Ranks) -> nn.Module:
    """The model on this rank's device, as all ranks train it together; calling it is the forward pass.

    ddp   each rank holds all of it, and gradients are averaged (Li et al. 2020, arXiv:2006.15704)
    fsdp  each rank holds a slice of each weight, of its gradient and of the optimizer's state, all of which
          become DTensors, in place. A block is put together when it is about to compute, and let go after
          (ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054; FSDP: Zhao et al. 2023, arXiv:2304.11277).
    """
    if ranks.world_size == 1:
        return model.to(ranks.device)
    if kind == "ddp":
        return DistributedDataParallel(model.to(ranks.device), gradient_as_bucket_view=True,
                                       forward_sync_buffers=False)  # they never change
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here, because it imports slowly

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    # Blocks travel in the type that they compute in. Of float32 autocast would make copies in that type, and
    # keep them until the backward pass: the whole model on each rank. Gradients are summed in float32.
    half = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32,
                                cast_forward_inputs=False)  # between blocks autocast keeps float32
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=half)
    return fully_shard(model, mesh=mesh)  # what is in no block: embedding, last norm, head


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "reshard")  # a method that fully_shard adds


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor put together, on every rank; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A tensor that every rank has, cut up as the DTensor `other` is; where that is none, as it is."""
    if not hasattr(other, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def world_size() -> int:
    """How many ranks there are, for code that is not told."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_out(work, batch: torch.Tensor) -> torch.Tensor:
    """work(batch), which keeps shape and type, of a batch (N, ...) that all ranks have: each does its part of
    the N, and hands it to the others."""
    if world_size() == 1:
        return work(batch)
    parts = batch.split(-(-len(batch) // world_size()))  # the last may be shorter, or missing
    done = [torch.empty_like(parts[0]) for _ in range(world_size())]
    mine = torch.empty_like(parts[0])
    if (rank := dist.get_rank()) < len(parts):
        mine[:len(parts[rank])] = work(parts[rank])
    dist.all_gather(done, mine)
    return torch.cat(done)[:len(batch)]


def gather_weights(model: nn.Module, ranks: Ranks) -> None:
    """Puts a sharded model together on rank 0, on its CPU, to be saved; it can't be run after that."""
    if not is_sharded(model):
        return
    model.reshard()
    full: dict[nn.Parameter, nn.Parameter] = {}  # embedding and head may share one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in full:
                tensor = full_tensor(parameter.detach())  # all ranks have a part in it
                full[parameter] = nn.Parameter(tensor.cpu()) if ranks.is_main else parameter
            setattr(module, name, full[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.cpu())


def leave_ranks(ranks: Ranks) -> None:
    if ranks.world_size > 1:
        dist.destroy_process_group()
