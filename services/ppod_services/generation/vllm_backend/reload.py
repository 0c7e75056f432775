"""Putting new weights into the model of a vLLM worker."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack
from typing import Any, Protocol, cast

import torch
from torch import nn

from ppod_services.generation.vllm_backend.checkpoint_form import CheckpointForm, checkpoint_form
from ppod_services.generation.vllm_backend.experts import pack_experts


class Loads(Protocol):
    """What vLLM's models have."""

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None:
        """Load weights in checkpoint form; returns the parameters that got some, where the model tells."""
        ...


def load_pushed(config: Any, model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """As `reload_weights`, of weights as transformers holds them."""
    reload_weights(config, model, form_of(config).of(weights))


def form_of(config: Any) -> CheckpointForm:
    """What turns weights as transformers holds them into what the engine's loader takes."""
    from vllm.config import set_current_vllm_config  # pyright: ignore  # noqa: PLC0415

    # vLLM may have changed the model's class to one that asks for this: it runs what it does not know by transformers.
    with set_current_vllm_config(config):
        return checkpoint_form(config.model_config.model)


def hush_loaders() -> None:
    """Have vLLM's loaders not warn of each tensor that travels in another type than the model computes in."""
    logging.getLogger("vllm.model_executor.models.utils").setLevel(logging.ERROR)


def reload_weights(
    config: Any, model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], *, first: bool = False
) -> None:
    """Put weights in checkpoint form through vLLM's loader, which splits, merges and packs them as at its start.

    Args:
        config: vLLM's, of the engine.
        model: the worker's.
        weights: names and tensors, on any device.
        first: they are those that the engine started with, and a layer that cannot be loaded again still has.

    Raises:
        ValueError: vLLM did not take a tensor, or some of its own parameters got none.
    """
    from vllm.config import set_current_vllm_config  # pyright: ignore  # noqa: PLC0415
    from vllm.model_executor.model_loader.reload import (  # pyright: ignore  # noqa: PLC0415
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    names = first_names(model)
    expected = set(names.values())
    hush_loaders()
    left, lost = iter(weights), dict[str, bool]()
    with torch.no_grad(), set_current_vllm_config(config):
        initialize_layerwise_reload(model)
        # Not what vLLM itself makes of others once they are loaded, as of MLA's; it does so again at the end.
        expected &= {name for name, _ in model.named_parameters(remove_duplicate=False)}
        with ExitStack() as failed:
            # Left last to first: the next load must not find what this one left half done.
            failed.callback(finalize_layerwise_reload, model, config.model_config)
            failed.callback(_forget, model)
            loaded = cast(Loads, model).load_weights(left)
            lost = _lost(model, expected)
            finalize_layerwise_reload(model, config.model_config)
            failed.pop_all()
        _repack(model, {name.rpartition(".")[0] for name in lost})
    check_taken(left, expected, expected if loaded is None else {names.get(name, name) for name in loaded})
    if gone := [name for name, kept in lost.items() if not (kept and first)]:
        kind = type(model).__name__
        raise ValueError(f"vLLM's loader of {kind} lost {len(gone)} parameters on their way, the first {gone[0]}")


def first_names(model: nn.Module) -> dict[str, str]:
    """For every name of a parameter the first one of it: a tied one has more, and so have those of a shared module.

    Which of them a loader tells is its own choice.
    """
    firsts: dict[int, str] = {}
    return {name: firsts.setdefault(id(one), name) for name, one in model.named_parameters(remove_duplicate=False)}


def check_taken(left: Iterator[tuple[str, torch.Tensor]], expected: Set[str], loaded: Set[str]) -> None:
    """Raise ValueError where weights are left, or parameters that are expected were not loaded."""
    if (one := next(left, None)) is not None:
        raise ValueError(f"vLLM did not take {one[0]}")
    if missing := sorted(expected - loaded):
        raise ValueError(f"{len(missing)} parameters of vLLM's model got no weights, the first {missing[0]}")


def _lost(model: nn.Module, names: Iterable[str]) -> dict[str, bool]:
    """Parameters that a reload has not seen come, and whether they keep what they had.

    Some of vLLM's models copy weights into their parameters past the loaders that a reload listens to; then they are
    on no device, and the weights are gone. A layer that has seen none of its own keeps what it had, any other is
    undefined.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info  # pyright: ignore  # noqa: PLC0415

    found: dict[str, bool] = {}
    for name in sorted(names):
        path, _, parameter = name.rpartition(".")
        layer = model.get_submodule(path)
        info = get_layerwise_info(layer)
        tensor = cast("torch.Tensor | None", getattr(layer, parameter, None))
        # Where all have come they are in their places. What has come to other layers waits for the end.
        waits = parameter in {came for came, _ in info.loaded_weights}
        if tensor is not None and tensor.is_meta and not waits:
            found[name] = info.load_numel <= 0
    return found


def _forget(model: nn.Module) -> None:
    """Drop what has come to layers that are not done, so that a reload's end puts them back as they were.

    It would else fill them first, with too little, and where that fails, as for want of memory, leave the other layers
    as they are: a next load would go on with what they have.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info  # pyright: ignore  # noqa: PLC0415

    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.loaded_weights.clear()
        info.load_numel = 0


def _repack(model: nn.Module, lost: Set[str]) -> None:
    """Pack what a CPU computes with in a layout of its own, and vLLM's reload leaves as it was; not layers it lost.

    A head that shares the embedding's weight has a packed copy of its own, which would go on with old weights. The
    experts of a layer lie as they came, where the kernel reads them as packed. And Mamba 2 computes with the weight of
    a convolution where that was before it was packed.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore  # noqa: PLC0415
        ParallelLMHead,
    )
    from vllm.platforms import current_platform  # pyright: ignore  # noqa: PLC0415

    if not current_platform.is_cpu():
        return
    for path, module in model.named_modules():
        if isinstance(module, ParallelLMHead):
            getattr(module, "quant_method").process_weights_after_loading(module)  # noqa: B009
        if path not in lost:
            pack_experts(module)
        unpacked = getattr(getattr(module, "conv1d", None), "_cpu_unpacked_conv_weight", None)
        before = cast("torch.Tensor | None", getattr(module, "conv_weights", None))
        if unpacked is not None and before is not None:
            before.copy_(unpacked)
