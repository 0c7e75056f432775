"""Potential-based shaping: the reward model's score is paid as it arises, instead of all at the end.

The potential of a state is the reward model's score of all that stands there: prompt, response so far, and what an
environment said. With gamma the discount each action is paid, besides what it is paid anyway,

    F(s, s') = gamma * potential(s') - potential(s)    (Ng, Harada and Russell 1999, equation 2)

and the state after the last action has the potential 0. Every policy then loses the same, the potential of the prompt,
so that the best one stays the best. The critic learns V - potential: it begins with what the reward model knows, and
an action that moved the score is told from its neighbours before the critic has learnt anything.

Shape legend: B sequences, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ppod import RewardClient
from ppod.client import Granularity, ProcessScores, RewardComponent, RewardKind, Scores, Truncation
from ppod.tensors import FloatArray
from ppod_trainer.prompts import references_of, turns_of
from ppod_trainer.rollouts import Rollout

ShapingLevel = Literal["none", "token", "step"]


@dataclass(frozen=True, slots=True)
class Shaping:
    """Where potentials are asked for: by `level`, and by tokens from one to the next `interval`."""

    level: ShapingLevel = "none"
    interval: int = 1


def score_rollouts(
    client: RewardClient, rollouts: list[Rollout], shaping: Shaping
) -> tuple[Scores, list[FloatArray | None]]:
    """The scores of responses, and the potentials that shaping needs; one call, and one forward, for both.

    By token, where some part of the reward reads the response apart from its prompt, the scores take another call.

    Returns:
        scores: of what the user sees.
        potentials: of each rollout float32 [T], that of the state before each token; None where none are asked for.

    Raises:
        PpodError: as the client.
    """
    if shaping.level == "none":
        return _scores(client, rollouts), [None] * len(rollouts)
    # By token the prompt's last one counts as response: the score behind it is the prompt's potential.
    by_token = shaping.level == "token"
    scores = client.score(
        [one.visible_tokens if by_token else one.judged_tokens for one in rollouts],
        prompt_lengths=[len(one.prompt.token_ids) - by_token for one in rollouts],
        prompts=turns_of([one.prompt for one in rollouts]),
        references=references_of([one.prompt for one in rollouts]),
        process=shaping.interval if by_token else Granularity.STEP,
        truncation=Truncation.NONE,
    )
    assert scores.process is not None
    potentials = _potentials(scores.process, rollouts)
    tokenizer = client.pin.tokenizer_fingerprint if any(one.prompt.turns for one in rollouts) else None
    if by_token and scores.breakdown is not None and _reads_responses(scores.breakdown, tokenizer):
        scores = _scores(client, rollouts)
    return scores, list(potentials)


def _scores(client: RewardClient, rollouts: Sequence[Rollout]) -> Scores:
    return client.score(
        [one.judged_tokens for one in rollouts],
        prompt_lengths=[len(one.prompt.token_ids) for one in rollouts],
        prompts=turns_of([one.prompt for one in rollouts]),
        references=references_of([one.prompt for one in rollouts]),
        truncation=Truncation.NONE,
    )


def _reads_responses(component: RewardComponent, tokenizer: str | None) -> bool:
    """Whether it matters to a reward, or to a part of it, where the response begins.

    With conversations, whose `tokenizer` is given, to models of another one, too: they read the turns, then a response.
    """
    own = component.kind in (RewardKind.PROCESS_MODEL, RewardKind.FUNCTION, RewardKind.JUDGE)
    state = component.state
    other = tokenizer is not None and state is not None and state.tokenizer_fingerprint != tokenizer
    return own or other or any(_reads_responses(member, tokenizer) for member in component.members)


def _potentials(process: ProcessScores, rollouts: list[Rollout]) -> list[FloatArray]:
    """Before each token the score of the last position that is not behind it; 0 where there is none."""
    found: list[FloatArray] = []
    for positions, scores, rollout in zip(process.positions, process.scores, rollouts, strict=True):
        lengths = len(rollout.prompt.token_ids) + np.arange(len(rollout.response))
        known = np.concatenate([np.zeros(1, np.float32), scores])
        found.append(known[np.searchsorted(positions, lengths, side="right")])
    return found


def shaping_rewards(potentials: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """What each action is paid for the change of the potential, float32 [B, T]; 0 elsewhere.

    The state after an action is the one before the next action: what an environment says in between is its doing.

    Args:
        potentials: float32 [B, T], of the state before each token.
        mask: bool [B, T]; true on action tokens, at least one in every row.
        gamma: discount.
    """
    before = potentials[mask]
    row = mask.nonzero()[:, 0]
    after = torch.zeros_like(before)
    after[:-1] = torch.where(row[1:] == row[:-1], before[1:], 0.0)
    return torch.zeros_like(potentials).masked_scatter(mask, gamma * after - before)
