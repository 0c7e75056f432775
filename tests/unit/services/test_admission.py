"""Who enters the queue, who is refused, and how long the refused are told to wait."""

from __future__ import annotations

import pytest

from ppod.errors import InvalidArgument, ResourceExhausted
from ppod_services.core.admission import Admission, Refusal, Request
from ppod_services.core.batching import BatchBounds
from ppod_services.core.callers import ANONYMOUS, Caller, Priority, Team
from ppod_services.core.company import Company
from ppod_services.core.config import BatchingConfig
from ppod_services.core.fair_queue import FairQueue
from ppod_services.core.quotas import Quotas
from ppod_services.core.rate import ComputeRate
from ppod_services.core.tickets import Submission

LONG_S = 1e9
A, B = Team("a", part=0.5), Team("b", part=0.5)


class Desk:
    """Admission in front of a real queue, at 100 tokens a second unless told otherwise."""

    def __init__(self, *, queue_tokens: int = 1000, queue_sequences: int = 1000, rate: float = 100.0) -> None:
        config = BatchingConfig(
            max_batch_tokens=100, max_queue_tokens=queue_tokens, max_queue_sequences=queue_sequences
        )
        self.queue: FairQueue[Submission[None]] = FairQueue(catch_up_tokens=0)
        self.rate = ComputeRate()
        if rate:
            self.rate.finished(int(rate), 1.0, saturated=True)
        self.refused: list[tuple[str, Refusal]] = []
        self.admission = Admission(
            config, self.queue, self.rate, Quotas(), lambda team, reason: self.refused.append((team, reason))
        )

    def ask(
        self,
        team: Team,
        tokens: int,
        *,
        now_s: float = 0.0,
        sequences: int = 1,
        deadline_s: float = LONG_S,
        priority: Priority = Priority.NORMAL,
    ) -> object:
        """Ask, and enter the queue when admitted."""
        caller = Caller(team, priority)
        self.admission.admit(Request(tokens, sequences, deadline_s, caller), now_s)
        key = object()
        each = [tokens // sequences] * (sequences - 1)
        self.queue.add(key, caller, [Submission(None, length) for length in [*each, tokens - sum(each)]], now_s)
        return key

    def serve(self, tokens: int) -> None:
        """Take this many tokens out, in sequences of 10."""
        for _ in range(tokens // 10):
            self.queue.take(BatchBounds(10, 1, 0))


def wait_of(desk: Desk, team: Team, tokens: int, **others: float) -> float:
    with pytest.raises(ResourceExhausted) as caught:
        desk.ask(team, tokens, **others)  # pyright: ignore[reportArgumentType]
    return caught.value.retry_after_s


def test_a_quota_is_a_bucket_and_the_wait_is_exact() -> None:
    desk = Desk()
    team = Team("a", tokens_per_s=10.0, burst_s=6.0)
    desk.ask(team, 60)
    # Empty at 0 s; 25 tokens are there after 2.5 s.
    assert wait_of(desk, team, 25) == pytest.approx(2.5)
    assert wait_of(desk, team, 25, now_s=1.0) == pytest.approx(1.5)
    desk.ask(team, 25, now_s=2.5)
    assert wait_of(desk, team, 1, now_s=2.5) == pytest.approx(0.1)
    # It never holds more than 60.
    assert wait_of(desk, team, 60, now_s=8.0) == pytest.approx(0.5)
    assert desk.refused == [("a", Refusal.QUOTA)] * 4


def test_a_refused_request_spends_no_quota() -> None:
    desk = Desk(queue_tokens=200)
    team = Team("a", tokens_per_s=1.0, burst_s=250.0)
    desk.ask(team, 150)
    for _ in range(3):
        wait_of(desk, team, 51)
    # The queue refused them; had they spent of the 100 tokens that were left of the quota, 50 would be too many now.
    assert desk.refused == [("a", Refusal.QUEUE)] * 3
    desk.ask(team, 50)
    assert desk.queue.tokens == 200


def test_a_reload_keeps_what_was_spent() -> None:
    desk = Desk()
    desk.ask(Team("a", tokens_per_s=10.0, burst_s=10.0), 100)
    # Twice the rate from now on: 40 tokens take 2 s.
    assert wait_of(desk, Team("a", tokens_per_s=20.0, burst_s=10.0), 40) == pytest.approx(2.0)


def test_what_never_fits_is_the_callers_fault() -> None:
    desk = Desk(queue_tokens=1000, queue_sequences=40)
    with pytest.raises(InvalidArgument, match="at most 60"):
        desk.ask(Team("q", tokens_per_s=10.0, burst_s=6.0), 61)
    with pytest.raises(InvalidArgument, match="at most 5"):
        desk.ask(Team("f", max_tokens_in_flight=5), 6)
    # Half of the queue is shared, and half of the other half is a's own.
    with pytest.raises(InvalidArgument, match="at most 750"):
        desk.ask(A, 751)
    with pytest.raises(InvalidArgument, match="at most 30"):
        desk.ask(A, 31, sequences=31)
    assert not desk.refused


def test_tokens_in_flight_are_capped_until_requests_end() -> None:
    desk = Desk()
    team = Team("a", max_tokens_in_flight=50)
    desk.ask(team, 30)
    desk.serve(30)
    # Running still, so in flight; 10 tokens too many take 0.1 s.
    assert wait_of(desk, team, 30) == pytest.approx(0.1)
    desk.admission.leave(team, 30)
    desk.ask(team, 50)
    assert desk.refused == [("a", Refusal.IN_FLIGHT)]


@pytest.mark.parametrize(
    ("tokens_per_s", "wait_s", "reason"), [(10.0, 2.5, Refusal.QUOTA), (1000.0, 0.25, Refusal.IN_FLIGHT)]
)
def test_of_several_reasons_the_one_that_lasts_is_told(tokens_per_s: float, wait_s: float, reason: Refusal) -> None:
    desk = Desk()
    team = Team("a", tokens_per_s=tokens_per_s, burst_s=60 / tokens_per_s, max_tokens_in_flight=60)
    desk.ask(team, 60)
    desk.serve(60)
    assert wait_of(desk, team, 25) == pytest.approx(wait_s)
    assert desk.refused == [("a", reason)]


def test_a_flood_leaves_the_others_part_of_the_queue_free() -> None:
    desk = Desk(queue_tokens=1000)
    for _ in range(75):
        desk.ask(A, 10)
    # 250 of its own and the 500 that are shared; one more would have to wait for 10 tokens at 100 a second.
    assert wait_of(desk, A, 10) == pytest.approx(0.1)
    for _ in range(25):
        desk.ask(B, 10)
    assert desk.queue.tokens == 1000
    # Both wait now, so each has half of the 100 tokens a second.
    assert wait_of(desk, B, 10) == pytest.approx(0.2)
    assert desk.refused == [("a", Refusal.QUEUE), ("b", Refusal.QUEUE)]


def test_sequences_are_bounded_too() -> None:
    desk = Desk(queue_tokens=1000, queue_sequences=40)
    desk.ask(A, 30, sequences=30)
    # One sequence of the mean length, 1 token, must leave.
    assert wait_of(desk, A, 1) == pytest.approx(0.01)
    desk.ask(B, 10, sequences=10)


def test_a_lone_team_may_fill_the_whole_queue() -> None:
    desk = Desk(queue_tokens=100)
    desk.ask(ANONYMOUS, 60)
    desk.ask(ANONYMOUS, 40)
    assert desk.queue.tokens == 100
    # One token of 100 a second must leave.
    assert wait_of(desk, ANONYMOUS, 1) == pytest.approx(0.01)


def test_what_would_end_too_late_is_refused_with_the_time_that_the_backlog_needs() -> None:
    desk = Desk()
    desk.ask(A, 300)
    # 400 tokens take 4 s, 4.8 s with the margin of a fifth.
    desk.ask(A, 100, deadline_s=4.9)
    # 500 take 6 s with the margin; the deadline of 3 s allows 2.5 s: 2.5 s of work must go first.
    assert wait_of(desk, A, 100, deadline_s=3.0) == pytest.approx(2.5)
    desk.serve(10)
    assert desk.refused == [("a", Refusal.DEADLINE)]


def test_estimates_are_stretched_the_more_the_oftener_they_were_too_bright() -> None:
    desk = Desk()
    desk.ask(A, 100)

    def enters(deadline_s: float) -> bool:
        try:
            desk.admission.admit(Request(10, 1, deadline_s, Caller(A, Priority.NORMAL)), 0.0)
        except ResourceExhausted:
            return False
        return True

    def margin_is(margin: float) -> bool:
        # 110 tokens take 1.1 s.
        return enters(1.1 * margin + 0.001) and not enters(1.1 * margin - 0.001)

    assert margin_is(1.2)
    desk.admission.missed()
    assert margin_is(1.2 * 1.1)
    for _ in range(100):
        desk.admission.missed()
    assert margin_is(4.0)
    desk.admission.kept()
    assert margin_is(4.0 * 0.99)
    for _ in range(200):
        desk.admission.kept()
    assert margin_is(1.2)


def test_the_wait_told_is_long_enough() -> None:
    desk = Desk()
    for _ in range(50):
        desk.ask(A, 10)
    wait_s = wait_of(desk, A, 10, deadline_s=3.0)
    desk.serve(int(100 * wait_s) // 10 * 10 + 10)
    waiting = desk.queue.tokens
    desk.ask(A, 10, deadline_s=3.0)
    assert desk.queue.tokens == waiting + 10
    assert desk.refused == [("a", Refusal.DEADLINE)]


def test_a_team_is_judged_by_its_own_backlog_and_share() -> None:
    desk = Desk()
    for _ in range(60):
        desk.ask(A, 10)
    # Alone at its half of the rate, 100 tokens take 2 s, 2.4 s with the margin, whatever a has waiting.
    desk.ask(B, 100, deadline_s=2.5)
    assert wait_of(desk, B, 100, deadline_s=2.5) > 0


def test_high_priority_is_not_refused_for_what_waits_below_it() -> None:
    desk = Desk()
    for _ in range(40):
        desk.ask(ANONYMOUS, 10, priority=Priority.LOW)
    assert wait_of(desk, ANONYMOUS, 10, deadline_s=1.0, priority=Priority.LOW) > 1.0
    desk.ask(ANONYMOUS, 10, deadline_s=1.0, priority=Priority.HIGH)
    assert desk.queue.tokens == 410


def test_an_empty_queue_refuses_nobody_for_a_deadline() -> None:
    """No wait would help, and the estimate may be wrong: the deadline itself decides."""
    desk = Desk()
    desk.ask(A, 500, deadline_s=0.01)
    assert desk.queue.tokens == 500
    assert not desk.refused


def test_an_unknown_rate_refuses_nobody_for_a_deadline() -> None:
    desk = Desk(rate=0.0)
    desk.ask(A, 500)
    desk.ask(A, 100, deadline_s=0.01)
    assert desk.queue.tokens == 600
    assert not desk.refused


def test_the_rate_is_that_of_saturated_batches() -> None:
    rate = ComputeRate()
    rate.finished(10, 1.0, saturated=False)
    assert rate.tokens_per_s == 10
    rate.finished(1000, 1.0, saturated=True)
    # Small batches are slow by the token; that says nothing about full ones.
    rate.finished(10, 1.0, saturated=False)
    assert rate.tokens_per_s == 1000
    rate.finished(550, 1.0, saturated=True)
    assert rate.tokens_per_s == pytest.approx((0.9 * 1000 + 550) / 1.9)


def test_the_running_batch_counts_down() -> None:
    rate = ComputeRate()
    rate.finished(100, 1.0, saturated=True)
    rate.started(200, now_s=10.0)
    assert rate.running_s(10.5) == pytest.approx(1.5)
    assert rate.running_s(13.0) == 0
    rate.finished(200, 2.0, saturated=True)
    assert rate.running_s(12.0) == 0


def test_company_is_expected_where_requests_overlap() -> None:
    company = Company()
    for turn in range(10):
        company.arrived(1, turn * 0.1)
        assert company.expected(turn * 0.1) == 1
    company.arrived(3, 1.05)
    assert company.expected(1.1) == 3
    assert company.expected(1.9) == 3
    assert company.expected(2.1) == 1
