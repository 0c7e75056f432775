"""The policy on disk; and the reference that follows it: kept there, where a resumed run finds it, and pushed."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ppod_models.loading import load_causal_lm
from ppod_trainer.connections import Connections
from ppod_trainer.durable import written_aside
from ppod_trainer.errors import WeightPushError
from ppod_trainer.policy_weights import wire_dtype


class ReferencePolicy:
    """The references of a run, of which all replicas of the service serve the newest.

    Args:
        directory: where they are kept.
        connections: the reference service's clients.
    """

    def __init__(self, directory: Path, connections: Connections) -> None:
        self._directory = directory
        self._client = connections.reference
        self._weights = connections.reference_weights
        self._pushed: int | None = None
        self._after_commits = 0

    def keep(self, model: PreTrainedModel, version: int, needed: Collection[int]) -> None:
        """Save a policy as the reference of a version, and delete others than the `needed` ones."""
        with written_aside(self._path(version)) as directory:
            save_policy(model, directory)
        needed_paths = {self._path(one) for one in (*needed, version)}
        for old in set(self._directory.iterdir()) - needed_paths:
            shutil.rmtree(old)

    def serve(self, version: int) -> None:
        """Push the kept reference of a version and pin it. The run must refresh its reference.

        Raises:
            WeightPushError, PpodError: a replica does not take it.
        """
        assert self._weights is not None
        # It computes nothing here: with this attention no model is refused.
        cpu = torch.device("cpu")
        model = load_causal_lm(self._path(version), device=cpu, dtype=torch.float32, attention="eager")
        dtype = self._wire_dtype()
        # A reference that outlived an earlier run may be further on; versions only ever grow.
        served = (serving + 1 for serving in self._weights.serving_versions())
        pushed = max(version, self._after_commits, *served)
        try:
            self._weights.push(model, dtype, pushed)
        except WeightPushError as error:
            if error.committing:
                # As for a policy: a replica that hung may go on with it, and then takes no other push for this version.
                self._after_commits = pushed + 1
            raise
        self._client.pin = replace(self._client.pin, weight_version=pushed)
        self._pushed = pushed

    def _wire_dtype(self) -> torch.dtype:
        """What weights travel in, whichever version serves: one that was started again would not tell a pinned client.

        No rollouts are scored meanwhile.
        """
        pinned = self._client.pin
        self._client.pin = replace(pinned, weight_version=None)
        try:
            return wire_dtype(self._client, "the reference")
        finally:
            self._client.pin = pinned

    def lost(self) -> bool:
        """Whether a replica lost the reference that it was given, as one that was started again has."""
        if self._pushed is None or self._weights is None:
            return False
        return self._weights.serving_versions() != {self._pushed}

    def _path(self, version: int) -> Path:
        return self._directory / f"version_{version:06d}"


def save_policy(model: PreTrainedModel, directory: Path) -> None:
    """Write a model as a directory that transformers loads, with the generation defaults that its base came with.

    transformers loads defaults that contradict each other, as a temperature without sampling, but does not save them.
    """
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(directory)
    finally:
        model.generation_config = defaults
    defaults.to_json_file(directory / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
