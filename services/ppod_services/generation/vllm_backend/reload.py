"""Putting new weights into the model of a vLLM worker."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import nn

from ppod_services.generation.vllm_backend.checkpoint_form import checkpoint_form


class _Loads(Protocol):
    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None: ...


def load_pushed(config: Any, model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """As `reload_weights`, of weights as transformers holds them."""
    reload_weights(config, model, checkpoint_form(config.model_config.model).of(weights))


def reload_weights(config: Any, model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Put weights in checkpoint form through vLLM's loader, which splits, merges and packs them as at its start.

    Args:
        config: vLLM's, of the engine.
        model: the worker's.
        weights: names and tensors, on any device.

    Raises:
        ValueError: vLLM did not take a tensor, or some of its own parameters got none.
    """
    from vllm.config import set_current_vllm_config  # pyright: ignore  # noqa: PLC0415
    from vllm.model_executor.model_loader.reload import (  # pyright: ignore  # noqa: PLC0415
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    # One that is tied to another goes by the first name.
    expected = {name for name, _ in model.named_parameters()}
    # It warns of each tensor that travels in another type than the model computes in.
    logging.getLogger("vllm.model_executor.models.utils").setLevel(logging.ERROR)
    left = iter(weights)
    with torch.no_grad(), set_current_vllm_config(config):
        initialize_layerwise_reload(model)
        try:
            loaded = cast(_Loads, model).load_weights(left)
        finally:
            # Also after a failure: the next load must not find what this one left half done.
            finalize_layerwise_reload(model, config.model_config)
        _repack(model)
    if (one := next(left, None)) is not None:
        raise ValueError(f"vLLM did not take {one[0]}")
    missing = sorted(expected - loaded) if loaded is not None else []
    if missing:
        raise ValueError(f"{len(missing)} parameters of vLLM's model got no weights, the first {missing[0]}")


def _repack(model: nn.Module) -> None:
    """Pack what a CPU computes with in a layout of its own, and vLLM's reload leaves as it was.

    A head that shares the embedding's weight has a packed copy of its own, which would go on with old weights. And the
    experts of a layer lie as they came, where the kernel reads them as packed.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore  # noqa: PLC0415
        ParallelLMHead,
    )
    from vllm.platforms import current_platform  # pyright: ignore  # noqa: PLC0415

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            getattr(module, "quant_method").process_weights_after_loading(module)  # noqa: B009
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
