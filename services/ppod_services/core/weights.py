"""The weights that serve, the ones that wait, and a transfer on its way. Knows torch, but no gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from ppod.errors import FailedPrecondition, ResourceExhausted
from ppod_services.core.weight_manifest import IncomingManifest, check_tensors
from ppod_services.core.weight_store import FileMemory, GroupReceiver, Hold, Install, ReceivedWeights, WeightStore
from ppod_services.core.weight_transfer import WeightTransfer, buffers_of

_BUSY_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What waits for its commit; `hold` is of the file that its memory is, None where that is the engine's own."""

    manifest: IncomingManifest
    install: Install
    hold: Hold | None


@dataclass(frozen=True, slots=True)
class WeightStatus:
    """What serves and what waits.

    Attributes:
        version: the version that serves.
        push_id: the sender's name for the push that brought it; empty where it had none.
        base_version: the version of the whole weights in service, below an adapter where one serves.
        prepared_version: the version that waits for its commit.
        held_uris: shared files whose memory serves or waits.
    """

    version: int
    push_id: str
    base_version: int
    prepared_version: int | None
    held_uris: tuple[str, ...]


class ServedWeights:
    """Which version serves, which one waits, and one transfer at a time, around the weights of an engine.

    Args:
        store: the engine's weights.
        on_version: told of each version that begins to serve.
    """

    def __init__(self, store: WeightStore, on_version: Callable[[int], None]) -> None:
        self._store = store
        self._on_version = on_version
        self._version = 0
        self._push_id = ""
        self._base_version = 0
        self._hold: Hold | None = None  # of the file whose memory serves
        self._prepared: _Prepared | None = None
        self._installing: IncomingManifest | None = None  # of the version whose commit is under way
        self._transferring = False
        self._lock = threading.Lock()

    @property
    def version(self) -> int:
        """The version that serves; constant within a decoding step, because swaps run between two."""
        return self._version

    @property
    def status(self) -> WeightStatus:
        """What serves and what waits, at one moment."""
        with self._lock:
            prepared = self._prepared
            held = (self._hold, None if prepared is None else prepared.hold)
            return WeightStatus(
                self._version,
                self._push_id,
                self._base_version,
                None if prepared is None else prepared.manifest.weight_version,
                tuple(dict.fromkeys(hold.uri for hold in held if hold is not None)),
            )

    @property
    def group_receiver(self) -> GroupReceiver | None:
        """See `WeightStore`."""
        return self._store.group_receiver

    @property
    def borrows(self) -> bool:
        """See `WeightStore`."""
        return self._store.borrows

    @property
    def collective_ranks(self) -> int:
        """How many ranks receive a group's broadcasts."""
        return 1 if self._store.group_receiver is None else self._store.group_receiver.ranks

    def check(self, manifest: IncomingManifest) -> None:
        """Raise what `begin` raises of a manifest, before anything is made for it."""
        with self._lock:
            self._check(manifest)

    def begin(self, manifest: IncomingManifest, memory: FileMemory | None = None) -> WeightTransfer:
        """Check a manifest and open its transfer. Every begin needs its `end`.

        Args:
            manifest: what will come.
            memory: a shared file's, to receive into or that holds the bytes already; None: the engine's own buffers. It
                is held until nothing of it serves or waits, or this raises.

        Raises:
            FailedPrecondition: the version is not newer than the serving one, or the base is another. InvalidArgument:
            a tensor is unknown, double, missing or of another shape. ResourceExhausted: another transfer is under way.
        """
        with ExitStack() as undo, self._lock:
            if memory is not None:
                undo.callback(memory.hold.release)
            self._check(manifest)
            if self._transferring:
                # Buffers for two transfers at once might not fit into memory.
                raise ResourceExhausted("another transfer of weights is under way", _BUSY_RETRY_S)
            if memory is None:
                buffers = buffers_of(self._store.allocate(manifest.tensors))
                transfer = WeightTransfer(manifest, buffers, self._store.image)
            else:
                transfer = WeightTransfer(manifest, memory.buffers, self._store.image, memory.hold)
            self._transferring = True
            undo.pop_all()
        return transfer

    def stage(self, transfer: WeightTransfer) -> Install:
        """Ready a finished transfer for its commit; slow, in a thread. Raises what `WeightTransfer.finish` raises."""
        manifest = transfer.manifest
        received = ReceivedWeights(manifest.weight_version, transfer.finish(), manifest.adapter, transfer.borrowed)
        return self._store.stage(received)

    def end(self, transfer: WeightTransfer, staged: Install | None) -> None:
        """Close a transfer: keep it aside as the prepared one, or with None nothing of it.

        Raises:
            FailedPrecondition: a version came into service meanwhile that this one does not follow.
        """
        dropped = transfer.hold
        try:
            with self._lock:
                self._transferring = False
                if staged is not None:
                    self._check_versions(transfer.manifest)
                    dropped = None if self._prepared is None else self._prepared.hold
                    self._prepared = _Prepared(transfer.manifest, staged, transfer.hold)
        finally:
            _release(dropped)

    def would_change(self, weight_version: int, push_id: str = "") -> bool:
        """Whether a commit would put this version into service, or has begun to; False where it serves already.

        Raises:
            FailedPrecondition: as `commit`.
        """
        with self._lock:
            installing = self._installing
            if installing is not None and installing.weight_version == weight_version:
                _check_push(push_id, installing.push_id)
                return True
            return self._to_commit(weight_version, push_id) is not None

    def commit(self, weight_version: int, push_id: str = "") -> float:
        """Put prepared weights into service; must run between two decoding steps. Repeating it changes nothing.

        Args:
            weight_version: which.
            push_id: of the push that is to have prepared them; empty: whichever did.

        Returns:
            Seconds that it took.

        Raises:
            FailedPrecondition: the version is neither prepared nor serving, or by another push, or its base serves no
            more.
        """
        start = time.monotonic()
        with self._lock:
            prepared = self._to_commit(weight_version, push_id)
            if prepared is None:
                return 0.0
            self._prepared, self._installing = None, prepared.manifest
        dropped = prepared.hold
        try:
            prepared.install()
            with self._lock:
                self._version, self._push_id = weight_version, prepared.manifest.push_id
                if prepared.manifest.adapter is None:
                    self._base_version = weight_version
                    if self._store.borrows:
                        self._hold, dropped = dropped, self._hold
        finally:
            self._installing = None
            _release(dropped)
        self._on_version(weight_version)
        return time.monotonic() - start

    def _to_commit(self, weight_version: int, push_id: str) -> _Prepared | None:
        """What a commit puts into service, None where it serves already; raises as `commit`. Call it with the lock."""
        if weight_version == self._version:
            _check_push(push_id, self._push_id)
            return None
        prepared = self._prepared
        if prepared is None or prepared.manifest.weight_version != weight_version:
            found = "none prepared" if prepared is None else f"{prepared.manifest.weight_version} prepared"
            raise FailedPrecondition("weight_version", f"{self._version} serving, {found}", str(weight_version))
        _check_push(push_id, prepared.manifest.push_id)
        # It may have been prepared while another version was on its way into service.
        self._check_versions(prepared.manifest)
        return prepared

    def _check(self, manifest: IncomingManifest) -> None:
        self._check_versions(manifest)
        check_tensors(manifest.tensors, self._store.shapes(manifest.adapter))

    def _check_versions(self, manifest: IncomingManifest) -> None:
        if manifest.weight_version <= self._version:
            raise FailedPrecondition("weight_version", str(self._version), f"less than {manifest.weight_version}")
        base = manifest.base_version
        if base is not None and base != self._base_version:
            raise FailedPrecondition("base_version", str(self._base_version), str(base))


def _check_push(wanted: str, found: str) -> None:
    if wanted not in ("", found):
        told = f"{found or 'none'}: another sender pushed the same version to this server"
        raise FailedPrecondition("push_id", told, wanted)


def _release(hold: Hold | None) -> None:
    if hold is not None:
        hold.release()
