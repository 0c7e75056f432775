"""Child processes of the launcher: start, watch, read their logs, stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

_CHILD_SCRIPT = Path(__file__).with_name("child.py")

CHILD_ENVIRONMENT = {
    # Bars redraw a line with control characters; in a log each redraw is another line.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    # The tokenizers library warns, and may deadlock, when a process with its threads forks.
    "TOKENIZERS_PARALLELISM": "false",
    # OpenMP's threads spin while they wait, which starves the other processes of the cores they wait for: with two
    # processes on two busy cores, forwards of a second did not end within a minute. Threads that sleep at once
    # (OMP_WAIT_POLICY=PASSIVE) are safe, but wake late: PPO's update took 5.6 s so, and 3.8 s with this short spin.
    # Two updates at once took 9 s with PASSIVE, and 15 s with this.
    "GOMP_SPINCOUNT": "10000",
    # glibc gives memory above 32 MB back to the kernel at once and takes it again, page by page, for the next tensor.
    # Kept instead, in huge pages, PPO's update on SmolLM2 took 6.0 s rather than 7.5 s and a third of the system time.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # On CUDA devices torch hands products of a column and a row, as eager attention's for one token, to Triton, which
    # needs a C compiler and Python's headers: images and many hosts have none, and the call would fail.
    "TORCH_DISABLE_NATIVE_JIT": "1",
    # The last words of a process that dies must not be lost in a buffer.
    "PYTHONUNBUFFERED": "1",
}

SERVICE_DEATH_SIGNAL = signal.SIGKILL
"""Sent to a service when the launcher dies: it holds nothing worth a clean end."""

TRAINER_DEATH_SIGNAL = signal.SIGTERM
"""Sent to the trainer when the launcher dies: it writes a checkpoint and ends."""


@dataclass(frozen=True, slots=True)
class ChildCommand:
    """What to start.

    Attributes:
        name: for messages.
        module: Python module, run as `python -m`.
        config: its configuration file.
        log: file that takes stdout and stderr, appended to; None: the launcher's own.
        death_signal: sent to the child when the launcher dies.
        environment: variables of its own.
        inherits: file descriptors of the launcher that it keeps open.
    """

    name: str
    module: str
    config: Path
    log: Path | None
    death_signal: signal.Signals
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    inherits: tuple[int, ...] = ()


class Child:
    """A started process in a session of its own, so that the terminal's Ctrl-C reaches the launcher alone."""

    def __init__(self, command: ChildCommand) -> None:
        self.command = command
        self._forced = False
        arguments = [
            *(sys.executable, "-S", str(_CHILD_SCRIPT), str(os.getpid()), str(int(command.death_signal))),
            *(sys.executable, "-m", command.module, "--config", str(command.config)),
        ]
        output: IO[bytes] | None = None
        if command.log is not None:
            command.log.parent.mkdir(parents=True, exist_ok=True)
            output = command.log.open("ab")
        try:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                start_new_session=True,
                pass_fds=command.inherits,
                env={**CHILD_ENVIRONMENT, **os.environ, **command.environment},
            )
        finally:
            if output is not None:
                output.close()

    @property
    def name(self) -> str:
        """Name for messages."""
        return self.command.name

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to end; no effect once it has."""
        self._process.terminate()

    def kill(self) -> None:
        """End it, and whatever it started in its session, at once."""
        if self.exit_code() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def last_words(self, lines: int = 8) -> list[str]:
        """The last lines of its log, JSON records made readable."""
        if self.command.log is None or not self.command.log.is_file():
            return []
        with self.command.log.open(encoding="utf-8", errors="replace") as stream:
            return [_readable(line.rstrip("\n")) for line in deque(stream, maxlen=lines)]


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hint = "; out of memory?" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def shell_exit_code(code: int) -> int:
    """The exit code that a shell would report: 128 + signal for a process that a signal ended."""
    return code if code >= 0 else 128 - code


def stop_all(children: Sequence[Child], grace_s: float, hurry: Callable[[], bool]) -> list[str]:
    """Ask all to end, wait, and kill those that stay.

    Args:
        children: ended ones may be among them.
        grace_s: how long they may take, in seconds.
        hurry: asked again and again; True ends the wait.

    Returns:
        Names of those that had to be killed.
    """
    for child in children:
        if child.exit_code() is None:
            child.terminate()
    deadline = time.monotonic() + grace_s
    while any(child.exit_code() is None for child in children) and time.monotonic() < deadline and not hurry():
        time.sleep(0.05)
    stubborn = [child for child in children if child.exit_code() is None]
    for child in stubborn:
        child.kill()
    return [child.name for child in stubborn]


def _readable(line: str) -> str:
    try:
        parsed: object = json.loads(line)
    except json.JSONDecodeError:
        return line
    if not isinstance(parsed, dict):
        return line
    record = cast("dict[str, object]", parsed)
    level, event = str(record.pop("level", "")), str(record.pop("event", ""))
    record.pop("ts", None)
    record.pop("service", None)
    traceback = record.pop("traceback", None)
    fields = " ".join(f"{key}={value}" for key, value in record.items())
    # The closing line of a traceback names the error; the whole of it stays in the log file.
    closing = f" ({str(traceback).strip().splitlines()[-1]})" if traceback else ""
    return f"{level}: {event} {fields}{closing}".strip()
