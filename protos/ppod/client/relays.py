"""Trees of servers along which weights are relayed, so that they leave their sender once. Free of I/O."""

from __future__ import annotations

from collections.abc import Sequence

from ppod.client.weight_calls import RelayHop


def relay_tree(targets: Sequence[str], fanout: int) -> RelayHop:
    """A tree over all targets, the first one at its root. A chain for `fanout` 1.

    Target i sends to the targets i * fanout + 1 to i * fanout + fanout, as in a heap.

    Args:
        targets: administration ports, 1 or more.
        fanout: most servers that one server sends to; at least 1.
    """
    nodes: dict[int, RelayHop] = {}
    for index in reversed(range(len(targets))):
        first = index * fanout + 1
        behind = range(first, min(first + fanout, len(targets)))
        nodes[index] = RelayHop(targets[index], tuple(nodes[inner] for inner in behind))
    return nodes[0]
