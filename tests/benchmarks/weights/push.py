"""One replica: gRPC against a bare byte stream of the same chunks, shared memory against a memcpy of the same bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import numpy as np
import torch

from benchmarks.weights.bare import BareClient, BlockingBareClient, bare_server
from benchmarks.weights.figures import Bar, Place, Timing, generation, report, say, syncing
from ppod import GenerationClient, Sampling
from ppod.client import WeightPush, weight_calls
from ppod_trainer.config import CollectiveConfig, WeightTransferConfig
from ppod_trainer.policy_weights import PolicyTensors
from ppod_trainer.weight_sync import PushReport, WeightSync
from support.processes import ServiceProcess


def measure_grpc(place: Place) -> bool:
    """Alternate the bare streams and the push, so that all of them meet the same machine."""
    policy = place.subject.load(torch.bfloat16)
    chunks = list(weight_calls.messages(WeightPush(1, PolicyTensors(policy, torch.bfloat16).tensors())))[1:]
    size = sum(map(len, chunks))
    bare: list[float] = []
    blocking: list[float] = []
    pushes: list[float] = []
    broadcasts: list[float] = []
    with bare_server() as target, generation(place.subject.served("bfloat16"), place) as service:
        clients = BareClient(target), BlockingBareClient(target)
        replica = [service.admin_target]
        collective = WeightTransferConfig(plane="collective", collective=CollectiveConfig(backend="gloo"))
        with syncing(replica, WeightTransferConfig()) as sync, syncing(replica, collective) as group:
            for number in range(place.rounds + 1):
                seconds = (
                    clients[0].send(chunks),
                    clients[1].send(chunks),
                    _timed_push(sync, policy)[0],
                    _timed_push(group, policy)[0],
                )
                if number:
                    for kept, value in zip((bare, blocking, pushes, broadcasts), seconds, strict=True):
                        kept.append(value)
                say("    round {}: bare {:.3f} s, blocking {:.3f}, push {:.3f}, gloo {:.3f}".format(number, *seconds))
        for client in clients:
            client.close()
    timings = [
        Timing("bare byte stream, grpc.aio", size, bare),
        Timing("bare byte stream, blocking client", size, blocking),
        Timing("push over gRPC, prepared, verified and committed", size, pushes),
        Timing("push by a group's broadcast (gloo), prepared, verified and committed", size, broadcasts),
    ]
    reference = min(timings[0].median_s, timings[1].median_s)
    bars = [Bar("push over gRPC / the faster bare byte stream", timings[2].median_s / reference, 1.25)]
    return report("grpc", place, timings, bars, {"chunk_bytes": len(chunks[0]), "bytes": size})


def measure_shared(place: Place) -> bool:
    """Alternate memcpy and push, by mapped and by copied files, from bfloat16 and from float32 parameters."""
    policy = place.subject.load(torch.bfloat16)
    size = sum(parameter.numel() * 2 for parameter in policy.parameters())
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    target = np.zeros_like(source)
    config = WeightTransferConfig(plane="shared", directory=place.shared)
    timings = [Timing("memcpy", size, _rounds(place.rounds, lambda: _timed(lambda: np.copyto(target, source))))]
    for name, mapped in (("mapped", True), ("copied", False)):
        with (
            generation(place.subject.served("bfloat16"), place, map_files=mapped) as service,
            syncing([service.admin_target], config) as sync,
        ):
            _timed_push(sync, policy)
            _timed_push(sync, policy)
            copies: list[float] = []
            pushes: list[float] = []
            for number in range(place.rounds):
                copies.append(_timed(lambda: np.copyto(target, source)))
                seconds, done = _timed_push(sync, policy)
                pushes.append(seconds)
                say(f"    {name}, round {number}: {seconds:.3f} s (prepare {done.prepare_s:.3f})")
            timings += [
                Timing(f"memcpy, beside {name}", size, copies),
                Timing(f"push by a {name} file, prepared, verified and committed", size, pushes),
            ]
    master = place.subject.load(torch.float32)
    with (
        generation(place.subject.served("bfloat16"), place, map_files=True) as service,
        syncing([service.admin_target], config) as sync,
    ):
        _timed_push(sync, master)
        _timed_push(sync, master)
        pushes = _rounds(place.rounds, lambda: _timed_push(sync, master)[0])
        timings.append(Timing("push by a mapped file, from float32 parameters", size, pushes))
    bars = [
        Bar("push by a mapped file / memcpy", timings[2].median_s / timings[1].median_s, 2.0),
        Bar("push by a copied file / memcpy", timings[4].median_s / timings[3].median_s, 2.0),
    ]
    return report("shared", place, timings, bars, {"bytes": size})


def measure_pause(place: Place) -> bool:
    """Push while the service generates without end."""
    policy = place.subject.load(torch.bfloat16)
    parts: list[Timing] = []
    bars: list[Bar] = []
    figures: dict[str, object] = {}
    size = sum(parameter.numel() * 2 for parameter in policy.parameters())
    for name, config in (
        ("gRPC", WeightTransferConfig(pause="keep")),
        ("mapped file", WeightTransferConfig(pause="keep", plane="shared", directory=place.shared)),
    ):
        with _replica(place, "auto", config, mapped=True) as (service, sync):
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
    place: Place, dtype: str, config: WeightTransferConfig, *, mapped: bool
) -> Generator[tuple[ServiceProcess, WeightSync]]:
    with (
        generation(place.subject.served(dtype), place, map_files=mapped) as service,
        syncing([service.admin_target], config) as sync,
    ):
        yield service, sync


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
