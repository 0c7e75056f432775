"""Writes the messages of replies."""

from __future__ import annotations

import numpy as np

from ppod.tensors import FloatArray, pack_floats
from ppod.v1 import common_pb2, reward_pb2
from ppod_services.core.config import LimitsConfig
from ppod_services.core.tracing import annotate_span
from ppod_services.reward.composition_rules import members_of
from ppod_services.reward.kinds import EnsembleConfig, RewardConfig, SumConfig
from ppod_services.reward.rewards import RewardSet, kind_of
from ppod_services.reward.samples import Steps
from ppod_services.reward.scored import Adjustment, Kind, ModelIdentity, Scored, Work, total_work

_KINDS = {
    Kind.MODEL: reward_pb2.REWARD_KIND_MODEL,
    Kind.PROCESS_MODEL: reward_pb2.REWARD_KIND_PROCESS_MODEL,
    Kind.FUNCTION: reward_pb2.REWARD_KIND_FUNCTION,
    Kind.JUDGE: reward_pb2.REWARD_KIND_JUDGE,
    Kind.ENSEMBLE: reward_pb2.REWARD_KIND_ENSEMBLE,
    Kind.SUM: reward_pb2.REWARD_KIND_SUM,
}


def write_scores(scored: Scored, identity: ModelIdentity, steps: Steps | None) -> reward_pb2.ScoreResponse:
    """A whole reply."""
    return reward_pb2.ScoreResponse(
        model=write_state(identity),
        timing=_write_timing(total_work(scored)),
        scores=pack_floats(scored.scores),
        truncated_tokens=scored.truncated,
        breakdown=_write_component(scored),
        process=None if steps is None or scored.way is None else _write_way(steps, scored.way),
    )


def write_state(identity: ModelIdentity) -> common_pb2.ModelState:
    """Identity as the message that travels."""
    return common_pb2.ModelState(
        model=identity.name,
        weight_version=identity.weight_version,
        tokenizer_fingerprint=identity.tokenizer_fingerprint,
    )


def write_description(rewards: RewardSet, config: RewardConfig, limits: LimitsConfig) -> reward_pb2.RewardDescription:
    """What a reward is."""
    model = rewards.parts.models.get(config.name)
    return reward_pb2.RewardDescription(
        name=config.name,
        kind=_KINDS[kind_of(config)],
        adjustment=_write_adjustment(Adjustment.of(config)),
        members=members_of(config),
        weights=[term.weight for term in config.terms] if isinstance(config, SumConfig) else [],
        pessimism=config.pessimism if isinstance(config, EnsembleConfig) else 0.0,
        model=None if model is None else write_state(model.identity),
        limits=None if model is None else model.info.limits(limits.max_request_sequences),
        takes_tokens=rewards.own_source(config) is not None,
        needs_references=rewards.needs_references(config),
    )


def write_limits(
    rewards: RewardSet, config: RewardConfig, limits: LimitsConfig, most_tokens: int
) -> common_pb2.ModelLimits:
    """What a reward takes: of a composed one, what all of its models take; zeros for token ids where it takes none."""
    source = rewards.own_source(config)
    if source is None:
        return common_pb2.ModelLimits(max_request_sequences=limits.max_request_sequences)
    models = list(rewards.models_in(config))
    longest = min((model.info.max_sequence_tokens for model in models), default=most_tokens)
    return common_pb2.ModelLimits(
        vocab_size=source.vocab_size,
        max_sequence_tokens=longest,
        max_request_sequences=limits.max_request_sequences,
        dtype=models[0].info.dtype if models else "",
        device=models[0].info.device if models else "",
    )


def _write_component(scored: Scored, weight: float | None = None) -> reward_pb2.RewardComponent:
    weights = scored.weights or (None,) * len(scored.members)
    return reward_pb2.RewardComponent(
        name=scored.name,
        kind=_KINDS[scored.kind],
        weight=weight,
        scores=pack_floats(scored.scores),
        raw_scores=_pack_optional(scored.raw),
        adjustment=_write_adjustment(scored.adjustment),
        std=_pack_optional(scored.std),
        mean=_pack_optional(scored.mean),
        pessimism=scored.pessimism,
        members=[_write_component(member, part) for member, part in zip(scored.members, weights, strict=True)],
        model=None if scored.model is None else write_state(scored.model),
        truncated_tokens=scored.truncated,
    )


def _write_adjustment(adjustment: Adjustment | None) -> reward_pb2.ScoreAdjustment | None:
    if adjustment is None:
        return None
    return reward_pb2.ScoreAdjustment(
        mean=adjustment.mean, std=adjustment.std, clip_low=adjustment.clip_low, clip_high=adjustment.clip_high
    )


def _write_way(steps: Steps, way: tuple[FloatArray, ...]) -> reward_pb2.ProcessScores:
    positions = np.concatenate([np.asarray(one, dtype="<i4") for one in steps.positions])
    return reward_pb2.ProcessScores(
        lengths=[len(one) for one in steps.positions], positions=positions.tobytes(), scores=pack_floats(way)
    )


def _write_timing(work: Work) -> common_pb2.Timing:
    compute_s = sum(work.batch_s.values()) if work.batch_s else work.elsewhere_s
    timing = common_pb2.Timing(queue_s=work.queue_s or 0.0, compute_s=compute_s, tokens=work.tokens)
    annotate_span(timing)
    return timing


def _pack_optional(values: FloatArray | None) -> bytes:
    return b"" if values is None else pack_floats(values)
