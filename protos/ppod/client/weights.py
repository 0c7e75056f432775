"""Clients of WeightService: they send tensors that they are handed as bytes, so they need no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ppod.client import weight_calls as calls
from ppod.client.base import AsyncServiceClient, ServiceClient
from ppod.client.core import ClientCore
from ppod.client.weight_calls import TensorDtype, WeightStatus, WeightTensor
from ppod.errors import InvalidArgument

__all__ = ["AsyncWeightClient", "TensorDtype", "WeightClient", "WeightStatus", "WeightTensor"]


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
        messages = calls.encoded_parts(weight_version, tensors)
        reply = self._driver.upload(calls.PREPARE_METHOD, messages, timeout_s)
        return calls.read_prepared(reply, weight_version, tensors)

    def commit(self, weight_version: int, *, timeout_s: float | None = None) -> float:
        """Put the prepared version into service. Returns the seconds for which no batch could start."""
        return self._driver.run(calls.commit(self._core, weight_version, timeout_s))

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
        messages = calls.encoded_parts(weight_version, tensors)
        reply = await self._driver.upload(calls.PREPARE_METHOD, messages, timeout_s)
        return calls.read_prepared(reply, weight_version, tensors)

    async def commit(self, weight_version: int, *, timeout_s: float | None = None) -> float:
        """Put the prepared version into service. Returns the seconds for which no batch could start."""
        return await self._driver.run(calls.commit(self._core, weight_version, timeout_s))

    async def status(self, *, timeout_s: float | None = None) -> WeightStatus:
        """Ask which versions serve and wait."""
        return await self._driver.run(calls.status(self._core, timeout_s))


def _check_single(core: ClientCore) -> None:
    if len(core.endpoints.addresses) != 1:
        raise InvalidArgument("target", core.target, "one server: weights go to each replica with a client of its own")
