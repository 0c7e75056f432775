"""`python -m ppod.health`, against real servers with and without TLS."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ppod import health as command
from support.processes import environment, free_ports

REWARD, REFERENCE = "ppod.v1.RewardService", "ppod.v1.ReferenceService"


@contextmanager
def health_server(credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """A server that is alive, whose reward service is ready and whose reference is not."""
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    servicer.set(REWARD, health_pb2.HealthCheckResponse.SERVING)
    servicer.set(REFERENCE, health_pb2.HealthCheckResponse.NOT_SERVING)
    with ThreadPoolExecutor() as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        any_port = "127.0.0.1:0"
        port = (
            server.add_insecure_port(any_port) if credentials is None else server.add_secure_port(any_port, credentials)
        )
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(0).wait()


def run(*arguments: str, **variables: str) -> tuple[int, str]:
    """As a probe runs it: a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "ppod.health", *arguments],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stdout


def test_exit_codes_of_a_process() -> None:
    with health_server() as target:
        assert run(target) == (0, f"{target}: the process: SERVING\n")
        assert run(target, REFERENCE) == (1, f"{target}: {REFERENCE}: NOT_SERVING\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_machine_behind_a_proxy_reaches_itself(host: str) -> None:
    """Container engines set these variables, too, in all containers; no proxy knows the way to this machine."""
    [port] = free_ports(1)
    proxy = f"http://127.0.0.1:{port}"
    with health_server() as target:
        here = target.replace("127.0.0.1", host)
        answer = run(here, REWARD, https_proxy=proxy, http_proxy=proxy, no_proxy="")
    assert answer == (0, f"{here}: {REWARD}: SERVING\n")


@pytest.mark.parametrize(
    ("service", "code", "said"),
    [
        (REWARD, 0, "SERVING"),
        (REFERENCE, 1, "NOT_SERVING"),
        ("ppod.v1.Unknown", 1, "NOT_FOUND"),
    ],
)
def test_what_a_server_says_of_each_service(
    capsys: pytest.CaptureFixture[str], service: str, code: int, said: str
) -> None:
    with health_server() as target:
        assert command.main([target, service]) == code
        assert capsys.readouterr().out.startswith(f"{target}: {service}: {said}")


def test_a_server_that_is_not_there_or_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    assert command.main([f"127.0.0.1:{port}"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().out

    release = threading.Event()

    class Stuck(health_pb2_grpc.HealthServicer):
        def Check(self, request: object, context: object) -> health_pb2.HealthCheckResponse:  # noqa: ARG002, N802
            release.wait(30)
            return health_pb2.HealthCheckResponse()

    with ThreadPoolExecutor() as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(Stuck(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        assert command.main([f"127.0.0.1:{port}", "--timeout-s", "0.2"]) == 1
        assert "DEADLINE_EXCEEDED" in capsys.readouterr().out
        release.set()
        server.stop(0).wait()


@pytest.mark.parametrize(
    "target", ["127.0.0.1", "127.0.0.1:99999", "", "127.0.0.1:1,127.0.0.1:2", "k8s:///reward:grpc"]
)
def test_what_is_no_server_is_a_wrong_argument(capsys: pytest.CaptureFixture[str], target: str) -> None:
    """gRPC would ask port 443, and of a number that is too large the port of its last 16 bits."""
    assert command.main([target]) == 2
    assert capsys.readouterr().out.startswith("ppod health: target: found ")


@pytest.mark.parametrize(("given", "code"), [("1e10", 0), ("inf", 0), ("nan", 2)])
def test_a_wait_is_as_long_as_grpc_takes_and_a_number(
    capsys: pytest.CaptureFixture[str], given: str, code: int
) -> None:
    with health_server() as target:
        assert command.main([target, "--timeout-s", given]) == code
    assert ("timeout_s: found nan, expected seconds" in capsys.readouterr().out) == (code == 2)


def test_tls_and_mutual_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = trustme.CA()
    ca, own, key = (tmp_path / name for name in ("ca.crt", "tls.crt", "tls.key"))
    authority.cert_pem.write_to_path(ca)
    issued = authority.issue_cert("reward.ppod.test")
    issued.cert_chain_pems[0].write_to_path(own)
    issued.private_key_pem.write_to_path(key)
    pair = (key.read_bytes(), own.read_bytes())
    trusting = ("--ca-file", str(ca), "--server-name", "reward.ppod.test")
    certified = ("--certificate-file", str(own), "--key-file", str(key))

    with health_server(grpc.ssl_server_credentials([pair])) as target:
        assert command.main([target, REWARD, *trusting]) == 0
        assert command.main([target, REWARD]) == 1, "plain text is refused"
        assert command.main([target, REWARD, "--ca-file", str(ca)]) == 1, "another name than 127.0.0.1"
    with health_server(grpc.ssl_server_credentials([pair], ca.read_bytes(), require_client_auth=True)) as target:
        assert command.main([target, REWARD, *trusting, *certified]) == 0
        assert command.main([target, REWARD, *trusting]) == 1, "no certificate of its own"
    capsys.readouterr()

    assert command.main(["127.0.0.1:1", "--ca-file", str(tmp_path / "none")]) == 2
    assert "ca_file" in capsys.readouterr().out
