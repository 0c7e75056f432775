"""Times the bare forward pass in one process: sequences sorted by length, batched ideally, tokenised beforehand.

usage: python bare.py --checkpoint DIR --texts FILE --threads N --dtype NAME --max-batch-tokens N
    --max-batch-size N --seconds S

Prints one JSON object: sequences and tokens a second, scores in the order of the texts. With --lone it prints the token
ids of the shortest text instead, and answers each line of its input with the seconds of one forward pass over them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from forward import Forward

from ppod_models.reward_classifiers import ClassifierInput, SequenceClassifier


class EngineForward(Forward):
    """The forward pass as ppod's service runs it: leaner than transformers' own, so the harder measure."""

    def __init__(self, directory: str, threads: int, dtype: str) -> None:
        super().__init__(directory, threads, dtype)
        self._classifier = SequenceClassifier(self.model)
        self.packs = self._classifier.packs

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """One score for each sequence, in one forward: packed where the model can, else padded on the right."""
        inputs = [ClassifierInput(np.asarray(one, dtype=np.int32), np.asarray([len(one) - 1])) for one in sequences]
        return [float(score[0]) for score in self._classifier.score(inputs)]


def ideal_batches(
    lengths: Sequence[int], max_batch_tokens: int, max_batch_size: int, *, packed: bool
) -> list[list[int]]:
    """Indices sorted by length and cut greedily where the batch, padded or packed, would exceed a bound."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        batch = batches[-1]
        tokens = sum(lengths[member] for member in batch) if packed else lengths[index] * len(batch)
        if len(batch) == max_batch_size or tokens + lengths[index] > max_batch_tokens:
            batch = []
            batches.append(batch)
        batch.append(index)
    return batches


def answer_lone(forward: Forward, sequence: Sequence[int]) -> None:
    """Print the sequence, then time one forward pass for each line of the input."""
    print(json.dumps(list(sequence)), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        forward.scores([sequence])
        print(time.perf_counter() - begin, flush=True)


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
    parser.add_argument("--lone", action="store_true")
    options = parser.parse_args()
    texts: list[str] = json.loads(options.texts.read_text())
    forward = EngineForward(options.checkpoint, options.threads, options.dtype)
    sequences = forward.encode(texts)
    if options.lone:
        answer_lone(forward, min(sequences, key=len))
        return
    lengths = [len(sequence) for sequence in sequences]
    batches = ideal_batches(lengths, options.max_batch_tokens, options.max_batch_size, packed=forward.packs)
    scores = [0.0] * len(texts)
    for batch in batches:  # the first pass warms up, and tells the scores
        for index, score in zip(batch, forward.scores([sequences[index] for index in batch]), strict=True):
            scores[index] = score
    passes, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < options.seconds:
        for batch in batches:
            forward.scores([sequences[index] for index in batch])
        passes += 1
    tokens = sum(len(sequence) for sequence in sequences)
    print(
        json.dumps(
            {
                "sequences_per_s": passes * len(texts) / seconds,
                "tokens_per_s": passes * tokens / seconds,
                "scores": scores,
            }
        )
    )


if __name__ == "__main__":
    main()
