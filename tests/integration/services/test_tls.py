"""TLS and mutual TLS of real service processes: who gets in, and what happens when certificates rotate."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ppod.v1 import reference_pb2, reference_pb2_grpc
from ppod_services.core.config import TlsConfig
from ppod_services.core.tls import RotatingCertificates
from support.authority import Authority
from support.processes import ServiceProcess, metrics_of, running_service
from support.services import tiny_model_config

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(trustme.CA(), tmp_path)


@pytest.fixture
def service(authority: Authority, tiny_model_dir: Path, tmp_path: Path) -> Iterator[ServiceProcess]:
    """TLS on the data port, mutual TLS on the administration port, health for a kubelet in plain text."""
    values = {
        "model": tiny_model_config(tiny_model_dir),
        "tls": authority.issue("server"),
        "admin_tls": {**authority.issue("admin"), "client_ca_file": authority.root_file()},
    }
    with running_service("ppod_services.reference", tmp_path, values) as process:
        yield process


def status(target: str, credentials: grpc.ChannelCredentials | None) -> health_pb2.HealthCheckResponse.ServingStatus:
    """The health of a target over a new connection; a handshake that fails raises RpcError."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    opened = (
        grpc.insecure_channel(target, options)
        if credentials is None
        else grpc.secure_channel(target, credentials, options)
    )
    with opened as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=5).status


def served_serial(port: int) -> int:
    """Serial number of the certificate that a new connection is shown."""
    import ssl  # noqa: PLC0415

    return x509.load_pem_x509_certificate(ssl.get_server_certificate(("127.0.0.1", port)).encode()).serial_number


def test_only_those_who_know_the_authority_get_in(service: ServiceProcess, authority: Authority) -> None:
    assert status(service.target, grpc.ssl_channel_credentials(authority.root)) == SERVING
    for stranger in (None, grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())):
        with pytest.raises(grpc.RpcError) as caught:
            status(service.target, stranger)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_administration_needs_a_certificate_of_the_caller_s(service: ServiceProcess, authority: Authority) -> None:
    assert status(service.admin_target, authority.client()) == SERVING
    other = trustme.CA()
    issued = other.issue_cert("intruder")
    chain = issued.cert_chain_pems[0].bytes()
    intruder = grpc.ssl_channel_credentials(authority.root, issued.private_key_pem.bytes(), chain)
    for nobody in (grpc.ssl_channel_credentials(authority.root), intruder):
        with pytest.raises(grpc.RpcError) as caught:
            status(service.admin_target, nobody)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_kubelet_which_speaks_no_tls_asks_for_health_alone(service: ServiceProcess) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{service.health_port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for name in ("", "ppod.v1.ReferenceService"):
            assert check(health_pb2.HealthCheckRequest(service=name), timeout=5).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            reference_pb2_grpc.ReferenceServiceStub(channel).GetReferenceModel(
                reference_pb2.GetReferenceModelRequest(), timeout=5
            )
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError):
        status(service.target, None)


def test_rotated_certificates_serve_new_connections_without_a_restart(
    service: ServiceProcess, authority: Authority
) -> None:
    credentials = grpc.ssl_channel_credentials(authority.root)
    with grpc.secure_channel(service.target, credentials) as old:
        check = health_pb2_grpc.HealthStub(old).Check
        assert check(health_pb2.HealthCheckRequest(service=""), timeout=5).status == SERVING
        before = served_serial(service.port)
        fresh = authority.issue("rotated")
        for key, name in (("private_key_file", "server.key"), ("certificate_file", "server.crt")):
            shutil.move(fresh[key], authority.directory / name)
        after = _wait_for_other_serial(service.port, before)
        assert after != before
        assert status(service.target, credentials) == SERVING
        # The connection that was open goes on.
        assert check(health_pb2.HealthCheckRequest(service=""), timeout=5).status == SERVING
    assert '"event": "certificates_rotated"' in service.stderr


