"""Collecting experience: prompts -> sampler -> reward and reference -> scored rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from ppod import ReferenceClient, RewardClient
from ppod.tensors import FloatArray
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.metrics import StepTimer
from ppod_trainer.potentials import Shaping, score_rollouts
from ppod_trainer.prompts import Prompt
from ppod_trainer.reward_components import component_scores
from ppod_trainer.reward_versions import RewardVersion
from ppod_trainer.rollouts import Rollout, ScoredRollout, common_temperature
from ppod_trainer.sampling import Sampler

_UNSHAPED = Shaping()
Judged = tuple[float, dict[str, float], FloatArray | None]
"""Score, its parts, and potentials."""


class RolloutCollector:
    """Calls the services and puts their answers together. Two threads may use it at a time.

    Args:
        sampler: makes the rollouts.
        reward: client, pinned to the policy's tokenizer; None where the environment's rewards are all there is.
        reference: client, pinned likewise.
        bad_samples: what becomes of a sample that a service refuses.
    """

    def __init__(
        self,
        sampler: Sampler,
        reward: RewardClient | None,
        reference: ReferenceClient,
        bad_samples: BadSamples,
    ) -> None:
        self._sampler = sampler
        self._reward = reward
        self._reference = reference
        self._bad_samples = bad_samples
        self._reward_version = RewardVersion("the reward")
        # Two, because the rollouts of the next step and an evaluation of this one may both be scored now.
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="reference")

    def close(self) -> None:
        """End the helper threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def collect(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], policy_version: int, timer: StepTimer
    ) -> list[ScoredRollout]:
        """Sample one response for each prompt, score it and have the reference judge it.

        Raises:
            PpodError: a service failed; or it named a bad sample and the configuration says to stop.
        """
        rollouts = self.generate(prompts, seeds, policy_version, timer)
        return self.score(rollouts, timer)

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        policy_version: int | None,
        timer: StepTimer,
        temperature: float | None = None,
    ) -> list[Rollout]:
        """Sample one response for each prompt, at the configured temperature where none is given; see `Sampler`."""
        with timer.phase("generate"):
            return self._sampler.sample(prompts, seeds, policy_version, temperature)

    def score(self, rollouts: Sequence[Rollout], timer: StepTimer, shaping: Shaping = _UNSHAPED) -> list[ScoredRollout]:
        """Ask reward and reference at the same time; a sample that either refuses is dropped from both."""
        with timer.phase("score_and_reference"):
            # With this thread's context, so that the call belongs to the step's trace.
            pending = self._pool.submit(copy_context().run, self._ask_reference, rollouts, timer)
            with timer.phase("score"):
                scored, scores = self._ask_reward(rollouts, shaping)
            judged, ref_logprobs = pending.result()
        by_seed = dict(zip((rollout.seed for rollout in judged), ref_logprobs, strict=True))
        return [
            ScoredRollout(rollout, score, by_seed[rollout.seed], components, potentials)
            for rollout, (score, components, potentials) in zip(scored, scores, strict=True)
            if rollout.seed in by_seed
        ]

    def _ask_reward(self, rollouts: Sequence[Rollout], shaping: Shaping) -> tuple[list[Rollout], list[Judged]]:
        client = self._reward
        if client is None:
            return list(rollouts), [(0.0, {}, None) for _ in rollouts]

        def score(kept: Sequence[Rollout]) -> list[Judged]:
            scores, potentials = score_rollouts(client, list(kept), shaping)
            self._reward_version.see(scores.state)
            return list(zip(scores.values.tolist(), component_scores(scores), potentials, strict=True))

        return self._bad_samples.call(rollouts, score)

    def _ask_reference(self, rollouts: Sequence[Rollout], timer: StepTimer) -> tuple[list[Rollout], list[FloatArray]]:
        def logprobs(kept: Sequence[Rollout]) -> list[FloatArray]:
            return self._reference.logprobs(
                [rollout.tokens for rollout in kept],
                [len(rollout.prompt.token_ids) for rollout in kept],
                temperature=common_temperature(kept),
            ).values

        with timer.phase("reference"):
            return self._bad_samples.call(rollouts, logprobs)
