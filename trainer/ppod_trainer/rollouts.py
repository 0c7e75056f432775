"""What a rollout is. What travels with a sample says where it came from: its seed, and the versions that made it.

Shape legend: T tokens behind the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ppod.tensors import FloatArray, TokenArray
from ppod_trainer.errors import TrainerError
from ppod_trainer.policy_versions import PolicyVersions
from ppod_trainer.prompts import Prompt

MaskArray = npt.NDArray[np.bool_]
VersionArray = npt.NDArray[np.int64]
TurnArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What the policy sampled in one go.

    Attributes:
        tokens: int32 [T], a stop token included.
        logprobs: float32 [T], under the distribution that the sampler drew from.
        versions: int64 [T], version of the weights that sampled each token.
        truncated: it was cut off at a limit, the policy did not end it.
        hides_stop_token: its last token is a stop token that no reward reads.
        temperature: that it was sampled at.
    """

    tokens: TokenArray
    logprobs: FloatArray
    versions: VersionArray
    truncated: bool
    hides_stop_token: bool
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One response. In a conversation of several turns it holds what the environment said between them, too.

    Attributes:
        prompt: its prompt.
        response: int32 [T], all that follows the prompt, stop tokens included.
        action_mask: bool [T]; true where the policy sampled the token, false where the environment wrote it.
        sampler_logprobs: float32 [T], under the distribution that the sampler drew from; 0 where it did not.
        versions: int64 [T], version of the weights that sampled the token; 0 where none did.
        turns: int64 [T], number of the policy's turn that the token belongs to, from 0; -1 where it is no action.
        rewards: float32 [T], the environment's, each on the last token of its turn; 0 elsewhere.
        truncated: it was cut off at a limit, the policy did not end it.
        hides_stop_token: its last token is a stop token that no reward reads.
        seed: seed that it was sampled with.
        group: number of its group in the step; the samples of a group share their prompt.
        temperature: that it was sampled at, and that all logprobs of it are taken at.
    """

    prompt: Prompt
    response: TokenArray
    action_mask: MaskArray
    sampler_logprobs: FloatArray
    versions: VersionArray
    turns: TurnArray
    rewards: FloatArray
    truncated: bool
    hides_stop_token: bool
    seed: int
    group: int = 0
    temperature: float = 1.0

    @staticmethod
    def of_turn(prompt: Prompt, turn: Turn, seed: int) -> Rollout:
        """A response of one turn."""
        return Rollout(
            prompt=prompt,
            response=turn.tokens,
            action_mask=np.ones(len(turn.tokens), dtype=np.bool_),
            sampler_logprobs=turn.logprobs,
            versions=turn.versions,
            turns=np.zeros(len(turn.tokens), dtype=np.int64),
            rewards=np.zeros(len(turn.tokens), dtype=np.float32),
            truncated=turn.truncated,
            hides_stop_token=turn.hides_stop_token,
            seed=seed,
            temperature=turn.temperature,
        )

    @property
    def tokens(self) -> TokenArray:
        """Prompt and response, int32 [prompt + T]."""
        return np.concatenate([self.prompt.token_ids, self.response])

    @property
    def visible_tokens(self) -> TokenArray:
        """What rewards read: what the user would see, and the stop token where `rewards.stop_token` says so."""
        return self.tokens[:-1] if self.hides_stop_token else self.tokens

    @property
    def judged_tokens(self) -> TokenArray:
        """What rewards read that tell prompt and response apart: `visible_tokens`, one of the response at least.

        A response that ended at once keeps its stop token: the reward service takes no sequence that is all prompt.
        """
        return self.visible_tokens if len(self.response) > 1 else self.tokens

    @property
    def sampled(self) -> int:
        """Tokens that the policy sampled."""
        return int(self.action_mask.sum())

    def age(self, versions: PolicyVersions) -> int:
        """Updates that followed on the oldest weights that sampled a part of it."""
        return int(versions.ages(self.versions[self.action_mask]).max())


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRollout:
    """A rollout that was judged.

    Attributes:
        rollout: the rollout.
        score: the reward model's; 0 where none is asked.
        ref_logprobs: float32 [T], the reference's.
        components: scores of all rewards that the score is made of, by name; empty where the service does not tell.
        potentials: float32 [T], the reward model's score of all before each token; None where nobody asked.
    """

    rollout: Rollout
    score: float
    ref_logprobs: FloatArray
    components: Mapping[str, float] = field(default_factory=dict[str, float])
    potentials: FloatArray | None = None

    @property
    def outcome(self) -> float:
        """All that was paid for it before the KL penalty: the reward model's score and the environment's rewards."""
        return self.score + float(self.rollout.rewards.sum())


def sample_seed(run_seed: int, stream: str, step: int, index: int) -> int:
    """Seed of one sample, by its place alone: a retry or a resumed run draws the same sample. 63 bits."""
    digest = hashlib.sha256(f"{run_seed}/{stream}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def common_temperature(rollouts: Sequence[Rollout]) -> float:
    """The temperature that all of them were sampled at.

    Raises:
        TrainerError: they have several; policy and reference would divide the logits of some by the wrong one.
    """
    found = {rollout.temperature for rollout in rollouts}
    if len(found) != 1:
        raise TrainerError(
            f"a batch holds samples of the temperatures {sorted(found)}; expected one: train on samples of one step, "
            "or leave schedules.temperature out"
        )
    return found.pop()


def keep_fresh(
    rollouts: Sequence[ScoredRollout], versions: PolicyVersions, max_staleness: int
) -> tuple[list[ScoredRollout], int]:
    """Drop the rollouts of which a part is older than `max_staleness` updates; tell how many."""
    fresh = [one for one in rollouts if one.rollout.age(versions) <= max_staleness]
    return fresh, len(rollouts) - len(fresh)
