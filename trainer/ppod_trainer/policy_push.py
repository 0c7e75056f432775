"""The policy on its way to generation: whole, or as its adapter on a base that every replica has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from ppod_trainer.errors import WeightPushError
from ppod_trainer.leader import Leader
from ppod_trainer.policy_versions import PolicyVersions
from ppod_trainer.policy_weights import wire_tensors
from ppod_trainer.push_report import PushReport
from ppod_trainer.stopping import StopSignal
from ppod_trainer.weight_sync import WeightSync

InService = Callable[[int], AbstractContextManager[None]]
"""Context in which weights of a version may come into service."""


class PolicyPush:
    """Gathers the policy and pushes it.

    Args:
        leader: has the policy.
        generation: pushes to all replicas.
        stop: a signal waits while all ranks gather.
        versions: told which versions are pushed, and which of them are bases.

    Attributes:
        last: what the last push of the policy took; none where none went well.
    """

    def __init__(self, leader: Leader, generation: WeightSync, stop: StopSignal, versions: PolicyVersions) -> None:
        self._leader = leader
        self._generation = generation
        self._stop = stop
        self._versions = versions
        self._base_version: int | None = None
        self._after_bases = 0
        self._after_commits = 0
        self.last: PushReport | None = None

    def push(self, dtype: torch.dtype, weight_version: int, in_service: InService) -> int:
        """Put the policy into service under `weight_version`; returns the version that serves.

        It is a later one where a replica lacks an adapter's base, which then goes first, with a version of its own; or
        where a base was to have it that did not come, or a push whose commit was not answered.

        Raises:
            WeightPushError: a replica did not get it.
        """
        try:
            return self._push(dtype, max(weight_version, self._after_commits), in_service)
        except WeightPushError as error:
            if error.committing:
                # A replica that hung may go on with it, and then takes no other push for this version.
                self._after_commits = self._versions.newest + 1
            raise

    def _push(self, dtype: torch.dtype, weight_version: int, in_service: InService) -> int:
        self.last = None
        if self._leader.adapter is None:
            with self._stop.deferred():
                model = self._leader.whole_model(dtype)
            with in_service(weight_version):
                self._versions.pushed(weight_version)
                self.last = self._generation.push(model, dtype, weight_version)
            return weight_version
        base: PreTrainedModel | None = None
        with self._stop.deferred():
            if self._generation.base_versions() != {self._base_version}:
                # Whatever the replicas were started with, the adapter goes on what it is trained on.
                base = self._leader.base_model(dtype)
            tensors = wire_tensors(self._leader.adapter_weights())
        # A replica that nobody heard of when a base was to come may serve it: that version is no policy's any more.
        weight_version = max(weight_version, self._after_bases)
        base_version, weight_version = weight_version, weight_version + (base is not None)
        # One block for both: nothing is to be sampled from the base alone.
        with in_service(weight_version):
            if base is not None:
                self._versions.base(base_version)
                self._after_bases = base_version + 1
                self._generation.push(base, dtype, base_version)
                self._base_version = base_version
            self._versions.pushed(weight_version)
            # Not whatever all have: one that takes no base is passed over where replicas may be lost.
            adapter, on = self._leader.adapter.description, self._base_version
            self.last = self._generation.push_adapter(adapter, tensors, weight_version, on)
        return weight_version
