"""Episodes and their environments at the same time: who waits for whom, and what an error ends.

Time is made of events: a tool answers when the test lets it. A wait that is longer than `LONG_S` fails its test.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType

import numpy as np
import pytest

from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.environments import Reply
from ppod_trainer.environments.calls import EnvironmentCalls
from ppod_trainer.environments.loading import LoadedEnvironment
from ppod_trainer.episodes import EpisodeRules, EpisodeSampler, TextCodec
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, Turn
from ppod_trainer.sampling import Context
from ppod_trainer.threads import at_once

LONG_S = 20.0
CODEC = TextCodec(lambda text: [ord(letter) for letter in text], lambda ids: "".join(chr(token) for token in ids))

both_modes = pytest.mark.parametrize("independent", [False, True], ids=["together", "independent"])


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    join_threads()


def join_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("at-once"):
            thread.join(LONG_S)
            assert not thread.is_alive()


def passed(event: threading.Event) -> None:
    assert event.wait(LONG_S), "it never came"


@dataclass
class World:
    """What a test sees of all its episodes; `tool` is what each step does, given the episode and the turn's number."""

    tool: Callable[[int, int], object]
    last_turns: Sequence[int]
    asked: list[tuple[int, ...]] = field(default_factory=list)
    said: list[tuple[int, int]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sample(
        self, contexts: Sequence[Context], policy_version: int | None, temperature: float | None = None
    ) -> list[Turn]:
        """A policy that says one letter; an episode's prompt is its number."""
        assert (policy_version, temperature) == (1, None)
        with self.lock:
            self.asked.append(tuple(int(context.tokens[0]) for context in contexts))
        one = np.ones(1)
        return [Turn(one.astype(np.int32) * 97, -one, one.astype(np.int64), False, False) for _ in contexts]

    def enter(self) -> None:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)

    def leave(self) -> None:
        with self.lock:
            self.at_once -= 1


