"""Configuration of rewards: short where it is simple, every fault at once under its path."""

from __future__ import annotations

import pytest
import yaml

from ppod_models.configuration import ConfigError, dump_config, parse_config
from ppod_services.reward.config import RewardServiceConfig
from ppod_services.reward.kinds import HeadConfig

MODEL = {"source": "somewhere"}
HEAD = {"name": "a", "model": MODEL, "head": "h"}


def parse(*rewards: object) -> RewardServiceConfig:
    return parse_config(RewardServiceConfig, {"listen": {"port": 1}, "rewards": list(rewards)}, "test")


def problems(*rewards: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(*rewards)
    return caught.value.problems


def ensemble(name: str, *members: str) -> dict[str, object]:
    return {"name": name, "kind": "ensemble", "members": list(members)}


def weighted(name: str, *members: str) -> dict[str, object]:
    return {"name": name, "kind": "sum", "terms": [{"reward": member} for member in members]}


def test_a_head_needs_no_kind_and_everything_survives_a_round_trip() -> None:
    config = parse(
        HEAD,
        {**HEAD, "name": "b", "normalization": {"mean": 1, "std": 2}, "clip": {"high": 3}},
        {"name": "f", "kind": "function", "function": "regular_expression", "parameters": {"pattern": "x"}},
        {"name": "j", "kind": "judge", "rubric": {"criteria": "c"}, "server": {"base_url": "http://x", "model": "m"}},
        {**weighted("s", "a", "e"), "steps": {"separator": "|"}},
        ensemble("e", "a", "b"),
    )
    assert isinstance(config.rewards[0], HeadConfig)
    assert parse_config(RewardServiceConfig, yaml.safe_load(dump_config(config)), "again") == config


def test_every_fault_of_every_kind_is_told_with_a_path_of_the_file() -> None:
    found = problems(
        {"name": "", "model": {"sauce": 1}, "head": "h"},
        {"name": "x", "kind": "magic"},
        "not a mapping",
        {**HEAD, "normalization": {"mean": 0, "std": 0}, "clip": {}},
        {"name": "c", "kind": "sequence_classification", "model": MODEL, "head": "h"},
        {"name": "t", "kind": "token_classification", "model": MODEL, "reduce": "max"},
        {"name": "f", "kind": "function", "function": "nothing"},
        {"name": "f", "kind": "function", "function": "length", "parameters": {"minimum": 3, "maximum": 1, "x": 1}},
        {"name": "f", "kind": "function", "function": "regular_expression", "parameters": {"pattern": "("}},
        {"name": "f", "kind": "function", "function": "test_no_function"},
        {"name": "f", "kind": "function", "function": "test_missing"},
        {"name": "f", "kind": "function", "function": "test_scripted", "parameters": {"facter": 2}},
        {"name": "f", "kind": "function", "function": "test_unwritten"},
        {"name": "j", "kind": "judge", "rubric": {"criteria": "c", "scale": {"low": 2, "high": 2}}, "server": {}},
        {"name": "j", "kind": "judge", "rubric": {"criteria": "c"}, "server": {"kind": "telepathy"}},
        {"name": "e", "kind": "ensemble", "members": ["a"], "pessimism": -1},
    )
    text = "\n".join(found)
    for part in (
        "rewards.0.name: ",
        "rewards.0.model.source: required",
        "rewards.0.model.sauce: unknown key",
        "rewards.1: expected a mapping whose kind is one of head,",
        "rewards.2: expected a mapping",
        "rewards.3.normalization.std: ",
        "rewards.3.clip: give low, high or both",
        "rewards.4.head: unknown key",
        "rewards.5.reduce: ",
        "rewards.6: no reward function 'nothing': installed packages declare exact_answer, length, regular_expression",
        "rewards.7: reward function 'length': parameters.x: unknown key",
        "parameters.pattern: not a regular expression",
        "rewards.9: reward function 'test_no_function': support.reward_functions:NoFunction must be a class with",
        "rewards.10: reward function 'test_missing': support.reward_functions:Missing cannot be loaded",
        "rewards.11: reward function 'test_scripted': parameters.facter: unknown key",
        "support.unwritten_plugin:Anything cannot be loaded: NameError: name 'pydantic' is not defined",
        "rewards.13.rubric.scale: low must be below high",
        "rewards.13.server.base_url: required",
        "rewards.14.server: expected a mapping whose kind is openai or ppod",
        "rewards.15.members: ",
        "rewards.15.pessimism: ",
    ):
        assert part in text, f"{part!r} not in\n{text}"
    assert "kind=" not in text


def test_a_judge_of_ppods_own_is_at_a_target_that_there_can_be() -> None:
    server = {"kind": "ppod", "tokenizer": "t"}
    judge = {"name": "j", "kind": "judge", "rubric": {"criteria": "c"}}
    for target in ("generation", "generation:70000"):
        assert problems({**judge, "server": {**server, "target": target}}) == [
            f"rewards.0.server.target: expected host:port, the port from 1 to 65535, found {target!r}"
        ]
    assert parse({**judge, "server": {**server, "target": "a:1,b:1"}}).rewards[0].name == "j"


@pytest.mark.parametrize(
    "url", ["http://judge:70000/v1", "http://judge:x/v1", "http://:80/v1", "http://a b", "http://[::1"]
)
def test_a_judge_is_at_an_address_that_there_can_be(url: str) -> None:
    rubric = {"criteria": "c"}
    [found] = problems({"name": "j", "kind": "judge", "rubric": rubric, "server": {"base_url": url, "model": "m"}})
    expected = "http://HOST:PORT/PATH or https://, the port from 1 to 65535"
    assert found.startswith(f"rewards.0.server.base_url: expected {expected}")
    assert found.endswith(f", found {url!r}")


def test_compositions_that_make_no_sense_are_told_all_at_once() -> None:
    [problem] = problems(
        HEAD,
        HEAD,
        weighted("self", "self"),
        weighted("one", "two", "a"),
        ensemble("two", "three", "a"),
        weighted("three", "one"),
        ensemble("twice", "a", "a"),
        weighted("stranger", "nobody"),
    )
    assert problem.startswith("rewards: ")
    for part in (
        "'a' is there twice",
        "'self' -> 'self' is a cycle",
        "'one' -> 'two' -> 'three' -> 'one' is a cycle",
        "'twice' has the member 'a' twice",
        "'stranger' has the member 'nobody', which is no reward here",
    ):
        assert part in problem
    assert problem.count("cycle") == 2


def test_a_process_has_one_number_of_threads() -> None:
    """A second number would be that of all models, or of none where it shares its trunk."""

    def head(name: str, threads: int | None) -> dict[str, object]:
        return {**HEAD, "name": name, "model": {**MODEL, "threads": threads}}

    [problem] = problems(head("a", 2), head("b", 1), head("c", None))
    assert problem == "rewards: model.threads are 1 and 2: they are of the process, and the same for all its models"
    assert len(parse(head("a", 2), head("b", 2), head("c", None)).rewards) == 3


def test_a_diamond_is_no_cycle() -> None:
    config = parse(HEAD, {**HEAD, "name": "b"}, ensemble("e", "a", "b"), weighted("s", "e", "a"))
    assert [reward.name for reward in config.rewards] == ["a", "b", "e", "s"]


def test_a_list_whose_only_item_is_wrong_is_not_called_empty() -> None:
    [problem] = problems({"name": "f", "kind": "function", "function": "nothing"})
    assert problem.startswith("rewards.0: no reward function 'nothing'")
    assert problems() == ["rewards: Tuple should have at least 1 item after validation, not 0"]
