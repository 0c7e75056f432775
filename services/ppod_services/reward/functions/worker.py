"""`python -m ppod_services.reward.functions.worker`: the process that runs one reward function.

It reads lines of JSON on stdin and answers on stdout: first the function's name and parameters, answered by "ready";
then batches of samples, each sample answered by its score. An exception ends the process, with its text as the answer.
"""

from __future__ import annotations

import json
import numbers
import os
import signal
import sys
from functools import partial
from types import TracebackType
from typing import IO

from ppod_services.reward.functions import FunctionSample, RewardFunction
from ppod_services.reward.functions.registry import make_function

_LONGEST_ERROR = 500


def main() -> None:
    """Serve until stdin ends."""
    requests, replies = _take_pipes()
    _report_the_end(replies)
    setup = json.loads(requests.readline())
    function = make_function(setup["function"], setup["parameters"])
    _answer(replies, {"ready": True})
    while line := requests.readline():
        batch = json.loads(line)
        for prompt, response, reference in batch["samples"]:
            _answer(replies, {"score": _score(function, FunctionSample(prompt, response, reference), batch["limit_s"])})
    if os.getpgrp() == os.getpid():
        # The service is gone: nobody else ends what the function has started.
        os.killpg(0, signal.SIGKILL)


def _score(function: RewardFunction, sample: FunctionSample, limit_s: float) -> float:
    # The service stops a process that is late. Should the service itself be gone, the kernel does: the timer's default
    # is to end the process, even in the middle of a regular expression, where no other thread of Python gets a turn.
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    score: object = function.score(sample)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(score, bool) or not isinstance(score, numbers.Real):
        raise TypeError(f"score() returned {score!r}, expected a number")
    return float(score)


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Keep stdin and stdout for requests and answers.

    A function, and what it starts, reads nothing there, and what it prints goes to stderr. Processes that it forks do
    not keep the pipes open: the service would wait for the last of them.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    _close(0)
    os.dup2(2, 1)
    os.register_at_fork(after_in_child=partial(_close, requests.fileno(), replies.fileno()))
    return requests, replies


def _close(*descriptors: int) -> None:
    """Let them lead nowhere; whoever holds them may go on to close them."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _answer(replies: IO[bytes], answer: dict[str, bool | float | str]) -> None:
    replies.write(json.dumps(answer).encode() + b"\n")


def _report_the_end(replies: IO[bytes]) -> None:
    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _answer(replies, {"error": f"{kind.__name__}: {error}"[:_LONGEST_ERROR]})
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


if __name__ == "__main__":
    main()
