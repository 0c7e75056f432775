"""Which samples an optimizer step sees, and in which pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ppod_trainer.config import PpoConfig
from ppod_trainer.policy import ResponseBatch

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Minibatch:
    """The samples of one optimizer step.

    Attributes:
        rows: int64 [N], all of their row positions.
        shares: of each rank its micro-batches, int64 row positions; equally many for each, so that some may be empty.
    """

    rows: torch.Tensor
    shares: tuple[tuple[torch.Tensor, ...], ...]


@dataclass(frozen=True, slots=True)
class SampleLengths:
    """Tokens of each sample's prompt and response, int64 [B]."""

    prompts: Rows
    responses: Rows

    @staticmethod
    def of(batch: ResponseBatch) -> SampleLengths:
        """The lengths in a batch."""
        width = batch.prompt_width
        prompts = batch.attention_mask[:, :width].sum(dim=1)
        return SampleLengths(prompts.cpu().numpy(), batch.response_mask.sum(dim=1).cpu().numpy())

    def padded_tokens(self, rows: Rows) -> int:
        """Tokens of these samples in one batch, with prompts padded on the left and responses on the right."""
        return len(rows) * int(self.prompts[rows].max() + self.responses[rows].max())


def plan_minibatches(
    lengths: SampleLengths, seed: int, step: int, epoch: int, ppo: PpoConfig, ranks: int = 1
) -> Iterator[Minibatch]:
    """The minibatches of an epoch.

    Which samples are in which follows from (seed, step, epoch) alone. How many ranks there are, how long the samples
    are and the limits on micro-batches decide the shares only, which change nothing but rounding.
    """
    order = np.random.default_rng([seed, 1, step, epoch]).permutation(len(lengths.prompts))
    for part in np.array_split(order, min(ppo.minibatches, len(order))):
        if ppo.micro_batch_tokens is None:
            shares = [_cut(share, ppo.micro_batch_size) for share in np.array_split(part, ranks)]
        else:
            shares = _deal(_buckets(part, lengths, ppo.micro_batch_tokens, ranks), ranks)
        count = max(len(share) for share in shares)
        yield Minibatch(torch.from_numpy(part), tuple(_of_length(share, count) for share in shares))


def _cut(rows: Rows, micro_batch_size: int | None) -> list[Rows]:
    size = micro_batch_size or max(len(rows), 1)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _buckets(rows: Rows, lengths: SampleLengths, most_tokens: int, ranks: int) -> list[Rows]:
    """Samples of similar lengths together, the longest first, with at most so many padded tokens.

    As few as that allows, but a multiple of the number of ranks where there are samples enough, and as even as
    possible: ranks that compute at the same time wait for the slowest.
    """
    totals = lengths.prompts[rows] + lengths.responses[rows]
    ordered = rows[np.lexsort((lengths.prompts[rows], totals))[::-1]]
    fewest = len(_fill(ordered, lengths, most_tokens))
    count = min(-(-fewest // ranks) * ranks, len(rows))
    low, high = 1, most_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_fill(ordered, lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _fill(ordered, lengths, high)


def _fill(ordered: Rows, lengths: SampleLengths, most_tokens: int) -> list[Rows]:
    """Cut greedily; a sample that is longer than the limit has a micro-batch of its own."""
    buckets: list[Rows] = []
    start = 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or lengths.padded_tokens(ordered[start : end + 1]) > most_tokens:
            buckets.append(ordered[start:end])
            start = end
    return buckets


def _deal(buckets: list[Rows], ranks: int) -> list[list[Rows]]:
    """In turns, so that what the ranks compute at the same time is of similar size."""
    return [buckets[rank::ranks] for rank in range(ranks)]


def _of_length(share: list[Rows], count: int) -> tuple[torch.Tensor, ...]:
    empty = [np.zeros(0, dtype=np.int64)] * (count - len(share))
    return tuple(torch.from_numpy(rows) for rows in [*share, *empty])
