"""Seconds of a batch of episodes whose tools take their time: by one thread, turns together, turns independent.

Run as `python -m benchmarks.episodes.compare` with tests/ on the path. The generation service is the real one, with a
tiny random model, so that tools are nearly all that is waited for; a step of the environment takes 50 ms to 1 s
(`support.waiting`), an episode 1 to 6 turns. Each round plays the same episodes in all three ways, the first one of a
round last in the next. Beside what was measured stands what the tools alone would take that way: all of them in turn,
the slowest of each turn, the slowest episode.

Writes result.json and result.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ppod import GenerationClient
from ppod.tensors import TokenArray
from ppod_models.loading import load_tokenizer
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.config import RolloutConfig
from ppod_trainer.environments import Reply
from ppod_trainer.environments.calls import EnvironmentCalls
from ppod_trainer.environments.loading import LoadedEnvironment
from ppod_trainer.episodes import EpisodeRules, EpisodeSampler, TextCodec
from ppod_trainer.prompts import Prompt
from ppod_trainer.sampling import TurnSampler
from support.copying import save_copying_model
from support.processes import running_service
from support.services import tiny_model_config
from support.waiting import Waiting, WaitingParameters

MOST_TURNS = 6
CONTEXT_TOKENS = 28
PARAMETERS = WaitingParameters(shortest_s=0.05, longest_s=1.0, most_turns=MOST_TURNS)
WAYS = ("one thread", "together", "independent")


class Timed(Waiting):
    """Keeps the seconds of each of its steps."""

    def __init__(self, kept: list[list[float]]) -> None:
        super().__init__(PARAMETERS)
        self._seconds: list[float] = []
        kept.append(self._seconds)

    def step(self, action: str) -> Reply:
        begin = time.perf_counter()
        reply = super().step(action)
        self._seconds.append(time.perf_counter() - begin)
        return reply


@dataclass
class Measured:
    """One way over all rounds: seconds of each batch, and what its tools alone would have taken that way."""

    seconds: list[float] = field(default_factory=list)
    tools_alone: list[float] = field(default_factory=list)


def tools_alone(way: str, steps: Sequence[Sequence[float]]) -> float:
    """Seconds, from those of each episode's steps."""
    if way == "one thread":
        return sum(map(sum, steps))
    if way == "independent":
        return max(map(sum, steps))
    return sum(max(one[turn] for one in steps if turn < len(one)) for turn in range(max(map(len, steps))))


def measure(client: GenerationClient, model_dir: Path, episodes: int, rounds: int) -> dict[str, Measured]:
    """All rounds."""
    tokenizer = load_tokenizer(model_dir)

    def decode(ids: TokenArray) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    codec = TextCodec(lambda text: tokenizer.encode(text, add_special_tokens=False), decode)
    turns = TurnSampler(client, RolloutConfig(max_tokens=4), Timed.stop)
    measured = {way: Measured() for way in WAYS}
    for number in range(rounds):
        seeds = range(number * episodes, (number + 1) * episodes)
        asked = [_prompt(seed, codec) for seed in seeds]
        for way in (*WAYS[number % 3 :], *WAYS[: number % 3]):
            steps: list[list[float]] = []
            calls = EnvironmentCalls(
                LoadedEnvironment(lambda kept=steps: Timed(kept), Timed.stop), 1 if way == "one thread" else episodes
            )
            rules = EpisodeRules(MOST_TURNS, CONTEXT_TOKENS, independent=way == "independent")
            sampler = EpisodeSampler(turns, calls, codec, rules, BadSamples("stop"))
            begin = time.perf_counter()
            rollouts = sampler.sample(asked, seeds, None)
            measured[way].seconds.append(time.perf_counter() - begin)
            measured[way].tools_alone.append(tools_alone(way, steps))
            print(
                f"round {number + 1}, {way}: {len(rollouts)} episodes, {sum(map(len, steps))} turns, "
                f"{measured[way].seconds[-1]:.2f} s (tools alone {measured[way].tools_alone[-1]:.2f})",
                flush=True,
            )
    return measured


def _prompt(seed: int, codec: TextCodec) -> Prompt:
    return Prompt(seed, np.asarray(codec.encode(Waiting(PARAMETERS).reset(seed)), dtype=np.int32))


def table(measured: dict[str, Measured]) -> str:
    """Markdown; ratios are within a round, the median over the rounds."""
    before = measured[WAYS[0]].seconds
    rows = ["| | seconds of a batch | tools alone | of one thread's |", "|---|---:|---:|---:|"]
    for way, one in measured.items():
        ratio = statistics.median(mine / its for mine, its in zip(one.seconds, before, strict=True))
        alone = statistics.median(one.tools_alone)
        rows.append(f"| {way} | {statistics.median(one.seconds):.2f} | {alone:.2f} | {ratio:.3f} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=32, help="of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-episodes"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = save_copying_model(Path(scratch) / "model")
        values = {"model": tiny_model_config(model_dir)}
        with (
            running_service("ppod_services.generation", Path(scratch), values, fresh=True) as service,
            GenerationClient(service.target) as client,
        ):
            measured = measure(client, model_dir, options.episodes, options.rounds)
    shown = table(measured)
    (options.out / "result.md").write_text(shown)
    figures = {way: {"seconds": one.seconds, "tools_alone": one.tools_alone} for way, one in measured.items()}
    (options.out / "result.json").write_text(json.dumps(figures, indent=2))
    print(shown)


if __name__ == "__main__":
    main()
