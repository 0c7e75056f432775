"""A sender of broadcasts that a test drives bucket by bucket."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import PrefixStore

from ppod import Unavailable, WeightClient
from ppod.client import CollectiveGroup, WeightPush
from ppod_models.process_groups import BroadcastGroup, GroupBackend, GroupError, open_store, wait_for
from support.processes import ServiceProcess
from support.weight_tensors import weight_tensors

BUCKET = 64 * 1024
ANOTHER_HOST = {"NCCL_HOSTID": "services", "NCCL_SOCKET_IFNAME": "lo"}
"""Environment of services that share their CUDA device with the trainer: NCCL takes two ranks of one host on one device
for a mistake."""


def group_of(
    replica: ServiceProcess, port: int, backend: str = "gloo", *, name: str = "test", ranks: int = 1
) -> CollectiveGroup:
    """A group of a sender and one server."""
    return CollectiveGroup(name, f"127.0.0.1:{port}", backend, {replica.admin_target: range(1, 1 + ranks)}, BUCKET)


def ask(replica: ServiceProcess, model: nn.Module, group: CollectiveGroup) -> int:
    """Have a server prepare a model's weights as its next version, which the group brings; that version."""
    with WeightClient(replica.admin_target, timeout_s=20) as client:
        version = client.status().state.weight_version + 1
        client.push(WeightPush(version, weight_tensors(model), collective=group))
    return version


@dataclass
class Sender:
    """The sender's side.

    Attributes:
        data: what is left to send.
        asking: the server's answer.
        members: the group.
    """

    data: bytes
    asking: Future[int]
    members: BroadcastGroup

    def send(self, count: int) -> None:
        """Broadcast the next buckets; behind the last one empty ones."""
        for _ in range(count):
            part, self.data = self.data[:BUCKET], self.data[BUCKET:]
            bucket = torch.frombuffer(bytearray(part.ljust(BUCKET, b"\0")), dtype=torch.uint8).to(self.members.device)
            self.members.finish(self.members.broadcast(bucket))

    def send_all(self) -> None:
        """Broadcast all that is left."""
        self.send(-(-len(self.data) // BUCKET))

    def damage(self, at: int) -> None:
        """Turn a bit of a byte that is left."""
        self.data = self.data[:at] + bytes([self.data[at] ^ 1]) + self.data[at + 1 :]

    def assert_hears_that_nobody_is_there(self, within_s: float) -> None:
        """What is sent now breaks the group in time."""
        begun = time.monotonic()
        with pytest.raises(GroupError):
            # The first ones may still fit into the buffer of a socket that nobody reads any more.
            self.send(1_000)
        assert time.monotonic() - begun < within_s
        with pytest.raises(Unavailable):
            self.asking.result(20)


@contextmanager
def sending(
    replica: ServiceProcess, port: int, model: nn.Module, ranks: int = 1, backend: GroupBackend = "gloo"
) -> Iterator[Sender]:
    """A push of a model's weights of which the test sends the buckets itself."""
    group = group_of(replica, port, backend, name=f"by hand {secrets.token_hex(4)}", ranks=ranks)
    with WeightClient(replica.admin_target) as client:
        version = client.status().state.weight_version + 1
    store = open_store("127.0.0.1", port, master=True, timeout_s=5)
    prefix = PrefixStore(f"ppod/{group.name}", store)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, replica, model, group)
        for rank in group.ranks[replica.admin_target]:
            assert wait_for(prefix, f"{version}/joined/{rank}", 5) == b"0"
        prefix.set(f"{version}/go", "1")
        members = BroadcastGroup(backend, PrefixStore("1", prefix), 0, group.world_size, 5)
        yield Sender(b"".join(bytes(one.data) for one in weight_tensors(model)), asking, members)
        members.close()
