"""A policy's parameters become the bytes that travel, whatever their layout, and each checksum is of those bytes."""

from __future__ import annotations

import pytest
import torch
import xxhash
from torch import nn

from ppod.client import WEIGHT_BLOCK_BYTES, WeightTensor, WireImage
from ppod_trainer.policy_weights import PolicyTensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = 5 * WEIGHT_BLOCK_BYTES + 3
"""Elements of several blocks and a rest, also of the blocks that are converted."""


class Shapes(nn.Module):
    """Parameters of all kinds: several blocks long, a transposed view, a scalar, and one without elements."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large = nn.Parameter(torch.randn(LARGE).to(dtype))
        self.transposed = nn.Parameter(torch.randn(5, 3).to(dtype).T)
        self.scalar = nn.Parameter(torch.randn(()).to(dtype))
        self.empty = nn.Parameter(torch.empty(0, 4, dtype=dtype))


def expected(model: nn.Module, dtype: torch.dtype) -> dict[str, bytes]:
    return {
        name: parameter.detach().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
    }


def sent(tensors: list[WeightTensor]) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in tensors}


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("own", DTYPES)
def test_an_image_holds_the_parameters_in_the_type_that_travels(own: torch.dtype, wire: torch.dtype) -> None:
    model = Shapes(own)
    policy = PolicyTensors(model, wire)
    image = WireImage(policy.layout)
    for _ in range(2):
        image.fill(policy.write)
        tensors = image.tensors()
        assert sent(tensors) == expected(model, wire)
        assert [one.xxh3 for one in tensors] == [xxhash.xxh3_64_intdigest(one.data) for one in tensors]
        assert [one.shape for one in tensors] == [(LARGE,), (3, 5), (), (0, 4)]
        with torch.no_grad():
            model.large += 1
    assert sent(image.tensors()) != expected(model, wire), "what was filled stays until it is filled anew"


@pytest.mark.parametrize("wire", DTYPES)
def test_tensors_are_the_same_bytes_without_an_image(wire: torch.dtype) -> None:
    model = Shapes(torch.float32)
    assert sent(PolicyTensors(model, wire).tensors()) == expected(model, wire)


def test_parameters_that_travel_as_they_are_are_not_copied() -> None:
    model = nn.Linear(3, 2)
    policy = PolicyTensors(model, torch.float32)
    assert policy.in_place
    assert not policy.on_device
    tensors = policy.tensors()
    with torch.no_grad():
        model.weight.fill_(2.0)
    assert sent(tensors) == expected(model, torch.float32)
    assert not PolicyTensors(model, torch.bfloat16).in_place
    assert not PolicyTensors(Shapes(torch.float32), torch.float32).in_place, "one is a view that must be copied first"
