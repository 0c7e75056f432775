"""What an algorithm reads and what it gives.

Shape legend: B sequences, T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from ppod_trainer.advantages import Advantages
from ppod_trainer.stateful import JsonState


@dataclass(frozen=True, slots=True)
class Experience:
    """One step's samples, all of them: statistics over it are those of the whole batch, on however many ranks.

    Attributes:
        rewards: float32 [B, T], token rewards, the KL penalty included where it is paid in the reward; 0 where the mask
            is false.
        paid: float32 [B, T], token rewards without the KL penalty.
        outcomes: float32 [B], all that was paid for the response: `paid`, summed up.
        values: float32 [B, T]; position t holds the value of the state before token t. Zeros without a critic.
        next_values: float32 [B], the value of the state after the last token.
        mask: bool [B, T], true on action tokens.
        truncated: bool [B], cut off at a limit: the policy did not end it.
        groups: int64 [B]; samples of one prompt share a number.
        prompts: int64 [B], index of the prompt in its set.
        turns: int64 [B, T], number of the policy's turn that a token belongs to, from 0; -1 where it is no action.
        contexts: int64 [B, T], number of what precedes the token's turn; -1 where it is no action. Equal contexts have
            equal numbers.
        observations: int64 [B, T], likewise of what the policy read since its last turn.
        turn_states: float32 [B, K, H], the policy's last hidden state at the last token of each of K turns, 0 for turns
            that are not there; None unless the estimator is a `LearnedEstimator`.
    """

    rewards: torch.Tensor
    paid: torch.Tensor
    outcomes: torch.Tensor
    values: torch.Tensor
    next_values: torch.Tensor
    mask: torch.Tensor
    truncated: torch.Tensor
    groups: torch.Tensor
    prompts: torch.Tensor
    turns: torch.Tensor
    contexts: torch.Tensor
    observations: torch.Tensor
    turn_states: torch.Tensor | None = None

    def with_rewards(self, rewards: torch.Tensor) -> Experience:
        """The same with other token rewards, float32 [B, T]."""
        return replace(self, rewards=rewards)

    def bootstrap_values(self) -> torch.Tensor:
        """What follows the last token, float32 [B]: the next state's value where the response was cut off, else 0."""
        return torch.where(self.truncated, self.next_values, 0.0)


class AdvantageEstimator(Protocol):
    """Turns experience into advantages and value targets, without gradients."""

    @property
    def critic(self) -> bool:
        """Whether it reads values, so that a critic has to be trained."""
        ...

    def estimate(self, experience: Experience) -> Advantages:
        """Advantages and returns, not yet whitened; returns are zeros without a critic."""
        ...


@runtime_checkable
class LearnedEstimator(AdvantageEstimator, Protocol):
    """One that reads the policy's states and has parameters of its own, which a checkpoint keeps; a `Stateful`."""

    def state(self) -> JsonState:
        """See `Stateful`."""
        ...

    def restore(self, state: JsonState) -> None:
        """See `Stateful`."""
        ...
