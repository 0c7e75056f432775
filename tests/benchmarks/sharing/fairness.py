"""Two teams of equal weight, one offering ten times the load: what the other keeps, and what it waits.

Run as `python -m benchmarks.sharing.fairness` with tests/ on the path; `--quick` for a look. On one server, after a
guess of its capacity, rounds of three runs each:

1. Both teams at five times the guess: the capacity C in tokens a second. Both have work at all times, so equal weights
   mean equal tokens.
2. The steady team at random times with a mean of 0.48 C, and the other team at ten times that rate. A machine that
   others use grows slower and faster by the minute, so every five seconds the steady team asks for 48% of what the
   server did last.
3. The same arrivals of the steady team alone: its latencies without anybody beside it.

The steady team asks for 48% of the capacity because more than half of it can be nobody's right, and because at exactly
half the queue of random arrivals would grow without bound under any scheduler.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.sharing.bench import Bar, Generating, Server, quantile, report, serving
from benchmarks.sharing.load import Call, Load, Stream

STEADY, FLOOD = "steady", "flood"
PART = 0.48
MEAN_TOKENS = 32
LENGTHS = (16, 48)
DEADLINE_S = 60.0
FLOOD_DEADLINE_S = 5.0
BATCHING = {"max_batch_tokens": 1024, "shared_batch_tokens": 64, "max_queue_tokens": 65_536, "catch_up_tokens": 8_192}


@dataclass(frozen=True)
class Run:
    """One run: every call, and the tokens that the model processed for each team."""

    calls: Sequence[Call]
    served: dict[str, float]
    seconds: float

    def latencies(self, team: str) -> list[float]:
        return [call.seconds for call in self.calls if call.team == team and call.code == "OK"]

    def share(self, team: str) -> float:
        return self.served.get(team, 0.0) / sum(self.served.values())

    @property
    def tokens_per_s(self) -> float:
        return sum(self.served.values()) / self.seconds


def together(runs: Sequence[Run]) -> Run:
    """Several runs as if they were one."""
    served: Counter[str] = Counter()
    for run in runs:
        served.update(run.served)
    return Run([call for run in runs for call in run.calls], dict(served), sum(run.seconds for run in runs))


def streams_of(server: Server, rates: dict[str, float], seed: int) -> list[Stream]:
    """A stream of requests a second for each team."""
    return [
        server.stream(
            team,
            requests_per_s=rate,
            sequences=1,
            tokens=LENGTHS,
            deadline_s=DEADLINE_S if team == STEADY else FLOOD_DEADLINE_S,
            seed=10 * (2 * seed + number),
        )
        for number, (team, rate) in enumerate(rates.items())
    ]


def measure(server: Server, seconds: float, streams: Sequence[Stream]) -> Run:
    """Send the requests, and count what is served while they are sent."""
    metrics_url = f"http://127.0.0.1:{server.process.metrics_port}/metrics"
    generating = Generating(Load(server.process.target, seconds, tuple(streams), metrics_url))
    # The queue must fill before shares mean something, and empty again unseen.
    time.sleep(min(5.0, seconds / 4) + 1.0)
    before, start = server.served_tokens(), time.monotonic()
    time.sleep(seconds * 0.7)
    after, taken_s = server.served_tokens(), time.monotonic() - start
    teams = [stream.team for stream in streams]
    served = {team: after[team] - before.get(team, 0.0) for team in teams if team in after}
    return Run(generating.calls(), served, taken_s)


def measure_round(server: Server, seconds: float, half: float, number: int) -> tuple[Run, Run, Run]:
    """Both flood with `half` requests a second each, the steady team alone, and beside the flood."""
    flooded = measure(server, seconds, streams_of(server, {STEADY: half, FLOOD: half}, number))
    rate = PART * flooded.tokens_per_s / MEAN_TOKENS
    steady, flood = streams_of(server, {STEADY: rate, FLOOD: 10 * rate}, number)
    beside = measure(server, seconds, [replace(steady, share=PART), flood])
    times = sorted(call.due_s for call in beside.calls if call.team == STEADY)
    alone = measure(server, seconds, [replace(steady, times=tuple(times))])
    sys.stdout.write(
        f"round {number + 1}: {flooded.tokens_per_s:.0f} tokens/s, {beside.tokens_per_s:.0f} under the flood; "
        f"steady team {beside.share(STEADY):.3f} of these\n"
    )
    sys.stdout.flush()
    return flooded, alone, beside


def plot(out: Path, runs: dict[str, Run]) -> None:
    """Latencies of the steady team, alone and beside the flood, and everybody's tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, run in runs.items():
        latencies = sorted(run.latencies(STEADY))
        if name != "both flood":
            left.plot(latencies, [(index + 1) / len(latencies) for index in range(len(latencies))], label=name)
    left.set(xscale="log", xlabel="latency of the steady team, s", ylabel="part of its requests")
    left.grid(alpha=0.3)
    left.legend()
    names = list(runs)
    for offset, team in ((-0.2, STEADY), (0.2, FLOOD)):
        values = [runs[name].served.get(team, 0.0) / runs[name].seconds for name in names]
        right.bar([index + offset for index in range(len(names))], values, width=0.4, label=team)
    right.set_xticks(range(len(names)), names)
    right.set(ylabel="tokens served a second")
    right.legend()
    figure.tight_layout()
    figure.savefig(out / "fairness.png", dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round: a look, not a measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-sharing"), help="folder of the JSON and the plot")
    options = parser.parse_args(arguments)
    rounds = 1 if options.quick else options.rounds
    with serving([STEADY, FLOOD], BATCHING) as server:
        # Refusals cost compute, too: the capacity is measured under as many requests as the flood will bring.
        guess = measure(server, options.seconds, streams_of(server, {FLOOD: 20.0}, 0)).tokens_per_s
        measured = [measure_round(server, options.seconds, 5 * guess / MEAN_TOKENS, number) for number in range(rounds)]
    flooded, alone, beside = (together(runs) for runs in zip(*measured, strict=True))
    capacity, rate = flooded.tokens_per_s, PART * flooded.tokens_per_s / MEAN_TOKENS
    p99 = {name: quantile(run.latencies(STEADY), 0.99) for name, run in (("alone", alone), ("beside", beside))}
    p50 = {name: quantile(run.latencies(STEADY), 0.50) for name, run in (("alone", alone), ("beside", beside))}
    lost = sum(1 for call in beside.calls if call.team == STEADY and call.code != "OK")
    codes = Counter((call.team, call.code) for call in beside.calls)
    sys.stdout.write(
        f"capacity {capacity:.0f} tokens/s; the steady team sends {rate:.1f} requests/s of {MEAN_TOKENS} tokens\n"
        f"steady team's latency   p50 alone {p50['alone']:.3f} s, beside the flood {p50['beside']:.3f} s\n"
        f"                        p99 alone {p99['alone']:.3f} s, beside the flood {p99['beside']:.3f} s\n"
        f"beside the flood: {', '.join(f'{team} {code} {count}' for (team, code), count in sorted(codes.items()))}\n"
    )
    least = min(flooded.share(STEADY), flooded.share(FLOOD))
    bars = [
        Bar("steady team's part of the tokens beside the flood", beside.share(STEADY), 0.45, at_least=True),
        Bar("its p99 beside the flood over its p99 alone", p99["beside"] / p99["alone"], 2.0, at_least=False),
        Bar("its requests that were not answered with a score", lost, 0, at_least=False),
        Bar("lower part of the tokens where both flood", least, 0.45, at_least=True),
    ]
    figures = {
        "tokens_per_s": capacity,
        "requests_per_s": rate,
        "p50_s": p50,
        "p99_s": p99,
        "seconds": options.seconds,
        "rounds": rounds,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    plot(options.out, {"both flood": flooded, "alone": alone, "beside the flood": beside})
    return report("fairness", options.out, figures, bars)


if __name__ == "__main__":
    sys.exit(main())
