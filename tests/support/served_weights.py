"""Versions of weights that are put into service in process."""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from torch import nn

from ppod.weight_changes import TensorEncoding, encode_changes
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.weight_manifest import IncomingManifest, IncomingTensor
from ppod_services.core.weight_transfer import bytes_of
from ppod_services.core.weights import ServedWeights
from support.tiny_model import build_model


def served(model: nn.Module) -> tuple[ServedWeights, ModelWeights]:
    """Weights around a model, and their store."""
    store = ModelWeights(model)
    return ServedWeights(store, lambda _: None), store


def whole(model: nn.Module, version: int, dtype: torch.dtype = torch.float32) -> tuple[IncomingManifest, bytes]:
    """A push of a whole model: its manifest, and all its bytes."""
    name = str(dtype).removeprefix("torch.")
    values = {key: value.detach().to(dtype).contiguous() for key, value in model.named_parameters()}
    data = {key: bytes_of(value).tobytes() for key, value in values.items()}
    tensors = tuple(
        IncomingTensor(key, name, tuple(value.shape), xxhash.xxh3_64_intdigest(data[key]))
        for key, value in values.items()
    )
    return IncomingManifest(version, tensors), b"".join(data.values())


def put(weights: ServedWeights, manifest: IncomingManifest, data: bytes, *, chunk: int = 10_000) -> None:
    """Have a version received, prepared and committed."""
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
    """A copy of a model's parameters."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


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
