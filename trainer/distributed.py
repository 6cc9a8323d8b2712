"""Several processes that train one model together: which of them this is, and the few exchanges between them.
A reader may skip this file.

`torchrun` starts one process for each device and gives each its number, its rank, in environment variables.
Without torchrun there is one process, and every function here returns at once.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.device import choose_device, keep_freed_memory
from common.errors import UsageError
from common.threads import wait_as_others_allow
from trainer.interrupt import end_with_parent

TIMEOUT = timedelta(minutes=10)  # of most exchanges: a host that vanished would otherwise never be missed
PATIENT_TIMEOUT = timedelta(days=7)  # of waiting for work that process 0 does alone


@dataclass(frozen=True)
class Ranks:
    """Which process this is: number `rank` of `world_size`, training on `device`.

    patient: the process group in which the others wait while process 0 works alone on caches and checkpoints,
    which may take hours. Exchanges in any other group end with an error after TIMEOUT.
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
        """Process 0 runs the block first, since it builds caches on disk. The others run it after that.

        If the block raises in process 0, the others end without a message: one complaint is enough.
        """
        if not self.is_main and self.any(False, self.patient):
            # No SystemExit: at the usual end of Python PyTorch may abort, since process 0 is gone already.
            os._exit(2)
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.is_main:
                self.any(failed, self.patient)

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Each value summed over all processes, in float64."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in values])
        if self.world_size > 1:
            dist.all_reduce(total)  # a tensor on the CPU goes through gloo
        return total.tolist()

    def max(self, value: float, group: dist.ProcessGroup | None = None) -> float:
        """The largest value of all processes."""
        largest = torch.tensor(value, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        return largest.item()

    def any(self, flag: bool, group: dist.ProcessGroup | None = None) -> bool:
        """True in every process if it is true in one."""
        return self.max(float(flag), group) > 0

    def gather(self, value) -> list:
        """What each process passes, in the order of their ranks, in every process. Any picklable value."""
        if self.world_size == 1:
            return [value]
        found = [None] * self.world_size
        dist.all_gather_object(found, value, self.patient)
        return found

    def same(self, value: float) -> bool:
        """Whether all processes have the same value."""
        return self.max(value) == -self.max(-value)


def join_ranks(device_flag: str) -> Ranks:
    """Joins the process group that torchrun announces, if any: gloo for tensors on the CPU, NCCL for CUDA's.

    device_flag: the value of --device. Raises UsageError for a device that is not here.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ":" in device_flag and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        hint = "use --device cuda (and CUDA_VISIBLE_DEVICES to choose among GPUs)"
        raise UsageError(f"--device {device_flag}: torchrun's processes can't share a GPU; {hint}")
    device = choose_device(device_flag, int(os.environ.get("LOCAL_RANK", 0)))
    keep_freed_memory()
    wait_as_others_allow()
    end_with_parent()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # After a restart (--max-restarts) torchrun on one host uses the store of the first start again,
            # which holds the addresses of dead processes. The prefix separates the starts. (Several hosts
            # count their restarts separately, and get a new store each time.)
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world_size)
        return Ranks(rank, world_size, device, dist.new_group(backend="gloo", timeout=PATIENT_TIMEOUT))
    return Ranks(rank, world_size, device)


def parallelise(model: nn.Module, kind: str, dtype: torch.dtype, ranks: Ranks) -> nn.Module:
    """The model on this process's device, as all processes train it together. Calling it is the forward pass.

    ddp   each process holds the whole model, and gradients are averaged (Li et al. 2020, arXiv:2006.15704)
    fsdp  each process holds a slice of each weight, of its gradient and of the optimizer's state. All of them
          become DTensors, in place. Before a block computes, its weights are put together, and after it they
          are dropped (ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054; FSDP: Zhao et al. 2023,
          arXiv:2304.11277).
    """
    if ranks.world_size == 1:
        return model.to(ranks.device)
    if kind == "ddp":
        replica = DistributedDataParallel(model.to(ranks.device), gradient_as_bucket_view=True)
        # No forward pass changes a buffer. (As an argument it has another name in PyTorch 2.11.)
        replica.broadcast_buffers = False
        return replica
    return shard(model, dtype, ranks)


def shard(model: nn.Module, dtype: torch.dtype, ranks: Ranks) -> nn.Module:
    """Cuts the model up over all processes, in place, for FSDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here, because it imports slowly

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    # The weights of a block travel in the type that it computes in. If they arrived in float32, autocast
    # would copy them into that type and keep the copies until the backward pass: the whole model in each
    # process. Gradients are summed in float32, and between blocks autocast keeps float32.
    weight_dtype = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(weight_dtype, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)  # the rest: embedding, last norm, head


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard has cut the model up: it adds the method `reshard`."""
    return hasattr(model, "reshard")


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's slice of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor put together, in every process; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has, cut up like the DTensor `other`; if `other` is none, as it is."""
    if not hasattr(other, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def world_size() -> int:
    """How many processes there are, for code that has no Ranks at hand."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_out(work, batch: torch.Tensor) -> torch.Tensor:
    """work(batch) for a batch (N, ...) that all processes have. Each computes a part of the N and sends it
    to the rest.

    work: a function whose result has the shape and the type of its argument.
    """
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
    """Puts a sharded model together on the CPU of process 0, to be saved. The model cannot run after that."""
    if not is_sharded(model):
        return
    model.reshard()
    full: dict[nn.Parameter, nn.Parameter] = {}  # embedding and head may share one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in full:
                tensor = full_tensor(parameter.detach())  # all processes take part in this exchange
                full[parameter] = nn.Parameter(tensor.cpu()) if ranks.is_main else parameter
            setattr(module, name, full[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.cpu())


def leave_ranks(ranks: Ranks) -> None:
    if ranks.world_size > 1:
        dist.destroy_process_group()
