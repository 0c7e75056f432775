"""Trees of servers along which weights are relayed, so that they leave their sender once. Free of I/O."""

from __future__ import annotations

from collections.abc import Sequence

from ppod.client.weight_calls import RelayHop


def relay_tree(groups: Sequence[Sequence[str]], fanout: int) -> RelayHop:
    """A tree over the first ones of all groups, the very first one at its root. A chain for `fanout` 1.

    Group i sends to the groups i * fanout + 1 to i * fanout + fanout, as in a heap. Within a group the first one sends
    to all others, by files of the directory that they share.

    Args:
        groups: administration ports of servers that share a directory, each of 1 or more; 1 group or more.
        fanout: most groups that one group sends to; at least 1.
    """
    nodes: dict[int, RelayHop] = {}
    for index in reversed(range(len(groups))):
        leader, *others = groups[index]
        first = index * fanout + 1
        behind = range(first, min(first + fanout, len(groups)))
        shared = [RelayHop(target, shares_directory=True) for target in others]
        # The wires first: a file is passed on once all has arrived.
        nodes[index] = RelayHop(leader, (*(nodes[inner] for inner in behind), *shared))
    return nodes[0]
