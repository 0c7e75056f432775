"""A grpc.aio server around the forward pass, with nothing else: what gRPC itself costs in Python.

usage: python bare_grpc.py --checkpoint DIR --port N --threads N --dtype NAME

Method /bare.Reward/Score: a request is the token ids of one sequence, int32; a reply the score and the seconds of the
forward pass, both float64. One forward at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc.aio
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bare import EngineForward
from forward import server_parser


def score(forward: EngineForward, request: bytes) -> bytes:
    """One request; in the model's thread."""
    start = time.perf_counter()
    [value] = forward.scores([np.frombuffer(request, dtype="<i4").tolist()])
    return np.asarray([value, time.perf_counter() - start]).tobytes()


async def serve(options: argparse.Namespace) -> None:
    """Serve until a signal."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as executor:
        forward = await loop.run_in_executor(
            executor, EngineForward, options.checkpoint, options.threads, options.dtype
        )

        async def handle(request: bytes, _context: object) -> bytes:
            return await loop.run_in_executor(executor, score, forward, request)

        server = grpc.aio.server()
        method = grpc.unary_unary_rpc_method_handler(handle)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Reward", {"Score": method}),))
        health = aio.HealthServicer()
        await health.set("ppod.v1.RewardService", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        server.add_insecure_port(f"127.0.0.1:{options.port}")
        await server.start()
        await server.wait_for_termination()


def main() -> None:
    """Parse and serve."""
    asyncio.run(serve(server_parser(__doc__).parse_args()))


if __name__ == "__main__":
    main()
