"""Drawing of tokens against distributions worked out by hand or by a plain loop in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppod_services.generation.draws import Draws
from ppod_services.generation.requests import TokenFilter
from ppod_services.generation.sampling import draw
from ppod_services.generation.shaping import LogitShape
from support.sampling_reference import Rules, reference_distribution, shaped_logits

PLAIN = TokenFilter(1.0, 1.0, 0)


CPU = torch.device("cpu")


def rules_of(row: TokenFilter) -> Rules:
    return Rules(row.temperature, row.top_p, row.top_k, row.min_p, row.repetition_penalty, dict(row.logit_bias))


def draw_rows(logits: torch.Tensor, filters: list[TokenFilter], uniforms: list[float]) -> list[tuple[int, float]]:
    drawn = draw(logits.clone(), filters, torch.tensor(uniforms, dtype=torch.float64))
    return list(zip(drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True))


def test_inverse_cdf_on_a_distribution_worked_by_hand() -> None:
    logits = torch.tensor([[math.log(0.1), math.log(0.6), math.log(0.3)]])
    expected = {0.0: 0, 0.099: 0, 0.101: 1, 0.699: 1, 0.701: 2, 0.9999999: 2}
    for uniform, token in expected.items():
        [(drawn, logprob)] = draw_rows(logits, [PLAIN], [uniform])
        assert drawn == token
        assert logprob == pytest.approx(math.log([0.1, 0.6, 0.3][token]), abs=1e-6)


def test_temperature_sharpens() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    # At temperature 0.5 the odds 1:3 become 1:9.
    [(token, logprob)] = draw_rows(logits, [TokenFilter(0.5, 1.0, 0)], [0.11])
    assert (token, logprob) == (1, pytest.approx(math.log(0.9), abs=1e-6))


def test_greedy_reports_the_untempered_logprob() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    [(token, logprob)] = draw_rows(logits, [TokenFilter(0.0, 0.1, 1)], [0.0])
    assert (token, logprob) == (1, pytest.approx(math.log(0.75), abs=1e-6))


def test_top_k_and_top_p_by_hand() -> None:
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    # Top-3 leaves 4:3:2 of 9; top-p 0.5 needs 4/9 + 3/9, so 4:3 of 7 is left.
    row = TokenFilter(1.0, 0.5, 3)
    assert draw_rows(logits, [row], [0.57]) == [(0, pytest.approx(math.log(4 / 7), abs=1e-6))]
    assert draw_rows(logits, [row], [0.58]) == [(2, pytest.approx(math.log(3 / 7), abs=1e-6))]
    assert draw_rows(logits, [row], [0.9999999])[0][0] == 2


def test_min_p_by_hand() -> None:
    """0.4, 0.1, 0.3, 0.2: a quarter of the likeliest keeps 0.1 too, just above it does not."""
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    all_four = TokenFilter(1.0, min_p=0.2499)
    assert draw_rows(logits, [all_four], [0.9999999]) == [(1, pytest.approx(math.log(0.1), abs=1e-6))]
    three = TokenFilter(1.0, min_p=0.2501)
    assert draw_rows(logits, [three], [0.9999999]) == [(3, pytest.approx(math.log(0.2 / 0.9), abs=1e-6))]
    # Top-p is of what min-p left: 4/9 + 3/9 reach 0.77.
    two = TokenFilter(1.0, 0.77, min_p=0.2501)
    assert draw_rows(logits, [two], [0.9999999]) == [(2, pytest.approx(math.log(3 / 7), abs=1e-6))]


def test_min_p_after_temperature() -> None:
    """Odds of 1:9 at temperature 0.5 are 1:3 at 1: a fifth of the likeliest is kept only there."""
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert draw_rows(logits, [TokenFilter(1.0, min_p=0.2)], [0.99])[0][0] == 0
    assert draw_rows(logits, [TokenFilter(0.5, min_p=0.2)], [0.99]) == [(1, pytest.approx(0.0, abs=1e-9))]


def test_penalty_and_bias_by_hand() -> None:
    """Token 1 stands in the prompt, token 3 comes with the completion; 2 is biased, and penalised after that."""
    row = TokenFilter(1.0, repetition_penalty=2.0, logit_bias=((2, 0.5), (4, -math.inf)))
    shape = LogitShape(row, np.asarray([1, 2, 1], dtype=np.int32), 8, CPU)
    logits = torch.tensor([1.0, 3.0, -1.0, 4.0, 0.0])
    shape.apply(logits)
    assert logits.tolist() == [1.0, 1.5, -1.0, 4.0, -math.inf]
    shape.add(3)
    shape.add(3)
    logits = torch.tensor([1.0, 3.0, -1.0, 4.0, 0.0])
    shape.apply(logits)
    assert logits.tolist() == [1.0, 1.5, -1.0, 2.0, -math.inf]
    assert LogitShape.of(PLAIN, np.asarray([1], dtype=np.int32), 8, CPU) is None


def test_penalty_and_bias_as_the_plain_loop_does_them() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        bias = tuple((int(token), float(rng.normal())) for token in rng.choice(300, size=5, replace=False))
        row = TokenFilter(1.0, repetition_penalty=float(rng.uniform(0.5, 2.0)), logit_bias=bias)
        prompt = rng.integers(0, 300, size=20).astype(np.int32)
        shape = LogitShape(row, prompt, 30, CPU)
        held: list[int] = prompt.tolist()
        for token in rng.integers(0, 300, size=30).tolist():
            logits = torch.from_numpy(rng.normal(size=300).astype(np.float32))
            expected = shaped_logits(logits.numpy(), rules_of(row), held)
            shape.apply(logits)
            np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)
            shape.add(token)
            held.append(token)


def test_numbers_go_on_where_an_interruption_left_them() -> None:
    whole = Draws(2**64 - 1)
    numbers = [whole.next() for _ in range(100)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 100
    for skipped in (1, 31, 32, 33, 99):
        rest = Draws(2**64 - 1, skipped)
        assert [rest.next() for _ in range(100 - skipped)] == numbers[skipped:]
    assert len({Draws(seed).next() for seed in (0, 1, 2**32, 2**63)}) == 4


def test_top_p_always_keeps_the_likeliest_token() -> None:
    logits = torch.tensor([[0.4, 0.35, 0.25]]).log()
    assert draw_rows(logits, [TokenFilter(1.0, 1e-6, 0)], [0.99]) == [(0, pytest.approx(0.0, abs=1e-9))]


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        TokenFilter(0.7, 1.0, 0),
        TokenFilter(1.3, 0.9, 0),
        TokenFilter(1.0, 0.999, 0),
        TokenFilter(1.0, 1.0, 5),
        TokenFilter(0.8, 0.6, 400),
        TokenFilter(1.0, min_p=0.05),
        TokenFilter(1.4, 0.95, min_p=0.002),
        TokenFilter(1.2, 0.8, 700, min_p=0.01),
        TokenFilter(1.0, 0.7, 5, min_p=0.5),
        TokenFilter(1.0, min_p=1.0),
    ],
)
def test_every_draw_has_its_own_probability_and_the_frequencies_follow(row: TokenFilter) -> None:
    """Vocabulary 3,001: no multiple of a block, and near-flat, so that top-p must look beyond its first candidates."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3001, generator=generator)
    expected = reference_distribution(logits.numpy(), rules_of(row))
    count = 2000
    uniforms = [(index + 0.5) / count for index in range(count)]
    drawn: list[tuple[int, float]] = []
    for start in range(0, count, 500):
        part = uniforms[start : start + 500]
        drawn += draw_rows(logits.expand(len(part), -1), [row] * len(part), part)
    for token, logprob in drawn:
        assert logprob == pytest.approx(math.log(expected[token]), abs=1e-4)
    # Evenly spaced uniforms hit each token's share of the interval to within one draw.
    frequencies = np.bincount([token for token, _ in drawn], minlength=3001)
    assert np.abs(frequencies - count * expected).max() <= 1.0 + 1e-3


