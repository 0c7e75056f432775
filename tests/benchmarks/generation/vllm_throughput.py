"""Tokens a second through gRPC against the same vLLM engine driven in process, on the same prompts.

Run in an environment with vLLM: `python -m benchmarks.generation.vllm_throughput [--rounds 3] [--passes 4]`. Each round
starts the service, runs its passes, stops it, and then does the same with a bare AsyncLLM of the same engine arguments.
The first pass after a start is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ppod import GenerationClient, Sampling
from ppod_models.configuration import parse_config
from ppod_models.sources import resolve
from ppod_services.generation.config import GenerationServiceConfig
from support.processes import ROOT, environment, running_service

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 20, 64


def values(source: str) -> dict[str, object]:
    """The service's configuration: as it comes, in float32."""
    return {
        "model": {"source": source, "device": "cpu", "dtype": "float32"},
        "backend": "vllm",
        "vllm": {"max_model_len": 512},
        "batching": {"max_batch_size": PROMPTS},
    }


def prompts() -> list[list[int]]:
    """The same random prompts for all."""
    generator = np.random.default_rng(0)
    return generator.integers(100, 40_000, size=(PROMPTS, PROMPT_TOKENS)).tolist()


def through_grpc(source: str, passes: int) -> list[float]:
    """Tokens a second of each pass through the service."""
    sampling = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True)
    rates: list[float] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        running_service(
            "ppod_services.generation", Path(directory), values(source), fresh=True, start_timeout_s=600
        ) as service,
        GenerationClient(service.target) as client,
    ):
        for number in range(passes + 1):
            start = time.perf_counter()
            done = client.generate(prompts(), sampling, seeds=range(number * PROMPTS, (number + 1) * PROMPTS))
            seconds = time.perf_counter() - start
            rates.append(sum(len(each.token_ids) for each in done) / seconds)
    return rates[1:]


def in_process(source: str, passes: int) -> list[float]:
    """Tokens a second of each pass of a bare AsyncLLM, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.generation.vllm_throughput", "--model", source]
    done = subprocess.run(
        [*command, "--bare", str(passes)],
        env={**environment(), "VLLM_LOGGING_STREAM": "ext://sys.stderr"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


async def bare(source: str, passes: int) -> list[float]:
    """Drive AsyncLLM with nothing of ppod around it, but with the arguments that ppod gives it."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415
    from vllm.inputs import tokens_input  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    from ppod_services.generation.vllm_backend.loading import engine_arguments  # noqa: PLC0415

    config = parse_config(GenerationServiceConfig, {**values(source), "listen": {"port": 1}}, "benchmark")
    arguments = dict(engine_arguments(config, resolve(source).path, "cpu", frozenset()))
    del arguments["worker_extension_cls"]
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    async def one(number: int, prompt: list[int], seed: int) -> int:
        params = SamplingParams(
            temperature=1.0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        count = 0
        async for output in engine.generate(tokens_input(prompt), params, f"{number}-{seed}"):
            count = len(output.outputs[0].token_ids)
        return count

    rates: list[float] = []
    for number in range(passes + 1):
        start = time.perf_counter()
        counts = await asyncio.gather(
            *(one(number, prompt, number * PROMPTS + index) for index, prompt in enumerate(prompts()))
        )
        rates.append(sum(counts) / (time.perf_counter() - start))
    engine.shutdown()
    return rates[1:]


def main() -> None:
    """Measure, and print medians and their ratio."""
    parser = argparse.ArgumentParser(description="vLLM through gRPC against vLLM in process")
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare is not None:
        sys.stdout.write(json.dumps(asyncio.run(bare(options.model, options.bare))) + "\n")
        return
    rates: dict[str, list[float]] = {"grpc": [], "in process": []}
    for _ in range(options.rounds):
        rates["grpc"] += through_grpc(options.model, options.passes)
        rates["in process"] += in_process(options.model, options.passes)
        sys.stdout.write(json.dumps({name: [round(rate, 1) for rate in found] for name, found in rates.items()}) + "\n")
    medians = {name: statistics.median(found) for name, found in rates.items()}
    sys.stdout.write(f"tokens/s: {medians}; ratio {medians['grpc'] / medians['in process']:.3f}\n")


if __name__ == "__main__":
    main()
