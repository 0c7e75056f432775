"""A rank of a trainer that learns from random rollouts, without services: `python -m support.ranked_learning`.

Rank 0 leaves in the run directory figures.json, one entry a step, model.safetensors and a checkpoint of the last step.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ppod_models.configuration import load_config
from ppod_models.ending import exit_now
from ppod_trainer.assembly import load_leader
from ppod_trainer.checkpoint import TrainerState, restore_components
from ppod_trainer.config import TrainerConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.follower import follow
from ppod_trainer.leader import Leader
from ppod_trainer.metrics import StepTimer
from ppod_trainer.ranks import open_ranks
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.stateful import JsonState
from ppod_trainer.stopping import NotedSignal
from support.random_rollouts import random_episodes, random_rollouts


def random_samples(config: TrainerConfig, step: int, longest_response: int) -> list[ScoredRollout]:
    if config.advantages.kind == "spa":
        return random_episodes(config.rollout.batch_size, step)
    return random_rollouts(config.rollout.batch_size, step, longest_response)


def begin(leader: Leader, state: TrainerState, config: TrainerConfig) -> None:
    """What a run does before its first step: estimates are there, and all ranks have them."""
    restore_components(leader.shared, state)
    if config.advantages.kind == "pvpo" and not state.components:
        estimates: JsonState = {str(prompt): 0.3 * prompt - 1 for prompt in range(config.rollout.batch_size)}
        leader.shared["pre_estimates"].restore({"values": estimates})
    leader.share()


def lead(leader: Leader, state: TrainerState, config: TrainerConfig, options: argparse.Namespace) -> None:
    figures: list[dict[str, object]] = []
    for step in range(state.step, options.until):
        timer = StepTimer()
        controls = StepControls(1.0, 0.05, config.ppo.entropy_coefficient)
        rollouts = random_samples(config, step, options.longest_response)
        cpu_s = time.process_time()
        batch, stats = leader.learn(rollouts, step, controls, timer)
        seconds = {**timer.seconds, "processor": time.process_time() - cpu_s}
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        tensors = {
            name: getattr(batch, name).tolist() for name in ("old_logprobs", "old_values", "advantages", "returns")
        }
        figures.append(
            {**asdict(stats), **tensors, "mean_kl": batch.mean_kl, "seconds": seconds, "peak_bytes": peak_bytes}
        )
    if options.save:
        leader.whole_model().save_pretrained(config.run_dir)
        components = {name: one.state() for name, one in leader.shared.items()}
        state = replace(state, step=options.until, components=components)
        leader.save(config.run_dir / "checkpoints", state, keep=1)
    (config.run_dir / "figures.json").write_text(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--until", type=int, required=True, help="last step")
    parser.add_argument("--longest-response", type=int, default=7, help="tokens")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    config = load_config(TrainerConfig, options.config)
    with open_ranks(config.policy.device, config.ranks.timeout_s, mesh_of_one=config.memory.offload) as ranks:
        leader, state = load_leader(config, ranks)
        # Values that are not all 0, and the same on all ranks.
        if not config.resume:
            with torch.no_grad():
                leader.learner.policy.value_head.bias.fill_(0.5)
        if ranks.rank:
            follow(leader, NotedSignal())
        else:
            begin(leader, state, config)
            lead(leader, state, config, options)
            leader.close()


if __name__ == "__main__":
    main()
    exit_now(0)
