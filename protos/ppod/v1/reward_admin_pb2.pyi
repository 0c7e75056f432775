from ppod.v1 import common_pb2 as _common_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplaceModelRequest(_message.Message):
    __slots__ = ("request_id", "name", "source", "head", "weight_version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    source: str
    head: str
    weight_version: int
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., source: _Optional[str] = ..., head: _Optional[str] = ..., weight_version: _Optional[int] = ...) -> None: ...

class ReplaceModelResponse(_message.Message):
    __slots__ = ("model", "load_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelState
    load_s: float
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., load_s: _Optional[float] = ...) -> None: ...
