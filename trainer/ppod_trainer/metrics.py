"""What the trainer measures: one record a step, to Prometheus, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from opentelemetry import trace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from torch.utils.tensorboard import SummaryWriter

from ppod_trainer.config import MetricsConfig
from ppod_trainer.durable import write_durably
from ppod_trainer.errors import TrainerError

Record = Mapping[str, float]

_CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Percentiles are told no further than the last bound, and a call that samples a batch may take minutes."""

_PHASE = "seconds/"
"""Begins the keys of the seconds of phases, which not every step has."""

GAUGES = {
    "score/mean": (
        "ppod_reward_score_mean",
        "Mean outcome of the step's samples: the reward's score, and what an environment paid",
    ),
    "score/std": ("ppod_reward_score_std", "Standard deviation of the step's scores"),
    "groups/uniform": (
        "ppod_groups_uniform_ratio",
        "Share of prompts whose samples, two or more, were all paid the same",
    ),
    "score/running_mean": ("ppod_reward_score_running_mean", "Mean of all scores of the run so far"),
    "score/running_std": ("ppod_reward_score_running_std", "Standard deviation of all scores of the run so far"),
    "selection/rounds": ("ppod_selection_rounds", "Rounds of sampling in the step, with dynamic sampling"),
    "selection/uniform_groups": (
        "ppod_selection_uniform_groups",
        "Groups of the step whose samples were all paid the same, with dynamic sampling",
    ),
    "selection/filled_groups": (
        "ppod_selection_filled_groups",
        "Uniform groups that the step trained on, because its rounds gave too few others",
    ),
    "selection/skipped_prompts": (
        "ppod_selection_skipped_prompts",
        "Prompts that the epoch leaves out as solved, with history resampling",
    ),
    "judge/mean": ("ppod_judge_score_mean", "Mean held-out judge score of the step's samples, when last judged"),
    "judge/std": ("ppod_judge_score_std", "Standard deviation of the judge's scores, when last judged"),
    "kl/reference": ("ppod_kl_reference_nats", "Mean KL to the reference, nats a response (k1)"),
    "kl/bound_per_token": (
        "ppod_kl_bound_per_token_nats",
        "watch.kl_per_token: KL to the reference past which a run is in trouble, nats a token",
    ),
    "kl/coefficient": ("ppod_kl_coefficient", "Coefficient of the KL penalty"),
    "entropy/coefficient": ("ppod_entropy_coefficient", "Coefficient of the entropy bonus"),
    "policy/entropy": ("ppod_policy_entropy_nats", "Mean entropy of the policy, nats a token"),
    "policy/clip_fraction": ("ppod_policy_clip_fraction_ratio", "Share of tokens whose gradient was clipped away"),
    "policy/dual_clip_fraction": ("ppod_policy_dual_clip_ratio", "Share of tokens whose gradient the dual clip took"),
    "policy/ratio_bounded": ("ppod_policy_ratio_bounded_ratio", "Share of tokens whose ratio was held from overflow"),
    "policy/approx_kl": ("ppod_policy_update_kl_nats", "KL(old, new) of the last minibatch, nats a token (k3)"),
    "policy/first_ratio_error": ("ppod_policy_first_ratio_error", "Largest |ratio - 1| in the first minibatch"),
    "policy/grad_norm": ("ppod_policy_grad_norm", "Gradient norm before clipping"),
    "policy/version": ("ppod_policy_version", "Version of the policy's weights"),
    "loss/policy": ("ppod_policy_loss", "Clipped policy loss"),
    "loss/value": ("ppod_value_loss", "Value loss"),
    "loss/kl": ("ppod_kl_loss_nats", "KL in the loss, before its coefficient"),
    "value/explained_variance": ("ppod_value_explained_variance_ratio", "Explained variance of the values"),
    "response/length": ("ppod_response_length_tokens", "Mean response length"),
    "response/distinct_2": ("ppod_response_distinct_2_ratio", "Different token bigrams of the step, of all of them"),
    "value/std": ("ppod_value_std", "Standard deviation of the values of the step's tokens"),
    "response/truncated": ("ppod_response_truncated_ratio", "Share of responses cut off at the token limit"),
    "sampler/gap_mean": ("ppod_sampler_logprob_gap_nats", "Mean |trainer - sampler| logprob of the same weights"),
    "sampler/gap_max": ("ppod_sampler_logprob_gap_max_nats", "Largest |trainer - sampler| logprob"),
    "sampler/divergence_mean": ("ppod_sampler_divergence_nats", "Mean |trainer - sampler| logprob of all tokens"),
    "sampler/divergence_max": ("ppod_sampler_divergence_max_nats", "Largest |trainer - sampler| logprob of all tokens"),
    "sampler/staleness_mean": ("ppod_sampler_staleness_mean_updates", "Mean age of the tokens' weights, in updates"),
    "sampler/staleness_max": ("ppod_sampler_staleness_max_updates", "Age of the oldest tokens' weights, in updates"),
    "sampler/temperature": ("ppod_sampler_temperature", "Temperature that the step's samples were drawn at"),
    "sampler/mismatched": ("ppod_sampler_mismatched_ratio", "Share of tokens left out of the loss for their mismatch"),
    "push/bytes": (
        "ppod_push_bytes",
        "Bytes of weights that left the trainer in the step's push, without an adapter's base",
    ),
    "push/fallbacks": (
        "ppod_push_fallbacks",
        "Replicas that refused the step's changes, or that its broadcast did not reach, and were sent whole weights",
    ),
    "push/lost": ("ppod_push_lost_replicas", "Replicas that the run goes on without, as they did not get the weights"),
    "learning_rate": ("ppod_learning_rate", "Learning rate of the policy"),
    "tokens_per_second": ("ppod_tokens_per_second", "Response tokens trained on, per second of the step"),
    "samples/dropped": ("ppod_samples_dropped", "Samples dropped in the step for a typed error"),
    "samples/stale": ("ppod_samples_stale", "Samples dropped in the step for the age of their weights"),
    "samples/rejected_short": ("ppod_samples_rejected_short", "Samples of the step that were too short to train on"),
    "samples/rejected_repetitive": ("ppod_samples_rejected_repetitive", "Samples of the step that repeat themselves"),
    "samples/rejected_unsafe": ("ppod_samples_rejected_unsafe", "Samples of the step that the safety reward rejects"),
    "step": ("ppod_step", "Steps done"),
}


