"""Weights in a file that sender and service share: opened only below allowed directories, then verified or mapped."""

from __future__ import annotations

import json
import mmap
import os
import stat
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, cast
from urllib.parse import unquote, urlsplit

import numpy as np
import torch

from ppod.client import WEIGHT_BLOCK_BYTES, hold_file, release_file, work_side_by_side
from ppod.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from ppod.weight_changes import TensorEncoding
from ppod_models.loading import DTYPES
from ppod_services.core.weight_manifest import ITEM_BYTES, IncomingManifest, IncomingTensor, Layout
from ppod_services.core.weight_store import Buffer, FileMemory, Install
from ppod_services.core.weight_transfer import TensorReceiver, WeightTransfer, buffers_of
from ppod_services.core.weights import ServedWeights

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself bounds it."""

_KEPT_MAPPINGS = 2
_READERS = min(8, os.cpu_count() or 1)
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where the header says that a tensor is, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} at bytes {self.begin} to {self.end}"


class FileHold:
    """A `Hold`: a lock that whoever writes the file looks for first.

    Args:
        uri: of the file.
        opened: a descriptor of it, closed by `release`.

    Raises:
        FailedPrecondition: it is about to be written to.
    """

    def __init__(self, uri: str, opened: int) -> None:
        self.uri = uri
        self._opened = opened
        try:
            hold_file(opened)
        except FailedPrecondition:
            os.close(opened)
            raise

    def release(self) -> None:
        """See `Hold`."""
        release_file(self._opened)


class SharedFile:
    """An open safetensors file. The context closes it; mappings of it live on.

    Args:
        uri: `file://` and an absolute path.
        directories: the file must be below one of them, on a path without symbolic links.

    Raises:
        InvalidArgument: no such URI. PermissionDenied: it is outside. NotFound: there is no such file.
    """

    def __init__(self, uri: str, directories: Sequence[Path]) -> None:
        self.uri = uri
        self._fd = _open_below(_path_of(uri), directories)
        found = os.fstat(self._fd)
        self._size = found.st_size
        self._identity = (found.st_dev, found.st_ino, found.st_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def header(self) -> bytes:
        """What tells which tensors the file holds; raise InvalidArgument when it is no safetensors file."""
        length = int(np.frombuffer(os.pread(self._fd, _LENGTH_BYTES, 0).ljust(_LENGTH_BYTES, b"\0"), "<u8")[0])
        if not 2 <= length <= min(_MAX_HEADER_BYTES, self._size - _LENGTH_BYTES):
            raise InvalidArgument("uri", f"a file of {self._size} bytes with a header of {length}", "safetensors")
        return os.pread(self._fd, length, _LENGTH_BYTES)

    def offsets(self, header: bytes, manifest: IncomingManifest) -> list[int]:
        """Where in the file each tensor begins; raise InvalidArgument unless it holds exactly those of the manifest."""
        entries, start = _read_header(header), _LENGTH_BYTES + len(header)
        names = [tensor.name for tensor in manifest.tensors]
        if list(entries) != names:
            found = f"{len(entries)} tensors, the first other one {_first_other(list(entries), names)}"
            raise InvalidArgument("uri", found, f"the {len(names)} tensors of the manifest, in its order")
        position = 0
        for tensor, entry in zip(manifest.tensors, entries.values(), strict=True):
            expected = _expected(tensor, position)
            if entry != expected:
                raise InvalidArgument(f"uri.{tensor.name}", str(entry), str(expected))
            position = entry.end
        if start + position != self._size:
            raise InvalidArgument(
                "uri", f"a file of {self._size} bytes", f"{start + position} bytes, as its header says"
            )
        return [start + entry.begin for entry in entries.values()]

    @property
    def identity(self) -> tuple[int, int, int]:
        """Equal for the same file of the same size."""
        return self._identity

    def hold(self) -> FileHold:
        """Keep it from being written to; raise FailedPrecondition when it is about to be."""
        return FileHold(self.uri, os.dup(self._fd))

    def map(self) -> mmap.mmap:
        """The file's own memory. Writing to it changes a private copy."""
        return mmap.mmap(self._fd, self._size, access=mmap.ACCESS_COPY)

    def receive(self, transfer: WeightTransfer, offsets: Sequence[int], pool: ThreadPoolExecutor) -> None:
        """Read, or only verify, all tensors of a transfer, several at once, on a pool of `_READERS` threads.

        Raises:
            InvalidArgument: a checksum differs, or the file became shorter.
        """
        receivers = transfer.receivers

        def receive(index: int) -> None:
            if transfer.borrowed:
                receivers[index].verify_in_place()
            else:
                self._read(receivers[index], offsets[index])

        sizes = [len(receiver.room) for receiver in receivers]
        # Longest first, so that the threads end together.
        order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
        work_side_by_side(receive, order, pool, _READERS)
        transfer.received_bytes = transfer.manifest.wire_bytes

    def _read(self, receiver: TensorReceiver, offset: int) -> None:
        while len(room := receiver.room):
            count = os.preadv(self._fd, [room[:WEIGHT_BLOCK_BYTES].data], offset)
            if not count:
                raise InvalidArgument(f"uri.{receiver.tensor.name}", "the end of the file", f"{len(room)} bytes more")
            offset += count
            receiver.advance(count)
        if not receiver.done:
            receiver.advance(0)


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A file's memory, and what was found in it: header and layout told where the tensors are."""

    memory: mmap.mmap
    header: bytes
    layout: Layout
    offsets: Sequence[int]
    buffers: Sequence[Buffer]


