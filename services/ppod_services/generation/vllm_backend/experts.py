"""The experts of a layer, which vLLM keeps stacked in two parameters, and its CPU build packed."""

from __future__ import annotations

from typing import Any

from torch import nn

PACKED_EXPERTS = ("w13_weight", "w2_weight")
"""What a CPU packs, and may pad, each into a new parameter."""


def leaves_experts(method: Any) -> bool:
    """Whether a layer's `quant_method` has its kernels read the experts as they were loaded, or as a CPU packs them."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import (  # pyright: ignore  # noqa: PLC0415
        UnquantizedMoeBackend,
    )
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (  # pyright: ignore  # noqa: PLC0415
        UnquantizedFusedMoEMethod,
    )

    # Others swap, pad or shuffle them; and what spreads a layer's experts over ranks by itself has a method of its own.
    return type(method) is UnquantizedFusedMoEMethod and method.unquantized_backend in (
        UnquantizedMoeBackend.TRITON,
        UnquantizedMoeBackend.BATCHED_TRITON,
        UnquantizedMoeBackend.CPU,
    )


def pack_experts(module: nn.Module) -> None:
    """Pack the experts, if any, that were loaded into a module on a CPU; it gets new parameters for them."""
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    if kernel is not None:
        kernel.fused_experts.process_weights_after_loading(module)
