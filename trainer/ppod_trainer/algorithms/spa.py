"""Stepwise progress attribution: a delayed reward, given to the turns that earned it, by a learned estimator.

Wang et al. 2025, "SPA-RL: Reinforcing LLM Agents via Stepwise Progress Attribution". A progress estimator reads the
policy's hidden state h_k at the last token of each turn and tells its contribution, so that those of an episode add up
to its outcome:

    c_k = MLP(h_k),    loss = mean over episodes of (R - sum over k of c_k)^2

What is paid at the end is then paid by turns, beside what the environment pays for a turn (the paper's grounding
signal), and PPO with GAE and a critic goes on from there.

What differs: the paper trains the estimator beforehand, with a language model of its own, on episodes of a policy that
imitates experts; here a small MLP reads the policy's own state, without gradients into it, and learns with every step:
a step's contributions come from the estimator before it has seen the step. What its sum misses stays on the last turn,
so that the redistribution never changes the sum of an episode's rewards; and as its output layer begins at 0, training
begins as PPO does. Episodes of one turn are PPO's.

Each of several ranks has the estimator whole: they begin alike, and learn from the same experience, all of it.
"""

from __future__ import annotations

import base64
from typing import cast

import torch
from safetensors.torch import load, save
from torch import nn

from ppod_trainer.advantages import Advantages
from ppod_trainer.algorithms.base import Experience
from ppod_trainer.algorithms.gae import Gae
from ppod_trainer.algorithms.turns import last_tokens, sum_by_turn
from ppod_trainer.config import SpaConfig
from ppod_trainer.errors import TrainerError
from ppod_trainer.stateful import JsonState


class Spa:
    """GAE over rewards that a progress estimator redistributes. A `LearnedEstimator`.

    Args:
        config: of the progress estimator.
        gae: what follows the redistribution.
        hidden_size: H of the policy.
        seed: of the first layer's weights.
    """

    def __init__(self, config: SpaConfig, gae: Gae, hidden_size: int, seed: int) -> None:
        self._config = config
        self._gae = gae
        # With a generator of its own it begins the same whatever was loaded before, which differs among ranks.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, output = nn.Linear(hidden_size, config.hidden_units), nn.Linear(config.hidden_units, 1)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        self._progress = nn.Sequential(first, nn.ReLU(), output)
        self._optimizer = torch.optim.Adam(self._progress.parameters(), lr=config.learning_rate)

    @property
    def critic(self) -> bool:
        """GAE reads values."""
        return True

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`; then the progress estimator learns from the experience."""
        states = experience.turn_states
        if states is None:
            raise TrainerError("kind spa reads the policy's states, and there are none in the experience")
        self._place(states.device)
        there = last_tokens(experience.turns) >= 0
        contributions = self._contributions(states, there).detach()
        delayed = delayed_rewards(experience.paid, experience.turns)
        shaped = redistribute(experience.rewards, contributions, experience.turns)
        with torch.enable_grad():
            self._learn(states, there, delayed)
        return self._gae.estimate(experience.with_rewards(shaped))

    def state(self) -> JsonState:
        """Parameters and the optimizer's moments, bit for bit."""
        tensors = {f"progress.{name}": value for name, value in self._progress.state_dict().items()}
        moments = cast("dict[int, dict[str, torch.Tensor]]", self._optimizer.state_dict()["state"])
        for number, values in moments.items():
            tensors |= {f"moments.{number}.{name}": value for name, value in values.items()}
        whole = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        return {"tensors": base64.b64encode(whole).decode("ascii")}

    def restore(self, state: JsonState) -> None:
        """Take those of a checkpoint."""
        tensors = load(base64.b64decode(cast(str, state["tensors"])))
        self._progress.load_state_dict({name: tensors[f"progress.{name}"] for name in self._progress.state_dict()})
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("moments."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})

    def _place(self, device: torch.device) -> None:
        if next(self._progress.parameters()).device != device:
            self._progress.to(device)
            # The moments of a checkpoint come along.
            self._optimizer.load_state_dict(self._optimizer.state_dict())

    def _contributions(self, states: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Of each turn, float32 [B, K]; 0 for turns that are not there."""
        return torch.where(there, self._progress(states).squeeze(-1), 0.0)

    def _learn(self, states: torch.Tensor, there: torch.Tensor, delayed: torch.Tensor) -> None:
        for _ in range(self._config.updates):
            loss = (delayed - self._contributions(states, there).sum(dim=1)).square().mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()


def delayed_rewards(paid: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """What was paid in the last turn of each episode, float32 [B]."""
    by_turn = sum_by_turn(paid, turns)
    return by_turn.gather(1, turns.amax(dim=1, keepdim=True)).squeeze(1)


def redistribute(rewards: torch.Tensor, contributions: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Pay each turn's contribution on its last token, and take all of it off the last turn's: float32 [B, T].

    The last turn is left with its own contribution and with what the contributions do not add up to.

    Args:
        rewards: float32 [B, T].
        contributions: float32 [B, K].
        turns: int64 [B, T], as in `Experience`.
    """
    last = last_tokens(turns)
    number = torch.arange(last.shape[1], device=last.device)
    earlier = torch.where(number < turns.amax(dim=1, keepdim=True), contributions, 0.0)
    moved = torch.where(number == turns.amax(dim=1, keepdim=True), -earlier.sum(dim=1, keepdim=True), earlier)
    return rewards.scatter_add(1, last.clamp(min=0), torch.where(last >= 0, moved, 0.0))
