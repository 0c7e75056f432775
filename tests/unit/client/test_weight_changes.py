"""Changes of tensors: exact to the bit, the smallest encoding, and no damage by bytes that are none."""

from __future__ import annotations

import numpy as np
import pytest

from ppod import InvalidArgument
from ppod.weight_changes import Bits, TensorEncoding, apply_changes, encode_changes


def with_changes(base: Bits, positions: list[int]) -> Bits:
    new = base.copy()
    new[positions] ^= 1
    return new


def tensor(elements: int, dtype: type[np.uint16 | np.uint32] = np.uint16) -> Bits:
    return np.random.default_rng(elements).integers(0, 2**16, elements).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("elements", [1, 7, 8, 9, 4099])
def test_what_is_applied_is_what_was_encoded(elements: int, share: float, dtype: type[np.uint16 | np.uint32]) -> None:
    rng = np.random.default_rng(7)
    base = tensor(elements, dtype)
    new = np.where(rng.random(elements) < share, ~base, base)
    encoding, data = encode_changes(new, base)
    assert len(data) <= new.nbytes
    if encoding is TensorEncoding.DENSE:
        assert data.tobytes() == new.tobytes()
        return
    target = base.copy()
    apply_changes(encoding, data, target, "x")
    assert target.tobytes() == new.tobytes()


def test_the_bytes_are_those_of_the_contract() -> None:
    """Worked out by hand from weights.proto."""
    base = np.zeros(16, np.uint16)
    assert encode_changes(with_changes(base, [0, 9]), base)[1].tobytes() == bytes([0b1, 0b10, 1, 0, 1, 0])
    long = np.zeros(4000, np.uint16)
    encoding, data = encode_changes(with_changes(long, [3, 259, 1000]), long)
    assert encoding is TensorEncoding.GAPS
    # 3 skipped; 255 skipped by the filler and none more; then 740 = 2 * 255 + 230.
    assert data.tobytes() == bytes([6, 0, 0, 0, 3, 255, 0, 255, 255, 230, 1, 0, 1, 0, 1, 0])


@pytest.mark.parametrize(("changes", "encoding"), [(0, "BITMAP"), (9, "GAPS"), (3000, "BITMAP"), (39000, "DENSE")])
def test_the_smallest_encoding_is_chosen(changes: int, encoding: str) -> None:
    base = tensor(40_000)
    chosen, data = encode_changes(with_changes(base, list(range(0, changes))), base)
    if changes == 3000:
        # Side by side the changes' gaps are as long as a byte each: shorter than the bitmap of 5,000 bytes.
        assert chosen is TensorEncoding.GAPS
        assert len(data) == 4 + 3000 + 6000
        chosen, data = encode_changes(with_changes(base, list(range(0, 40_000, 7))), base)
        assert len(data) == 5000 + 2 * 5715
    assert chosen.name == encoding


def test_bit_patterns_are_compared_not_values() -> None:
    zeros = np.array([0.0, 1.0] * 20, np.float32).view(np.uint32)
    negative = np.array([-0.0, 1.0] + [0.0, 1.0] * 19, np.float32).view(np.uint32)
    encoding, data = encode_changes(negative, zeros)
    apply_changes(encoding, data, zeros, "x")
    assert zeros.tobytes() == negative.tobytes()


@pytest.mark.parametrize(
    ("encoding", "data", "words"),
    [
        (TensorEncoding.BITMAP, [1], "a bitmap of 2 bytes"),
        (TensorEncoding.BITMAP, [1, 0], "0 bytes of new elements"),
        (TensorEncoding.BITMAP, [1, 0, 5, 5, 5], "those of 1 changes"),
        (TensorEncoding.BITMAP, [0, 128, 5, 5], "behind the last element"),
        (TensorEncoding.GAPS, [1, 0], "of gaps"),
        (TensorEncoding.GAPS, [255, 255, 255, 255, 0, 0], "of gaps"),
        (TensorEncoding.GAPS, [1, 0, 0, 0, 255, 9, 9], "end with a change"),
        (TensorEncoding.GAPS, [0, 0, 0, 0], "end with a change"),
        (TensorEncoding.GAPS, [1, 0, 0, 0, 12, 9, 9], "a change of element 12"),
        (TensorEncoding.GAPS, [1, 0, 0, 0, 11], "0 bytes of new elements"),
        (TensorEncoding.DENSE, [1], "dense"),
    ],
)
def test_bytes_that_are_no_changes_are_refused(encoding: TensorEncoding, data: list[int], words: str) -> None:
    target = tensor(12)
    kept = target.copy()
    with pytest.raises(InvalidArgument, match=words):
        apply_changes(encoding, np.array(data, np.uint8), target, "tensors.a")
    assert target.tobytes() == kept.tobytes()
