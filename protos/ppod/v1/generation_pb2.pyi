from ppod.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_STOP_STRING: _ClassVar[FinishReason]
    FINISH_REASON_ABORTED: _ClassVar[FinishReason]
    FINISH_REASON_FILTERED: _ClassVar[FinishReason]

class SeedPromise(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEED_PROMISE_UNSPECIFIED: _ClassVar[SeedPromise]
    SEED_PROMISE_EVERY_REPLICA: _ClassVar[SeedPromise]
    SEED_PROMISE_UNINTERRUPTED: _ClassVar[SeedPromise]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_STOP_STRING: FinishReason
FINISH_REASON_ABORTED: FinishReason
FINISH_REASON_FILTERED: FinishReason
SEED_PROMISE_UNSPECIFIED: SeedPromise
SEED_PROMISE_EVERY_REPLICA: SeedPromise
SEED_PROMISE_UNINTERRUPTED: SeedPromise

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos", "min_p", "repetition_penalty", "logit_bias", "stop", "n", "unscaled_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    UNSCALED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    min_p: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    stop: _containers.RepeatedScalarFieldContainer[str]
    n: int
    unscaled_logprobs: bool
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., stop: _Optional[_Iterable[str]] = ..., n: _Optional[int] = ..., unscaled_logprobs: _Optional[bool] = ...) -> None: ...

class WeightSpan(_message.Message):
    __slots__ = ("weight_version", "tokens")
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    weight_version: int
    tokens: int
    def __init__(self, weight_version: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "selector", "prompts", "sampling", "seeds", "priority", "resumed_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    selector: _common_pb2.ModelSelector
    prompts: _common_pb2.TokenSequences
    sampling: SamplingParams
    seeds: _containers.RepeatedScalarFieldContainer[int]
    priority: _common_pb2.Priority
    resumed_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., selector: _Optional[_Union[_common_pb2.ModelSelector, _Mapping]] = ..., prompts: _Optional[_Union[_common_pb2.TokenSequences, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., seeds: _Optional[_Iterable[int]] = ..., priority: _Optional[_Union[_common_pb2.Priority, str]] = ..., resumed_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("index", "token_ids", "logprobs", "finish_reason", "model", "timing", "seed", "sample", "unscaled_logprobs", "weight_spans", "filter_reason")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    UNSCALED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_SPANS_FIELD_NUMBER: _ClassVar[int]
    FILTER_REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: bytes
    logprobs: bytes
    finish_reason: FinishReason
    model: _common_pb2.ModelState
    timing: _common_pb2.Timing
    seed: int
    sample: int
    unscaled_logprobs: bytes
    weight_spans: _containers.RepeatedCompositeFieldContainer[WeightSpan]
    filter_reason: str
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., timing: _Optional[_Union[_common_pb2.Timing, _Mapping]] = ..., seed: _Optional[int] = ..., sample: _Optional[int] = ..., unscaled_logprobs: _Optional[bytes] = ..., weight_spans: _Optional[_Iterable[_Union[WeightSpan, _Mapping]]] = ..., filter_reason: _Optional[str] = ...) -> None: ...

class GetGenerationModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetGenerationModelResponse(_message.Message):
    __slots__ = ("model", "limits", "eos_token_ids", "seed_promise")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_PROMISE_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelState
    limits: _common_pb2.ModelLimits
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    seed_promise: SeedPromise
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., limits: _Optional[_Union[_common_pb2.ModelLimits, _Mapping]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., seed_promise: _Optional[_Union[SeedPromise, str]] = ...) -> None: ...
