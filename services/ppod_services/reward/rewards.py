"""All rewards of a service at one moment, and how a request is scored by them.

A set never changes: a model that is replaced makes a new set, and requests that began with the old one end with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ppod.errors import FailedPrecondition, NotFound
from ppod_services.reward.composites import score_ensemble, score_sum
from ppod_services.reward.composition_rules import members_of
from ppod_services.reward.functions.registry import FUNCTIONS
from ppod_services.reward.kinds import (
    EnsembleConfig,
    FunctionConfig,
    HeadConfig,
    JudgeConfig,
    ModelRewardConfig,
    RewardConfig,
    SequenceClassificationConfig,
    SumConfig,
    TokenClassificationConfig,
)
from ppod_services.reward.model_rewards import ProcessReward, Reward, SequenceReward
from ppod_services.reward.rendezvous import Rendezvous
from ppod_services.reward.runtime import Runtime
from ppod_services.reward.samples import Query, TokenSource
from ppod_services.reward.scored import Kind, ModelIdentity, Scored
from ppod_services.reward.served import ServedModel
from ppod_services.reward.text_rewards import TextReward, TextScorer


@dataclass(frozen=True, slots=True)
class Parts:
    """What a set of rewards is made of.

    Attributes:
        configs: all rewards, the default first.
        models: the loaded models, by name.
        text_scorers: functions and judges, by name.
        tokenizers: further tokenizers that token ids may come from.
        runtime: the models' queue.
    """

    configs: tuple[RewardConfig, ...]
    models: Mapping[str, ServedModel]
    text_scorers: Mapping[str, TextScorer]
    tokenizers: tuple[TokenSource, ...]
    runtime: Runtime


class RewardSet:
    """Rewards by name."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.configs = {config.name: config for config in parts.configs}
        self._leaves = {
            config.name: leaf for config in parts.configs if (leaf := _make_leaf(config, parts)) is not None
        }
        self._needing_references = {
            config.name
            for config in parts.configs
            if isinstance(config, FunctionConfig) and FUNCTIONS.find(config.function).needs_references
        }
        known = [*(model.source for model in parts.models.values()), *parts.tokenizers]
        self._sources = {source.codec.fingerprint: source for source in reversed(known)}
        self._default_source = known[0] if known else None

    def select(self, name: str) -> RewardConfig:
        """The reward of a name, the default for an empty one; raise NotFound for another."""
        config = self.configs.get(name) if name else self.parts.configs[0]
        if config is None:
            raise NotFound("model", name, f"this server has {', '.join(self.configs)}")
        return config

    def source_of(self, config: RewardConfig, fingerprint: str) -> TokenSource | None:
        """What makes the token ids of a request for a reward; None where the service has no tokenizer at all.

        Raises:
            FailedPrecondition: the request names a tokenizer that a model does not have, or that nothing here knows.
        """
        own = self.own_source(config)
        if not fingerprint or (own is not None and own.codec.fingerprint == fingerprint):
            return own
        known = None if config.name in self.parts.models else self._sources.get(fingerprint)
        if known is None:
            ways = ["name its source under the service's tokenizers"]
            if config.name in self.parts.models:
                ways.append("ask for a sum of one term, this reward")
            expected = f"{fingerprint}; to have {config.name} score its ids, {' and '.join(ways)}"
            raise FailedPrecondition("tokenizer", own.codec.fingerprint if own else "none", expected)
        return known

    def own_source(self, config: RewardConfig) -> TokenSource | None:
        """The tokenizer that token ids for a reward come from unless a request says otherwise."""
        models = list(self.models_in(config))
        return models[0].source if models else self._default_source

    def models_in(self, config: RewardConfig) -> Iterator[ServedModel]:
        """The models that a reward reads, each once."""
        names = dict.fromkeys(self._leaves_in(config))
        return (self.parts.models[name] for name in names if name in self.parts.models)

    def identity(self, config: RewardConfig, source: TokenSource | None) -> ModelIdentity:
        """What a reply tells of a reward.

        Of a composed reward the version is the sum of its models' versions: it grows with each replacement.
        """
        model = self.parts.models.get(config.name)
        if model is not None:
            return model.identity
        version = sum(one.weight_version for one in self.models_in(config))
        return ModelIdentity(config.name, version, source.codec.fingerprint if source else "")

    def needs_references(self, config: RewardConfig) -> bool:
        """Whether a reward, or a member of it, compares with references."""
        return any(name in self._needing_references for name in self._leaves_in(config))

    async def score(self, config: RewardConfig, query: Query) -> Scored:
        """Score a request, members side by side; the first that fails ends the others and the request."""
        leaf = self._leaves.get(config.name)
        # Most requests ask for one model: no tasks for them.
        if leaf is not None:
            return await leaf.score(query)
        models = sum(1 for _ in self.models_in(config))
        together = replace(query, rendezvous=Rendezvous(models) if models > 1 else None)
        return await _Evaluation(self, together).score(config)

    def leaf(self, name: str) -> Reward | None:
        """The reward of a name unless it is composed."""
        return self._leaves.get(name)

    def _leaves_in(self, config: RewardConfig) -> Iterator[str]:
        members = members_of(config)
        if not members:
            yield config.name
        for name in members:
            yield from self._leaves_in(self.configs[name])


