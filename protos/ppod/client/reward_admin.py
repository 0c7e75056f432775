"""Clients of RewardAdminService, on the administrative port of a reward service."""

from __future__ import annotations

from dataclasses import dataclass

from ppod.client.base import AsyncServiceClient, ServiceClient
from ppod.client.core import ClientCore, Program, SingleJob, parse
from ppod.client.identity import ModelState, new_request_id, read_state
from ppod.errors import InvalidReply
from ppod.v1 import reward_admin_pb2

REWARD_ADMIN_SERVICE = "ppod.v1.RewardAdminService"


@dataclass(frozen=True, slots=True)
class Replacement:
    """What a reward model is replaced by.

    Attributes:
        name: of a model of the service.
        source: packaged:NAME, a directory or a hub id; empty: the source that it has now.
        head: name or directory of the new head; empty: the head that it has now, read again.
        weight_version: above the serving one; 0: the serving one plus one.
        request_id: for logs and traces; empty: a new one.
    """

    name: str
    source: str = ""
    head: str = ""
    weight_version: int = 0
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class ReplacedModel:
    """The model that serves now, and the seconds that it took to load."""

    state: ModelState
    load_s: float


class RewardAdminClient(ServiceClient):
    """Replaces reward models while they serve."""

    service_name = REWARD_ADMIN_SERVICE

    def replace_model(self, replacement: Replacement, *, timeout_s: float | None = None) -> ReplacedModel:
        """Load another version of a model beside the serving one, and swap it in.

        Raises:
            NotFound: no model has this name. FailedPrecondition: the version is not above the serving one.
        """
        return self._driver.run(_replace_model(self._core, replacement, timeout_s))


class AsyncRewardAdminClient(AsyncServiceClient):
    """`RewardAdminClient` for asyncio."""

    service_name = REWARD_ADMIN_SERVICE

    async def replace_model(self, replacement: Replacement, *, timeout_s: float | None = None) -> ReplacedModel:
        """Load another version of a model and swap it in. Errors as for `RewardAdminClient.replace_model`."""
        return await self._driver.run(_replace_model(self._core, replacement, timeout_s))


def _replace_model(core: ClientCore, replacement: Replacement, timeout_s: float | None) -> Program[ReplacedModel]:
    request = reward_admin_pb2.ReplaceModelRequest(
        request_id=replacement.request_id or new_request_id(),
        name=replacement.name,
        source=replacement.source,
        head=replacement.head,
        weight_version=replacement.weight_version,
    )
    job = SingleJob(f"/{REWARD_ADMIN_SERVICE}/ReplaceModel", request)
    # A repeat of a replacement that did happen would load another version: what broke it off must be looked into.
    job.repeatable = False
    yield from core.ask(job, timeout_s)
    reply = parse(reward_admin_pb2.ReplaceModelResponse, job.reply)
    state = read_state(reply.model)
    if state.model != replacement.name:
        raise InvalidReply("model.model", state.model, f"{replacement.name}, as asked for")
    if replacement.weight_version and state.weight_version != replacement.weight_version:
        raise InvalidReply("model.weight_version", str(state.weight_version), f"{replacement.weight_version}")
    return ReplacedModel(state, reply.load_s)
