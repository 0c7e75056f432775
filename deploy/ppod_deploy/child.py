"""Runs a command that must not outlive the process that asked for it.

Used as `python -S child.py PARENT_PID SIGNAL COMMAND...`: asks Linux to send SIGNAL when the parent dies, then becomes
the command. A script of its own, because code that runs between fork and exec (subprocess's preexec_fn) is unsafe in a
process that has threads, and gRPC gives the launcher threads. Elsewhere than on Linux it only becomes the command.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent and replace it by the command."""
    parent, number, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, number) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        # A parent that died before the prctl sends nothing: this process already has another parent.
        if os.getppid() != parent:
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
