"""Starts the services and the trainer on this machine, watches them, and leaves nothing behind."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ppod.channel import insecure_channel
from ppod_deploy.processes import (
    SERVICE_DEATH_SIGNAL,
    TRAINER_DEATH_SIGNAL,
    Child,
    ChildCommand,
    describe_exit,
    shell_exit_code,
    stop_all,
)
from ppod_deploy.ranks import rank_environments
from ppod_deploy.run_checks import run_notes
from ppod_deploy.run_config import RunConfig, busy_ports, target_of
from ppod_models.configuration import ConfigModel, dump_config

POLL_S = 0.05
"""How often children and signals are looked at; a child's death is noticed within this time."""

ECHO_S = 0.25
"""A signal that follows so soon is the same request: `timeout` sends it to the process and to its group."""

TRAINER_GRACE_S = 300.0
"""Time for the trainer to finish its step and write a checkpoint; a step of a large model takes minutes."""

FOLLOWER_GRACE_S = 10.0
"""Time for the trainer's other ranks to notice that rank 0 has ended."""

LAST_REPLIES_S = 5.0
"""Time for a service's last replies and spans, after it has drained."""

RUN_FILE = "run.yaml"
"""The resolved run file, kept in the run directory: what `--resume` starts from."""

HEALTH_NAMES = {
    "reward": "ppod.v1.RewardService",
    "reference": "ppod.v1.ReferenceService",
    "generation": "ppod.v1.GenerationService",
}


if TYPE_CHECKING:
    # Generic in its type stubs only.
    HealthCheck = grpc.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class LaunchError(Exception):
    """The run cannot start or go on; the message says which process, why, and where to look."""


class Interrupted(Exception):
    """The launcher was asked to stop.

    Attributes:
        signal: the signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


@dataclass(slots=True)
class Interrupts:
    """Signals that came in. Only noted by the handler; the launcher's loop acts on them.

    Attributes:
        received: in their order, without the echo of the first.
        first_s: when the first one came, by the monotonic clock.
    """

    received: list[int] = field(default_factory=list[int])
    first_s: float = 0.0

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        now = time.monotonic()
        if not self.received:
            self.first_s = now
        elif now - self.first_s < ECHO_S:
            return
        self.received.append(number)

    def check(self) -> None:
        """Raise Interrupted once a signal came in."""
        if self.received:
            raise Interrupted(self.received[0])

    def repeated(self) -> bool:
        """Whether a second signal came in: the user will not wait any longer. To close the terminal does not say so."""
        return any(number != signal.SIGHUP for number in self.received[1:])


class HealthProbe:
    """Asks a service's health without ever blocking the loop that also watches for dead children."""

    def __init__(self, target: str, service: str) -> None:
        self._channel = insecure_channel(target)
        check = health_pb2_grpc.HealthStub(self._channel).Check  # pyright: ignore
        self._check = cast("HealthCheck", check)
        self._request = health_pb2.HealthCheckRequest(service=service)
        self._call = self._check.future(self._request, timeout=2.0)

    def ready(self) -> bool:
        """Whether the latest answer was SERVING; asks again after any other."""
        if not self._call.done():
            return False
        answered = self._call.code() == grpc.StatusCode.OK
        if answered and self._call.result().status == health_pb2.HealthCheckResponse.SERVING:
            return True
        self._call = self._check.future(self._request, timeout=2.0)
        return False

    def close(self) -> None:
        """Drop the call under way and the channel."""
        self._call.cancel()
        self._channel.close()


