"""Trouble while weights are replaced, with processes that are killed, stopped and hung."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ppod import (
    DeadlineExceeded,
    FailedPrecondition,
    GenerationClient,
    InvalidArgument,
    PpodError,
    Sampling,
    Unavailable,
    WeightClient,
)
from ppod.client import NO_RETRY, Delivery, RelayHop, WeightPush
from support.forked import ForkedProcess
from support.processes import ServiceProcess, metrics_of, running_service, start_module
from support.services import tiny_model_config
from support.tiny_model import MAX_TOKENS, build_model, save_tiny_model
from support.weight_checks import assert_serves, assert_takes_next, retry_busy
from support.weight_tensors import weight_tensors

IDLE_TIMEOUT_S = 1.2


@pytest.fixture(scope="module")
def service(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service that outlives the tests."""
    with starting(tiny_model_dir, tmp_path_factory.mktemp("trouble")) as up:
        yield up


@pytest.fixture
def version(service: ServiceProcess) -> int:
    """The version that the service has after a good push of seed 90."""
    with WeightClient(service.admin_target) as weights:
        version = weights.status().state.weight_version + 1
        retry_busy(lambda: weights.prepare(version, weight_tensors(build_model(seed=90))))
        weights.commit(version)
    return version


@pytest.fixture
def fragile(tiny_model_dir: Path, tmp_path: Path) -> Iterator[ServiceProcess]:
    """A service that a test may kill; it serves version 1."""
    with starting(tiny_model_dir, tmp_path) as up:
        assert_takes_next(up, 1, seed=90)
        yield up


def starting(model_dir: Path, directory: Path) -> AbstractContextManager[ServiceProcess]:
    values = {
        "model": tiny_model_config(model_dir),
        "weights": {"idle_timeout_s": IDLE_TIMEOUT_S, "relay_targets": ["127.0.0.1:*"]},
    }
    return running_service("ppod_services.generation", directory, values)


@pytest.fixture
def pusher(tmp_path: Path) -> Iterator[Callable[..., ForkedProcess]]:
    """Starts a sender that stops after so many bytes, and waits until it has sent them."""
    started: list[ForkedProcess] = []

    def start(service: ServiceProcess, version: int, *, seed: int = 91, size: int = 100_000) -> ForkedProcess:
        arguments = (service.admin_target, str(version), str(seed), str(size))
        name = f"pusher-{len(started)}"
        process = start_module("support.weight_pusher", *arguments, directory=tmp_path, name=name)
        started.append(process)
        wait_until(lambda: "sent" in said(tmp_path, name))
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(10)


def said(directory: Path, name: str = "pusher-0") -> str:
    """What a process has written to stdout so far."""
    path = directory / f"{name}.stdout"
    return path.read_text() if path.is_file() else ""


def wait_until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


