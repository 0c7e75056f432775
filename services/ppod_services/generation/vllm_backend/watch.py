"""Ends the engine's processes with the service: vLLM's own live on when the one that started them is killed."""

from __future__ import annotations

import os
import select
import signal
import threading

SERVICE_VARIABLE = "PPOD_VLLM_SERVICE_PID"
"""Environment variable of the engine's processes with the process id of the service."""
FORKS_VARIABLE = "PPOD_VLLM_FORKS_WORKERS"
"""Environment variable of the engine's processes: set where it may fork its workers, to spare them their imports."""


def in_engine_process() -> None:
    """vLLM calls this plugin in all of its processes, before they load anything."""
    service = os.environ.get(SERVICE_VARIABLE)
    if service is None or int(service) == os.getpid():
        return
    end_with_service()
    if FORKS_VARIABLE in os.environ:
        # It was spawned by a process with gRPC's threads, and has none itself.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"


def end_with_service() -> None:
    """End this process, and the engine's that started it, when the service ends, whatever way that is.

    So it does when the engine's ends: a worker that waits for another would live on, and as a fork holds open by what
    the service notices the engine's end.
    """
    service = int(os.environ[SERVICE_VARIABLE])
    parent = os.getppid()
    try:
        descriptors = [os.pidfd_open(one) for one in {service, parent}]
    except ProcessLookupError:
        descriptors = []

    def watch() -> None:
        if descriptors:
            select.select(descriptors, [], [])
        # A worker may live in the engine's process; and whoever took this one over since is none of ours.
        if os.getppid() == parent != service:
            os.kill(parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="ppod-service-watch", daemon=True).start()
