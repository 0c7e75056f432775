"""One receiver in the groups of a sender: its meetings with the others, and the bytes that they bring."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch._C._distributed_c10d import PrefixStore

from ppod_models.process_groups import BroadcastGroup, GroupError, reach_store, tell, wait_for
from ppod_services.core.weight_manifest import IncomingGroup

_GIVEN_UP = 0


class GroupMember:
    """A rank of the group that a manifest names, and the group itself from its first version on.

    Args:
        group: whom to meet, and where.
        rank: which of the server's ranks this is.
        timeout_s: longest silence of the others.
        gone: set when nobody waits any more for what comes first; the sender is looked for no longer.

    Raises:
        GroupError: the sender's store cannot be reached.
    """

    def __init__(self, group: IncomingGroup, rank: int, timeout_s: float, gone: threading.Event) -> None:
        self.name = group.name
        self._group = group
        self._rank = rank
        self._timeout_s = timeout_s
        host, _, port = group.address.rpartition(":")
        store = reach_store(host, int(port), timeout_s, gone)
        self._store = PrefixStore(f"ppod/{group.name}", store)
        self._epoch = 0
        self._members: BroadcastGroup | None = None

    def close(self) -> None:
        """Leave it."""
        if self._members is not None:
            self._members.close()

    def buckets(self, weight_version: int, total_bytes: int) -> Iterator[torch.Tensor]:
        """The bytes of a version in parts: flat uint8 tensors on the group's device, each valid until the next one.

        The next one arrives while one is used. Who stops before the last one must `close`: what the others still send
        would be taken for the next version's beginning.

        Raises:
            GroupError: the group broke, or the sender gave up.
        """
        members = self._meet(weight_version)
        left, size = total_bytes, self._group.bucket_bytes
        buckets = [torch.empty(size, dtype=torch.uint8, device=members.device) for _ in range(2)]
        pending = members.broadcast(buckets[0]) if left else None
        while pending is not None:
            members.finish(pending)
            buckets.reverse()
            full, taken = buckets[1], min(left, size)
            left -= taken
            pending = members.broadcast(buckets[0]) if left else None
            yield full[:taken]

    def _meet(self, weight_version: int) -> BroadcastGroup:
        """Wait for the sender, and join the group that it names."""
        # Since the last version the connection may have been cut.
        tell(self._store, f"{weight_version}/joined/{self._rank}", str(self._epoch))
        epoch = int(wait_for(self._store, f"{weight_version}/go", self._timeout_s))
        if epoch == _GIVEN_UP:
            raise GroupError("the sender gave up")
        if self._members is None or epoch != self._epoch:
            self.close()
            group, prefix = self._group, PrefixStore(str(epoch), self._store)
            self._members = BroadcastGroup(group.backend, prefix, self._rank, group.world_size, self._timeout_s)
            self._epoch = epoch
        return self._members
