"""From what gRPC raises to what a client raises."""

from __future__ import annotations

import grpc

from ppod.errors import Cancelled, PpodError, Unavailable, from_rpc_error

_CUT_OFF = (grpc.StatusCode.CANCELLED.name, "")
"""All that gRPC says of a call that a server lets go of as it stops; whoever cancels a call here leaves other words."""


def typed_error(error: grpc.RpcError, service_name: str, address: str) -> PpodError:
    """The typed error, with the original one as its cause; it tells which replica could not be reached."""
    typed = from_rpc_error(error)
    if isinstance(typed, Cancelled) and typed.detail in _CUT_OFF:
        # Nobody cancelled it: the server stopped with the call taken from the wire and not begun, or cut short.
        typed = Unavailable("the server stopped before it answered")
    if isinstance(typed, Unavailable):
        typed = Unavailable(f"{service_name} at {address}: {typed.detail}")
    typed.__cause__ = error
    return typed
