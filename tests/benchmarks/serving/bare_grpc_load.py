"""Calls peers/bare_grpc.py with one sequence at a time, and times it.

usage: python bare_grpc_load.py --target HOST:PORT --texts FILE --in-flight 1 --per-request 1 --seconds S --lone-calls N

Prints what grpc_load.py prints. There is no queue and no batch: its sequences a second are those of lone calls.
"""

from __future__ import annotations

import json
import time

import grpc
import numpy as np
from grpc_load import parser
from lone import bare_forward, extra_seconds
from transformers import AutoTokenizer


def main() -> None:
    """Measure and print."""
    options = parser(__doc__).parse_args()
    texts: list[str] = json.loads(options.texts.read_text())
    command: list[str] = json.loads(options.bare)
    tokenizer = AutoTokenizer.from_pretrained(command[command.index("--checkpoint") + 1])
    sequences: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    with grpc.insecure_channel(options.target) as channel:
        grpc.channel_ready_future(channel).result(120)
        call = channel.unary_unary("/bare.Reward/Score")

        def ask(tokens: list[int]) -> tuple[float, float]:
            value, seconds = np.frombuffer(call(np.asarray(tokens, dtype="<i4").tobytes()), dtype=np.float64)
            return float(value), float(seconds)

        start = time.perf_counter()
        scores = [ask(tokens)[0] for tokens in sequences]
        seconds = time.perf_counter() - start
        with bare_forward(tuple(command)) as bare:
            lone = extra_seconds(lambda: ask(bare.tokens)[1], bare, options.lone_calls)
    print(json.dumps({"sequences_per_s": len(texts) / seconds, "scores": scores, **lone}))


if __name__ == "__main__":
    main()
