"""A random policy learns a verifiable task, and steps choose their samples by what was paid; through real services."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.copying_runs import GROUPS, IN_LOSS, Config, CopyingSystem, copying_system, whole_words

from .conftest import records_of, wait_for_step


@pytest.fixture(scope="module")
def copying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CopyingSystem]:
    with copying_system(tmp_path_factory.mktemp("copying")) as made:
        yield made


def directory_of(config: Config) -> Path:
    return Path(str(config["run_dir"]))


def steps_of(config: Config) -> list[dict[str, float]]:
    return [record for record in records_of(directory_of(config)) if "score/mean" in record]


LEARNERS: dict[str, dict[str, Config]] = {
    "ppo": {},
    "grpo": {"advantages": {"kind": "grpo"}, "rollout": GROUPS, "kl": IN_LOSS},
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_random_policy_learns_to_copy_words_that_it_never_saw(copying: CopyingSystem, name: str) -> None:
    """Held-out words, copied whole: from none to nearly all, by nothing but what the environment pays."""
    config = copying.config(name, **LEARNERS[name])
    copying.train(config)
    words = whole_words(directory_of(config))
    assert words[0] < 0.1
    assert words[int(str(config["steps"]))] > 0.9
    letters = [record["heldout/score"] for record in records_of(directory_of(config)) if "heldout/score" in record]
    assert letters[0] < 0.15
    assert letters[-1] > 0.95


SMALL: Config = {"batch_size": 32, "samples_per_prompt": 4, "max_tokens": 3}
DAPO: dict[str, Config] = {"advantages": {"kind": "grpo"}, "rollout": {**SMALL, "dynamic_sampling": {"max_rounds": 3}}}


def test_groups_that_say_nothing_are_replaced_by_further_prompts(copying: CopyingSystem) -> None:
    config = copying.config("dapo", steps=8, **DAPO)
    copying.train(config)
    records = steps_of(config)
    assert {record["selection/rounds"] for record in records} >= {2}, "at first most groups were paid nothing at all"
    for record in records:
        assert record["samples/dropped"] == 0
        assert record["groups/uniform"] == pytest.approx(record["selection/filled_groups"] / 8)
        assert record["selection/filled_groups"] == 0 or record["selection/rounds"] == 3
    assert any(record["selection/uniform_groups"] > record["selection/filled_groups"] for record in records)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("kind", ["dynamic", "history"])
def test_a_stopped_run_goes_on_with_the_same_prompts(copying: CopyingSystem, kind: str, ahead: int) -> None:
    """20 prompts, of which most count as solved at once: epochs end amid steps, and outcomes decide what follows.

    Overlapped, the samples that were under way at the stop are made anew, by newer weights; the prompts are the same.
    """
    choice: Config = (
        {"dynamic_sampling": {"max_rounds": 3}}
        if kind == "dynamic"
        else {"history_resampling": {"solved_outcome": 0.0 if ahead else 0.3}}
    )
    changes: dict[str, Config] = {
        "environment": {"episodes": 30},
        "prompts": {"heldout": 10},
        "advantages": {"kind": "grpo"},
        "rollout": {**SMALL, **choice, "max_staleness": ahead},
        "ppo": {"importance_cap": 2.0 if ahead else None},
    }
    name = f"{kind}-{ahead}"
    straight = copying.config(f"{name}-straight", steps=24, **changes)
    copying.train(straight)
    stopped = copying.config(f"{name}-stopped", steps=24, **changes)
    process = copying.start(stopped)
    wait_for_step(process, directory_of(stopped), 6)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.wait() == 128 + signal.SIGTERM, stderr
    assert "resume from" in stdout
    copying.train({**stopped, "resume": True})
    if kind == "history":
        keys = ("selection/epoch", "selection/skipped_prompts")
        one, two = ([tuple(record[key] for key in keys) for record in steps_of(each)] for each in (straight, stopped))
        assert one == two
        assert max(skipped for _, skipped in one) > 0
        kept = [json.loads(path.read_text())["components"]["prompts"] for path in last_states(straight, stopped)]
        assert kept[0] == kept[1]
    if not ahead:
        assert records_of(directory_of(straight)) == records_of(directory_of(stopped))


def last_states(*configs: Config) -> list[Path]:
    return [max(directory_of(config).glob("checkpoints/*/trainer.json")) for config in configs]


@pytest.mark.parametrize("kind", ["gigpo", "spa"])
def test_turns_are_told_apart(copying: CopyingSystem, kind: str) -> None:
    """A letter a turn, paid at the end: both run, learn something, and go on after a stop as if there had been none."""
    changes: dict[str, Config] = {
        "environment": {"name": "test_spelling", "max_turns": 3},
        "advantages": {"kind": kind},
        "rollout": {"batch_size": 64, "samples_per_prompt": 4, "max_tokens": 2},
    }
    straight = copying.config(f"{kind}-straight", steps=10, **changes)
    copying.train(straight)
    records = steps_of(straight)
    assert records[-1]["score/mean"] > records[0]["score/mean"]
    assert all(2.5 < record["response/length"] < 6 for record in records)
    stopped = copying.config(f"{kind}-stopped", steps=10, **changes)
    process = copying.start(stopped)
    wait_for_step(process, directory_of(stopped), 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    copying.train({**stopped, "resume": True})
    assert records_of(directory_of(straight)) == records_of(directory_of(stopped))