class SharedFiles:
    """Prepares versions that files hold.

    Mappings of the last files are kept: a sender writes to its files in turns, and a mapping whose pages were seen
    before costs no page faults.

    Args:
        directories: files must be below one of them.
        map_files: serve from a file's own memory, where the data types agree.
    """

    def __init__(self, directories: Sequence[Path], *, map_files: bool) -> None:
        self._directories = directories
        self._map_files = map_files
        self._mappings: dict[tuple[int, int, int], _Mapped] = {}
        self._lock = threading.Lock()
        # Kept, because new threads need milliseconds until each has a core of its own.
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="weights")

    def prepare(self, weights: ServedWeights, manifest: IncomingManifest, gone: threading.Event) -> int:
        """Prepare the version that the file of a manifest holds. Returns the bytes received.

        Args:
            weights: where it goes.
            manifest: what the file must hold.
            gone: set when the caller went away: then nothing is kept.

        Raises:
            PpodError: see `SharedFile` and `ServedWeights.begin`.
        """
        with SharedFile(manifest.uri, self._directories) as file:
            header = file.header()
            # Changes and adapters are read once, to make other tensors of them.
            mappable = self._map_files and weights.borrows and manifest.adapter is None and not manifest.encoded
            mapped = self._mapped(file, header, manifest) if mappable else None
            offsets = file.offsets(header, manifest) if mapped is None else mapped.offsets
            transfer = weights.begin(manifest, None if mapped is None else FileMemory(mapped.buffers, file.hold()))
            staged: Install | None = None
            try:
                file.receive(transfer, offsets, self._pool)
                staged = None if gone.is_set() else weights.stage(transfer)
            finally:
                weights.end(transfer, None if gone.is_set() else staged)
        return transfer.received_bytes

    def _mapped(self, file: SharedFile, header: bytes, manifest: IncomingManifest) -> _Mapped:
        with self._lock:
            found = self._mappings.pop(file.identity, None)
            if found is None or (found.header, found.layout) != (header, manifest.layout):
                offsets = file.offsets(header, manifest)
                memory = file.map() if found is None else found.memory
                buffers = buffers_in(memory, manifest.tensors, offsets)
                found = _Mapped(memory, header, manifest.layout, offsets, buffers)
            self._mappings[file.identity] = found
            while len(self._mappings) > _KEPT_MAPPINGS:
                del self._mappings[next(iter(self._mappings))]
        return found


def buffers_in(mapping: mmap.mmap, described: Sequence[IncomingTensor], offsets: Sequence[int]) -> list[Buffer]:
    """Tensors in a file's memory, each at its offset."""
    tensors: list[torch.Tensor] = []
    for tensor, offset in zip(described, offsets, strict=True):
        dtype, count = DTYPES[tensor.dtype], tensor.dense_bytes // ITEM_BYTES[tensor.dtype]
        flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset) if count else torch.empty(0).to(dtype)
        tensors.append(flat.view(tensor.shape))
    return buffers_of(tensors)


def _read_header(header: bytes) -> dict[str, _Entry]:
    """The entries in their order."""
    try:
        content: object = json.loads(header)
        if not isinstance(content, dict):
            raise TypeError("the header is no object")
        entries = {
            name: _read_entry(value)
            for name, value in cast("dict[str, dict[str, object]]", content).items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InvalidArgument("uri", f"a header that cannot be read: {error}", "safetensors") from error
    return dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))


def _read_entry(value: dict[str, object]) -> _Entry:
    begin, end = cast("tuple[int, int]", value["data_offsets"])
    return _Entry(str(value["dtype"]), tuple(cast("list[int]", value["shape"])), int(begin), int(end))


def _expected(tensor: IncomingTensor, position: int) -> _Entry:
    if tensor.encoding is TensorEncoding.DENSE:
        return _Entry(_NAMES[tensor.dtype], tensor.shape, position, position + tensor.dense_bytes)
    return _Entry("U8", (tensor.encoded_bytes,), position, position + tensor.encoded_bytes)


def _first_other(found: Sequence[str], expected: Sequence[str]) -> str:
    for one, other in zip(found, expected, strict=False):
        if one != other:
            return f"{one} for {other}"
    return "behind the last common one"


def _path_of(uri: str) -> Path:
    parts = urlsplit(uri)
    path = unquote(parts.path)
    plain = parts.scheme == "file" and parts.netloc in ("", "localhost") and not parts.query and not parts.fragment
    if not plain or not path.startswith("/") or "\0" in path:
        raise InvalidArgument("manifest.uri", uri, "file:// and an absolute path")
    return Path(path)


def _open_below(path: Path, directories: Sequence[Path]) -> int:
    """Open a regular file, folder by folder from an allowed directory, and follow no link on the way."""
    root = next((one for one in directories if path.is_relative_to(one) and path != one), None)
    if root is None or ".." in path.parts:
        allowed = ", ".join(map(str, directories)) or "none is configured in weights.shared_directories"
        raise PermissionDenied(f"{path} is outside of the shared directories: {allowed}")
    *folders, name = path.relative_to(root).parts
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in folders:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            # Without O_NONBLOCK a named pipe would hold the thread for ever.
            opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
    except FileNotFoundError as error:
        raise NotFound("shared file", str(path), "it must be there until the transfer is prepared") from error
    except OSError as error:
        raise PermissionDenied(f"{path}: {error.strerror}; links are not followed") from error
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise PermissionDenied(f"{path} is no regular file")
    return opened
