"""Overrides on the command line: how their values are read, and where they go."""

from __future__ import annotations

import pytest

from ppod_deploy.overrides import Override, apply_overrides, split_arguments
from ppod_models.configuration import ConfigError


def test_overrides_are_yaml_values_under_dotted_paths() -> None:
    rest, overrides = split_arguments(
        [
            "run",
            "--trainer.steps",
            "5",
            "--config",
            "f.yaml",
            "--trainer.optimizer.learning-rate=1e-5",
            "--trainer.resume",
            "--services.reward.listen.host",
            "none",
            "--trainer.kl.coefficient",
            "-1",
            "--trainer.x",
            "a",
            "b",
        ]
    )
    assert rest == ["run", "--config", "f.yaml"]
    assert [(".".join(override.path), override.value) for override in overrides] == [
        ("trainer.steps", 5),
        ("trainer.optimizer.learning_rate", "1e-5"),
        ("trainer.resume", True),
        ("services.reward.listen.host", None),
        ("trainer.kl.coefficient", -1),
        ("trainer.x", ["a", "b"]),
    ]


def test_none_is_a_word_where_it_is_a_choice_and_else_nothing() -> None:
    words = ["--trainer.rewards.shaping", "none", "--trainer.rewards.normalize=none", "--trainer.services.judge-model"]
    _, overrides = split_arguments([*words, "none"])
    assert [override.value for override in overrides] == ["none", "none", None]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reward_hacking", ["reward_hacking"]),
        ("[reward_hacking, repetition]", ["reward_hacking", "repetition"]),
        ("[]", []),
    ],
)
def test_one_value_is_a_list_where_the_key_takes_one(value: str, expected: list[str]) -> None:
    _, [override] = split_arguments(["run", "--trainer.watch.stop", value])
    assert override.value == expected


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("trainer.run-dir", "2026-11-27", "2026-11-27"),
        ("trainer.services.judge-model", "007", "007"),
        ("trainer.services.judge-model", "none", None),
        ("trainer.services.reward-model", "'off'", "off"),
        ("services.reward.rewards.0.name", "1.5", "1.5"),
        ("services.reward.tokenizers", "12:30", ["12:30"]),
    ],
)
def test_a_text_that_reads_as_something_else_stays_a_text(key: str, text: str, expected: object) -> None:
    _, [override] = split_arguments(["run", f"--{key}={text}"])
    assert override.value == expected
    with pytest.raises(ConfigError, match="'2026-13-41' is not a value: month must be in"):
        split_arguments(["run", f"--{key}=2026-13-41"])


@pytest.mark.parametrize("words", [["--trainer.steps"], ["--trainer.kl", "--trainer.resume"], ["--trainer.run-dir"]])
def test_a_value_that_is_missing_is_told_by_its_option(words: list[str]) -> None:
    """Not taken for true, which is 1 where a number is expected."""
    with pytest.raises(ConfigError) as raised:
        split_arguments(["run", *words])
    assert raised.value.problems == [f"{words[0]}: a value is missing behind it"]


def test_overrides_reach_into_lists_and_leave_the_file_values_alone() -> None:
    values = {"services": {"reward": {"rewards": [{"name": "a"}, {"name": "b"}]}}}
    path = ("services", "reward", "rewards", "1", "name")
    assert apply_overrides(values, [Override(path, "c")]) == {
        "services": {"reward": {"rewards": [{"name": "a"}, {"name": "c"}]}}
    }
    assert values["services"]["reward"]["rewards"][1] == {"name": "b"}
    with pytest.raises(ConfigError, match="items 0 to 1"):
        apply_overrides(values, [Override(("services", "reward", "rewards", "2", "name"), "c")])
    with pytest.raises(ConfigError, match="which has no keys"):
        apply_overrides({"trainer": {"steps": 3}}, [Override(("trainer", "steps", "more"), 1)])
