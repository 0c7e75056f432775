"""Weights that a real engine's workers receive themselves, by vLLM's weight-transfer API, while they serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from ppod import (
    Completion,
    FailedPrecondition,
    GenerationClient,
    Internal,
    InvalidArgument,
    Sampling,
    Unavailable,
    WeightClient,
)
from ppod.client import WeightPause, WeightPush
from ppod_models.process_groups import GroupError
from ppod_trainer.collective_plane import CollectivePlane
from ppod_trainer.config import CollectiveConfig
from ppod_trainer.policy_weights import PolicyTensors
from ppod_trainer.weight_planes import Outgoing
from support.broadcasts import ANOTHER_HOST, ask, group_of, sending
from support.processes import ServiceProcess, free_ports
from support.recomputed import chosen_logprobs, distributions
from support.sampling_reference import Rules
from support.saved_adapters import adapter_tensors
from support.services import FLOAT32_GAP, TEST_DEVICE
from support.tiny_adapter import build_adapted_model
from support.tiny_model import MAX_TOKENS, build_model
from support.vllm_services import (
    BLOCK_SIZE,
    HALF_LOADING_VARIABLE,
    HALF_LOADING_WORKER,
    cut_weights_that_wait,
    draining,
    engine_processes,
    running_vllm,
)
from support.weight_tensors import weight_tensors

WORKERS = 2 if TEST_DEVICE == "cpu" else 1
PROMPTS = [[5, 6, 7], [60, 61]]
SIGNAL = [3] * (MAX_TOKENS - 2)
"""A prompt that leaves room for two tokens: when its completion is here, the others have just begun."""


@dataclass
class Receiving:
    """A service whose workers receive, and the trainer's plane; while `half_loads` exists they load half of it."""

    service: ServiceProcess
    weights: WeightClient
    plane: CollectivePlane
    half_loads: Path
    staged: bool
    models: dict[int, torch.nn.Module] = field(default_factory=lambda: {0: build_model()})

    @property
    def serving(self) -> int:
        return self.weights.status().state.weight_version

    def prepare(self, dtype: torch.dtype = torch.float32, model: torch.nn.Module | None = None) -> int:
        """Broadcast the weights of a model, else of another random one; their version."""
        version = max(self.serving, *self.models) + 1
        model = model or build_model(seed=700 + version)
        with self.plane.whole(Outgoing(version, PolicyTensors(model, dtype), None)) as push:
            try:
                self.weights.push(push)
            except BaseException:
                self.plane.refused()
                raise
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        self.models[version] = model
        return version

    def check(self) -> None:
        """What is sampled has the logprobs of a full forward of the serving version's model."""
        version = self.serving
        for prompt, done in zip(PROMPTS, self.complete(), strict=True):
            tokens = done.token_ids.tolist()
            assert [span.weight_version for span in done.weight_spans] == [version]
            expected = chosen_logprobs(distributions(self.models[version], prompt, tokens, Rules()), tokens)
            np.testing.assert_allclose(done.logprobs, expected, atol=FLOAT32_GAP)

    def complete(self) -> list[Completion]:
        with GenerationClient(self.service.target) as client:
            return client.generate(PROMPTS, Sampling(max_tokens=12, ignore_eos=True), seeds=[3, 4])


@pytest.fixture(scope="module", params=[False, True], ids=["at commits", "beside serving"])
def receiving(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Receiving]:
    """Versions are loaded when they are committed, or before."""
    staged = bool(request.param)
    arguments = {"block_size": BLOCK_SIZE, "worker_cls": HALF_LOADING_WORKER}
    own: dict[str, object] = {"weights_received_by": "workers", "tensor_parallel_size": WORKERS}
    values = {
        "vllm": {**own, "stage_weights": staged, "engine_args": arguments},
        "weights": {"collective_addresses": ["127.0.0.1:*"], "idle_timeout_s": 3},
    }
    half_loads = tmp_path_factory.mktemp("worker") / "load-half"
    variables = {**ANOTHER_HOST, HALF_LOADING_VARIABLE: str(half_loads)}
    with (
        running_vllm(tiny_model_dir, tmp_path_factory.mktemp("vllm"), values, variables) as service,
        WeightClient(service.admin_target) as weights,
        draining(service),
    ):
        config = CollectiveConfig(port=free_ports(1)[0], bucket_mib=1, timeout_s=10)
        plane = CollectivePlane(config, lambda: {weights.target: weights.status().collective_ranks})
        yield Receiving(service, weights, plane, half_loads, staged)
        plane.close()


@pytest.mark.skipif(TEST_DEVICE != "cpu", reason="the workers of a CPU add up in shared memory")
def test_what_workers_share_goes_when_they_do(receiving: Receiving) -> None:
    """vLLM itself leaves it in /dev/shm. Without names it is gone with them, also where they are killed."""
    mapped = [
        Path(f"/proc/{process.pid}/maps").read_text().splitlines() for process in engine_processes(receiving.service)
    ]
    shared = [line for lines in mapped for line in lines if "-cpushm_" in line]
    assert shared
    assert all(line.endswith("(deleted)") for line in shared)


def test_each_worker_is_a_rank_and_version_after_version_serves(receiving: Receiving) -> None:
    assert receiving.weights.status().collective_ranks == WORKERS
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        before = receiving.serving
        version = receiving.prepare(dtype)
        receiving.check()
        assert (receiving.serving, receiving.weights.status().prepared_version) == (before, version)
        assert receiving.weights.commit(version) > 0
        assert receiving.serving == version
        receiving.check()
    assert receiving.plane._epoch == 1


