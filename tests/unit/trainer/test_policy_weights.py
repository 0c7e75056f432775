"""A policy's parameters become the bytes that travel, whatever their layout, and each checksum is of those bytes."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import pytest
import torch
import xxhash
from torch import nn

from ppod.client import WEIGHT_BLOCK_BYTES, WeightTensor, WireImage
from ppod_trainer.policy_weights import KnownPolicies, PolicyTensors

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
    assert policy.device is None
    tensors = policy.tensors()
    with torch.no_grad():
        model.weight.fill_(2.0)
    assert sent(tensors) == expected(model, torch.float32)
    assert not PolicyTensors(model, torch.bfloat16).in_place
    assert not PolicyTensors(Shapes(torch.float32), torch.float32).in_place, "one is a view that must be copied first"


def replace_parameter(model: nn.Linear) -> None:
    model.weight = nn.Parameter(torch.zeros(2, 3))


def move_parameter(model: nn.Linear) -> None:
    model.weight.data = torch.zeros(2, 3)


def turn_parameter(model: nn.Linear) -> None:
    model.weight.data = model.weight.data.view(3, 2)


def add_parameter(model: nn.Linear) -> None:
    model.register_parameter("scale", nn.Parameter(torch.ones(4)))


def drop_parameter(model: nn.Linear) -> None:
    model.bias = None


def test_a_policy_that_changed_only_its_values_is_known_again() -> None:
    model, policies = nn.Linear(3, 2), KnownPolicies()
    policy = policies.tensors_of(model, torch.float32)
    with torch.no_grad():
        model.weight.fill_(2.0)
    assert policies.tensors_of(model, torch.float32) is policy
    assert sent(policy.tensors()) == expected(model, torch.float32)


@pytest.mark.parametrize("change", [replace_parameter, move_parameter, turn_parameter, add_parameter, drop_parameter])
def test_a_policy_whose_parameters_are_others_is_read_anew(change: Callable[[nn.Linear], None]) -> None:
    model, policies = nn.Linear(3, 2), KnownPolicies()
    policies.tensors_of(model, torch.float32)
    change(model)
    policy = policies.tensors_of(model, torch.float32)
    assert sent(policy.tensors()) == expected(model, torch.float32)
    assert [one.shape for one in policy.layout] == [tuple(one.shape) for one in model.parameters()]


def test_a_policy_is_known_for_one_type_and_for_as_long_as_its_model_is_there() -> None:
    model, policies = nn.Linear(3, 2), KnownPolicies()
    policies.tensors_of(model, torch.float32)
    assert sent(policies.tensors_of(model, torch.bfloat16).tensors()) == expected(model, torch.bfloat16)
    memory = ref(policies.tensors_of(model, torch.float32))
    del model
    assert memory() is None, "a gathered copy would stay beside the policy"
