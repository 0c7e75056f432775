"""Starts the engine for a configuration, and describes the model that it serves."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from pydantic import JsonValue
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ppod_models.configuration import ConfigError, ModelConfig
from ppod_models.loading import (
    eos_token_ids,
    load_tokenizer,
    longest_sequence,
    max_sequence_tokens,
    pick_dtype,
    reading,
    special_tokens,
    tokenizer_fingerprint,
    vocab_size,
)
from ppod_models.sources import ModelSourceError, resolve
from ppod_services.core.causal_service import LoadedModel
from ppod_services.core.described import ModelInfo
from ppod_services.core.weights import ServedWeights
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.generation.requests import GeneratedSample, GenerationItem
from ppod_services.generation.vllm_backend.checkpoint import Checkpoint
from ppod_services.generation.vllm_backend.settings import TRANSFER_ENGINE, VllmConfig
from ppod_services.generation.vllm_backend.watch import FORKS_VARIABLE, SERVICE_VARIABLE

_GIB = 2**30
_CPU_KV_CACHE_GIB = 1.0
_STEP_TOKENS = 8_192
"""Most tokens of one step as vLLM has it, or more; it does not start where more sequences than that are at once."""
_UNASKED = 0.01
"""A part of a device's memory that is always free. Where the KV cache's size is given vLLM makes nothing of the part,
but does not start on a GPU whose other processes leave less of it free."""
_CPU_STEP_TOKENS = 8_192
"""Most tokens of one step on CPUs, unless a prompt may be longer: memory for all of them is set aside."""
_WORKER = "ppod_services.generation.vllm_backend.worker"


@dataclass(frozen=True, slots=True)
class _Described:
    """What is known of a model without its weights.

    Attributes:
        info: identity and bounds.
        shapes: of all weights, by their names in a checkpoint; a tied one goes by its first name.
        linear: names of the linear layers that have weights of their own.
        tokenizer: turns tokens into text.
    """

    info: ModelInfo
    shapes: Mapping[str, tuple[int, ...]]
    linear: frozenset[str]
    tokenizer: Tokenizer


def load_vllm(config: GenerationServiceConfig, on_version: Callable[[int], None]) -> LoadedVllm:
    """Start the engine and its processes; slow.

    Raises:
        ModelSourceError: vLLM is not installed, or cannot load the model. ConfigError: an engine argument is unknown.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModelSourceError(
            "backend vllm: vLLM is not installed; `make setup-vllm` makes an environment that has it"
        )
    with _environment(config):
        from ppod_services.generation.vllm_backend import api  # noqa: PLC0415 - it imports vLLM
        from ppod_services.generation.vllm_backend.engine import VllmEngine  # noqa: PLC0415
        from ppod_services.generation.vllm_backend.host import EngineHost  # noqa: PLC0415
        from ppod_services.generation.vllm_backend.weight_store import VllmWeights  # noqa: PLC0415
        from ppod_services.generation.vllm_backend.worker_transfer import WorkerTransfer  # noqa: PLC0415

        path = resolve(config.model.source).path
        known = api.engine_argument_names()
        arguments = engine_arguments(config, path, api.platform(), known, bfloat16=api.has_bfloat16())
        described = _describe(config, path, api.platform(), str(arguments["dtype"]))
        if api.platform() == "cpu":
            os.environ |= _cpu_environment(eager=arguments["enforce_eager"] is True)
        try:
            host = EngineHost(lambda: api.start_engine(arguments), config.vllm.start_timeout_s)
        except TimeoutError as error:
            limit = f"{config.vllm.start_timeout_s:g} s (vllm.start_timeout_s)"
            raise ModelSourceError(f"model {config.model.source!r} with vLLM: not loaded within {limit}") from error
        except (ValueError, RuntimeError, OSError) as error:
            raise ModelSourceError(f"model {config.model.source!r} with vLLM: {error}") from error
    host.call(lambda engine: engine.update_weight_version("0"))
    host.call(lambda engine: engine.collective_rpc("ppod_unname_shared_memory"))
    told = host.call(lambda engine: engine.collective_rpc("ppod_tell_both_logprobs"))
    workers = WorkerTransfer(host, len(told)) if config.vllm.weights_received_by == "workers" else None
    stages = config.vllm.stage_weights
    store = VllmWeights(host, described.shapes, described.linear, Checkpoint(path), workers, stages=stages)
    weights = ServedWeights(store, on_version)
    engine = VllmEngine(host, weights, described.tokenizer, both_logprobs=all(told))
    model = LoadedModel(described.info, engine.run, weights)
    return LoadedVllm(model, described.tokenizer, lambda: host.failure, host.close)


@dataclass(frozen=True, slots=True)
class LoadedVllm:
    """An engine in service.

    Attributes:
        model: what the service needs of it.
        tokenizer: turns tokens into text.
        failure: why it can serve no more; None while it can.
        close: ends its processes; slow.
    """

    model: LoadedModel[GenerationItem, GeneratedSample]
    tokenizer: Tokenizer
    failure: Callable[[], str | None]
    close: Callable[[], None]


