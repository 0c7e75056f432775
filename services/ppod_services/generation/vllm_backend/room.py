"""Whether a worker's device has room for weights beside its engine. Free of vLLM."""

from __future__ import annotations

import torch
from torch import nn


def need_room(device: torch.device, nbytes: int, spared_bytes: int) -> None:
    """Tell before the engine suffers from it that a device has no room.

    An allocation may well succeed and take what the engine needs a moment later, which would end it.

    Args:
        device: where the memory is wanted; of a CPU's none is spared.
        nbytes: how much is wanted.
        spared_bytes: how much must be free besides.

    Raises:
        OutOfMemoryError: as if the device were full.
    """
    if device.type != "cuda" or not nbytes:
        return
    free, _ = torch.cuda.mem_get_info(device)
    if free < nbytes + spared_bytes:
        # torch keeps what was freed, of versions before as of a step's activations.
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    if free < nbytes + spared_bytes:
        raise torch.OutOfMemoryError(
            f"{nbytes} bytes are wanted, {free} are free, and the engine takes up to {spared_bytes} of these at times"
        )


def largest_layer_bytes(model: nn.Module) -> int:
    """What a load needs besides: vLLM fills each layer's parameters anew before they are copied to their places."""
    return max(sum(one.nbytes for one in layer.parameters(recurse=False)) for layer in model.modules())
