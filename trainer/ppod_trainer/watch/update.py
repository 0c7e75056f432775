"""Updates that go wrong: too far, nowhere, or with a value head that says nothing."""

from __future__ import annotations

from typing import cast

from ppod_trainer.config import TroubleKind, WatchConfig
from ppod_trainer.stateful import JsonState
from ppod_trainer.watch.base import Record, Streak


class KlBlowUp:
    """The policy has left the reference, or one step's update has left the policy, by far more than it should."""

    def __init__(self, config: WatchConfig) -> None:
        self._per_token = config.kl_per_token
        self._update = config.update_kl
        self._streak = Streak(config.steps)

    @property
    def kind(self) -> TroubleKind:
        """See `Detector`."""
        return "kl_blow_up"

    def observe(self, record: Record) -> str | None:
        """See `Detector`."""
        reference = record["kl/reference"] / max(record["response/length"], 1.0)
        update = record["policy/approx_kl"]
        if not self._streak.reached(reference > self._per_token or update > self._update):
            return None
        return (
            f"KL to the reference is {reference:.3g} nats a token (bound {self._per_token:g}), KL of the step's update "
            f"{update:.3g} (bound {self._update:g})"
        )

    def state(self) -> JsonState:
        """See `Detector`."""
        return self._streak.state()

    def restore(self, state: JsonState) -> None:
        """See `Detector`."""
        self._streak.restore(state)


class SamplerGap:
    """Generation samples from another policy than the trainer's, though both have the same weights."""

    def __init__(self, config: WatchConfig) -> None:
        self._bound = config.sampler_gap
        self._streak = Streak(config.steps)
        self._seen: str | None = None

    @property
    def kind(self) -> TroubleKind:
        """See `Detector`."""
        return "sampler_gap"

    def observe(self, record: Record) -> str | None:
        """See `Detector`."""
        gap = record.get("sampler/gap_mean")
        # In a step of which no token is this very policy's nothing is measured: what was seen before stands.
        if gap is not None:
            bad = self._streak.reached(gap > self._bound)
            told = f"{gap:.3g} nats a token (bound {self._bound:g})"
            self._seen = (
                f"the sampler's logprobs of the same weights differ from the trainer's by {told}" if bad else None
            )
        return self._seen

    def state(self) -> JsonState:
        """See `Detector`."""
        return {"streak": self._streak.state(), "seen": self._seen}

    def restore(self, state: JsonState) -> None:
        """See `Detector`."""
        self._streak.restore(cast(JsonState, state["streak"]))
        self._seen = cast("str | None", state["seen"])


class DeadGradients:
    """Nothing is learned: the gradient's norm is next to 0."""

    def __init__(self, config: WatchConfig) -> None:
        self._bound = config.grad_norm
        self._streak = Streak(config.steps)

    @property
    def kind(self) -> TroubleKind:
        """See `Detector`."""
        return "dead_gradients"

    def observe(self, record: Record) -> str | None:
        """See `Detector`."""
        norm = record["policy/grad_norm"]
        if not self._streak.reached(norm <= self._bound):
            return None
        return f"the gradient's norm is {norm:.3g} (bound {self._bound:g}), for {self._streak.count} steps"

    def state(self) -> JsonState:
        """See `Detector`."""
        return self._streak.state()

    def restore(self, state: JsonState) -> None:
        """See `Detector`."""
        self._streak.restore(state)


class ValueCollapse:
    """The values say nothing about returns: they are all the same, or worse than the mean return would be.

    A value head starts at 0, so the first steps are not looked at.
    """

    def __init__(self, config: WatchConfig) -> None:
        self._lowest = config.explained_variance
        self._smallest_std = config.value_std
        self._warmup = config.value_warmup_steps
        self._seen = 0
        self._streak = Streak(config.steps)

    @property
    def kind(self) -> TroubleKind:
        """See `Detector`."""
        return "value_collapse"

    def observe(self, record: Record) -> str | None:
        """See `Detector`."""
        self._seen += 1
        explained, std = record["value/explained_variance"], record["value/std"]
        bad = explained < self._lowest or std <= self._smallest_std
        if not self._streak.reached(bad and self._seen > self._warmup):
            return None
        return (
            f"the values explain {explained:.3g} of the returns' variance (bound {self._lowest:g}); their standard "
            f"deviation is {std:.3g} (bound {self._smallest_std:g})"
        )

    def state(self) -> JsonState:
        """See `Detector`."""
        return {"seen": self._seen, "streak": self._streak.state()}

    def restore(self, state: JsonState) -> None:
        """See `Detector`."""
        self._seen = int(cast(int, state["seen"]))
        self._streak.restore(cast(JsonState, state["streak"]))
