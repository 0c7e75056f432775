"""Configuration of the vLLM backend. Free of torch and vLLM: the launcher reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, JsonValue, field_validator

from ppod_models.configuration import ConfigModel

LEAST_TEMPERATURE = 0.01
MOST_TEMPERATURE = 2.0
"""What is sampled at, besides 0 for the likeliest tokens."""

_OWN_KEYS = {
    "model": "model.source",
    "dtype": "model.dtype",
    "device": "model.device",
    "tensor_parallel_size": "vllm.tensor_parallel_size",
    "max_model_len": "vllm.max_model_len",
    "gpu_memory_utilization": "vllm.gpu_memory_utilization",
    "kv_cache_memory_bytes": "vllm.kv_cache_gib",
    "enforce_eager": "vllm.enforce_eager",
    "max_num_seqs": "batching.max_batch_size",
}
"""Engine arguments that have a key of their own elsewhere."""
_SPECULATES = "logprobs of speculative decoding are not told exactly"
_QUANTIZES = "pushed weights would be compared with, and rounded to, another model than the trainer's"
_KEEPS = "stores of keys and values outside of the engine may keep those of old weights"
_FIXED = {
    "tokenizer": "the model's own tokenizer makes the fingerprint that callers pin",
    "logprobs_mode": "completions carry the logprobs of the distribution that was sampled",
    "worker_extension_cls": "ppod's own loads pushed weights",
    "weight_transfer_config": "ppod's own engine receives pushed weights; see vllm.weights_received_by",
    "data_parallel_size": "run one service for each replica; clients balance over them",
    # vLLM makes a `speculative_config` of any of the other three.
    "speculative_config": _SPECULATES,
    "spec_method": _SPECULATES,
    "spec_model": _SPECULATES,
    "spec_tokens": _SPECULATES,
    "enable_lora": "adapters are pushed, and merged into a copy of the base; with vLLM's own it takes no new weights",
    "kv_transfer_config": _KEEPS,
    "kv_offloading_backend": _KEEPS,
    "watermark_config": "its key would decide draws, and not a request's seed",
    "enable_eplb": "pushed experts would be put where they were at the start, not where they have moved since",
    "offload_group_size": "each step takes layers from copies in the host's memory, which pushed weights do not reach",
    "logits_processors": "logprobs would be of another distribution than the request describes",
    "trust_remote_code": "models bring safetensors, not code",
    "load_format": "models bring safetensors, not code",
    "quantization": _QUANTIZES,
    "quantization_config": _QUANTIZES,
}
"""Engine arguments that would break what the service promises, and why."""


TRANSFER_ENGINE = "ppod"
"""What vLLM's factory of transfer engines knows ppod's by."""


class VllmConfig(ConfigModel):
    """The vLLM engine."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=1_024, description="devices that share the model")
    max_model_len: int | None = Field(
        default=None, ge=2, le=2**24, description="longest sequence; none: the model's own, at most max_batch_tokens"
    )
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="part of a device's memory for weights and KV cache together, which must be free at the start; not "
        "asked where kv_cache_gib is given",
    )
    kv_cache_gib: float | None = Field(
        default=None,
        gt=0,
        le=65_536,
        description="memory of the KV cache on each device; none: what gpu_memory_utilization leaves, on CPUs 1",
    )
    enforce_eager: bool | None = Field(
        default=None, description="neither compile the model nor capture CUDA graphs; none: on CPUs only"
    )
    start_timeout_s: float = Field(
        default=600, gt=0, le=86_400, description="longest time for the engine's processes to load the model"
    )
    weights_received_by: Literal["service", "workers"] = Field(
        default="service",
        description="who is part of the groups of weight_transfer.plane collective: the service, or each worker, onto "
        "its own device, which then needs room for all weights in the type that travels, not only its part",
    )
    stage_weights: bool = Field(
        default=True,
        description="load pushed weights into a second set of parameters while the old ones serve, where there is room "
        "beside gpu_memory_utilization, so that a commit is short",
    )
    engine_args: Mapping[str, JsonValue] = Field(
        default={}, description="further arguments of vLLM's AsyncEngineArgs, by their names there"
    )

    @field_validator("engine_args")
    @classmethod
    def _leaves_ours_alone(cls, values: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        for name in values:
            if name in _OWN_KEYS:
                raise ValueError(f"{name} is set by {_OWN_KEYS[name]}")
            if name in _FIXED:
                raise ValueError(f"{name} cannot be set: {_FIXED[name]}")
        return values
