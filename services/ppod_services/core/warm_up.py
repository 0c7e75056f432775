"""Work that a service does before it reports ready, so that its first callers do not pay for it.

The first batch of a process allocates its memory and picks its kernels, which takes seconds on CPUs and GPUs alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from ppod.errors import PpodError
from ppod.tensors import TokenArray
from ppod_models.sources import ModelSourceError
from ppod_services.core.described import ModelInfo
from ppod_services.core.scheduler import RunBatch

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_SEQUENCE_TOKENS = 32


class _DiscardingSink(Generic[ItemT]):
    """Takes results that nobody asked for; an error is one all the same."""

    def emit(self, position: int, result: object) -> None:
        """Drop the result."""

    def fail(self, position: int, error: PpodError) -> None:  # noqa: ARG002 - a sink's signature
        """A model that cannot run its warm-up cannot serve."""
        raise ModelSourceError(f"the model cannot run: {error}") from error

    def abandoned(self, position: int) -> bool:  # noqa: ARG002 - a sink's signature
        """Nobody goes away."""
        return False

    def more(self) -> Sequence[ItemT]:
        """Nobody comes."""
        return ()

    def between_steps(self) -> bool:
        """Nobody else wants the model."""
        return False


def warm_up(
    run_batch: RunBatch[ItemT, ResultT], info: ModelInfo, tokens: int, item: Callable[[int, TokenArray], ItemT]
) -> None:
    """Run a lone sequence and a batch of `tokens` tokens; with 0 tokens, nothing.

    Args:
        run_batch: the engine.
        info: vocabulary and longest sequence.
        tokens: of the batch, in sequences of 32, or less where the model takes less.
        item: makes an engine's item of a position and int32 [length].

    Raises:
        ModelSourceError: the model gave no finite result, or its device has no room for one.
    """
    if not tokens:
        return
    length = min(_SEQUENCE_TOKENS, info.max_sequence_tokens, max(tokens, 2))
    ids = np.arange(length, dtype=np.int32) % info.vocab_size
    for count in (1, max(1, tokens // length)):
        batch: Sequence[ItemT] = [item(position, ids) for position in range(count)]
        try:
            run_batch(batch, _DiscardingSink[ItemT]())
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise ModelSourceError(f"the model cannot run: {error}") from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no room for a tensor, as where others have its memory; else it is a bug of ours."""
    from torch import OutOfMemoryError  # noqa: PLC0415 - the model is loaded by now

    return isinstance(error, OutOfMemoryError)
