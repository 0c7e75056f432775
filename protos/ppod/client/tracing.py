"""Joins a call to the caller's trace, where the caller has OpenTelemetry and a span."""

from __future__ import annotations

from collections.abc import Callable

Metadata = tuple[tuple[str, str], ...]


def _no_trace() -> Metadata:
    return ()


def _find_tracer() -> Callable[[], Metadata]:
    # The thin client does not require OpenTelemetry; services and trainers bring it.
    try:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
    except ImportError:
        return _no_trace
    propagator = TraceContextTextMapPropagator()

    def inject() -> Metadata:
        carrier: dict[str, str] = {}
        propagator.inject(carrier)
        return tuple(carrier.items())

    return inject


trace_metadata = _find_tracer()
"""W3C `traceparent` and `tracestate` of the active span as call metadata; empty where there is none."""
