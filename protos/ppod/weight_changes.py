"""A tensor as its changes against a base version, exact to the bit. Free of I/O; see TensorEncoding in weights.proto.

Elements are compared as bit patterns, so a change of sign of zero, or of one NaN into another, is a change too.
Legend: N elements of the tensor, C of them changed.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import numpy.typing as npt

from ppod.errors import InvalidArgument
from ppod.v1 import weights_pb2

Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
"""The elements of a tensor, [N], as bit patterns."""

Bytes = npt.NDArray[np.uint8]

_SKIP = 255
_COUNT = np.dtype("<u4")
_WORTH_GAPS = 0.75


class TensorEncoding(Enum):
    """How the bytes of a tensor travel."""

    DENSE = weights_pb2.TENSOR_ENCODING_DENSE
    BITMAP = weights_pb2.TENSOR_ENCODING_BITMAP
    GAPS = weights_pb2.TENSOR_ENCODING_GAPS


def bit_patterns(data: memoryview | Bytes, itemsize: int) -> Bits:
    """Bytes as the bit patterns of elements of 2 or 4 bytes; no copy."""
    return np.frombuffer(data, dtype="<u2" if itemsize == 2 else "<u4")


def encode_changes(new: Bits, base: Bits) -> tuple[TensorEncoding, Bytes]:
    """The smallest encoding of `new`, given `base` of the same shape and type.

    Gaps are tried only where they may be shorter than a bitmap by a quarter of it: finding them takes longer than all
    the rest.
    """
    # Through positions, and not through the mask: numpy takes by position seven times as fast.
    positions = np.flatnonzero(new != base)
    if not len(positions):
        return TensorEncoding.BITMAP, np.empty(0, np.uint8)
    values = new[positions].view(np.uint8)
    bitmap = (len(new) + 7) // 8
    # Each change takes a byte of the gaps at least.
    if _COUNT.itemsize + len(positions) < bitmap * _WORTH_GAPS:
        gaps = _gaps(positions)
        if _COUNT.itemsize + len(gaps) < bitmap and len(gaps) + len(values) < new.nbytes:
            length = np.array([len(gaps)], _COUNT).view(np.uint8)
            return TensorEncoding.GAPS, np.concatenate([length, gaps, values])
    if bitmap + len(values) < new.nbytes:
        return TensorEncoding.BITMAP, np.concatenate([np.packbits(new != base, bitorder="little"), values])
    return TensorEncoding.DENSE, new.view(np.uint8)


def apply_changes(encoding: TensorEncoding, data: Bytes, target: Bits, field: str) -> None:
    """Turn `target`, which holds the base's elements, into the new ones.

    Raises:
        InvalidArgument: on `field`, where the bytes are no changes of a tensor of this size.
    """
    if encoding is TensorEncoding.DENSE:
        raise InvalidArgument(field, "a dense tensor", "changes against a base version")
    if not len(data):
        return
    read = _read_bitmap if encoding is TensorEncoding.BITMAP else _read_gaps
    positions, values = read(data, len(target), field)
    if len(values) != len(positions) * target.itemsize:
        raise InvalidArgument(field, f"{len(values)} bytes of new elements", f"those of {len(positions)} changes")
    # A copy where the values begin at an odd address.
    target[positions] = np.frombuffer(values.tobytes(), target.dtype)


def _gaps(positions: npt.NDArray[np.int64]) -> Bytes:
    skipped = np.diff(positions, prepend=-1) - 1
    if skipped.max() < _SKIP:
        return skipped.astype(np.uint8)
    fillers = skipped // _SKIP
    gaps = np.full(len(skipped) + int(fillers.sum()), _SKIP, np.uint8)
    gaps[np.cumsum(fillers + 1) - 1] = skipped % _SKIP
    return gaps


def _read_bitmap(data: Bytes, elements: int, field: str) -> tuple[npt.NDArray[np.int64], Bytes]:
    """Positions of the changes [C], and the bytes of the new elements."""
    size = (elements + 7) // 8
    if len(data) < size:
        raise InvalidArgument(field, f"{len(data)} bytes", f"a bitmap of {size} bytes first")
    bits = np.unpackbits(data[:size], bitorder="little")
    if bits[elements:].any():
        raise InvalidArgument(field, "a change behind the last element", f"{elements} elements")
    # As booleans, whose positions numpy finds several times as fast.
    return np.flatnonzero(bits.view(np.bool_)), data[size:]


def _read_gaps(data: Bytes, elements: int, field: str) -> tuple[npt.NDArray[np.int64], Bytes]:
    """Positions of the changes [C], and the bytes of the new elements."""
    size = int(data[: _COUNT.itemsize].view(_COUNT)[0]) if len(data) >= _COUNT.itemsize else len(data)
    gaps = data[_COUNT.itemsize : _COUNT.itemsize + size]
    if not len(gaps) or len(gaps) != size or gaps[-1] == _SKIP:
        raise InvalidArgument(field, f"{len(gaps)} of {size} bytes of gaps", "gaps that end with a change")
    # Where each byte arrives: it skips its value, and marks one element unless it is a filler.
    arrivals = np.cumsum(gaps, dtype=np.int64)
    fillers = np.flatnonzero(gaps == _SKIP)
    if len(fillers):
        marks = gaps != _SKIP
        positions = (arrivals + np.cumsum(marks))[marks] - 1
    else:
        positions = arrivals + np.arange(len(gaps))
    if positions[-1] >= elements:
        raise InvalidArgument(field, f"a change of element {positions[-1]}", f"{elements} elements")
    return positions, data[_COUNT.itemsize + size :]
