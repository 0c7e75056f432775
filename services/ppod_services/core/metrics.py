"""The Prometheus metrics of one service process, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (64, 256, 1024, 4096, 16_384, 65_536, 262_144)


class ServiceMetrics:
    """Counts calls, the queue, batches and the weight version. Base units: seconds and tokens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rpc_seconds = Histogram(
            "ppod_rpc_seconds", "Seconds of each call", ["method"], buckets=_SECONDS, registry=self.registry
        )
        self._rpcs = Counter("ppod_rpc", "Calls by status code", ["method", "code"], registry=self.registry)
        self._queue_sequences = Gauge("ppod_queue_sequences", "Sequences that wait", registry=self.registry)
        self._queue_tokens = Gauge("ppod_queue_tokens", "Tokens that wait", registry=self.registry)
        self._batch_sequences = Histogram(
            "ppod_batch_sequences", "Sequences of each batch", buckets=_SIZES, registry=self.registry
        )
        self._batch_tokens = Histogram(
            "ppod_batch_tokens", "Tokens of each batch, padding left out", buckets=_TOKENS, registry=self.registry
        )
        self._padding_tokens = Counter("ppod_padding_tokens", "Padding tokens computed", registry=self.registry)
        self._compute_seconds = Histogram(
            "ppod_compute_seconds", "Seconds of model execution of each batch", buckets=_SECONDS, registry=self.registry
        )
        self._dropped = Counter(
            "ppod_dropped_sequences", "Sequences dropped before they cost compute", ["reason"], registry=self.registry
        )
        self._weight_version = Gauge("ppod_weight_version", "Version of the serving weights", registry=self.registry)
        self._ready = Gauge("ppod_ready", "1 while the model is loaded and calls are taken", registry=self.registry)

    def rpc(self, method: str, code: str, seconds: float) -> None:
        """Record a finished call."""
        self._rpc_seconds.labels(method).observe(seconds)
        self._rpcs.labels(method, code).inc()

    def queue(self, sequences: int, tokens: int) -> None:
        """Record what waits now."""
        self._queue_sequences.set(sequences)
        self._queue_tokens.set(tokens)

    def batch(self, sequences: int, tokens: int, padding_tokens: int, seconds: float) -> None:
        """Record a finished batch."""
        self._batch_sequences.observe(sequences)
        self._batch_tokens.observe(tokens)
        self._padding_tokens.inc(padding_tokens)
        self._compute_seconds.observe(seconds)

    def dropped(self, sequences: int, reason: str) -> None:
        """Record sequences that left the queue without a batch: "cancelled", "expired" or "failed"."""
        self._dropped.labels(reason).inc(sequences)

    def weight_version(self, version: int) -> None:
        """Record the version that serves."""
        self._weight_version.set(version)

    def ready(self, ready: bool) -> None:
        """Record whether calls are taken."""
        self._ready.set(ready)
