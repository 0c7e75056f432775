"""Certificates of a client that are renewed while it lives, as those of a run of days are."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import trustme

from ppod import AsyncRewardClient, ClientSecurity, Delivery, InvalidArgument, RewardClient, Unavailable
from ppod.client import NO_RETRY
from support.processes import free_ports
from support.scripted_services import Script, ScriptedServer, scripted_server

SHORT_S = 3.0


@dataclass
class Renewed:
    """Files of a client, whose certificates a server on one port asks for."""

    directory: Path
    authority: trustme.CA
    port: int

    def write(self, lifetime_s: float = 600.0) -> None:
        """Issue the client a certificate that lives so long."""
        issued = self.authority.issue_cert("trainer", not_after=datetime.now(UTC) + timedelta(seconds=lifetime_s))
        self.authority.cert_pem.write_to_path(self.directory / "ca")
        issued.private_key_pem.write_to_path(self.directory / "key")
        issued.cert_chain_pems[0].write_to_path(self.directory / "certificate")

    @property
    def security(self) -> ClientSecurity:
        return ClientSecurity(*(self.directory / name for name in ("ca", "certificate", "key")))

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @contextmanager
    def server(self, script: Script | None = None) -> Iterator[ScriptedServer]:
        issued = self.authority.issue_cert("127.0.0.1")
        pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
        credentials = grpc.ssl_server_credentials([pair], self.authority.cert_pem.bytes(), require_client_auth=True)
        with scripted_server(script, port=self.port, credentials=credentials) as server:
            yield server


@pytest.fixture
def renewed(tmp_path: Path) -> Renewed:
    [port] = free_ports(1)
    return Renewed(tmp_path, trustme.CA(), port)


def connections(port: int) -> int:
    """Connections that this process has opened to a port of its own."""
    remote, established = f"0100007F:{port:04X}", "01"
    tables = [Path("/proc/net", name).read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return sum(line[2].endswith(remote) and line[3] == established for line in lines)


def left(port: int) -> int:
    """How many of them stay, once channels that nobody holds are gone."""
    until = time.monotonic() + 5.0
    while (found := connections(port)) > 1 and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    return found


def test_a_client_outlives_its_certificate(renewed: Renewed) -> None:
    renewed.write(SHORT_S)
    expires = time.monotonic() + SHORT_S
    with RewardClient(renewed.target, security=renewed.security, timeout_s=20) as client:
        with renewed.server():
            client.wait_ready(10)
            assert client.score([[1]]).values.tolist() == [3.5]
        time.sleep(max(0.0, expires + 1.0 - time.monotonic()))
        with renewed.server():
            once = Delivery(retry=NO_RETRY)
            with (
                RewardClient(renewed.target, security=renewed.security, delivery=once, timeout_s=5) as late,
                pytest.raises(Unavailable),
            ):
                late.score([[1]])
            renewed.write()
            assert client.score([[1]]).values.tolist() == [3.5]
            assert client.score([[1]]).values.tolist() == [3.5]


async def test_an_asyncio_client_outlives_its_certificate(renewed: Renewed) -> None:
    renewed.write(SHORT_S)
    expires = time.monotonic() + SHORT_S
    async with AsyncRewardClient(renewed.target, security=renewed.security, timeout_s=20) as client:
        with renewed.server():
            assert (await client.score([[1]])).values.tolist() == [3.5]
        await asyncio.sleep(max(0.0, expires + 1.0 - time.monotonic()))
        renewed.write()
        with renewed.server():
            assert (await client.score([[1]])).values.tolist() == [3.5]


def test_a_new_authority_is_taken_over(renewed: Renewed) -> None:
    renewed.write()
    with RewardClient(renewed.target, security=renewed.security, timeout_s=20) as client:
        with renewed.server():
            client.score([[1]])
        renewed.authority = trustme.CA()
        renewed.write()
        with renewed.server():
            assert client.score([[1]]).values.tolist() == [3.5]


def draining(began: threading.Event) -> Script:
    """The first call takes a while, the second one is refused, as by a server that drains."""

    def answer(_: object, number: int) -> None:
        if number == 1:
            began.set()
            time.sleep(1.0)
        if number == 2:
            raise Unavailable("draining")

    return Script(answer)


def test_calls_under_way_outlive_the_change(renewed: Renewed) -> None:
    began = threading.Event()
    renewed.write()
    with (
        renewed.server(draining(began)),
        ThreadPoolExecutor() as pool,
        RewardClient(renewed.target, security=renewed.security, timeout_s=20) as client,
    ):
        waiting = pool.submit(client.score, [[1]])
        began.wait()
        renewed.write()
        client.score([[1]])
        assert not waiting.done()
        assert waiting.result().values.tolist() == [3.5]
        assert left(renewed.port) == 1


async def test_calls_under_way_outlive_the_change_in_asyncio(renewed: Renewed) -> None:
    began = threading.Event()
    renewed.write()
    with renewed.server(draining(began)):
        async with AsyncRewardClient(renewed.target, security=renewed.security, timeout_s=20) as client:
            waiting = asyncio.ensure_future(client.score([[1]]))
            await asyncio.to_thread(began.wait)
            renewed.write()
            await client.score([[1]])
            assert not waiting.done()
            assert (await waiting).values.tolist() == [3.5]
            del waiting
            await asyncio.sleep(0.1)
            assert left(renewed.port) == 1


def test_half_a_renewal_leaves_the_earlier_files_in_use(renewed: Renewed) -> None:
    renewed.write()
    with RewardClient(renewed.target, security=renewed.security, timeout_s=20) as client:
        with renewed.server():
            client.score([[1]])
        for name in ("ca", "certificate", "key"):
            kept = (renewed.directory / name).read_bytes()
            for broken in (b"", b"not PEM\n", None):
                (renewed.directory / name).unlink(missing_ok=True)
                if broken is not None:
                    (renewed.directory / name).write_bytes(broken)
                with renewed.server():
                    assert client.score([[1]]).values.tolist() == [3.5]
            (renewed.directory / name).write_bytes(kept)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ca", b"", r"security\.ca_file: found \S+/ca: .*, expected certificates in PEM"),
        ("ca", b"not PEM\n", r"security\.ca_file: found \S+/ca: .*, expected certificates in PEM"),
        ("certificate", b"", r"certificate_file and key_file: found \S+/certificate and \S+/key: .*both in PEM"),
        ("certificate", b"not PEM\n", r"certificate_file and key_file: found .*both in PEM"),
        ("key", b"", r"certificate_file and key_file: found .*both in PEM, the key its own"),
        ("key", None, r"certificate_file and key_file: found .*both in PEM, the key its own"),
    ],
)
def test_files_that_cannot_be_used_are_named(renewed: Renewed, name: str, content: bytes | None, message: str) -> None:
    """gRPC ends the process at an empty certificate, and trusts every public authority at an empty file of them."""
    renewed.write()
    other = trustme.CA().issue_cert("other").private_key_pem.bytes()
    (renewed.directory / name).write_bytes(other if content is None else content)
    with RewardClient(renewed.target, security=renewed.security, timeout_s=5) as client:
        with pytest.raises(InvalidArgument, match=message):
            client.score([[1]])
        with pytest.raises(InvalidArgument, match=message):
            # A trainer waits for an hour at the start, on Kubernetes.
            client.wait_ready(600)


def test_files_that_are_swapped_while_they_are_read_are_read_again(
    renewed: Renewed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was checked is what is used: gRPC would end the process at a certificate that was empty for a moment."""
    renewed.write()
    names = ("certificate", "key")
    whole = [(renewed.directory / name).read_bytes() for name in names]
    for name in names:
        (renewed.directory / name).write_bytes(b"")
    read = Path.read_bytes

    def read_and_write(path: Path) -> bytes:
        content = read(path)
        if path.name == "key":
            for name, written in zip(names, whole, strict=True):
                (renewed.directory / name).write_bytes(written)
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_write)
    files = renewed.security.files()
    assert files is not None
    assert [files.certificate, files.key] == whole
