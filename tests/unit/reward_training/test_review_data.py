from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppod_trainer.reward_training.data import (
    PACKAGED_RATINGS,
    Review,
    ReviewDataError,
    hash_to_unit,
    preference_pairs,
    read_reviews,
    split_reviews,
    split_validation,
    text_key,
)

HEADER = "id\tmean_rating\tstddev\ttext\n"


def write(tmp_path: Path, body: str, header: str = HEADER) -> Path:
    path = tmp_path / "ratings.tsv"
    path.write_text(header + body, encoding="utf-8")
    return path


def test_reads_rows(tmp_path) -> None:
    path = write(tmp_path, '7\t-1.5\t0.5\tquite "dull"\n8\t2\t0\tgood\n')
    assert read_reviews(path) == (Review("7", -1.5, 0.5, 'quite "dull"'), Review("8", 2.0, 0.0, "good"))
    marked = tmp_path / "marked.tsv"
    marked.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert read_reviews(marked) == read_reviews(path)


@pytest.mark.parametrize(
    ("body", "line", "field", "problem"),
    [
        ("1\t2\tgood\n", 2, "", "expected 4 tab-separated fields, found 3"),
        ("1\t1\t1\tfine\n2\tmany\t1\tfine\n", 3, "mean_rating", "'many' is not a number"),
        ("1\tnan\t1\tfine\n", 2, "mean_rating", "'nan' is not finite"),
        ("1\t4.5\t1\tfine\n", 2, "mean_rating", "4.5 is outside -4 to 4"),
        ("1\t4\t-1\tfine\n", 2, "stddev", "-1 is negative"),
        ("1\t4\t1\t \n", 2, "text", "is empty"),
        ("\t4\t1\tfine\n", 2, "id", "is empty"),
        ("1\t4\t1\tfine\n1\t3\t1\talso\n", 3, "id", "'1' stands on an earlier line too"),
    ],
)
def test_faults_name_line_and_field(tmp_path, body, line, field, problem) -> None:
    with pytest.raises(ReviewDataError) as caught:
        read_reviews(write(tmp_path, body))
    error = caught.value
    assert (error.line, error.field, error.problem) == (line, field, problem)
    assert str(error) == f"{error.path}, line {line}" + (f", {field}" if field else "") + f": {problem}"


def test_faults_of_the_file_itself(tmp_path) -> None:
    with pytest.raises(ReviewDataError, match=r"absent\.tsv: cannot be read: No such file"):
        read_reviews(tmp_path / "absent.tsv")
    with pytest.raises(ReviewDataError, match="line 1, header: expected id mean_rating stddev text"):
        read_reviews(write(tmp_path, "", header="a\tb\n"))
    with pytest.raises(ReviewDataError, match="holds no reviews"):
        read_reviews(write(tmp_path, ""))
    (tmp_path / "latin.tsv").write_bytes(HEADER.encode() + b"1\t1\t1\tcaf\xe9\n")
    with pytest.raises(ReviewDataError, match="not UTF-8 at byte"):
        read_reviews(tmp_path / "latin.tsv")


def test_packaged_ratings() -> None:
    reviews = read_reviews(PACKAGED_RATINGS)
    assert len(reviews) == 9000
    assert reviews[1] == Review("3", -0.6, 0.8, "Effective but too tepid biopic")


def test_splits_share_neither_id_nor_text() -> None:
    reviews = read_reviews(PACKAGED_RATINGS)
    splits = split_reviews(reviews, seed=1, held_out_share=1 / 9)
    parts = (splits.half_a, splits.half_b, splits.held_out)
    ids = [{review.id for review in part} for part in parts]
    texts = [{text_key(review.text) for review in part} for part in parts]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not ids[first] & ids[second]
        assert not texts[first] & texts[second]
    assert sorted(set.union(*ids)) == sorted(review.id for review in reviews)
    assert [len(part) for part in parts] == [3966, 3967, 1067]


def test_copies_of_a_text_stay_together() -> None:
    reviews = [Review(str(i), 0.0, 0.0, f"Text {i // 4}!" if i % 2 else f"text  {i // 4}") for i in range(400)]
    splits = split_reviews(reviews, seed=5, held_out_share=0.3)
    for part in (splits.half_a, splits.half_b, splits.held_out):
        assert len(part) % 4 == 0
        assert part
    fitting, validation = split_validation(reviews, seed=5, share=0.3)
    assert sorted([*fitting, *validation]) == list(range(400))
    assert not {i // 4 for i in fitting} & {i // 4 for i in validation}


def test_a_review_keeps_its_place_when_others_leave() -> None:
    reviews = [Review(str(i), 0.0, 0.0, f"text {i}") for i in range(300)]
    everything = split_reviews(reviews, seed=2, held_out_share=0.2)
    some = split_reviews(reviews[::3], seed=2, held_out_share=0.2)
    assert set(some.held_out) == set(everything.held_out) & set(reviews[::3])
    other_seed = split_reviews(reviews, seed=3, held_out_share=0.2)
    assert set(other_seed.held_out) != set(everything.held_out)


def test_hash_is_fixed_across_machines() -> None:
    # First 8 bytes of sha256("1:42"), by hand: printf '1:42' | sha256sum
    assert hash_to_unit(1, "42") == pytest.approx(int("1d446b526abebc35", 16) / 2**64)


def test_pairs_of_four_ratings() -> None:
    pairs = preference_pairs(np.array([2.0, -1.0, 2.0, 1.5]))
    found = sorted(zip(pairs.preferred.tolist(), pairs.rejected.tolist(), pairs.gap.tolist(), strict=True))
    # 0 and 2 are rated alike and make no pair.
    assert found == [(0, 1, 3.0), (0, 3, 0.5), (2, 1, 3.0), (2, 3, 0.5), (3, 1, 2.5)]
    clear = preference_pairs(np.array([2.0, -1.0, 2.0, 1.0]), min_gap=1.0)
    # 2.0 against 1.0 differs by exactly 1, which is not more than 1.
    assert sorted(zip(clear.preferred.tolist(), clear.rejected.tolist(), strict=True)) == [(0, 1), (2, 1), (3, 1)]


def test_texts_of_any_script_are_told_apart() -> None:
    """Reviews that hold no Latin letter are no copies of one another, and are split like all others."""
    scripts = ["Отличный фильм {}", "素晴らしい映画 {}", "فيلم رائع {}", "{} :-)"]
    numerals = "零一二三四五六七八九"
    reviews = [
        Review(f"{script}-{i}", 0.0, 0.0, text.format("".join(numerals[int(digit)] for digit in str(i))))
        for script, text in enumerate(scripts)
        for i in range(100)
    ]
    assert len({text_key(review.text) for review in reviews}) == 400
    assert text_key("Отличный  фильм!") == text_key("отличный фильм")
    assert text_key(":-)") != text_key(":-(")
    splits = split_reviews(reviews, seed=5, held_out_share=0.3)
    for part in (splits.half_a, splits.half_b, splits.held_out):
        assert {review.id.split("-")[0] for review in part} == {"0", "1", "2", "3"}
