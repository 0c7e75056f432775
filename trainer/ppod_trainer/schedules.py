"""The values of a step, by its number alone: a resumed run goes on with what it would have had."""

from __future__ import annotations

from ppod_trainer.config import LinearSchedule, TrainerConfig


def linear_at(step: int, steps: int, start: float, schedule: LinearSchedule | None) -> float:
    """The value at a step from 0 in a run of `steps`: from start to its end in a straight line, then the end."""
    if schedule is None:
        return start
    # The last step of a schedule over the whole run has the end itself.
    length = max(steps - 1, 1) if schedule.steps is None else schedule.steps
    return start + (schedule.end - start) * min(step / length, 1.0)


def temperature_at(step: int, config: TrainerConfig) -> float:
    """Temperature that a step's samples are drawn at, and that their logprobs are taken at by all models."""
    return linear_at(step, config.steps, config.rollout.temperature, config.schedules.temperature)


def entropy_coefficient_at(step: int, config: TrainerConfig) -> float:
    """c2 of the objective."""
    return linear_at(step, config.steps, config.ppo.entropy_coefficient, config.schedules.entropy_coefficient)


def kl_coefficient_at(step: int, config: TrainerConfig, controlled: float) -> float:
    """Coefficient of the KL penalty: the schedule's, or without one the controller's."""
    schedule = config.schedules.kl_coefficient
    return controlled if schedule is None else linear_at(step, config.steps, config.kl.coefficient, schedule)


def refreshes_after(steps_done: int, config: TrainerConfig) -> bool:
    """Whether the reference becomes the policy when so many steps are done."""
    interval = config.reference_refresh_steps
    # Not after the last step: the final evaluation's KL would be to the policy itself.
    return interval is not None and steps_done % interval == 0 and 0 < steps_done < config.steps
