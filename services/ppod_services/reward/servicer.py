"""RewardService: validates and tokenises requests, and packs scores."""

from __future__ import annotations

import asyncio

import grpc.aio
import numpy as np

from ppod.errors import InvalidArgument
from ppod.tensors import TokenArray, pack_floats
from ppod.v1 import common_pb2, reward_pb2, reward_pb2_grpc
from ppod_services.core.callers import caller_of
from ppod_services.core.config import LimitsConfig
from ppod_services.core.described import (
    Deferred,
    check_count,
    check_length,
    check_model,
    check_tokenizer,
    effective_deadline_s,
    pinned_version,
    read_sequences,
    request_timing,
)
from ppod_services.core.scheduler import Scheduler, Submission
from ppod_services.reward.requests import RewardItem, RewardTarget

REWARD_SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name

_WEIGHT_VERSION = 0
"""Reward models do not change while a server runs."""


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Scores sequences; see reward.proto."""

    def __init__(
        self,
        targets: Deferred[list[RewardTarget]],
        scheduler: Scheduler[RewardItem, float],
        limits: LimitsConfig,
    ) -> None:
        self._targets = targets
        self._scheduler = scheduler
        self._limits = limits

    async def Score(
        self,
        request: reward_pb2.ScoreRequest,
        context: grpc.aio.ServicerContext[reward_pb2.ScoreRequest, reward_pb2.ScoreResponse],
    ) -> reward_pb2.ScoreResponse:
        """Score all sequences of a request."""
        target = self._select(request.selector)
        sequences, field = await self._read(request, target)
        sequences, truncated = _truncate(sequences, request.truncation, field, target.info.max_sequence_tokens)
        name = target.info.name
        submissions = [
            Submission(RewardItem(sample, name, tokens), len(tokens), name) for sample, tokens in enumerate(sequences)
        ]
        ticket = self._scheduler.submit(
            submissions, effective_deadline_s(context.time_remaining(), self._limits), caller_of(request.priority)
        )
        try:
            outcomes = await ticket.gather()
        finally:
            ticket.cancel()
        return reward_pb2.ScoreResponse(
            model=target.info.state(_WEIGHT_VERSION),
            timing=request_timing(outcomes, sum(len(tokens) for tokens in sequences)),
            scores=pack_floats(np.asarray([outcome.result for outcome in outcomes], dtype=np.float32)),
            truncated_tokens=truncated if any(truncated) else [],
        )

    async def GetRewardModel(
        self,
        request: reward_pb2.GetRewardModelRequest,
        context: grpc.aio.ServicerContext[reward_pb2.GetRewardModelRequest, reward_pb2.GetRewardModelResponse],
    ) -> reward_pb2.GetRewardModelResponse:
        """Describe a model."""
        info = self._select(request.selector).info
        return reward_pb2.GetRewardModelResponse(
            model=info.state(_WEIGHT_VERSION), limits=info.limits(self._limits.max_request_sequences)
        )

    def _select(self, selector: common_pb2.ModelSelector) -> RewardTarget:
        targets = {target.info.name: target for target in self._targets.get()}
        target = targets[check_model(selector, list(targets))]
        check_tokenizer(target.info, selector)
        pinned_version(selector, _WEIGHT_VERSION)
        return target

    async def _read(self, request: reward_pb2.ScoreRequest, target: RewardTarget) -> tuple[list[TokenArray], str]:
        """Token ids of a request of either kind, and the field they came in."""
        most = self._limits.max_request_sequences
        match request.WhichOneof("input"):
            case "tokens":
                return read_sequences(request.tokens, "tokens", target.info, most), "tokens"
            case "texts":
                texts = list(request.texts.texts)
                check_count(len(texts), "texts", most)
                for sample, text in enumerate(texts):
                    if not text:
                        raise InvalidArgument("texts.texts", "an empty text", "at least one character", sample)
                return _refuse_empty(await asyncio.to_thread(target.encode, texts)), "texts"
            case _:
                raise InvalidArgument("input", "nothing", "tokens or texts")


def _refuse_empty(sequences: list[TokenArray]) -> list[TokenArray]:
    for sample, tokens in enumerate(sequences):
        if not len(tokens):
            raise InvalidArgument("texts.texts", "a text without a single token", "at least one token", sample)
    return sequences


def _truncate(
    sequences: list[TokenArray], side: reward_pb2.TruncationSide, field: str, most: int
) -> tuple[list[TokenArray], list[int]]:
    """Cut sequences to `most` tokens on the side asked for, and count what each one lost."""
    dropped = [max(0, len(tokens) - most) for tokens in sequences]
    if side == reward_pb2.TRUNCATION_SIDE_LEFT:
        return [tokens[lost:] for tokens, lost in zip(sequences, dropped, strict=True)], dropped
    if side == reward_pb2.TRUNCATION_SIDE_RIGHT:
        return [tokens[: len(tokens) - lost] for tokens, lost in zip(sequences, dropped, strict=True)], dropped
    for sample, tokens in enumerate(sequences):
        check_length(sample, len(tokens), field, most)
    return sequences, dropped
