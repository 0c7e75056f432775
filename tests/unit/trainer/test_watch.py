"""Each detector fires on a run that shows its trouble, and on no healthy one: the records of a real default run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ppod_models.configuration import ConfigError, parse_config
from ppod_trainer.config import TrainerConfig, TroubleKind, WatchConfig
from ppod_trainer.errors import TroubleError
from ppod_trainer.watch import Watcher, build_watcher

Record = dict[str, float]
KINDS: tuple[TroubleKind, ...] = (
    "reward_hacking",
    "length_growth",
    "repetition",
    "entropy_collapse",
    "kl_blow_up",
    "value_collapse",
    "dead_gradients",
    "all_equal_rewards",
    "sampler_gap",
)


def healthy() -> list[Record]:
    """Figures of `ppod run` with smollm2-cpu-float32.yaml, seed 0, as metrics.jsonl has them.

    The run is older than four figures, which are added as its evaluations show them: distinct-2 from 0.95 to 0.83, a
    value head that learns, a judge whose scores spread as the reward model's do, and responses of which nearly all are
    cut off; each with noise.
    """
    lines = (Path(__file__).parent / "default_run_records.jsonl").read_text().splitlines()
    records: list[Record] = [json.loads(line) for line in lines]
    noise = np.random.default_rng(0)
    for step, record in enumerate(records):
        progress = step / len(records)
        record["response/distinct_2"] = 0.95 - 0.12 * progress + float(noise.normal(0, 0.02))
        record["value/std"] = 0.4 * progress * float(noise.uniform(0.8, 1.2))
        record["response/truncated"] = min(1.0, 0.9 + 0.1 * progress + abs(float(noise.normal(0, 0.03))))
        if "judge/mean" in record:
            record["judge/std"] = record["score/std"] * float(noise.uniform(0.9, 1.1))
    return records


def watch(
    records: Sequence[Record], config: WatchConfig | None = None, watcher: Watcher | None = None
) -> list[set[str]]:
    """The kinds of trouble that each step shows."""
    made = watcher or build_watcher(config or WatchConfig(), critic=True)
    found: list[set[str]] = []
    for step, record in enumerate(records, start=1):
        figures = made.observe(step, record)
        found.append({key.removeprefix("trouble/") for key, value in figures.items() if value})
    return found


def grow_longer(step: int, record: Record) -> None:
    record["response/length"] *= 1 + 0.12 * max(step - 5, 0)


def grow_to_the_limit(step: int, record: Record) -> None:
    """Lengths from 16 to a limit of 24 tokens: never twice what they were."""
    record["response/length"] = min(16 + 0.8 * max(step - 5, 0), 24.0)
    record["response/truncated"] = min(0.2 + 0.08 * max(step - 5, 0), 1.0)


def repeat(step: int, record: Record) -> None:
    record["response/distinct_2"] *= 0.93 ** max(step - 5, 0)


def become_certain(step: int, record: Record) -> None:
    record["policy/entropy"] *= 0.85 ** max(step - 5, 0)


def leave_the_reference(step: int, record: Record) -> None:
    record["kl/reference"] *= 1 + max(step - 10, 0)


def leap(step: int, record: Record) -> None:
    if step > 15:
        record["policy/approx_kl"] = 1.5


def forget_the_values(step: int, record: Record) -> None:
    if step > 12:
        record["value/std"] = 0.0


def value_nonsense(step: int, record: Record) -> None:
    if step > 12:
        record["value/explained_variance"] = -4.0


def die(step: int, record: Record) -> None:
    if step > 8:
        record["policy/grad_norm"] = 0.0


def train_on_nothing(step: int, record: Record) -> None:
    """Every sample is left out of the loss: no entropy was measured, and none collapsed."""
    if step > 8:
        record["policy/grad_norm"] = 0.0
        del record["policy/entropy"]


def pay_all_the_same(step: int, record: Record) -> None:
    if step > 8:
        record["score/std"] = 0.0


def part_from_the_sampler(step: int, record: Record) -> None:
    """As where what was pushed did not come to serve as it is; of some steps no token is the policy's own."""
    record["sampler/gap_mean"] = 0.004 if step < 8 else 3.3
    if step in (9, 12):
        del record["sampler/gap_mean"]


def hack(step: int, record: Record) -> None:
    """The score goes on rising; from step 10 on the judge finds the responses worse and worse."""
    if "judge/mean" in record:
        record["judge/mean"] -= 0.2 * max(step - 10, 0)


def part(step: int, record: Record) -> None:
    """The score rises steeply, the judge sees no difference."""
    record["score/mean"] += 0.6 * max(step - 5, 0)
    if "judge/mean" in record:
        record["judge/mean"] = 0.05 * (-1) ** step


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("length_growth", grow_longer),
        ("length_growth", grow_to_the_limit),
        ("repetition", repeat),
        ("entropy_collapse", become_certain),
        ("kl_blow_up", leave_the_reference),
        ("kl_blow_up", leap),
        ("value_collapse", forget_the_values),
        ("value_collapse", value_nonsense),
        ("dead_gradients", die),
        ("dead_gradients", train_on_nothing),
        ("all_equal_rewards", pay_all_the_same),
        ("sampler_gap", part_from_the_sampler),
        ("reward_hacking", hack),
        ("reward_hacking", part),
    ],
)
def test_each_trouble_is_found_and_no_other(kind: str, spoil: Callable[[int, Record], None]) -> None:
    records = healthy()
    assert len(records) == 25
    for step, record in enumerate(records, start=1):
        spoil(step, record)
    found = watch(records)
    assert found[-1] == {kind}
    assert all(seen <= {kind} for seen in found)
    assert not any(found[:5])


