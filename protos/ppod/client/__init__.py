"""The thin client: typed calls to ppod's services, with numpy and grpcio alone."""

from ppod.client.base import AsyncServiceClient, ServiceClient
from ppod.client.breakdown import RewardComponent, RewardDescription, RewardKind, ScoreAdjustment
from ppod.client.completions import Completion, FinishReason, Sampling, WeightSpan
from ppod.client.core import RpcObserver
from ppod.client.delivery import NO_RETRY, Delivery, HedgePolicy, RetryPolicy, SplitPolicy
from ppod.client.generation import AsyncGenerationClient, GenerationClient
from ppod.client.identity import (
    ModelDescription,
    ModelLimits,
    ModelState,
    Pin,
    Priority,
    SeedPromise,
    Timing,
    new_request_id,
)
from ppod.client.reference import AsyncReferenceClient, ReferenceClient
from ppod.client.reference_calls import ReferenceLogprobs, TopTokens
from ppod.client.relays import relay_tree
from ppod.client.reward import AsyncRewardClient, RewardClient
from ppod.client.reward_admin import AsyncRewardAdminClient, ReplacedModel, Replacement, RewardAdminClient
from ppod.client.reward_calls import ChatTurn, Granularity, ProcessScores, Scores, Truncation
from ppod.client.security import ClientSecurity
from ppod.client.shared_weights import Segment, SharedDirectory
from ppod.client.weight_image import TensorLayout, WireImage
from ppod.client.weights import (
    AsyncWeightClient,
    CollectiveGroup,
    LoraAdapter,
    PreparedWeights,
    RelayHop,
    ReplicaOutcome,
    TensorDtype,
    WeightClient,
    WeightPause,
    WeightPush,
    WeightStatus,
    WeightTensor,
)

__all__ = [
    "NO_RETRY",
    "AsyncGenerationClient",
    "AsyncReferenceClient",
    "AsyncRewardAdminClient",
    "AsyncRewardClient",
    "AsyncServiceClient",
    "AsyncWeightClient",
    "ChatTurn",
    "ClientSecurity",
    "CollectiveGroup",
    "Completion",
    "Delivery",
    "FinishReason",
    "GenerationClient",
    "Granularity",
    "HedgePolicy",
    "LoraAdapter",
    "ModelDescription",
    "ModelLimits",
    "ModelState",
    "Pin",
    "PreparedWeights",
    "Priority",
    "ProcessScores",
    "ReferenceClient",
    "ReferenceLogprobs",
    "RelayHop",
    "ReplacedModel",
    "Replacement",
    "ReplicaOutcome",
    "RetryPolicy",
    "RewardAdminClient",
    "RewardClient",
    "RewardComponent",
    "RewardDescription",
    "RewardKind",
    "RpcObserver",
    "Sampling",
    "ScoreAdjustment",
    "Scores",
    "SeedPromise",
    "Segment",
    "ServiceClient",
    "SharedDirectory",
    "SplitPolicy",
    "TensorDtype",
    "TensorLayout",
    "Timing",
    "TopTokens",
    "Truncation",
    "WeightClient",
    "WeightPause",
    "WeightPush",
    "WeightSpan",
    "WeightStatus",
    "WeightTensor",
    "WireImage",
    "new_request_id",
    "relay_tree",
]
