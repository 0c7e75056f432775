"""A sender of weights that stops in the middle: `python -m support.weight_pusher TARGET VERSION SEED BYTES`.

It opens a transfer of the tiny model, sends so many bytes of it, says so on stdout, and sends nothing more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import grpc

from ppod.client import WeightPush, weight_calls
from ppod.errors import from_rpc_error
from ppod.v1 import weights_pb2, weights_pb2_grpc
from support.tiny_model import build_model
from support.weight_tensors import weight_tensors


def first_part(version: int, seed: int, size: int) -> Iterator[weights_pb2.PrepareWeightsRequest]:
    """The manifest, and the first bytes of the tensors."""
    messages = weight_calls.messages(WeightPush(version, weight_tensors(build_model(seed=seed))))
    manifest, *chunks = map(weights_pb2.PrepareWeightsRequest.FromString, messages)
    yield manifest
    yield weights_pb2.PrepareWeightsRequest(chunk=b"".join(part.chunk for part in chunks)[:size])


def main() -> None:
    target, version, seed, size = sys.argv[1], *map(int, sys.argv[2:])

    def parts() -> Iterator[weights_pb2.PrepareWeightsRequest]:
        yield from first_part(version, seed, size)
        print("sent", flush=True)
        time.sleep(60)

    with grpc.insecure_channel(target) as channel:
        try:
            weights_pb2_grpc.WeightServiceStub(channel).PrepareWeights(parts())
        except grpc.RpcError as error:
            typed = from_rpc_error(error)
            print(f"{typed.code.name}: {typed}", flush=True)
            # The thread that sleeps in `parts` would keep the process.
            sys.stdout.flush()


if __name__ == "__main__":
    main()
