"""Times ppod's update alone, in one process without services, on the samples that TRL's update was timed on.

usage: python run_update.py SETTING --steps N --rollouts rollouts.npz --critic head|model --out FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from settings import SETTINGS, Setting, Task, peak_mib

from ppod_models.loading import DTYPES, load_causal_lm, vocab_size
from ppod_models.sources import resolve
from ppod_trainer.algorithms import build_estimator
from ppod_trainer.config import AdvantagesConfig, KlConfig, OptimizerConfig, PpoConfig, RewardsConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.critic import load_value_model
from ppod_trainer.experience import ExperienceRules
from ppod_trainer.learner import Learner, build_learner
from ppod_trainer.metrics import StepTimer
from ppod_trainer.policy import PolicyWithValue
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn


def main() -> None:
    """Learn for a few steps and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rollouts", type=Path, required=True)
    parser.add_argument("--critic", choices=["head", "model"], default="head")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    rollouts = read_rollouts(options.rollouts, setting.temperature)
    device = torch.device(options.device)
    learner = make_learner(setting, options.critic, device)
    old, update = [], []
    for step in range(options.steps):
        timer = StepTimer()
        learner.learn(rollouts, step, StepControls(1.0, setting.kl_coefficient, 0.0), timer)
        old.append(timer.seconds["old_logprobs"])
        update.append(timer.seconds["update"])
    result = {
        "update_seconds": [round(value, 3) for value in update],
        "old_logprobs_seconds": [round(value, 3) for value in old],
        "median": statistics.median(update),
        "peak_mib": peak_mib(),
        "threads": torch.get_num_threads(),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"ppod, {options.critic}: {result['median']:.2f} s, {result['peak_mib']:.0f} MiB", flush=True)


def read_rollouts(path: Path, temperature: float) -> list[ScoredRollout]:
    """TRL's samples as ppod's; what follows the end of sequence is cut off."""
    with np.load(path) as file:
        tokens, reference, scores = file["query_responses"], file["ref_logprobs"], file["scores"]
        width, lengths = int(file["context_length"]), file["sequence_lengths"] + 1
    rollouts: list[ScoredRollout] = []
    for row, length in enumerate(lengths):
        response = tokens[row, width : width + length].astype(np.int32)
        turn = Turn(response, reference[row, :length], np.ones(length, np.int64), False, False, temperature)
        rollout = Rollout.of_turn(Prompt(row, tokens[row, :width].astype(np.int32)), turn, row)
        rollouts.append(ScoredRollout(rollout, float(scores[row]), reference[row, :length].astype(np.float32)))
    return rollouts


def make_learner(setting: Setting, critic: str, device: torch.device) -> Learner:
    """The learner of a run, as `ppod train` makes it."""
    path, side = resolve(Task().model).path, setting.ppod
    started = time.perf_counter()
    model = load_causal_lm(path, device=device, dtype=torch.float32, attention=side.attention)
    value_model = None
    if critic == "model":
        value_model = load_value_model(path, device=device, attention=side.attention, vocab_size=vocab_size(model))
    policy = PolicyWithValue(model, compute_dtype=DTYPES[side.dtype], value_model=value_model)
    advantages = AdvantagesConfig()
    rules = ExperienceRules(RewardsConfig(), KlConfig(), build_estimator(advantages), whiten=True)
    ppo = PpoConfig(epochs=setting.epochs, minibatches=setting.minibatches)
    print(f"loaded in {time.perf_counter() - started:.1f} s", flush=True)
    return build_learner(policy, ppo, rules, OptimizerConfig(learning_rate=setting.learning_rate), setting.seed)


if __name__ == "__main__":
    main()
