"""What a service that was ready cannot go on from."""

from __future__ import annotations

_LOST = frozenset({214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719})
"""Errors of CUDA behind which all work of this process on the device fails, whatever it is: an uncorrectable error of
its memory, an illegal access, a launch that failed."""


class ServiceBroken(Exception):
    """A service that was ready can serve no more; the message says why, in one line."""


def broken_device(error: BaseException | None) -> ServiceBroken | None:
    """What an engine's error means where its device is lost to this process; None where it is not.

    torch's AcceleratorError has CUDA's own number.
    """
    code: object = getattr(error, "error_code", None)
    if not isinstance(error, RuntimeError) or code not in _LOST:
        return None
    return ServiceBroken(f"the device computes nothing more for this process: {str(error).splitlines()[0]}")
