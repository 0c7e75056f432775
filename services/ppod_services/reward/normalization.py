"""`python -m ppod_services.reward.normalization --config FILE --texts FILE [--reward NAME]`.

Measures what puts a reward's scores on a common scale: mean and standard deviation of its raw scores over reference
samples. Prints the section to paste into the reward's configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import yaml

from ppod.errors import PpodError
from ppod.tensors import FloatArray
from ppod_models.configuration import ConfigError, add_config_option, load_config
from ppod_models.ending import exit_now
from ppod_models.sources import ModelSourceError
from ppod_services.core.callers import ANONYMOUS_CALLER
from ppod_services.core.metrics import ServiceMetrics
from ppod_services.core.server import Host
from ppod_services.reward.config import RewardServiceConfig
from ppod_services.reward.rewards import RewardSet
from ppod_services.reward.samples import ChatContent, Content, Query, Sample, TextContent, Truncation, Turn
from ppod_services.reward.service import RewardService

_BATCH = 64
_BATCH_DEADLINE_S = 3_600.0
_FEWEST = 2


@dataclass(frozen=True, slots=True)
class Measurement:
    """Mean and standard deviation (divided by the number) of raw scores, in float64."""

    samples: int
    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Reference:
    """One reference sample: what is scored, and the answer to hold it against."""

    content: Content
    answer: str | None = None


class ReferenceFileError(Exception):
    """A file of reference samples cannot be used."""


def read_references(path: Path) -> list[Reference]:
    """Reference samples of a file: one text a line, or in a .jsonl file one object a line.

    Objects have "text", perhaps with "prompt" and "reference"; or "messages" with "role" and "content" each.

    Raises:
        ReferenceFileError: it cannot be read, a line is not as described, or there are fewer than two.
    """
    try:
        # Not `splitlines`, which ends a line at separators that texts hold themselves, as U+2028.
        numbered = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
        lines = {number: line for number, line in numbered if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise ReferenceFileError(f"{path}: {error}") from error
    if len(lines) < _FEWEST:
        raise ReferenceFileError(f"{path}: found {len(lines)} samples, expected at least {_FEWEST}")
    if path.suffix != ".jsonl":
        return [Reference(TextContent("", line)) for line in lines.values()]
    found: list[Reference] = []
    for number, line in lines.items():
        try:
            found.append(_read_object(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = 'an object with "text" or "messages"'
            raise ReferenceFileError(f"{path}: line {number}: {error!r}, expected {expected}") from error
    return found


async def measure(config: RewardServiceConfig, name: str, references: Sequence[Reference]) -> Measurement:
    """Score the samples by a reward as it is before its own adjustment.

    Raises:
        ModelSourceError: a model cannot be loaded. PpodError: the reward fails for a sample.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
    service = RewardService(config, Host(executor, ServiceMetrics()))
    await asyncio.get_running_loop().run_in_executor(executor, service.load)
    worker = asyncio.ensure_future(service.run())
    try:
        parts = [
            await _raw_scores(service.rewards.get(), name, references[start : start + _BATCH], start)
            for start in range(0, len(references), _BATCH)
        ]
    finally:
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
        executor.shutdown()
    scores = np.concatenate(parts).astype(np.float64)
    return Measurement(len(scores), float(scores.mean()), float(scores.std()))


def section(measured: Measurement) -> str:
    """The YAML to paste: to six digits of the deviation, which is more than a few thousand samples tell."""
    places = 5 - math.floor(math.log10(measured.std))
    values = {"normalization": {"mean": round(measured.mean, places), "std": round(measured.std, places)}}
    return yaml.safe_dump(values, default_flow_style=None, sort_keys=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0; 1 a reward failed; 2 the configuration or the file is wrong."""
    parser = argparse.ArgumentParser(prog="python -m ppod_services.reward.normalization", description=__doc__)
    add_config_option(parser)
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="reference samples, .txt or .jsonl")
    parser.add_argument("--reward", default="", metavar="NAME", help="the reward to measure; the first by default")
    options = parser.parse_args(arguments)
    try:
        config = load_config(RewardServiceConfig, *options.config)
        references = read_references(options.texts)
        measured = asyncio.run(measure(config, options.reward, references))
    except (ConfigError, ReferenceFileError) as error:
        _fail(2, str(error))
    except (ModelSourceError, PpodError) as error:
        _fail(1, str(error))
    else:
        if not measured.std:
            _fail(1, f"all {measured.samples} samples have the score {measured.mean:g}: there is no scale in them")
        sys.stdout.write(f"# raw scores of {measured.samples} samples\n{section(measured)}")
        exit_now(0)


async def _raw_scores(rewards: RewardSet, name: str, references: Sequence[Reference], first: int) -> FloatArray:
    config = rewards.select(name)
    samples = tuple(
        Sample(first + index, reference.content, reference.answer) for index, reference in enumerate(references)
    )
    query = Query(samples, Truncation.NONE, ANONYMOUS_CALLER, time.monotonic() + _BATCH_DEADLINE_S)
    scored = await rewards.score(config, query)
    return scored.scores if scored.raw is None else scored.raw


def _read_object(value: dict[str, object]) -> Reference:
    answer = value.get("reference")
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages are empty or no list")
        turns = tuple(Turn(_text(one, "role"), _text(one, "content")) for one in messages)  # pyright: ignore
        content: Content = ChatContent(turns)
    else:
        content = TextContent(_text({"prompt": "", **value}, "prompt"), _text(value, "text"))
    # A number is as good an answer as its digits.
    return Reference(content, None if answer is None else str(answer))


def _text(values: dict[str, object], key: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is {value!r}, no text")
    return value


def _fail(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"ppod reward normalization: {message}\n")
    exit_now(code)


if __name__ == "__main__":
    main()
