"""Ten times the sustainable load: memory, goodput, and what callers are told.

Run as `python -m benchmarks.sharing.overload` with tests/ on the path; `--quick` for a look. On one server:

1. A guess of the capacity, then the peak: goodput under one and a half times the guess.
2. Ten times the peak for `--seconds`. Half of the refused callers come back once, when they were told to; their second
   calls come on top.
3. The peak again. A machine that others use grows slower and faster: 2 is held against the mean of 1 and 3.

Goodput counts the tokens of calls that were answered with scores within their deadline.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.sharing.bench import Bar, Generating, Server, quantile, report, serving
from benchmarks.sharing.load import Call, Load

TEAM = "all"
MEAN_TOKENS = 32
LENGTHS = (16, 48)
DEADLINE_S = 5.0
BATCHING = {"max_batch_tokens": 512, "max_queue_tokens": 65_536}
ANSWERS = ("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
OBEYS = 0.5
RAMP = 0.25
"""Part of each run, at its start, in which the queue fills; it is not counted."""


@dataclass(frozen=True)
class Run:
    """One run: its calls, and the server's resident memory twice a second."""

    seconds: float
    calls: Sequence[Call]
    rss_mib: Sequence[tuple[float, float]]

    def goodput(self) -> float:
        """Tokens a second of calls that got their scores, by the time of the answer."""
        start_s = RAMP * self.seconds
        answered = [call for call in self.calls if start_s <= call.due_s + call.seconds < self.seconds]
        return sum(call.tokens for call in answered if call.code == "OK") / (self.seconds - start_s)

    def codes(self) -> Counter[str]:
        return Counter(call.code for call in self.calls)

    def memory_mib(self, start: float, end: float) -> float:
        """Most resident memory in a part of the run."""
        return max(mib for at_s, mib in self.rss_mib if start * self.seconds <= at_s <= end * self.seconds)


def measure(server: Server, seconds: float, requests_per_s: float, obeys: float) -> Run:
    """Send requests of one sequence at this rate, and watch the server's memory."""
    stream = server.stream(
        TEAM,
        requests_per_s=requests_per_s,
        sequences=1,
        tokens=LENGTHS,
        deadline_s=DEADLINE_S,
        obeys=obeys,
        seed=int(requests_per_s),
    )
    generating = Generating(Load(server.process.target, seconds, (stream,)))
    start_s, rss_mib = time.monotonic(), [(0.0, server.rss_mib())]
    while generating.running:
        time.sleep(0.5)
        rss_mib.append((time.monotonic() - start_s, server.rss_mib()))
    return Run(seconds, generating.calls(), rss_mib)


def plot(out: Path, run: Run, peak: float) -> None:
    """Goodput and refusals by the second, and memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    seconds = range(int(run.seconds))
    good, refused = [0.0] * len(seconds), [0.0] * len(seconds)
    for call in run.calls:
        at = int(call.due_s + call.seconds)
        if at < len(seconds):
            (good if call.code == "OK" else refused)[at] += call.tokens
    left.plot(seconds, refused, label="refused", color="tab:red", alpha=0.5)
    left.plot(seconds, good, label="answered with scores", color="tab:green")
    left.axhline(peak, label="peak goodput", color="black", linestyle="--")
    left.set(xlabel="s", ylabel="tokens a second", yscale="log")
    left.legend()
    right.plot(*zip(*run.rss_mib, strict=True))
    right.set(xlabel="s", ylabel="resident memory of the server, MiB", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(out / "overload.png", dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload")
    parser.add_argument("--times", type=float, default=10.0, help="overload, in sustainable loads")
    parser.add_argument("--quick", action="store_true", help="15 seconds: a look, not a measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-sharing"), help="folder of the JSON and the plot")
    options = parser.parse_args(arguments)
    seconds = 15.0 if options.quick else options.seconds
    with serving([TEAM], BATCHING) as server:
        guess = measure(server, min(seconds, 20.0), 20.0, obeys=0.0).goodput()
        sustainable = measure(server, min(seconds, 40.0), 1.5 * guess / MEAN_TOKENS, obeys=0.0)
        peak = sustainable.goodput()
        overload = measure(server, seconds, options.times * peak / MEAN_TOKENS, obeys=OBEYS)
        again = measure(server, min(seconds, 40.0), 1.5 * guess / MEAN_TOKENS, obeys=0.0).goodput()
        healthy = measure(server, 5.0, 0.3 * peak / MEAN_TOKENS, obeys=0.0)
    codes = overload.codes()
    returned = [call for call in overload.calls if call.attempt == 1]
    got_in = sum(1 for call in returned if call.code == "OK") / max(1, len(returned))
    refused = [call.seconds for call in overload.calls if call.code == "RESOURCE_EXHAUSTED" and call.attempt == 0]
    before_mib = sustainable.memory_mib(0.0, 1.0)
    growth_mib = overload.memory_mib(0.5, 1.0) - overload.memory_mib(RAMP, 0.5)
    sys.stdout.write(
        f"peak goodput {peak:.0f} tokens/s before, {again:.0f} after; overload of "
        f"{len(overload.calls) / seconds:.0f} requests/s\n"
        f"answers: {', '.join(f'{code} {count}' for code, count in sorted(codes.items()))}\n"
        f"a refusal takes p50 {1e3 * quantile(refused, 0.5):.1f} ms, p99 {1e3 * quantile(refused, 0.99):.1f} ms\n"
        f"of those who came back when told to, {100 * got_in:.0f}% got in ({len(returned)} did)\n"
        f"memory {before_mib:.0f} MiB at the sustainable load, {overload.memory_mib(0, 1):.0f} MiB at most\n"
    )
    others = sum(count for code, count in codes.items() if code not in ANSWERS)
    late = codes["DEADLINE_EXCEEDED"] / len(overload.calls)
    bars = [
        Bar("goodput under overload over the peak", 2 * overload.goodput() / (peak + again), 0.9, at_least=True),
        Bar("MiB more than at the sustainable load", overload.memory_mib(0, 1) - before_mib, 256, at_least=False),
        Bar("MiB more in the second half than in the first", growth_mib, 32, at_least=False),
        Bar("calls with any other answer than OK or a refusal", others, 0, at_least=False),
        Bar("part of the calls that ran into their deadline", late, 0.02, at_least=False),
        Bar("calls afterwards that were not served", len(healthy.calls) - healthy.codes()["OK"], 0, at_least=False),
    ]
    figures = {
        "peak_tokens_per_s": peak,
        "peak_again_tokens_per_s": again,
        "overload_tokens_per_s": overload.goodput(),
        "codes": dict(codes),
        "came_back_and_got_in": got_in,
        "refusal_p50_s": quantile(refused, 0.5),
        "seconds": seconds,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    plot(options.out, overload, peak)
    return report("overload", options.out, figures, bars)


if __name__ == "__main__":
    sys.exit(main())
