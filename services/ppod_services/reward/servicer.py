"""RewardService: reads requests, has them scored, and packs what came of it."""

from __future__ import annotations

import time
from dataclasses import replace

import grpc.aio

from ppod.v1 import reward_pb2, reward_pb2_grpc
from ppod_services.core.callers import caller_of
from ppod_services.core.described import Deferred, effective_deadline_s, pinned_version
from ppod_services.reward.config import RewardServiceConfig
from ppod_services.reward.inputs import read_granularity, read_samples, read_truncation
from ppod_services.reward.replies import write_description, write_limits, write_scores, write_state
from ppod_services.reward.rewards import RewardSet
from ppod_services.reward.samples import Query, Steps
from ppod_services.reward.steps import StepRule, find_steps

REWARD_SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Scores sequences; see reward.proto."""

    def __init__(self, rewards: Deferred[RewardSet], config: RewardServiceConfig) -> None:
        self._rewards = rewards
        self._config = config

    async def Score(
        self,
        request: reward_pb2.ScoreRequest,
        context: grpc.aio.ServicerContext[reward_pb2.ScoreRequest, reward_pb2.ScoreResponse],
    ) -> reward_pb2.ScoreResponse:
        """Score all sequences of a request."""
        limits = self._config.limits
        deadline = time.monotonic() + effective_deadline_s(context.time_remaining(), limits)
        # One set for the whole request: a model that is replaced meanwhile does not show in it.
        rewards = self._rewards.get()
        config = rewards.select(request.selector.model)
        source = rewards.source_of(config, request.selector.tokenizer_fingerprint)
        identity = rewards.identity(config, source)
        pinned_version(request.selector, identity.weight_version)
        needed = rewards.needs_references(config)
        samples = read_samples(request, source, limits.max_request_sequences, needs_references=needed)
        granularity = read_granularity(request.process, request.process_interval)
        query = Query(
            samples=samples,
            truncation=read_truncation(request.truncation),
            caller=caller_of(request.priority),
            deadline=deadline,
            source=source,
        )
        if granularity is not None:
            # The reward that was asked for says what a step is, for its members too.
            rule = StepRule(granularity, config.steps.separator, request.process_interval or 1)
            query = replace(query, steps=await self._find_steps(rewards, query, rule))
        return write_scores(await rewards.score(config, query), identity, query.steps)

    async def GetRewardModel(
        self,
        request: reward_pb2.GetRewardModelRequest,
        context: grpc.aio.ServicerContext[reward_pb2.GetRewardModelRequest, reward_pb2.GetRewardModelResponse],
    ) -> reward_pb2.GetRewardModelResponse:
        """Describe a reward."""
        rewards = self._rewards.get()
        config = rewards.select(request.selector.model)
        identity = rewards.identity(config, rewards.source_of(config, request.selector.tokenizer_fingerprint))
        pinned_version(request.selector, identity.weight_version)
        limits = self._config.limits
        return reward_pb2.GetRewardModelResponse(
            model=write_state(identity),
            limits=write_limits(rewards, config, limits, self._config.batching.max_batch_tokens),
            description=write_description(rewards, config, limits),
        )

    async def ListRewards(
        self,
        request: reward_pb2.ListRewardsRequest,
        context: grpc.aio.ServicerContext[reward_pb2.ListRewardsRequest, reward_pb2.ListRewardsResponse],
    ) -> reward_pb2.ListRewardsResponse:
        """Describe every reward."""
        rewards = self._rewards.get()
        limits = self._config.limits
        return reward_pb2.ListRewardsResponse(
            rewards=[write_description(rewards, config, limits) for config in rewards.configs.values()]
        )

    async def _find_steps(self, rewards: RewardSet, query: Query, rule: StepRule) -> Steps:
        """Where to score on the way."""
        codec = None if query.source is None else query.source.codec
        most = self._config.max_process_positions
        samples = query.samples
        return await rewards.parts.runtime.tokenize(
            samples, query.caller, lambda: find_steps(samples, rule, codec, most)
        )