class Launcher:
    """One run on this machine: three services and, for `run`, a trainer.

    Args:
        config: the validated run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._run_dir = config.trainer.run_dir
        self._interrupts = Interrupts()
        self._services: list[Child] = []
        self._trainer: Child | None = None
        self._followers: list[Child] = []
        self._lock: tuple[int, ...] = ()

    def run(self) -> int:
        """Services, then the trainer to its end. Returns the exit code for the shell: the trainer's.

        Raises:
            LaunchError: a service did not start, or died before the trainer was done.
            Interrupted: SIGINT, SIGTERM or SIGHUP came in. All children are gone in any case.
        """
        for note in run_notes(self._config):
            _say(f"note: {note}")
        with self._everything_stopped_after():
            # The trainer imports and loads its model while the services do, and then waits for their health itself.
            self._start_services(self._start_trainer)
            assert self._trainer is not None
            while (code := self._trainer.exit_code()) is None:
                self._interrupts.check()
                self._check_services()
                self._check_followers()
                time.sleep(POLL_S)
            if code != 0:
                # A trainer that fails because a service or a rank died may be seen first; the cause is what to name.
                self._check_services()
                self._check_followers(killed_only=True)
                _say(f"the trainer ended: {describe_exit(code)}")
            return shell_exit_code(code)

    def up(self) -> None:
        """Services only, until a signal. Raises as `run` does."""
        with self._everything_stopped_after():
            self._start_services()
            for name, service in self._config.services.items():
                _say(f"{name} at {target_of(service.listen, service.listen.port)}")
            _say("Ctrl-C stops them")
            while True:
                self._interrupts.check()
                self._check_services()
                time.sleep(POLL_S)

    def _start_trainer(self) -> None:
        ranks = [
            Child(
                ChildCommand(
                    "trainer" if rank == 0 else f"trainer's rank {rank}",
                    "ppod_trainer",
                    self._config_file("trainer"),
                    None,
                    TRAINER_DEATH_SIGNAL,
                    environment,
                    # Where the launcher is killed it ends after that, and has the directory to itself until then.
                    inherits=self._lock,
                )
            )
            for rank, environment in enumerate(rank_environments(self._config.trainer.ranks.local))
        ]
        self._trainer, self._followers = ranks[0], ranks[1:]

    def _start_services(self, meanwhile: Callable[[], None] | None = None) -> None:
        problems = busy_ports(self._config, trains=meanwhile is not None)
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise LaunchError(f"nothing was started: ports are taken\n{lines}")
        self._write_configs()
        _say(f"run directory {self._run_dir}; starting the services (logs in {self._run_dir / 'logs'})")
        start = time.monotonic()
        probes: dict[str, HealthProbe] = {}
        with ExitStack() as stack:
            for name, service in self._config.services.items():
                self._interrupts.check()
                log = self._run_dir / "logs" / f"{name}.jsonl"
                command = ChildCommand(
                    name, f"ppod_services.{name}", self._config_file(name), log, SERVICE_DEATH_SIGNAL
                )
                self._services.append(Child(command))
                # With TLS the other ports say nothing in plain text.
                port = service.listen.health_port or service.listen.port
                probes[name] = HealthProbe(target_of(service.listen, port), HEALTH_NAMES[name])
                stack.callback(probes[name].close)
            if meanwhile is not None:
                meanwhile()
            self._wait_ready(probes, start)

    def _wait_ready(self, waiting: dict[str, HealthProbe], start: float) -> None:
        limit_s = self._config.trainer.services.ready_timeout_s
        left = dict(waiting)
        while left:
            self._interrupts.check()
            self._check_services()
            if self._trainer is not None and not self._trainer_runs():
                return
            for name in [name for name, probe in left.items() if probe.ready()]:
                del left[name]
                _say(f"{name} ready after {time.monotonic() - start:.1f} s")
            if left and time.monotonic() - start > limit_s:
                child = next(child for child in self._services if child.name in left)
                raise LaunchError(
                    f"{', '.join(left)}: not ready within {limit_s:g} s (trainer.services.ready_timeout_s)"
                    + _last_words(child)
                )
            time.sleep(POLL_S)

    def _check_services(self) -> None:
        for child in self._services:
            code = child.exit_code()
            if code is not None:
                raise LaunchError(f"service {child.name} ended: {describe_exit(code)}{_last_words(child)}")

    def _check_followers(self, killed_only: bool = False) -> None:
        """Rank 0 notices the loss of another rank only when it next needs it, which may be minutes later.

        Args:
            killed_only: rank 0 has failed. Others that ended with an error of their own then do so for its sake.
        """
        for child in self._followers:
            code = child.exit_code()
            # With exit code 0 the run is over, and rank 0 about to end.
            if code and (code < 0 or not killed_only):
                raise LaunchError(f"{child.name} ended: {describe_exit(code)}")

    @contextmanager
    def _everything_stopped_after(self) -> Generator[None]:
        """Hold the run directory and the signals; at the end, however it comes, stop trainer, then services."""
        with _locked(self._run_dir) as lock, _handling_signals(self._interrupts):
            self._lock = (lock,)
            try:
                yield
            except Interrupted as interrupt:
                wait = "; waiting for its checkpoint (once more: stop at once)" if self._trainer_runs() else ""
                _say(f"{interrupt.signal.name}: stopping{wait}")
                raise
            except LaunchError as error:
                # Said before the wait for the trainer, which may be long.
                if self._trainer_runs():
                    _say(f"{str(error).splitlines()[0]}; stopping the trainer")
                raise
            finally:
                self._stop_everything()

    def _trainer_runs(self) -> bool:
        return self._trainer is not None and self._trainer.exit_code() is None

    def _stop_everything(self) -> None:
        killed: list[str] = []
        if self._trainer is not None:
            killed += stop_all([self._trainer], TRAINER_GRACE_S, self._interrupts.repeated)
            killed += stop_all(self._followers, FOLLOWER_GRACE_S, self._interrupts.repeated)
        graces = [service.drain_grace_s for _, service in self._config.services.items()]
        # More than a service gives itself, so that its own clean end comes first.
        killed += stop_all(self._services, max(graces) + LAST_REPLIES_S, self._interrupts.repeated)
        if killed:
            _say(f"killed: {', '.join(killed)}")

    def _write_configs(self) -> None:
        sections: Sequence[tuple[str, ConfigModel]] = [
            *self._config.services.items(),
            ("trainer", self._config.trainer),
        ]
        with _writing_to(self._run_dir):
            self._config_file("trainer").parent.mkdir(parents=True, exist_ok=True)
            for name, section in sections:
                self._config_file(name).write_text(dump_config(section), encoding="utf-8")
            (self._run_dir / RUN_FILE).write_text(dump_config(self._config), encoding="utf-8")

    def _config_file(self, name: str) -> Path:
        return self._run_dir / "config" / f"{name}.yaml"


def _say(message: str) -> None:
    """To stderr: stdout is the trainer's."""
    try:
        print(f"ppod: {message}", file=sys.stderr, flush=True)
    except OSError:
        # The terminal was closed. Nothing more has a reader, and the end is an orderly one all the same.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _last_words(child: Child) -> str:
    lines = child.last_words()
    body = "".join(f"\n  | {line}" for line in lines) or "\n  | (it wrote nothing)"
    return f"\n  the end of {child.command.log}:{body}"


@contextmanager
def _handling_signals(interrupts: Interrupts) -> Generator[None]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Under nohup it stays ignored: the run is to outlive its terminal.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = [(number, signal.signal(number, interrupts.note)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextmanager
def _locked(run_dir: Path) -> Generator[int]:
    """Hold a run directory against a second launcher, which would write into the same logs and checkpoints.

    Yields the descriptor that holds it: as long as a process has it open.
    """
    with _writing_to(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        held = (run_dir / ".lock").open("w")
    with held as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"{run_dir}: another run is using this directory, or the trainer of one whose launcher was killed, "
                "which still writes its checkpoint"
            ) from None
        yield lock.fileno()


@contextmanager
def _writing_to(run_dir: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise LaunchError(f"trainer.run_dir: {run_dir} cannot be written: {where}{error.strerror}") from error
