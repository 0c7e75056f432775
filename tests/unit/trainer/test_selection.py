"""Dynamic sampling and history resampling: what is kept, what is sampled next, and that a resumed run does the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppod_models.configuration import parse_config
from ppod_trainer.config import TrainerConfig
from ppod_trainer.prompts import Prompt, PromptSet
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn
from ppod_trainer.selection import DynamicSampling, EpochSchedule, HistorySchedule, PromptSchedule
from ppod_trainer.selection.schedule import further_prompts
from ppod_trainer.step_figures import rollout_figures
from ppod_trainer.step_rollouts import build_step_rollouts


def scored(prompt: int, group: int, outcome: float) -> ScoredRollout:
    tokens = np.array([1], dtype=np.int32)
    turn = Turn(
        tokens, np.zeros(1, dtype=np.float32), np.ones(1, dtype=np.int64), truncated=False, hides_stop_token=False
    )
    rollout = Rollout.of_turn(Prompt(prompt, tokens), turn, seed=0)
    object.__setattr__(rollout, "group", group)
    return ScoredRollout(rollout, outcome, np.zeros(1, dtype=np.float32))


def round_of(*groups: str, first: int = 0) -> list[ScoredRollout]:
    """Groups as the outcomes of their samples, such as "101"; numbered from `first`."""
    return [scored(first + n, first + n, float(digit)) for n, group in enumerate(groups) for digit in group]


def kept_groups(rollouts: Sequence[ScoredRollout]) -> list[int]:
    return list(dict.fromkeys(one.rollout.group for one in rollouts))


def prompts_of(count: int) -> PromptSet:
    return PromptSet([Prompt(index, np.array([index], dtype=np.int32)) for index in range(count)], [])


def indices(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.index for prompt in prompts]


def test_groups_that_say_nothing_are_replaced() -> None:
    selection = DynamicSampling(groups=3, max_rounds=4)
    one = selection.select([round_of("11", "10", "00")])
    assert not one.full
    two = selection.select([round_of("11", "10", "00"), round_of("01", "11", "10", first=3)])
    assert two.full
    assert kept_groups(two.rollouts) == [1, 3, 5]
    assert len(two.rollouts) == 6
    assert two.figures == {"selection/rounds": 2, "selection/uniform_groups": 3, "selection/filled_groups": 0}


def test_what_is_left_over_is_dropped() -> None:
    selected = DynamicSampling(groups=2, max_rounds=4).select([round_of("11", "10"), round_of("01", "10", first=2)])
    assert kept_groups(selected.rollouts) == [1, 2]


def test_a_step_whose_rounds_gave_too_little_is_filled_up() -> None:
    """A run whose prompts are all solved goes on, with advantages of 0."""
    selection = DynamicSampling(groups=3, max_rounds=2)
    selected = selection.select([round_of("11", "00", "11"), round_of("11", "01", "11", first=3)])
    assert not selected.full
    assert kept_groups(selected.rollouts) == [4, 0, 1]
    assert selected.figures == {"selection/rounds": 2, "selection/uniform_groups": 5, "selection/filled_groups": 2}


def test_a_group_of_which_one_sample_is_left_says_nothing() -> None:
    assert kept_groups(DynamicSampling(1, 2).select([round_of("1", "10")]).rollouts) == [1]


@pytest.mark.parametrize(("normalize", "kept"), [("none", [1, 2]), ("scale", [0, 1])])
def test_groups_whose_scores_are_all_clipped_alike_say_nothing(normalize: str, kept: list[int]) -> None:
    """Of scores that are normalised first it is only known later."""
    config = parse_config(
        TrainerConfig,
        {
            "rewards": {"clip": 2, "normalize": normalize},
            "rollout": {"batch_size": 4, "samples_per_prompt": 2, "dynamic_sampling": {}},
        },
        "test",
    )
    selection = build_step_rollouts(config, prompts_of(3), cast(Any, None)).selection
    assert kept_groups(selection.select([round_of("35", "15", "01")]).rollouts) == kept


def test_groups_that_were_paid_the_same_in_parts_say_nothing() -> None:
    """As turns pay 0.6 and 0.1, which in float32 do not add up to the 0.7 that another sample's only turn is paid."""

    def paid(prompt: int, *rewards: float) -> ScoredRollout:
        one = scored(prompt, prompt, 0.0)
        object.__setattr__(one.rollout, "rewards", np.array(rewards, dtype=np.float32))
        return one

    samples = [paid(0, 0.6, 0.1), paid(0, 0.7, 0.0), paid(1, 0.6, 0.1), paid(1, 0.6, 0.2)]
    assert samples[0].outcome != samples[1].outcome
    selected = DynamicSampling(groups=1, max_rounds=2).select([samples])
    assert kept_groups(selected.rollouts) == [1]
    assert selected.figures["selection/uniform_groups"] == 1
    assert rollout_figures(samples)["groups/uniform"] == 0.5


