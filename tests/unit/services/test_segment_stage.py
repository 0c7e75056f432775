"""Weights that wait on a worker's device: here the CPU."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch

from ppod_services.core.side_stream import SideStream
from ppod_services.generation.vllm_backend.segments import Segment
from ppod_services.generation.vllm_backend.staging import (
    Copies,
    LockedSegments,
    Stage,
    TensorAt,
    Weights,
    read_segment,
)

SHAPES = [(3, 5), (0, 2), (7,)]
DTYPES = [torch.float32, torch.float32, torch.bfloat16]
NAMES = ("a", "empty", "b")
CPU = torch.device("cpu")


def filled(seed: int) -> tuple[Segment, list[TensorAt], dict[str, torch.Tensor]]:
    """A segment with random tensors, how a worker finds them, and what they are."""
    generator = torch.Generator().manual_seed(seed)
    segment = Segment(SHAPES, DTYPES)
    for tensor in segment.tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    found = list(zip(NAMES, names, SHAPES, segment.offsets, strict=True))
    return segment, found, {name: tensor.clone() for name, tensor in zip(NAMES, segment.tensors, strict=True)}


def assert_holds(found: object, expected: dict[str, torch.Tensor]) -> None:
    assert found is not None
    tensors = dict(found)  # type: ignore[call-overload]
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


class Loader:
    """What a worker's stage lets serve."""

    def __init__(self) -> None:
        self.stage = Stage(CPU, Copies(CPU, self.load))
        self.loaded: dict[str, torch.Tensor] | None = None

    def load(self, weights: Weights) -> None:
        self.loaded = dict(weights)

    def install(self, version: int) -> dict[str, torch.Tensor] | None:
        """What serves then; None: the version is not there."""
        self.loaded = None
        assert self.stage.install(version) is (self.loaded is not None)
        return self.loaded


def test_a_segment_is_read_by_its_path() -> None:
    segment, tensors, expected = filled(0)
    assert_holds(read_segment(segment.path, tensors), expected)


def test_a_version_is_taken_once_and_outlives_its_segment() -> None:
    loader = Loader()
    stage = loader.stage
    assert stage.done
    for version in (1, 2):
        segment, tensors, expected = filled(version)
        stage.begin(segment.path, tensors, version)
        assert loader.install(version + 5) is None, "another version"
        stage.begin(segment.path, tensors, version)
        stage._wait()
        for tensor in segment.tensors:
            tensor.zero_()
        assert_holds(loader.install(version), expected)
        assert loader.install(version) is None, "a second time"


def test_segments_stay_mapped_while_versions_come_in_turns() -> None:
    segments = LockedSegments(CPU)
    first, second = (Segment(SHAPES, DTYPES) for _ in range(2))
    mapped = [segments.map(segment.path) for segment in (first, second)]
    for segment, memory in zip((first, second, first), (*mapped, mapped[0]), strict=True):
        assert segments.map(segment.path) is memory
    third = Segment(SHAPES, DTYPES)
    segments.map(third.path)
    assert segments.map(first.path) is mapped[0], "of the last two"
    assert segments.map(second.path) is not mapped[1]


def test_another_segment_with_the_same_path_is_another_one() -> None:
    """A descriptor's number is given to the next one as soon as it is closed."""
    loader = Loader()
    stage = loader.stage
    paths: set[str] = set()
    for version in range(1, 5):
        segment, tensors, expected = filled(version)
        paths.add(segment.path)
        stage.begin(segment.path, tensors, version)
        assert_holds(loader.install(version), expected)
        del segment
    assert len(paths) < 4


def test_where_there_is_no_room_nothing_is_staged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    segment, tensors, expected = filled(3)
    loader = Loader()
    stage = loader.stage
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(torch, "empty_like", full)
        stage.begin(segment.path, tensors, 3)
        assert loader.install(3) is None
    assert "no room on cpu" in caplog.text
    stage.begin(segment.path, tensors, 3)
    assert_holds(loader.install(3), expected)


def test_what_goes_wrong_on_the_way_is_told_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the host has no memory, or a loader takes no such weights: their commit will tell who pushed them."""

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    segment, tensors, expected = filled(3)
    loader = Loader()
    stage = loader.stage
    stage.begin(segment.path, tensors, 2)
    stage._wait()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Copies, "fill", refuse)
        stage.begin(segment.path, tensors, 3)
        assert loader.install(3) is None
    assert "could not be brought to cpu (RuntimeError: can't allocate memory): they are loaded at" in caplog.text
    assert stage._waiting.wanted_bytes(tensors) == sum(tensor.nbytes for tensor in expected.values())
    stage.begin(segment.path, tensors, 3)
    assert_holds(loader.install(3), expected)


def test_what_had_room_before_the_rest_had_none_is_left_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps freed memory of a device, and gives back what nobody holds any more."""
    had_room: list[weakref.ref[torch.Tensor]] = []
    held: list[bool] = []
    empty_like = torch.empty_like

    def nearly_full(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if had_room:
            raise torch.OutOfMemoryError("full")
        made = empty_like(tensor, device=device)
        had_room.append(weakref.ref(made))
        return made

    def give_back(_: SideStream) -> None:
        held.extend(one() is not None for one in had_room)

    monkeypatch.setattr(torch, "empty_like", nearly_full)
    monkeypatch.setattr(SideStream, "give_back", give_back)
    segment, tensors, _ = filled(3)
    loader = Loader()
    stage = loader.stage
    stage.begin(segment.path, tensors, 3)
    assert loader.install(3) is None
    assert held == [False]


def test_memory_of_a_device_is_given_back_and_of_the_host_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    SideStream(CPU).give_back()
    assert calls == []
    SideStream(torch.device("cuda:1")).give_back()
    assert calls == ["empty"]
