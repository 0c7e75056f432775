"""One asyncio gRPC server for each process: ports first, then the model, then service, then the drain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import grpc.aio
import uvloop
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from ppod.channel import ChannelOptions, server_options
from ppod_models.ending import ECHO_S, exit_now
from ppod_models.garbage import uncollected_start
from ppod_models.sources import ModelSourceError
from ppod_models.tracing import flush_tracing
from ppod_services.core.broken import ServiceBroken
from ppod_services.core.config import ServiceConfig, TlsConfig
from ppod_services.core.gate import CallGate
from ppod_services.core.interceptor import CallInterceptor, Identify
from ppod_services.core.logs import LogValue, log_event
from ppod_services.core.metrics import ServiceMetrics
from ppod_services.core.tenancy import Tenancy
from ppod_services.core.tls import CertificateError, RotatingCertificates
from ppod_services.core.tracing import tracing_interceptors

_LOGGER = logging.getLogger(__name__)
_CHANNELZ = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
_FLUSH_TIMEOUT_S = 2.0
_SWITCH_INTERVAL_S = 0.0002
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class StartError(Exception):
    """A service cannot start; the message says in one line what to do about it."""


class HostedService(Protocol):
    """What a server hosts: servicers that exist at once, and a model that is loaded later."""

    @property
    def service_name(self) -> str:
        """The gRPC service on the main port."""
        ...

    @property
    def admin_service_name(self) -> str | None:
        """The gRPC service on the admin port; None when there is none."""
        ...

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer of the main port."""
        ...

    def register_admin(self, server: grpc.aio.Server) -> None:
        """Add the servicer of the admin port."""
        ...

    def load(self) -> None:
        """Load the model and run it once; called once, in the model's thread."""
        ...

    async def run(self) -> None:
        """Run batches until cancelled; raise ServiceBroken when none can be run any more."""
        ...


@dataclass(frozen=True, slots=True)
class Host:
    """What a hosted service is built with.

    Attributes:
        executor: the model's single thread.
        metrics: the process's metrics.
    """

    executor: ThreadPoolExecutor
    metrics: ServiceMetrics


def serve(config: ServiceConfig, build: Callable[[Host], HostedService]) -> int:
    """Serve until a signal; returns the exit code: 0 after a full drain, 1 when it was cut short.

    Raises:
        StartError: a port is in use, or the model cannot be had.
    """
    # The model's thread needs the interpreter for microseconds between its operations. By default it would wait up to
    # 5 ms for an event loop that is busy refusing calls: at ten times the load that cost a tenth of the goodput.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # uvloop carries a call with a fifth less of the interpreter's time than asyncio's own loop.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Server(config, build).serve())


