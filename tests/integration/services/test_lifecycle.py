"""Start, readiness, drain and exit of real processes."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ppod import (
    Completion,
    DeadlineExceeded,
    GenerationClient,
    PpodError,
    ReferenceClient,
    ResourceExhausted,
    RewardClient,
    Sampling,
    Unavailable,
    WeightClient,
)
from ppod.client import NO_RETRY, Delivery
from ppod.errors import STATUS_DETAILS_KEY
from ppod.tensors import pack_sequences
from ppod.v1 import generation_pb2, generation_pb2_grpc
from support.processes import ServiceProcess, free_ports, metrics_of, run_to_exit, running_service, write_config
from support.services import tiny_model_config
from support.tiny_model import MAX_TOKENS

STATUS = health_pb2.HealthCheckResponse
SERVICE = "ppod.v1.ReferenceService"
LONG = Sampling(max_tokens=MAX_TOKENS, ignore_eos=True)


def generation_values(model_dir: Path, **batching: int) -> dict[str, object]:
    return {
        "model": tiny_model_config(model_dir),
        "batching": {"max_batch_tokens": 128, "max_batch_size": 1, **batching},
    }


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_service_listens_on_an_address_of_ipv6(host: str, tmp_path: Path) -> None:
    port, admin_port, metrics_port, health_port = free_ports(4)
    listen = {
        "host": host,
        "port": port,
        "admin_port": admin_port,
        "metrics_port": metrics_port,
        "health_port": health_port,
    }
    values = {"listen": listen, "rewards": [{"name": "length", "kind": "function", "function": "length"}]}
    with running_service("ppod_services.reward", tmp_path, values):
        for each in (port, admin_port, health_port):
            with RewardClient(f"[::1]:{each}") as client:
                client.wait_ready(5)
        with RewardClient(f"[::1]:{port}") as client:
            assert client.score_texts(["four"]).values.tolist() == [0.0]
        with socket.create_connection(("::1", metrics_port), timeout=5):
            pass


@pytest.mark.parametrize("service", ["reward", "reference", "generation"])
def test_help_and_check(service: str, tmp_path: Path) -> None:
    shown = run_to_exit(f"ppod_services.{service}", "--help")
    assert shown.returncode == 0
    assert "--config" in shown.stdout
    assert "exit codes" in shown.stdout
    values: dict[str, object] = {"listen": {"port": 5000}}
    model = {"source": "nowhere"}
    values |= {"rewards": [{"name": "a", "model": model, "head": "h"}]} if service == "reward" else {"model": model}
    checked = run_to_exit(
        f"ppod_services.{service}", "--config", str(write_config(tmp_path / "c.yaml", values)), "--check"
    )
    assert checked.returncode == 0
    assert "drain_grace_s: 30.0" in checked.stdout


def test_a_wrong_configuration_is_told_at_once(tmp_path: Path) -> None:
    config = write_config(tmp_path / "wrong.yaml", {"listen": {"port": 0}, "model": {"sauce": "x"}})
    ended = run_to_exit("ppod_services.generation", "--config", str(config))
    assert ended.returncode == 2
    for path in ("listen.port:", "model.source: required", "model.sauce: unknown key"):
        assert path in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("key", ["port", "admin_port", "metrics_port"])
def test_a_port_in_use_is_told_in_one_line_and_soon(tmp_path: Path, key: str) -> None:
    port, admin_port, metrics_port = free_ports(3)
    listen = {"port": port, "admin_port": admin_port, "metrics_port": metrics_port}
    config = write_config(tmp_path / "busy.yaml", {"listen": listen, "model": {"source": "/nowhere"}})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", listen[key]))
        taken.listen()
        start = time.monotonic()
        ended = run_to_exit("ppod_services.generation", "--config", str(config))
        seconds = time.monotonic() - start
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert f"listen.{key}" in line
    assert f"127.0.0.1:{listen[key]}" in line
    # One second on an idle machine; the margin is for a busy one. Importing torch alone would take longer.
    assert seconds < 4


def test_a_missing_model_is_told_in_one_line(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", {"listen": {"port": free_ports(1)[0]}, "model": {"source": "/nowhere"}})
    ended = run_to_exit("ppod_services.reference", "--config", str(config))
    assert ended.returncode == 1
    line = ended.stderr.splitlines()[-1]
    assert "'/nowhere': no such directory" in line
    assert "Traceback" not in ended.stderr


def test_a_damaged_model_is_told_in_one_line(tmp_path: Path, tiny_model_dir: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    config = write_config(tmp_path / "c.yaml", {"listen": {"port": free_ports(1)[0]}, "model": {"source": str(broken)}})
    ended = run_to_exit("ppod_services.reference", "--config", str(config))
    assert ended.returncode == 1
    assert str(broken) in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_reflection_lists_the_services(generation_service: ServiceProcess) -> None:
    expected = {
        generation_service.target: {"ppod.v1.GenerationService"},
        generation_service.admin_target: {"ppod.v1.WeightService", "grpc.channelz.v1.Channelz"},
    }
    for target, own in expected.items():
        with grpc.insecure_channel(target) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            [reply] = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in reply.list_services_response.service}
        assert names == {*own, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_metrics_count_calls_and_batches(generation_service: ServiceProcess) -> None:
    with GenerationClient(generation_service.target) as client:
        client.generate([[1, 2], [3]], Sampling(max_tokens=2, ignore_eos=True))
        with pytest.raises(PpodError):
            client.generate([[999]], Sampling(max_tokens=2))
    # A batch is counted a moment after its replies are sent, and a scrape may come in the middle of it.
    idle, until = {"ppod_queue_sequences 0.0", "ppod_queue_tokens 0.0"}, time.monotonic() + 5
    while not all(name in (text := metrics_of(generation_service)) for name in idle) and time.monotonic() < until:
        time.sleep(0.02)
    method = 'method="/ppod.v1.GenerationService/Generate"'
    assert f'ppod_rpc_total{{code="OK",{method}}}' in text
    assert f'ppod_rpc_total{{code="INVALID_ARGUMENT",{method}}}' in text
    assert "ppod_rpc_seconds_bucket{le=" in text
    for name in (*idle, "ppod_ready 1.0", "ppod_batch_sequences_count"):
        assert name in text
    assert "ppod_padding_tokens_total" in text
    assert "ppod_compute_seconds_sum" in text


def test_logs_are_json_with_fixed_keys(generation_service: ServiceProcess) -> None:
    with GenerationClient(generation_service.target) as client, pytest.raises(PpodError):
        client.generate([[999]], Sampling(max_tokens=2), request_id="find-me")
    # The line is written just after the caller has its answer.
    time.sleep(0.5)
    lines = generation_service.log()
    assert all({"ts", "level", "service", "event"} <= line.keys() for line in lines)
    assert any(line.get("request_id") == "find-me" and line["code"] == "INVALID_ARGUMENT" for line in lines)


@pytest.fixture
def slow_service(tiny_model_dir: Path, tmp_path: Path) -> Iterator[ServiceProcess]:
    """One sequence at a time, so that requests of many sequences take a while."""
    with running_service("ppod_services.generation", tmp_path, generation_values(tiny_model_dir)) as service:
        yield service


class Call:
    """A call in a thread of its own."""

    def __init__(self, service: ServiceProcess, count: int, timeout_s: float = 60.0) -> None:
        self.completions: list[Completion] = []
        self.error: PpodError | None = None
        self.begun = threading.Event()
        self._arguments = (service.target, count, timeout_s)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        target, count, timeout_s = self._arguments
        try:
            with GenerationClient(target) as client:
                for completion in client.stream([[5]] * count, LONG, seeds=range(count), timeout_s=timeout_s):
                    self.completions.append(completion)
                    self.begun.set()
        except PpodError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def test_sigterm_finishes_running_calls_refuses_new_ones_and_exits_0(slow_service: ServiceProcess) -> None:
    with grpc.insecure_channel(slow_service.target) as channel, GenerationClient(slow_service.target) as other:
        other.describe()
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="ppod.v1.GenerationService"))
        assert next(watch).status == STATUS.SERVING
        call = Call(slow_service, 20)
        assert call.begun.wait(30)
        slow_service.signal(signal.SIGTERM)
        assert next(watch).status == STATUS.NOT_SERVING
        assert stub.Check(health_pb2.HealthCheckRequest(service="")).status == STATUS.SERVING
        with pytest.raises(Unavailable, match="draining"):
            other.describe()
        watch.cancel()
    call.join()
    assert call.error is None
    assert len(call.completions) == 20
    assert slow_service.wait() == 0
    assert slow_service.log()[-1]["event"] == "stopped"


def test_a_second_signal_exits_at_once(slow_service: ServiceProcess) -> None:
    call = Call(slow_service, 200)
    assert call.begun.wait(30)
    slow_service.signal(signal.SIGTERM)
    slow_service.wait_for_event("draining")
    start = time.monotonic()
    slow_service.signal(signal.SIGINT)
    assert slow_service.wait() == 128 + signal.SIGINT
    assert time.monotonic() - start < 2
    call.join()
    assert isinstance(call.error, Unavailable)


def test_the_echo_of_a_signal_cuts_no_call_short(slow_service: ServiceProcess) -> None:
    """As where all processes of a job are stopped, and then `ppod up`, which was, stops its services."""
    call = Call(slow_service, 20)
    assert call.begun.wait(30)
    slow_service.signal(signal.SIGTERM)
    slow_service.wait_for_event("draining")
    slow_service.signal(signal.SIGTERM)
    call.join()
    assert (call.error, len(call.completions), slow_service.wait()) == (None, 20, 0)


@contextmanager
def starting_service(directory: Path, model_dir: Path) -> Iterator[ServiceProcess]:
    """A service whose ports are bound and whose model may not be loaded yet."""
    with running_service(
        "ppod_services.reference", directory, {"model": tiny_model_config(model_dir)}, until="listening"
    ) as up:
        yield up


def test_watch_follows_the_start(tiny_model_dir: Path, tmp_path: Path) -> None:
    with starting_service(tmp_path, tiny_model_dir) as service, grpc.insecure_channel(service.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="ppod.v1.ReferenceService"), timeout=60)
        assert next(watch).status == STATUS.NOT_SERVING
        assert next(watch).status == STATUS.SERVING
        watch.cancel()
        with ReferenceClient(service.target) as client:
            assert client.describe().state.model == "reference"


def test_while_the_model_loads_calls_are_unavailable_and_sigterm_still_ends(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A named pipe for weights: the load hangs for as long as nobody writes to it."""
    directory = tmp_path / "endless"
    directory.mkdir()
    for file in tiny_model_dir.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    with starting_service(tmp_path, directory) as service:
        with grpc.insecure_channel(service.target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            states = [stub.Check(health_pb2.HealthCheckRequest(service=name)).status for name in ("", SERVICE)]
        assert states == [STATUS.SERVING, STATUS.NOT_SERVING]
        with ReferenceClient(service.target) as client, pytest.raises(Unavailable, match="being loaded"):
            client.logprobs([[1, 2]], [1])
        with WeightClient(service.admin_target) as weights, pytest.raises(Unavailable, match="being loaded"):
            weights.status()
        service.signal()
        assert service.wait(10) == 0


@pytest.fixture(scope="module")
def busy_service(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One sequence at a time, and a queue that 20 long ones fill."""
    values = generation_values(tiny_model_dir, max_queue_tokens=128 * 20)
    with running_service("ppod_services.generation", tmp_path_factory.mktemp("busy"), values) as service:
        yield service


def metric(service: ServiceProcess, name: str) -> int:
    """Value of a counter; zero while nothing counted."""
    values = [float(line.split()[-1]) for line in metrics_of(service).splitlines() if line.startswith(f"{name} ")]
    return int(sum(values))


def batches(service: ServiceProcess) -> int:
    """Batches so far, each of one sequence. The last one is counted just after its results are sent."""
    time.sleep(0.2)
    return metric(service, "ppod_batch_sequences_count")


def test_what_cannot_end_in_time_is_refused_at_once_and_costs_no_compute(busy_service: ServiceProcess) -> None:
    before = batches(busy_service)
    running = Call(busy_service, 15)
    assert running.begun.wait(30)
    late = Call(busy_service, 5, timeout_s=0.05)
    late.join()
    # With its retries the client ends with whichever of the two it has when its own time is up.
    assert isinstance(late.error, ResourceExhausted | DeadlineExceeded)
    running.join()
    assert len(running.completions) == 15
    assert batches(busy_service) == before + 15


def test_cancelled_calls_leave_the_queue_and_cost_no_compute(busy_service: ServiceProcess) -> None:
    before = batches(busy_service)
    dropped = 'ppod_dropped_sequences_total{reason="cancelled"}'
    dropped_before = metric(busy_service, dropped)
    running = Call(busy_service, 7)
    assert running.begun.wait(30)
    # At most 6 of the first call wait, so 8 in the queue means that the second call arrived.
    request = generation_pb2.GenerateRequest(prompts=pack_sequences([[5]] * 8), sampling=LONG.to_proto())
    with grpc.insecure_channel(busy_service.target) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request)
        until = time.monotonic() + 5
        while metric(busy_service, "ppod_queue_sequences") < 8 and time.monotonic() < until:
            time.sleep(0.005)
        call.cancel()
    running.join()
    assert metric(busy_service, dropped) == dropped_before + 8
    assert batches(busy_service) == before + 7


def test_a_full_queue_tells_when_to_come_back(busy_service: ServiceProcess) -> None:
    running = Call(busy_service, 20)
    assert running.begun.wait(30)
    with GenerationClient(busy_service.target, delivery=Delivery(retry=NO_RETRY)) as client:
        with pytest.raises(ResourceExhausted) as caught:
            client.generate([[5]] * 19, LONG)
        assert 0 < caught.value.retry_after_s <= 60
        running.join()
        assert len(running.completions) == 20
        assert len(client.generate([[5]] * 2, LONG)) == 2


def test_retry_info_is_sent_as_the_standard_detail(busy_service: ServiceProcess) -> None:
    running = Call(busy_service, 20)
    assert running.begun.wait(30)
    request = generation_pb2.GenerateRequest(prompts=pack_sequences([[5]] * 19), sampling=LONG.to_proto())
    with grpc.insecure_channel(busy_service.target) as channel, pytest.raises(grpc.RpcError) as caught:
        list(generation_pb2_grpc.GenerationServiceStub(channel).Generate(request))
    error = caught.value
    assert isinstance(error, grpc.Call)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    [data] = [value for key, value in error.trailing_metadata() or () if key == STATUS_DETAILS_KEY]
    assert isinstance(data, bytes)
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status_pb2.Status.FromString(data).details)
    assert retry.retry_delay.ToNanoseconds() > 0
    running.join()
