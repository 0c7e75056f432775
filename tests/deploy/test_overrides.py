"""Overrides on the command line: how their values are read, and where they go."""

from __future__ import annotations

import pytest

from ppod_deploy.file_keys import SCHEMAS
from ppod_deploy.key_types import kinds_at
from ppod_deploy.overrides import Override, apply_overrides, describe_keys, split_arguments
from ppod_deploy.run_config import RunConfig
from ppod_models.configuration import ConfigError, ConfigModel


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


def _listed(model: type[ConfigModel]) -> list[tuple[str, str]]:
    """The keys that --help lists, with what it says of each."""
    lines = "\n".join(describe_keys(model, flags=False)).splitlines()
    return [
        (line.split()[0], lines[place + 1].strip())
        for place, line in enumerate(lines)
        if line[:2] == "  " and line[2] != " "
    ]


@pytest.mark.parametrize("model", [RunConfig, *SCHEMAS.values()])
def test_help_tells_the_meaning_and_the_default_of_every_key(model: type[ConfigModel]) -> None:
    listed = _listed(model)
    assert len(listed) > 15
    for key, text in listed:
        assert kinds_at(model, key.replace("N", "0").split(".")), key
        meaning, _, default = text.rpartition("; ")
        # Which section it is, is told above it.
        assert meaning or key.endswith(".kind"), key
        assert text == "required" or default == "required" or default.removeprefix("default ").strip(), key


def test_help_lists_the_keys_of_each_kind_of_section_in_a_list_once() -> None:
    listed = [key for key, _ in _listed(RunConfig)]
    of_rewards = "services.reward.rewards.N"
    for key in ("concurrency", "pessimism", "clip.low", "model.threads", "server.token_env", "terms.N.weight"):
        assert listed.count(f"{of_rewards}.{key}") == 1, key
    assert listed.count(f"{of_rewards}.kind") == 7
    assert "services.reference.adapters.N.source" in listed
    assert "services.generation.output_filters.N.parameters" in listed


def test_help_tells_defaults_that_are_nothing_to_see() -> None:
    told = dict(_listed(RunConfig))
    assert told["services.reward.rewards.N.steps.separator"].endswith(r"default '\n'")
    assert told["trainer.services.reward_model"].endswith("default empty")
    assert told["trainer.prompts.first_tokens"].endswith("default 6")
    assert "runs/FILE-DATE-TIME" in told["trainer.run_dir"]
