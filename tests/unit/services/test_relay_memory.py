"""The files that a server receives into for others."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

from ppod_services.core.relay_files import RelayFiles
from ppod_services.core.weight_manifest import IncomingManifest, IncomingTensor


def test_memory_of_files_that_were_removed_is_given_back(tmp_path: Path) -> None:
    files = RelayFiles(tmp_path)
    kept = []
    for dtype in ("float32", "bfloat16"):
        memory = files.memory(IncomingManifest(1, (IncomingTensor("w", dtype, (4,), 0),)))
        memory.hold.release()
        kept.append(weakref.ref(memory.buffers[0].tensor))
        del memory
    gc.collect()
    assert [one() is None for one in kept] == [True, False]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    files.close()
