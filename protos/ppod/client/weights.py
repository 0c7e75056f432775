"""Clients of WeightService: they send tensors that they are handed as bytes, so they need no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ppod.client import weight_calls as calls
from ppod.client.base import AsyncServiceClient, ServiceClient
from ppod.client.core import ClientCore
from ppod.client.weight_calls import (
    CollectiveGroup,
    LoraAdapter,
    PreparedWeights,
    RelayHop,
    ReplicaOutcome,
    TensorDtype,
    WeightPause,
    WeightPush,
    WeightStatus,
    WeightTensor,
)
from ppod.errors import InvalidArgument

__all__ = [
    "AsyncWeightClient",
    "CollectiveGroup",
    "LoraAdapter",
    "PreparedWeights",
    "RelayHop",
    "ReplicaOutcome",
    "TensorDtype",
    "WeightClient",
    "WeightPause",
    "WeightPush",
    "WeightStatus",
    "WeightTensor",
]


class WeightClient(ServiceClient):
    """Replaces the weights of one server in two phases; its target is that server alone."""

    service_name = calls.WEIGHT_SERVICE

    def _connect(self) -> None:
        _check_single(self._core)
        super()._connect()

    def prepare(self, weight_version: int, tensors: Sequence[WeightTensor], *, timeout_s: float | None = None) -> int:
        """Send all tensors and wait until the server verified them. Returns the number of bytes sent.

        Raises:
            InvalidArgument: a name, shape, dtype or checksum does not fit. FailedPrecondition: an old version.
        """
        return self.push(WeightPush(weight_version, tensors), timeout_s=timeout_s).received_bytes

    def push(self, push: WeightPush, *, timeout_s: float | None = None) -> PreparedWeights:
        """Send weights of any kind, and wait until the server, and all that it relays them to, have verified them.

        Raises:
            InvalidArgument: a name, shape, dtype or checksum does not fit. FailedPrecondition: an old version, or
            another base. PermissionDenied, NotFound: the shared file is out of bounds, or not there. With a relay the
            replies of all servers are results, not errors, those of the first one too.
        """
        reply = self._driver.upload(calls.PREPARE_METHOD, calls.messages(push, self.target), timeout_s)
        return calls.read_prepared(reply, self.target, push)

    def commit(
        self,
        weight_version: int,
        *,
        pause: WeightPause = WeightPause.WAIT,
        push_id: str = "",
        timeout_s: float | None = None,
    ) -> float:
        """Put the prepared version into service. Returns the seconds for which no batch could start.

        Raises:
            FailedPrecondition: it is neither prepared nor serving, or another push than `push_id` was it.
        """
        return self._driver.run(calls.commit(self._core, weight_version, pause, push_id, timeout_s))

    def status(self, *, timeout_s: float | None = None) -> WeightStatus:
        """Ask which versions serve and wait."""
        return self._driver.run(calls.status(self._core, timeout_s))


class AsyncWeightClient(AsyncServiceClient):
    """`WeightClient` for asyncio: the same calls, awaited."""

    service_name = calls.WEIGHT_SERVICE

    def _connect(self) -> None:
        _check_single(self._core)
        super()._connect()

    async def prepare(
        self, weight_version: int, tensors: Sequence[WeightTensor], *, timeout_s: float | None = None
    ) -> int:
        """Send all tensors and wait until the server verified them. Errors as for `WeightClient.prepare`."""
        return (await self.push(WeightPush(weight_version, tensors), timeout_s=timeout_s)).received_bytes

    async def push(self, push: WeightPush, *, timeout_s: float | None = None) -> PreparedWeights:
        """Send weights of any kind. Errors as for `WeightClient.push`."""
        reply = await self._driver.upload(calls.PREPARE_METHOD, calls.messages(push, self.target), timeout_s)
        return calls.read_prepared(reply, self.target, push)

    async def commit(
        self,
        weight_version: int,
        *,
        pause: WeightPause = WeightPause.WAIT,
        push_id: str = "",
        timeout_s: float | None = None,
    ) -> float:
        """Put the prepared version into service. Returns and raises as `WeightClient.commit`."""
        return await self._driver.run(calls.commit(self._core, weight_version, pause, push_id, timeout_s))

    async def status(self, *, timeout_s: float | None = None) -> WeightStatus:
        """Ask which versions serve and wait."""
        return await self._driver.run(calls.status(self._core, timeout_s))


def _check_single(core: ClientCore) -> None:
    if len(core.endpoints.addresses) != 1:
        raise InvalidArgument("target", core.target, "one server: weights go to each replica with a client of its own")
