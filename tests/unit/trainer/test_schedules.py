"""Values of a step: where they begin, where they end, and that they stay there."""

from __future__ import annotations

import pytest

from ppod_models.configuration import ConfigError, parse_config
from ppod_trainer.config import LinearSchedule, TrainerConfig
from ppod_trainer.schedules import entropy_coefficient_at, kl_coefficient_at, linear_at, temperature_at


def test_a_line_from_the_configured_value_to_the_end() -> None:
    schedule = LinearSchedule(end=0.5, steps=4)
    assert [linear_at(step, 100, 1.5, schedule) for step in range(6)] == [1.5, 1.25, 1.0, 0.75, 0.5, 0.5]
    assert linear_at(3, 100, 1.5, None) == 1.5


def test_without_a_length_the_last_step_has_the_end() -> None:
    schedule = LinearSchedule(end=0.0)
    assert [linear_at(step, 5, 1.0, schedule) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert linear_at(0, 1, 1.0, schedule) == 1.0


def test_each_starts_at_its_own_place() -> None:
    config = parse_config(
        TrainerConfig,
        {
            "steps": 11,
            "rollout": {"temperature": 1.2},
            "ppo": {"entropy_coefficient": 0.01},
            "kl": {"coefficient": 0.1},
            "schedules": {
                "temperature": {"end": 0.7},
                "entropy_coefficient": {"end": 0},
                "kl_coefficient": {"end": 0.3},
            },
        },
        "test",
    )
    assert [temperature_at(step, config) for step in (0, 5, 10)] == pytest.approx([1.2, 0.95, 0.7])
    assert [entropy_coefficient_at(step, config) for step in (0, 5, 10)] == pytest.approx([0.01, 0.005, 0.0])
    assert [kl_coefficient_at(step, config, 99.0) for step in (0, 5, 10)] == pytest.approx([0.1, 0.2, 0.3])
    assert kl_coefficient_at(5, TrainerConfig(), 99.0) == 99.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedules": {"temperature": {"end": 0}}}, "must be at least 1e-06"),
        ({"schedules": {"temperature": {"end": 9e-7}}}, "must be at least 1e-06"),
        ({"rollout": {"temperature": 9e-7}}, "rollout.temperature: .* greater than or equal to 0.000001"),
        ({"prompts": {"curriculum_steps": 3}, "rollout": {"history_resampling": {}}}, "would both choose the prompts"),
        ({"schedules": {"kl_coefficient": {"end": 0}}, "kl": {"adaptive": {}}}, "would both steer"),
        ({"rewards": {"overlong": {"max_tokens": 4, "cache_tokens": 5}}}, "more than max_tokens"),
        (
            {"rewards": {"model": False, "normalize": "scale"}, "environment": {"name": "calculator"}},
            "which model false leaves out",
        ),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(TrainerConfig, values, "test")
