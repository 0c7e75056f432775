"""The thin client: typed calls to ppod's services, with numpy and grpcio alone."""

from ppod.client.base import (
    ModelDescription,
    ModelLimits,
    ModelState,
    Pin,
    RpcObserver,
    ServiceClient,
    Timing,
    new_request_id,
)
from ppod.client.generation import Completion, FinishReason, GenerationClient, Sampling
from ppod.client.reference import ReferenceClient, ReferenceLogprobs
from ppod.client.reward import RewardClient, Scores, Truncation
from ppod.client.weights import TensorDtype, WeightClient, WeightStatus, WeightTensor

__all__ = [
    "Completion",
    "FinishReason",
    "GenerationClient",
    "ModelDescription",
    "ModelLimits",
    "ModelState",
    "Pin",
    "ReferenceClient",
    "ReferenceLogprobs",
    "RewardClient",
    "RpcObserver",
    "Sampling",
    "Scores",
    "ServiceClient",
    "TensorDtype",
    "Timing",
    "Truncation",
    "WeightClient",
    "WeightStatus",
    "WeightTensor",
    "new_request_id",
]
