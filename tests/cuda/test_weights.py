"""Pushed weights on a CUDA device: they wait there, and take their places without a copy."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import xxhash

from ppod.client import with_checksums
from ppod_models.page_locks import page_locked
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.weight_manifest import IncomingTensor
from ppod_services.core.weight_store import ReceivedWeights
from ppod_services.generation.vllm_backend.segments import Segment
from ppod_services.generation.vllm_backend.staging import Copies, LockedSegments, Stage
from ppod_trainer.policy_weights import PolicyTensors
from ppod_trainer.weight_planes import HostCopy, Outgoing
from support.tiny_model import build_model

DEVICE = torch.device("cuda:0")


def received(store: ModelWeights, values: Mapping[str, torch.Tensor], version: int, dtype: torch.dtype):
    """The values as they come: in buffers of the store, on the CPU."""
    name = str(dtype).removeprefix("torch.")
    tensors = [IncomingTensor(key, name, tuple(value.shape), 0) for key, value in values.items()]
    buffers = store.allocate(tensors)
    for buffer, value in zip(buffers, values.values(), strict=True):
        assert buffer.device.type == "cpu"
        buffer.copy_(value)
    return ReceivedWeights(version, dict(zip(values, buffers, strict=True)))


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in build_model(seed=seed).named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_versions_wait_on_the_device_and_change_places(dtype: torch.dtype) -> None:
    model = build_model().to(DEVICE, dtype)
    store = ModelWeights(model)
    places: list[set[int]] = []
    for version in range(1, 5):
        before = {name: value.clone() for name, value in model.named_parameters()}
        values = weights_of(version)
        install = store.stage(received(store, values, version, torch.bfloat16))
        for name, value in model.named_parameters():
            assert torch.equal(value, before[name]), f"{name} changed before its commit"
        memory = torch.cuda.memory_allocated()
        install()
        assert torch.cuda.memory_allocated() == memory, "a commit copies"
        for name, value in model.named_parameters():
            assert value.device == DEVICE
            assert value.dtype == dtype
            assert torch.equal(value.cpu(), values[name].to(torch.bfloat16).to(dtype)), name
        places.append({value.data_ptr() for value in model.parameters()})
    assert places[0] == places[2]
    assert places[1] == places[3]


def test_from_the_second_version_on_it_is_received_into_page_locked_memory() -> None:
    store = ModelWeights(build_model().to(DEVICE))
    for version in range(1, 4):
        arrived = received(store, weights_of(version), version, torch.bfloat16)
        assert all(tensor.is_pinned() for tensor in arrived.tensors.values()) == (version > 1)
        store.stage(arrived)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_on_the_device_is_sent_as_it_is(dtype: torch.dtype) -> None:
    model = build_model(seed=7).to(DEVICE, dtype)
    policy = PolicyTensors(model, torch.bfloat16)
    expected = [value.detach().to("cpu", torch.bfloat16) for value in model.parameters()]
    copy = HostCopy()
    for version in range(1, 3):
        with copy.tensors(Outgoing(version, policy, None)) as arriving:
            tensors = with_checksums(arriving)
        for tensor, value in zip(tensors, expected, strict=True):
            data = value.contiguous().view(-1).view(torch.uint8).numpy()
            assert bytes(tensor.data) == data.tobytes()
            assert tensor.xxh3 == xxhash.xxh3_64_intdigest(data)
    copy.close()


def test_memory_is_locked_and_let_go() -> None:
    memory, lock = page_locked(3_000_000, DEVICE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    assert lock.locked
    assert tensor.is_pinned()
    lock.close()
    assert not tensor.is_pinned()


def test_a_worker_copies_a_segment_from_locked_pages() -> None:
    values = weights_of(4)
    segment = Segment([value.shape for value in values.values()], [value.dtype for value in values.values()])
    tensors = [
        (name, "float32", tuple(value.shape), offset)
        for (name, value), offset in zip(values.items(), segment.offsets, strict=True)
    ]
    for tensor, value in zip(segment.tensors, values.values(), strict=True):
        tensor.copy_(value)
    memory = LockedSegments(DEVICE).map(segment.path)
    assert torch.frombuffer(memory, dtype=torch.uint8).is_pinned()
    loaded: dict[str, torch.Tensor] = {}
    stage = Stage(DEVICE, Copies(DEVICE, loaded.update))
    stage.begin(segment.path, tensors, 1)
    assert stage.install(1)
    assert loaded.keys() == values.keys()
    for name, tensor in loaded.items():
        assert tensor.device == DEVICE
        assert torch.equal(tensor.cpu(), values[name]), name


def test_what_has_no_room_is_copied_at_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model().to(DEVICE)
    store = ModelWeights(model)
    values = weights_of(1)
    arrived = received(store, values, 1, torch.float32)

    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        install = store.stage(arrived)
    install()
    for name, value in model.named_parameters():
        assert torch.equal(value.cpu(), values[name]), name


def test_an_image_of_what_serves_is_exact() -> None:
    model = build_model().to(DEVICE)
    store = ModelWeights(model)
    values = weights_of(3)
    store.stage(received(store, values, 1, torch.bfloat16))()
    for name, value in values.items():
        image = store.image(name, "bfloat16")
        assert image is not None
        assert torch.equal(image, value.to(torch.bfloat16))
