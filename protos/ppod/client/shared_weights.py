"""Weights in files that a sender and its services share: memory of one host, or a volume that all of them mount."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import secrets
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ppod.client.weight_calls import TensorDtype, WeightTensor
from ppod.client.weight_image import TensorLayout, WireImage
from ppod.errors import FailedPrecondition, ResourceExhausted
from ppod.weight_changes import TensorEncoding

_PREFIX = "ppod-weights-"
_ID_FILE = "ppod-directory-id"
_LOCK = "lock"
_ALIGNMENT = 4096
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What file systems without locks answer."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a full disk, a quota and a limit on files answer."""
_NAMES = {TensorDtype.FLOAT32: "F32", TensorDtype.BFLOAT16: "BF16", TensorDtype.FLOAT16: "F16"}


@dataclass(frozen=True, slots=True)
class Segment:
    """A file that holds an image.

    Attributes:
        path: the file.
        image: its tensors, in the file's own memory.
        memory: the mapping.
    """

    path: Path
    image: WireImage
    memory: mmap.mmap

    @property
    def uri(self) -> str:
        """What a push tells."""
        return self.path.as_uri()

    @property
    def held(self) -> bool:
        """Whether somebody holds it, by `hold_file`."""
        opened = os.open(self.path, os.O_RDWR)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        finally:
            os.close(opened)
        return False


def hold_file(opened: int) -> None:
    """Lock an open file of weights against being written to, until `release_file` or its last descriptor is closed.

    On file systems without locks nothing is locked: their senders ask which files are held (`WeightStatus.held_uris`).

    Raises:
        FailedPrecondition: it is about to be written to.
    """
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FailedPrecondition("uri", "a file that its sender writes to", "one that is whole") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def release_file(opened: int) -> None:
    """Give up what `hold_file` locked, also where a mapping shares the opening; closes the file."""
    try:
        fcntl.flock(opened, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(opened)


def directory_id(directory: Path) -> str:
    """What tells a directory from all others, on whatever host and at whatever path; made where it is not there.

    Raises:
        OSError: it cannot be made, read or written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _ID_FILE
    if not path.exists():
        mine = directory / f".{_ID_FILE}-{secrets.token_hex(8)}"
        mine.write_text(secrets.token_hex(16), encoding="ascii")
        # Whole or not at all, and the first one stays: several servers may come at once.
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(mine)
        mine.unlink()
    return path.read_text(encoding="ascii")


class SharedDirectory:
    """Writes the files of one sender into a folder of its own below `directory`; the context removes them.

    The folder is locked for as long as the sender lives. What senders that were killed left behind, which nobody
    locks, is removed when the next one begins; on file systems without locks, where nobody can tell, it stays.

    Files of whole weights are written in place: memory that was never touched costs a page fault every 4 KiB. A file
    that a service holds, or says that it holds, is never written to.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.stale = _remove_stale(directory)
        self._lock, self._folder = _make_locked(directory)
        self._segments: list[Segment] = []
        self._files = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove all files. A service that maps one keeps its memory until it has other weights."""
        self._segments.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    def segment(self, layout: Sequence[TensorLayout], held_uris: Collection[str]) -> Segment:
        """A file for weights of this layout that no service holds; its old tensors are to be overwritten.

        Where one has to be made, those of other layouts that nobody holds go: they lie in memory.

        Raises:
            ResourceExhausted: the directory has no room for it.
        """
        # Of one that was removed, as by who tidies a directory of temporary files, no service could open what comes.
        self._segments = [segment for segment in self._segments if segment.path.is_file()]
        free = [segment for segment in self._segments if segment.uri not in held_uris and not segment.held]
        for segment in free:
            if segment.image.layout == tuple(layout):
                return segment
        for segment in free:
            self._segments.remove(segment)
            self.remove(segment.path)
        path = self._new_path()
        header = _header([(one.name, _NAMES[one.dtype], one.shape, one.nbytes) for one in layout])
        memory = _create(path, len(header) + sum(one.nbytes for one in layout))
        memory[: len(header)] = header
        segment = Segment(path, WireImage(layout, memoryview(memory)[len(header) :]), memory)
        self._segments.append(segment)
        return segment

    def publish(self, segment: Segment) -> None:
        """Have what was written reach everybody who opens the file from now on."""
        segment.memory.flush()

    def write(self, tensors: Sequence[WeightTensor]) -> Path:
        """Write encoded tensors into a file of their own, which `remove` removes.

        Raises:
            ResourceExhausted: the directory has no room for it.
        """
        path = self._new_path()
        header = _header([_described(tensor) for tensor in tensors])
        memory = _create(path, len(header) + sum(len(tensor.data) for tensor in tensors))
        memory[: len(header)] = header
        begin = len(header)
        for tensor in tensors:
            memory[begin : begin + len(tensor.data)] = tensor.data
            begin += len(tensor.data)
        memory.flush()
        memory.close()
        return path

    def remove(self, path: Path) -> None:
        """Remove a file, as one that `write` wrote."""
        path.unlink(missing_ok=True)

    def _new_path(self) -> Path:
        self._files += 1
        return self._folder / f"weights-{self._files:06d}.safetensors"


def _header(entries: Sequence[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The beginning of a safetensors file, filled up so that the tensors begin at a page."""
    described: dict[str, dict[str, object]] = {}
    begin = 0
    for name, dtype, shape, nbytes in entries:
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)


def _described(tensor: WeightTensor) -> tuple[str, str, tuple[int, ...], int]:
    if tensor.encoding is TensorEncoding.DENSE:
        return tensor.name, _NAMES[tensor.dtype], tensor.shape, len(tensor.data)
    return tensor.name, "U8", (len(tensor.data),), len(tensor.data)


def _create(path: Path, size: int) -> mmap.mmap:
    """A new file, mapped, with all of its space taken: a full file system would kill whoever writes to a mapping."""
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.posix_fallocate(opened, 0, size)
        return mmap.mmap(opened, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in _NO_ROOM:
            raise
        raise ResourceExhausted(f"no room for {size} bytes of weights in {path.parent.parent}", 0.0) from error
    finally:
        os.close(opened)


def _make_locked(directory: Path) -> tuple[int, Path]:
    """A lock, and the new folder that it is of. It is locked before it has its name, by which a sender is known."""
    while True:
        name = f"{_PREFIX}{secrets.token_hex(8)}"
        unlocked, folder = directory / f".{name}", directory / name
        unlocked.mkdir()
        lock: int | None = None
        try:
            lock = os.open(unlocked / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            unlocked.rename(folder)
        except (FileNotFoundError, BlockingIOError):
            # Another sender, which begins at the same time, took it for what a dead one left.
            if lock is not None:
                os.close(lock)
        else:
            return lock, folder


def _remove_stale(directory: Path) -> int:
    """Remove the folders that no living sender locks. Returns their number."""
    removed = 0
    # Those with a dot are of senders that were killed while they made theirs; one that makes it now makes another.
    for folder in [*directory.glob(f"{_PREFIX}*"), *directory.glob(f".{_PREFIX}*")]:
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            # Removed meanwhile, or not ours to look into; or its sender did not get as far as its lock.
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError) and error.errno not in _NO_LOCKS:
                raise
        else:
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
        finally:
            os.close(lock)
    return removed
