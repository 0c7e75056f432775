"""Weights that leave by a process group's broadcasts to all replicas at once: NCCL between GPU nodes, gloo elsewhere.

Manifest, checks and commit go by gRPC, as with every plane; see CollectiveGroup in weights.proto.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch._C._distributed_c10d import PrefixStore

from ppod.client import CollectiveGroup, WeightPush, WeightTensor, with_checksums
from ppod_models.process_groups import (
    BroadcastGroup,
    GroupBackend,
    GroupError,
    on_device,
    open_store,
    usable_backends,
)
from ppod_trainer.config import CollectiveConfig
from ppod_trainer.errors import TrainerError, WeightPushError
from ppod_trainer.weight_planes import HostCopy, Outgoing

_POLL_S = 0.002
_GIVEN_UP = 0
_MIB = 1024 * 1024


class CollectivePlane:
    """A `WeightPlane` of one group with all replicas, which lasts until a push fails or a replica lost it.

    Args:
        config: where the parties meet, and how.
        ask_ranks: tells how many ranks each replica takes, by its administration port; asked before each push, because
            one that was started again may have another number of workers.

    Raises:
        TrainerError: the port is in use, or there is no such backend here.
    """

    def __init__(self, config: CollectiveConfig, ask_ranks: Callable[[], Mapping[str, int]]) -> None:
        self._config = config
        self._backend: GroupBackend = usable_backends()[0] if config.backend == "auto" else config.backend
        if self._backend not in usable_backends():
            found, usable = self._backend, " or ".join(usable_backends())
            raise TrainerError(f"weight_transfer.collective.backend is {found!r}; here there is {usable}")
        try:
            self._store = open_store(config.host, config.port, master=True, timeout_s=config.timeout_s)
        except GroupError as error:
            raise TrainerError(f"weight_transfer.collective: {error}; set host and port") from error
        self._ask_ranks = ask_ranks
        self._copy = HostCopy()
        address, bucket_bytes = f"{config.host}:{config.port}", config.bucket_mib * _MIB
        # Its name comes with its ranks, at the first push.
        self._group = CollectiveGroup("", address, self._backend, {}, bucket_bytes)
        self._epoch = 0
        self._members: BroadcastGroup | None = None
        self._refused = threading.Event()
        self._brought: int | None = None  # by this group, last; None: nothing yet, or that push broke it

    @contextmanager
    def whole(self, outgoing: Outgoing) -> Generator[WeightPush]:
        """See `WeightPlane`: while the context lasts, all replicas are to be asked to take the push."""
        self._place(self._ask_ranks(), outgoing.weight_version)
        self._brought = None
        with self._copy.tensors(outgoing) as arriving:
            tensors = with_checksums(arriving)
        push = WeightPush(outgoing.weight_version, tensors, collective=self._group, push_id=outgoing.push_id)
        self._refused.clear()
        # Left last to first: who is told that nobody listens, then waits for the broadcast's end.
        with ThreadPoolExecutor(1, thread_name_prefix="broadcast") as pool, ExitStack() as failed:
            sending = pool.submit(self._send_from, outgoing.policy.device, push)
            failed.callback(self._refused.set)
            yield push
            failed.pop_all()
        # A replica's own error says more than that the group broke for it.
        error = sending.exception()
        if error is not None and not self._refused.is_set():
            raise WeightPushError(f"version {push.weight_version} could not be broadcast: {error}") from error
        if error is None:
            self._brought = push.weight_version

    @contextmanager
    def changes(self, outgoing: Outgoing, base_version: int, tensors: Sequence[WeightTensor]) -> Generator[WeightPush]:
        """Never asked for: the configuration refuses changes by this plane."""
        del base_version, tensors
        with self.whole(outgoing) as push:
            yield push

    def refused(self) -> None:
        """See `WeightPlane`: nothing is broadcast unless all are there."""
        self._refused.set()

    def close(self) -> None:
        """Leave the group; the port is free again."""
        self._leave()
        self._copy.close()
        del self._store

    def _place(self, counts: Mapping[str, int], weight_version: int) -> None:
        """Give each replica its ranks; others than before make another group, and so does a push that broke it.

        So does a version that it brought already, as where a replica was started again before its commit: none must
        meet what an attempt before left in the store.
        """
        ends = list(accumulate(counts.values(), initial=1))
        ranks = {target: range(*ends[index : index + 2]) for index, target in enumerate(counts)}
        if ranks != self._group.ranks or self._brought is None or weight_version <= self._brought:
            self._leave()
            self._epoch = 0
            self._group = replace(self._group, name=secrets.token_hex(8), ranks=ranks)

    def _send_from(self, device: torch.device | None, push: WeightPush) -> None:
        # NCCL takes two ranks of one host on one device for a mistake: the first one may be a replica's.
        with on_device(device):
            self._send(push)

    def _send(self, push: WeightPush) -> None:
        store = PrefixStore(f"ppod/{self._group.name}", self._store)
        go = f"{push.weight_version}/go"
        try:
            epochs = self._gather(store, push.weight_version)
        except GroupError:
            store.set(go, str(_GIVEN_UP))
            raise
        if epochs != {self._epoch} or self._members is None:
            self._leave()
            self._epoch += 1
        store.set(go, str(self._epoch))
        try:
            if self._members is None:
                prefix, world = PrefixStore(str(self._epoch), store), self._group.world_size
                self._members = BroadcastGroup(self._backend, prefix, 0, world, self._config.timeout_s)
            _broadcast(self._members, push.tensors, self._group.bucket_bytes)
        except GroupError:
            self._leave()
            raise

    def _gather(self, store: PrefixStore, weight_version: int) -> Collection[int]:
        """Wait until all replicas are ready; the epochs of the groups that they are in."""
        keys = [f"{weight_version}/joined/{rank}" for rank in range(1, self._group.world_size)]
        deadline = time.monotonic() + self._config.timeout_s
        while not store.check(keys):
            if self._refused.is_set():
                raise GroupError("a replica refused")
            if time.monotonic() > deadline:
                ranks = self._group.ranks.items()
                missing = [target for target, own in ranks if not store.check([keys[rank - 1] for rank in own])]
                raise GroupError(f"{', '.join(missing)} did not join within {self._config.timeout_s:g} s")
            time.sleep(_POLL_S)
        return {int(store.get(key)) for key in keys}

    def _leave(self) -> None:
        members, self._members = self._members, None
        if members is not None:
            members.close()


def _broadcast(members: BroadcastGroup, tensors: Sequence[WeightTensor], bucket_bytes: int) -> None:
    """Send all bytes; the next bucket is filled while one is on its way."""
    copies = members.device.type != "cpu"
    # A device copies from locked pages beside us; they are filled again when what they held has been sent.
    filled = [torch.zeros(bucket_bytes, dtype=torch.uint8, pin_memory=copies) for _ in range(2)]
    host, buckets = [one.numpy() for one in filled], [one.to(members.device) for one in filled]
    pending = None
    for _ in _fill(host, [np.frombuffer(tensor.data, np.uint8) for tensor in tensors]):
        if copies:
            buckets[0].copy_(torch.from_numpy(host[0]), non_blocking=True)
        if pending is not None:
            members.finish(pending)
        pending = members.broadcast(buckets[0])
        host.reverse()
        buckets.reverse()
    if pending is not None:
        members.finish(pending)


def _fill(host: Sequence[np.ndarray], parts: Sequence[np.ndarray]) -> Iterator[None]:
    """Fill `host[0]` with the next bytes, again and again; whoever iterates swaps it for another one."""
    filled = 0
    for part in parts:
        left = part
        while len(left):
            taken = min(len(left), len(host[0]) - filled)
            host[0][filled : filled + taken] = left[:taken]
            left, filled = left[taken:], filled + taken
            if filled == len(host[0]):
                yield
                filled = 0
    if filled:
        host[0][filled:] = 0
        yield
