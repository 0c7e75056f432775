"""Scored rollouts of random tokens with mixed lengths, in one turn or in several."""

from __future__ import annotations

import numpy as np

from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn

TEMPERATURE = 0.7


def random_rollouts(count: int = 6, seed: int = 0, longest_response: int = 7) -> list[ScoredRollout]:
    generator = np.random.default_rng(seed)
    made: list[ScoredRollout] = []
    for index in range(count):
        prompt = generator.integers(0, 250, size=generator.integers(1, 6)).astype(np.int32)
        response = generator.integers(0, 250, size=generator.integers(1, longest_response + 1)).astype(np.int32)
        logprobs = generator.normal(-3, 0.5, size=len(response)).astype(np.float32)
        versions = np.ones(len(response), dtype=np.int64)
        turn = Turn(
            response,
            logprobs,
            versions,
            truncated=bool(index % 2),
            hides_stop_token=not index % 2,
            temperature=TEMPERATURE,
        )
        rollout = Rollout.of_turn(Prompt(index, prompt), turn, 100 + index)
        reference = (logprobs + generator.normal(0, 0.1, size=len(response))).astype(np.float32)
        made.append(ScoredRollout(rollout, float(generator.normal()), reference))
    return made


def random_episodes(count: int, seed: int = 0, longest: int = 4) -> list[ScoredRollout]:
    """Episodes of up to `longest` turns: an environment's tokens between them, and pay for some of them."""
    generator = np.random.default_rng(seed)
    made: list[ScoredRollout] = []
    for index in range(count):
        numbers = [0] * int(generator.integers(1, 4))
        for turn in range(1, int(generator.integers(1, longest + 1))):
            numbers += [-1] * int(generator.integers(1, 3)) + [turn] * int(generator.integers(1, 4))
        turns = np.array(numbers, dtype=np.int64)
        mask = turns >= 0
        ends = np.append(np.diff(turns) != 0, [True]) & mask
        logprobs = np.where(mask, generator.normal(-3, 0.5, size=len(turns)), 0).astype(np.float32)
        rollout = Rollout(
            prompt=Prompt(index, generator.integers(0, 250, size=generator.integers(1, 6)).astype(np.int32)),
            response=generator.integers(0, 250, size=len(turns)).astype(np.int32),
            action_mask=mask,
            sampler_logprobs=logprobs,
            versions=mask.astype(np.int64),
            turns=turns,
            rewards=np.where(ends & (generator.random(len(turns)) < 0.5), 0.5, 0).astype(np.float32),
            truncated=bool(index % 2),
            hides_stop_token=not index % 2,
            seed=100 + index,
            temperature=TEMPERATURE,
        )
        made.append(ScoredRollout(rollout, float(generator.normal()), logprobs))
    return made
