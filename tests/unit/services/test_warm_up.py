"""What a service runs before it is ready."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ppod.errors import NonFiniteOutput
from ppod_models.sources import ModelSourceError
from ppod_services.core.described import ModelInfo
from ppod_services.core.scheduler import Sink
from ppod_services.core.warm_up import warm_up


def info(longest: int = 1_000, vocabulary: int = 20) -> ModelInfo:
    return ModelInfo("m", "fingerprint", vocabulary, longest, "float32", "cpu")


def batches(tokens: int, described: ModelInfo) -> list[list[list[int]]]:
    """Token ids of the batches that a warm-up runs."""
    seen: list[list[list[int]]] = []

    def run(items: Sequence[list[int]], sink: Sink[float]) -> None:
        seen.append(list(items))
        for position in range(len(items)):
            sink.emit(position, 0.0)

    warm_up(run, described, tokens, lambda _, ids: ids.tolist())
    return seen


def test_a_lone_sequence_and_a_batch_of_valid_ids() -> None:
    alone, batch = batches(512, info())
    assert (len(alone), len(batch)) == (1, 16)
    assert all(len(ids) == 32 and set(ids) <= set(range(20)) for ids in [*alone, *batch])


def test_sequences_fit_a_short_model() -> None:
    assert [len(ids) for ids in batches(512, info(longest=8))[1]] == [8] * 64


def test_zero_tokens_run_nothing() -> None:
    assert batches(0, info()) == []


def test_a_device_without_room_is_named_and_a_bug_keeps_its_traceback() -> None:
    """As where other processes have the device's memory."""

    def warm(error: RuntimeError) -> None:
        def run(*_: object) -> None:
            raise error

        warm_up(run, info(), 512, lambda position, _: position)

    with pytest.raises(ModelSourceError, match=r"^the model cannot run: CUDA out of memory\. Tried 2 MiB$"):
        warm(torch.OutOfMemoryError("CUDA out of memory. Tried 2 MiB"))
    with pytest.raises(RuntimeError, match="another"):
        warm(RuntimeError("another"))


def test_a_model_that_gives_nan_does_not_start() -> None:
    def run(items: Sequence[int], sink: Sink[float]) -> None:
        sink.fail(len(items) - 1, NonFiniteOutput("score", 0, "nan"))

    with pytest.raises(ModelSourceError, match="the model cannot run: sample 0: score is nan"):
        warm_up(run, info(), 512, lambda position, _: position)
