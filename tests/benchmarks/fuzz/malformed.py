"""Malformed requests against real services: typed errors only, and good requests between them answered as ever.

    PYTHONPATH=protos:services:tests python -m benchmarks.fuzz.malformed --requests 100000

prints a table of codes and exits with 1 on the first kinds of violation: a code or an error without its details that no
caller can act on, a good request whose answer changed by a bit, a service that grew or is not healthy at the end.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.fuzz.attacks import (
    LOGPROBS,
    REFERENCE,
    REWARD,
    SCORE,
    Attack,
    attack,
    good_logprobs,
    good_score,
    good_texts,
)
from ppod.errors import InvalidArgument, PpodError, from_rpc_error
from ppod.v1 import reference_pb2, reward_pb2
from support.processes import ServiceProcess, running_service

ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"}
RSS_GROWTH_BYTES = 192 * 1024 * 1024
_BATCH = 48
_TIMEOUT_S = 60.0
_SHOWN = 20


@dataclass
class Report:
    """What came of a run: counts by (kind, code), and every violation in words."""

    codes: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    violations: list[str] = field(default_factory=list[str])
    good_requests: int = 0
    rss_growth_bytes: dict[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0

    def table(self) -> str:
        """Counts as lines of text."""
        kinds = sorted({kind for kind, _ in self.codes})
        codes = sorted({code for _, code in self.codes})
        head = f"{'':<18}" + "".join(f"{code:>21}" for code in codes)
        lines = [f"{kind:<18}" + "".join(f"{self.codes[kind, code]:>21}" for code in codes) for kind in kinds]
        total = f"{'all':<18}" + "".join(f"{sum(self.codes[kind, code] for kind in kinds):>21}" for code in codes)
        return "\n".join([head, *lines, total])


class _Service:
    """One service under attack."""

    def __init__(self, process: ServiceProcess) -> None:
        self.process = process
        # The client's own limit would keep the largest requests from ever reaching the server.
        self.channel = grpc.insecure_channel(process.target, options=[("grpc.max_send_message_length", -1)])
        self.rss_before = 0

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        status = Path(f"/proc/{self.process.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    def send(self, method: str, payload: bytes) -> grpc.Future:
        return self.channel.unary_unary(method, None, None).future(payload, timeout=_TIMEOUT_S)

    def healthy(self) -> bool:
        reply = health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        return reply.status == health_pb2.HealthCheckResponse.SERVING


class Fuzzer:
    """Sends attacks in batches, and good requests alone between them, whose answers must stay equal to the bit.

    A good request goes alone because who shares its batch may change the last bits of its result.
    """

    def __init__(self, reward: ServiceProcess, reference: ServiceProcess, seed: int) -> None:
        self._services = {REWARD: _Service(reward), REFERENCE: _Service(reference)}
        self._seed = seed
        self._report = Report()
        rng = random.Random(seed)
        composed = good_score(rng)
        composed.selector.model = "sum"
        self._good = [
            (REWARD, SCORE, good_score(rng).SerializeToString()),
            (REWARD, SCORE, composed.SerializeToString()),
            (REWARD, SCORE, good_texts(rng).SerializeToString()),
            (REFERENCE, LOGPROBS, good_logprobs(rng).SerializeToString()),
        ]
        self._answers = [self._answer(*request) for request in self._good]

    def run(self, requests: int, warm_up: int) -> Report:
        """Send so many attacks; memory counts from the end of the warm-up on."""
        start = time.monotonic()
        for first in range(0, requests, _BATCH):
            if first >= warm_up:
                for service in self._services.values():
                    service.rss_before = service.rss_before or service.rss_bytes()
            batch = [attack(self._seed, number) for number in range(first, min(requests, first + _BATCH))]
            futures = [self._services[each.service].send(each.method, each.payload) for each in batch]
            for number, (each, future) in enumerate(zip(batch, futures, strict=True), start=first):
                self._judge(number, each, future)
            self._check_good(first)
        for name, service in self._services.items():
            self._check_service(name, service)
            service.channel.close()
        self._report.seconds = time.monotonic() - start
        return self._report

    def _judge(self, number: int, sent: Attack, future: grpc.Future) -> None:
        code, fault = "OK", ""
        try:
            future.result()
        except grpc.RpcError as error:
            code = error.code().name  # pyright: ignore
            fault = _fault(sent, from_rpc_error(error), error)  # pyright: ignore
        self._report.codes[sent.kind, code] += 1
        if fault:
            head = sent.payload[:40].hex()
            self._report.violations.append(
                f"seed {self._seed}, request {number} ({sent.kind}, {sent.method}, {len(sent.payload)} bytes: {head}): "
                f"{code}: {fault}"
            )

    def _check_good(self, number: int) -> None:
        for request, expected in zip(self._good, self._answers, strict=True):
            self._report.good_requests += 1
            try:
                found = self._answer(*request)
            except grpc.RpcError as error:
                self._report.violations.append(f"after request {number} a good request failed: {from_rpc_error(error)}")
                continue
            if found != expected:
                self._report.violations.append(f"after request {number} the answer to {request[1]} changed")

    def _answer(self, service: str, method: str, payload: bytes) -> bytes:
        data: bytes = self._services[service].send(method, payload).result()
        if service == REWARD:
            return reward_pb2.ScoreResponse.FromString(data).scores
        return reference_pb2.ComputeLogprobsResponse.FromString(data).logprobs

    def _check_service(self, name: str, service: _Service) -> None:
        if not service.healthy():
            self._report.violations.append(f"{name} is not healthy at the end")
        growth = service.rss_bytes() - service.rss_before
        self._report.rss_growth_bytes[name] = growth
        if growth > RSS_GROWTH_BYTES:
            self._report.violations.append(f"{name} grew by {growth / 2**20:.0f} MiB")
        if "call_broke" in service.process.stderr:
            self._report.violations.append(f"{name} logged a call that broke inside")


def _fault(sent: Attack, typed: PpodError, error: grpc.Call) -> str:
    """What is wrong with an error; empty where it is as it must be."""
    code = error.code().name
    if code not in ALLOWED:
        return f"not a code for a caller's mistake: {error.details()}"
    if code == "UNIMPLEMENTED":
        return "" if sent.kind == "wrong methods" else f"the method exists: {error.details()}"
    if code == "RESOURCE_EXHAUSTED" and "larger than max" in (error.details() or ""):
        return ""
    if isinstance(typed, InvalidArgument) and (not typed.field or not typed.expected):
        return "an error that does not say what was expected where"
    if typed.code.name != code:
        return f"without the details of a typed error: {error.details()}"
    return ""


def main() -> int:
    """Start both services with a tiny model, fuzz them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ppod-fuzz-")))
        reward, reference = start_services(stack, directory)
        report = Fuzzer(reward, reference, arguments.seed).run(arguments.requests, warm_up=arguments.requests // 10)
    print(report.table())
    growth = ", ".join(f"{name} {size / 2**20:+.1f} MiB" for name, size in report.rss_growth_bytes.items())
    print(
        f"{arguments.requests} malformed requests and {report.good_requests} good ones in {report.seconds:.0f} s; "
        f"memory: {growth}; violations: {len(report.violations)}"
    )
    for violation in report.violations[:_SHOWN]:
        print(violation)
    return 1 if report.violations else 0


def start_services(stack: ExitStack, directory: Path) -> tuple[ServiceProcess, ServiceProcess]:
    """A reward service with models, functions and what is composed of them, and a reference; all on a tiny model."""
    from support.services import tiny_model_config  # noqa: PLC0415
    from support.tiny_head import save_tiny_head  # noqa: PLC0415
    from support.tiny_model import save_tiny_model  # noqa: PLC0415

    model_dir = save_tiny_model(directory / "model")
    heads = [str(save_tiny_head(model_dir, directory / f"head{seed}", name=f"h{seed}", seed=seed)) for seed in (0, 1)]
    model = tiny_model_config(model_dir)
    limits = {"max_request_sequences": 16}
    rewards = [
        {"name": "first", "model": model, "head": heads[0]},
        {"name": "second", "model": model, "head": heads[1], "normalization": {"mean": 0.5, "std": 2.0}},
        {"name": "length", "kind": "function", "function": "length", "parameters": {"maximum": 3}},
        {"name": "answer", "kind": "function", "function": "exact_answer"},
        {"name": "ensemble", "kind": "ensemble", "members": ["first", "second"], "pessimism": 0.5},
        {"name": "sum", "kind": "sum", "terms": [{"reward": "ensemble", "weight": 2.0}, {"reward": "length"}]},
    ]
    reward = {"rewards": rewards, "limits": limits}
    reference = {"model": model, "limits": limits}
    return (
        stack.enter_context(running_service("ppod_services.reward", directory, reward, admin=False)),
        stack.enter_context(running_service("ppod_services.reference", directory, reference, admin=False)),
    )


if __name__ == "__main__":
    sys.exit(main())
