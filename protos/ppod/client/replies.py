"""From what gRPC raises to what a client raises."""

from __future__ import annotations

import grpc

from ppod.errors import InvalidArgument, PpodError, Unavailable, from_rpc_error


def typed_error(error: grpc.RpcError, service_name: str, address: str) -> PpodError:
    """The typed error, with the original one as its cause.

    The message tells which replica could not be reached; of other errors a note tells who sent them.
    """
    typed, sender = from_rpc_error(error), f"{service_name} at {address}"
    if isinstance(error, grpc.Call | grpc.aio.AioRpcError) and error.code() == grpc.StatusCode.UNIMPLEMENTED:
        # The port of another service, or of administration; or a server that is older than this client.
        typed = InvalidArgument("target", f"{address}, which does not take this call", f"a port of {service_name}")
    elif isinstance(typed, Unavailable):
        typed = Unavailable(f"{sender}: {typed.detail}")
    else:
        typed.add_note(f"from {sender}")
    typed.__cause__ = error
    return typed
