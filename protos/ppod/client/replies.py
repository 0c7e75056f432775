"""From what gRPC raises to what a client raises."""

from __future__ import annotations

import grpc

from ppod.errors import PpodError, Unavailable, from_rpc_error


def typed_error(error: grpc.RpcError, service_name: str, address: str) -> PpodError:
    """The typed error, with the original one as its cause; it tells which replica could not be reached."""
    typed = from_rpc_error(error)
    if isinstance(typed, Unavailable):
        typed = Unavailable(f"{service_name} at {address}: {typed.detail}")
    typed.__cause__ = error
    return typed
