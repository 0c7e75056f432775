# ruff: noqa: PLC0415 - TRL's imports take seconds
"""Times TRL's update apart from its rollouts, and writes what it was made on. Runs in TRL's own environment.

usage: python run_trl_update.py SETTING --steps N ... --out DIRECTORY/trl.json    (the arguments of run_trl.py)

An update begins when the advantages are whitened and ends with the step: epochs of minibatches, forward, backward and
optimizer, of policy and value model. Beside trl.json lies rollouts.npz: the tokens of the last step's samples, their
reference logprobs and scores, for the other side to learn from the same.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

from run_trl import build_trainer, read_options
from settings import peak_mib


class Stopwatch:
    """Notes when updates begin, and the samples of the newest one, by standing in for TRL's whitening."""

    def __init__(self, whiten) -> None:
        self._whiten = whiten
        self.begun: list[float] = []
        self.samples: dict[str, object] = {}

    def __call__(self, values, mask, shift_mean=True):
        whitened = self._whiten(values, mask, shift_mean)
        train = sys._getframe(1).f_locals
        # numpy has no bfloat16.
        self.samples = {name: train[name].float().cpu().numpy().copy() for name in ("ref_logprobs", "scores")}
        self.samples["query_responses"] = train["query_responses"].cpu().numpy().copy()
        self.samples["context_length"] = train["context_length"]
        self.samples["sequence_lengths"] = train["sequence_lengths"].cpu().numpy().copy()
        self.begun.append(time.perf_counter())
        return whitened


def main() -> None:
    """Train for a few steps and write the result."""
    options = read_options()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if options.setting.trl.dtype == "bfloat16" else "no"
    trainer, clock = build_trainer(options)
    import numpy as np
    import torch
    from trl.experimental.ppo import ppo_trainer

    watch = Stopwatch(ppo_trainer.masked_whiten)
    ppo_trainer.masked_whiten = watch
    trainer.train()
    seconds = [end - begun for begun, end in zip(watch.begun, clock.times[1:], strict=True)]
    np.savez(options.out.with_name("rollouts.npz"), **watch.samples)
    result = {
        "update_seconds": [round(value, 3) for value in seconds],
        "median": statistics.median(seconds),
        "peak_mib": peak_mib(),
        "threads": torch.get_num_threads(),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
