"""Conversations of several turns: what the policy reads, what is masked, when they end; and the calculator."""

from __future__ import annotations

import itertools
import random
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydantic
import pytest

from ppod import InvalidArgument
from ppod.tensors import TokenArray
from ppod_trainer import environments
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.environments import Reply, load_environment
from ppod_trainer.environments.calculator import Calculator, CalculatorParameters, ExpressionError, evaluate
from ppod_trainer.environments.calls import EnvironmentCalls
from ppod_trainer.environments.loading import LoadedEnvironment
from ppod_trainer.episodes import EpisodeRules, EpisodeSampler, TextCodec
from ppod_trainer.errors import EnvironmentLoadError, EnvironmentReplyError, with_notes
from ppod_trainer.prompts import Prompt, split_episodes
from ppod_trainer.rollouts import Rollout, Turn, sample_seed
from ppod_trainer.sampling import Context

CODEC = TextCodec(lambda text: [ord(letter) for letter in text], lambda ids: "".join(chr(token) for token in ids))


def ids(text: str) -> TokenArray:
    return np.array(CODEC.encode(text), dtype=np.int32)


class Talker:
    """A policy that says what it was told to, turn by turn, by the first letter of the prompt."""

    def __init__(self, lines: dict[str, list[str]]) -> None:
        self.lines = lines
        self.contexts: list[tuple[str, int]] = []
        self.asked: list[int] = []

    def sample(
        self, contexts: Sequence[Context], policy_version: int | None, temperature: float | None = None
    ) -> list[Turn]:
        assert temperature is None, "none was asked for"
        self.asked.append(len(contexts))
        turns: list[Turn] = []
        for number, context in enumerate(contexts):
            text = CODEC.decode(context.tokens)
            self.contexts.append((text, context.seed))
            line = self.lines[text[0]].pop(0)
            if line == "refused":
                raise InvalidArgument("prompts", "x", "y", number)
            said = ids(line.rstrip("$"))
            logprobs = -said.astype(np.float32) / 100
            versions = np.full(len(said), policy_version or 0, dtype=np.int64)
            turns.append(
                Turn(said, logprobs, versions, truncated=line.endswith("$"), hides_stop_token=line.endswith("!"))
            )
        return turns


class Echo:
    """Repeats a turn in brackets and pays its length, until a turn ends in "!"."""

    def reset(self, seed: int) -> str:
        return chr(ord("a") + seed)

    def step(self, action: str) -> Reply:
        return Reply(f"({action})", float(len(action)), done=action.endswith("!"))


def play(
    talker: Talker,
    prompts: str,
    *,
    max_turns: int = 4,
    max_context: int = 100,
    mode: str = "stop",
    independent: bool = False,
) -> list[Rollout]:
    sampler = EpisodeSampler(
        talker,  # pyright: ignore[reportArgumentType]
        EnvironmentCalls(LoadedEnvironment(Echo, ()), threads=3),
        CODEC,
        EpisodeRules(max_turns, max_context, independent),
        BadSamples(mode),  # pyright: ignore[reportArgumentType]
    )
    asked = [Prompt(ord(letter) - ord("a"), ids(letter)) for letter in prompts]
    return sampler.sample(asked, [1000 + prompt.index for prompt in asked], 3)


both_modes = pytest.mark.parametrize("independent", [False, True], ids=["together", "independent"])


