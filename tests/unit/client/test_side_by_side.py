"""Work for many tensors in a few threads: each once, in this thread too, and nothing is left running by a failure."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ppod.client import work_side_by_side

THREADS = 3


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS) as pool:
        yield pool


def test_each_is_done_once_and_all_threads_take_part(pool: ThreadPoolExecutor) -> None:
    together = threading.Barrier(THREADS, timeout=10)
    done: list[tuple[int, int]] = []

    def work(index: int) -> None:
        if index < THREADS:
            # Passed only when as many threads are here at the same time.
            together.wait()
        done.append((index, threading.get_ident()))

    work_side_by_side(work, range(50), pool, THREADS)
    assert sorted(index for index, _ in done) == list(range(50))
    assert threading.get_ident() in {thread for _, thread in done}


@pytest.mark.parametrize("mine", [True, False])
def test_an_error_of_any_thread_is_raised_when_all_have_ended(pool: ThreadPoolExecutor, mine: bool) -> None:
    me = threading.get_ident()
    raised, running = threading.Event(), threading.Barrier(2, timeout=10)
    ended: list[int] = []

    def work(index: int) -> None:
        running.wait()
        if (threading.get_ident() == me) == mine:
            raised.set()
            raise ValueError(f"tensor {index}")
        raised.wait(10)
        ended.append(index)

    with pytest.raises(ValueError, match="tensor"):
        work_side_by_side(work, [0, 1], pool, 2)
    assert len(ended) == 1
