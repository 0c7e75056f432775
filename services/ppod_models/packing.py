"""Ragged sequences in one forward: one after the other without padding where the model allows it, else padded.

A transformer's matrix products do not care where a sequence ends; its attention does. So all tokens of a batch form one
row, and attention runs on each stretch of equally long sequences. Padding of texts sorted by length still costs a fifth
of the compute of a typical batch of reviews; here it costs none.

transformers knows such batches for flash attention kernels, which CPUs lack; for the others it masks the square of the
whole row. The attention registered here takes their place.

Shape legend: B sequences, N tokens of all sequences, T padded length, R rows, H hidden size, A heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ppod_models.padding import pad_sequences

_PACKED_SDPA = "ppod_packed_sdpa"
_PROBE_LENGTHS = (5, 1, 3, 3)
_PACKS: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""What the probe found."""


@dataclass(frozen=True, slots=True)
class Run:
    """Equally long sequences, one after the other.

    Attributes:
        start: where the first one starts in the row.
        count: how many they are.
        length: of each, in tokens.
    """

    start: int
    count: int
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Sequences as a model takes them.

    Attributes:
        input_ids: int64 [R, T]; [1, N] where packed.
        position_ids: int64 [R, T].
        attention_mask: int64 [R, T]; None where packed, or where none is wanted.
        starts: int64 [B], where each sequence starts in the rows put end to end, in the order of the caller.
        runs: how the row divides; None where padded.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    starts: torch.Tensor
    runs: tuple[Run, ...] | None


def lay_out(
    sequences: Sequence[npt.NDArray[np.integer]], *, packed: bool, device: torch.device, masked: bool = True
) -> Layout:
    """Put int arrays [length] end to end, or pad them on the right to the longest.

    Causal attention keeps padding on the right from every real token even without a mask, and is faster so.
    """
    if not packed:
        batch = pad_sequences(sequences, side="right", device=device)
        starts = torch.arange(len(sequences), device=device) * batch.input_ids.shape[1]
        return Layout(batch.input_ids, batch.position_ids, batch.attention_mask if masked else None, starts, None)
    lengths = np.asarray([len(sequence) for sequence in sequences])
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    starts = np.empty(len(sequences), dtype=np.int64)
    starts[order] = ends - lengths[order]
    tokens = np.concatenate([sequences[index] for index in order]).astype(np.int64)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths[order]])
    return Layout(
        input_ids=torch.from_numpy(tokens).to(device).unsqueeze(0),
        position_ids=torch.from_numpy(positions).to(device).unsqueeze(0),
        attention_mask=None,
        starts=torch.from_numpy(starts).to(device),
        runs=_runs(lengths[order].tolist()),
    )


def hidden_states(body: PreTrainedModel, layout: Layout) -> torch.Tensor:
    """Run a decoder without its head; the last layer's states, rows put end to end: [R * T, H]."""
    packed = {} if layout.runs is None else {"packed_runs": layout.runs}
    output = body(
        input_ids=layout.input_ids,
        attention_mask=layout.attention_mask,
        position_ids=layout.position_ids,
        use_cache=False,
        **packed,
    )
    return cast(torch.Tensor, output.last_hidden_state).flatten(0, 1)


def probe_tolerance(dtype: torch.dtype) -> float:
    """How far rounding may move a value, relative to the largest, when the same is computed in another layout."""
    return 1e-4 if dtype == torch.float32 else 3e-2


def enable_packing(model: PreTrainedModel) -> bool:
    """Let a model take packed layouts, if it can; padded ones it takes as before.

    It can where it runs on a CPU with sdpa attention, and leaves attention to transformers' interface: a probe compares
    what it makes of packed sequences with what it makes of each alone.
    """
    # Once: the probe changes the attention of a model that may be serving by the time that somebody asks again.
    if model not in _PACKS:
        _PACKS[model] = _try_packing(model)
    return _PACKS[model]


def _try_packing(model: PreTrainedModel) -> bool:
    if model.config._attn_implementation == _PACKED_SDPA:  # pyright: ignore[reportPrivateUsage]
        return True
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":  # pyright: ignore[reportPrivateUsage]
        return False
    model.set_attn_implementation(_PACKED_SDPA)
    if _packs(cast(PreTrainedModel, model.base_model)):
        return True
    model.set_attn_implementation("sdpa")
    return False


@torch.inference_mode()
def _packs(body: PreTrainedModel) -> bool:
    sequences = [np.arange(length) + 1 for length in _PROBE_LENGTHS]
    layout = lay_out(sequences, packed=True, device=body.device)
    try:
        together = hidden_states(body, layout)
        alone = [hidden_states(body, lay_out([one], packed=False, device=body.device)) for one in sequences]
    except (TypeError, ValueError, RuntimeError, AttributeError):
        # An architecture that does not hand the runs down to its attention, or wants more of it than there is here.
        return False
    tolerance = probe_tolerance(body.dtype)
    scale = float(together.abs().max().clamp(min=1.0))
    return all(
        bool(((together[start : start + len(states)] - states).abs() <= tolerance * scale).all())
        for start, states in zip(layout.starts.tolist(), alone, strict=True)
    )


def _runs(lengths: Sequence[int]) -> tuple[Run, ...]:
    """Neighbours of equal length together; lengths are sorted."""
    runs: list[Run] = []
    start = 0
    for length in lengths:
        if runs and runs[-1].length == length:
            runs[-1] = Run(runs[-1].start, runs[-1].count + 1, length)
        else:
            runs.append(Run(start, 1, length))
        start += length
    return tuple(runs)


def _packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_runs: tuple[Run, ...] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: query [R, A, T, D] to [R, T, A, D]; in packed rows for each run apart."""
    if packed_runs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"packed attention knows no {name}")
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for run in packed_runs:
        span = slice(run.start, run.start + run.count * run.length)
        q, k, v = (_sequences(states, span, run) for states in (query, key, value))
        attended, _ = sdpa_attention_forward(module, q, k, v, None, **options)
        output[0, span] = attended.flatten(0, 1)
    return output, None


def _sequences(states: torch.Tensor, span: slice, run: Run) -> torch.Tensor:
    """A run's part of [1, A, N, D] as a batch of its sequences, [count, A, length, D]; a view."""
    return states[0, :, span].unflatten(1, (run.count, run.length)).transpose(0, 1)


def _mask(*, attention_mask: torch.Tensor | None, **options: Any) -> torch.Tensor | None:
    """Masks of transformers' interface: none for packed rows, which have no attention mask; else those of sdpa.

    Some models tell of a window by their masks alone, and not their attention.
    """
    if attention_mask is None and options.get("local_size") is not None:
        raise ValueError("packed attention knows no window")
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **options)


AttentionInterface.register(_PACKED_SDPA, _packed_sdpa)
AttentionMaskInterface.register(_PACKED_SDPA, _mask)
