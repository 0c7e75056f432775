"""What is used of vLLM, as types. The one place that imports vLLM in the service's process.

vLLM lives in an environment of its own, so type checkers do not see it: what comes out of here is typed by protocols.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol, cast

import torch
from pydantic import JsonValue
from vllm import SamplingParams as _SamplingParams  # pyright: ignore[reportMissingImports]
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferInitRequest as _WeightTransferInitRequest,
)
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferUpdateRequest as _WeightTransferUpdateRequest,
)
from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
from vllm.exceptions import VLLMValidationError as _VLLMValidationError  # pyright: ignore[reportMissingImports]
from vllm.inputs import tokens_input  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]
from vllm.usage.usage_lib import UsageContext  # pyright: ignore[reportMissingImports]
from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]
from vllm.v1.engine.exceptions import EngineDeadError as _EngineDeadError  # pyright: ignore[reportMissingImports]

from ppod_services.generation.vllm_backend.outputs import RequestOutput

EngineDeadError = cast("type[Exception]", _EngineDeadError)
VLLMValidationError = cast("type[Exception]", _VLLMValidationError)


class Sampling(Protocol):
    """vLLM's SamplingParams; opaque to us once they are made."""


class EngineCore(Protocol):
    """AsyncLLM's way to the process that schedules."""

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None:
        """Let sequences stand still ("keep"); with `clear_cache` they are computed anew when they go on."""
        ...


class Engine(Protocol):
    """vLLM's AsyncLLM. Everything runs in the event loop that it was made in."""

    errored: bool
    engine_core: EngineCore

    def generate(self, prompt: object, params: Sampling, request_id: str) -> AsyncIterator[RequestOutput]:
        """Complete a prompt."""
        ...

    async def abort(self, request_id: Sequence[str]) -> None:
        """End requests; each gives what it has as its last output."""
        ...

    async def get_supported_tasks(self) -> Sequence[str]:
        """What the model can do; remembered by the engine from the first call on."""
        ...

    async def resume_generation(self) -> None:
        """Let sequences that stand still go on."""
        ...

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False where some are in use."""
        ...

    async def update_weight_version(self, new_version: str) -> None:
        """Label the tokens that come."""
        ...

    async def collective_rpc(self, method: str, args: tuple[object, ...] = ()) -> Sequence[object]:
        """Call a method of every worker; returns their results."""
        ...

    async def init_weight_transfer_engine(self, request: object) -> None:
        """Tell the workers' transfer engines where weights come from."""
        ...

    async def start_weight_update(self) -> None:
        """Begin an update."""
        ...

    async def update_weights(self, request: object) -> None:
        """Have the workers receive weights."""
        ...

    async def finish_weight_update(self) -> None:
        """End an update: what was received serves."""
        ...

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine's processes."""
        ...


def platform() -> str:
    """The kind of device that this build of vLLM runs on: "cpu", "cuda", ..."""
    return cast(str, current_platform.device_type)


def has_bfloat16() -> bool:
    """Whether its devices compute in bfloat16. They are not begun to be used for that: they are the workers'."""
    return torch.bfloat16 in cast("Sequence[torch.dtype]", current_platform.supported_dtypes)


def engine_argument_names() -> frozenset[str]:
    """Names of all engine arguments."""
    return frozenset(cast("Mapping[str, object]", AsyncEngineArgs.__dataclass_fields__))


def start_engine(arguments: Mapping[str, JsonValue]) -> Engine:
    """Start the engine and wait until it has loaded its model. Call it in the event loop that it is to live in.

    Raises:
        ValueError, RuntimeError: the arguments do not fit each other, or a process of the engine ended.
    """
    # It decides how many tokens a step takes where nobody says: as offline 8,192 or more, else 2,048.
    context = UsageContext.LLM_CLASS
    return cast(Engine, AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), usage_context=context))


def make_sampling(values: Mapping[str, object], *, stepwise: bool) -> Sampling:
    """SamplingParams of one completion; it is told of at its end only, or with all its tokens so far at each step."""
    kind = RequestOutputKind.CUMULATIVE if stepwise else RequestOutputKind.FINAL_ONLY
    return cast(Sampling, _SamplingParams(**values, output_kind=kind))


def init_request(values: dict[str, object]) -> object:
    """What `Engine.init_weight_transfer_engine` takes, with the fields of the transfer engine's `init_info_cls`."""
    return _WeightTransferInitRequest(init_info=values)


def update_request(values: dict[str, object]) -> object:
    """What `Engine.update_weights` takes, with the fields of the transfer engine's `update_info_cls`."""
    return _WeightTransferUpdateRequest(update_info=values)


def make_prompt(token_ids: list[int]) -> object:
    """A prompt that needs no tokenizer."""
    return tokens_input(token_ids)
