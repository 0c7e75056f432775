"""Versions, transfers and the model's own tensors, in process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import xxhash
from peft import PeftModel
from torch import nn

from ppod import FailedPrecondition, InvalidArgument
from ppod.client import LoraAdapter as SentAdapter
from ppod.weight_changes import TensorEncoding, encode_changes
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.weight_manifest import IncomingManifest, IncomingTensor, LoraAdapter
from ppod_services.core.weight_store import FileMemory, Install, ReceivedWeights
from ppod_services.core.weight_transfer import buffers_of, bytes_of
from ppod_services.core.weights import ServedWeights
from ppod_trainer.adapter_weights import adapter_tensors
from ppod_trainer.errors import TrainerError
from support.tiny_adapter import build_adapted_model
from support.tiny_model import build_model


def served(model: nn.Module) -> tuple[ServedWeights, ModelWeights]:
    store = ModelWeights(model)
    return ServedWeights(store, lambda _: None), store


def whole(model: nn.Module, version: int, dtype: torch.dtype = torch.float32) -> tuple[IncomingManifest, bytes]:
    name = str(dtype).removeprefix("torch.")
    values = {key: value.detach().to(dtype).contiguous() for key, value in model.named_parameters()}
    data = {key: bytes_of(value).tobytes() for key, value in values.items()}
    tensors = tuple(
        IncomingTensor(key, name, tuple(value.shape), xxhash.xxh3_64_intdigest(data[key]))
        for key, value in values.items()
    )
    return IncomingManifest(version, tensors), b"".join(data.values())


def put(weights: ServedWeights, manifest: IncomingManifest, data: bytes, *, chunk: int = 10_000) -> None:
    transfer = weights.begin(manifest)
    staged = None
    try:
        for begin in range(0, len(data), chunk):
            transfer.write(data[begin : begin + chunk])
        staged = weights.stage(transfer)
    finally:
        weights.end(transfer, staged)
    weights.commit(manifest.weight_version)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


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
        assert (weights.version, weights.base_version) == (version, version)
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
    lent: list[torch.Tensor] = []
    storages: list[int] = []
    for version in range(1, 6):
        new = build_model(seed=version).to(torch.bfloat16)
        manifest, _ = whole(new, version, torch.bfloat16)
        mapped = [parameter.detach() for parameter in new.parameters()]
        lent.append(mapped[0].clone())
        prepare_lent(weights, manifest, FileMemory(buffers_of(mapped), CountedHold(f"file:///{version}")))
        weights.commit(version)
        assert_same(state(model), state(new.to(own)))
        assert torch.equal(mapped[0], lent[-1])
        storages.append(next(iter(model.parameters())).data_ptr())
        if own is torch.bfloat16:
            assert storages[-1] == mapped[0].data_ptr()
    assert own is torch.bfloat16 or len(set(storages[1:])) == 2


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
    assert weights.held_uris == (holds[1].uri,)
    weights.commit(1)
    serving = 0 if store is ModelWeights else 1
    assert released() == [1, serving]
    assert weights.held_uris == ((holds[1].uri,) if store is ModelWeights else ())

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
    assert weights.held_uris == ()
    assert weights.prepared_version is None


def test_a_model_with_tied_embeddings_stays_tied() -> None:
    model = build_model(seed=0, tied=True)
    weights, _ = served(model)
    put(weights, *whole(build_model(seed=1, tied=True), 1))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.arange(5).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, build_model(seed=1, tied=True)(tokens).logits)


def changed(new: nn.Module, base: nn.Module, version: int, base_version: int) -> tuple[IncomingManifest, bytes]:
    manifest, _ = whole(new, version)
    parts: list[bytes] = []
    tensors: list[IncomingTensor] = []
    for tensor, (_, new_value), (_, old_value) in zip(
        manifest.tensors, new.named_parameters(), base.named_parameters(), strict=True
    ):
        bits = [value.detach().contiguous().view(-1).numpy().view(np.uint32) for value in (new_value, old_value)]
        encoding, data = encode_changes(*bits)
        parts.append(data.tobytes())
        size = 0 if encoding is TensorEncoding.DENSE else len(data)
        tensors.append(IncomingTensor(tensor.name, tensor.dtype, tensor.shape, tensor.xxh3, encoding, size))
    return IncomingManifest(version, tuple(tensors), base_version), b"".join(parts)


def slightly_other(model: nn.Module, seed: int) -> nn.Module:
    """A model in which some elements of some tensors differ, and one tensor wholly."""
    other = build_model(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, (new, old) in enumerate(zip(other.parameters(), model.parameters(), strict=True)):
            if index % 3 == 2:
                continue
            keep = torch.rand(new.shape, generator=generator) < (1.0 if index % 3 else 0.99)
            new.copy_(torch.where(keep, old, new))
    return other


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
    assert weights.prepared_version is None


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
    owing = replace(manifest, tensors=tuple(replace(tensor, xxh3=None) for tensor in manifest.tensors))
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
    assert weights.prepared_version is None


def adapter_push(model: PeftModel, version: int, base_version: int) -> tuple[IncomingManifest, bytes]:
    sent, tensors = adapter_tensors(model, "default")
    assert isinstance(sent, SentAdapter)
    incoming = tuple(
        IncomingTensor(one.name, "float32", one.shape, xxhash.xxh3_64_intdigest(one.data)) for one in tensors
    )
    adapter = LoraAdapter(sent.rank, sent.alpha / sent.rank, sent.target_modules)
    return IncomingManifest(version, incoming, base_version, adapter), b"".join(bytes(one.data) for one in tensors)


def merged(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT itself makes of base and adapter."""
    return state(adapted.merge_and_unload())


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_adapters_come_and_go_without_a_trace() -> None:
    model = build_model(seed=0, tied=True)
    weights, store = served(model)
    base = state(model)
    put(weights, *adapter_push(build_adapted_model(seed=1), 1, 0))
    assert_close(state(model), merged(build_adapted_model(seed=1)))
    assert not torch.equal(
        model.get_parameter("model.layers.0.self_attn.q_proj.weight"), base["model.layers.0.self_attn.q_proj.weight"]
    )
    assert (weights.version, weights.base_version) == (1, 0)
    # Another adapter of other layers: the first one's layers are the base's again, to the bit.
    put(weights, *adapter_push(build_adapted_model(seed=2, target_modules=("v_proj",)), 2, 0))
    assert_close(state(model), merged(build_adapted_model(seed=2, target_modules=("v_proj",))))
    untouched = {name: value for name, value in base.items() if "v_proj" not in name}
    assert_same({name: state(model)[name] for name in untouched}, untouched)
    # And the first again gives what it gave.
    put(weights, *adapter_push(build_adapted_model(seed=1), 3, 0))
    again = state(model)
    assert_close(again, merged(build_adapted_model(seed=1)))
    image = store.image("model.layers.0.self_attn.q_proj.weight", "float32")
    assert image is not None
    assert torch.equal(image, base["model.layers.0.self_attn.q_proj.weight"])


