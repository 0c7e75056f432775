"""Pushes to all exclude each other and newcomers; newcomers do not exclude each other."""

from __future__ import annotations

import threading

import pytest

from ppod_trainer.push_turns import PushTurns


def test_newcomers_go_beside_each_other_and_a_push_waits_for_them() -> None:
    turns, order = PushTurns(), list[str]()
    both_in, leave = threading.Barrier(3), threading.Event()
    waiting, pushed = threading.Event(), threading.Event()

    def newcomer() -> None:
        with turns.newcomer():
            both_in.wait(5)
            leave.wait(5)
            order.append("newcomer")

    def push() -> None:
        waiting.set()
        with turns.push():
            order.append("push")
            pushed.set()

    def late() -> None:
        with turns.newcomer():
            order.append("late")

    threads = [threading.Thread(target=newcomer) for _ in range(2)]
    for thread in threads:
        thread.start()
    both_in.wait(5)
    threads.append(threading.Thread(target=push))
    threads[-1].start()
    waiting.wait(5)
    assert not pushed.wait(0.05)
    # Who comes while a push waits goes after it: newcomers cannot keep it waiting for ever.
    threads.append(threading.Thread(target=late))
    threads[-1].start()
    leave.set()
    for thread in threads:
        thread.join(5)
    assert order == ["newcomer", "newcomer", "push", "late"]


def test_a_failed_push_frees_the_turn() -> None:
    turns = PushTurns()
    taken: list[str] = []

    def fail() -> None:
        with turns.push():
            taken.append("push")
            raise ValueError("lost")

    def take() -> None:
        for _ in range(2):
            with pytest.raises(ValueError, match="lost"):
                fail()
        with turns.newcomer():
            taken.append("newcomer")

    # In a thread: a turn that was not freed would be waited for without end.
    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(5)
    assert taken == ["push", "push", "newcomer"]
