"""The thin client: typed calls to ppod's services, with numpy and grpcio alone."""

from ppod.client.base import AsyncServiceClient, ServiceClient
from ppod.client.breakdown import RewardComponent, RewardDescription, RewardKind, ScoreAdjustment
from ppod.client.completions import Completion, FinishReason, Sampling, WeightSpan
from ppod.client.core import RpcObserver
from ppod.client.delivery import NO_RETRY, Delivery, HedgePolicy, RetryPolicy, SplitPolicy
from ppod.client.endpoint_slices import Endpoint
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
from ppod.client.kubernetes_target import KubernetesTarget, parse_kubernetes_target
from ppod.client.reference import AsyncReferenceClient, ReferenceClient
from ppod.client.reference_calls import ReferenceLogprobs, TopTokens
from ppod.client.relays import relay_tree
from ppod.client.replica_sources import ReplicaSource
from ppod.client.replicas import Replicas
from ppod.client.reward import AsyncRewardClient, RewardClient
from ppod.client.reward_admin import AsyncRewardAdminClient, ReplacedModel, Replacement, RewardAdminClient
from ppod.client.reward_calls import ChatTurn, Granularity, ProcessScores, Scores, Truncation
from ppod.client.security import ClientSecurity
from ppod.client.service_watch import ServiceWatch, close_service_watch, open_service_watch
from ppod.client.shared_weights import Segment, SharedDirectory, directory_id, hold_file, release_file
from ppod.client.weight_calls import with_checksums
from ppod.client.weight_image import WEIGHT_BLOCK_BYTES, TensorLayout, WireImage, work_side_by_side
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
    "WEIGHT_BLOCK_BYTES",
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
    "Endpoint",
    "FinishReason",
    "GenerationClient",
    "Granularity",
    "HedgePolicy",
    "KubernetesTarget",
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
    "ReplicaSource",
    "Replicas",
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
    "ServiceWatch",
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
    "close_service_watch",
    "directory_id",
    "hold_file",
    "new_request_id",
    "open_service_watch",
    "parse_kubernetes_target",
    "relay_tree",
    "release_file",
    "with_checksums",
    "work_side_by_side",
]
