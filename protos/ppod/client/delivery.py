"""How requests are delivered: retries, hedging and splitting, as values that a caller chooses."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from ppod.channel import MAX_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter: each wait is uniform between 0 and a cap that doubles.

    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. Only UNAVAILABLE and RESOURCE_EXHAUSTED are repeated,
    with the same request id; a wait that the server asked for is waited out first.

    Attributes:
        max_attempts: rounds of attempts, the first included; 1: never repeat. A round asks another replica at once
            where one is to be had, so that a dead replica costs no wait.
        initial_backoff_s: cap of the first wait.
        multiplier: growth of the cap from wait to wait.
        max_backoff_s: highest cap.
    """

    max_attempts: int = 5
    initial_backoff_s: float = 0.1
    multiplier: float = 2.0
    max_backoff_s: float = 5.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; it must be at least 1")
        if self.initial_backoff_s < 0 or self.max_backoff_s < 0 or self.multiplier < 1:
            raise ValueError("backoffs must not be negative, and multiplier must be at least 1")

    def backoff_s(self, failures: int, rng: random.Random) -> float:
        """Seconds to wait after so many failed rounds (from 1)."""
        try:
            cap = min(self.max_backoff_s, self.initial_backoff_s * self.multiplier ** (failures - 1))
        except OverflowError:  # after a thousand rounds, for those who repeat until their deadline
            cap = self.max_backoff_s if self.initial_backoff_s else 0.0
        return rng.uniform(0.0, cap)


NO_RETRY = RetryPolicy(max_attempts=1)
"""Raise the first error."""


@dataclass(frozen=True, slots=True)
class HedgePolicy:
    """Send a request a second time, to another replica, when the answer is late; the first answer wins.

    Dean and Barroso, "The Tail at Scale", CACM 2013. Only for scoring, which may be repeated freely.

    Attributes:
        delay_s: how late; None: the 95th percentile of recent latencies of requests of about this size, and no
            hedging until 20 of them are known.
        max_extra_fraction: most hedges for each request sent; 0.05 adds at most 5% of load.
    """

    delay_s: float | None = None
    max_extra_fraction: float = 0.05

    def __post_init__(self) -> None:
        if self.delay_s is not None and self.delay_s < 0:
            raise ValueError(f"delay_s is {self.delay_s}; it must not be negative")
        if not 0 < self.max_extra_fraction <= 1:
            raise ValueError(f"max_extra_fraction is {self.max_extra_fraction}; it must be above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class SplitPolicy:
    """How a request of many sequences is cut into parts, and the parts given to replicas.

    With one replica a request is cut only where it exceeds the server's limits.

    Attributes:
        min_part_tokens: smaller requests are not cut to spread them over replicas.
        max_part_tokens: most tokens of a part when there are several replicas.
        max_part_bytes: most bytes of a part's request, and of its reply; below the largest message of a channel.
        parts_in_flight: parts of one request that a replica holds at a time: 2 keep it busy while a reply travels.
        straggler_factor: once no part waits, one that takes this many times what its size predicts is sent again, to
            an idle replica.
    """

    min_part_tokens: int = 1_024
    max_part_tokens: int = 16_384
    max_part_bytes: int = MAX_MESSAGE_BYTES - 1_048_576
    parts_in_flight: int = 2
    straggler_factor: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_part_tokens <= self.max_part_tokens:
            raise ValueError("min_part_tokens must be at least 1 and at most max_part_tokens")
        if not 1 <= self.max_part_bytes < MAX_MESSAGE_BYTES:
            raise ValueError(f"max_part_bytes must be at least 1 and below {MAX_MESSAGE_BYTES}")
        if self.parts_in_flight < 1 or self.straggler_factor <= 1:
            raise ValueError("parts_in_flight must be at least 1, straggler_factor above 1")


@dataclass(frozen=True, slots=True)
class Delivery:
    """How a client delivers its requests; `hedge` None: never a second time while the first is under way."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    hedge: HedgePolicy | None = None
    split: SplitPolicy = field(default_factory=SplitPolicy)