def test_clipping_leaves_what_an_environment_paid() -> None:
    paid = [scored(0, 0, 3.0), scored(0, 0, 5.0)]
    paid[1].rollout.rewards[-1] = 0.5
    selection = DynamicSampling(1, 2, clip=2.0)
    assert selection.select([paid]).full
    paid[1].rollout.rewards[-1] = 0.0
    assert not selection.select([paid]).full


@given(
    rounds=st.lists(st.lists(st.text("01", min_size=1, max_size=4), min_size=1, max_size=5), min_size=1, max_size=4),
    groups=st.integers(1, 6),
)
@settings(max_examples=80, deadline=None)
def test_invariants_of_dynamic_sampling(rounds: list[list[str]], groups: int) -> None:
    made, first = [], 0
    for names in rounds:
        made.append(round_of(*names, first=first))
        first += len(names)
    names = [name for part in rounds for name in part]
    selected = DynamicSampling(groups, 9).select(made)
    kept = kept_groups(selected.rollouts)
    varied = [number for number, name in enumerate(names) if len(set(name)) > 1]
    assert len(kept) == min(groups, len(names))
    assert kept[: len(varied)] == varied[:groups], "no group that says something is left out for one that does not"
    assert selected.full == (len(varied) >= groups)
    assert len(selected.rollouts) == sum(len(names[number]) for number in kept), "groups are kept whole"


def test_further_rounds_have_other_prompts_by_step_and_round_alone() -> None:
    schedule = EpochSchedule(prompts_of(10), 3, seed=5)
    rounds = [indices(schedule.prompts(2, number)) for number in range(3)]
    assert len({index for drawn in rounds for index in drawn}) == 9
    again = EpochSchedule(prompts_of(10), 3, seed=5)
    assert [indices(again.prompts(2, number)) for number in (2, 1, 0)] == rounds[::-1]
    assert indices(schedule.prompts(3, 1)) != rounds[1]
    assert indices(EpochSchedule(prompts_of(10), 3, seed=6).prompts(2, 1)) != rounds[1]


def test_further_rounds_begin_again_where_prompts_run_out() -> None:
    pool = prompts_of(5).training
    drawn = [index for number in (1, 2, 3) for index in indices(further_prompts(pool[:2], pool, (0, 1), number))]
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [2, 3, 4]
    assert indices(further_prompts(pool, pool, (0, 1), 1)) != indices(pool), "with all, where all were chosen"


def test_further_rounds_of_a_curriculum_have_its_prompts() -> None:
    """Lengths 1 to 12: in two first steps of three prompts those up to 4, then up to 8."""
    training = [Prompt(index, np.zeros(index + 1, dtype=np.int32)) for index in range(12)]
    schedule = EpochSchedule(PromptSet(training, [], curriculum_steps=2), 3, seed=5)
    for step, reach in ((0, 4), (1, 8), (2, 12)):
        drawn = [schedule.prompts(step, number) for number in range(5)]
        assert max(len(prompt.token_ids) for prompts in drawn for prompt in prompts) == reach
        assert [len(prompts) for prompts in drawn] == [3] * 5
        assert {index for prompts in drawn for index in indices(prompts)} == set(range(reach))


def play(schedule: PromptSchedule, steps: range, solved: frozenset[int] | set[int]) -> list[list[int]]:
    """Take steps, in which samples of some prompts are always right, of the others half."""
    taken: list[list[int]] = []
    for step in steps:
        prompts = indices(schedule.prompts(step, 0))
        names = ["11" if index in solved else ("10", "01")[index % 2] for index in prompts]
        samples = [
            scored(index, group, float(digit))
            for group, (index, name) in enumerate(zip(prompts, names, strict=True))
            for digit in name
        ]
        schedule.record(step, [samples])
        schedule.settle(step + 1)
        taken.append(prompts)
    return taken


def test_what_is_solved_is_left_out_of_the_next_epoch_and_comes_back_after_it() -> None:
    schedule = HistorySchedule(prompts_of(6), 2, 0, 1.0)
    first = play(schedule, range(3), {1, 4})
    assert sorted(index for step in first for index in step) == [0, 1, 2, 3, 4, 5]
    second = play(schedule, range(3, 5), set())
    assert sorted(index for step in second for index in step) == [0, 2, 3, 5]
    third = play(schedule, range(5, 8), set())
    assert sorted(index for step in third for index in step) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("solved", [0.9, 0.7, 1.0, 100.1, -0.3])
def test_a_prompt_is_solved_by_what_float32_makes_of_the_outcome(solved: float) -> None:
    schedule = HistorySchedule(prompts_of(2), 2, 0, solved)
    paid = {0: float(np.float32(solved)), 1: float(np.float32(solved)) - 1e-3}
    schedule.record(0, [[scored(index, index, outcome) for index, outcome in paid.items()]])
    schedule.settle(1)
    assert schedule.state()["solved"] == (0,)


