"""Spans at the end of a process: sent where somebody takes them, and not waited for where nobody does."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from support.processes import environment

ENDING = """
import os, sys
from opentelemetry import trace
from ppod_models.tracing import configure_tracing, flush_tracing
configure_tracing(sys.argv[1], "test")
for _ in range(10):
    with trace.get_tracer("test").start_as_current_span("span"):
        pass
print("flushing", flush=True)
flush_tracing(0.5)
print("flushed", flush=True)
os._exit(0)
"""


def test_a_collector_that_does_not_answer_is_not_waited_for_beyond_the_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = [sys.executable, "-c", ENDING, f"http://127.0.0.1:{silent.getsockname()[1]}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "flushing\n"
            begun = time.monotonic()
            assert process.stdout.readline() == "flushed\n"
            assert 0.4 < time.monotonic() - begun < 5.0
            assert process.wait(10) == 0
