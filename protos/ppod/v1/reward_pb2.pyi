from ppod.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RewardKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REWARD_KIND_UNSPECIFIED: _ClassVar[RewardKind]
    REWARD_KIND_MODEL: _ClassVar[RewardKind]
    REWARD_KIND_PROCESS_MODEL: _ClassVar[RewardKind]
    REWARD_KIND_FUNCTION: _ClassVar[RewardKind]
    REWARD_KIND_JUDGE: _ClassVar[RewardKind]
    REWARD_KIND_ENSEMBLE: _ClassVar[RewardKind]
    REWARD_KIND_SUM: _ClassVar[RewardKind]

class TruncationSide(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATION_SIDE_UNSPECIFIED: _ClassVar[TruncationSide]
    TRUNCATION_SIDE_NONE: _ClassVar[TruncationSide]
    TRUNCATION_SIDE_LEFT: _ClassVar[TruncationSide]
    TRUNCATION_SIDE_RIGHT: _ClassVar[TruncationSide]

class ProcessGranularity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROCESS_GRANULARITY_UNSPECIFIED: _ClassVar[ProcessGranularity]
    PROCESS_GRANULARITY_STEP: _ClassVar[ProcessGranularity]
    PROCESS_GRANULARITY_TOKEN: _ClassVar[ProcessGranularity]
REWARD_KIND_UNSPECIFIED: RewardKind
REWARD_KIND_MODEL: RewardKind
REWARD_KIND_PROCESS_MODEL: RewardKind
REWARD_KIND_FUNCTION: RewardKind
REWARD_KIND_JUDGE: RewardKind
REWARD_KIND_ENSEMBLE: RewardKind
REWARD_KIND_SUM: RewardKind
TRUNCATION_SIDE_UNSPECIFIED: TruncationSide
TRUNCATION_SIDE_NONE: TruncationSide
TRUNCATION_SIDE_LEFT: TruncationSide
TRUNCATION_SIDE_RIGHT: TruncationSide
PROCESS_GRANULARITY_UNSPECIFIED: ProcessGranularity
PROCESS_GRANULARITY_STEP: ProcessGranularity
PROCESS_GRANULARITY_TOKEN: ProcessGranularity

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class Conversations(_message.Message):
    __slots__ = ("conversations",)
    CONVERSATIONS_FIELD_NUMBER: _ClassVar[int]
    conversations: _containers.RepeatedCompositeFieldContainer[Conversation]
    def __init__(self, conversations: _Optional[_Iterable[_Union[Conversation, _Mapping]]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "selector", "tokens", "texts", "conversations", "truncation", "priority", "prompt_lengths", "references", "process", "process_interval", "prompts")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    CONVERSATIONS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    selector: _common_pb2.ModelSelector
    tokens: _common_pb2.TokenSequences
    texts: _common_pb2.TextSequences
    conversations: Conversations
    truncation: TruncationSide
    priority: _common_pb2.Priority
    prompt_lengths: _containers.RepeatedScalarFieldContainer[int]
    references: _containers.RepeatedScalarFieldContainer[str]
    process: ProcessGranularity
    process_interval: int
    prompts: Conversations
    def __init__(self, request_id: _Optional[str] = ..., selector: _Optional[_Union[_common_pb2.ModelSelector, _Mapping]] = ..., tokens: _Optional[_Union[_common_pb2.TokenSequences, _Mapping]] = ..., texts: _Optional[_Union[_common_pb2.TextSequences, _Mapping]] = ..., conversations: _Optional[_Union[Conversations, _Mapping]] = ..., truncation: _Optional[_Union[TruncationSide, str]] = ..., priority: _Optional[_Union[_common_pb2.Priority, str]] = ..., prompt_lengths: _Optional[_Iterable[int]] = ..., references: _Optional[_Iterable[str]] = ..., process: _Optional[_Union[ProcessGranularity, str]] = ..., process_interval: _Optional[int] = ..., prompts: _Optional[_Union[Conversations, _Mapping]] = ...) -> None: ...

class ScoreAdjustment(_message.Message):
    __slots__ = ("mean", "std", "clip_low", "clip_high")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    CLIP_LOW_FIELD_NUMBER: _ClassVar[int]
    CLIP_HIGH_FIELD_NUMBER: _ClassVar[int]
    mean: float
    std: float
    clip_low: float
    clip_high: float
    def __init__(self, mean: _Optional[float] = ..., std: _Optional[float] = ..., clip_low: _Optional[float] = ..., clip_high: _Optional[float] = ...) -> None: ...

class RewardComponent(_message.Message):
    __slots__ = ("name", "kind", "weight", "scores", "raw_scores", "adjustment", "std", "mean", "pessimism", "members", "model", "truncated_tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    RAW_SCORES_FIELD_NUMBER: _ClassVar[int]
    ADJUSTMENT_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    PESSIMISM_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: RewardKind
    weight: float
    scores: bytes
    raw_scores: bytes
    adjustment: ScoreAdjustment
    std: bytes
    mean: bytes
    pessimism: float
    members: _containers.RepeatedCompositeFieldContainer[RewardComponent]
    model: _common_pb2.ModelState
    truncated_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[RewardKind, str]] = ..., weight: _Optional[float] = ..., scores: _Optional[bytes] = ..., raw_scores: _Optional[bytes] = ..., adjustment: _Optional[_Union[ScoreAdjustment, _Mapping]] = ..., std: _Optional[bytes] = ..., mean: _Optional[bytes] = ..., pessimism: _Optional[float] = ..., members: _Optional[_Iterable[_Union[RewardComponent, _Mapping]]] = ..., model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., truncated_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class ProcessScores(_message.Message):
    __slots__ = ("lengths", "positions", "scores")
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    positions: bytes
    scores: bytes
    def __init__(self, lengths: _Optional[_Iterable[int]] = ..., positions: _Optional[bytes] = ..., scores: _Optional[bytes] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("model", "timing", "scores", "truncated_tokens", "breakdown", "process")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BREAKDOWN_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelState
    timing: _common_pb2.Timing
    scores: bytes
    truncated_tokens: _containers.RepeatedScalarFieldContainer[int]
    breakdown: RewardComponent
    process: ProcessScores
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., timing: _Optional[_Union[_common_pb2.Timing, _Mapping]] = ..., scores: _Optional[bytes] = ..., truncated_tokens: _Optional[_Iterable[int]] = ..., breakdown: _Optional[_Union[RewardComponent, _Mapping]] = ..., process: _Optional[_Union[ProcessScores, _Mapping]] = ...) -> None: ...

class GetRewardModelRequest(_message.Message):
    __slots__ = ("selector",)
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    selector: _common_pb2.ModelSelector
    def __init__(self, selector: _Optional[_Union[_common_pb2.ModelSelector, _Mapping]] = ...) -> None: ...

class GetRewardModelResponse(_message.Message):
    __slots__ = ("model", "limits", "description")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelState
    limits: _common_pb2.ModelLimits
    description: RewardDescription
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., limits: _Optional[_Union[_common_pb2.ModelLimits, _Mapping]] = ..., description: _Optional[_Union[RewardDescription, _Mapping]] = ...) -> None: ...

class ListRewardsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRewardsResponse(_message.Message):
    __slots__ = ("rewards",)
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    rewards: _containers.RepeatedCompositeFieldContainer[RewardDescription]
    def __init__(self, rewards: _Optional[_Iterable[_Union[RewardDescription, _Mapping]]] = ...) -> None: ...

class RewardDescription(_message.Message):
    __slots__ = ("name", "kind", "adjustment", "members", "weights", "pessimism", "model", "limits", "takes_tokens", "needs_references")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ADJUSTMENT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    PESSIMISM_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    TAKES_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEEDS_REFERENCES_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: RewardKind
    adjustment: ScoreAdjustment
    members: _containers.RepeatedScalarFieldContainer[str]
    weights: _containers.RepeatedScalarFieldContainer[float]
    pessimism: float
    model: _common_pb2.ModelState
    limits: _common_pb2.ModelLimits
    takes_tokens: bool
    needs_references: bool
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[RewardKind, str]] = ..., adjustment: _Optional[_Union[ScoreAdjustment, _Mapping]] = ..., members: _Optional[_Iterable[str]] = ..., weights: _Optional[_Iterable[float]] = ..., pessimism: _Optional[float] = ..., model: _Optional[_Union[_common_pb2.ModelState, _Mapping]] = ..., limits: _Optional[_Union[_common_pb2.ModelLimits, _Mapping]] = ..., takes_tokens: _Optional[bool] = ..., needs_references: _Optional[bool] = ...) -> None: ...
