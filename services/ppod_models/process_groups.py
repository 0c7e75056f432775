"""Process groups beside torch's default one: a sender and receivers that meet at the sender's store.

They are made of torch.distributed's backends directly, so that a process may be in a default group of its own, or in
none, and may leave one group for another.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Literal, Protocol, TypeVar, cast

import torch
from torch import distributed

# Where they are defined; torch.distributed only passes them on.
from torch._C._distributed_c10d import BroadcastOptions, ProcessGroupGloo, Store, TCPStore, Work

GroupBackend = Literal["nccl", "gloo"]
AnswerT = TypeVar("AnswerT")

_LOOK_S = 0.05


class GroupError(Exception):
    """A group could not be made, or broke: a party is gone or late."""


def usable_backends() -> tuple[GroupBackend, ...]:
    """The backends that this process has, the fastest first."""
    if torch.cuda.is_available() and distributed.is_nccl_available():
        return ("nccl", "gloo")
    return ("gloo",)


def on_device(device: torch.device | None) -> AbstractContextManager[object]:
    """Makes a CUDA device the one on which the calling thread's groups are: else it is the first one in each thread."""
    return nullcontext() if device is None or device.type != "cuda" else torch.cuda.device(device)


def open_store(host: str, port: int, *, master: bool, timeout_s: float) -> TCPStore:
    """The store where parties meet; `master` listens, on a free port if `port` is 0.

    Raises:
        GroupError: nothing listens there, or the port is in use.
    """
    try:
        return TCPStore(host, port, is_master=master, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise GroupError(f"the store at {host}:{port} cannot be reached or opened: {_first_line(error)}") from error


def reach_store(host: str, port: int, timeout_s: float, gone: threading.Event) -> TCPStore:
    """The store that another party listens with. Also a name that is told only after a while is found.

    Raises:
        GroupError: after `timeout_s`, or soon after `gone` was set, because nobody needs it any more.
    """
    late = f"the store at {host}:{port} cannot be reached: it did not answer within {timeout_s:g} s"
    return _within(timeout_s, lambda: open_store(host, port, master=False, timeout_s=timeout_s), late, gone)


def wait_for(store: Store, key: str, timeout_s: float) -> bytes:
    """The value of a key, once it is set. Raises GroupError after `timeout_s`: then the store is of no use any more."""
    late = f"{key} was not told within {timeout_s:g} s"

    def ask() -> bytes:
        try:
            store.wait([key], timedelta(seconds=timeout_s))
            return store.get(key)
        except RuntimeError as error:
            raise GroupError(f"{late}: {_first_line(error)}") from error

    return _within(timeout_s, ask, late)


def tell(store: Store, key: str, value: str) -> None:
    """Set a key. Raises GroupError: the store is gone, or the connection to it is."""
    try:
        store.set(key, value)
    except RuntimeError as error:
        raise GroupError(f"{key} could not be told: {_first_line(error)}") from error


def on_host(bucket: torch.Tensor) -> torch.Tensor:
    """The bytes of a bucket in the host's memory; those of a device by way of locked pages, which is the fast one."""
    if bucket.device.type == "cpu":
        return bucket
    return torch.empty_like(bucket, device="cpu", pin_memory=True).copy_(bucket)


class _Members(Protocol):
    """A backend of torch.distributed; its own stubs leave these out."""

    def broadcast(self, tensors: list[torch.Tensor], options: BroadcastOptions) -> Work: ...
    def abort(self) -> None: ...


class BroadcastGroup:
    """Rank 0 sends, all others receive.

    Args:
        backend: one of `usable_backends`.
        store: where the parties meet; of no other group.
        rank: this party's.
        world_size: number of parties.
        timeout_s: longest that one broadcast, or a party at the start, may take.

    Raises:
        GroupError: not all parties came in time.
    """

    def __init__(self, backend: GroupBackend, store: Store, rank: int, world_size: int, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        self.device = torch.device("cpu")
        try:
            if backend == "nccl":
                self.device = torch.device("cuda", torch.cuda.current_device())
                self._members: _Members | None = _nccl(store, rank, world_size, timeout)
            else:
                self._members = cast(_Members, ProcessGroupGloo(store, rank, world_size, timeout))
        except RuntimeError as error:
            raise GroupError(f"not all of {world_size} parties came: {_first_line(error)}") from error
        self._timeout = timeout

    def broadcast(self, bucket: torch.Tensor) -> Work:
        """Begin to send, or to receive into, a flat uint8 tensor on `device`; `finish` ends it. Raises GroupError."""
        if self._members is None:
            raise GroupError("it was left")
        options = BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        try:
            return self._members.broadcast([bucket], options)
        except RuntimeError as error:
            raise GroupError(_first_line(error)) from error

    def finish(self, work: Work) -> None:
        """Wait until a broadcast is done. Raises GroupError: a party is gone, or took too long."""
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise GroupError(_first_line(error)) from error

    def close(self) -> None:
        """Leave the group, also one that hangs. Its threads and connections end with it, whoever still holds this."""
        members, self._members = self._members, None
        if members is not None:
            members.abort()


def _within(limit_s: float, ask: Callable[[], AnswerT], late: str, gone: threading.Event | None = None) -> AnswerT:
    """What a store tells in time, else a GroupError that says `late`.

    c10d tries again past its timeout, and waits without end for the answer of one that was stopped or cut off. Whoever
    waits there is left behind, in a thread that ends with the connection.
    """
    answer: Future[AnswerT] = Future()

    def wait() -> None:
        try:
            answer.set_result(ask())
        except GroupError as error:
            answer.set_exception(error)

    threading.Thread(target=wait, name="store", daemon=True).start()
    until = time.monotonic() + limit_s
    while (left := until - time.monotonic()) > 0:
        if gone is not None and gone.is_set():
            raise GroupError("who asked for it went away")
        with suppress(TimeoutError):
            return answer.result(left if gone is None else min(left, _LOOK_S))
    raise GroupError(late)


def _nccl(store: Store, rank: int, world_size: int, timeout: timedelta) -> _Members:
    # Only builds of torch for CUDA have it.
    from torch._C._distributed_c10d import ProcessGroupNCCL  # noqa: PLC0415

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    # The parties meet at their first broadcast. Where one of them fails there, the others would wait for ever, unless
    # they wait without blocking; torch reads how long once in a process.
    options.config.blocking = 0  # pyright: ignore[reportAttributeAccessIssue]
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(math.ceil(timeout.total_seconds())))
    with _blocking_nccl():
        return cast(_Members, ProcessGroupNCCL(store, rank, world_size, options))


@contextmanager
def _blocking_nccl() -> Generator[None]:
    """Have waits of a group that is made within block and raise: the watchdog would end the whole process instead."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0]
