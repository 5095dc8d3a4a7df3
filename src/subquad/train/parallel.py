"""Several processes that train one student: each takes its rows of every batch, and all hold the same result."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from subquad.core.errors import ConfigError
from subquad.models.stack import Stack

T = TypeVar("T")
# How long the others wait for what the first one does alone, as sampling or evaluating.
PATIENCE = timedelta(days=7)
# Elements of gradients that are summed in one call.
BUCKET = 2**26
# Time for gloo's threads to let go of what they exchanged.
SETTLE_SECONDS = 0.3


@dataclass(frozen=True)
class Processes:
    """The processes of a run as one of them sees them; alone, every method returns what it was given.

    All read the same stream, so that the batch is the same whatever their number, and each trains on its own rows of
    it. A loss and its gradients are a process's share of the whole batch's: their sum over processes is what one
    process would have computed.

    Attributes:
        device: of this process.
        rank, world: which of how many it is.
        mesh: of all of them; None when alone.
        hosts: all of them once more, for what takes the first one long; None when alone.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None
    hosts: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this one writes and shows."""
        return self.rank == 0

    def parts(self, batch: int, rows: int | None = None) -> list[slice]:
        """The rows of a batch that this process trains on, `rows` at a time.

        Args:
            batch: rows of the whole batch.
            rows: at most so many at once; None is all of its own. The last part may be smaller.

        Raises:
            ConfigError: a batch that can't be shared out evenly.
        """
        if batch % self.world:
            raise ConfigError(
                f"--batch {batch}: expected a multiple of the {self.world} processes; "
                f"give {self.world * -(-batch // self.world)}"
            )
        own = batch // self.world
        first, rows = self.rank * own, min(rows or own, own)
        return [slice(first + i, min(first + i + rows, first + own)) for i in range(0, own, rows)]

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, the only one that calls it, handed to all; so is its error.

        Args:
            make: gives what can be pickled.
        """
        if self.world == 1:
            return make()
        found: list[Any] = [None, None]
        if self.main:
            try:
                found[0] = make()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, 0, group=self.hosts, device=torch.device("cpu"))
        if found[1] is not None:
            raise found[1]
        return found[0]  # type: ignore[no-any-return]

    def ahead(self, make: Callable[[], T]) -> T:
        """What `make` gives in each process; the first one's call ends before the others begin.

        So that what it fetches or writes is there for them.
        """
        made: list[T] = []
        self.first(lambda: made.append(make()))
        return made[0] if made else make()

    def least(self, x: int) -> int:
        """The smallest of all processes' `x`."""
        if self.world == 1:
            return x
        found = torch.tensor(x, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all processes' `x`."""
        if self.world > 1:
            x = x.detach().clone()
            dist.all_reduce(x)
        return x

    def agree(self, seconds: float, due: bool, stop: bool) -> tuple[float, bool, bool]:
        """The first one's clock and whether it wants to save, and whether any was asked to stop.

        It goes through the hosts, so that no device is waited for.
        """
        if self.world == 1:
            return seconds, due, stop
        mine = (seconds, float(due)) if self.main else (0.0, 0.0)
        all_n = torch.tensor([*mine, float(stop)], dtype=torch.float64)
        dist.all_reduce(all_n)
        return float(all_n[0]), bool(all_n[1]), bool(all_n[2])

    @torch.no_grad()
    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over processes; those of sharded parameters are summed already."""
        if self.world == 1:
            return
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]):
            flat_n = torch.cat([x.flatten() for x in bucket])
            dist.all_reduce(flat_n)
            for x, summed_n in zip(bucket, flat_n.split([x.numel() for x in bucket]), strict=True):
                x.copy_(summed_n.view_as(x))

    @torch.no_grad()
    def same_(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values: what each computed for itself may differ in the last bits."""
        if self.world > 1:
            for x in tensors:
                if not isinstance(x, DTensor):
                    value = x.detach().contiguous()
                    dist.broadcast(value, 0)
                    x.copy_(value)


@contextmanager
def joined(device: torch.device) -> Generator[Processes]:
    """The processes that ``torchrun`` started, or this one alone.

    After an error nothing is torn down, since the others may be waiting in the middle of an exchange: the process has
    to end, and ``torchrun`` ends the others.

    Args:
        device: ``cuda`` takes the GPU of the process's local rank; anything else is used as it is.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (world,))
    hosts = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=PATIENCE))
    yield Processes(device, dist.get_rank(), world, mesh, hosts)
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads need the interpreter to let go of the last exchange; one that asks for it while the interpreter
    # ends aborts the process, after all work is done.
    time.sleep(SETTLE_SECONDS)


@contextmanager
def sharded(model: Stack, processes: Processes) -> Generator[Stack]:
    """A copy of `model` whose parameters lie spread over all processes; at the end `model` takes over its weights.

    It trains through `Stack.hidden`, the head's weight taken afterwards. In the meantime `model` waits on the CPU.
    Alone, the copy is `model` itself.

    Args:
        model: shares no tensor with another one.
        processes: all of them call this.
    """
    if processes.world == 1:
        yield model
        return
    spread = copy.deepcopy(model.cpu())
    shard_(spread, processes)
    yield spread
    # The result replaces tensor by tensor, so that no second copy of the whole is needed.
    own = model.state_dict()
    for name, x in spread.state_dict().items():
        own[name].copy_(gathered(x))
    model.to(processes.device)


def shard_(model: Stack, processes: Processes) -> None:
    """Spread the parameters of `model` over the processes for good, block by block (FSDP, arXiv 2304.11277).

    Serves a frozen teacher as well, where only `Stack.hidden` and its head are used.
    """
    if processes.mesh is None:
        return
    processes.same_((*model.parameters(), *model.buffers()))
    for block in model.blocks:
        fully_shard(block, mesh=processes.mesh)
    # What stands outside the blocks stays whole after the forward pass, for the loss reads the head's weight itself.
    fully_shard(model, mesh=processes.mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are shares of the whole batch's: gradients add up
            module.set_force_sum_reduction_for_comms(True)


def gathered(tree: Any, *, keep: bool = True) -> Any:
    """`tree` of dictionaries, lists and tuples with every sharded tensor whole, on the CPU; all processes call this.

    Args:
        tree: whole tensors in it stay as they are.
        keep: False leaves an empty tensor for each sharded one, where another process keeps them.
    """
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if keep else whole.new_empty(0)
    if isinstance(tree, Mapping):
        return {k: gathered(v, keep=keep) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(v, keep=keep) for v in tree)
    return tree


def scattered_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which all processes hold, spread as `like` is."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device, like.dtype)
    # Each takes its part of its own copy, so that nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def scattered_moments(state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser, with whole tensors, as `optimiser` over sharded parameters can load it."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    moments = cast("dict[int, dict[str, Tensor]]", state["state"])
    return state | {
        "state": {
            i: {k: scattered_like(x, parameters[i]) if x.ndim else x for k, x in of.items()}
            for i, of in moments.items()
        }
    }


def clip_(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients of `parameters` so that their norm over all of them is at most `most`; the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _buckets(tensors: Sequence[Tensor]) -> Generator[list[Tensor]]:
    """`tensors` in order, in groups of one dtype and up to `BUCKET` elements, or of one larger tensor."""
    bucket: list[Tensor] = []
    size = 0
    for x in tensors:
        if bucket and (size + x.numel() > BUCKET or x.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.numel()
    if bucket:
        yield bucket
