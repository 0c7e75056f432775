"""The ranks of a trainer: who is who, and what they tell each other.

Rank 0 leads: it alone talks to the services. The others do what it says; see `follower`.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ppod_models.loading import pick_device
from ppod_trainer.errors import RanksError

ToldT = TypeVar("ToldT")

_PATIENCE = timedelta(days=365)
"""How long a rank waits to be told what comes next: rank 0 may wait for services as long as it likes. A rank that ends
is noticed all the same, by its connections."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among the ranks. A process that is alone needs no process group.

    Attributes:
        device: what this rank computes on.
        rank: from 0.
        size: how many there are.
        mesh: all ranks, in one dimension; None where this process holds all weights, on its device.
        orders: the group by which rank 0 tells the others what to do.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    orders: dist.ProcessGroup | None = None

    def tell(self, order: object) -> None:
        """Rank 0: tell all others. They are processes of one run, so that pickled objects may travel."""
        if self.orders is not None:
            dist.broadcast_object_list([order], src=0, group=self.orders)

    def hear(self) -> object:
        """Other ranks: wait for what rank 0 tells."""
        heard: list[object] = [None]
        dist.broadcast_object_list(heard, src=0, group=self.orders)
        return heard[0]

    def agree(self, said: ToldT) -> ToldT:
        """What rank 0 says, on all ranks."""
        told = [said]
        if self.mesh is not None:
            dist.broadcast_object_list(told, src=0)
        return told[0]

    def collect(self, mine: ToldT) -> list[ToldT]:
        """What each rank gives, by rank, on all ranks."""
        if self.mesh is None:
            return [mine]
        given: list[ToldT | None] = [None] * self.size
        dist.all_gather_object(given, mine)
        return cast("list[ToldT]", given)

    def sum_in_place(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add tensors up over all ranks."""
        if self.mesh is not None:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """Maximum over all ranks."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def wait_for_all(self) -> None:
        """Return when all ranks have come here."""
        self.sums([0.0])

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.mesh is None:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, op=operation)
        return cast("list[float]", reduced.tolist())


@contextmanager
def open_ranks(device: str, timeout_s: float, *, mesh_of_one: bool = False) -> Generator[Ranks]:
    """Join the ranks that torchrun's environment variables speak of; without them this process is alone.

    Args:
        device: "auto" and "cuda" are the CUDA device of the rank's number on its machine; "auto" is else the CPU.
        timeout_s: longest wait for the other ranks, in seconds.
        mesh_of_one: a process that is alone has a mesh, too, for what FSDP does on one device.

    Raises:
        RanksError: they did not come in time, the variables are incomplete, or the device is of one rank alone.
        ModelSourceError: there is no such device here.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and not mesh_of_one:
        yield Ranks(pick_device(device))
        return
    mine = _pick_rank_device(device, size)
    cuda = mine.type == "cuda"
    if cuda:
        torch.cuda.set_device(mine)
    try:
        # Figures and orders are small and on the CPU, whatever the device is.
        backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout_s)
        if size == 1:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] - a documented name
            dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=timeout)
        orders = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
        mesh = init_device_mesh(mine.type, (size,), mesh_dim_names=("ranks",))
    except (RuntimeError, ValueError) as error:
        raise RanksError(
            f"rank {os.environ.get('RANK')} of {size}: the ranks did not find each other within {timeout_s:g} s "
            f"(ranks.timeout_s), or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are not those of one group: {error}"
        ) from error
    yield Ranks(mine, dist.get_rank(), size, mesh, orders)
    # Not after an error: the others may be in the middle of something, which the end of this process breaks off.
    dist.destroy_process_group()


def _pick_rank_device(device: str, size: int) -> torch.device:
    """What this rank computes on."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if size > 1 and ":" in device:
        raise RanksError(f"policy.device is {device!r}, one for {size} ranks; expected auto, cpu or cuda")
    return pick_device(device)
