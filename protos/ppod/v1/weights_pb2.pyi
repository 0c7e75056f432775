from ppod.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_DTYPE_UNSPECIFIED: _ClassVar[TensorDtype]
    TENSOR_DTYPE_FLOAT32: _ClassVar[TensorDtype]
    TENSOR_DTYPE_BFLOAT16: _ClassVar[TensorDtype]
    TENSOR_DTYPE_FLOAT16: _ClassVar[TensorDtype]

class TensorEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_ENCODING_UNSPECIFIED: _ClassVar[TensorEncoding]
    TENSOR_ENCODING_DENSE: _ClassVar[TensorEncoding]
    TENSOR_ENCODING_BITMAP: _ClassVar[TensorEncoding]
    TENSOR_ENCODING_GAPS: _ClassVar[TensorEncoding]

class WeightPause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHT_PAUSE_UNSPECIFIED: _ClassVar[WeightPause]
    WEIGHT_PAUSE_WAIT: _ClassVar[WeightPause]
    WEIGHT_PAUSE_KEEP: _ClassVar[WeightPause]
    WEIGHT_PAUSE_ABORT: _ClassVar[WeightPause]
TENSOR_DTYPE_UNSPECIFIED: TensorDtype
TENSOR_DTYPE_FLOAT32: TensorDtype
TENSOR_DTYPE_BFLOAT16: TensorDtype
TENSOR_DTYPE_FLOAT16: TensorDtype
TENSOR_ENCODING_UNSPECIFIED: TensorEncoding
TENSOR_ENCODING_DENSE: TensorEncoding
TENSOR_ENCODING_BITMAP: TensorEncoding
TENSOR_ENCODING_GAPS: TensorEncoding
WEIGHT_PAUSE_UNSPECIFIED: WeightPause
WEIGHT_PAUSE_WAIT: WeightPause
WEIGHT_PAUSE_KEEP: WeightPause
WEIGHT_PAUSE_ABORT: WeightPause

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape", "xxh3", "encoding", "encoded_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    ENCODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: TensorDtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    xxh3: int
    encoding: TensorEncoding
    encoded_bytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[TensorDtype, str]] = ..., shape: _Optional[_Iterable[int]] = ..., xxh3: _Optional[int] = ..., encoding: _Optional[_Union[TensorEncoding, str]] = ..., encoded_bytes: _Optional[int] = ...) -> None: ...

class LoraAdapter(_message.Message):
    __slots__ = ("rank", "alpha", "target_modules", "rank_stabilized")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    RANK_STABILIZED_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    rank_stabilized: bool
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., target_modules: _Optional[_Iterable[str]] = ..., rank_stabilized: _Optional[bool] = ...) -> None: ...

class RelayHop(_message.Message):
    __slots__ = ("target", "hops", "shares_directory")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    SHARES_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    target: str
    hops: _containers.RepeatedCompositeFieldContainer[RelayHop]
    shares_directory: bool
    def __init__(self, target: _Optional[str] = ..., hops: _Optional[_Iterable[_Union[RelayHop, _Mapping]]] = ..., shares_directory: _Optional[bool] = ...) -> None: ...

class CollectiveGroup(_message.Message):
    __slots__ = ("name", "address", "backend", "rank", "world_size", "bucket_bytes", "ranks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    BUCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    backend: str
    rank: int
    world_size: int
    bucket_bytes: int
    ranks: int
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., backend: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., bucket_bytes: _Optional[int] = ..., ranks: _Optional[int] = ...) -> None: ...

class WeightManifest(_message.Message):
    __slots__ = ("weight_version", "tensors", "base_version", "uri", "relay", "adapter", "collective", "checksums_follow", "push_id")
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    RELAY_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FOLLOW_FIELD_NUMBER: _ClassVar[int]
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    weight_version: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    base_version: int
    uri: str
    relay: _containers.RepeatedCompositeFieldContainer[RelayHop]
    adapter: LoraAdapter
    collective: CollectiveGroup
    checksums_follow: bool
    push_id: str
    def __init__(self, weight_version: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., base_version: _Optional[int] = ..., uri: _Optional[str] = ..., relay: _Optional[_Iterable[_Union[RelayHop, _Mapping]]] = ..., adapter: _Optional[_Union[LoraAdapter, _Mapping]] = ..., collective: _Optional[_Union[CollectiveGroup, _Mapping]] = ..., checksums_follow: _Optional[bool] = ..., push_id: _Optional[str] = ...) -> None: ...

class WeightChecksums(_message.Message):
    __slots__ = ("xxh3",)
    XXH3_FIELD_NUMBER: _ClassVar[int]
    xxh3: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, xxh3: _Optional[_Iterable[int]] = ...) -> None: ...

class PrepareWeightsRequest(_message.Message):
    __slots__ = ("manifest", "chunk", "checksums")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    manifest: WeightManifest
    chunk: bytes
    checksums: WeightChecksums
    def __init__(self, manifest: _Optional[_Union[WeightManifest, _Mapping]] = ..., chunk: _Optional[bytes] = ..., checksums: _Optional[_Union[WeightChecksums, _Mapping]] = ...) -> None: ...

class PrepareWeightsResponse(_message.Message):
    __slots__ = ("weight_version", "received_bytes", "receive_s", "replicas")
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_S_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    weight_version: int
    received_bytes: int
    receive_s: float
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaResult]
    def __init__(self, weight_version: _Optional[int] = ..., received_bytes: _Optional[int] = ..., receive_s: _Optional[float] = ..., replicas: _Optional[_Iterable[_Union[ReplicaResult, _Mapping]]] = ...) -> None: ...

class ReplicaResult(_message.Message):
    __slots__ = ("target", "code", "message", "status")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    target: str
    code: int
    message: str
    status: bytes
    def __init__(self, target: _Optional[str] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., status: _Optional[bytes] = ...) -> None: ...

class CommitWeightsRequest(_message.Message):
    __slots__ = ("weight_version", "pause", "push_id")
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    weight_version: int
    pause: WeightPause
    push_id: str
    def __init__(self, weight_version: _Optional[int] = ..., pause: _Optional[_Union[WeightPause, str]] = ..., push_id: _Optional[str] = ...) -> None: ...

class CommitWeightsResponse(_message.Message):
    __slots__ = ("model", "paused_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PAUSED_S_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelState
    paused_s: float
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., paused_s: _Optional[float] = ...) -> None: ...

class GetWeightsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWeightsResponse(_message.Message):
    __slots__ = ("model", "prepared_version", "base_version", "held_uris", "collective_ranks", "relay_directory_id", "push_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREPARED_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    HELD_URIS_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_RANKS_FIELD_NUMBER: _ClassVar[int]
    RELAY_DIRECTORY_ID_FIELD_NUMBER: _ClassVar[int]
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelState
    prepared_version: int
    base_version: int
    held_uris: _containers.RepeatedScalarFieldContainer[str]
    collective_ranks: int
    relay_directory_id: str
    push_id: str
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., prepared_version: _Optional[int] = ..., base_version: _Optional[int] = ..., held_uris: _Optional[_Iterable[str]] = ..., collective_ranks: _Optional[int] = ..., relay_directory_id: _Optional[str] = ..., push_id: _Optional[str] = ...) -> None: ...
