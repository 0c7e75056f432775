"""How a process ends that has threads in C++: not by way of the interpreter's."""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

UNREAD_FAULTS = {errno.EPIPE, errno.EIO}
"""What is met where a pipe has no reader, or a terminal was closed."""
ECHO_S = 1.0
"""The same signal so soon is the same request: `timeout` sends it to the process and to its group, and what stops all
processes of a job, as systemd and Slurm do, stops the launcher, too, which then asks its children once more."""


def exit_now(code: int) -> NoReturn:
    """End the process as it is: what it has printed is written, no exit handler runs, and no thread is waited for.

    The interpreter's own end waits for a model's thread, which no signal can interrupt. It may also abort the process:
    a thread of a gloo process group that lets go of a finished operation's tensors needs the interpreter for it, and
    to have one that is ending is `std::terminate` (https://github.com/pytorch/pytorch/pull/179291). Such threads
    live as long as anything refers to their group, whether or not it was destroyed.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno not in UNREAD_FAULTS:
                raise
            # What nobody read is still in the buffer, and whoever printed it has been told.
    os._exit(code)
