"""What only a vLLM engine has: cached prefixes, workers that load weights, processes of its own.

The tests share an engine, which takes many seconds to start; the last one kills it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ppod import Completion, FinishReason, GenerationClient, Internal, Sampling, Unavailable, WeightClient
from ppod.client import RelayHop, WeightPause, WeightPush
from ppod.client.weight_image import WireImage
from ppod_trainer.policy_weights import PolicyTensors
from support.processes import ServiceProcess, free_ports, metrics_of, run_to_exit, running_service, write_config
from support.recomputed import chosen_logprobs, distributions
from support.sampling_reference import Rules
from support.saved_adapters import adapter_tensors
from support.services import FLOAT32_GAP, tiny_model_config
from support.tiny_adapter import build_adapted_model
from support.tiny_model import build_model, save_tiny_model
from support.vllm_services import (
    BLOCK_SIZE,
    assert_gone,
    cut_weights_that_wait,
    engine_processes,
    require_vllm,
    running_vllm,
)
from support.weight_checks import assert_serves
from support.weight_tensors import weight_tensors

MAX_TOKENS = 256
LONG = [60, 61, 62]
SIGNAL = [70] * (MAX_TOKENS - 20)
"""A prompt that leaves room for 20 tokens: when its completion is here, others are in the middle of theirs."""
SERVICE = "ppod.v1.GenerationService"


@dataclass
class Pushed:
    """The service, and what was pushed to it, by version; 0 is what it started with."""

    service: ServiceProcess
    weights: WeightClient
    models: dict[int, torch.nn.Module] = field(default_factory=dict[int, torch.nn.Module])

    @property
    def serving(self) -> int:
        return self.weights.status().state.weight_version

    def prepare(self, dtype: torch.dtype = torch.float32) -> int:
        """Send the weights of another random model; returns their version."""
        version = self.serving + 1
        model = build_model(seed=500 + version, max_tokens=MAX_TOKENS)
        self.weights.prepare(version, weight_tensors(model, dtype))
        # Not model.to(dtype): its buffers travel with nobody, and stay as they are.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        self.models[version] = model
        return version

    def complete(self, prompt: list[int], tokens: int = 12) -> Completion:
        with GenerationClient(self.service.target) as client:
            return client.generate([prompt], Sampling(max_tokens=tokens, ignore_eos=True), seeds=[3])[0]

    def check_logprobs(self, prompt: list[int], done: Completion) -> None:
        """Every token's logprob is that of a full forward with the weights of its version."""
        tokens = done.token_ids.tolist()
        begin = 0
        for span in done.weight_spans:
            end = begin + span.tokens
            rows = distributions(self.models[span.weight_version], prompt, tokens, Rules())
            expected = chosen_logprobs(rows, tokens)
            np.testing.assert_allclose(done.logprobs[begin:end], expected[begin:end], atol=FLOAT32_GAP)
            begin = end
        assert begin == len(tokens)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model", max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def relaying() -> Iterator[dict[str, object]]:
    """`weights` of services that relay by files of one directory."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield {"relay_targets": ["127.0.0.1:*"], "relay_directory": directory, "map_shared_files": True}


@pytest.fixture(scope="module")
def pushed(model_dir: Path, relaying: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    directory = tmp_path_factory.mktemp("vllm")
    with (
        # Weights that were staged would be whole, whatever became of the memory that they came in.
        running_vllm(model_dir, directory, {"weights": relaying, "vllm": {"stage_weights": False}}) as service,
        WeightClient(service.admin_target) as weights,
    ):
        yield Pushed(service, weights, {0: build_model(max_tokens=MAX_TOKENS)})


def test_engine_arguments_that_vllm_does_not_know_are_named_before_anything_starts(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    require_vllm()
    vllm = {"engine_args": {"block_sise": 32, "enable_prefix_caching": True}}
    values = {"listen": {"port": free_ports(1)[0]}, "model": tiny_model_config(tiny_model_dir), "backend": "vllm"}
    done = run_to_exit(
        "ppod_services.generation", "--config", str(write_config(tmp_path / "config.yaml", {**values, "vllm": vllm}))
    )
    assert done.returncode == 2
    assert "vllm.engine_args.block_sise: vLLM has no such engine argument" in done.stderr


def test_an_engine_that_takes_longer_than_it_may_is_given_up(tiny_model_dir: Path, tmp_path: Path) -> None:
    require_vllm()
    model = {**tiny_model_config(tiny_model_dir), "device": "auto"}
    values = {"listen": {"port": free_ports(1)[0]}, "model": model, "backend": "vllm", "vllm": {"start_timeout_s": 1.5}}
    done = run_to_exit("ppod_services.generation", "--config", str(write_config(tmp_path / "config.yaml", values)))
    assert done.returncode == 1
    assert f"model {str(tiny_model_dir)!r} with vLLM: not loaded within 1.5 s (vllm.start_timeout_s)" in done.stderr


def fail_to_load(pushed: Pushed) -> None:
    """Commit weights of which half is gone, when the workers have loaded the other half."""
    before, serving = pushed.complete(LONG), pushed.serving
    version = pushed.prepare()
    cut_weights_that_wait(pushed.service)
    with pytest.raises(Internal, match="the old one serves on"):
        pushed.weights.commit(version)
    after = pushed.complete(LONG)
    assert pushed.serving == serving
    assert [span.weight_version for span in after.weight_spans] == [serving]
    assert after.token_ids.tolist() == before.token_ids.tolist()
    pushed.check_logprobs(LONG, after)
    assert '"event": "weights_restored"' in pushed.service.stderr


def test_a_failed_load_restores_the_checkpoint(pushed: Pushed) -> None:
    assert pushed.serving == 0
    fail_to_load(pushed)


def image_of(model: torch.nn.Module) -> WireImage:
    policy = PolicyTensors(model, torch.float32)
    image = WireImage(policy.layout)
    image.fill(policy.write)
    return image


def test_adapters_and_changes_may_be_against_what_the_engine_started_with(pushed: Pushed) -> None:
    assert pushed.serving == 0
    adapted = build_adapted_model(seed=1)
    adapter, tensors = adapter_tensors(adapted, "default")
    pushed.weights.push(WeightPush(1, tensors, base_version=0, adapter=adapter))
    changed = build_model(max_tokens=MAX_TOKENS)
    with torch.no_grad():
        changed.get_parameter("model.layers.1.mlp.down_proj.weight")[:, ::7] *= -1
    pushed.models |= {1: adapted, 2: changed}
    pushed.weights.commit(1)
    pushed.check_logprobs(LONG, pushed.complete(LONG))
    assert pushed.weights.status().base_version == 0
    changes = image_of(changed).changes(image_of(pushed.models[0]))
    push = WeightPush(2, changes, base_version=0)
    assert push.wire_bytes < image_of(changed).nbytes / 8
    pushed.weights.push(push)
    pushed.weights.commit(2)
    pushed.check_logprobs(LONG, pushed.complete(LONG))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_commit_drops_cached_prefixes(pushed: Pushed, dtype: torch.dtype) -> None:
    prompt = list(range(40, 40 + 3 * BLOCK_SIZE + 5))
    before = [pushed.complete(prompt) for _ in range(2)]
    assert before[0].token_ids.tolist() == before[1].token_ids.tolist()
    version = pushed.prepare(dtype)
    assert pushed.complete(prompt).token_ids.tolist() == before[0].token_ids.tolist()
    assert pushed.weights.commit(version) > 0
    after = pushed.complete(prompt)
    assert [span.weight_version for span in after.weight_spans] == [version]
    assert after.token_ids.tolist() != before[0].token_ids.tolist()
    # With blocks of the old weights in its cache the new model's logprobs would be others.
    pushed.check_logprobs(prompt, after)
    assert f"ppod_weight_version {version}.0" in metrics_of(pushed.service)


def test_a_failed_load_restores_what_was_pushed_last(pushed: Pushed) -> None:
    """Which the test before did, in bfloat16."""
    assert pushed.serving > 2
    fail_to_load(pushed)


def test_what_it_receives_into_a_file_is_there_for_others(
    pushed: Pushed, model_dir: Path, relaying: dict[str, object], tmp_path: Path
) -> None:
    # A device has copies of a file; a CPU serves from it.
    values = {"model": {**tiny_model_config(model_dir), "device": "cpu"}, "weights": relaying}
    with (
        running_service("ppod_services.generation", tmp_path, values, fresh=True) as other,
        WeightClient(other.admin_target) as follower,
    ):
        for _ in range(2):
            version = pushed.serving + 1
            model = build_model(seed=900 + version, max_tokens=MAX_TOKENS)
            hops = (RelayHop(other.admin_target, shares_directory=True),)
            outcomes = pushed.weights.push(WeightPush(version, weight_tensors(model), relay=hops)).replicas
            assert [one.error for one in outcomes] == [None, None]
            (uri,) = pushed.weights.status().held_uris
            assert uri in follower.status().held_uris
            pushed.weights.commit(version)
            # The workers have copies; the other one serves from the file.
            assert pushed.weights.status().held_uris == ()
            follower.commit(version)
            assert follower.status().held_uris == (uri,)
            pushed.models[version] = model
            done = pushed.complete(LONG)
            pushed.check_logprobs(LONG, done)
            assert_serves(other, version, model)


def test_kept_completions_go_on_as_if_the_new_weights_had_read_all_of_them(pushed: Pushed) -> None:
    version = pushed.prepare()
    with GenerationClient(pushed.service.target) as client:
        stream = client.stream([SIGNAL, LONG], Sampling(MAX_TOKENS, ignore_eos=True), seeds=[1, 2])
        assert next(stream).index == 0
        assert pushed.weights.commit(version, pause=WeightPause.KEEP) > 0
        long = next(stream)
    assert long.finish_reason is FinishReason.LENGTH
    assert [span.weight_version for span in long.weight_spans] == [version - 1, version]
    assert long.weight_spans[0].tokens >= 19
    assert len(long.token_ids) == MAX_TOKENS - len(LONG)
    pushed.check_logprobs(LONG, long)


def test_a_killed_engine_fails_its_callers_and_ends_the_service(pushed: Pushed) -> None:
    service = pushed.service
    statuses: list[int] = []
    with grpc.insecure_channel(service.target) as channel, GenerationClient(service.target) as client:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))

        def note() -> None:
            with contextlib.suppress(grpc.RpcError):
                statuses.extend(reply.status for reply in watch)

        watcher = threading.Thread(target=note)
        watcher.start()
        stream = client.stream([SIGNAL, LONG], Sampling(MAX_TOKENS, ignore_eos=True))
        assert next(stream).index == 0
        processes = engine_processes(service)
        next(process for process in processes if "EngineCore" in " ".join(process.cmdline())).kill()
        with pytest.raises(Unavailable, match="engine"):
            next(stream)
        assert service.wait(60) == 1
        watcher.join(30)
    expected = [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
    assert statuses == expected
    assert '"event": "broken"' in service.stderr
    assert_gone(processes)
