"""`python -m ppod.health HOST:PORT [SERVICE]`: asks a server for its health once, as probes of containers do.

Exit codes: 0 it serves; 1 it does not, or could not be asked; 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ppod.channel import ChannelSpec, call_timeout_s, open_channel
from ppod.client.replicas import parse_target
from ppod.client.security import ClientSecurity
from ppod.errors import InvalidArgument

if TYPE_CHECKING:
    # Generic in its type stubs only.
    HealthCheck = grpc.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]

EXIT_UNHEALTHY = 1
EXIT_ARGUMENTS = 2

_EPILOG = """\
SERVICE is such as ppod.v1.RewardService, which serves once its model is loaded; without it the process need only be
alive. exit codes: 0 it serves; 1 it does not, or could not be asked; 2 the arguments are wrong.
"""


def check(target: str, service: str, security: ClientSecurity, timeout_s: float) -> str | None:
    """Ask for a server's health, within `timeout_s`; returns None when it serves, else what it is instead.

    Raises:
        InvalidArgument: a certificate cannot be read, or the time is no number.
    """
    credentials = security.credentials()
    with open_channel(ChannelSpec(target, security.server_name), credentials) as channel:
        check_health = cast("HealthCheck", health_pb2_grpc.HealthStub(channel).Check)  # pyright: ignore
        call = check_health.future(health_pb2.HealthCheckRequest(service=service), timeout=call_timeout_s(timeout_s))
        if call.code() != grpc.StatusCode.OK:
            return f"{call.code().name}: {call.details()}"
        status = call.result().status
    if status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return health_pb2.HealthCheckResponse.ServingStatus.Name(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _check_target(options.target)
        security = ClientSecurity(
            ca_file=options.ca_file,
            certificate_file=options.certificate_file,
            key_file=options.key_file,
            server_name=options.server_name,
        )
        fault = check(options.target, options.service, security, options.timeout_s)
    except InvalidArgument as error:
        print(f"ppod health: {error}")
        return EXIT_ARGUMENTS
    name = options.service or "the process"
    # To stdout: that is what container engines keep of a probe.
    print(f"{options.target}: {name}: {fault or 'SERVING'}")
    return 0 if fault is None else EXIT_UNHEALTHY


def _check_target(target: str) -> None:
    """Raise InvalidArgument where it is not one server's: without a port gRPC would ask another program, on 443."""
    endpoints = parse_target(target)
    if endpoints.kubernetes is not None or len(endpoints.addresses) > 1:
        raise InvalidArgument("target", target, "one server, as host:port")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ppod.health", description="Asks a gRPC server for its health once.", epilog=_EPILOG
    )
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("service", metavar="SERVICE", nargs="?", default="", help="empty: the process")
    parser.add_argument("--timeout-s", type=float, default=3.0, help="longest wait for the answer (default: 3)")
    tls = parser.add_argument_group("TLS", "for servers that have it")
    tls.add_argument("--ca-file", type=Path, metavar="FILE", help="authority of the server's certificate, PEM")
    tls.add_argument("--certificate-file", type=Path, metavar="FILE", help="own certificate, for mutual TLS")
    tls.add_argument("--key-file", type=Path, metavar="FILE", help="key of the own certificate")
    tls.add_argument("--server-name", default="", help="name in the server's certificate, where it is not HOST")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
