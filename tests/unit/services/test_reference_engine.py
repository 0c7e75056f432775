"""The reference: batches of several callers' sequences, and a request whose batches lie on both sides of a commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc.aio
import numpy as np
import pytest
import torch

from ppod.errors import FailedPrecondition, NonFiniteOutput, PpodError, Unavailable
from ppod.tensors import pack_sequences
from ppod.v1 import reference_pb2
from ppod_models.configuration import ModelConfig
from ppod_services.core.adapters import Adapters
from ppod_services.core.config import LimitsConfig
from ppod_services.core.described import Deferred
from ppod_services.core.model import CausalModel, load_causal_model
from ppod_services.core.scheduler import Outcome, Scheduler
from ppod_services.core.weight_servicer import WeightTarget
from ppod_services.reference.engine import ReferenceEngine
from ppod_services.reference.requests import ReferenceItem, ReferenceResult
from ppod_services.reference.servicer import ReferenceServicer
from support.served_weights import served
from support.tiny_model import NAN_TOKEN, build_model

TEMPERATURE = 0.7


@dataclass
class ResultSink:
    """Takes what the engine answers."""

    results: dict[int, ReferenceResult] = field(default_factory=dict[int, ReferenceResult])
    errors: dict[int, PpodError] = field(default_factory=dict[int, PpodError])

    def emit(self, position: int, result: ReferenceResult) -> None:
        self.results[position] = result

    def fail(self, position: int, error: PpodError) -> None:
        self.errors[position] = error

    def abandoned(self, position: int) -> bool:
        del position
        return False


def item(
    tokens: list[int], sample: int = 0, *, version: int = 0, entropy: bool = False, top_k: int = 0
) -> ReferenceItem:
    return ReferenceItem(sample, np.asarray(tokens, np.int32), 1, TEMPERATURE, version, None, entropy, top_k)


def load(directory: Path, *, pack: bool = True) -> CausalModel:
    config = ModelConfig(source=str(directory), device="cpu", dtype="float32", threads=1)
    return load_causal_model(config, "reference", 16_384, pack=pack)


@torch.no_grad()
def naive(tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of every token at each response position, float64 [length - 1, V]."""
    logits = build_model()(torch.tensor([tokens])).logits[0, :-1].double()
    return torch.log_softmax(logits / TEMPERATURE, dim=-1)


@pytest.mark.parametrize("pack", [True, False])
def test_each_caller_in_a_batch_gets_what_it_asked_for_and_its_own_error(tiny_model_dir: Path, pack: bool) -> None:
    model = load(tiny_model_dir, pack=pack)
    with torch.no_grad():
        # The head's own, so that only this token's sequence is spoilt.
        model.head.weight = torch.nn.Parameter(cast(torch.Tensor, model.head.weight).clone())
        cast(torch.nn.Embedding, model.backbone.get_input_embeddings()).weight[NAN_TOKEN] = torch.nan
    asked = [
        item([5, 6, 7, 8]),
        item([9, NAN_TOKEN, 1], 4),
        item([3, 3, 256], 1, entropy=True),
        item([9, 1], 2, version=1),
        item([40, 41, 42], 3, top_k=2),
        item([40, 41], 5, top_k=3),
    ]
    sink = ResultSink()
    ReferenceEngine(model, served(model.model)[0], Adapters(model.model, ())).run(asked, sink)
    assert {place: str(error) for place, error in sink.errors.items()} == {
        1: str(NonFiniteOutput("logprobs", 4, "nan")),
        3: str(FailedPrecondition("weight_version", "0", "1")),
    }
    for place, result in sink.results.items():
        one = asked[place]
        whole = naive(one.tokens.tolist())
        expected = whole.gather(1, torch.from_numpy(one.tokens[1:].astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-5)
        top = whole.topk(one.top_k)
        assert result.top_ids.tolist() == top.indices.tolist()
        np.testing.assert_allclose(result.top_logprobs, top.values, atol=1e-5)
        assert (result.entropies is not None) is one.entropy
        if result.entropies is not None:
            np.testing.assert_allclose(result.entropies, -(whole.exp() * whole).sum(-1), atol=1e-5)
    assert sorted(sink.results) == [0, 2, 4, 5]


class TwoVersions:
    """A scheduler that answers each sequence by the next version of the weights."""

    def submit(self, submissions: list[object], deadline_s: float, caller: object) -> TwoVersions:
        del deadline_s, caller
        self._count = len(submissions)
        return self

    async def gather(self) -> list[Outcome[ReferenceResult]]:
        empty = np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32)
        return [
            Outcome(index, ReferenceResult(np.zeros(1, np.float32), 3 + index, None, *empty), index, 0.0, 0.0)
            for index in range(self._count)
        ]

    def cancel(self) -> None:
        pass


class Context:
    def time_remaining(self) -> float:
        return 10.0


async def test_a_reply_is_of_one_version(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    target: Deferred[WeightTarget] = Deferred()
    target.set(WeightTarget(model.info, served(model.model)[0]))
    scheduler = cast(Scheduler[ReferenceItem, ReferenceResult], TwoVersions())
    servicer = ReferenceServicer(target, scheduler, LimitsConfig())
    context = cast(
        grpc.aio.ServicerContext[reference_pb2.ComputeLogprobsRequest, reference_pb2.ComputeLogprobsResponse], Context()
    )
    one = reference_pb2.ComputeLogprobsRequest(tokens=pack_sequences([[1, 2]]), prompt_lengths=[1])
    assert (await servicer.ComputeLogprobs(one, context)).model.weight_version == 3
    two = reference_pb2.ComputeLogprobsRequest(tokens=pack_sequences([[1, 2], [3, 4]]), prompt_lengths=[1, 1])
    with pytest.raises(Unavailable, match=r"weight versions \[3, 4\] served during the request; send it again"):
        await servicer.ComputeLogprobs(two, context)
