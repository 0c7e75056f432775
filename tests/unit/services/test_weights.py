"""Versions, transfers and the model's own tensors, in process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppod import FailedPrecondition, InvalidArgument
from ppod.weight_changes import TensorEncoding
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.shared_weights import SharedFile
from ppod_services.core.weight_manifest import IncomingManifest
from ppod_services.core.weight_store import FileMemory
from ppod_services.core.weight_transfer import buffers_of
from ppod_services.core.weights import ServedWeights
from support.served_weights import assert_same, changed, put, served, slightly_other, state, whole
from support.tiny_model import build_model


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_versions_follow_each_other_through_the_same_memory(own: torch.dtype, wire: torch.dtype) -> None:
    model = build_model(seed=0).to(own)
    weights, _ = served(model)
    storages: list[int] = []
    for version in range(1, 6):
        new = build_model(seed=version)
        put(weights, *whole(new, version, wire))
        assert_same(state(model), state(new.to(wire).to(own)))
        assert (weights.version, weights.status.base_version) == (version, version)
        storages.append(next(iter(model.parameters())).data_ptr())
    # Received into the memory that went out of service, not into ever new one.
    assert len(set(storages[1:])) == 2


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_the_memory_of_the_checkpoint_is_never_written_to(wire: torch.dtype) -> None:
    """It may be a mapped file, where each page that is written to is a fault and a copy."""
    model = build_model(seed=0)
    loaded = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights, _ = served(model)
    for version in range(1, 4):
        put(weights, *whole(build_model(seed=version), version, wire))
    assert_same(loaded, state(build_model(seed=0)))


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_borrowed_memory_is_never_received_into(own: torch.dtype) -> None:
    """Tensors in a sender's file serve as they are; where they are converted, the model's own memory is reused."""
    model = build_model(seed=0).to(own)
    weights, _ = served(model)
    lent: list[tuple[torch.Tensor, torch.Tensor]] = []
    storages: list[int] = []
    for version in range(1, 6):
        new = build_model(seed=version).to(torch.bfloat16)
        manifest, _ = whole(new, version, torch.bfloat16)
        mapped = [parameter.detach() for parameter in new.parameters()]
        lent.append((mapped[0], mapped[0].clone()))
        prepare_lent(weights, manifest, FileMemory(buffers_of(mapped), CountedHold(f"file:///{version}")))
        weights.commit(version)
        assert_same(state(model), state(new.to(own)))
        storages.append(next(iter(model.parameters())).data_ptr())
        if own is torch.bfloat16:
            assert storages[-1] == mapped[0].data_ptr()
    assert own is torch.bfloat16 or len(set(storages[1:])) == 2
    # Nor by those that come in chunks, once it went out of service.
    for version in (6, 7, 8):
        put(weights, *whole(build_model(seed=version), version, torch.bfloat16))
    assert all(torch.equal(found, was) for found, was in lent)


class CountedHold:
    """A `Hold` that tells how often it was released."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.released = 0

    def release(self) -> None:
        self.released += 1


def prepare_lent(weights: ServedWeights, manifest: IncomingManifest, memory: FileMemory) -> None:
    """The bytes are there already."""
    transfer = weights.begin(manifest, memory)
    staged = None
    try:
        transfer.verify_in_place()
        staged = weights.stage(transfer)
    finally:
        weights.end(transfer, staged)


def lend(seed: int, version: int) -> tuple[IncomingManifest, FileMemory, CountedHold]:
    new = build_model(seed=seed)
    hold = CountedHold(f"file:///{version}-{seed}")
    manifest, _ = whole(new, version)
    return manifest, FileMemory(buffers_of([parameter.detach() for parameter in new.parameters()]), hold), hold


class Copying(ModelWeights):
    """As on a device: nothing of a file serves."""

    @property
    def borrows(self) -> bool:
        return False


@pytest.mark.parametrize("store", [ModelWeights, Copying])
def test_a_file_is_held_for_as_long_as_its_memory_waits_or_serves(store: type[ModelWeights]) -> None:
    weights = ServedWeights(store(build_model(seed=0)), lambda _: None)
    holds: list[CountedHold] = []

    def released() -> list[int]:
        return [hold.released for hold in holds]

    for seed, version in ((1, 1), (2, 1)):
        manifest, memory, hold = lend(seed, version)
        holds.append(hold)
        prepare_lent(weights, manifest, memory)
    # The second one took the place of the first one, which never served.
    assert released() == [1, 0]
    assert weights.status.held_uris == (holds[1].uri,)
    weights.commit(1)
    serving = 0 if store is ModelWeights else 1
    assert released() == [1, serving]
    assert weights.status.held_uris == ((holds[1].uri,) if store is ModelWeights else ())

    manifest, memory, hold = lend(3, 2)
    holds.append(hold)
    prepare_lent(weights, manifest, memory)
    assert released() == [1, serving, 0]
    weights.commit(2)
    assert released() == [1, 1, serving]


