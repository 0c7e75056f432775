"""The two faces of every client: one that blocks, one for asyncio. What they do is in `core` and in the `*_calls`."""

from __future__ import annotations

import random
from abc import abstractmethod
from types import TracebackType
from typing import ClassVar, Self

from ppod.client.aio_driver import AioDriver
from ppod.client.core import DEFAULT_TIMEOUT_S, ClientCore, ClientSettings, RpcObserver
from ppod.client.delivery import Delivery
from ppod.client.identity import Pin
from ppod.client.replica_sources import ReplicaSource
from ppod.client.security import ClientSecurity
from ppod.client.sync_driver import SyncDriver


class _Client:
    """Settings, which both faces share.

    Args:
        target: `host:port`; several with commas between, which share the work; `dns:///host:port`, whose every address
            is a replica; `k8s:///SERVICE[.NAMESPACE]:PORT`, whose every ready pod is one; or any other gRPC target.
        timeout_s: deadline of each call in seconds, waits and repeats included, where a call gives none itself.
        pin: what every request insists on.
        observer: called after each attempt, for metrics.
        security: TLS and the team's token.
        delivery: retries, hedging and splitting.
        rng: draws the jitter of waits; give one to make them repeatable.
        replicas: tells which replicas there are; the target is then a name for messages.

    Raises:
        InvalidArgument: the target cannot be read, the token would travel in plain text, or a k8s target's cluster is
        not known.
    """

    service_name: ClassVar[str] = ""

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        pin: Pin | None = None,
        observer: RpcObserver | None = None,
        security: ClientSecurity | None = None,
        delivery: Delivery | None = None,
        rng: random.Random | None = None,
        replicas: ReplicaSource | None = None,
    ) -> None:
        settings = ClientSettings(
            timeout_s=timeout_s,
            pin=pin or Pin(),
            observer=observer,
            security=security or ClientSecurity(),
            delivery=delivery or Delivery(),
            rng=rng,
            replicas=replicas,
        )
        self._core = ClientCore(self.service_name, target, settings)
        self._connect()

    @property
    def target(self) -> str:
        """Where the service is."""
        return self._core.target

    @property
    def replica_count(self) -> int:
        """Replicas known now, those included that do not answer; 0 for a name that was not looked up yet."""
        return len(self._core.shared.replicas)

    @property
    def timeout_s(self) -> float:
        """Deadline of a call that gives none itself, in seconds."""
        return self._core.settings.timeout_s

    @property
    def pin(self) -> Pin:
        """What every request insists on; may be set."""
        return self._core.pin

    @pin.setter
    def pin(self, pin: Pin) -> None:
        self._core.pin = pin

    @abstractmethod
    def _connect(self) -> None:
        """Make the driver."""


class ServiceClient(_Client):
    """A client whose calls block. Thread-safe; close it, or use it as a context manager."""

    _driver: SyncDriver

    def _connect(self) -> None:
        self._driver = SyncDriver(self._core)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all channels; calls under way end with Cancelled."""
        self._driver.close()

    def wait_ready(self, timeout_s: float, service: str | None = None) -> None:
        """Wait until the health service of a replica reports SERVING for this service.

        Raises:
            DeadlineExceeded: it did not within `timeout_s` seconds; the message carries the last state.
            InvalidArgument: the certificates cannot be used.
        """
        self._driver.run(self._core.wait_ready(timeout_s, service))


class AsyncServiceClient(_Client):
    """A client whose calls are awaited. Belongs to one event loop; close it, or use it in `async with`."""

    _driver: AioDriver

    def _connect(self) -> None:
        self._driver = AioDriver(self._core)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all channels; calls under way end with Cancelled."""
        await self._driver.close()

    async def wait_ready(self, timeout_s: float, service: str | None = None) -> None:
        """Wait until the health service of a replica reports SERVING for this service.

        Raises:
            DeadlineExceeded: it did not within `timeout_s` seconds; the message carries the last state.
            InvalidArgument: the certificates cannot be used.
        """
        await self._driver.run(self._core.wait_ready(timeout_s, service))