def test_serving_goes_on_while_bytes_arrive_and_a_commit_may_keep_what_runs(receiving: Receiving) -> None:
    """Nothing of the new version shows before its commit; then kept sequences go on under it."""
    version, model = receiving.serving + 1, build_model(seed=801)
    with sending(receiving.service, free_ports(1)[0], model, WORKERS) as sender:
        sender.send(3)
        receiving.check()
        assert not sender.asking.done()
        sender.send_all()
        assert sender.asking.result(10) == version
    receiving.models[version] = model
    with GenerationClient(receiving.service.target) as client:
        stream = client.stream([SIGNAL, PROMPTS[0]], Sampling(100, ignore_eos=True), seeds=[1, 2])
        assert next(stream).index == 0
        receiving.weights.commit(version, pause=WeightPause.KEEP)
        kept = next(stream)
    assert [span.weight_version for span in kept.weight_spans] == [version - 1, version]
    begin, tokens = 0, kept.token_ids.tolist()
    for span in kept.weight_spans:
        rows = distributions(receiving.models[span.weight_version], PROMPTS[0], tokens, Rules())
        end = begin + span.tokens
        np.testing.assert_allclose(kept.logprobs[begin:end], chosen_logprobs(rows, tokens)[begin:end], atol=FLOAT32_GAP)
        begin = end
    receiving.check()


def test_what_breaks_on_the_way_leaves_the_old_version_and_the_next_one_comes(receiving: Receiving) -> None:
    before = receiving.serving
    with sending(receiving.service, free_ports(1)[0], build_model(seed=802), WORKERS) as sender:
        sender.damage(99_999)
        with suppress(GroupError):
            sender.send_all()
        with pytest.raises(InvalidArgument, match=r"tensors\..*\.xxh3"):
            sender.asking.result(10)
    with sending(receiving.service, free_ports(1)[0], build_model(seed=802), WORKERS) as sender:
        sender.send(2)
        sender.members.close()
        with pytest.raises(Unavailable, match="the group by hand"):
            sender.asking.result(10)
    with pytest.raises(Unavailable, match="cannot be reached"):
        ask(receiving.service, build_model(seed=802), group_of(receiving.service, free_ports(1)[0], ranks=WORKERS))
    with pytest.raises(FailedPrecondition, match="ranks"):
        ask(receiving.service, build_model(seed=802), group_of(receiving.service, free_ports(1)[0], ranks=1))
    status = receiving.weights.status()
    assert (status.state.weight_version, status.prepared_version) == (before, None)
    receiving.check()
    receiving.weights.commit(receiving.prepare())
    receiving.check()


def test_what_waits_may_be_committed_although_the_next_one_broke(receiving: Receiving) -> None:
    """The workers have forgotten it by then; the service has not."""
    waiting = receiving.prepare()
    with sending(receiving.service, free_ports(1)[0], build_model(seed=802), WORKERS) as sender:
        sender.damage(0)
        with suppress(GroupError):
            sender.send_all()
        with pytest.raises(InvalidArgument, match="xxh3"):
            sender.asking.result(10)
    receiving.weights.commit(waiting)
    assert receiving.serving == waiting
    receiving.check()


def test_a_failed_load_restores_what_the_workers_received(receiving: Receiving) -> None:
    if receiving.staged:
        pytest.skip("what is loaded already is whole, whatever becomes of the memory that it came in")
    for _ in range(2):
        # Then what waits is the largest, beside what serves and the memory of the one before.
        receiving.weights.commit(receiving.prepare(torch.bfloat16))
    serving = receiving.serving
    receiving.weights.prepare(serving + 1, weight_tensors(build_model(seed=804)))
    cut_weights_that_wait(receiving.service)
    with pytest.raises(Internal, match="the old one serves on"):
        receiving.weights.commit(serving + 1)
    assert receiving.serving == serving
    receiving.check()
    receiving.weights.commit(receiving.prepare())
    receiving.check()


def test_a_failed_end_of_an_update_restores_what_served(receiving: Receiving) -> None:
    """vLLM's finish_weight_update leaves a mixture of two versions in the workers' models, or the new one."""
    serving = receiving.serving
    broken = receiving.prepare()
    receiving.half_loads.touch()
    cause = "as the device tells what went wrong" if receiving.staged else "got no weights"
    with pytest.raises(Internal, match=f"could not load version {broken}; the old one serves on: .*{cause}"):
        receiving.weights.commit(broken)
    receiving.half_loads.unlink()
    assert receiving.serving == serving
    receiving.check()
    receiving.weights.commit(receiving.prepare())
    receiving.check()


def test_what_the_service_keeps_is_what_the_workers_received(receiving: Receiving) -> None:
    """An adapter is merged into the service's copy; and what comes by chunks overtakes what waits on the workers."""
    base = receiving.prepare(model=build_model())
    receiving.weights.commit(base)
    adapted = build_adapted_model(seed=1)
    adapter, tensors = adapter_tensors(adapted, "default")
    receiving.weights.push(WeightPush(base + 1, tensors, base_version=base, adapter=adapter))
    receiving.weights.commit(base + 1)
    receiving.models[base + 1] = adapted
    receiving.check()
    waiting = receiving.prepare()
    overtaking = build_model(seed=803)
    receiving.weights.prepare(waiting + 1, weight_tensors(overtaking))
    receiving.weights.commit(waiting + 1)
    receiving.models[waiting + 1] = overtaking
    receiving.check()
    group = group_of(receiving.service, free_ports(1)[0], ranks=WORKERS)
    with pytest.raises(FailedPrecondition, match="adapter"):
        receiving.weights.push(
            WeightPush(waiting + 2, tensors, base_version=waiting + 1, adapter=adapter, collective=group)
        )
    receiving.weights.commit(receiving.prepare())
    receiving.check()