class _Evaluation:
    """One request for a composed reward: each reward in it is scored once, however often it is a member."""

    def __init__(self, rewards: RewardSet, query: Query) -> None:
        self._rewards = rewards
        self._query = query
        self._tasks: dict[str, asyncio.Task[Scored]] = {}

    async def score(self, config: RewardConfig) -> Scored:
        try:
            return await self._compose(config)
        finally:
            for task in self._tasks.values():
                task.cancel()
            # Waited for, so that nothing of this request is left when it is answered.
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _compose(self, config: RewardConfig) -> Scored:
        members = await asyncio.gather(*(self._task(name) for name in members_of(config)))
        match config:
            case EnsembleConfig():
                return score_ensemble(config, members, self._query)
            case SumConfig():
                return score_sum(config, members, self._query)
            case _:
                raise AssertionError(f"{config.name} is not composed")

    def _task(self, name: str) -> asyncio.Task[Scored]:
        if name not in self._tasks:
            leaf = self._rewards.leaf(name)
            work = self._compose(self._rewards.configs[name]) if leaf is None else leaf.score(self._query)
            self._tasks[name] = asyncio.ensure_future(work)
        return self._tasks[name]


def kind_of(config: RewardConfig) -> Kind:
    """What computes a reward."""
    match config:
        case HeadConfig() | SequenceClassificationConfig():
            return Kind.MODEL
        case TokenClassificationConfig():
            return Kind.PROCESS_MODEL
        case FunctionConfig():
            return Kind.FUNCTION
        case JudgeConfig():
            return Kind.JUDGE
        case EnsembleConfig():
            return Kind.ENSEMBLE
        case SumConfig():
            return Kind.SUM


def model_configs(configs: Sequence[RewardConfig]) -> list[ModelRewardConfig]:
    """The rewards that models of this process compute."""
    kinds = (HeadConfig, SequenceClassificationConfig, TokenClassificationConfig)
    return [config for config in configs if isinstance(config, kinds)]


def _make_leaf(config: RewardConfig, parts: Parts) -> Reward | None:
    match config:
        case HeadConfig() | SequenceClassificationConfig():
            return SequenceReward(config, parts.models[config.name], parts.runtime)
        case TokenClassificationConfig():
            return ProcessReward(config, parts.models[config.name], parts.runtime)
        case FunctionConfig() | JudgeConfig():
            return TextReward(config, kind_of(config), parts.text_scorers[config.name], parts.runtime)
        case EnsembleConfig() | SumConfig():
            return None