def engine_arguments(
    config: GenerationServiceConfig, path: Path, platform: str, known: frozenset[str], *, bfloat16: bool = True
) -> Mapping[str, JsonValue]:
    """The arguments of vLLM's AsyncEngineArgs for a configuration.

    Args:
        config: the service's.
        path: directory of the model.
        platform: kind of device that vLLM runs on.
        known: names of all engine arguments.
        bfloat16: whether its devices, where they are no CPUs, compute in that.

    Raises:
        ConfigError: an engine argument is unknown, or a device is asked for that this vLLM has not.
    """
    if problems := list(_problems(config, platform, known)):
        raise ConfigError("configuration", problems)
    vllm, batching, on_cpu = config.vllm, config.batching, platform == "cpu"
    longest = min(_longest(vllm, path), batching.max_batch_tokens)
    cache_gib = vllm.kv_cache_gib or (_CPU_KV_CACHE_GIB if on_cpu else None)
    arguments: dict[str, JsonValue] = {
        "model": str(path),
        "dtype": _dtype(config.model, platform, bfloat16=bfloat16),
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "max_model_len": longest,
        "gpu_memory_utilization": _UNASKED if cache_gib and not on_cpu else vllm.gpu_memory_utilization,
        "kv_cache_memory_bytes": int(cache_gib * _GIB) if cache_gib else None,
        "enforce_eager": on_cpu if vllm.enforce_eager is None else vllm.enforce_eager,
        "max_num_seqs": batching.max_batch_size,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": f"{_WORKER}.PpodWorker",
        "weight_transfer_config": {"backend": TRANSFER_ENGINE} if vllm.weights_received_by == "workers" else None,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        # In parts of a prompt vLLM takes back a seeded draw, which CPU generators cannot: the engine would end.
        arguments["enable_chunked_prefill"] = False
        most = max(min(batching.max_batch_tokens, _CPU_STEP_TOKENS), longest, batching.max_batch_size)
        arguments["max_num_batched_tokens"] = most
    elif batching.max_batch_size > _STEP_TOKENS:
        arguments["max_num_batched_tokens"] = batching.max_batch_size
    return {**arguments, **vllm.engine_args}


def _problems(config: GenerationServiceConfig, platform: str, known: frozenset[str]) -> Iterator[str]:
    arguments = config.vllm.engine_args
    for name in sorted(set(arguments) - known):
        yield f"vllm.engine_args.{name}: vLLM has no such engine argument"
    if config.model.device not in ("auto", platform):
        found = f"found {config.model.device!r}"
        yield f"model.device: this vLLM runs on {platform}; choose among several by the environment, {found}"
    if platform == "cpu" and arguments.get("enable_chunked_prefill"):
        yield "vllm.engine_args.enable_chunked_prefill: on CPUs a part of a prompt would end the engine"


def _longest(vllm: VllmConfig, path: Path) -> int:
    with reading(path):
        own = longest_sequence(AutoConfig.from_pretrained(path))
    return own if vllm.max_model_len is None else min(own, vllm.max_model_len)


def _dtype(model: ModelConfig, platform: str, *, bfloat16: bool) -> str:
    if platform != "cpu" and model.dtype == "auto":
        return "bfloat16" if bfloat16 else "float32"
    return str(pick_dtype(model.dtype, torch.device("cpu"))).removeprefix("torch.")


def _describe(config: GenerationServiceConfig, path: Path, platform: str, dtype: str) -> _Described:
    """Describe a model by its configuration, as if it were loaded with transformers."""
    tokenizer = load_tokenizer(path)
    with reading(path):
        with torch.device("meta"):
            model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)))
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
    longest = min(_longest(config.vllm, path), config.batching.max_batch_tokens, max_sequence_tokens(model))
    info = ModelInfo(
        name=config.name,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=vocab_size(model),
        max_sequence_tokens=longest,
        dtype=dtype,
        device=platform,
        eos_token_ids=eos_token_ids(model, tokenizer),
        special_tokens=special_tokens(tokenizer.backend_tokenizer),
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    own = frozenset(name for name in linear if f"{name}.weight" in shapes)
    return _Described(info, shapes, own, tokenizer.backend_tokenizer)


@contextmanager
def _environment(config: GenerationServiceConfig) -> Generator[None]:
    """Environment variables that vLLM and its processes read when they start."""
    with TemporaryDirectory(prefix="ppod-vllm-") as directory:
        logging_file = Path(directory) / "logging.json"
        logging_file.write_text(json.dumps(_logging(config.log_level)))
        os.environ |= {
            # Forks of a process with gRPC's threads can hang.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_LOGGING_CONFIG_PATH": str(logging_file),
            "VLLM_ENGINE_READY_TIMEOUT_S": str(int(config.vllm.start_timeout_s)),
            "VLLM_NO_USAGE_STATS": "1",
            SERVICE_VARIABLE: str(os.getpid()),
            **_threads(config.model.threads),
        }
        if config.model.dtype == "float32":
            # Attention's kernels would multiply in TF32, with 10 bits of precision: who asks for float32 wants 23.
            os.environ |= {"TRITON_F32_DEFAULT": "ieee"}
        yield


def _cpu_environment(*, eager: bool) -> dict[str, str]:
    """What makes an engine on CPUs start in half the time."""
    # vLLM compiles the ranking of logprobs, which nobody reads here: many seconds of a C++ compiler at the first token.
    return {FORKS_VARIABLE: "1", **({"TORCHDYNAMO_DISABLE": "1"} if eager else {})}


def _threads(threads: int | None) -> dict[str, str]:
    """vLLM pins the threads of its CPU workers to cores, all of them, unless it is told not to."""
    if threads is None:
        return {}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}


def _logging(level: str) -> dict[str, object]:
    """vLLM's records as JSON lines among the service's own. What it tells of its progress is for debugging."""
    shown = "INFO" if level == "debug" else level.upper() if level == "error" else "WARNING"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "ppod_services.core.logs.JsonFormatter", "service": "generation"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "loggers": {"vllm": {"handlers": ["stderr"], "level": shown, "propagate": False}},
    }
