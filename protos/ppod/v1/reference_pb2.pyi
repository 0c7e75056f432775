from ppod.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ComputeLogprobsRequest(_message.Message):
    __slots__ = ("request_id", "selector", "tokens", "prompt_lengths", "temperature", "entropy", "top_k", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    selector: _common_pb2.ModelSelector
    tokens: _common_pb2.TokenSequences
    prompt_lengths: _containers.RepeatedScalarFieldContainer[int]
    temperature: float
    entropy: bool
    top_k: int
    priority: _common_pb2.Priority
    def __init__(self, request_id: _Optional[str] = ..., selector: _Optional[_Union[_common_pb2.ModelSelector, _Mapping]] = ..., tokens: _Optional[_Union[_common_pb2.TokenSequences, _Mapping]] = ..., prompt_lengths: _Optional[_Iterable[int]] = ..., temperature: _Optional[float] = ..., entropy: _Optional[bool] = ..., top_k: _Optional[int] = ..., priority: _Optional[_Union[_common_pb2.Priority, str]] = ...) -> None: ...

class ComputeLogprobsResponse(_message.Message):
    __slots__ = ("model", "timing", "logprobs", "entropies", "top_token_ids", "top_logprobs")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ENTROPIES_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelState
    timing: _common_pb2.Timing
    logprobs: bytes
    entropies: bytes
    top_token_ids: bytes
    top_logprobs: bytes
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., timing: _Optional[_Union[_common_pb2.Timing, _Mapping]] = ..., logprobs: _Optional[bytes] = ..., entropies: _Optional[bytes] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class GetReferenceModelRequest(_message.Message):
    __slots__ = ("selector",)
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    selector: _common_pb2.ModelSelector
    def __init__(self, selector: _Optional[_Union[_common_pb2.ModelSelector, _Mapping]] = ...) -> None: ...

class GetReferenceModelResponse(_message.Message):
    __slots__ = ("model", "limits")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelState
    limits: _common_pb2.ModelLimits
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., limits: _Optional[_Union[_common_pb2.ModelLimits, _Mapping]] = ...) -> None: ...
