"""What becomes of callers and processes when the engine breaks, or the service is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ppod import GenerationClient, Sampling, Unavailable
from support.processes import ROOT, environment
from support.vllm_services import engine_processes, require_vllm, running_vllm

SERVICE = "ppod.v1.GenerationService"


def test_a_killed_engine_fails_its_callers_and_ends_the_service(vllm_model_dir: Path, tmp_path: Path) -> None:
    require_vllm()
    with running_vllm(vllm_model_dir, tmp_path) as service:
        seen: list[int] = []
        with grpc.insecure_channel(service.target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            watcher = threading.Thread(target=lambda: seen.extend(_statuses(watch)))
            watcher.start()
            with GenerationClient(service.target) as client:
                stream = client.stream([[5] * 236, [6]], Sampling(max_tokens=256, ignore_eos=True))
                assert next(stream).index == 0
                processes = engine_processes(service.process.pid)
                engine = next(process for process in processes if process.children())
                engine.kill()
                with pytest.raises(Unavailable, match="engine"):
                    next(stream)
            watcher.join(30)
            assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
        assert service.wait(60) == 1
        assert '"event": "broken"' in service.stderr
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive


def _statuses(watch: object) -> list[int]:
    found: list[int] = []
    try:
        for reply in watch:  # pyright: ignore
            found.append(reply.status)
            if reply.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
    except grpc.RpcError:
        pass
    return found


def test_a_failed_load_restores_the_old_weights_and_no_process_outlives_its_service(
    vllm_model_dir: Path, tmp_path: Path
) -> None:
    require_vllm()
    with (tmp_path / "stderr").open("wb") as stderr:
        probe = subprocess.Popen(
            [sys.executable, "-m", "integration.vllm.failed_loads", str(vllm_model_dir)],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    try:
        assert probe.stdout is not None
        line = probe.stdout.readline()
        assert line, (tmp_path / "stderr").read_text()
        found = json.loads(line)
        # Version 0 comes from the checkpoint again, version 1 from what was pushed.
        for version, before, error, after in found["attempts"]:
            assert after == before, version
            assert "the old one serves on" in error
        assert [attempt[0] for attempt in found["attempts"]] == [0, 1]
        assert found["attempts"][0][1] != found["attempts"][1][1]
        processes = engine_processes(probe.pid)
        assert processes
    finally:
        os.kill(probe.pid, signal.SIGKILL)
        probe.wait(10)
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not alive