def test_a_healthy_run_has_no_trouble() -> None:
    assert not any(watch(healthy()))


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_trouble(seed: int) -> None:
    """200 steps that go nowhere, with the spread of the default run's figures, or more."""
    noise = np.random.default_rng(seed)
    records: list[Record] = []
    for step in range(200):
        records.append(
            {
                "score/mean": float(noise.normal(0, 0.14)),
                "score/std": float(noise.uniform(0.5, 1.0)),
                "response/length": float(noise.uniform(12, 16)),
                "response/distinct_2": float(noise.uniform(0.75, 0.95)),
                "response/truncated": int(noise.binomial(8, 0.5)) / 8,
                "policy/entropy": float(noise.uniform(2, 4)),
                "policy/approx_kl": float(noise.exponential(0.02)),
                "policy/grad_norm": float(noise.exponential(5)),
                "kl/reference": float(noise.uniform(0, 15)),
                "value/explained_variance": float(noise.normal(0.2, 0.3)),
                "value/std": float(noise.uniform(0.1, 0.5)),
            }
        )
        if step % 5 == 0:
            records[-1] |= {"judge/mean": float(noise.normal(0, 0.14)), "judge/std": float(noise.uniform(0.5, 1.0))}
    assert not any(watch(records))


def test_one_bad_step_is_no_trouble_and_three_in_a_row_are() -> None:
    records = healthy()[:4] * 2
    for step in (1, 2, 4, 5, 6):
        records[step] = {**records[step], "score/std": 0.0}
    found = watch(records)
    assert [bool(seen) for seen in found] == [False] * 6 + [True, False]
    assert watch(records, WatchConfig(steps=2))[2] == {"all_equal_rewards"}


def test_trouble_is_logged_once_with_what_to_try(caplog: pytest.LogCaptureFixture) -> None:
    records = [{**record, "policy/grad_norm": 0.0} for record in healthy()]
    with caplog.at_level(logging.WARNING):
        watch(records)
    [message] = caplog.messages
    assert message.startswith("step 3: dead_gradients: the gradient's norm is 0 (bound 1e-08), for 3 steps; try this: ")


def test_the_figures_name_every_kind_that_is_looked_for() -> None:
    record = healthy()[0]
    assert build_watcher(WatchConfig(), critic=True).observe(1, record) == {f"trouble/{kind}": 0.0 for kind in KINDS}
    ignored = build_watcher(WatchConfig(ignore=("repetition",)), critic=False).observe(1, record)
    assert set(ignored) == {f"trouble/{kind}" for kind in KINDS} - {"trouble/repetition", "trouble/value_collapse"}


def test_what_stops_a_run_is_named() -> None:
    config = WatchConfig(stop=("all_equal_rewards",), steps=1)
    watcher = build_watcher(config, critic=True)
    watcher.observe(1, healthy()[0])
    watcher.check(1)
    watcher.observe(2, {**healthy()[1], "policy/grad_norm": 0.0})
    watcher.check(2)
    watcher.observe(3, {**healthy()[2], "score/std": 0.0})
    with pytest.raises(TroubleError, match=r"step 3: watch\.stop names all_equal_rewards: all outcomes of a step are"):
        watcher.check(3)


@pytest.mark.parametrize(
    "spoil", [grow_longer, grow_to_the_limit, repeat, become_certain, leave_the_reference, forget_the_values, hack]
)
def test_a_resumed_run_sees_what_one_without_a_break_sees(spoil: Callable[[int, Record], None]) -> None:
    records = healthy()
    for step, record in enumerate(records, start=1):
        spoil(step, record)
    straight = watch(records)
    for cut in (3, 12, 20):
        first = build_watcher(WatchConfig(), critic=True)
        before = watch(records[:cut], watcher=first)
        second = build_watcher(WatchConfig(), critic=True)
        second.restore(json.loads(json.dumps(first.state())))
        assert before + watch(records[cut:], watcher=second) == straight


@pytest.mark.parametrize("cut_off", [1.0, 0.9, 0.6])
def test_responses_that_were_cut_off_from_the_start_are_no_trouble(cut_off: float) -> None:
    """As those of the default run, whose limit is short."""
    records = [{**record, "response/truncated": 1.0 if step > 5 else cut_off} for step, record in enumerate(healthy())]
    assert not any(watch(records))


def test_a_checkpoint_from_before_cut_off_responses_were_watched_is_read() -> None:
    first, second = (build_watcher(WatchConfig(), critic=True) for _ in range(2))
    records = healthy()
    for step, record in enumerate(records, start=1):
        grow_longer(step, record)
    watch(records[:10], watcher=first)
    state = json.loads(json.dumps(first.state()))
    for key in ("ended", "cut_off"):
        del state["detectors"]["length_growth"][key]
    second.restore(state)
    assert watch(records[10:], watcher=second) == watch(records)[10:]


def test_what_cannot_be_watched_is_refused() -> None:
    with pytest.raises(ConfigError, match="repetition: in stop and in ignore"):
        parse_config(TrainerConfig, {"watch": {"stop": ["repetition"], "ignore": ["repetition"]}}, "test")
    with pytest.raises(ConfigError, match=r"needs a held-out judge: set services\.judge_model"):
        parse_config(TrainerConfig, {"watch": {"stop": ["reward_hacking"]}}, "test")
    judged = {"watch": {"stop": ["reward_hacking"]}, "services": {"judge_model": "judge"}}
    assert parse_config(TrainerConfig, judged, "test").watch.stop == ("reward_hacking",)
    without_critic = {"advantages": {"kind": "reinforce_pp"}, "watch": {"stop": ["value_collapse"]}}
    with pytest.raises(ConfigError, match="value_collapse, and kind reinforce_pp reads no values"):
        parse_config(TrainerConfig, without_critic, "test")