def test_rows_do_not_touch_each_other() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 700, generator=generator)
    filters = [
        PLAIN,
        TokenFilter(0.0, 1, 0),
        TokenFilter(0.5, 0.5, 0),
        TokenFilter(2.0, 1.0, 7),
        TokenFilter(1, 0.9, 3),
    ]
    uniforms = [0.1, 0.2, 0.3, 0.4, 0.5]
    together = draw_rows(logits, filters, uniforms)
    alone = [draw_rows(logits[i : i + 1], filters[i : i + 1], uniforms[i : i + 1])[0] for i in range(5)]
    assert [token for token, _ in together] == [token for token, _ in alone]
    assert [value for _, value in together] == pytest.approx([value for _, value in alone], abs=1e-6)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 600), -math.inf)
    logits[0, [3, 299, 512]] = 0.0
    largest = math.nextafter(1.0, 0.0)
    assert [draw_rows(logits, [PLAIN], [uniform])[0][0] for uniform in (0.0, 0.5, largest)] == [3, 299, 512]


@pytest.mark.parametrize(
    "row", [PLAIN, TokenFilter(1.0, 0.9, 0), TokenFilter(0.0, 1.0, 0), TokenFilter(1.0, min_p=0.1)]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_show_in_their_row_alone(row: TokenFilter, bad: float) -> None:
    logits = torch.zeros(2, 300)
    logits[0, 17] = bad
    (_, broken), (_, whole) = draw_rows(logits, [row, row], [0.5, 0.5])
    assert not math.isfinite(broken)
    assert math.isfinite(whole)


def test_equal_logits_are_kept_in_the_order_of_their_ids() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0]])
    largest = math.nextafter(1.0, 0.0)
    four = TokenFilter(1.0, top_k=4)
    weights = [math.e**2, math.e**2, math.e, math.e]
    ends = np.cumsum(weights) / sum(weights)
    uniforms = [0.0, *(end + 1e-6 for end in ends[:3]), largest]
    assert [draw_rows(logits, [four], [uniform])[0][0] for uniform in uniforms] == [1, 3, 2, 4, 4]
    assert [draw_rows(torch.zeros(1, 600), [TokenFilter(1.0, top_k=2)], [u])[0][0] for u in (0.0, largest)] == [0, 1]


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        (TokenFilter(1.0, top_p=0.3), TokenFilter(1.0, top_p=0.95)),
        (TokenFilter(1.0, top_k=50), TokenFilter(1.0, top_k=2000)),
        (TokenFilter(1.0, min_p=0.001), TokenFilter(1.0, top_k=300)),
        (TokenFilter(1.0, top_k=30_000), TokenFilter(1.0, min_p=0.1)),
    ],
)
def test_equal_logits_are_drawn_alike_whoever_shares_the_batch(mine: TokenFilter, other: TokenFilter) -> None:
    """A model in bfloat16 has many, and others may need more candidates."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, 20_000, generator=generator) * 2.5).bfloat16().float()
    flat = torch.randn(1, 20_000, generator=generator).bfloat16().float()
    uniforms = np.linspace(0, 0.999, 60).tolist()
    alone = [draw_rows(logits, [mine], [uniform])[0] for uniform in uniforms]
    beside = [draw_rows(torch.cat([flat, logits]), [other, mine], [uniform] * 2)[1] for uniform in uniforms]
    assert beside == alone


@pytest.mark.parametrize("bad", [math.nan, 1.0])
def test_a_row_that_is_not_finite_leaves_the_others_all_their_candidates(bad: float) -> None:
    """Flat, so that its nucleus has thousands of tokens."""
    flat = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)) * 0.01
    neighbour = torch.full((1, 4096), bad)
    nucleus = TokenFilter(1.0, top_p=0.95)
    for uniform in (0.1, 0.9):
        alone = draw_rows(flat, [nucleus], [uniform])
        assert draw_rows(torch.cat([flat, neighbour]), [nucleus, nucleus], [uniform, uniform])[:1] == alone


def test_the_smallest_temperature_is_greedy() -> None:
    logits = torch.tensor([[5.0, 90.0, 89.0, -3.0]])
    for cut in (TokenFilter(1e-38), TokenFilter(1e-38, top_p=0.9), TokenFilter(1e-38, top_k=3)):
        assert draw_rows(logits, [cut], [0.999]) == [(1, 0.0)]
