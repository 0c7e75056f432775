"""One trace for each step, from the trainer through all services."""

from __future__ import annotations

from pathlib import Path

from opentelemetry.proto.trace.v1 import trace_pb2

from support.otlp_collector import collecting
from support.tiny_head import save_tiny_head

from .conftest import running_system


def test_the_spans_of_all_services_join_the_step_that_called_them(tiny_model_dir: Path, tmp_path: Path) -> None:
    heads = {"reward": str(save_tiny_head(tiny_model_dir, tmp_path / "reward", name="reward"))}
    with collecting() as (collector, endpoint):
        with running_system(tiny_model_dir, tmp_path / "system", heads, tracing_endpoint=endpoint) as system:
            config = system.config("traced", steps=2, tracing={"endpoint": endpoint})
            services = dict(config["services"], judge_model=None)
            result = system.train({**config, "services": services})
            assert result.returncode == 0, result.stderr
            for service in (system.reward, system.reference, system.generation):
                service.signal()
                assert service.wait() == 0
        spans: list[trace_pb2.Span] = []
        while not collector.spans.empty():
            spans.append(collector.spans.get())
    steps = sorted((span for span in spans if span.name == "ppo.step"), key=lambda span: span.start_time_unix_nano)
    assert [step.attributes[0].value.int_value for step in steps] == [1, 2]
    assert steps[0].trace_id != steps[1].trace_id
    for step in steps:
        within = {span.span_id: span for span in spans if span.trace_id == step.trace_id}
        parents = {span.name: within[span.parent_span_id].name for span in within.values() if span.parent_span_id}
        assert parents["/ppod.v1.GenerationService/Generate"] == "ppo.generate"
        assert parents["/ppod.v1.RewardService/Score"] == "ppo.score"
        assert parents["/ppod.v1.ReferenceService/ComputeLogprobs"] == "ppo.reference"
        assert parents["/ppod.v1.WeightService/PrepareWeights"] == "ppo.push"
        assert parents["/ppod.v1.WeightService/CommitWeights"] == "ppo.push"
        assert parents["ppo.update"] == "ppo.step"
