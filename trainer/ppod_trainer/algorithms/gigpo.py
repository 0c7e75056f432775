"""Group in group: a turn is judged by the episodes of its prompt, and by turns that were taken from the same state.

Feng et al. 2025, "Group-in-Group Policy Optimization for LLM Agent Training". With what episode i of a group
was paid, R_i, and the turns' discounted returns R_i,k = sum over l >= k of gamma^(l - k) r_i,l:

    A^E_i   = (R_i - mean(R)) / F(R)             over the group's episodes
    A^S_i,k = (R_i,k - mean(G(s))) / F(G(s))     over the returns G(s) of turns whose anchor state is s
    A_i,k   = A^E_i + omega * A^S_i,k            for every token of the turn

F is the deviation, as in GRPO, or 1. Turns are compared within their group only. A turn whose anchor state no other
turn of the group has, or whose returns are all equal there, has A^S = 0; in a group of which all were paid the same,
A^E = 0.

What differs: the paper's environments name their states. Here a state is what the policy has read: all that precedes
the turn (anchor: context), or only what came since its last turn (anchor: observation), which recurs more often and is
right where that text alone describes the state. The deviation is unbiased. KL belongs into the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppod_trainer.advantages import Advantages
from ppod_trainer.algorithms.base import Experience
from ppod_trainer.algorithms.groups import group_statistics
from ppod_trainer.algorithms.grpo import relative, relative_outcomes
from ppod_trainer.algorithms.turns import last_tokens, spread, sum_by_turn
from ppod_trainer.config import GigpoConfig


@dataclass(frozen=True, slots=True)
class Gigpo:
    """Episodes against their group, and turns against those from the same state."""

    config: GigpoConfig

    @property
    def critic(self) -> bool:
        """The groups stand in for it."""
        return False

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`."""
        episodes = relative_outcomes(experience, scaled=self.config.scaled).unsqueeze(1)
        turns = episodes + self.config.weight * self._relative_turns(experience)
        advantages = spread(turns, experience.turns).float()
        return Advantages(advantages, torch.zeros_like(advantages))

    def _relative_turns(self, experience: Experience) -> torch.Tensor:
        """A^S, float64 [B, K]."""
        one, config = experience, self.config
        returns = _discounted(sum_by_turn(one.paid.double(), one.turns), config.gamma)
        last = last_tokens(one.turns)
        there = last >= 0
        anchors = one.contexts if config.anchor == "context" else one.observations
        states = anchors.gather(1, last.clamp(min=0))
        keys = torch.stack([one.groups.unsqueeze(1).expand_as(states), states], dim=-1)[there]
        _, groups = torch.unique(keys, dim=0, return_inverse=True)
        result = torch.zeros_like(returns)
        result[there] = relative(returns[there], group_statistics(returns[there], groups), scaled=config.scaled)
        return result


def _discounted(rewards: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sums of what follows, [B, K]; behind the last turn rewards are 0."""
    returns = rewards.clone()
    for turn in range(rewards.shape[1] - 2, -1, -1):
        returns[:, turn] += gamma * returns[:, turn + 1]
    return returns
