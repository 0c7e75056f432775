"""How channels and servers are set up, in one place, so that both ends agree."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

import grpc
import grpc.aio

from ppod.errors import InvalidArgument

ChannelOptions = list[tuple[str, str | int]]

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Largest message either end takes. Bulk weights travel in chunks far below it."""

WEIGHT_CHUNK_BYTES = 2 * 1024 * 1024
"""Size of a weight chunk: loopback streams peak between 1 and 4 MiB and fall to a sixth at 256 MiB."""

_KEEPALIVE_MS = 30_000
_LONGEST_TIMEOUT_S = 1e9
"""gRPC counts nanoseconds since 1970 in 64 bits: a deadline after 2262 would have passed long ago."""


def call_timeout_s(seconds: float) -> float:
    """What a call is given as its time; infinite ones as much as gRPC takes.

    Raises:
        InvalidArgument: it is no number.
    """
    if math.isnan(seconds):
        raise InvalidArgument("timeout_s", str(seconds), "seconds")
    return min(seconds, _LONGEST_TIMEOUT_S)


def client_options() -> ChannelOptions:
    """Options of a client channel."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.lb_policy_name", "round_robin"),
        # A service that restarts is found again within a second, not after gRPC's two-minute backoff.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # A host that answers nothing is given up after this, not after twenty seconds.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        # Two clients of one process do not share a connection, so bulk weights do not delay small calls.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> ChannelOptions:
    """Options of a server."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # The `min_recv_ping_interval` option that is often copied does nothing; this one keeps GOAWAY away.
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        # Without this two servers can listen on one port, and callers reach either: a port in use must be an error.
        ("grpc.so_reuseport", 0),
    ]


@dataclass(frozen=True, slots=True)
class ChannelSpec:
    """Where a channel leads.

    Attributes:
        address: `host:port` or any gRPC target.
        server_name: name that the server's certificate must carry; empty: the host of `address`.
    """

    address: str
    server_name: str = ""

    def options(self) -> ChannelOptions:
        """Options of the channel."""
        options = client_options()
        if is_local(self.address) or _is_private(self.address):
            # gRPC goes by the proxy of https_proxy, which is there for hubs, also to this machine and to other pods.
            options.append(("grpc.enable_http_proxy", 0))
        if self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        return options


def is_local(target: str) -> bool:
    """Whether a gRPC target is of this machine alone."""
    if target.startswith("unix:"):
        return True
    address = _ip_address(target)
    return _host(target) == "localhost" if address is None else address.is_loopback


def _is_private(target: str) -> bool:
    """Whether it is an IP address that the internet does not lead to, as that of a pod."""
    address = _ip_address(target)
    return address is not None and not address.is_global


def _ip_address(target: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(_host(target))
    except ValueError:
        return None


def _host(target: str) -> str:
    address = target.rpartition("/")[2].removeprefix("ipv4:").removeprefix("ipv6:")
    return address.rpartition(":")[0].strip("[]") or address


def open_channel(spec: ChannelSpec, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """Open a channel for blocking calls; without credentials in plain text."""
    if credentials is None:
        return grpc.insecure_channel(spec.address, options=spec.options())
    return grpc.secure_channel(spec.address, credentials, options=spec.options())


def open_aio_channel(spec: ChannelSpec, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """Open a channel on the running event loop; without credentials in plain text."""
    if credentials is None:
        return grpc.aio.insecure_channel(spec.address, options=spec.options())
    return grpc.aio.secure_channel(spec.address, credentials, options=spec.options())


def insecure_channel(target: str) -> grpc.Channel:
    """Open a plain-text channel to `host:port`."""
    return open_channel(ChannelSpec(target), None)
