"""The Prometheus metrics of one service process, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""To the longest deadline of a call that brings none: percentiles are told no further than the last bound."""
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (64, 256, 1024, 4096, 16_384, 65_536, 262_144)


_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """One finished batch: tokens, padding besides, its share of the largest that there may be, seconds of compute."""

    sequences: int
    tokens: int
    padding_tokens: int
    fill: float
    seconds: float


class ServiceMetrics:
    """Counts calls, the queue, batches, teams and the weight version. Base units: seconds and tokens.

    A team label holds a name of the teams file, or "anonymous", never what a caller chose.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rpc_seconds = Histogram(
            "ppod_rpc_seconds", "Seconds of each call", ["method"], buckets=_SECONDS, registry=self.registry
        )
        self._rpcs = Counter("ppod_rpc", "Calls by status code", ["method", "code"], registry=self.registry)
        self._queue_sequences = Gauge("ppod_queue_sequences", "Sequences that wait", registry=self.registry)
        self._queue_tokens = Gauge("ppod_queue_tokens", "Tokens that wait", registry=self.registry)
        self._queue_capacity = Gauge(
            "ppod_queue_capacity_tokens", "Most tokens that may wait, max_queue_tokens", registry=self.registry
        )
        self._batch_sequences = Histogram(
            "ppod_batch_sequences", "Sequences of each batch", buckets=_SIZES, registry=self.registry
        )
        self._batch_tokens = Histogram(
            "ppod_batch_tokens", "Tokens of each batch, padding left out", buckets=_TOKENS, registry=self.registry
        )
        self._batch_fill = Histogram(
            "ppod_batch_fill_ratio",
            "Padded tokens of each batch over max_batch_tokens",
            buckets=_RATIOS,
            registry=self.registry,
        )
        self._padding_tokens = Counter("ppod_padding_tokens", "Padding tokens computed", registry=self.registry)
        self._compute_seconds = Histogram(
            "ppod_compute_seconds", "Seconds of model execution of each batch", buckets=_SECONDS, registry=self.registry
        )
        self._dropped = Counter(
            "ppod_dropped_sequences", "Sequences dropped before they cost compute", ["reason"], registry=self.registry
        )
        self._add_team_metrics()
        self._weight_version = Gauge("ppod_weight_version", "Version of the serving weights", registry=self.registry)
        self._file_refused = Gauge(
            "ppod_file_refused",
            "1 while a teams file or certificate is missing or refused as it is now, and what it was before is in use",
            ["file"],
            registry=self.registry,
        )
        self._ready = Gauge("ppod_ready", "1 while the model is loaded and calls are taken", registry=self.registry)

    def _add_team_metrics(self) -> None:
        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self._team_rpcs = counter("ppod_team_rpc", "Calls by team and status code", ["team", "code"])
        self._accepted = counter(
            "ppod_team_accepted_tokens", "Tokens that entered the queue, with room for completions", ["team"]
        )
        self._served = counter("ppod_team_served_tokens", "Tokens that the model processed", ["team"])
        self._refused = counter("ppod_team_refused", "Requests refused by quota or overload", ["team", "reason"])
        self._team_queue = Gauge("ppod_team_queue_tokens", "Tokens that wait", ["team"], registry=self.registry)
        self._team_quota = Gauge(
            "ppod_team_quota_tokens_per_second",
            "Tokens a second that a team may send to this replica; absent where it has no quota",
            ["team"],
            registry=self.registry,
        )
        self._queue_seconds = Histogram(
            "ppod_team_queue_seconds",
            "Seconds from the arrival of each request to the start of its first batch",
            ["team"],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def rpc(self, method: str, team: str, code: str, seconds: float) -> None:
        """Record a finished call; `team` is empty where nobody was authenticated."""
        self._rpc_seconds.labels(method).observe(seconds)
        self._rpcs.labels(method, code).inc()
        self._team_rpcs.labels(team, code).inc()

    def accepted(self, team: str, tokens: int) -> None:
        """Record that a request entered the queue."""
        self._accepted.labels(team).inc(tokens)

    def served(self, team: str, tokens: int) -> None:
        """Record a team's part of a finished batch."""
        self._served.labels(team).inc(tokens)

    def refused(self, team: str, reason: str) -> None:
        """Record a refusal, for a reason of `admission.Refusal`."""
        self._refused.labels(team, reason).inc()

    def waited(self, team: str, seconds: float) -> None:
        """Record how long a request waited for its first batch."""
        self._queue_seconds.labels(team).observe(seconds)

    def team_queue(self, team: str, tokens: int) -> None:
        """Record what waits of a team now."""
        self._team_queue.labels(team).set(tokens)

    def queue(self, sequences: int, tokens: int) -> None:
        """Record what waits now."""
        self._queue_sequences.set(sequences)
        self._queue_tokens.set(tokens)

    def queue_capacity(self, tokens: int) -> None:
        """Record how much may wait."""
        self._queue_capacity.set(tokens)

    def team_quotas(self, quotas: Mapping[str, float]) -> None:
        """Record the quotas of a teams file, tokens a second, in place of those of the file before it."""
        self._team_quota.clear()
        for team, tokens_per_s in quotas.items():
            self._team_quota.labels(team).set(tokens_per_s)

    def batch(self, batch: BatchFigures) -> None:
        """Record a finished batch."""
        self._batch_sequences.observe(batch.sequences)
        self._batch_tokens.observe(batch.tokens)
        self._batch_fill.observe(batch.fill)
        self._padding_tokens.inc(batch.padding_tokens)
        self._compute_seconds.observe(batch.seconds)

    def dropped(self, sequences: int, reason: str) -> None:
        """Record sequences that left the queue without a batch: "cancelled", "expired" or "failed"."""
        self._dropped.labels(reason).inc(sequences)

    def weight_version(self, version: int) -> None:
        """Record the version that serves."""
        self._weight_version.set(version)

    def follow_file(self, file: str, refused: Callable[[], bool]) -> None:
        """Ask at each scrape whether what a file holds now is refused."""
        self._file_refused.labels(file).set_function(lambda: float(refused()))

    def ready(self, ready: bool) -> None:
        """Record whether calls are taken."""
        self._ready.set(ready)
