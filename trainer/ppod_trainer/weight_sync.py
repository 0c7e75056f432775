"""Pushing the policy's weights to the services that run copies of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from ppod import (
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    PpodError,
    Unavailable,
    WeightClient,
)
from ppod.client import (
    LoraAdapter,
    ReplicaOutcome,
    WeightPause,
    WeightPush,
    WeightStatus,
    WeightTensor,
    WireImage,
    relay_tree,
    with_checksums,
)
from ppod_trainer.collective_plane import CollectivePlane
from ppod_trainer.config import WeightTransferConfig
from ppod_trainer.errors import WeightPushError
from ppod_trainer.held_files import HeldFiles
from ppod_trainer.policy_weights import KnownPolicies, PolicyTensors
from ppod_trainer.push_report import PushReport
from ppod_trainer.weight_planes import GrpcPlane, Outgoing, SharedPlane, WeightPlane, new_push_id
from ppod_trainer.weight_replicas import ServedWeights, WeightReplicas

_LOGGER = logging.getLogger(__name__)
_PAUSES = {"wait": WeightPause.WAIT, "keep": WeightPause.KEEP, "abort": WeightPause.ABORT}
_MOST_AT_ONCE = 64
AnswerT = TypeVar("AnswerT")
Outcomes = dict[str, PpodError | None]
"""What became of each replica, by its administration port; None: it went well."""


@dataclass(frozen=True, slots=True)
class _Committed:
    """What the replicas serve, as it travelled; some may not where their commits failed."""

    weight_version: int
    image: WireImage
    push_id: str

    @property
    def whole(self) -> WeightPush:
        """All of it."""
        return WeightPush(self.weight_version, self.image.tensors(), push_id=self.push_id)


class WeightSync:
    """Keeps all replicas of generation at the policy's version.

    Args:
        replicas: whom it is pushed to; closed by `close`.
        config: plane, encoding and relay.
    """

    def __init__(self, replicas: WeightReplicas, config: WeightTransferConfig) -> None:
        self._replicas = replicas
        self._clients: Mapping[str, WeightClient] = {}
        self._config = config
        self._pool = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="replicas")
        self._held = HeldFiles()
        self._policies = KnownPolicies()
        self._directories: dict[str, str] = {}  # `WeightStatus.relay_directory_id` of each replica
        self._plane = self._make_plane()
        self._committed: _Committed | None = None
        self._retired: WireImage | None = None
        self._sent_bytes = 0
        self.fallbacks = 0

    def close(self) -> None:
        """Close all channels and remove shared files."""
        self._plane.close()
        self._replicas.close()
        self._pool.shutdown()

    def serving_versions(self) -> set[int]:
        """The versions that the replicas serve."""
        with self._taking():
            return {status.state.weight_version for status in self._statuses().values()}

    def push(self, model: nn.Module, dtype: torch.dtype, weight_version: int) -> PushReport:
        """Put the model's weights into service everywhere under `weight_version`.

        Raises:
            WeightPushError: a replica did not get them. Where preparing failed all replicas go on with their old
            version; the message names who failed, at what, and why.
        """
        started, fallbacks = time.monotonic(), self.fallbacks
        policy = self._policies.tensors_of(model, dtype)
        image: WireImage | None = None
        with self._taking():
            if self._config.encoding == "delta" or self._replicas.change:
                image = self._free_image(policy)
                image.fill(policy.write)
            self._sent_bytes = 0
            outgoing = Outgoing(weight_version, policy, image)
            outcomes = self._prepare(outgoing)
            lost = self._lost("prepare", weight_version, outcomes)

            def serve(lost: Collection[str]) -> None:
                if image is not None:
                    self._retired = None if self._committed is None else self._committed.image
                    self._committed = _Committed(weight_version, image, outgoing.push_id)
                    self._replicas.serve(ServedWeights(self._committed.whole), lost)

            version = weight_version, outgoing.push_id
            return self._commit(version, lost, started, self.fallbacks - fallbacks, serve)

    def base_versions(self) -> set[int]:
        """The versions of whole weights that the replicas have, below their adapters."""
        with self._taking():
            return {status.base_version for status in self._statuses().values()}

    def push_adapter(
        self,
        adapter: LoraAdapter,
        tensors: Sequence[WeightTensor],
        weight_version: int,
        base_version: int | None = None,
    ) -> PushReport:
        """Put an adapter alone into service, on top of the whole weights that the replicas have.

        Args:
            adapter, tensors: what it is.
            weight_version: its own.
            base_version: of the whole weights; None: the one that all replicas have.

        Raises:
            WeightPushError: as for `push`, or without `base_version` the replicas have different whole weights.
        """
        started = time.monotonic()
        with self._taking():
            base = self._common_base(weight_version) if base_version is None else base_version
            self._sent_bytes = 0
            push = WeightPush(weight_version, tensors, base_version=base, adapter=adapter, push_id=new_push_id())
            lost = self._lost("prepare", weight_version, self._send(push, list(self._clients)))

            def serve(lost: Collection[str]) -> None:
                if self._replicas.change and self._committed is not None:
                    # The policy's own tensors change with its next update.
                    kept = [replace(one, data=memoryview(bytes(one.data))) for one in tensors]
                    self._replicas.serve(ServedWeights(self._committed.whole, replace(push, tensors=kept)), lost)

            return self._commit((weight_version, push.push_id), lost, started, 0, serve)

    def _common_base(self, weight_version: int) -> int:
        bases = {status.base_version for status in self._statuses().values()}
        if len(bases) != 1:
            # As of one that was started again since somebody looked.
            error = FailedPrecondition("base_version", f"{sorted(bases)}", "one version on all replicas")
            raise WeightPushError(f"adapter of weight version {weight_version}: {error}") from error
        return bases.pop()

    @contextmanager
    def _taking(self) -> Generator[None]:
        """Push to whom there is now; those that are gone hold no files."""
        with self._replicas.taking() as clients:
            self._clients = clients
            self._held.keep(self._replicas.listed())
            yield

    def _prepare(self, outgoing: Outgoing) -> Outcomes:
        outcomes: Outcomes = {}
        targets = list(self._clients)
        base = self._committed if self._config.encoding == "delta" else None
        if base is not None and outgoing.image is not None and base.image.layout == outgoing.image.layout:
            changes = outgoing.image.changes(base.image)
            with self._plane.changes(outgoing, base.weight_version, changes) as push:
                outcomes = self._send(push, targets)
            targets = [target for target, error in outcomes.items() if isinstance(error, FailedPrecondition)]
            self.fallbacks += len(targets)
            for target in targets:
                _LOGGER.warning("%s gets whole weights: %s", target, outcomes[target])
        if targets:
            with self._plane.whole(outgoing) as push:
                # Who does not answer is no part of a group.
                group = push.collective
                members = [one for one in targets if group is None or one in group.ranks]
                outcomes |= self._send(push, members)
            if self._config.plane == "collective" and self._replicas.change:
                outcomes |= self._stream_to(outgoing, [one for one in targets if _broke(outcomes, one)])
        return outcomes

    def _stream_to(self, outgoing: Outgoing, targets: Sequence[str]) -> Outcomes:
        """One who leaves breaks a group for all: the others get the version by itself."""
        if not targets:
            return {}
        _LOGGER.warning("the broadcast did not reach %s: it is sent to each", ", ".join(targets))
        self.fallbacks += len(targets)
        with GrpcPlane().whole(outgoing) as push:
            return self._send_directly(push, targets)

    def _send(self, push: WeightPush, targets: Sequence[str]) -> Outcomes:
        """Push to these replicas, by a relay where one is configured, and directly to whom it does not reach."""
        if self._config.relay == "none" or len(targets) == 1:
            return self._send_directly(push, targets)
        fanout = 1 if self._config.relay == "chain" else self._config.relay_fanout
        tree = relay_tree(self._by_directory(targets), fanout)
        found = self._send_directly(replace(push, relay=tree.hops), [tree.target])
        for target in targets:
            if found.get(target) is not None:
                # What comes back at its address may be another one.
                self._directories.pop(target, None)
        unreached = [target for target in targets if target != tree.target and _unreached(found, target)]
        if unreached:
            reasons = "; ".join(f"{target}: {found.get(target) or found[tree.target]}" for target in unreached)
            _LOGGER.warning("the relay did not reach %s", reasons)
            found |= self._send_directly(push, unreached)
        return found

    def _send_directly(self, push: WeightPush, targets: Sequence[str]) -> Outcomes:
        """Push to each of these; a relay's results are all of its tree's."""
        outcomes: Outcomes = {}
        once = bool(push.uri) or push.collective is not None
        self._sent_bytes += push.wire_bytes * (1 if once else len(targets))
        if len(targets) > 1:
            # One after the other would be hashed again for each.
            push = replace(push, tensors=with_checksums(push.tensors))

        def ask(client: WeightClient) -> tuple[ReplicaOutcome, ...]:
            try:
                return client.push(push).replicas
            except PpodError:
                self._plane.refused()
                raise

        for target, answer in self._ask(targets, ask).items():
            found = (ReplicaOutcome(target, answer),) if isinstance(answer, PpodError) else answer
            outcomes |= {one.target: one.error for one in found}
        if push.uri:
            self._held.pushed(push.uri, outcomes)
        return outcomes

    def _commit(
        self,
        version: tuple[int, str],
        lost: Sequence[str],
        started: float,
        fallbacks: int,
        serve: Callable[[Collection[str]], None],
    ) -> PushReport:
        """Commit a version and push on all but those that are lost; `serve` is told who is then."""
        prepared = time.monotonic()
        targets = [target for target in self._clients if target not in lost]
        pause = _PAUSES[self._config.pause]
        answers = self._ask(targets, lambda client: client.commit(version[0], pause=pause, push_id=version[1]))
        outcomes = {target: self._commit_error(target, answers[target], version) for target in targets}
        try:
            lost = [*lost, *self._lost("commit", version[0], outcomes)]
        finally:
            # Also where all failed: some may serve it that nobody hears of, and those take none before it any more.
            serve(lost)
        paused_s = max((answer for answer in answers.values() if isinstance(answer, float)), default=0.0)
        return PushReport(
            self._sent_bytes, prepared - started, time.monotonic() - prepared, paused_s, fallbacks, tuple(lost)
        )

    def _commit_error(self, target: str, answer: float | PpodError, version: tuple[int, str]) -> PpodError | None:
        """What went wrong; a commit whose reply was lost may have worked."""
        if isinstance(answer, PpodError):
            try:
                status = self._clients[target].status()
            except PpodError:
                self._held.may_have_committed(target)
                return answer
            self._held.told(target, status)
            return None if (status.state.weight_version, status.push_id or version[1]) == version else answer
        self._held.committed(target)
        return None

    def _lost(self, what: str, weight_version: int, outcomes: Outcomes) -> list[str]:
        """The replicas that failed; raise WeightPushError unless the run may go on without them."""
        failed = {target: error for target, error in outcomes.items() if error is not None}
        if not failed:
            return []
        reasons = "; ".join(f"{target}: {error}" for target, error in failed.items())
        message = f"{what} of weight version {weight_version} failed on {len(failed)} of {len(outcomes)}: {reasons}"
        excused = all(self._replicas.excuses(target, error) for target, error in failed.items())
        if not excused or len(failed) == len(outcomes):
            error = WeightPushError(message, list(failed.values()), committing=what == "commit")
            if len(failed) < len(outcomes):
                self._tell_of_skipping(error)
            raise error from next(iter(failed.values()))
        _LOGGER.warning("%s", message)
        return list(failed)

    def _statuses(self) -> dict[str, WeightStatus]:
        """What every replica that answers has; raise its error where none does."""
        answers = self._ask(list(self._clients), lambda client: client.status())
        found = {target: answer for target, answer in answers.items() if isinstance(answer, WeightStatus)}
        for target, answer in answers.items():
            if isinstance(answer, PpodError) and not (found and self._replicas.excuses(target, answer)):
                error = WeightPushError(f"{target} does not tell which weights it has: {answer}")
                if found:
                    self._tell_of_skipping(error)
                raise error from answer
        return found

    def _tell_of_skipping(self, error: WeightPushError) -> None:
        """Name the key by which a run does without this replica, where there is one: pods come and go by themselves."""
        if not self._replicas.change and self._config.plane != "collective":
            error.add_note("weight_transfer.lost_replicas: skip would go on without it")

    def _by_directory(self, targets: Sequence[str]) -> list[list[str]]:
        """The replicas, together those that share a relay directory; each is asked once."""
        unknown = [target for target in targets if target not in self._directories]
        for target, answer in self._ask(unknown, lambda client: client.status()).items() if unknown else ():
            if isinstance(answer, WeightStatus):
                self._directories[target] = answer.relay_directory_id
        groups: dict[str, list[str]] = {}
        for target in targets:
            groups.setdefault(self._directories.get(target) or target, []).append(target)
        return list(groups.values())

    def _collective_ranks(self) -> dict[str, int]:
        """How many ranks each replica takes. One of a list that does not answer counts as one: its push fails."""
        statuses = self._statuses()
        if self._replicas.change:
            return {target: status.collective_ranks for target, status in statuses.items()}
        return {target: statuses[target].collective_ranks if target in statuses else 1 for target in self._clients}

    def _make_plane(self) -> WeightPlane:
        if self._config.directory is not None:
            return SharedPlane(self._config.directory, self._held.uris)
        if self._config.plane == "collective":
            return CollectivePlane(self._config.collective, self._collective_ranks)
        return GrpcPlane()

    def _free_image(self, policy: PolicyTensors) -> WireImage:
        image, self._retired = self._retired, None
        return image if image is not None and image.layout == policy.layout else WireImage(policy.layout)

    def _ask(
        self, targets: Sequence[str], question: Callable[[WeightClient], AnswerT]
    ) -> dict[str, AnswerT | PpodError]:
        """Ask these replicas at the same time; an error is an answer."""

        def ask(target: str) -> AnswerT | PpodError:
            try:
                return question(self._clients[target])
            except PpodError as error:
                return error

        if len(targets) == 1:
            return {targets[0]: ask(targets[0])}
        # With this thread's context, so that the calls belong to the step's trace.
        pending = {target: self._pool.submit(copy_context().run, ask, target) for target in targets}
        return {target: answer.result() for target, answer in pending.items()}


def _unreached(found: Outcomes, target: str) -> bool:
    """Whether a relay failed before it came to this replica; what the replica itself answered stands."""
    errors = Unavailable | DeadlineExceeded | PermissionDenied | NotFound
    return target not in found or isinstance(found[target], errors)


def _broke(found: Outcomes, target: str) -> bool:
    """Whether a broadcast did not reach this replica, or ended before it was whole there."""
    return target not in found or isinstance(found[target], Unavailable | DeadlineExceeded)