def test_a_file_that_is_refused_or_damaged_is_not_held() -> None:
    weights, _ = served(build_model(seed=0))
    put(weights, *whole(build_model(seed=1), 1))
    stale, memory, old = lend(2, 1)
    with pytest.raises(FailedPrecondition, match="weight_version"):
        weights.begin(stale, memory)
    assert old.released == 1
    manifest, memory, damaged = lend(2, 2)
    memory.buffers[0].tensor[0, 0] += 1
    with pytest.raises(InvalidArgument, match="xxh3"):
        prepare_lent(weights, manifest, memory)
    assert damaged.released == 1
    assert weights.status.held_uris == ()
    assert weights.status.prepared_version is None


def test_a_model_with_tied_embeddings_stays_tied() -> None:
    model = build_model(seed=0, tied=True)
    weights, _ = served(model)
    put(weights, *whole(build_model(seed=1, tied=True), 1))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.arange(5).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, build_model(seed=1, tied=True)(tokens).logits)


@pytest.mark.parametrize("chunk", [1, 999, 10_000_000])
def test_changes_against_the_serving_version_are_exact(chunk: int) -> None:
    model = build_model(seed=0)
    weights, _ = served(model)
    first = build_model(seed=1)
    put(weights, *whole(first, 1))
    second = slightly_other(first, 2)
    manifest, data = changed(second, first, 2, 1)
    assert {tensor.encoding for tensor in manifest.tensors} == set(TensorEncoding)
    assert len(data) < sum(tensor.dense_bytes for tensor in manifest.tensors) / 2
    if chunk == 1:
        data_chunk = 37
        put(weights, manifest, data, chunk=data_chunk)
    else:
        put(weights, manifest, data, chunk=chunk)
    assert_same(state(model), state(second))


def test_changes_against_another_version_are_refused() -> None:
    model = build_model(seed=0)
    weights, _ = served(model)
    first = build_model(seed=1)
    put(weights, *whole(first, 1))
    manifest, data = changed(slightly_other(first, 2), first, 3, 2)
    with pytest.raises(FailedPrecondition, match="base_version: the server has 1, the request needs 2"):
        put(weights, manifest, data)
    # The right number on top of other weights: what comes out is not what the manifest says.
    other = build_model(seed=5)
    wrong, data = changed(slightly_other(other, 2), other, 3, 1)
    with pytest.raises(InvalidArgument, match="xxh3"):
        put(weights, wrong, data)
    assert_same(state(model), state(first))
    assert weights.version == 1
    assert weights.status.prepared_version is None


def test_a_narrower_model_keeps_no_image_to_apply_changes_to() -> None:
    model = build_model(seed=0).to(torch.bfloat16)
    weights, _ = served(model)
    first = build_model(seed=1)
    put(weights, *whole(first, 1))
    manifest, data = changed(slightly_other(first, 2), first, 2, 1)
    with pytest.raises(FailedPrecondition, match="no exact float32 image"):
        put(weights, manifest, data)


def test_checksums_that_the_sender_has_not_confirmed_are_told_to_nobody() -> None:
    weights, _ = served(build_model(seed=0))
    manifest, data = whole(build_model(seed=1), 1)
    sums = [tensor.xxh3 for tensor in manifest.tensors]
    owing = replace(manifest, tensors=tuple(tensor._replace(xxh3=None) for tensor in manifest.tensors))
    transfer = weights.begin(owing)
    transfer.write(data)
    with pytest.raises(InvalidArgument, match="checksums: found end of stream"):
        _ = transfer.checksums
    transfer.verify([one or 0 for one in sums])
    assert transfer.checksums == sums
    weights.end(transfer, None)


def test_a_version_that_overtakes_a_transfer_ends_it() -> None:
    model = build_model(seed=0)
    weights, _ = served(model)
    manifest, data = whole(build_model(seed=1), 5)
    put(weights, *whole(build_model(seed=2), 3))
    transfer = weights.begin(manifest)
    transfer.write(data)
    staged = weights.stage(transfer)
    # As if version 6, prepared before, had been committed meanwhile.
    weights._version = 6  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(FailedPrecondition, match="less than 5"):
        weights.end(transfer, staged)
    assert weights.status.prepared_version is None


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}',
        b'{"a": ' + b"[" * 100_000,
        b'{"a": null}',
        b"[]",
        b"\xff",
    ],
    ids=["infinite", "deep", "null", "list", "binary"],
)
def test_a_header_that_no_safetensors_has_is_the_senders_fault(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with (
        SharedFile(path.as_uri(), [tmp_path]) as file,
        pytest.raises(InvalidArgument, match="uri: found a header that"),
    ):
        file.offsets(header, IncomingManifest(1, ()))
