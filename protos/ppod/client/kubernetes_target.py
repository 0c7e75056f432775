"""What `k8s:///SERVICE[.NAMESPACE]:PORT` names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ppod.errors import InvalidArgument

SCHEME = "k8s:///"
_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_TARGET = re.compile(rf"k8s:///(?P<service>{_LABEL})(?:\.(?P<namespace>{_LABEL}))?:(?P<port>{_LABEL})")
_EXPECTED = "k8s:///SERVICE[.NAMESPACE]:PORT, PORT a number or the name of one of the Service's ports"


@dataclass(frozen=True, slots=True)
class KubernetesTarget:
    """A port of the pods behind a Service.

    Attributes:
        service: name of the Service.
        namespace: where it is; None: where this process is, or the current context's.
        port: the number on which the pods themselves listen, or the name that the Service gives to it.
    """

    service: str
    namespace: str | None
    port: int | str


def parse_kubernetes_target(target: str) -> KubernetesTarget:
    """Read a target of this scheme; raise InvalidArgument for any other text."""
    found = _TARGET.fullmatch(target)
    if found is None:
        raise InvalidArgument("target", target, _EXPECTED)
    port: int | str = found["port"]
    if found["port"].isdigit():
        port = int(found["port"])
        if not 1 <= port <= 65_535:
            raise InvalidArgument("target", target, "a port from 1 to 65535")
    return KubernetesTarget(found["service"], found["namespace"], port)
