"""Tokens a second through gRPC over the same engine driven in process, on the same prompts.

usage: python -m benchmarks.generation.compare [--backend NAME] [--model SOURCE] [--device NAME] [--rounds N]
    [--dtype NAME] [--threads N] [--only TEXT] [--out DIR]

One engine runs in a process of its own, the other behind the service; while one works the other sleeps. Each round runs
every workload on both, in turns, the first one of a round second in the next. Both decode at most 32 sequences at a
time, and get the same seeds: how many completions come out alike is shown. Where the engine can, it is also run without
letting sequences join a batch that runs, which is what generation by whole batches gives.

Writes result.json and result.md; exits 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.generation.backends import BACKENDS, VLLM_VALUES, Backend, Engine, running_engine
from benchmarks.generation.workloads import BATCH, Workload, workloads
from benchmarks.subject import add_arguments, subject_of
from ppod import AsyncGenerationClient, Sampling
from support.processes import ServiceProcess, running_service

BAR = 0.97


@dataclass
class Measured:
    """One workload over all rounds.

    Attributes:
        service_s: seconds through gRPC.
        engine_s: seconds in process.
        whole_batches_s: seconds in process, where nobody joins a batch that runs.
        steps: of the engine.
        alike: share of the completions that are the same through gRPC and in process.
    """

    name: str
    tokens: int
    static_steps: int
    service_s: list[float] = field(default_factory=list[float])
    engine_s: list[float] = field(default_factory=list[float])
    whole_batches_s: list[float] = field(default_factory=list[float])
    steps: int = 0
    alike: float = 1.0

    @property
    def ratio(self) -> float:
        """Tokens a second through gRPC over those in process: the median over the rounds."""
        pairs = zip(self.service_s, self.engine_s, strict=True)
        return statistics.median(engine / service for service, engine in pairs)

    def speed(self, seconds: list[float]) -> float:
        """Tokens a second, the median over the rounds."""
        return self.tokens / statistics.median(seconds) if seconds else float("nan")


def ask(service: ServiceProcess, workload: Workload) -> tuple[float, list[list[int]]]:
    """Send all requests at once; seconds until the last completion, and the tokens of each."""

    async def all_requests() -> tuple[float, list[list[int]]]:
        async with AsyncGenerationClient(service.target, timeout_s=1_800) as client:
            # Its channel is open, as a trainer's is.
            await client.describe()
            begin = time.perf_counter()
            answers = await asyncio.gather(
                *(
                    client.generate(
                        [one.prompt for one in request],
                        Sampling(max_tokens=request[0].max_tokens, ignore_eos=True),
                        seeds=[one.seed for one in request],
                    )
                    for request in workload.requests
                )
            )
            seconds = time.perf_counter() - begin
        return seconds, [done.token_ids.tolist() for answer in answers for done in answer]

    return asyncio.run(all_requests())


def measure_round(
    number: int, backend: Backend, service: ServiceProcess, engine: Engine, results: dict[str, Measured]
) -> None:
    """Every workload once on each side."""
    known = workloads()
    for name, measured in results.items():
        workload = known[name]
        if number % 2:
            reply = engine.run(name)
            seconds, tokens = ask(service, workload)
        else:
            seconds, tokens = ask(service, workload)
            reply = engine.run(name)
        measured.service_s.append(seconds)
        measured.engine_s.append(reply["seconds"])
        measured.steps = reply["steps"]
        same = sum(mine == theirs for mine, theirs in zip(tokens, reply["tokens"], strict=True))
        measured.alike = min(measured.alike, same / len(tokens))
        if backend.joins and len(workload.wanted) > BATCH:
            measured.whole_batches_s.append(engine.run(name, joins=False)["seconds"])
        print(
            f"  {name}: {workload.tokens / seconds:.1f} tokens/s through gRPC, "
            f"{workload.tokens / reply['seconds']:.1f} in process",
            flush=True,
        )


def table(results: dict[str, Measured], heading: str) -> str:
    """Markdown."""
    rows = [
        heading,
        "",
        "| workload | through gRPC, tokens/s | in process, tokens/s | ratio | whole batches, tokens/s | steps "
        "| steps of whole batches | alike |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results.values():
        whole = f"{one.speed(one.whole_batches_s):.1f}" if one.whole_batches_s else ""
        rows.append(
            f"| {one.name} | {one.speed(one.service_s):.1f} | {one.speed(one.engine_s):.1f} | {one.ratio:.3f} "
            f"| {whole} | {one.steps} | {one.static_steps} | {one.alike:.2f} |"
        )
    return "\n".join(rows) + "\n"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=list(BACKENDS), default="transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", metavar="TEXT", help="workloads whose names hold this")
    parser.add_argument("--vllm", default="{}", metavar="JSON", help="more of the service's section `vllm`")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-generation"))
    add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    """Measure, write, judge."""
    options = parse()
    backend = BACKENDS[options.backend]
    subject = subject_of(options)
    model = {**subject.served(options.dtype), "attention": options.attention, "threads": options.threads}
    if options.backend == "vllm":
        # It has one kind of device, by how it was built.
        model["device"] = "auto"
    batching = {"max_batch_size": BATCH, "max_batch_tokens": 2**20, "max_queue_tokens": 2**20, "max_batch_s": 3_600}
    values: dict[str, object] = {"model": model, "batching": batching, **backend.values}
    if options.backend == "vllm":
        values["vllm"] = {**VLLM_VALUES, **json.loads(options.vllm)}
    chosen = {name: one for name, one in workloads().items() if options.only in name}
    results = {name: Measured(name, one.tokens, one.static_steps) for name, one in chosen.items()}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_engine(backend, values) as engine,
        running_service("ppod_services.generation", Path(folder), values, fresh=True, start_timeout_s=600) as service,
    ):
        first = next(iter(chosen.values()))
        engine.run(first.name)
        ask(service, first)
        for number in range(1, options.rounds + 1):
            print(f"round {number} of {options.rounds}", flush=True)
            measure_round(number, backend, service, engine, results)
    heading = (
        f"{options.backend}, {Path(subject.source).name}, "
        f"{subject.machine() or platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.threads} "
        f"thread(s), {options.dtype}, at most {BATCH} sequences at a time; medians of {options.rounds} rounds"
    )
    misses = [
        f"{one.name}: {one.ratio:.3f} of the engine's tokens a second, bar {BAR}"
        for one in results.values()
        if one.ratio < BAR
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    shown = table(results, heading)
    (options.out / "result.md").write_text(shown)
    record = {"setting": heading, "results": [asdict(one) for one in results.values()], "misses": misses}
    (options.out / "result.json").write_text(json.dumps(record, indent=2))
    print(shown)
    for miss in misses:
        print(f"missed: {miss}")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
