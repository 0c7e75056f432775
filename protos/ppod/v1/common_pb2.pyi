from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]
PRIORITY_UNSPECIFIED: Priority
PRIORITY_LOW: Priority
PRIORITY_NORMAL: Priority
PRIORITY_HIGH: Priority

class TokenSequences(_message.Message):
    __slots__ = ("token_ids", "lengths")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    token_ids: bytes
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[bytes] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class TextSequences(_message.Message):
    __slots__ = ("texts", "prompts")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    prompts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., prompts: _Optional[_Iterable[str]] = ...) -> None: ...

class ModelSelector(_message.Message):
    __slots__ = ("model", "weight_version", "tokenizer_fingerprint")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model: str
    weight_version: int
    tokenizer_fingerprint: str
    def __init__(self, model: _Optional[str] = ..., weight_version: _Optional[int] = ..., tokenizer_fingerprint: _Optional[str] = ...) -> None: ...

class ModelState(_message.Message):
    __slots__ = ("model", "weight_version", "tokenizer_fingerprint")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model: str
    weight_version: int
    tokenizer_fingerprint: str
    def __init__(self, model: _Optional[str] = ..., weight_version: _Optional[int] = ..., tokenizer_fingerprint: _Optional[str] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_s", "compute_s", "tokens")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    compute_s: float
    tokens: int
    def __init__(self, queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., tokens: _Optional[int] = ...) -> None: ...

class ModelLimits(_message.Message):
    __slots__ = ("vocab_size", "max_sequence_tokens", "max_request_sequences", "dtype", "device")
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    vocab_size: int
    max_sequence_tokens: int
    max_request_sequences: int
    dtype: str
    device: str
    def __init__(self, vocab_size: _Optional[int] = ..., max_sequence_tokens: _Optional[int] = ..., max_request_sequences: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...
