"""The records of a run that goes on: what was after its checkpoint goes, a line that was cut goes, the rest stays."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppod_trainer.config import MetricsConfig
from ppod_trainer.errors import TrainerError
from ppod_trainer.metrics import MetricsLog, finite_record, read_records

CONFIG = MetricsConfig(port=None, tensorboard=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of three steps with an evaluation before, and after the second."""
    log = MetricsLog(tmp_path, CONFIG)
    log.write(0, {"heldout/score": 0.25})
    for step in (1, 2, 3):
        log.write(step, {"score/mean": step / 10})
        if step == 2:
            log.write(step, {"heldout/score": 0.5})
    log.close()
    return tmp_path


def test_a_resumed_run_keeps_the_records_up_to_its_checkpoint(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "score/m')
    log = MetricsLog(run_dir, CONFIG, resume_step=2)
    assert log.evaluated == {0, 2}
    log.write(3, {"score/mean": 0.9})
    log.close()
    assert read_records(run_dir / "metrics.jsonl") == [
        {"step": 0, "heldout/score": 0.25},
        {"step": 1, "score/mean": 0.1},
        {"step": 2, "score/mean": 0.2},
        {"step": 2, "heldout/score": 0.5},
        {"step": 3, "score/mean": 0.9},
    ]


def test_a_run_that_was_stopped_before_its_first_step_keeps_its_evaluation(run_dir: Path) -> None:
    log = MetricsLog(run_dir, CONFIG, resume_step=0)
    log.close()
    assert log.evaluated == {0}
    assert read_records(run_dir / "metrics.jsonl") == [{"step": 0, "heldout/score": 0.25}]


def test_a_new_run_begins_anew(run_dir: Path) -> None:
    log = MetricsLog(run_dir, CONFIG)
    log.close()
    assert log.evaluated == set()
    assert (run_dir / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(("resume_step", "left"), [(2, [0.1, 0.2]), (0, []), (None, [])])
def test_tensorboard_forgets_what_is_done_again(tmp_path: Path, resume_step: int | None, left: list[float]) -> None:
    config = MetricsConfig(port=None, tensorboard=True)
    log = MetricsLog(tmp_path, config)
    for step in (1, 2, 3):
        log.write(step, {"score/mean": step / 10})
    log.close()
    log = MetricsLog(tmp_path, config, resume_step)
    log.write(len(left) + 1, {"score/mean": 0.9})
    log.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("score/mean")
    assert [(one.step, one.value) for one in shown] == [
        (step, pytest.approx(value)) for step, value in enumerate([*left, 0.9], start=1)
    ]


def test_the_end_of_each_step_is_told(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, CONFIG)

    def told() -> float:
        return log.registry.get_sample_value("ppod_last_step_timestamp_seconds") or 0.0

    begun = told()
    assert time.time() - begun < 5
    time.sleep(0.01)
    log.write(1, {"kl/bound_per_token": 2.0})
    assert begun < told() <= time.time()
    assert log.registry.get_sample_value("ppod_kl_bound_per_token_nats") == 2.0
    log.close()


def test_what_was_not_measured_is_no_zero(tmp_path: Path) -> None:
    """A judge that nobody asks, or the score before the first step, would be drawn as a line at 0."""
    log = MetricsLog(tmp_path, CONFIG)
    told = log.registry.get_sample_value
    assert math.isnan(told("ppod_reward_score_mean") or 0.0)
    log.write(1, {"score/mean": 0.5})
    assert told("ppod_reward_score_mean") == 0.5
    assert math.isnan(told("ppod_judge_score_mean") or 0.0)
    assert told("ppod_step") == 1
    log.close()


def test_a_figure_that_a_step_did_not_measure_is_not_an_earlier_one_s(tmp_path: Path) -> None:
    """As the gap to a sampler of the same weights, of which a run that overlaps has tokens in its first step alone."""
    log = MetricsLog(tmp_path, CONFIG)
    told = log.registry.get_sample_value
    log.write(1, {"sampler/gap_mean": 0.2, "judge/mean": 0.5})
    log.write(1, {"heldout/score": 0.1})
    assert told("ppod_sampler_logprob_gap_nats") == 0.2
    log.write(2, {"sampler/divergence_mean": 0.3})
    assert math.isnan(told("ppod_sampler_logprob_gap_nats") or 0.0)
    assert told("ppod_judge_score_mean") == 0.5, "when last judged"
    assert told("ppod_step") == 2
    log.close()


def test_a_phase_that_a_step_does_without_is_not_an_earlier_one_s(tmp_path: Path) -> None:
    """As the judge's, which is asked every so many steps."""
    log = MetricsLog(tmp_path, CONFIG)

    def told(phase: str) -> float | None:
        return log.registry.get_sample_value("ppod_step_phase_seconds", {"phase": phase})

    log.write(1, {"seconds/step": 9.0, "seconds/judge": 3.0})
    log.write(1, {"heldout/score": 0.1})
    assert (told("step"), told("judge")) == (9.0, 3.0)
    log.write(2, {"seconds/step": 6.0})
    assert (told("step"), told("judge")) == (6.0, None)
    log.write(3, {"seconds/step": 8.0, "seconds/judge": 2.0})
    assert (told("step"), told("judge")) == (8.0, 2.0)
    log.close()


def test_samples_tokens_and_failed_calls_are_counted(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, CONFIG)
    told = log.registry.get_sample_value
    log.write(1, {"score/mean": 0.5}, samples=8, tokens=30)
    log.write(1, {"heldout/score": 0.1})
    log.write(2, {"score/mean": 0.5}, samples=7, tokens=20)
    assert (told("ppod_samples_total"), told("ppod_response_tokens_total")) == (15, 50)
    for code in ("OK", "UNAVAILABLE", "OK", "UNAVAILABLE"):
        log.observe_rpc("/Score", 0.25, code)
    assert told("ppod_client_rpc_seconds_count", {"method": "/Score"}) == 4
    assert told("ppod_client_rpc_failures_total", {"method": "/Score", "code": "UNAVAILABLE"}) == 2
    assert told("ppod_client_rpc_failures_total", {"method": "/Score", "code": "OK"}) is None
    log.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_is_named(value: float) -> None:
    assert finite_record({"score/mean": 0.0, "step": 1}) == {"score/mean": 0.0, "step": 1}
    with pytest.raises(TrainerError, match=f"metric loss/value is {value}; expected a finite number"):
        finite_record({"score/mean": 0.0, "loss/value": value})


def test_a_damaged_record_is_named(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[1:]]) + "\n")
    with pytest.raises(TrainerError, match=r"metrics.jsonl, line 2, is not a record"):
        MetricsLog(run_dir, CONFIG, resume_step=3)
