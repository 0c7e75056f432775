"""Calls on a thread that the end of the process does not wait for."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from ppod_trainer.threads import Background
from support.processes import ROOT, environment


def test_calls_are_made_in_their_order_and_tell_what_they_gave_or_raised() -> None:
    background, made, begun = Background("made"), [], threading.Event()

    def divide(by: int) -> float:
        begun.wait(10)
        made.append((by, threading.current_thread().name))
        return 6 / by

    results = [background.submit(lambda by=by: divide(by)) for by in (1, 0, 2, 3)]
    assert results[2].cancel()
    begun.set()
    assert results[0].result(10) == 6
    with pytest.raises(ZeroDivisionError):
        results[1].result(10)
    assert results[3].result(10) == 2
    assert made == [(1, "made"), (0, "made"), (3, "made")]
    background.close()


def test_the_process_ends_while_a_call_is_stuck() -> None:
    program = (
        "import threading\n"
        "from ppod_trainer.threads import Background\n"
        "begun = threading.Event()\n"
        "Background('stuck').submit(lambda: begun.set() or threading.Event().wait())\n"
        "assert begun.wait(10)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, timeout=20, check=False)
    assert done.returncode == 0