def test_half_a_rotation_is_refused_and_the_old_certificate_serves_on(
    service: ServiceProcess, authority: Authority
) -> None:
    before = served_serial(service.port)
    shutil.move(authority.issue("rotated")["private_key_file"], authority.directory / "server.key")
    for _ in range(3):
        assert served_serial(service.port) == before
    assert '"event": "certificates_refused"' in service.stderr
    assert status(service.target, grpc.ssl_channel_credentials(authority.root)) == SERVING


def refused_files(service: ServiceProcess) -> set[str]:
    """The files that its metrics say it refuses, by their names."""
    told = re.findall(r'^ppod_file_refused{file="(\S+)"} (\S+)$', metrics_of(service), re.MULTILINE)
    assert len(told) == 2, "of two ports"
    return {Path(file).name for file, value in told if float(value)}


def test_a_refused_certificate_is_told_although_nobody_connects(service: ServiceProcess, authority: Authority) -> None:
    assert refused_files(service) == set()
    before, fresh = served_serial(service.port), authority.issue("rotated")
    shutil.move(fresh["private_key_file"], authority.directory / "server.key")
    assert refused_files(service) == {"server.crt"}
    shutil.move(fresh["certificate_file"], authority.directory / "server.crt")
    assert refused_files(service) == set()
    assert served_serial(service.port) != before, "what a scrape has read is served"
    held = shutil.move(authority.directory / "server.crt", authority.directory / "elsewhere")
    assert refused_files(service) == {"server.crt"}, "one that is missing, too"
    shutil.move(held, authority.directory / "server.crt")
    assert refused_files(service) == set()


def test_a_missing_certificate_is_named_at_the_start(tiny_model_dir: Path, tmp_path: Path) -> None:
    tls = {"certificate_file": str(tmp_path / "none.crt"), "private_key_file": str(tmp_path / "none.key")}
    values = {"model": tiny_model_config(tiny_model_dir), "tls": tls}
    with (
        pytest.raises(AssertionError, match=r"(?s)exit code 1;.*tls: certificate_file: .*none\.crt: No such file"),
        running_service("ppod_services.reference", tmp_path, values, until="listening"),
    ):
        pass


def test_files_that_are_swapped_while_they_are_read_are_read_again(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the certificate of one version and the key of the next were refused, and an older one served once more."""
    certificates = RotatingCertificates(TlsConfig.model_validate(authority.issue("server")))
    authority.issue("server")
    read, swaps = Path.read_bytes, [True]

    def read_and_swap(path: Path) -> bytes:
        content = read(path)
        if path.suffix == ".crt" and swaps:
            swaps.pop()
            authority.issue("server")
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_swap)
    assert not certificates.refused()
    assert not swaps
    held = certificates._files
    assert held.certificate == (authority.directory / "server.crt").read_bytes()
    assert held.private_key == (authority.directory / "server.key").read_bytes()
    assert not [record for record in caplog.records if record.message == "certificates_refused"]


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(authority: Authority) -> None:
    """OpenSSL asks on the terminal of the process, where there is one, and waits."""
    tls = authority.issue("server")
    key_file = Path(tls["private_key_file"])
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    code = (
        "import fcntl, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "from ppod_services.core.config import TlsConfig\n"
        "from ppod_services.core.tls import CertificateError, RotatingCertificates\n"
        f"config = TlsConfig(**{tls!r})\n"
        "try: RotatingCertificates(config)\n"
        "except CertificateError as error: print(error)\n"
    )
    terminal, its_end = os.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=its_end,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            told, _ = process.communicate(timeout=20)
        finally:
            process.kill()
            os.close(terminal)
            os.close(its_end)
    assert "its key without a passphrase" in told.decode()


def _wait_for_other_serial(port: int, serial: int) -> int:
    until = time.monotonic() + 10
    while (found := served_serial(port)) == serial and time.monotonic() < until:
        time.sleep(0.1)
    return found
