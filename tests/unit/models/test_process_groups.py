"""Groups beside torch's default one."""

from __future__ import annotations

import os
import time

import pytest
import torch

from ppod_models.process_groups import BroadcastGroup, GroupError, open_store


def descriptors() -> int:
    """Open descriptors of this process: a group's device, and its connections."""
    return len(os.listdir("/proc/self/fd"))


def assert_ended(threads: set[str]) -> None:
    """None of these threads of this process runs any more; the kernel shows one for a moment after its end."""
    until = time.monotonic() + 5
    while left := threads & set(os.listdir("/proc/self/task")):
        assert time.monotonic() < until, left
        time.sleep(0.01)


def test_a_group_that_was_left_keeps_no_threads_while_somebody_remembers_it() -> None:
    """As the error does by which it ended, until Python looks for cycles: each that broke left three to a service."""
    store = open_store("127.0.0.1", 0, master=True, timeout_s=5)
    opened, running = descriptors(), set(os.listdir("/proc/self/task"))
    group = BroadcastGroup("gloo", store, 0, 1, 5)
    own = set(os.listdir("/proc/self/task")) - running
    assert own
    assert descriptors() > opened
    group.close()
    assert_ended(own)
    assert descriptors() <= opened
    with pytest.raises(GroupError, match="it was left"):
        group.broadcast(torch.zeros(8, dtype=torch.uint8))
    group.close()