class _Server:
    def __init__(self, config: ServiceConfig, build: Callable[[Host], HostedService]) -> None:
        self._config = config
        self._metrics = ServiceMetrics()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._hosted = build(Host(self._executor, self._metrics))
        self._health = health.aio.HealthServicer()
        self._stopping = asyncio.Event()
        self._asked: tuple[int, float] | None = None
        self._gate = CallGate(config.limits.max_concurrent_calls)
        self._tenancy = Tenancy(config.tenancy, self._metrics.team_quotas)
        if config.tenancy.teams_file is not None:
            self._metrics.follow_file(str(config.tenancy.teams_file), lambda: self._tenancy.refused)
        # Held for as long as the ports are: gRPC calls them before each handshake.
        self._certificates: list[RotatingCertificates] = []
        self._tracing = tracing_interceptors(config.tracing, self._hosted.service_name)

    @property
    def _names(self) -> list[str]:
        admin = self._hosted.admin_service_name
        return [self._hosted.service_name, *([admin] if admin is not None and self._serves_admin else [])]

    @property
    def _serves_admin(self) -> bool:
        return self._config.listen.admin_port is not None

    async def serve(self) -> int:
        servers = self._bind()
        for name in self._names:
            await self._health.set(name, _NOT_SERVING)
        for server in servers:
            await server.start()
        self._watch_signals()
        watch = asyncio.create_task(self._tenancy.watch())
        listen = self._config.listen
        log_event(_LOGGER, "listening", {"host": listen.host, "port": listen.port, "pid": os.getpid()})
        worker: asyncio.Task[None] | None = None
        if await self._load():
            worker = asyncio.create_task(self._hosted.run())
            for name in self._names:
                await self._health.set(name, _SERVING)
            self._metrics.ready(True)
            stopping = asyncio.create_task(self._stopping.wait())
            await asyncio.wait({worker, stopping}, return_when=asyncio.FIRST_COMPLETED)
        broken = worker is not None and worker.done()
        drained = await self._drain(servers, "the service broke" if broken else "the server is draining")
        watch.cancel()
        if worker is not None:
            worker.cancel()
            try:
                await worker
            except asyncio.CancelledError:
                pass
            except ServiceBroken as error:
                log_event(_LOGGER, "broken", {"reason": str(error)}, level=logging.ERROR)
        return 0 if drained and not broken else 1

    def _bind(self) -> list[grpc.aio.Server]:
        """Take all ports, or raise StartError before the slow part of the start."""
        listen = self._config.listen
        if listen.metrics_port is not None:
            _check_free("listen.metrics_port", listen.host, listen.metrics_port)
            start_http_server(listen.metrics_port, listen.host, self._metrics.registry)
        main = self._new_server([self._hosted.service_name], self._tenancy.team)
        self._hosted.register(main)
        self._bind_port(main, "listen.port", listen.port, self._config.tls)
        servers = [main]
        if listen.health_port is not None:
            probed = grpc.aio.server(options=server_options())
            health_pb2_grpc.add_HealthServicer_to_server(self._health, probed)
            self._bind_port(probed, "listen.health_port", listen.health_port, None)
            servers.append(probed)
        if listen.admin_port is None or self._hosted.admin_service_name is None:
            return servers
        # What channelz tells of connections is for administrators only.
        admin = self._new_server([self._hosted.admin_service_name, _CHANNELZ], self._tenancy.administrator)
        channelz.add_channelz_servicer(admin)
        self._hosted.register_admin(admin)
        self._bind_port(admin, "listen.admin_port", listen.admin_port, self._config.admin_tls or self._config.tls)
        return [*servers, admin]

    def _bind_port(self, server: grpc.aio.Server, key: str, port: int, tls: TlsConfig | None) -> None:
        listen = self._config.listen
        _check_free(key, listen.host, port)
        try:
            if tls is None:
                server.add_insecure_port(listen.address(port))
            else:
                certificates = RotatingCertificates(tls)
                self._certificates.append(certificates)
                self._metrics.follow_file(str(tls.certificate_file), certificates.refused)
                server.add_secure_port(listen.address(port), certificates.credentials)
        except CertificateError as error:
            raise StartError(f"tls: {error}") from error
        except RuntimeError as error:
            raise StartError(f"{key}: cannot listen on {listen.address(port)}: {error}") from error

    def _new_server(self, names: Sequence[str], identify: Identify) -> grpc.aio.Server:
        limits = self._config.limits
        options: ChannelOptions = [
            *server_options(limits.max_message_bytes),
            # No grace is named, so that calls that run then may end: each has a deadline, whatever its caller chose.
            ("grpc.max_connection_age_ms", int(limits.max_connection_age_s * 1_000)),
        ]
        interceptors = [*self._tracing, CallInterceptor(self._gate, self._metrics, identify)]
        server = grpc.aio.server(interceptors=interceptors, options=options)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        return server

    async def _load(self) -> bool:
        """Load the model; False when a signal came first."""
        start = time.monotonic()
        with uncollected_start():
            loading = asyncio.get_running_loop().run_in_executor(self._executor, self._hosted.load)
            stopping = asyncio.create_task(self._stopping.wait())
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            return False
        try:
            loading.result()
        except ModelSourceError as error:
            raise StartError(" ".join(str(error).split())) from error
        log_event(_LOGGER, "ready", {"load_seconds": round(time.monotonic() - start, 3)})
        return True

    async def _drain(self, servers: Sequence[grpc.aio.Server], refusal: str) -> bool:
        """Refuse new calls, let the running ones end; False when the grace ran out first."""
        grace_s = self._config.drain_grace_s
        log_event(_LOGGER, "draining", {"calls": self._gate.calls, "grace_s": grace_s})
        self._gate.close(refusal)
        self._metrics.ready(False)
        for name in self._names:
            await self._health.set(name, _NOT_SERVING)
        drained = True
        try:
            await asyncio.wait_for(self._gate.wait_idle(), grace_s)
        except TimeoutError:
            drained = False
        left = self._gate.calls
        # The short grace lets the last replies reach their callers.
        await asyncio.gather(*(server.stop(0.2 if drained else 0) for server in servers))
        # Now, because the process ends without the interpreter's exit handlers.
        await asyncio.to_thread(flush_tracing, _FLUSH_TIMEOUT_S)
        log_event(_LOGGER, "stopped", {"drained": drained, "calls_cut_short": left})
        return drained

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        fields: dict[str, LogValue] = {"signal": signal.Signals(number).name}
        now = time.monotonic()
        if self._asked is not None:
            first, first_s = self._asked
            if number == first and now - first_s < ECHO_S:
                return
            log_event(_LOGGER, "stopped_at_once", fields)
            exit_now(128 + number)
        self._asked = number, now
        log_event(_LOGGER, "signal", fields)
        self._stopping.set()


def _check_free(key: str, host: str, port: int) -> None:
    """Raise StartError unless the port can be bound; gRPC's own error would not say why."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise StartError(f"{key}: cannot listen on {host}:{port}: {error.strerror or error}") from error
