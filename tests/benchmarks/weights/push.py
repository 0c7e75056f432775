"""One replica: gRPC against a bare byte stream of the same chunks, shared memory against a memcpy of the same bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from benchmarks.weights.bare import BareClient, BlockingBareClient, bare_server
from benchmarks.weights.figures import Bar, Place, Timing, generation, report, say, syncing
from ppod import GenerationClient, Sampling
from ppod.client import WeightPush, weight_calls
from ppod_trainer.config import CollectiveConfig, WeightTransferConfig
from ppod_trainer.policy_weights import PolicyTensors
from ppod_trainer.push_report import PushReport
from ppod_trainer.weight_sync import WeightSync
from support.processes import ServiceProcess

_PUSH = "push over gRPC, prepared, verified and committed"


def measure_grpc(place: Place) -> bool:
    """Alternate the bare streams and the push, so that all of them meet the same machine."""
    policy = place.subject.load(torch.bfloat16)
    chunks = list(weight_calls.messages(WeightPush(1, PolicyTensors(policy, torch.bfloat16).tensors())))[1:]
    size = sum(map(len, chunks))
    taken: dict[str, list[float]] = {}
    with (
        bare_server() as target,
        generation(place.subject.served("bfloat16"), place) as service,
        syncing([service.admin_target], WeightTransferConfig()) as sync,
        ExitStack() as stack,
    ):
        clients = BareClient(target), BlockingBareClient(target)
        ways: dict[str, Callable[[], float]] = {
            "bare byte stream, grpc.aio": lambda: clients[0].send(chunks),
            "bare byte stream, blocking client": lambda: clients[1].send(chunks),
            _PUSH: lambda: _timed_push(sync, policy)[0],
        }
        backend = "gloo" if place.subject.device == "cpu" else "nccl"
        collective = WeightTransferConfig(plane="collective", collective=CollectiveConfig(backend=backend))
        group = stack.enter_context(syncing([service.admin_target], collective))
        name = f"push by a group's broadcast ({backend}), prepared, verified and committed"
        ways[name] = lambda: _timed_push(group, policy)[0]
        for number in range(place.rounds + 1):
            seconds = {name: send() for name, send in ways.items()}
            say(f"    round {number}: " + ", ".join(f"{value:.3f} s" for value in seconds.values()))
            for name, value in seconds.items() if number else ():
                taken.setdefault(name, []).append(value)
        for client in clients:
            client.close()
    timings = [Timing(name, size, seconds) for name, seconds in taken.items()]
    reference = min(timings[0].median_s, timings[1].median_s)
    bars = [Bar("push over gRPC / the faster bare byte stream", timings[2].median_s / reference, 1.25)]
    return report("grpc", place, timings, bars, {"chunk_bytes": len(chunks[0]), "bytes": size})


def measure_shared(place: Place) -> bool:
    """Alternate memcpy and push, from bfloat16 and from float32 parameters: by mapped files, where the CPU serves, and
    by files that are read."""
    policy, master = place.subject.load(torch.bfloat16), place.subject.load(torch.float32)
    size = sum(parameter.numel() * 2 for parameter in policy.parameters())
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    target = np.zeros_like(source)
    config = WeightTransferConfig(plane="shared", directory=place.shared)
    timings = [Timing("memcpy", size, _rounds(place.rounds, lambda: _timed(lambda: np.copyto(target, source))))]
    bars: list[Bar] = []
    for name in ("mapped", "read") if place.subject.device == "cpu" else ("read",):
        with _replica(place, "bfloat16", [config], mapped=name == "mapped") as (_, (sync,)):
            for kind, model in (("bfloat16", policy), ("float32", master)):
                # Two files are written in turns.
                _timed_push(sync, model)
                _timed_push(sync, model)
                copies: list[float] = []
                pushes: list[float] = []
                for number in range(place.rounds):
                    copies.append(_timed(lambda: np.copyto(target, source)))
                    seconds, done = _timed_push(sync, model)
                    pushes.append(seconds)
                    say(f"    {name}, {kind}, round {number}: {seconds:.3f} s (prepare {done.prepare_s:.3f})")
                timings += [
                    Timing(f"memcpy, beside {name}, {kind}", size, copies),
                    Timing(f"push by a {name} file, from {kind} parameters", size, pushes),
                ]
                if model is policy:
                    ratio = timings[-1].median_s / timings[-2].median_s
                    bars.append(Bar(f"push by a {name} file / memcpy", ratio, 2.0))
    return report("shared", place, timings, bars, {"bytes": size})


def measure_pause(place: Place) -> bool:
    """Push while the service generates without end."""
    policy = place.subject.load(torch.bfloat16)
    parts: list[Timing] = []
    bars: list[Bar] = []
    figures: dict[str, object] = {}
    size = sum(parameter.numel() * 2 for parameter in policy.parameters())
    configs = [
        WeightTransferConfig(pause="keep"),
        WeightTransferConfig(pause="keep", plane="shared", directory=place.shared),
    ]
    with _replica(place, "auto", configs, mapped=True) as (service, syncs):
        for name, sync in zip(("gRPC", "a file"), syncs, strict=True):
            _timed_push(sync, policy)
            with _Generating(service) as load:
                reports = [_while_generating(sync, policy, load) for _ in range(place.rounds)]
            parts.append(Timing(f"push over {name} while it generates", size, [one.prepare_s for one in reports]))
            parts.append(Timing(f"standing still, {name}", size, [max(one.paused_s, 1e-9) for one in reports]))
            share = parts[-1].median_s / parts[-2].median_s
            bars.append(Bar(f"share of the push that decoding stands still, {name}", share, 0.1))
            figures[f"commit_s, {name}"] = [round(one.commit_s, 4) for one in reports]
            figures[f"completions during {name}"] = load.done
    return report("pause", place, parts, bars, figures)


@contextmanager
def _replica(
    place: Place, dtype: str, configs: Sequence[WeightTransferConfig], *, mapped: bool
) -> Generator[tuple[ServiceProcess, list[WeightSync]]]:
    with generation(place.subject.served(dtype), place, map_files=mapped) as service, ExitStack() as stack:
        yield service, [stack.enter_context(syncing([service.admin_target], config)) for config in configs]


class _Generating:
    """Keeps a service busy until the end of the context."""

    def __init__(self, service: ServiceProcess) -> None:
        self._service = service
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.done = 0

    def __enter__(self) -> _Generating:
        self._thread.start()
        time.sleep(1.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        sampling = Sampling(max_tokens=32, ignore_eos=True)
        with GenerationClient(self._service.target, timeout_s=120) as client:
            while not self._stop.is_set():
                self.done += len(client.generate([[1, 2, 3, 4]] * 8, sampling))


def _while_generating(sync: WeightSync, policy: torch.nn.Module, load: _Generating) -> PushReport:
    before = load.done
    done = _timed_push(sync, policy)[1]
    while load.done == before:
        time.sleep(0.01)
    return done


def _timed_push(sync: WeightSync, policy: torch.nn.Module) -> tuple[float, PushReport]:
    version = max(sync.serving_versions()) + 1
    start = time.perf_counter()
    done = sync.push(policy, torch.bfloat16, version)
    return time.perf_counter() - start, done


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _rounds(count: int, measure: Callable[[], float]) -> list[float]:
    measure()
    return [measure() for _ in range(count)]
