"""Times the bare forward pass in one process: sequences sorted by length, batched ideally, tokenised beforehand.

usage: python bare.py --checkpoint DIR --texts FILE --threads N --dtype NAME --max-batch-tokens N
    --max-batch-size N --seconds S

Prints one JSON object: sequences and tokens a second, seconds of a lone sequence, scores in the order of the texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from forward import Forward

LONE_CALLS = 100


def ideal_batches(lengths: Sequence[int], max_batch_tokens: int, max_batch_size: int) -> list[list[int]]:
    """Indices sorted by length and cut greedily where the padded batch would exceed a bound."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        batch = batches[-1]
        if len(batch) == max_batch_size or lengths[index] * (len(batch) + 1) > max_batch_tokens:
            batch = []
            batches.append(batch)
        batch.append(index)
    return batches


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-batch-tokens", type=int, required=True)
    parser.add_argument("--max-batch-size", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    texts: list[str] = json.loads(options.texts.read_text())
    forward = Forward(options.checkpoint, options.threads, options.dtype)
    sequences = forward.encode(texts)
    batches = ideal_batches([len(sequence) for sequence in sequences], options.max_batch_tokens, options.max_batch_size)
    scores = [0.0] * len(texts)
    for batch in batches:  # the first pass warms up, and tells the scores
        for index, score in zip(batch, forward.scores([sequences[index] for index in batch]), strict=True):
            scores[index] = score
    passes, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < options.seconds:
        for batch in batches:
            forward.scores([sequences[index] for index in batch])
        passes += 1
    lone = sequences[len(sequences) // 2]
    times: list[float] = []
    for _ in range(LONE_CALLS):
        begin = time.perf_counter()
        forward.scores([lone])
        times.append(time.perf_counter() - begin)
    tokens = sum(len(sequence) for sequence in sequences)
    print(
        json.dumps(
            {
                "sequences_per_s": passes * len(texts) / seconds,
                "tokens_per_s": passes * tokens / seconds,
                "lone_p50_s": statistics.median(times),
                "scores": scores,
            }
        )
    )


if __name__ == "__main__":
    main()