class Tool:
    """An environment whose tool is the world's."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._episode = self._turn = 0

    def reset(self, seed: int) -> str:
        self._episode = seed
        return str(seed)

    def step(self, action: str) -> Reply:
        assert action == "a"
        world = self._world
        world.enter()
        try:
            world.tool(self._episode, self._turn)
        finally:
            world.leave()
        with world.lock:
            world.said.append((self._episode, self._turn))
        self._turn += 1
        return Reply("b", 1.0, done=self._turn == world.last_turns[self._episode])


def play(world: World, *, independent: bool, threads: int = 16) -> list[Rollout]:
    sampler = EpisodeSampler(
        world,  # pyright: ignore[reportArgumentType]
        EnvironmentCalls(LoadedEnvironment(lambda: Tool(world), ()), threads),
        CODEC,
        EpisodeRules(max_turns=10, max_context_tokens=100, independent=independent),
        BadSamples("stop"),
    )
    prompts = [Prompt(number, np.array([number], dtype=np.int32)) for number in range(len(world.last_turns))]
    return sampler.sample(prompts, [100 + prompt.index for prompt in prompts], 1)


def test_episodes_that_go_on_by_themselves_overtake_a_slow_one() -> None:
    other_ended = threading.Event()

    def tool(episode: int, turn: int) -> None:
        if episode == 0 and turn == 0:
            passed(other_ended)
        if (episode, turn) == (1, 3):
            other_ended.set()

    world = World(tool, last_turns=[2, 4])
    rollouts = play(world, independent=True)
    assert world.said == [(1, 0), (1, 1), (1, 2), (1, 3), (0, 0), (0, 1)]
    assert [(one.prompt.index, one.sampled, one.seed) for one in rollouts] == [(0, 2, 100), (1, 4, 101)]
    assert sorted(world.asked) == [(0,)] * 2 + [(1,)] * 4


def test_episodes_that_take_turns_together_never_do() -> None:
    last_of_turn = [threading.Event() for _ in range(4)]

    def tool(episode: int, turn: int) -> None:
        # The first episode is the last of each turn to get its answer.
        if episode == 0:
            passed(last_of_turn[turn])
        elif episode == 2:
            last_of_turn[turn].set()

    world = World(tool, last_turns=[2, 1, 4])
    rollouts = play(world, independent=False)
    assert world.asked == [(0, 1, 2), (0, 2), (2,), (2,)]
    assert [turn for _, turn in world.said] == [0, 0, 0, 1, 1, 2, 3]
    assert [(one.prompt.index, one.sampled) for one in rollouts] == [(0, 2), (1, 1), (2, 4)]


@both_modes
def test_slow_tools_are_waited_for_at_the_same_time(independent: bool) -> None:
    all_there = threading.Barrier(5, timeout=LONG_S)
    world = World(lambda *_: all_there.wait(), last_turns=[2] * 5)
    assert len(play(world, independent=independent)) == 5
    assert world.most_at_once == 5


@both_modes
def test_resets_are_waited_for_at_the_same_time(independent: bool) -> None:
    all_there = threading.Barrier(3, timeout=LONG_S)

    class Slow(Tool):
        def reset(self, seed: int) -> str:
            all_there.wait()
            return super().reset(seed)

    world = World(lambda *_: None, last_turns=[1] * 3)
    calls = EnvironmentCalls(LoadedEnvironment(lambda: Slow(world), ()), 3)
    assert calls.prompts(3) == ["0", "1", "2"]
    rules = EpisodeRules(max_turns=10, max_context_tokens=100, independent=independent)
    sampler = EpisodeSampler(world, calls, CODEC, rules, BadSamples("stop"))  # pyright: ignore[reportArgumentType]
    prompts = [Prompt(number, np.array([number], dtype=np.int32)) for number in range(3)]
    assert len(sampler.sample(prompts, [1, 2, 3], 1)) == 3


@both_modes
def test_no_more_tools_work_at_the_same_time_than_there_are_threads(independent: bool) -> None:
    pairs = threading.Barrier(2, timeout=LONG_S)

    def tool(_episode: int, _turn: int) -> None:
        pairs.wait()
        time.sleep(0.02)  # so that more than two would meet

    world = World(tool, last_turns=[3] * 6)
    assert len(play(world, independent=independent, threads=2)) == 6
    assert world.most_at_once == 2


@both_modes
def test_with_one_thread_tools_work_one_after_the_other(independent: bool) -> None:
    threads: set[int] = set()

    def tool(_episode: int, _turn: int) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.01)  # so that two would meet

    world = World(tool, last_turns=[3] * 4)
    play(world, independent=independent, threads=1)
    assert world.most_at_once == 1
    if not independent:
        assert threads == {threading.get_ident()}
        assert world.said == [(episode, turn) for turn in range(3) for episode in range(4)]


@both_modes
def test_an_environments_error_ends_all_at_once(independent: bool) -> None:
    """It is raised while another tool still works, whose episode then asks for nothing more."""
    both, raised = threading.Barrier(2, timeout=LONG_S), threading.Event()

    def tool(episode: int, _turn: int) -> None:
        both.wait()
        if episode == 1:
            raise ZeroDivisionError("the tool broke")
        passed(raised)

    world = World(tool, last_turns=[3, 3])
    with pytest.raises(ZeroDivisionError, match="the tool broke") as caught:
        play(world, independent=independent)
    assert caught.value.__notes__ == ["environment Tool, turn 0 of the episode of seed 1"]
    asked = list(world.asked)
    raised.set()
    join_threads()
    assert world.said == [(0, 0)]
    assert world.asked == asked


@both_modes
def test_a_tool_that_hangs_is_named_while_it_is_waited_for(
    independent: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppod_trainer.environments.calls._PATIENCE_S", 0.2)
    told = threading.Event()

    class Tells(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == "ppod_trainer.environments.calls":
                told.set()

    # Behind the one that keeps the records: a tool that answered before would be faster than that one, now and then.
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [*root.handlers, Tells()])

    def tool(episode: int, turn: int) -> None:
        if (episode, turn) == (1, 1):
            passed(told)

    assert len(play(World(tool, last_turns=[2, 3]), independent=independent)) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "environment Tool, turn 1 of the episode of seed 1: no answer after 0.2 s; the step waits: bound what it waits "
        "for"
    ]


def test_a_reset_that_raises_is_named() -> None:
    class Away(Tool):
        def reset(self, seed: int) -> str:
            raise ConnectionError(f"no game {seed}")

    world = World(lambda *_: None, last_turns=[1])
    with pytest.raises(ConnectionError, match="no game 2") as caught:
        EnvironmentCalls(LoadedEnvironment(lambda: Away(world), ()), 1).begin(2)
    assert caught.value.__notes__ == ["environment Away, reset(2)"]


@both_modes
def test_whoever_is_told_to_stop_waits_for_no_tool(independent: bool) -> None:
    class ToldToStop(Exception):
        pass

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise ToldToStop

    stopped = threading.Event()
    both = threading.Barrier(2, timeout=LONG_S)

    def tool(episode: int, turn: int) -> None:
        both.wait()
        if (episode, turn) == (1, 0):
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGUSR1)
        passed(stopped)

    before = signal.signal(signal.SIGUSR1, stop)
    world = World(tool, last_turns=[3, 3])
    try:
        with pytest.raises(ToldToStop):
            play(world, independent=independent)
    finally:
        signal.signal(signal.SIGUSR1, before)
    asked = list(world.asked)
    stopped.set()
    join_threads()
    assert world.asked == asked


def test_calls_keep_their_order_their_bound_and_their_context() -> None:
    step = ContextVar[str]("step", default="none")
    step.set("this")
    pairs = threading.Barrier(3, timeout=LONG_S)

    def call(number: int) -> tuple[int, str]:
        pairs.wait()
        return number, step.get()

    found = at_once([lambda number=number: call(number) for number in range(9)], 3)
    assert found == [(number, "this") for number in range(9)]
    assert at_once([], 3) == []


def test_what_has_not_begun_when_one_fails_never_will() -> None:
    begun: list[int] = []
    both, release = threading.Barrier(2, timeout=LONG_S), threading.Event()

    def call(number: int) -> None:
        begun.append(number)
        both.wait()
        if number == 1:
            raise ZeroDivisionError
        passed(release)

    with pytest.raises(ZeroDivisionError):
        at_once([lambda number=number: call(number) for number in range(9)], 2)
    release.set()
    join_threads()
    assert sorted(begun) == [0, 1]
