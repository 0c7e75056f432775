"""The ways by which a version of the weights leaves the trainer: chunks over gRPC, or files that the services see."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ppod import ResourceExhausted
from ppod.client import SharedDirectory, WeightPush, WeightTensor, WireImage
from ppod_models.page_locks import PageLock, page_locked
from ppod_trainer.errors import TrainerError, WeightPushError
from ppod_trainer.policy_weights import PolicyTensors


def new_push_id() -> str:
    """A name that no other push has."""
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One version that is to leave; `image` is it already in the form that travels, where that is kept.

    However often it is sent, all its pushes have one name.
    """

    weight_version: int
    policy: PolicyTensors
    image: WireImage | None
    push_id: str = field(default_factory=new_push_id)


class WeightPlane(Protocol):
    """Makes pushes. What one needs is there within its context."""

    @contextmanager
    def whole(self, outgoing: Outgoing) -> Generator[WeightPush]:
        """All tensors, whole."""
        ...

    @contextmanager
    def changes(self, outgoing: Outgoing, base_version: int, tensors: Sequence[WeightTensor]) -> Generator[WeightPush]:
        """All tensors, as changes against a base version."""
        ...

    def refused(self) -> None:
        """A replica refuses what is being pushed to all; called from the thread that asked it."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class HostCopy:
    """The policy's tensors for planes that send them from this process's memory.

    Those on a device, or of another data type, are copied to memory that is kept: pages that were never touched cost
    more than the copy. Each can be sent while the next ones are copied.
    """

    def __init__(self) -> None:
        self._image: WireImage | None = None
        self._lock: PageLock | None = None

    @contextmanager
    def tensors(self, outgoing: Outgoing) -> Generator[Sequence[WeightTensor]]:
        """All tensors; at the end of the context nobody reads the policy any more."""
        policy = outgoing.policy
        if outgoing.image is not None:
            yield outgoing.image.tensors()
        elif policy.in_place:
            yield policy.tensors()
        else:
            if self._image is None or self._image.layout != policy.layout:
                self._image = self._allocate(policy)
            with self._image.filling(policy.write) as tensors:
                yield tensors

    def close(self) -> None:
        """Give the memory back."""
        self._image = self._lock = None

    def _allocate(self, policy: PolicyTensors) -> WireImage:
        if policy.device is None:
            return WireImage(policy.layout)
        memory, self._lock = page_locked(sum(tensor.nbytes for tensor in policy.layout), policy.device)
        return WireImage(policy.layout, memory)


class GrpcPlane:
    """Chunks over gRPC."""

    def __init__(self) -> None:
        self._copy = HostCopy()

    @contextmanager
    def whole(self, outgoing: Outgoing) -> Generator[WeightPush]:
        """See `WeightPlane`."""
        with self._copy.tensors(outgoing) as tensors:
            yield WeightPush(outgoing.weight_version, tensors, push_id=outgoing.push_id)

    @contextmanager
    def changes(self, outgoing: Outgoing, base_version: int, tensors: Sequence[WeightTensor]) -> Generator[WeightPush]:
        """See `WeightPlane`."""
        yield WeightPush(outgoing.weight_version, tensors, base_version=base_version, push_id=outgoing.push_id)

    def refused(self) -> None:
        """Each replica is on its own."""

    def close(self) -> None:
        """See `WeightPlane`."""
        self._copy.close()


class SharedPlane:
    """Safetensors files below one directory.

    Args:
        directory: where.
        held_uris: asks all replicas which files they hold.

    Raises:
        TrainerError: it cannot be written to.
    """

    def __init__(self, directory: Path, held_uris: Callable[[], Collection[str]]) -> None:
        try:
            self._directory = SharedDirectory(directory)
        except OSError as error:
            raise TrainerError(f"weight_transfer.directory: {directory} cannot be written to: {error}") from error
        self._held_uris = held_uris
        self._locks: dict[Path, PageLock] = {}

    @contextmanager
    def whole(self, outgoing: Outgoing) -> Generator[WeightPush]:
        """See `WeightPlane`."""
        with self._writing(outgoing):
            segment = self._directory.segment(outgoing.policy.layout, self._held_uris())
        # A lock holds the memory of its file, also of one that was removed.
        self._locks = {path: lock for path, lock in self._locks.items() if path.is_file()}
        if outgoing.image is None:
            device = outgoing.policy.device
            if device is not None and segment.path not in self._locks:
                self._locks[segment.path] = PageLock(memoryview(segment.memory), device)
            segment.image.fill(outgoing.policy.write)
        else:
            segment.image.copy_from(outgoing.image)
        with self._writing(outgoing):
            self._directory.publish(segment)
        tensors = segment.image.tensors()
        yield WeightPush(outgoing.weight_version, tensors, uri=segment.uri, push_id=outgoing.push_id)

    @contextmanager
    def changes(self, outgoing: Outgoing, base_version: int, tensors: Sequence[WeightTensor]) -> Generator[WeightPush]:
        """See `WeightPlane`."""
        with self._writing(outgoing):
            path = self._directory.write(tensors)
        try:
            version, push_id = outgoing.weight_version, outgoing.push_id
            yield WeightPush(version, tensors, base_version=base_version, uri=path.as_uri(), push_id=push_id)
        finally:
            self._directory.remove(path)

    def refused(self) -> None:
        """Each replica is on its own."""

    def close(self) -> None:
        """Remove all files."""
        self._locks.clear()
        self._directory.close()

    @contextmanager
    def _writing(self, outgoing: Outgoing) -> Generator[None]:
        """Within the block a file is made; raises WeightPushError where it cannot be, as where there is no room."""
        version = f"weight version {outgoing.weight_version}"
        try:
            yield
        except ResourceExhausted as error:
            raise WeightPushError(f"{version}: {error}") from error
        except OSError as error:
            raise WeightPushError(f"{version}: weight_transfer.directory cannot be written to: {error}") from error
