"""Evaluation, checkpoints and metrics."""

from __future__ import annotations

from pydantic import Field

from ppod_models.configuration import ConfigModel


class EvaluationConfig(ConfigModel):
    """Evaluation on the held-out prompts, with fixed seeds, before, during and after training."""

    interval: int | None = Field(default=None, ge=1, description="steps between evaluations; none: before and after")
    judge_interval: int = Field(default=5, ge=1, description="steps between judgements of the training samples")
    shown_samples: int = Field(default=3, ge=0, description="held-out samples in the report")


class CheckpointConfig(ConfigModel):
    """Checkpoints, beside those at the end and on SIGTERM."""

    interval: int | None = Field(default=None, ge=1, description="steps between checkpoints; none: only at the end")
    keep: int = Field(default=2, ge=1, description="newest checkpoints that are kept; a damaged one gives way to older")


class MetricsConfig(ConfigModel):
    """Where metrics go, beside metrics.jsonl."""

    port: int | None = Field(default=9104, ge=1, le=65535, description="Prometheus port; none: no exporter")
    host: str = Field(default="127.0.0.1", description="address of the port; 0.0.0.0 in a container")
    tensorboard: bool = Field(default=True, description="write tensorboard/ in run_dir, too")
