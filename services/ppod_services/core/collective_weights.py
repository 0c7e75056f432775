"""Weights that arrive by a process group's broadcasts: NCCL between GPU nodes, gloo elsewhere.

The bytes go through the same checks as a stream's, so that a version is whole before it can be committed. The service
receives them itself, or has the processes of its engine do so.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase

import torch

from ppod.errors import FailedPrecondition, PermissionDenied, Unavailable
from ppod_models.process_groups import GroupError, on_device, on_host, usable_backends
from ppod_services.core.group_member import GroupMember
from ppod_services.core.weight_manifest import IncomingGroup, IncomingManifest
from ppod_services.core.weight_store import Install
from ppod_services.core.weight_transfer import WeightTransfer
from ppod_services.core.weights import ServedWeights


class CollectiveReceiver:
    """Prepares versions that groups bring, one at a time. A group is kept for the versions that follow.

    Args:
        addresses: patterns of the senders' stores that may be met.
        timeout_s: longest silence of the others.
        device: the model's, on which the service itself receives by NCCL.
    """

    def __init__(self, addresses: Sequence[str], timeout_s: float, device: torch.device) -> None:
        self._addresses = addresses
        self._timeout_s = timeout_s
        self._device = device
        self._joined: GroupMember | None = None
        self._lock = threading.Lock()

    def prepare(self, weights: ServedWeights, manifest: IncomingManifest, gone: threading.Event) -> int:
        """Prepare the version that the manifest's group brings. Returns the bytes received.

        Args:
            weights: where it goes.
            manifest: what the group will bring.
            gone: set when the caller went away: then nothing is kept.

        Raises:
            PermissionDenied: the address is not allowed. FailedPrecondition: this server lacks the backend, or takes
            another number of ranks.
            Unavailable: the group broke, or the sender gave up. Else as `ServedWeights.begin`.
        """
        group = manifest.collective
        assert group is not None
        self._check(group, weights.collective_ranks)
        transfer = weights.begin(manifest)
        staged: Install | None = None
        try:
            with self._lock:
                self._receive(group, weights, transfer, gone)
            staged = None if gone.is_set() else weights.stage(transfer)
        finally:
            weights.end(transfer, None if gone.is_set() else staged)
        return transfer.received_bytes

    def _check(self, group: IncomingGroup, ranks: int) -> None:
        if not any(fnmatchcase(group.address, pattern) for pattern in self._addresses):
            raise PermissionDenied(f"{group.address} is none of this server's weights.collective_addresses")
        if group.backend not in usable_backends():
            raise FailedPrecondition("manifest.collective.backend", group.backend, " or ".join(usable_backends()))
        if group.ranks != ranks:
            raise FailedPrecondition("manifest.collective.ranks", str(group.ranks), f"{ranks}, as GetWeights tells")

    def _receive(
        self, group: IncomingGroup, weights: ServedWeights, transfer: WeightTransfer, gone: threading.Event
    ) -> None:
        try:
            if weights.group_receiver is None:
                self._receive_here(group, transfer, gone)
            else:
                weights.group_receiver.receive(transfer.manifest, self._timeout_s)
                transfer.verify_in_place()
        except GroupError as error:
            raise Unavailable(f"the group {group.name} of {group.address} broke: {error}") from error

    def _receive_here(self, group: IncomingGroup, transfer: WeightTransfer, gone: threading.Event) -> None:
        with on_device(self._device), ExitStack() as failed:
            failed.callback(self._leave)
            for bucket in self._join(group, gone).buckets(transfer.weight_version, transfer.manifest.wire_bytes):
                transfer.write(on_host(bucket).numpy().data)
            failed.pop_all()

    def _join(self, group: IncomingGroup, gone: threading.Event) -> GroupMember:
        if self._joined is None or self._joined.name != group.name:
            self._leave()
            self._joined = GroupMember(group, group.rank, self._timeout_s, gone)
        return self._joined

    def _leave(self) -> None:
        joined, self._joined = self._joined, None
        if joined is not None:
            joined.close()