class Caught:
    """A call in a thread, and the PpodError that it ends with."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.error: PpodError | None = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def wait(self) -> PpodError:
        self._thread.join(20)
        assert not self._thread.is_alive()
        assert self.error is not None
        return self.error

    def _run(self, call: Callable[[], object]) -> None:
        try:
            call()
        except PpodError as error:
            self.error = error


def test_a_sender_killed_in_the_middle_leaves_nothing(
    service: ServiceProcess, version: int, pusher: Callable[..., ForkedProcess]
) -> None:
    process = pusher(service, version + 1)
    process.kill()
    process.wait(10)
    assert_serves(service, version, build_model(seed=90))
    assert_takes_next(service, version + 1, seed=92)


def test_a_sender_that_hangs_times_out(
    service: ServiceProcess, version: int, pusher: Callable[..., ForkedProcess], tmp_path: Path
) -> None:
    pusher(service, version + 1)
    started = time.monotonic()
    wait_until(lambda: "DEADLINE_EXCEEDED" in said(tmp_path))
    assert IDLE_TIMEOUT_S / 2 < time.monotonic() - started < IDLE_TIMEOUT_S + 2
    assert f"silent for {IDLE_TIMEOUT_S:g} s after 2 messages" in said(tmp_path)
    assert_serves(service, version, build_model(seed=90))
    assert_takes_next(service, version + 1, seed=92)


def test_a_sender_that_is_stopped_times_out(
    service: ServiceProcess, version: int, pusher: Callable[..., ForkedProcess]
) -> None:
    """Nobody is left to hear of it, and the service does not wait for them."""
    process = pusher(service, version + 1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(IDLE_TIMEOUT_S + 0.2)
    assert_takes_next(service, version + 1, seed=92)


def test_a_service_killed_in_the_middle_of_a_push_is_named_and_starts_whole(
    fragile: ServiceProcess, tiny_model_dir: Path, tmp_path: Path
) -> None:
    # It stands still, so that the push is under way when it dies.
    fragile.signal(signal.SIGSTOP)
    with WeightClient(fragile.admin_target, timeout_s=20) as weights:
        push = Caught(lambda: weights.prepare(2, weight_tensors(build_model(seed=91))))
        time.sleep(0.3)
        fragile.signal(signal.SIGKILL)
        error = push.wait()
    assert isinstance(error, Unavailable)
    assert f"ppod.v1.WeightService at {fragile.admin_target}" in str(error)
    with starting(tiny_model_dir, tmp_path) as again:
        assert_serves(again, 0, build_model(seed=0))
        assert_takes_next(again, 2, seed=91)


def test_a_service_killed_in_the_middle_of_a_commit_is_named_and_starts_whole(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    delivery = Delivery(retry=NO_RETRY)
    # So many tokens take seconds on any machine.
    long = Sampling(max_tokens=3000, temperature=1.0, ignore_eos=True)
    with (
        starting(save_tiny_model(tmp_path / "model", max_tokens=4096), tmp_path) as fragile,
        WeightClient(fragile.admin_target, timeout_s=20, delivery=delivery) as weights,
        GenerationClient(fragile.target, timeout_s=20, delivery=delivery) as generation,
    ):
        weights.prepare(1, weight_tensors(build_model(seed=90)))
        weights.commit(1)
        weights.prepare(2, weight_tensors(build_model(seed=91)))
        running = Caught(lambda: generation.generate([[5, 6, 7]], long))
        while "ppod_team_accepted_tokens_total{" not in metrics_of(fragile):
            time.sleep(0.01)
        time.sleep(0.1)
        # It waits for the running sequences.
        commit = Caught(lambda: weights.commit(2))
        time.sleep(0.1)
        fragile.signal(signal.SIGKILL)
        error = commit.wait()
        assert isinstance(error, Unavailable)
        assert f"ppod.v1.WeightService at {fragile.admin_target}" in str(error)
        assert isinstance(running.wait(), Unavailable)
    with starting(tiny_model_dir, tmp_path) as again:
        assert_serves(again, 0, build_model(seed=0))
        with WeightClient(again.admin_target) as weights, pytest.raises(FailedPrecondition, match="none prepared"):
            weights.commit(2)
        assert_takes_next(again, 2, seed=91)


def test_a_service_killed_in_the_middle_of_a_stream_gives_no_sample_of_another_version(
    fragile: ServiceProcess, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """What was streamed before is whole and of its version; the rest is an error, also where a retry finds a service
    that was started again without the version that the caller insists on."""
    long = Sampling(max_tokens=110, temperature=0.0, ignore_eos=True)
    prompts = [[3] * (MAX_TOKENS - 2), *([5 + index, 6, 7] for index in range(12))]
    with GenerationClient(fragile.target, timeout_s=30) as client:
        stream = client.stream(prompts, long, weight_version=1)
        first = next(stream)
        assert (first.index, [span.weight_version for span in first.weight_spans]) == (0, [1])
        fragile.process.kill()
        fragile.wait(10)
        listen = {"port": fragile.port, "admin_port": fragile.admin_port, "metrics_port": fragile.metrics_port}
        values = {"model": tiny_model_config(tiny_model_dir), "listen": listen}
        with running_service("ppod_services.generation", tmp_path, values):
            with pytest.raises((Unavailable, FailedPrecondition)):
                list(stream)
            with pytest.raises(FailedPrecondition, match="weight_version"):
                client.generate(prompts, long, weight_version=1)
            again = client.generate(prompts[1:], long)
    assert {span.weight_version for done in again for span in done.weight_spans} == {0}


def test_a_hop_that_hangs_is_named_and_the_others_go_on(
    fragile: ServiceProcess, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with starting(tiny_model_dir, tmp_path) as stopped, starting(tiny_model_dir, tmp_path) as other:
        stopped.signal(signal.SIGSTOP)
        hops = (RelayHop(stopped.admin_target), RelayHop(other.admin_target))
        push = WeightPush(2, weight_tensors(build_model(seed=93)), relay=hops)
        with WeightClient(fragile.admin_target, timeout_s=20) as weights:
            found = {one.target: one.error for one in weights.push(push).replicas}
        assert isinstance(found[stopped.admin_target], DeadlineExceeded)
        assert (found[fragile.admin_target], found[other.admin_target]) == (None, None)
        for replica in (fragile, other):
            with WeightClient(replica.admin_target) as weights:
                weights.commit(2)
            assert_serves(replica, 2, build_model(seed=93))


def test_a_newer_prepare_replaces_one_that_was_never_committed(service: ServiceProcess, version: int) -> None:
    with WeightClient(service.admin_target) as weights:
        weights.prepare(version + 5, weight_tensors(build_model(seed=94)))
        weights.prepare(version + 3, weight_tensors(build_model(seed=95)))
        assert weights.status().prepared_version == version + 3
        with pytest.raises(FailedPrecondition, match=f"{version + 3} prepared"):
            weights.commit(version + 5)
        weights.commit(version + 3)
    assert_serves(service, version + 3, build_model(seed=95))


def test_a_failed_push_keeps_what_was_prepared_before(service: ServiceProcess, version: int) -> None:
    tensors = weight_tensors(build_model(seed=96))
    with WeightClient(service.admin_target) as weights:
        weights.prepare(version + 2, tensors)
        with pytest.raises(InvalidArgument, match="1 missing"):
            weights.prepare(version + 3, tensors[:-1])
        assert weights.status().prepared_version == version + 2
        weights.commit(version + 2)
    assert_serves(service, version + 2, build_model(seed=96))
