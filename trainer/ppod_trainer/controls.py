"""What a step's update is steered by: the schedules' and controllers' values of this step."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppod_trainer.config import OptimizerConfig
from ppod_trainer.score_shaping import ScoreScale


@dataclass(frozen=True, slots=True)
class StepControls:
    """Values for one step.

    Attributes:
        rate_factor: factor on the peak learning rates.
        kl_coefficient: of the KL penalty, wherever it is paid.
        entropy_coefficient: of the entropy bonus.
        score: normalisation of the scores.
        critic_only: the critic learns, the policy stays as it is.
    """

    rate_factor: float
    kl_coefficient: float
    entropy_coefficient: float
    score: ScoreScale = field(default_factory=ScoreScale)
    critic_only: bool = False


def learning_rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the peak learning rate at a step from 0: linear warm-up, then linear decay to `final_fraction`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return 1.0 - (1.0 - config.final_fraction) * progress
