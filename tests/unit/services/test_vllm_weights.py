"""Which bytes an engine's workers load, with made-up workers and without vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xxhash

from ppod_services.core.weight_manifest import IncomingGroup, IncomingManifest, IncomingTensor
from ppod_services.core.weight_store import FileMemory
from ppod_services.core.weight_transfer import buffers_of
from ppod_services.core.weights import ServedWeights
from support.vllm_stand_in import without_vllm

BROADCAST, SENT = (np.full(4, value, "<f4").tobytes() for value in (1, 2))


class LoadingEngine:
    """An AsyncLLM with one worker, which loads bytes of a segment, or those of a broadcast that it received."""

    errored = False

    def __init__(self) -> None:
        self.received = b""
        self.loaded = b""

    async def get_supported_tasks(self) -> None: ...

    async def abort(self, request_ids: Sequence[str]) -> None: ...

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None: ...

    async def resume_generation(self) -> None: ...

    async def reset_prefix_cache(self) -> bool:
        return True

    async def update_weight_version(self, new_version: str) -> None: ...

    async def init_weight_transfer_engine(self, request: object) -> None: ...

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, request: Mapping[str, str]) -> None:
        self.received = BROADCAST
        with Path(request["segment"]).open("r+b") as segment:
            segment.write(BROADCAST)

    async def finish_weight_update(self) -> None:
        self.loaded = self.received

    async def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[object]:
        if method == "ppod_load_weights":
            self.loaded = Path(args[0]).read_bytes()[: len(SENT)]
        return [() if method == "ppod_received" else None]

    def shutdown(self, timeout_s: float) -> None: ...


def manifest(data: bytes, group: IncomingGroup | None = None) -> IncomingManifest:
    tensor = IncomingTensor("w", "float32", (4,), xxhash.xxh3_64_intdigest(data))
    return IncomingManifest(5, (tensor,), collective=group)


@pytest.mark.parametrize(
    ("way", "loaded"),
    [("broadcast", BROADCAST), ("stream", SENT), ("file", SENT)],
    ids=["broadcast", "stream", "file"],
)
def test_the_workers_load_what_was_prepared_last(way: str, loaded: bytes) -> None:
    with without_vllm():
        from ppod_services.generation.vllm_backend.host import EngineHost  # noqa: PLC0415
        from ppod_services.generation.vllm_backend.weight_store import VllmWeights  # noqa: PLC0415
        from ppod_services.generation.vllm_backend.worker_transfer import WorkerTransfer  # noqa: PLC0415
    engine = LoadingEngine()
    host = EngineHost(lambda: engine)  # pyright: ignore
    checkpoint = SimpleNamespace(read=lambda _: None)
    store = VllmWeights(host, {"w": (4,)}, set(), checkpoint, WorkerTransfer(host, 1))  # pyright: ignore
    weights = ServedWeights(store, lambda _: None)
    group = IncomingGroup("group", "trainer:1", "gloo", 1, 2, 2**16)
    transfer = weights.begin(manifest(BROADCAST, group))
    store.receive(transfer.manifest, 5)
    transfer.verify_in_place()
    weights.end(transfer, weights.stage(transfer))
    # Again, by another way and with other bytes.
    if way == "stream":
        transfer = weights.begin(manifest(SENT))
        transfer.write(SENT)
        weights.end(transfer, weights.stage(transfer))
    elif way == "file":
        tensor = torch.frombuffer(bytearray(SENT), dtype=torch.float32)
        hold = SimpleNamespace(uri="file:///w", release=lambda: None)
        transfer = weights.begin(manifest(SENT), FileMemory(buffers_of([tensor]), hold))
        transfer.verify_in_place()
        weights.end(transfer, weights.stage(transfer))
    weights.commit(5)
    host.close()
    assert engine.loaded == loaded
