"""When a process collects garbage: not while it imports and loads, and from then on only what came later."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def uncollected_start() -> Generator[Callable[[], None]]:
    """Collect nothing while a process imports its libraries and loads its model. Yields what ends that sooner.

    Hundreds of thousands of objects come then, to stay. Python's cyclic collector would look at all of them again each
    time that they have become a quarter more, which takes a service a second of its start; and later, in the middle
    of calls, once more for a quarter of a second, with the interpreter held. So at the end they are collected once, and
    those that are left are taken out of what the collector looks at.
    """
    started = False

    def end() -> None:
        nonlocal started
        if not started:
            started = True
            gc.enable()
            gc.collect()
            gc.freeze()
            # Python waits with a full collection until a quarter as much came as the last one left: of nothing, now.
            gc.collect()

    gc.disable()
    try:
        yield end
    finally:
        end()
