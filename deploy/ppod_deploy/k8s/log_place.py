"""Where a pod's log has been read to, through connections that break and files that are rotated."""

from __future__ import annotations

import re

_RECENT = 1_000
"""Lines that are kept: stdout and stderr are stamped apart, so that a line may stand behind a later one."""
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?\S* ")


class LogPlace:
    """Tells new lines, which begin with their timestamps, from those that were read before.

    A log that is asked for anew begins at the oldest line that its node has kept, whose number nobody knows: kubelet
    rotates logs, by default at 10 MiB.
    """

    def __init__(self) -> None:
        # Instants by line, in the order of reading.
        self._recent: dict[str, tuple[str, str]] = {}

    def read(self, line: str) -> str | None:
        """What stands behind the timestamp; None where the line was read before."""
        found = _STAMP.match(line)
        if found is None:
            # Words of the node's, such as that there is no log.
            return line
        # A fraction may have lost its last zeros.
        instant = (found[1], (found[2] or "").ljust(9, "0"))
        # Where all that was read is known, no line that was read can stand before it.
        forgotten = len(self._recent) == _RECENT and instant < next(iter(self._recent.values()))
        if line in self._recent or forgotten:
            return None
        self._recent[line] = instant
        if len(self._recent) > _RECENT:
            del self._recent[next(iter(self._recent))]
        return line[found.end() :]
