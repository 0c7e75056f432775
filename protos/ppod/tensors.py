"""Ragged batches as packed bytes: int32 token ids and float32 values, little-endian.

`repeated float` in protobuf costs two orders of magnitude more to encode from an array, so no tensor travels that way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ppod.errors import InvalidArgument, InvalidReply
from ppod.v1 import common_pb2

TokenArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")
ScalarT = TypeVar("ScalarT", bound=np.generic)


def pack_sequences(sequences: Sequence[npt.ArrayLike]) -> common_pb2.TokenSequences:
    """Pack token id sequences.

    Args:
        sequences: one integer array or list a sequence, each of shape [length].

    Raises:
        InvalidArgument: a sequence is not one-dimensional, is empty, or holds something other than int32 ids >= 0.
    """
    arrays = [_as_tokens(sequence, sample) for sample, sequence in enumerate(sequences)]
    packed = np.concatenate(arrays).astype(_INT32, copy=False).tobytes() if arrays else b""
    return common_pb2.TokenSequences(token_ids=packed, lengths=[len(array) for array in arrays])


def unpack_sequences(message: common_pb2.TokenSequences, field: str) -> list[TokenArray]:
    """Unpack token id sequences; each is a read-only int32 array of shape [length].

    Raises:
        InvalidArgument: the bytes do not add up to the lengths, or a length is zero. `field` names the culprit.
    """
    lengths = list(message.lengths)
    expected = 4 * sum(lengths)
    if len(message.token_ids) != expected:
        raise InvalidArgument(
            f"{field}.token_ids", f"{len(message.token_ids)} bytes", f"{expected} bytes, 4 for each of sum(lengths)"
        )
    for sample, length in enumerate(lengths):
        if length == 0:
            raise InvalidArgument(f"{field}.lengths", "0", "at least one token", sample)
    flat = np.frombuffer(message.token_ids, dtype=_INT32)
    return split_ragged(flat, lengths)


def check_token_ids(sequences: Sequence[TokenArray], vocab_size: int, field: str) -> None:
    """Raise InvalidArgument that names the first sample with an id outside 0 to vocab_size - 1."""
    if not sequences:
        return
    # Nearly always all is well, which one look at all ids tells.
    whole = sequences[0] if len(sequences) == 1 else np.concatenate(sequences)
    if whole.min() >= 0 and whole.max() < vocab_size:
        return
    for sample, tokens in enumerate(sequences):
        bad = (tokens < 0) | (tokens >= vocab_size)
        if bad.any():
            position = int(bad.argmax())
            raise InvalidArgument(
                f"{field}.token_ids",
                f"id {int(tokens[position])} at position {position}",
                f"ids from 0 to {vocab_size - 1}",
                sample,
            )


def pack_tokens(tokens: npt.ArrayLike) -> bytes:
    """Encode one sequence of token ids as int32, little-endian."""
    return np.asarray(tokens, dtype=_INT32).tobytes()


def pack_floats(values: Iterable[npt.ArrayLike] | npt.ArrayLike) -> bytes:
    """Encode one array, or a list of arrays of shape [length] one after the other, as float32, little-endian."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values, dtype=_FLOAT32).tobytes()
    parts = [np.atleast_1d(np.asarray(value, dtype=_FLOAT32)) for value in values]  # pyright: ignore
    return np.concatenate(parts).tobytes() if parts else b""


def unpack_reply_tokens(data: bytes, field: str) -> TokenArray:
    """Decode one sequence of token ids of a reply; raise InvalidReply when it is empty or not whole."""
    if len(data) == 0 or len(data) % 4:
        raise InvalidReply(field, f"{len(data)} bytes", "a positive multiple of 4 bytes")
    return np.frombuffer(data, dtype=_INT32)


def unpack_reply_floats(data: bytes, count: int, field: str) -> FloatArray:
    """Decode `count` float32 values of a reply; raise InvalidReply for another number or for one not finite."""
    if len(data) != 4 * count:
        raise InvalidReply(field, f"{len(data)} bytes", f"{4 * count} bytes, 4 for each of {count} values")
    values = np.frombuffer(data, dtype=_FLOAT32)
    finite = np.isfinite(values)
    if not finite.all():
        position = int(finite.argmin())
        raise InvalidReply(field, f"{values[position]} at position {position}", "finite values only")
    return values


def split_ragged(flat: npt.NDArray[ScalarT], lengths: Sequence[int]) -> list[npt.NDArray[ScalarT]]:
    """Cut a flat array into views of the given lengths."""
    ends = itertools.accumulate(lengths)
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _as_tokens(sequence: npt.ArrayLike, sample: int) -> TokenArray:
    array = np.asarray(sequence)
    if array.ndim != 1 or array.size == 0:
        raise InvalidArgument("tokens", f"shape {list(array.shape)}", "a non-empty one-dimensional sequence", sample)
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidArgument("tokens", f"dtype {array.dtype}", "integer token ids", sample)
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise InvalidArgument("tokens", f"ids {array.min()} to {array.max()}", "ids from 0 to 2147483647", sample)
    return array.astype(_INT32, copy=False)
