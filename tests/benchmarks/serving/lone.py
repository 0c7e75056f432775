"""Lone calls against bare forward passes, in turns, so that a noisy machine disturbs both alike."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

WARM_UP_CALLS = 5


@dataclass(frozen=True)
class Bare:
    """A process that runs one forward pass whenever it is asked.

    Attributes:
        tokens: ids of the text that it runs.
        run: runs it; gives the seconds.
    """

    tokens: list[int]
    run: Callable[[], float]


@contextmanager
def bare_forward(command: tuple[str, ...]) -> Generator[Bare]:
    """Start the process, with the same environment as the servers."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdin is not None
    assert process.stdout is not None
    ask, answer = process.stdin, process.stdout

    def run() -> float:
        ask.write("\n")
        ask.flush()
        return float(answer.readline())

    try:
        yield Bare(json.loads(answer.readline()), run)
    finally:
        ask.close()
        process.wait(30)


def extra_seconds(call: Callable[[], float | None], bare: Bare, calls: int) -> dict[str, float]:
    """p50 of calls and of forward passes, and the medians of what the calls cost beyond a forward pass.

    Two processes that run the same forward differ by several percent, by where their memory happens to lie; so there
    are two such medians: beyond the bare forward pass before it, and, where `call` returns the seconds that the
    server's model took for it, beyond these.
    """
    called: list[float] = []
    forwards: list[float] = []
    outside: list[float] = []
    for number in range(calls + WARM_UP_CALLS):
        seconds = bare.run()
        start = time.perf_counter()
        computed = call()
        elapsed = time.perf_counter() - start
        if number >= WARM_UP_CALLS:
            called.append(elapsed)
            forwards.append(seconds)
            if computed is not None:
                outside.append(elapsed - computed)
    differences = [mine - theirs for mine, theirs in zip(called, forwards, strict=True)]
    medians = {
        "lone_p50_s": statistics.median(called),
        "lone_forward_p50_s": statistics.median(forwards),
        "lone_extra_p50_s": statistics.median(differences),
    }
    return {**medians, "lone_outside_p50_s": statistics.median(outside)} if outside else medians
