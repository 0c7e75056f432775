"""Finding the replicas behind a name, such as a headless service."""

from __future__ import annotations

import socket


def resolve(host: str, port: int) -> tuple[str, ...]:
    """Every address of a name as a gRPC target, in a fixed order; empty when it has none now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except (socket.gaierror, UnicodeError):  # the latter for a part of a name that is empty or too long
        return ()
    targets = {f"[{entry[4][0]}]:{port}" if entry[0] == socket.AF_INET6 else f"{entry[4][0]}:{port}" for entry in found}
    return tuple(sorted(targets))
