"""Collecting experience: prompts -> generation -> reward and reference -> scored rollouts.

What travels with a sample says where it came from: its seed, and the version of the weights that made it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ppod import GenerationClient, PpodError, ReferenceClient, RewardClient, Sampling
from ppod.client import FinishReason, Truncation
from ppod.tensors import FloatArray, TokenArray
from ppod_trainer.config import RolloutConfig
from ppod_trainer.metrics import StepTimer
from ppod_trainer.prompts import Prompt

log = logging.getLogger(__name__)
SampleT = TypeVar("SampleT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response.

    Attributes:
        prompt: its prompt.
        response: int32 [length], the stop token included.
        sampler_logprobs: float32 [length], under the distribution that the sampler drew from.
        truncated: it was cut off at the token limit, no stop token ended it.
        policy_version: version of the weights that sampled it.
        seed: seed that it was sampled with.
    """

    prompt: Prompt
    response: TokenArray
    sampler_logprobs: FloatArray
    truncated: bool
    policy_version: int
    seed: int

    @property
    def tokens(self) -> TokenArray:
        """Prompt and response, int32 [prompt + response]."""
        return np.concatenate([self.prompt.token_ids, self.response])

    @property
    def visible_tokens(self) -> TokenArray:
        """What the user would see, and so what the reward model reads: the stop token is not part of it."""
        return self.tokens if self.truncated else self.tokens[:-1]


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A rollout with the reward model's score and the reference's logprobs, float32 [length]."""

    rollout: Rollout
    score: float
    ref_logprobs: FloatArray


def sample_seed(run_seed: int, stream: str, step: int, index: int) -> int:
    """Seed of one sample, by its place alone: a retry or a resumed run draws the same sample. 63 bits."""
    digest = hashlib.sha256(f"{run_seed}/{stream}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class RolloutCollector:
    """Calls the services and puts their answers together.

    Args:
        generation, reward, reference: clients, pinned to the policy's tokenizer.
        config: how samples are drawn, and what becomes of a bad one.
        on_dropped: called with the error for every sample dropped.
    """

    def __init__(
        self,
        generation: GenerationClient,
        reward: RewardClient,
        reference: ReferenceClient,
        config: RolloutConfig,
        on_dropped: Callable[[PpodError], None],
    ) -> None:
        self._generation = generation
        self._reward = reward
        self._reference = reference
        self._config = config
        self._on_dropped = on_dropped
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reference")

    def close(self) -> None:
        """End the helper thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def collect(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], policy_version: int, timer: StepTimer
    ) -> list[ScoredRollout]:
        """Sample one response for each prompt, score it and have the reference judge it.

        Raises:
            PpodError: a service failed; or it named a bad sample and the configuration says to stop.
        """
        with timer.phase("generate"):
            rollouts = self.generate(prompts, seeds, policy_version)
        with timer.phase("score_and_reference"):
            return self.score(rollouts, timer)

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], policy_version: int) -> list[Rollout]:
        """Sample one response for each prompt with the weights of exactly this version."""
        sampling = Sampling(max_tokens=self._config.max_tokens, temperature=self._config.temperature)
        requests = list(zip(prompts, seeds, strict=True))

        def sample(kept: Sequence[tuple[Prompt, int]]) -> list[Rollout]:
            completions = self._generation.generate(
                [prompt.token_ids for prompt, _ in kept],
                sampling,
                seeds=[seed for _, seed in kept],
                weight_version=policy_version,
            )
            return [
                Rollout(
                    prompt=prompt,
                    response=completion.token_ids,
                    sampler_logprobs=completion.logprobs,
                    truncated=completion.finish_reason is FinishReason.LENGTH,
                    policy_version=completion.state.weight_version,
                    seed=completion.seed,
                )
                for (prompt, _), completion in zip(kept, completions, strict=True)
            ]

        return self._call(requests, sample)[1]

    def score(self, rollouts: Sequence[Rollout], timer: StepTimer) -> list[ScoredRollout]:
        """Ask reward and reference at the same time; a sample that either refuses is dropped from both."""

        def reward(kept: Sequence[Rollout]) -> list[float]:
            scores = self._reward.score([rollout.visible_tokens for rollout in kept], truncation=Truncation.NONE)
            return scores.values.tolist()

        def reference(kept: Sequence[Rollout]) -> list[FloatArray]:
            return self._reference.logprobs(
                [rollout.tokens for rollout in kept],
                [len(rollout.prompt.token_ids) for rollout in kept],
                temperature=self._config.temperature,
            ).values

        def timed_reference() -> tuple[list[Rollout], list[FloatArray]]:
            with timer.phase("reference"):
                return self._call(rollouts, reference)

        # With this thread's context, so that the call belongs to the step's trace.
        pending = self._pool.submit(copy_context().run, timed_reference)
        with timer.phase("score"):
            scored, scores = self._call(rollouts, reward)
        judged, ref_logprobs = pending.result()
        by_seed = dict(zip((rollout.seed for rollout in judged), ref_logprobs, strict=True))
        return [
            ScoredRollout(rollout, score, by_seed[rollout.seed])
            for rollout, score in zip(scored, scores, strict=True)
            if rollout.seed in by_seed
        ]

    def _call(
        self, samples: Sequence[SampleT], call: Callable[[Sequence[SampleT]], list[ResultT]]
    ) -> tuple[list[SampleT], list[ResultT]]:
        """Call a service; where an error names one sample and the configuration says skip, go on without it."""
        kept = list(samples)
        while kept:
            try:
                return kept, call(kept)
            except PpodError as error:
                sample: int | None = getattr(error, "sample", None)
                if self._config.on_bad_sample == "stop" or sample is None or not 0 <= sample < len(kept):
                    raise
                log.warning("dropped a sample: %s", error)
                self._on_dropped(error)
                del kept[sample]
        return [], []
