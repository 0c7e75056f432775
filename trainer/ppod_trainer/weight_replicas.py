"""The replicas of generation as pushes of weights see them: a list, here; pods that come and go, in
`followed_replicas`.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from ppod import PpodError, WeightClient
from ppod.client import WeightPush


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """What generation serves, in memory that does not change as long as this is so.

    Attributes:
        base: whole weights.
        adapter: on top of them; None: there is none.
    """

    base: WeightPush
    adapter: WeightPush | None = None

    @property
    def weight_version(self) -> int:
        """The version that replies carry."""
        return (self.adapter or self.base).weight_version


class WeightReplicas(Protocol):
    """Whom weights are pushed to."""

    @property
    def change(self) -> bool:
        """Whether replicas may come, which are then given what the others serve."""
        ...

    @contextmanager
    def taking(self) -> Generator[Mapping[str, WeightClient]]:
        """The replicas to push to, by their administration ports. While the context lasts none is added."""
        ...

    def listed(self) -> Collection[str]:
        """All that may still serve, those included that are on their way out."""
        ...

    def excuses(self, target: str, error: PpodError) -> bool:
        """Whether the run may go on without this replica, which did not get its weights."""
        ...

    def serve(self, served: ServedWeights, lost: Collection[str]) -> None:
        """All that were taken serve this now, but for those that were lost. Called within `taking`.

        Where their commits failed it is what they may serve, and what those that do not are to be given.
        """
        ...

    def close(self) -> None:
        """Close all channels."""
        ...


class FixedReplicas:
    """A list of replicas, as the configuration names them.

    Args:
        clients: one for each; closed by `close`.
        lost: what one that did not get its weights does to the run.
    """

    change = False

    def __init__(self, clients: Sequence[WeightClient], lost: Literal["stop", "skip"]) -> None:
        self._clients = {client.target: client for client in clients}
        self._lost = lost

    @contextmanager
    def taking(self) -> Generator[Mapping[str, WeightClient]]:
        """See `WeightReplicas`."""
        yield self._clients

    def listed(self) -> Collection[str]:
        """See `WeightReplicas`."""
        return list(self._clients)

    def excuses(self, target: str, error: PpodError) -> bool:
        """See `WeightReplicas`."""
        del target, error
        return self._lost == "skip"

    def serve(self, served: ServedWeights, lost: Collection[str]) -> None:
        """See `WeightReplicas`: nobody else comes."""

    def close(self) -> None:
        """See `WeightReplicas`."""
        for client in self._clients.values():
            client.close()