@both_modes
def test_a_conversation_by_hand(independent: bool) -> None:
    talker = Talker({"a": ["hi", "ho", "yo!"], "b": ["ok!"]})
    first, second = play(talker, "ab", independent=independent)
    assert CODEC.decode(first.tokens) == "ahi(hi)ho(ho)yo!"
    assert first.action_mask.tolist() == [*[True] * 2, *[False] * 4, *[True] * 2, *[False] * 4, *[True] * 3]
    assert first.rewards.tolist() == [0, 2, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 3]
    said = ids("hi(hi)ho(ho)yo!").astype(np.float32) / -100
    np.testing.assert_array_equal(first.sampler_logprobs, np.where(first.action_mask, said, 0).astype(np.float32))
    assert first.versions.tolist() == [3 * int(action) for action in first.action_mask]
    assert (first.truncated, first.hides_stop_token, first.sampled, int(first.versions[first.action_mask].min())) == (
        False,
        True,
        7,
        3,
    )
    assert CODEC.decode(first.visible_tokens) == "ahi(hi)ho(ho)yo"
    assert CODEC.decode(second.tokens) == "bok!"
    assert talker.asked == ([1, 1, 1, 1] if independent else [2, 1, 1])
    # The policy reads all that was said before, and each turn has a seed of its own, the same in both modes.
    seeds = dict(talker.contexts)
    assert sorted(seeds) == ["a", "ahi(hi)", "ahi(hi)ho(ho)", "b"]
    assert (seeds["a"], seeds["b"]) == (1000, 1001)
    later = [sample_seed(1000, "turn", number, 0) for number in (1, 2)]
    assert [seeds["ahi(hi)"], seeds["ahi(hi)ho(ho)"]] == later


def test_episodes_are_cut_off_at_their_limits() -> None:
    by_turns, by_room, by_tokens = "c", "d", "e"
    lines = {by_turns: ["x"] * 9, by_room: ["y" * 30] * 9, by_tokens: ["z", "zz$"]}
    [turns] = play(Talker({by_turns: list(lines["c"])}), by_turns, max_turns=3)
    assert CODEC.decode(turns.response) == "x(x)x(x)x"
    [room] = play(Talker({by_room: list(lines["d"])}), by_room, max_context=60)
    assert CODEC.decode(room.response) == "y" * 30, "no turn begins without room, and no observation ends a response"
    [tokens] = play(Talker({by_tokens: list(lines["e"])}), by_tokens)
    assert CODEC.decode(tokens.response) == "z(z)zz"
    assert turns.truncated
    assert room.truncated
    assert tokens.truncated


@both_modes
def test_an_episode_that_is_refused_is_dropped_whole_or_stops_the_run(independent: bool) -> None:
    lines = {"a": ["hi", "refused"], "b": ["ok", "ok!", "ok!"], "c": ["no!"]}
    kept = play(Talker({key: list(said) for key, said in lines.items()}), "abc", mode="skip", independent=independent)
    assert [CODEC.decode(one.tokens) for one in kept] == ["bok(ok)ok!", "cno!"]
    with pytest.raises(InvalidArgument):
        play(Talker(lines), "abc", mode="stop", independent=independent)
    assert play(Talker({"a": ["refused"]}), "a", mode="skip", independent=independent) == []


def test_the_calculator_answers_calls_and_pays_right_answers() -> None:
    calculator = Calculator(CalculatorParameters(operations="*", call_reward=0.1))
    prompt = calculator.reset(5)
    assert prompt.endswith("\nAnswer:")
    assert prompt.count("Question:") == 3
    question = prompt.rsplit("What is ", 1)[1].split("?")[0]
    right = evaluate(question)
    assert calculator.step(f" [calc: {question}]") == Reply(f" {right}.", 0.1, done=False)
    assert calculator.step(" [calc: 1/0]") == Reply(" error: only integers, + - * and parentheses.", 0.0, done=False)
    assert calculator.step(f" The answer is {right}.\n") == Reply("", 1.0, done=True)
    assert calculator.step(f" The answer is {right + 1}.\n") == Reply("", 0.0, done=True)
    assert calculator.step(f" The answer is {'7' * 5_000}") == Reply("", 0.0, done=True), "int() refuses as many digits"
    assert calculator.step(" I do not know") == Reply("", 0.0, done=True)
    assert calculator.reset(5) == prompt
    assert calculator.reset(6) != prompt


def test_the_calculator_computes_what_it_says_and_nothing_else() -> None:
    assert evaluate(" 2 + 3*(4-10) ") == -16
    assert evaluate("-7 * -8") == 56
    for text in ("2 ** 9", "__import__('os')", "1 +", "True + 1", "1.5 + 1", "9" * 65, "(" * 60, ""):
        with pytest.raises(ExpressionError):
            evaluate(text)


