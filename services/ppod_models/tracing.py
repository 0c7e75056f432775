"""OpenTelemetry: where spans go. Without an endpoint nothing is recorded and the SDK is not imported."""

from __future__ import annotations

import atexit
import threading


def configure_tracing(endpoint: str | None, service_name: str, sample_ratio: float = 1.0) -> bool:
    """Send this process's spans to an OTLP collector; returns whether tracing is on.

    Spans leave in the background; a collector that is gone costs spans, never a call.

    Args:
        endpoint: OTLP over gRPC, such as "http://collector:4317"; None: no tracing.
        service_name: `service.name` of the resource.
        sample_ratio: share of the traces that begin here; a trace that a caller began follows the caller's choice.
    """
    if endpoint is None:
        return False
    from opentelemetry import trace  # noqa: PLC0415 - only those who trace pay for the import
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio  # noqa: PLC0415

    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(sample_ratio), resource=Resource.create({"service.name": service_name})
    )
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    atexit.register(provider.shutdown)
    return True


def flush_tracing(timeout_s: float) -> None:
    """Send the spans that still wait, for `timeout_s` seconds at most; does nothing while tracing is off."""
    from opentelemetry import trace  # noqa: PLC0415

    flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush is not None:
        # The SDK does not look at a bound that it is given: with a collector that is gone it takes half a minute.
        flushing = threading.Thread(target=flush, daemon=True)
        flushing.start()
        flushing.join(timeout_s)
