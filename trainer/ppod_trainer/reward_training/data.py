"""Rated reviews: reading, splits and preference pairs.

Shape legend: N reviews, P pairs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

COLUMNS = ("id", "mean_rating", "stddev", "text")
RATING_LIMIT = 4.0
"""Ratings run from -4 (most negative) to +4 (most positive)."""

PACKAGED_RATINGS = Path(__file__).parents[1] / "data" / "movie_review_ratings.tsv"


class ReviewDataError(Exception):
    """A file of rated reviews cannot be used; the message names the file, the line and the field."""

    def __init__(self, path: Path, line: int, field: str, problem: str) -> None:
        super().__init__(path, line, field, problem)
        self.path = path
        self.line = line
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        where = (
            f"{self.path}" + (f", line {self.line}" if self.line else "") + (f", {self.field}" if self.field else "")
        )
        return f"{where}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Review:
    """One rated snippet.

    Attributes:
        id: the row's own id, unique in the file.
        mean_rating: mean over at least 20 people, in [-4, 4].
        stddev: standard deviation of those people's ratings, >= 0.
        text: the snippet.
    """

    id: str
    mean_rating: float
    stddev: float
    text: str


@dataclass(frozen=True, slots=True)
class Splits:
    """Three sets of reviews that share neither id nor text.

    Attributes:
        half_a: trains the reward model.
        half_b: trains the judge.
        held_out: evaluates both, trains neither.
    """

    half_a: tuple[Review, ...]
    half_b: tuple[Review, ...]
    held_out: tuple[Review, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """All pairs of a list of reviews that people rated differently, the preferred review first.

    Attributes:
        preferred: int64 [P], index of the review with the higher mean rating.
        rejected: int64 [P], index of the other.
        gap: float64 [P], difference of the mean ratings, > 0.
    """

    preferred: npt.NDArray[np.int64]
    rejected: npt.NDArray[np.int64]
    gap: npt.NDArray[np.float64]


def read_reviews(path: Path) -> tuple[Review, ...]:
    """Read a tab-separated file with the header `id, mean_rating, stddev, text`.

    Raises:
        ReviewDataError: the file is missing, is not UTF-8, or a line breaks the format.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise ReviewDataError(path, 0, "", f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ReviewDataError(path, 0, "", f"not UTF-8 at byte {error.start}") from error
    if tuple(lines[0].split("\t")) != COLUMNS:
        raise ReviewDataError(path, 1, "header", f"expected {' '.join(COLUMNS)}, tab-separated, found {lines[0]!r}")
    reviews: list[Review] = []
    seen: set[str] = set()
    for number, line in enumerate(lines[1:], start=2):
        review = _parse_line(path, number, line)
        if review.id in seen:
            raise ReviewDataError(path, number, "id", f"{review.id!r} stands on an earlier line too")
        seen.add(review.id)
        reviews.append(review)
    if not reviews:
        raise ReviewDataError(path, 0, "", "holds no reviews")
    return tuple(reviews)


def check_preferences(path: Path, part: str, reviews: Sequence[Review], *, min_gap: float = 0.0) -> None:
    """Raise ReviewDataError unless some pair of these reviews has ratings that differ by more than `min_gap`."""
    ratings = [review.mean_rating for review in reviews]
    if not ratings or max(ratings) - min(ratings) <= min_gap:
        raise ReviewDataError(
            path,
            0,
            part,
            f"found {len(ratings)} reviews, expected two at least whose mean ratings, from -4 to 4, differ by more "
            f"than {min_gap:g}; add reviews, spread the ratings, or change the shares under `data`",
        )


def split_reviews(reviews: Sequence[Review], *, seed: int, held_out_share: float) -> Splits:
    """Split by a hash, so that a review's place depends on nothing but the seed and the review itself.

    Reviews whose texts are equal but for case and punctuation go together: the hash is taken over the first id of
    each such group. What is not held out is halved by the same hash.

    Args:
        reviews: with distinct ids.
        seed: another seed gives an unrelated split.
        held_out_share: expected share of held-out reviews, in (0, 1).
    """
    first_id: dict[str, str] = {}
    half_a: list[Review] = []
    half_b: list[Review] = []
    held_out: list[Review] = []
    middle = held_out_share + (1 - held_out_share) / 2
    for review in reviews:
        group = first_id.setdefault(text_key(review.text), review.id)
        place = hash_to_unit(seed, group)
        part = held_out if place < held_out_share else half_a if place < middle else half_b
        part.append(review)
    return Splits(tuple(half_a), tuple(half_b), tuple(held_out))


def split_validation(
    reviews: Sequence[Review], *, seed: int, share: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of the fitting part and of the validation part of one training half; equal texts stay together.

    Returns:
        Two int64 arrays that are disjoint and cover `range(len(reviews))`.
    """
    first_id: dict[str, str] = {}
    places = [hash_to_unit(seed, "validation:" + first_id.setdefault(text_key(r.text), r.id)) for r in reviews]
    chosen = np.array([place < share for place in places], dtype=bool)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def preference_pairs(ratings: npt.NDArray[np.float64], *, min_gap: float = 0.0) -> Pairs:
    """All pairs whose ratings [N] differ by more than `min_gap`; equal ratings state no preference."""
    gaps = ratings[:, None] - ratings[None, :]
    preferred, rejected = np.nonzero(gaps > min_gap)
    return Pairs(preferred, rejected, gaps[preferred, rejected])


def text_key(text: str) -> str:
    """The text's letters and digits, of any script, in lower case: what two copies of one snippet share.

    A text without any, such as one of emoji, is its own key.
    """
    return re.sub(r"[\W_]+", " ", text.lower()).strip() or text.strip()


def hash_to_unit(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on nothing but seed and key, on any machine."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def file_digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _parse_line(path: Path, number: int, line: str) -> Review:
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        raise ReviewDataError(path, number, "", f"expected {len(COLUMNS)} tab-separated fields, found {len(fields)}")
    identity, mean, stddev, text = fields
    if not identity:
        raise ReviewDataError(path, number, "id", "is empty")
    if not text.strip():
        raise ReviewDataError(path, number, "text", "is empty")
    mean_rating = _parse_number(path, number, "mean_rating", mean)
    if not -RATING_LIMIT <= mean_rating <= RATING_LIMIT:
        raise ReviewDataError(path, number, "mean_rating", f"{mean} is outside -4 to 4")
    spread = _parse_number(path, number, "stddev", stddev)
    if spread < 0:
        raise ReviewDataError(path, number, "stddev", f"{stddev} is negative")
    return Review(identity, mean_rating, spread, text)


def _parse_number(path: Path, number: int, field: str, value: str) -> float:
    try:
        parsed = float(value)
    except ValueError:
        raise ReviewDataError(path, number, field, f"{value!r} is not a number") from None
    if not np.isfinite(parsed):
        raise ReviewDataError(path, number, field, f"{value!r} is not finite")
    return parsed
