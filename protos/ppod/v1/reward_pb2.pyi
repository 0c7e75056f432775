from ppod.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TruncationSide(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATION_SIDE_UNSPECIFIED: _ClassVar[TruncationSide]
    TRUNCATION_SIDE_NONE: _ClassVar[TruncationSide]
    TRUNCATION_SIDE_LEFT: _ClassVar[TruncationSide]
    TRUNCATION_SIDE_RIGHT: _ClassVar[TruncationSide]
TRUNCATION_SIDE_UNSPECIFIED: TruncationSide
TRUNCATION_SIDE_NONE: TruncationSide
TRUNCATION_SIDE_LEFT: TruncationSide
TRUNCATION_SIDE_RIGHT: TruncationSide

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "selector", "tokens", "texts", "truncation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    selector: _common_pb2.ModelSelector
    tokens: _common_pb2.TokenSequences
    texts: _common_pb2.TextSequences
    truncation: TruncationSide
    def __init__(self, request_id: _Optional[str] = ..., selector: _Optional[_Union[_common_pb2.ModelSelector, _Mapping]] = ..., tokens: _Optional[_Union[_common_pb2.TokenSequences, _Mapping]] = ..., texts: _Optional[_Union[_common_pb2.TextSequences, _Mapping]] = ..., truncation: _Optional[_Union[TruncationSide, str]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("model", "timing", "scores", "truncated_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelState
    timing: _common_pb2.Timing
    scores: bytes
    truncated_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., timing: _Optional[_Union[_common_pb2.Timing, _Mapping]] = ..., scores: _Optional[bytes] = ..., truncated_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class GetRewardModelRequest(_message.Message):
    __slots__ = ("selector",)
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    selector: _common_pb2.ModelSelector
    def __init__(self, selector: _Optional[_Union[_common_pb2.ModelSelector, _Mapping]] = ...) -> None: ...

class GetRewardModelResponse(_message.Message):
    __slots__ = ("model", "limits")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelState
    limits: _common_pb2.ModelLimits
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., limits: _Optional[_Union[_common_pb2.ModelLimits, _Mapping]] = ...) -> None: ...
