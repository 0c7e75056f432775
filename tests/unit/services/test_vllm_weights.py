"""Which bytes an engine's workers load, with made-up workers and without vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xxhash

from ppod.errors import FailedPrecondition, Internal, InvalidArgument, Unavailable
from ppod_models.process_groups import GroupError
from ppod_services.core.weight_manifest import IncomingGroup, IncomingManifest, IncomingTensor
from ppod_services.core.weight_store import FileMemory
from ppod_services.core.weight_transfer import buffers_of
from ppod_services.core.weights import ServedWeights
from ppod_services.generation.vllm_backend.segments import Segment
from support.vllm_stand_in import without_vllm

BROADCAST, SENT = (np.full(4, value, "<f4").tobytes() for value in (1, 2))


class LoadingEngine:
    """An AsyncLLM with one worker, which loads bytes of a segment, or those of a broadcast that it received."""

    errored = False

    def __init__(self) -> None:
        self.received = b""
        self.loaded = b""
        self.engine_core = self

    async def get_supported_tasks(self) -> None: ...

    async def abort(self, request_ids: Sequence[str]) -> None: ...

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None: ...

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
    checkpoint = SimpleNamespace(read=lambda _: None, quantisation=None)
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


class FailingEngine(LoadingEngine):
    """Two workers, which end with these outcomes once they were asked a second time."""

    def __init__(self, outcomes: Sequence[tuple[str, ...]]) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._outcomes = outcomes

    async def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[object]:
        del args
        self.calls.append(method)
        if method != "ppod_received":
            return [None, None]
        return [*self._outcomes] if self.calls.count(method) == 2 else [self._outcomes[0], None]


@pytest.mark.parametrize(
    ("outcomes", "kind", "words"),
    [
        (
            [("group", "it broke"), ("checksum", "w", "0a", "0b")],
            InvalidArgument,
            "tensors.w.xxh3: found 0a, expected 0b",
        ),
        ([("memory", "CUDA out of memory"), ("group", "it broke")], FailedPrecondition, "device: CUDA out of memory"),
        ([("memory", "CUDA out of memory"), ()], FailedPrecondition, "16 bytes free beside"),
        ([(), ("failed", "OSError: gone")], Internal, "a worker could not receive weights: OSError: gone"),
        ([(), ("group", "it broke")], GroupError, "it broke"),
    ],
    ids=["checksum", "memory", "one without memory", "failed", "group"],
)
def test_one_worker_s_own_trouble_is_told_before_what_it_did_to_the_group(
    outcomes: list[tuple[str, ...]], kind: type[Exception], words: str
) -> None:
    with without_vllm():
        from ppod_services.generation.vllm_backend.host import EngineHost  # noqa: PLC0415
        from ppod_services.generation.vllm_backend.worker_transfer import WorkerTransfer  # noqa: PLC0415
    engine = FailingEngine(outcomes)
    host = EngineHost(lambda: engine)  # pyright: ignore
    workers = WorkerTransfer(host, 2)
    group = IncomingGroup("group", "trainer:1", "gloo", 1, 3, 2**16, 2)
    with pytest.raises(kind) as raised:
        workers.receive(manifest(BROADCAST, group), Segment([(4,)], [torch.float32]), 5)
    host.close()
    assert words in str(raised.value)
    # What one of them has is worth nothing without the others.
    assert engine.calls == ["ppod_drop_received", "ppod_received", "ppod_received", "ppod_drop_received"]
    assert workers.version is None


def test_a_call_of_an_engine_that_ends_is_not_waited_for() -> None:
    class EndingEngine(LoadingEngine):
        async def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[object]:
            del method, args
            self.errored = True
            return await asyncio.get_running_loop().create_future()

    with without_vllm():
        from ppod_services.generation.vllm_backend.host import EngineHost  # noqa: PLC0415
    host = EngineHost(EndingEngine)  # pyright: ignore
    with pytest.raises(Unavailable, match="engine processes ended"):
        host.call(lambda engine: engine.collective_rpc("ppod_staged"))
    host.close()


def test_an_engine_of_a_quantised_model_takes_no_weights() -> None:
    """Before any are sent; vLLM's loaders would fail when they are to serve."""
    with without_vllm():
        from ppod_services.generation.vllm_backend.weight_store import VllmWeights  # noqa: PLC0415
    store = VllmWeights(None, {"w": (4,)}, set(), SimpleNamespace(quantisation="mxfp4"))  # pyright: ignore
    with pytest.raises(FailedPrecondition, match=r"^model: the server has a model quantised by mxfp4, "):
        ServedWeights(store, lambda _: None).begin(manifest(SENT))
