"""Traces and channelz of real service processes."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from ppod import GenerationClient, Sampling
from ppod.tensors import pack_sequences
from ppod.v1 import reference_pb2, reference_pb2_grpc
from support.otlp_collector import collecting
from support.processes import ServiceProcess, metrics_of, running_service
from support.services import tiny_model_config

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
REQUEST = reference_pb2.ComputeLogprobsRequest(tokens=pack_sequences([[1, 2, 3], [4, 5]]), prompt_lengths=[1, 1])


def compute(service: ServiceProcess, request: reference_pb2.ComputeLogprobsRequest, **metadata: str) -> None:
    with grpc.insecure_channel(service.target) as channel:
        stub = reference_pb2_grpc.ReferenceServiceStub(channel)
        stub.ComputeLogprobs(request, timeout=30, metadata=tuple(metadata.items()))


def attributes(span: trace_pb2.Span) -> dict[str, object]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_call_s_span_joins_the_caller_s_trace_and_says_where_the_time_went(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    with collecting() as (collector, endpoint):
        values = {"model": tiny_model_config(tiny_model_dir), "tracing": {"endpoint": endpoint}}
        with running_service("ppod_services.reference", tmp_path, values) as service:
            with grpc.insecure_channel(service.target) as channel:
                # A probe: it must leave no span.
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""), timeout=5)
            compute(service, REQUEST, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01")
            bad = reference_pb2.ComputeLogprobsRequest(tokens=pack_sequences([[1]]), prompt_lengths=[1])
            with pytest.raises(grpc.RpcError):
                compute(service, bad)
            # Spans leave in batches; a drained service sends what it still has.
            service.signal()
            assert service.wait() == 0
        spans = [collector.spans.get(timeout=10) for _ in range(2)]
        assert collector.spans.empty()
    good, refused = sorted(spans, key=lambda span: span.trace_id.hex() != TRACE_ID)
    assert good.trace_id.hex() == TRACE_ID
    assert good.parent_span_id.hex() == PARENT_ID
    assert good.name == "/ppod.v1.ReferenceService/ComputeLogprobs"
    found = attributes(good)
    assert found["ppod.tokens"] == 5
    duration_s = (good.end_time_unix_nano - good.start_time_unix_nano) / 1e9
    assert 0 < found["ppod.compute_s"] < duration_s
    assert 0 <= found["ppod.queue_s"] < duration_s
    assert attributes(refused)["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_channelz_is_for_administrators_only(reference_service: ServiceProcess) -> None:
    with grpc.insecure_channel(reference_service.admin_target) as channel:
        servers = channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest(), timeout=5)
    served = {int(one.listen_socket[0].name.rpartition(":")[2]) for one in servers.server}
    ports = (reference_service.port, reference_service.admin_port, reference_service.health_port)
    assert served == set(ports)
    with grpc.insecure_channel(reference_service.target) as channel, pytest.raises(grpc.RpcError) as caught:
        channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest(), timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_tokens_that_were_sampled_are_counted_and_not_the_room_for_more(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A completion that ends at once leaves most of its `max_tokens` unused, which dashboards would show as work."""
    with (
        running_service("ppod_services.generation", tmp_path, {"model": tiny_model_config(tiny_model_dir)}) as service,
        GenerationClient(service.target) as client,
    ):
        # Sent alone, so that no metric is of a batch that others joined.
        ended = client.generate([[5, 6, 7]], Sampling(40, n=2, stop_token_ids=(9,), logit_bias={9: 1000.0}))
        took = sum(completion.timing.tokens for completion in ended)
        assert took == 2 * (3 + 1)
        wanted = [f'ppod_team_served_tokens_total{{team="anonymous"}} {took}.0', f"ppod_batch_tokens_sum {took}.0"]
        until = time.monotonic() + 10
        while not all(one in (text := metrics_of(service)) for one in wanted):
            assert time.monotonic() < until, text
            time.sleep(0.05)
        # Quotas and the queue have to know before, and count the room.
        assert f'ppod_team_accepted_tokens_total{{team="anonymous"}} {2.0 * (3 + 40)}' in text
