"""The pods behind a Service, put together from its EndpointSlices. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

Change = Literal["ADDED", "MODIFIED", "DELETED"]
_FAMILIES = ("IPv4", "IPv6", "FQDN")
"""A pod with several addresses is one replica: it is reached by the first of these that it has."""


class ConditionsObject(TypedDict, total=False):
    """`conditions` of an endpoint; null where the API server does not know."""

    ready: bool | None
    serving: bool | None
    terminating: bool | None


class ReferenceObject(TypedDict, total=False):
    """`targetRef` of an endpoint: its pod."""

    name: str
    uid: str


class EndpointObject(TypedDict, total=False):
    """One of `endpoints`."""

    addresses: list[str]
    conditions: ConditionsObject | None
    targetRef: ReferenceObject | None


class PortObject(TypedDict, total=False):
    """One of `ports`."""

    name: str | None
    port: int | None


class MetadataObject(TypedDict, total=False):
    """What is used of `metadata`."""

    name: str
    resourceVersion: str


class SliceObject(TypedDict, total=False):
    """What is used of an EndpointSlice, as the API sends it (discovery.k8s.io/v1)."""

    metadata: MetadataObject
    addressType: str
    endpoints: list[EndpointObject] | None
    ports: list[PortObject] | None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One pod.

    Attributes:
        pod: its name; its host where the slice does not tell.
        host: its address, without a port.
        ports: numbers by name.
        ready: it may get new work.
        serving: it answers; with `ready` false it drains, and finishes what it has.
    """

    pod: str
    host: str
    ports: Mapping[str, int]
    ready: bool
    serving: bool

    def address(self, port: int | str) -> str | None:
        """The gRPC target of a port; None where it has no port of this name."""
        number = port if isinstance(port, int) else self.ports.get(port)
        if number is None:
            return None
        return f"[{self.host}]:{number}" if ":" in self.host else f"{self.host}:{number}"


@dataclass(slots=True)
class _Found:
    pod: str
    host: str
    ports: dict[str, int]
    ready: bool
    serving: bool


class SliceTable:
    """All slices of a Service, by their names. One pod may be in several: by family, by port, and while it moves."""

    def __init__(self) -> None:
        self._slices: dict[str, SliceObject] = {}

    def replace(self, slices: Iterable[SliceObject]) -> None:
        """A list was made: these are all."""
        self._slices = {_name(one): one for one in slices}

    def apply(self, change: Change, changed: SliceObject) -> None:
        """A watch told of a change."""
        if change == "DELETED":
            self._slices.pop(_name(changed), None)
        else:
            self._slices[_name(changed)] = changed

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Every pod once, in the order of their names."""
        found: dict[tuple[str, str], _Found] = {}
        for one in self._slices.values():
            for endpoint in one.get("endpoints") or ():
                _merge(found, one, endpoint)
        best: dict[str, tuple[int, _Found]] = {}
        for (family, pod), each in found.items():
            rank = _FAMILIES.index(family)
            if pod not in best or rank < best[pod][0]:
                best[pod] = (rank, each)
        pods = sorted((each for _, each in best.values()), key=lambda each: (each.pod, each.host))
        return tuple(Endpoint(each.pod, each.host, each.ports, each.ready, each.serving) for each in pods)


def _name(one: SliceObject) -> str:
    return one.get("metadata", {}).get("name", "")


def _merge(found: dict[tuple[str, str], _Found], one: SliceObject, endpoint: EndpointObject) -> None:
    family = one.get("addressType", "IPv4")
    addresses = endpoint.get("addresses")
    if not addresses or family not in _FAMILIES:
        return
    # Consumers take the first: all of an endpoint's addresses lead to the same pod.
    host, pod = addresses[0], endpoint.get("targetRef") or {}
    conditions = endpoint.get("conditions") or {}
    # As the API defines them: unknown readiness means ready, and without `serving` it is what `ready` is.
    ready = conditions.get("ready") is not False
    serving = ready if conditions.get("serving") is None else conditions.get("serving") is True
    ready = ready and conditions.get("terminating") is not True
    ports = {port.get("name") or "": number for port in one.get("ports") or () if (number := port.get("port"))}
    key = family, pod.get("uid") or pod.get("name") or host
    seen = found.get(key)
    if seen is None:
        found[key] = _Found(pod.get("name") or host, host, ports, ready, serving)
        return
    # While a pod moves from one slice to another, or has ports in two, the slices change one after the other.
    seen.ports |= ports
    seen.ready, seen.serving = seen.ready or ready, seen.serving or serving
