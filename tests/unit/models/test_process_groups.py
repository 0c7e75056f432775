"""Groups beside torch's default one."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch

from ppod_models.process_groups import BroadcastGroup, GroupError, open_store, reach_store, wait_for
from support.faulty_network import faulty_proxies
from support.processes import free_ports


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


@contextmanager
def silent_port() -> Generator[int]:
    """Connections are taken, and nothing is ever answered, as by a process that was stopped."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_store_that_does_not_answer_is_given_up_in_time() -> None:
    begun = time.monotonic()
    with silent_port() as port, pytest.raises(GroupError, match=r"cannot be reached: it did not answer within 0\.3 s"):
        reach_store("127.0.0.1", port, 0.3, threading.Event())
    with pytest.raises(GroupError, match="cannot be reached"):
        reach_store("127.0.0.1", free_ports(1)[0], 0.3, threading.Event())
    assert time.monotonic() - begun < 3


def test_a_store_is_looked_for_no_longer_than_somebody_needs_it() -> None:
    gone = threading.Event()
    threading.Timer(0.2, gone.set).start()
    begun = time.monotonic()
    with silent_port() as port, pytest.raises(GroupError, match="went away"):
        reach_store("127.0.0.1", port, 60, gone)
    assert time.monotonic() - begun < 5


def test_a_key_of_a_store_that_was_cut_off_is_given_up_in_time() -> None:
    """Without an answer c10d would not even know that its waiting was cancelled."""
    store = open_store("127.0.0.1", 0, master=True, timeout_s=5)
    with faulty_proxies(store.port, 1) as [link]:
        client = reach_store("127.0.0.1", link.port, 5, threading.Event())
        link.faults.lost = "down"
        begun = time.monotonic()
        with pytest.raises(GroupError, match=r"key was not told within 0\.3 s"):
            wait_for(client, "key", 0.3)
        assert time.monotonic() - begun < 3


def test_a_store_that_listens_late_is_found() -> None:
    [port] = free_ports(1)
    stores: list[object] = []
    opening = threading.Timer(0.5, lambda: stores.append(open_store("127.0.0.1", port, master=True, timeout_s=5)))
    opening.start()
    client = reach_store("127.0.0.1", port, 20, threading.Event())
    opening.join()
    client.set("key", "value")
    assert wait_for(client, "key", 5) == b"value"