class Interrupted(dict[str, nn.Parameter]):
    """Parameters; the first time that somebody looks one up, another thread begins its work."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], other: threading.Thread) -> None:
        super().__init__(parameters)
        self._other = other

    def __getitem__(self, name: str) -> nn.Parameter:
        found = super().__getitem__(name)
        if self._other.ident is None:
            before = found.data
            self._other.start()
            # Long enough for a swap that nothing keeps waiting.
            self._other.join(0.1)
            return cast(nn.Parameter, SimpleNamespace(data=before))
        return found


def test_an_adapter_that_is_staged_while_weights_are_installed_goes_on_no_other_adapter() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    layer = cast(nn.Linear, model[0])
    nn.init.zeros_(layer.weight)
    store = ModelWeights(model)
    adapter = LoraAdapter(1, 1.0, ("0",))

    def staged(version: int, value: float) -> Install:
        tensors = {name: torch.full(shape, value) for name, shape in store.shapes(adapter).items()}
        return store.stage(ReceivedWeights(version, tensors, adapter))

    staged(1, 1.0)()
    second = threading.Thread(target=store.stage(ReceivedWeights(2, {"0.weight": torch.full((2, 2), 5.0)})))
    store._parameters = Interrupted(store._parameters, second)
    third = staged(3, 3.0)
    if second.ident is None:
        second.start()
    second.join()
    assert layer.weight[0, 0].item() == 5.0
    third()
    assert layer.weight[0, 0].item() == 9.0, "3 * 3 on the first base's zeros, not on the first adapter"


def test_whole_weights_and_changes_after_an_adapter_find_the_base() -> None:
    model = build_model(seed=0)
    weights, _ = served(model)
    first = build_model(seed=1)
    put(weights, *whole(first, 1))
    put(weights, *adapter_push(build_adapted_model(seed=1), 2, 1))
    with pytest.raises(FailedPrecondition, match="base_version: the server has 1, the request needs 2"):
        put(weights, *adapter_push(build_adapted_model(seed=1), 3, 2))
    second = slightly_other(first, 2)
    put(weights, *changed(second, first, 3, 1))
    assert_same(state(model), state(second))
    assert weights.base_version == 3
    put(weights, *adapter_push(build_adapted_model(seed=1), 4, 3))
    put(weights, *whole(first, 5))
    assert_same(state(model), state(first))


@pytest.mark.parametrize(
    ("layer", "words"), [("model.norm", "linear layer"), ("lm_head", "weights of its own"), ("model.nothing", "linear")]
)
def test_adapters_of_what_is_no_layer_are_refused(layer: str, words: str) -> None:
    weights, _ = served(build_model(seed=0, tied=True))
    manifest = IncomingManifest(1, (), 0, LoraAdapter(4, 2.0, (layer,)))
    with pytest.raises(InvalidArgument, match=words):
        weights.begin(manifest)


def test_an_adapter_of_another_rank_than_its_tensors_is_refused() -> None:
    weights, _ = served(build_model(seed=0))
    manifest, _ = adapter_push(build_adapted_model(seed=1), 1, 0)
    assert manifest.adapter is not None
    lied = IncomingManifest(1, manifest.tensors, 0, LoraAdapter(8, 1.0, manifest.adapter.target_modules))
    with pytest.raises(InvalidArgument, match=r"lora_A.weight.shape: found \[4, 64\], expected \[8, 64\]"):
        weights.begin(lied)


def test_variants_of_lora_that_one_scaling_cannot_tell_are_refused() -> None:
    model = build_adapted_model(seed=1)
    model.peft_config["default"].rank_pattern = {"q_proj": 8}
    with pytest.raises(TrainerError, match="rank_pattern"):
        adapter_tensors(model, "default")
