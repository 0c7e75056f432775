"""Several samples of a prompt: seeds and groups by place, prompts that are run once, samples that are refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from ppod import InvalidArgument, NonFiniteOutput, Sampling
from ppod.client import Completion, FinishReason
from ppod.client.completions import WeightSpan
from ppod.client.identity import ModelState, Timing
from ppod.tensors import TokenArray
from ppod_models.configuration import ConfigError, parse_config
from ppod_trainer import sampling
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.config import RolloutConfig, TrainerConfig
from ppod_trainer.errors import WithheldError, with_notes
from ppod_trainer.metrics import StepTimer
from ppod_trainer.prompts import Prompt, PromptSet
from ppod_trainer.rollouts import Rollout
from ppod_trainer.sampling import Context, ResponseSampler, TurnSampler, equal_parts, equal_runs
from ppod_trainer.step_rollouts import StepRollouts, build_step_rollouts


class Generation:
    """Answers each completion with its prompt's first token and its seed.

    Refuses prompts, and aborts seeds, fails at them and withholds what they make as told.
    """

    def __init__(
        self,
        refused: frozenset[int] = frozenset(),
        aborted: frozenset[int] = frozenset(),
        broken: frozenset[int] = frozenset(),
        withheld: frozenset[int] = frozenset(),
    ) -> None:
        self.refused = refused
        self.aborted = set(aborted)
        self.broken = broken
        self.withheld = withheld
        self.asked: list[tuple[int, int]] = []
        self.samplings: list[Sampling] = []
        self.replica_count = 1

    def generate(
        self,
        prompts: Sequence[TokenArray],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        weight_version: int | None,
        resumed_tokens: Sequence[int],
    ) -> list[Completion]:
        assert len(prompts) == len(resumed_tokens)
        assert len(seeds) == len(prompts) * sampling.n
        self.asked.append((len(prompts), sampling.n))
        self.samplings.append(sampling)
        for index, prompt in enumerate(prompts):
            if int(prompt[0]) in self.refused:
                raise InvalidArgument("prompts", "x", "y", index)
        for number, seed in enumerate(seeds):
            if seed in self.broken:
                raise NonFiniteOutput("logits", number // sampling.n, "nan")
        return [
            self._complete(prompts[number // sampling.n], number // sampling.n, seed, weight_version)
            for number, seed in enumerate(seeds)
        ]

    def _complete(self, prompt: TokenArray, index: int, seed: int, version: int | None) -> Completion:
        ending = FinishReason.ABORTED if seed in self.aborted else FinishReason.STOP
        self.aborted.discard(seed)
        if seed in self.withheld:
            ending = FinishReason.FILTERED
        return Completion(
            index=index,
            token_ids=np.array([prompt[0], seed % 1000], dtype=np.int32),
            logprobs=np.zeros(2, dtype=np.float32),
            finish_reason=ending,
            seed=seed,
            state=ModelState("policy", version or 0, ""),
            timing=Timing(0.0, 0.0, 2),
            weight_spans=(WeightSpan(version or 0, 2),),
            filter_reason="rude" if seed in self.withheld else "",
        )


def turns_of(generation: Generation) -> TurnSampler:
    return TurnSampler(generation, RolloutConfig())  # pyright: ignore[reportArgumentType]


def contexts(*firsts: int) -> list[Context]:
    return [Context(np.array([first, 1], dtype=np.int32), 50 + index) for index, first in enumerate(firsts)]


def test_stops_of_the_configuration_and_of_the_environment_end_a_turn() -> None:
    generation = Generation()
    config = RolloutConfig(stop=("\n\n",), stop_token_ids=(5, 6))
    TurnSampler(generation, config, ("<call>",)).sample(contexts(7), 3)  # pyright: ignore[reportArgumentType]
    [sampling] = generation.samplings
    assert (sampling.stop, sampling.stop_token_ids) == (("\n\n", "<call>"), (5, 6))


def test_a_stop_token_is_hidden_from_rewards_unless_they_read_it() -> None:
    generation = Generation(aborted=frozenset({52}))
    turns = TurnSampler(generation, RolloutConfig(), (), None, (50,))  # pyright: ignore[reportArgumentType]
    made = turns.sample(contexts(7, 8, 9), 3)
    assert [turn.tokens[-1] for turn in made] == [50, 51, 52]
    assert [turn.hides_stop_token for turn in made] == [False, True, True]


def test_equal_neighbours_are_asked_for_as_one_prompt() -> None:
    generation = Generation()
    turns = turns_of(generation).sample(contexts(7, 7, 7, 9, 9, 9), 3)
    assert generation.asked == [(2, 3)]
    assert [turn.tokens.tolist() for turn in turns] == [[7, 50], [7, 51], [7, 52], [9, 53], [9, 54], [9, 55]]


def test_runs_of_different_lengths_are_asked_for_one_by_one() -> None:
    generation = Generation()
    turns_of(generation).sample(contexts(7, 7, 9), 3)
    assert generation.asked == [(3, 1)]
    assert [equal_runs([np.array(list(text))]) for text in ("ab", "")] == [1, 1]
    one, two = np.array([1]), np.array([2])
    assert equal_runs([one, one, two, two]) == 2
    assert equal_runs([one, one, two, two, two]) == 1
    # The same prompt twice in a row is a run of its own length.
    assert equal_runs([one, one, one, one]) == 4
    assert equal_runs([one, two, one]) == 1


@pytest.mark.parametrize(
    ("firsts", "count", "expected"),
    [
        ((1, 2, 3, 4, 5), 2, [[0, 1], [2, 3, 4]]),
        ((1, 2, 3), 5, [[0], [1], [2]]),
        ((7, 7, 7, 9, 9, 9, 8, 8), 2, [[0, 1, 2], [3, 4, 5, 6, 7]]),
        ((7, 7, 7), 4, [[0, 1, 2]]),
        ((1, 2), 0, [[0, 1]]),
    ],
)
def test_contexts_are_divided_by_whole_groups(firsts: tuple[int, ...], count: int, expected: list[list[int]]) -> None:
    found = equal_parts(contexts(*firsts), range(len(firsts)), count)
    assert [list(part) for part in found] == expected


def test_replicas_share_a_call_and_the_order_stays() -> None:
    generation = Generation(aborted=frozenset({53}))
    generation.replica_count = 3
    spread = TurnSampler(generation, RolloutConfig())  # pyright: ignore[reportArgumentType]
    turns = spread.sample(contexts(7, 7, 9, 9, 8, 8), 3)
    assert sorted(generation.asked) == [(1, 1), (1, 2), (1, 2), (1, 2)]
    expected = [[7, 50], [7, 51], [9, 52], [9, 53, 9, 53], [8, 54], [8, 55]]
    assert [turn.tokens.tolist() for turn in turns] == expected
    refusing = Generation(refused=frozenset({8}))
    refusing.replica_count = 3
    spread = TurnSampler(refusing, RolloutConfig())  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidArgument) as caught:
        spread.sample(contexts(7, 7, 9, 9, 8, 8), 3)
    assert caught.value.sample == 4


def test_a_request_has_no_more_sequences_than_generation_takes() -> None:
    """As where a replica left since the run began: the share of another is larger then."""
    generation = Generation()
    limited = TurnSampler(generation, RolloutConfig(), (), 4)  # pyright: ignore[reportArgumentType]
    turns = limited.sample(contexts(7, 7, 9, 9, 8, 8), 3)
    assert sorted(generation.asked) == [(1, 2), (2, 2)], "groups are not cut"
    assert [turn.tokens.tolist() for turn in turns] == [[7, 50], [7, 51], [9, 52], [9, 53], [8, 54], [8, 55]]


def test_a_request_is_no_larger_than_a_message_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_MOST_BYTES", 1_000)

    def asked(*parts: tuple[int, int], aborted: frozenset[int] = frozenset()) -> list[tuple[int, int]]:
        """Requests for samples of prompts of these first tokens and lengths."""
        generation = Generation(aborted=aborted)
        long = [Context(np.full(length, first, np.int32), 50 + at) for at, (first, length) in enumerate(parts)]
        turns_of(generation).sample(long, 3)
        return sorted(generation.asked)

    assert asked((1, 100), (2, 100), (3, 100), (4, 100)) == [(2, 1), (2, 1)]
    assert asked((1, 100), (2, 200), (3, 20), (4, 100)) == [(1, 1), (1, 1), (2, 1)]
    # A prompt that several samples share is sent once.
    assert asked((1, 100), (1, 100), (2, 100), (2, 100)) == [(2, 2)]
    # One that is too long by itself is asked for all the same: whoever refuses it tells why.
    assert asked((1, 300), (2, 10)) == [(1, 1), (1, 1)]
    # Handed back, each has tokens of its own, and is asked for with all of them.
    again = asked((1, 100), (1, 100), (2, 100), (2, 100), aborted=frozenset({50, 51, 52, 53}))
    assert again == [(2, 1), (2, 1), (2, 2)]


def test_what_was_begun_goes_on_one_by_one() -> None:
    generation = Generation(aborted=frozenset({51, 53}))
    turns = turns_of(generation).sample(contexts(7, 7, 9, 9), None)
    assert generation.asked == [(2, 2), (2, 1)]
    assert [turn.tokens.tolist() for turn in turns] == [[7, 50], [7, 51, 7, 51], [9, 52], [9, 53, 9, 53]]


def test_a_prompt_that_is_refused_takes_its_whole_group_and_no_other() -> None:
    generation = Generation(refused=frozenset({9}))
    sampler = ResponseSampler(turns_of(generation), BadSamples("skip"))
    prompts = [Prompt(first, np.array([first, 1], dtype=np.int32)) for first in (7, 9, 8) for _ in range(2)]
    rollouts = sampler.sample(prompts, range(60, 66), 3)
    assert [one.response.tolist() for one in rollouts] == [[7, 60], [7, 61], [8, 64], [8, 65]]


@pytest.mark.parametrize("firsts", [(7, 7, 7, 7), (7, 7, 9, 9)], ids=["one group", "groups"])
def test_a_completion_that_fails_takes_none_of_its_group(firsts: tuple[int, ...]) -> None:
    """The service names its prompt alone, which others share."""
    generation = Generation(broken=frozenset({61}))
    prompts = [Prompt(first, np.array([first, 1], dtype=np.int32)) for first in firsts]
    rollouts = ResponseSampler(turns_of(generation), BadSamples("skip")).sample(prompts, range(60, 64), 3)
    assert [one.seed for one in rollouts] == [60, 62, 63]
    with pytest.raises(NonFiniteOutput) as caught:
        ResponseSampler(turns_of(generation), BadSamples("stop")).sample(prompts, range(60, 64), 3)
    assert caught.value.sample == 1


def test_completions_that_are_withheld_cost_the_others_no_second_sampling(caplog: pytest.LogCaptureFixture) -> None:
    generation = Generation(aborted=frozenset({62}), withheld=frozenset({61, 63}))
    prompts = [Prompt(first, np.array([first, 1], dtype=np.int32)) for first in (7, 7, 9, 9)]
    rollouts = ResponseSampler(turns_of(generation), BadSamples("skip")).sample(prompts, range(60, 64), 3)
    assert [(one.seed, one.response.tolist()) for one in rollouts] == [(60, [7, 60]), (62, [9, 62, 9, 62])]
    assert generation.asked == [(2, 2), (1, 1)], "all of them, and then what new weights handed back"
    told = "dropped a sample: sample {0}: generation's output filter withholds the completion: rude; "
    told += "sample {0} has prompt {1}"
    assert [record.getMessage() for record in caplog.records] == [told.format(1, 7), told.format(3, 9)]


def test_a_completion_that_is_withheld_stops_a_run_that_skips_none() -> None:
    generation = Generation(withheld=frozenset({61}))
    prompts = [Prompt(first, np.array([first, 1], dtype=np.int32)) for first in (7, 9)]
    with pytest.raises(WithheldError) as caught:
        ResponseSampler(turns_of(generation), BadSamples("stop")).sample(prompts, range(60, 62), 3)
    expected = "sample 1: generation's output filter withholds the completion: rude; sample 1 has prompt 9; "
    expected += "rollout.on_bad_sample: skip would leave it out"
    assert with_notes(caught.value) == expected


class Collector:
    """Makes a rollout for each seed but some; remembers what was asked."""

    def __init__(self, lost: Sequence[int] = ()) -> None:
        self.lost = lost
        self.prompts: list[int] = []
        self.seeds: list[int] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        version: int | None,
        timer: StepTimer,
        temperature: float | None,
    ) -> list[Rollout]:
        del timer
        self.prompts, self.seeds = [prompt.index for prompt in prompts], list(seeds)
        sampler = ResponseSampler(turns_of(Generation()), BadSamples("stop"))
        made = sampler.sample(prompts, seeds, version, temperature)
        return [one for index, one in enumerate(made) if index not in self.lost]


def steps_of(collector: Collector, **rollout: int) -> StepRollouts:
    config = parse_config(TrainerConfig, {"rollout": rollout, "ppo": {"minibatches": 1}}, "test")
    prompts = PromptSet([Prompt(index, np.array([index], dtype=np.int32)) for index in range(5)], [])
    return build_step_rollouts(config, prompts, collector)  # pyright: ignore[reportArgumentType]


def test_a_step_has_fewer_prompts_with_several_samples_each() -> None:
    collector = Collector()
    rollouts = steps_of(collector, batch_size=6, samples_per_prompt=3).generate(1, 0, 4, StepTimer())
    first, second = collector.prompts[0], collector.prompts[3]
    assert collector.prompts == [first] * 3 + [second] * 3
    assert first != second
    assert len(set(collector.seeds)) == 6
    assert [one.group for one in rollouts] == [0, 0, 0, 1, 1, 1]
    assert [one.prompt.index for one in rollouts] == collector.prompts


def test_one_sample_a_prompt_is_drawn_as_ever() -> None:
    """Groups of one: the prompts and the seeds of a run without groups."""
    collector = Collector()
    rollouts = steps_of(collector, batch_size=3).generate(0, 0, 4, StepTimer())
    assert len(set(collector.prompts)) == 3
    assert [one.group for one in rollouts] == [0, 1, 2]


def test_groups_survive_what_is_dropped() -> None:
    rollouts = steps_of(Collector(lost=(0, 1, 4)), batch_size=6, samples_per_prompt=2).generate(0, 0, 4, StepTimer())
    assert [one.group for one in rollouts] == [1, 1, 2]


def test_rounds_of_a_step_share_neither_seeds_nor_groups() -> None:
    collector, seeds, groups = Collector(), set[int](), list[int]()
    steps = steps_of(collector, batch_size=4, samples_per_prompt=2)
    for number in range(3):
        groups += [one.group for one in steps.generate(2, number, 4, StepTimer())]
        seeds.update(collector.seeds)
    assert len(seeds) == 12
    assert groups == [group for group in range(6) for _ in range(2)]


def problems(values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainerConfig, values, "test")
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
def test_what_compares_samples_refuses_groups_of_one(kind: str) -> None:
    values = {"advantages": {"kind": kind}, "kl": {"coefficient": 0}}
    found = problems(values)
    assert f"advantages.kind {kind}" in found
    assert "rollout.samples_per_prompt is 1" in found
    whole = {**values, "rollout": {"samples_per_prompt": 4}}
    assert parse_config(TrainerConfig, whole, "test").rollout.samples_per_prompt == 4


def test_contradictions_are_refused() -> None:
    assert "batch_size is 9" in problems({"rollout": {"batch_size": 9, "samples_per_prompt": 2}})
    grpo = {"advantages": {"kind": "grpo"}, "rollout": {"samples_per_prompt": 2}}
    assert "kl.placement" in problems(grpo)
    assert parse_config(TrainerConfig, {**grpo, "kl": {"placement": "loss", "estimator": "k3"}}, "test")
    assert "no values to go on with" in problems({"advantages": {"kind": "rloo", "bootstrap_truncated": True}})
