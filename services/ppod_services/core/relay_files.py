"""Files that a server receives weights into, for those that it relays them to on its host to take them from there."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from ppod.client import Segment, SharedDirectory, TensorDtype, TensorLayout
from ppod_services.core.shared_weights import FileHold, buffers_in
from ppod_services.core.weight_manifest import IncomingManifest
from ppod_services.core.weight_store import Buffer, FileMemory


class RelayFiles:
    """This server's own files below a directory that others share.

    Args:
        directory: where; see `weights.relay_directory`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = SharedDirectory(directory)
        self._buffers: dict[Path, Sequence[Buffer]] = {}
        self._lock = threading.Lock()

    def memory(self, manifest: IncomingManifest) -> FileMemory:
        """A file's memory for the whole tensors of a manifest, which nobody holds; slow where there was none.

        Raises:
            ResourceExhausted: the directory has no room for it.
        """
        layout = [TensorLayout(one.name, TensorDtype[one.dtype.upper()], one.shape) for one in manifest.tensors]
        with self._lock:
            segment = self._directory.segment(layout, ())
            hold = FileHold(segment.uri, os.open(segment.path, os.O_RDONLY))
            if segment.path not in self._buffers:
                # Of files that were removed the memory goes, too.
                self._buffers = {path: kept for path, kept in self._buffers.items() if path.is_file()}
                self._buffers[segment.path] = _buffers_of(segment, manifest)
            return FileMemory(self._buffers[segment.path], hold)

    def close(self) -> None:
        """Remove the files. Whoever maps one keeps its memory."""
        self._directory.close()


def _buffers_of(segment: Segment, manifest: IncomingManifest) -> Sequence[Buffer]:
    sizes = [one.dense_bytes for one in manifest.tensors]
    header = len(segment.memory) - segment.image.nbytes
    offsets = list(itertools.accumulate(sizes, initial=header))[: len(sizes)]
    return buffers_in(segment.memory, manifest.tensors, offsets)