class StepTimer:
    """Seconds by phase of one step, and an OpenTelemetry span for each. Phases of two threads may overlap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Add the seconds of the block to a phase; services' spans of calls within it join its span."""
        start = time.perf_counter()
        try:
            with trace.get_tracer("ppod.trainer").start_as_current_span(f"ppo.{name}"):
                yield
        finally:
            elapsed = time.perf_counter() - start
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed


class MetricsLog:
    """Writes each step's record everywhere. One registry for the process.

    Args:
        run_dir: where metrics.jsonl and tensorboard/ go.
        config: exporter and TensorBoard settings.
        resume_step: records after this step, of a run that was cut, are dropped; None: a new run, all are.

    Attributes:
        evaluated: steps of which an evaluation is recorded.

    Raises:
        TrainerError: the exporter's port is in use, or the records of a run to resume are damaged.
    """

    def __init__(self, run_dir: Path, config: MetricsConfig, resume_step: int | None = None) -> None:
        self.registry = CollectorRegistry()
        self._gauges = {key: Gauge(name, text, registry=self.registry) for key, (name, text) in GAUGES.items()}
        # Not 0, which would be shown as a score, a KL or a judge's mean where there is none, or none yet.
        self._unset(GAUGES.keys())
        self._phase_seconds = Gauge(
            "ppod_step_phase_seconds", "Seconds of the last step, by phase", ["phase"], registry=self.registry
        )
        self._phases: set[str] = set()
        self._last_step = Gauge(
            "ppod_last_step_timestamp_seconds",
            "When the last step was done, or the process began, in Unix time",
            registry=self.registry,
        )
        self._last_step.set_to_current_time()
        self._trouble = Gauge("ppod_trouble", "1 where the last step shows trouble", ["kind"], registry=self.registry)
        self._samples = Counter("ppod_samples", "Samples trained on", registry=self.registry)
        self._tokens = Counter("ppod_response_tokens", "Response tokens trained on", registry=self.registry)
        self._rpc_seconds = Histogram(
            "ppod_client_rpc_seconds",
            "Latency of calls to the services",
            ["method"],
            buckets=_CALL_SECONDS,
            registry=self.registry,
        )
        self._rpc_failures = Counter(
            "ppod_client_rpc_failures", "Calls that failed", ["method", "code"], registry=self.registry
        )
        path = run_dir / "metrics.jsonl"
        kept = [] if resume_step is None else _records_until(path, resume_step)
        self.evaluated = {int(record["step"]) for _, record in kept if _is_evaluation(record)}
        write_durably(path, "".join(line for line, _ in kept))
        self._file = path.open("a", encoding="utf-8")
        # TensorBoard appends: without a step from which on the earlier points go, a curve would double back.
        first_step = 0 if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step) if config.tensorboard else None
        self._exporter = _export(self.registry, config)

    def observe_rpc(self, method: str, seconds: float, code: str) -> None:
        """Count one call to a service; an `RpcObserver` of the clients."""
        self._rpc_seconds.labels(method).observe(seconds)
        if code != "OK":
            self._rpc_failures.labels(method, code).inc()

    def write(self, step: int, record: Record, samples: int = 0, tokens: int = 0) -> None:
        """Record one step, or one evaluation (keys that begin with `heldout/`)."""
        line = json.dumps({"step": step, **record}, allow_nan=False, default=float)
        self._file.write(line + "\n")
        self._file.flush()
        if _is_evaluation(record):
            self.evaluated.add(step)
        else:
            # The judge's figures stay until it judges again.
            self._unset(key for key in GAUGES.keys() - record.keys() if not key.startswith("judge/"))
            phases = {key.removeprefix(_PHASE) for key in record if key.startswith(_PHASE)}
            for phase in self._phases - phases:
                self._phase_seconds.remove(phase)
            self._phases = phases
        self._samples.inc(samples)
        self._tokens.inc(tokens)
        self._gauges["step"].set(step)
        self._last_step.set_to_current_time()
        for key, value in record.items():
            if key in self._gauges:
                self._gauges[key].set(value)
            elif key.startswith(_PHASE):
                self._phase_seconds.labels(key.removeprefix(_PHASE)).set(value)
            elif key.startswith("trouble/"):
                self._trouble.labels(key.removeprefix("trouble/")).set(value)
            if self._board is not None:
                self._board.add_scalar(key, value, step)

    def _unset(self, keys: Iterable[str]) -> None:
        """Export no value of these figures; NaN is drawn as a gap and fires no alert."""
        for key in keys:
            if key != "step":
                self._gauges[key].set(math.nan)

    def sync(self) -> None:
        """Return when the records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close all outputs; the port is free again."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._exporter is not None:
            server, thread = self._exporter
            server.shutdown()
            server.server_close()
            thread.join()


def read_records(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finite_record(record: Record) -> dict[str, float]:
    """Check a record: every value finite. Raises TrainerError that names the metric."""
    for key, value in record.items():
        if not math.isfinite(value):
            raise TrainerError(f"metric {key} is {value}; expected a finite number")
    return dict(record)


def _is_evaluation(record: Record) -> bool:
    return any(key.startswith("heldout/") for key in record)


def _records_until(path: Path, step: int) -> list[tuple[str, dict[str, float]]]:
    """Lines and records up to a step. The last line may be cut, where the process was killed while it wrote."""
    kept: list[tuple[str, dict[str, float]]] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            if record["step"] <= step:
                kept.append((line, record))
        except (ValueError, KeyError, TypeError) as error:
            raise TrainerError(
                f"resume: {path}, line {number}, is not a record ({error!r}); remove it, or start without resume"
            ) from error
    return kept


def _export(registry: CollectorRegistry, config: MetricsConfig) -> tuple[WSGIServer, threading.Thread] | None:
    if config.port is None:
        return None
    try:
        return start_http_server(config.port, addr=config.host, registry=registry)
    except OSError as error:
        raise TrainerError(
            f"metrics.port: cannot listen on {config.host}:{config.port}: {error.strerror}; choose another port"
        ) from error
