"""Features of many prefixes of a sequence from one forward: what a head would read of each, were it all there is.

A causal model's states of a prefix do not depend on what follows, so reads inside of the prefixes are all there at
once. A head with a suffix, such as a question about the text, also reads states behind it. The suffix is therefore put
behind the text once for each prefix, each copy with the positions, and with sight of the tokens, that it would have
behind that prefix alone (attention of a tree, as in Miao et al. 2024, SpecInfer, section 4).

Shape legend: R rows, T padded length, N = R * T, P prompt of the template, S its suffix, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from ppod_models.packing import Layout

_MASK_CELLS = 2**24
"""Most cells of the masks of one forward."""

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixRow:
    """A text, and some of its prefixes, which share a row.

    Attributes:
        text: int64 [length]; no longer than the longest of the prefixes.
        lengths: of the prefixes, in tokens of the text.
    """

    text: Tokens
    lengths: tuple[int, ...]


def divide(text: Tokens, lengths: Sequence[int], suffix_tokens: int) -> Iterator[PrefixRow]:
    """Rows of a text whose suffixes take no more room than text and template, or a few hundred tokens."""
    most = max(1, max(len(text), 256) // max(suffix_tokens, 1))
    for begin in range(0, len(lengths), most):
        some = tuple(lengths[begin : begin + most])
        yield PrefixRow(text[: max(some)], some)


def groups(rows: Sequence[PrefixRow], template_tokens: int, suffix_tokens: int) -> Iterator[list[PrefixRow]]:
    """Neighbours that share a forward, as many as its masks leave room for."""
    group: list[PrefixRow] = []
    longest = 0
    for row in rows:
        length = template_tokens + len(row.text) + suffix_tokens * len(row.lengths)
        longest = max(longest, length)
        if group and (len(group) + 1) * longest**2 > _MASK_CELLS:
            yield group
            group, longest = [], length
        group.append(row)
    if group:
        yield group


@dataclass(frozen=True, slots=True, eq=False)
class PrefixLayout:
    """Rows as a model takes them, and where to read.

    Attributes:
        layout: of the model.
        starts: int64 [prefixes], where in the rows put end to end each prefix's text begins.
        lengths: int64 [prefixes], in tokens.
        ends: int64 [prefixes], the state at the end of each, behind its suffix.
    """

    layout: Layout
    starts: torch.Tensor
    lengths: torch.Tensor
    ends: torch.Tensor


def lay_out_prefixes(
    rows: Sequence[PrefixRow], template: Tokens, suffix: Tokens, device: torch.device, dtype: torch.dtype
) -> PrefixLayout:
    """Lay rows out, padded on the right, with a mask where there are suffixes to keep apart."""
    before, size = len(template), len(suffix)
    width = max(before + len(row.text) + size * len(row.lengths) for row in rows)
    ids, positions = (np.zeros((len(rows), width), np.int64) for _ in range(2))
    seen = np.zeros((len(rows), width, width), np.bool_) if size else None
    found: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows):
        trunk = before + len(row.text)
        ids[number, :trunk] = np.concatenate([template, row.text])
        positions[number, :trunk] = np.arange(trunk)
        begins = list(accumulate([size] * len(row.lengths), initial=trunk))
        for length, begin in zip(row.lengths, begins, strict=False):
            ids[number, begin : begin + size] = suffix
            positions[number, begin : begin + size] = before + length + np.arange(size)
            end = begin + size - 1 if size else before + length - 1
            found.append((number * width + before, length, number * width + end))
        if seen is not None:
            _see(seen[number], trunk, [before + length for length in row.lengths], size)
    mask = None
    if seen is not None:
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~torch.from_numpy(seen), torch.finfo(dtype).min)
        mask = mask.unsqueeze(1).to(device)
    layout = Layout(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        attention_mask=mask,
        starts=torch.arange(len(rows), device=device) * width,
        runs=None,
    )
    starts, lengths, ends = torch.tensor(found, dtype=torch.int64, device=device).unbind(1)
    return PrefixLayout(layout, starts, lengths, ends)


def _see(seen: npt.NDArray[np.bool_], trunk: int, lengths: Sequence[int], size: int) -> None:
    """Fill in who sees whom in a row, bool [T, T]: the text itself, and each suffix its prefix and itself."""
    causal = np.tril(np.ones((size, size), np.bool_))
    seen[:trunk, :trunk] = np.tril(np.ones((trunk, trunk), np.bool_))
    for begin, length in zip(range(trunk, len(seen), size), lengths, strict=False):
        seen[begin : begin + size, :length] = True
        seen[begin : begin + size, begin : begin + size] = causal
    # Padding has to see something.
    rest = trunk + size * len(lengths)
    seen[rest:, 0] = True


def prefix_means(hidden: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Means over positions start to start + length - 1: float32 [prefixes, H], for hidden [N, H]; many may overlap."""
    # The sums of a row reach into the next one; in float64 what is taken off again leaves nothing behind.
    sums = torch.cat([hidden.new_zeros(1, hidden.shape[1], dtype=torch.float64), hidden.double().cumsum(dim=0)])
    return ((sums[starts + lengths] - sums[starts]) / lengths.unsqueeze(1)).float()