def test_environments_are_found_by_name_and_told_what_is_wrong() -> None:
    loaded = load_environment("calculator", {"highest": 9})
    assert loaded.stop == ("]", "\n")
    assert "What is" in loaded.make().reset(0)
    with pytest.raises(EnvironmentLoadError, match=r"no environment 'abacus': .*calculator"):
        load_environment("abacus", {})
    with pytest.raises(EnvironmentLoadError, match=r"environment 'calculator': parameters\.highest"):
        load_environment("calculator", {"highest": 1})


def test_the_documented_environment_runs_though_all_its_episodes_begin_alike() -> None:
    lines = iter((environments.__doc__ or "").splitlines())
    behind = itertools.dropwhile(lambda line: "class GuessingParameters" not in line, lines)
    code = "\n".join(itertools.takewhile(lambda line: not line or line.startswith(" "), behind))
    names: dict[str, Any] = {"pydantic": pydantic, "random": random, "Reply": Reply}
    exec(textwrap.dedent(code), names)
    kind = names["Guessing"]
    loaded = LoadedEnvironment(lambda: kind(kind.parameters_type(highest=9)), kind.stop)
    prompts = split_episodes(EnvironmentCalls(loaded, threads=2).prompts(8), CODEC.encode, heldout=3)
    assert len(prompts.heldout) == 3
    assert {prompt.index for prompt in prompts.training + prompts.heldout} == set(range(8))
    replies: list[Reply] = []
    for seed in range(8):
        episode = loaded.make()
        assert episode.reset(seed) == "Guess a number from 1 to 9.\n"
        assert episode.step("²\n") == Reply("higher\n", 0.0, done=False), "no number"
        replies += [episode.step(f" {guess}\n") for guess in range(1, 10)]
    assert replies.count(Reply("", 1.0, done=True)) == 8
    assert {reply.observation for reply in replies} == {"", "higher\n", "lower\n"}


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (("", 1.0, True, {}), "step returned ('', 1.0, True, {}), expected a Reply"),
        (None, "step returned None, expected a Reply"),
        (Reply("", float("nan"), done=True), "step returned the reward nan, expected a finite number"),
        (Reply("", None, done=True), "step returned the reward None, expected a finite number"),  # type: ignore[arg-type]
        (Reply("", 1e39, done=True), "step returned the reward 1e+39, expected a finite number"),
        (Reply("", 10**400, done=True), f"step returned the reward {10**400}, expected a finite number"),
        (
            Reply("", np.array([1.0, 2.0]), done=True),  # type: ignore[arg-type]
            "step returned the reward array([1., 2.]), expected a finite number",
        ),
        (Reply(None, 0.0, done=False), "step returned the observation None, expected a text"),  # type: ignore[arg-type]
    ],
)
def test_what_an_environment_must_not_answer_is_named_with_its_episode(reply: Any, found: str) -> None:
    class Odd:
        def reset(self, seed: int) -> str:
            del seed
            return "a"

        def step(self, action: str) -> Reply:
            del action
            return reply

    calls = EnvironmentCalls(LoadedEnvironment(Odd, ()), threads=1)
    bad_samples = BadSamples("skip")
    sampler = EpisodeSampler(Talker({"a": ["x"]}), calls, CODEC, EpisodeRules(2, 99), bad_samples)
    with pytest.raises(EnvironmentReplyError) as caught:
        sampler.sample([Prompt(7, ids("a"))], [1], None)
    assert with_notes(caught.value) == f"environment Odd: {found}; environment Odd, turn 0 of the episode of seed 7"


def test_a_prompt_that_is_no_text_is_named() -> None:
    class Odd(Echo):
        def reset(self, seed: int) -> str:
            del seed
            return None  # type: ignore[return-value]

    with pytest.raises(EnvironmentReplyError, match=r"environment Odd: reset\(0\) returned None, expected a text"):
        EnvironmentCalls(LoadedEnvironment(Odd, ()), threads=1).prompts(1)
