"""vLLM's AsyncLLM driven in this process, with the engine arguments that the service gives it and nothing else of ppod.

usage: python -m benchmarks.generation.vllm_engine CONFIGURATION

Answers as `transformers_engine` does; vLLM does not tell its steps.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import torch

from benchmarks.generation.workloads import Wanted, workloads
from ppod_models.configuration import parse_config
from ppod_models.sources import resolve
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.generation.vllm_backend.completions import engine_seed
from ppod_services.generation.vllm_backend.loading import engine_arguments


def arguments(values: dict[str, Any]) -> dict[str, object]:
    """Of AsyncEngineArgs, as the service makes them."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    config = parse_config(GenerationServiceConfig, {"listen": {"port": 1}, **values}, "benchmark")
    path, known = resolve(config.model.source).path, frozenset(AsyncEngineArgs.__dataclass_fields__)
    made = dict(engine_arguments(config, path, current_platform.device_type, known))
    del made["worker_extension_cls"]
    return made


async def complete(engine: Any, name: str, one: Wanted) -> list[int]:
    """The tokens of one completion, with the logprobs that the service asks for too."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.inputs import tokens_input  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    params = SamplingParams(
        max_tokens=one.max_tokens,
        ignore_eos=True,
        seed=engine_seed(one.seed),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    tokens: list[int] = []
    async for output in engine.generate(tokens_input(list(one.prompt)), params, name):
        tokens = list(output.outputs[0].token_ids)
    return tokens


async def answer(values: dict[str, Any]) -> None:
    """Answer until the input ends."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415
    from vllm.usage.usage_lib import UsageContext  # noqa: PLC0415
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    # By which vLLM decides how large a step is.
    context = UsageContext.LLM_CLASS
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments(values)), usage_context=context)
    known = workloads()
    while line := await asyncio.to_thread(sys.stdin.readline):
        workload = known[json.loads(line)["workload"]]
        begin = time.perf_counter()
        tokens = await asyncio.gather(
            *(complete(engine, f"{begin}-{index}", one) for index, one in enumerate(workload.wanted))
        )
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "steps": 0, "tokens": tokens}), flush=True)
    engine.shutdown()


def main() -> None:
    """Set what vLLM reads from the environment, as the service does, and answer."""
    values = json.loads(sys.argv[1])
    os.environ |= {
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(values["model"]["threads"]),
    }
    if not torch.cuda.is_available():
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    asyncio.run(answer(values))


if __name__ == "__main__":
    main()
