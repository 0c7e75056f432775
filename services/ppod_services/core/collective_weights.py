"""Weights that arrive by a process group's broadcasts: NCCL between GPU nodes, gloo elsewhere.

The bytes go through the host's memory and the same checks as a stream's, so that a version is whole before it can be
committed. That is why an engine's own transfer is not used: it writes what it receives into the model that serves.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase

import torch
from torch._C._distributed_c10d import PrefixStore

from ppod.errors import FailedPrecondition, PermissionDenied, Unavailable
from ppod_models.process_groups import BroadcastGroup, GroupError, open_store, usable_backends, wait_for
from ppod_services.core.weight_manifest import IncomingGroup, IncomingManifest
from ppod_services.core.weight_store import Install
from ppod_services.core.weight_transfer import WeightTransfer
from ppod_services.core.weights import ServedWeights

_GIVEN_UP = 0


class CollectiveReceiver:
    """Prepares versions that groups bring, one at a time. A group is kept for the versions that follow.

    Args:
        addresses: patterns of the senders' stores that may be met.
        timeout_s: longest silence of the others.
    """

    def __init__(self, addresses: Sequence[str], timeout_s: float) -> None:
        self._addresses = addresses
        self._timeout_s = timeout_s
        self._joined: _JoinedGroup | None = None
        self._lock = threading.Lock()

    def prepare(self, weights: ServedWeights, manifest: IncomingManifest, gone: threading.Event) -> int:
        """Prepare the version that the manifest's group brings. Returns the bytes received.

        Args:
            weights: where it goes.
            manifest: what the group will bring.
            gone: set when the caller went away: then nothing is kept.

        Raises:
            PermissionDenied: the address is not allowed. FailedPrecondition: this server lacks the backend.
            Unavailable: the group broke, or the sender gave up. Else as `ServedWeights.begin`.
        """
        group = manifest.collective
        assert group is not None
        self._check(group)
        transfer = weights.begin(manifest)
        staged: Install | None = None
        try:
            with self._lock:
                self._receive(group, transfer)
            staged = None if gone.is_set() else weights.stage(transfer)
        finally:
            weights.end(transfer, None if gone.is_set() else staged)
        return transfer.received_bytes

    def _check(self, group: IncomingGroup) -> None:
        if not any(fnmatchcase(group.address, pattern) for pattern in self._addresses):
            raise PermissionDenied(f"{group.address} is none of this server's weights.collective_addresses")
        if group.backend not in usable_backends():
            raise FailedPrecondition("manifest.collective.backend", group.backend, " or ".join(usable_backends()))

    def _receive(self, group: IncomingGroup, transfer: WeightTransfer) -> None:
        with ExitStack() as failed:
            # What the others still send would otherwise be taken for the next version's beginning.
            failed.callback(self._leave)
            try:
                self._join(group).receive(group, transfer)
            except GroupError as error:
                raise Unavailable(f"the group {group.name} of {group.address} broke: {error}") from error
            failed.pop_all()

    def _join(self, group: IncomingGroup) -> _JoinedGroup:
        if self._joined is None or self._joined.name != group.name:
            self._leave()
            self._joined = _JoinedGroup(group, self._timeout_s)
        return self._joined

    def _leave(self) -> None:
        joined, self._joined = self._joined, None
        if joined is not None:
            joined.close()


class _JoinedGroup:
    """The meetings of one group's parties, and the group itself from the first version on."""

    def __init__(self, group: IncomingGroup, timeout_s: float) -> None:
        self.name = group.name
        self._timeout_s = timeout_s
        host, _, port = group.address.rpartition(":")
        store = open_store(host, int(port), master=False, timeout_s=timeout_s)
        self._store = PrefixStore(f"ppod/{group.name}", store)
        self._epoch = 0
        self._members: BroadcastGroup | None = None

    def close(self) -> None:
        """Leave it."""
        if self._members is not None:
            self._members.close()

    def receive(self, group: IncomingGroup, transfer: WeightTransfer) -> None:
        """Write all buckets of a version into its transfer; the next one arrives while one is written."""
        members = self._meet(group, transfer.weight_version)
        left = sum(tensor.wire_bytes for tensor in transfer.manifest.tensors)
        buckets = [torch.empty(group.bucket_bytes, dtype=torch.uint8, device=members.device) for _ in range(2)]
        pending = members.broadcast(buckets[0]) if left else None
        while pending is not None:
            members.finish(pending)
            buckets.reverse()
            full, taken = buckets[1], min(left, group.bucket_bytes)
            left -= taken
            pending = members.broadcast(buckets[0]) if left else None
            transfer.write(full[:taken].cpu().numpy().data)

    def _meet(self, group: IncomingGroup, weight_version: int) -> BroadcastGroup:
        """Wait for the sender, and join the group that it names."""
        self._store.set(f"{weight_version}/joined/{group.rank}", str(self._epoch))
        epoch = int(wait_for(self._store, f"{weight_version}/go", self._timeout_s))
        if epoch == _GIVEN_UP:
            raise GroupError("the sender gave up")
        if self._members is None or epoch != self._epoch:
            self.close()
            self._members = BroadcastGroup(
                group.backend, PrefixStore(str(epoch), self._store), group.rank, group.world_size, self._timeout_s
            )
            self._epoch = epoch
        return self._members
