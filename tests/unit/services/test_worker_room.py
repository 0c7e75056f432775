"""What is left of a device's memory to weights that wait there, by what CUDA tells of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from ppod_services.generation.vllm_backend import receiver, staging
from ppod_services.generation.vllm_backend.receiver import NO_MEMORY, VersionInfo, WorkerReceiver
from ppod_services.generation.vllm_backend.room import largest_layer_bytes, need_room
from ppod_services.generation.vllm_backend.segments import Segment
from ppod_services.generation.vllm_backend.staging import Copies, Stage

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class Memory:
    """Of a device; what torch keeps of what was freed comes back when it is told to give it back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, kept: int) -> None:
        self.free, self.kept, self.emptied = free, kept, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (self.free, 1_000))
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)

    def empty(self) -> None:
        self.free, self.kept, self.emptied = self.free + self.kept, 0, self.emptied + 1


@pytest.mark.parametrize(
    ("free", "kept", "emptied"), [(130, 0, 0), (130, 40, 0), (129, 1, 1), (90, 40, 1), (0, 500, 1)]
)
def test_there_is_room_beside_what_the_engine_needs(
    monkeypatch: pytest.MonkeyPatch, free: int, kept: int, emptied: int
) -> None:
    memory = Memory(monkeypatch, free, kept)
    need_room(CUDA, 100, 30)
    assert memory.emptied == emptied


def test_an_allocation_that_would_take_what_the_engine_needs_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(monkeypatch, 120, 9)
    with pytest.raises(torch.OutOfMemoryError, match=r"100 bytes are wanted, 129 are free, .* up to 30 of these"):
        need_room(CUDA, 100, 30)


def test_a_device_that_needs_nothing_new_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (0, 0))
    need_room(CUDA, 0, 30)
    need_room(CPU, 2**60, 30)
    assert asked == []
    with pytest.raises(torch.OutOfMemoryError):
        need_room(CUDA, 1, 0)
    assert set(asked) == {CUDA}


def test_the_largest_layer_is_of_its_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Linear(4, 5, dtype=torch.bfloat16), nn.Embedding(7, 2)))
    assert largest_layer_bytes(model) == 4 * (3 * 5 + 5)


def version(shapes: Sequence[tuple[int, ...]]) -> tuple[Segment, list[tuple[str, str, tuple[int, ...], int]]]:
    segment = Segment(shapes, [torch.float32] * len(shapes))
    found = zip("ab", shapes, segment.offsets, strict=True)
    return segment, [(name, "float32", shape, offset) for name, shape, offset in found]


def test_a_version_that_waits_needs_room_where_the_one_before_it_left_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(staging, "need_room", lambda _device, nbytes, spared: asked.append((nbytes, spared)))
    stage = Stage(CPU, Copies(CPU, lambda _: None), spared_bytes=30)
    for shapes in ([(3,), (5,)], [(3,), (5,)], [(4,), (5,)]):
        segment, tensors = version(shapes)
        stage.begin(segment.path, tensors, 1)
        assert stage.install(1)
    stage.drop()
    assert not stage.install(1)
    segment, tensors = version([(3,), (5,)])
    stage.begin(segment.path, tensors, 2)
    assert stage.install(2)
    assert asked == [(32, 30), (0, 30), (16, 30), (32, 30)]


def test_no_page_is_locked_of_a_version_for_which_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "need_room", full)
    monkeypatch.setattr(staging.LockedSegments, "map", lambda _self, path: pytest.fail(f"{path} was mapped"))
    segment, tensors = version([(3,), (5,)])
    stage = Stage(CPU, Copies(CPU, lambda _: None))
    stage.begin(segment.path, tensors, 1)
    assert not stage.install(1)


def full(_device: torch.device, nbytes: int, spared_bytes: int) -> None:
    raise torch.OutOfMemoryError(f"{nbytes} beside {spared_bytes}\nand more")


def test_a_version_that_workers_receive_is_refused_before_its_group_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "need_room", full)
    segment, tensors = version([(3,), (5,)])
    worker = WorkerReceiver(CPU, 0)
    worker.spared_bytes = 30
    received = [(name, dtype, shape, 0, offset) for name, dtype, shape, offset in tensors]
    worker.begin(VersionInfo(1, received, segment.path))
    worker.wait()
    assert worker.outcome() == (NO_MEMORY, "32 beside 30")
