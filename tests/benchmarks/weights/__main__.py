"""Weights on their way: each plane against what it cannot be faster than.

Run as `python -m benchmarks.weights` with tests/ on the path; parts by name, all by default:

    grpc     the model in bfloat16 to one replica over gRPC, against a bare gRPC byte stream of the same chunks
    shared   the same through shared memory, against a memcpy of the same bytes
    pause    how long decoding stands still while weights are pushed
    relay    eight replicas of a small model against one
    uplinks  the same where every sender's uplink has a fixed speed
    delta    changes after real PPO steps, of a short `ppod run`, or of the checkpoints that --checkpoints names
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.subject import add_arguments, subject_of
from benchmarks.weights.delta import measure_delta, train
from benchmarks.weights.figures import Place, say
from benchmarks.weights.push import measure_grpc, measure_pause, measure_shared
from benchmarks.weights.relays import measure_relays, measure_uplinks

PARTS = ("grpc", "shared", "pause", "relay", "uplinks", "delta")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], choices=[*PARTS, []], help="what to measure")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each figure")
    parser.add_argument("--out", type=Path, default=Path("build/bench-weights"), help="directory of the figures")
    parser.add_argument("--checkpoints", type=Path, default=None, help="checkpoints of a run that saved every step")
    parser.add_argument("--steps", type=int, default=4, help="steps of the run that is made where there is none")
    parser.add_argument("--hidden-size", type=int, default=384, help="width of the small model")
    parser.add_argument("--service", default="{}", metavar="JSON", help="more of the services' configuration")
    add_arguments(parser)
    arguments = parser.parse_args()
    out: Path = arguments.out
    met = True
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        place = Place(subject_of(arguments), arguments.rounds, Path(folder), out, json.loads(arguments.service))
        for part in arguments.parts or PARTS:
            say(f"{part}:")
            if part == "grpc":
                met &= measure_grpc(place)
            elif part == "shared":
                met &= measure_shared(place)
            elif part == "pause":
                met &= measure_pause(place)
            elif part == "relay":
                met &= measure_relays(place, arguments.hidden_size)
            elif part == "uplinks":
                met &= measure_uplinks(place, arguments.hidden_size)
            else:
                checkpoints: Path | None = arguments.checkpoints
                if checkpoints is None:
                    train(out / "run", arguments.steps)
                    checkpoints = out / "run" / "checkpoints"
                met &= measure_delta(checkpoints, place)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
