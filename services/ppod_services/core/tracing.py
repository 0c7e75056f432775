"""A span for each call, joined to the caller's trace by the W3C `traceparent` in the call's metadata."""

from __future__ import annotations

from typing import cast

import grpc.aio
from opentelemetry import trace

from ppod.v1 import common_pb2
from ppod_models.configuration import TracingConfig
from ppod_models.tracing import configure_tracing


def tracing_interceptors(config: TracingConfig, service_name: str) -> list[grpc.aio.ServerInterceptor]:
    """What a server needs to trace its calls; empty without an endpoint."""
    if not configure_tracing(config.endpoint, service_name, config.sample_ratio):
        return []
    from opentelemetry.instrumentation.grpc import aio_server_interceptor, filters  # noqa: PLC0415 - only if traced

    # Probes come every few seconds and would bury the calls.
    return [cast(grpc.aio.ServerInterceptor, aio_server_interceptor(filter_=filters.negate(filters.health_check())))]


def annotate_span(timing: common_pb2.Timing) -> None:
    """Write where a request's time went into the span of its call; does nothing while tracing is off."""
    trace.get_current_span().set_attributes(
        {"ppod.queue_s": timing.queue_s, "ppod.compute_s": timing.compute_s, "ppod.tokens": timing.tokens}
    )
