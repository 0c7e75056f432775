"""Pushing the policy's weights to the services that run copies of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ppod.client import TensorDtype, WeightClient, WeightTensor
from ppod_trainer.errors import ServiceMismatchError


def wire_tensors(model: PreTrainedModel, dtype: torch.dtype) -> list[WeightTensor]:
    """The model's parameters, tied ones once, as bytes in `dtype` (bfloat16 or float32)."""
    return list(_convert(model, dtype))


def push_weights(client: WeightClient, model: PreTrainedModel, dtype: torch.dtype, weight_version: int) -> int:
    """Send the model's weights and put them into service under `weight_version`. Returns the bytes sent.

    Raises:
        PpodError: the transfer failed; the service goes on with its old version.
        ServiceMismatchError: the service reports another version than the one committed.
    """
    sent = client.prepare(weight_version, wire_tensors(model, dtype))
    client.commit(weight_version)
    serving = client.status().state.weight_version
    if serving != weight_version:
        raise ServiceMismatchError(
            f"{client.target} serves weight version {serving} after version {weight_version} was committed; "
            "does another trainer push to it?"
        )
    return sent


@torch.no_grad()
def _convert(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[WeightTensor]:
    wire = TensorDtype.BFLOAT16 if dtype == torch.bfloat16 else TensorDtype.FLOAT32
    for name, parameter in model.named_parameters():
        flat = parameter.detach().to("cpu", torch.bfloat16 if wire is TensorDtype.BFLOAT16 else torch.float32)
        data = memoryview(flat.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        yield WeightTensor(name, wire, tuple(parameter.shape), data)