def test_all_wrong_is_kept() -> None:
    schedule = HistorySchedule(prompts_of(2), 2, 0, 1.0)
    prompts = schedule.prompts(0, 0)
    samples = [scored(prompt.index, n, 0.0) for n, prompt in enumerate(prompts) for _ in range(2)]
    figures = schedule.record(0, [samples])
    assert figures == {"selection/skipped_prompts": 0, "selection/epoch": 0}
    assert sorted(indices(schedule.prompts(1, 0))) == [0, 1]


def test_an_epoch_with_nothing_left_has_all() -> None:
    schedule = HistorySchedule(prompts_of(4), 2, 0, 1.0)
    taken = play(schedule, range(4), {0, 1, 2, 3})
    assert sorted(taken[2] + taken[3]) == [0, 1, 2, 3]


def test_an_epoch_may_end_amid_a_step() -> None:
    """Three prompts by twos: the second step holds the last of one epoch and the first of the next."""
    schedule = HistorySchedule(prompts_of(3), 2, 0, 1.0)
    first, second, third = play(schedule, range(3), set())
    assert sorted([*first, second[0]]) == [0, 1, 2]
    assert sorted([second[1], *third]) == [0, 1, 2]


def test_rounds_count_together() -> None:
    """A prompt that came in two rounds is solved only if it was right in both; further rounds leave out, too."""
    schedule = HistorySchedule(prompts_of(4), 4, 0, 1.0)
    schedule.prompts(0, 0)
    right, wrong = [scored(index, index, 1.0) for index in range(4)], [scored(2, 5, 0.0)]
    schedule.record(0, [right, wrong])
    schedule.settle(1)
    assert schedule.state()["solved"] == (0, 1, 3)
    assert indices(schedule.prompts(1, 0)) == [2, *indices(schedule.prompts(1, 0))[1:]]
    assert set(indices(schedule.prompts(1, 1))) <= {0, 1, 2, 3}


@given(
    count=st.integers(1, 9), per_step=st.integers(1, 5), stop=st.integers(0, 6), solved=st.frozensets(st.integers(0, 8))
)
@settings(max_examples=60, deadline=None)
def test_a_resumed_run_has_the_prompts_of_one_that_was_not_stopped(
    count: int, per_step: int, stop: int, solved: frozenset[int]
) -> None:
    straight = play(HistorySchedule(prompts_of(count), per_step, 3, 1.0), range(9), solved)
    stopped = HistorySchedule(prompts_of(count), per_step, 3, 1.0)
    before = play(stopped, range(stop), solved)
    # Steps that were made ahead, and never trained, leave no trace.
    state = json.loads(json.dumps(stopped.state()))
    resumed = HistorySchedule(prompts_of(count), per_step, 3, 1.0)
    resumed.restore(state)
    assert before + play(resumed, range(stop, 9), solved) == straight


def test_steps_that_run_ahead_are_not_in_the_state() -> None:
    schedule = HistorySchedule(prompts_of(5), 2, 0, 1.0)
    play(schedule, range(2), {0, 1, 2, 3, 4})
    kept = schedule.state()
    prompts = schedule.prompts(2, 0)
    schedule.record(2, [[scored(prompt.index, n, 0.0) for n, prompt in enumerate(prompts)]])
    assert schedule.state() == kept
    assert kept["step"] == 2
    with pytest.raises(KeyError):
        HistorySchedule(prompts_of(5), 2, 0, 1.0).restore({"step": 2})


def test_a_step_is_remembered_once_it_is_full_or_its_rounds_are_over() -> None:
    rollout = {"batch_size": 4, "samples_per_prompt": 2, "dynamic_sampling": {"max_rounds": 2}}
    values = {"rollout": {**rollout, "history_resampling": {}}}
    steps = build_step_rollouts(parse_config(TrainerConfig, values, "test"), prompts_of(4), cast(Any, None))
    drawn = [indices(steps.schedule.prompts(0, number)) for number in range(2)]
    assert sorted(drawn[0] + drawn[1]) == [0, 1, 2, 3]
    rounds = [[scored(index, index, 1.0) for index in prompts for _ in range(2)] for prompts in drawn]
    first = steps.select(0, rounds[:1])
    assert (first.full, set(first.figures)) == (False, set(steps.selection.select(rounds[:1]).figures))
    last = steps.select(0, rounds)
    assert not last.full
    assert last.figures == {
        "selection/rounds": 2,
        "selection/uniform_groups": 4,
        "selection/filled_groups": 2,
        "selection/skipped_prompts": 0,
        "selection/epoch": 0,
    }
    steps.schedule.settle(1)
    assert steps.schedule.state()["solved"] == (0, 1, 2, 3)
    [one, two] = steps.schedule.prompts(1, 0)
    full = steps.select(1, [[scored(prompt.index, prompt.index, paid) for prompt in (one, two) for paid in (0.0, 1.0)]])
    assert full.full
    assert {"selection/skipped_prompts", "selection/epoch"} < set(full.figures)
    steps.schedule.settle(2)
    assert steps.schedule.state()["step"] == 2
