"""The report that a run prints at its end."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console

from ppod_trainer.evaluation import Evaluation, Sample
from ppod_trainer.metrics import Record
from ppod_trainer.report import phase_seconds, plot_curves, print_report, print_troubles


def evaluation(step: int, continuation: str, score: float) -> Evaluation:
    sample = Sample("What is [1] + 2?", continuation, score, None, 5)
    return Evaluation(step, score, 0.1, 0.5, None, None, 0.0, 5.0, 1.0, (sample,))


def test_the_report_shows_samples_as_they_are_brackets_included() -> None:
    console = Console(file=io.StringIO(), width=160)
    print_report(console, evaluation(0, " [calc: 1 + 2] 4 ", 0.0), evaluation(3, "[bold]3[/bold]", 1.0), shown=1)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for text in (
        "What is [1] + 2?",
        "[calc: 1 + 2] 4",
        "[bold]3[/bold]",
        "score +0.00",
        "score +1.00",
        "+2.00 standard",
    ):
        assert text in shown


def test_a_sample_stands_beside_the_one_of_its_own_seed() -> None:
    """Episodes may begin alike; one that was refused before has no counterpart."""

    def numbered(step: int, *seeds: int) -> Evaluation:
        samples = tuple(Sample("Guess:", f"of {step}, seed {seed}", 0.0, None, 5, seed) for seed in seeds)
        return replace(evaluation(step, "", 0.0), samples=samples)

    console = Console(file=io.StringIO(), width=160)
    print_report(console, numbered(0, 11, 13), numbered(3, 11, 12, 13), shown=3)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    lines = [line for line in shown.splitlines() if "seed 1" in line]
    assert [re.findall(r"of (\d), seed (\d+)", line) for line in lines] == [
        [("0", "11"), ("3", "11")],
        [("0", "13"), ("3", "13")],
    ]


def test_the_report_compares_the_same_samples_where_some_were_refused() -> None:
    """What was refused in one of the two evaluations moves the means of all without any training."""

    def scored(step: int, scores: dict[int, tuple[float, float | None]]) -> Evaluation:
        samples = tuple(Sample("Guess:", "", score, judge, 5, seed) for seed, (score, judge) in scores.items())
        return replace(evaluation(step, "", 0.0), samples=samples)

    def shown(before: Evaluation, after: Evaluation) -> list[str]:
        console = Console(file=io.StringIO(), width=120)
        print_report(console, before, after, shown=0)
        assert isinstance(console.file, io.StringIO)
        return [line for line in console.file.getvalue().splitlines() if "refused" in line]

    before = scored(0, {11: (-9.0, 0.0), 12: (1.0, 0.5), 13: (2.0, 0.25), 14: (3.0, None)})
    after = scored(3, {12: (2.0, 0.75), 13: (2.0, None), 14: (3.5, 1.0)})
    assert shown(before, after) == [
        "Some samples were refused: of 4 before and 3 after 3 are in both. Over these the score went from +2.000 to "
        "+2.500, the held-out judge's, of 1, from +0.500 to +0.750."
    ]
    unjudged = scored(3, {11: (1.0, None), 15: (1.0, None)})
    assert shown(unjudged, scored(3, {11: (1.5, None), 16: (1.0, None)})) == [
        "Some samples were refused: of 2 before and 2 after 1 are in both. Over these the score went from +1.000 to "
        "+1.500."
    ]
    assert shown(unjudged, scored(3, {16: (1.0, None)})) == [
        "Some samples were refused: of 2 before and 1 after 0 are in both."
    ]
    assert shown(before, before) == []
    judged = scored(3, {12: (2.0, 0.75), 13: (2.0, 0.5), 14: (3.5, 1.0)})
    assert shown(after, judged) == [
        "Some samples were refused: of 3 before and 3 after 3 are in both. Over these the score went from +2.500 to "
        "+2.500, the held-out judge's, of 2, from +0.875 to +0.875."
    ], "the judge refused one of those that the reward model scored"


def test_the_curves_of_one_step_are_points(tmp_path: Path) -> None:
    record = {"step": 1, "score/mean": 0.3, "kl/reference": 2.0, "seconds/update": 1.0}
    plot_curves(tmp_path / "curves.png", [record], "one step")
    image = imread(tmp_path / "curves.png")
    # Without the legend at the top of the first panel: what is left of blue and red in the first two is the points.
    third = image.shape[1] // 3
    for panel, color in (0, "tab:blue"), (1, "tab:red"):
        shown = image[image.shape[0] // 3 :, panel * third : (panel + 1) * third, :3]
        assert (abs(shown - to_rgb(color)).max(axis=-1) < 0.02).any(), color


def test_the_curves_name_no_judge_where_there_is_none(tmp_path: Path) -> None:
    record = {"score/mean": 0.3, "kl/reference": 2.0, "seconds/update": 1.0}
    for name, judged in (("none", {}), ("judge", {"judge/mean": 0.4})):
        plot_curves(tmp_path / f"{name}.png", [{"step": step, **record, **judged} for step in (1.0, 2.0)], "two steps")
        image = imread(tmp_path / f"{name}.png")
        first = image[:, : image.shape[1] // 3, :3]
        assert (abs(first - to_rgb("tab:orange")).max(axis=-1) < 0.02).any() == (name == "judge")


def test_phases_add_up_to_the_step_also_where_rollouts_were_made_before_it() -> None:
    phases = {"generate": 3.0, "score_and_reference": 1.0, "old_logprobs": 0.5, "update": 2.0, "push": 0.25}
    record = {f"seconds/{phase}": value for phase, value in phases.items()}
    learning = {phase: phases[phase] for phase in ("old_logprobs", "update", "push")}
    assert phase_seconds(record) == phases, "as of an earlier version, which did not tell what was waited for"
    assert phase_seconds({**record, "seconds/rollout_wait": 4.01, "seconds/step": 6.8}) == phases
    overlapped = phase_seconds({**record, "seconds/rollout_wait": 1.25, "seconds/step": 4.0})
    assert overlapped == {"rollout_wait": 1.25, **learning}
    assert sum(overlapped.values()) == 4.0


def test_the_report_names_what_went_wrong() -> None:
    """The log is gone with the terminal."""
    shown: list[Record] = [
        {"step": 0, "heldout/score": 1.0},
        {"step": 1, "trouble/kl_blow_up": 0.0, "trouble/repetition": 0.0, "trouble/sampler_gap": 0.0},
        {"step": 2, "trouble/kl_blow_up": 1.0, "trouble/repetition": 0.0, "trouble/sampler_gap": 0.0},
        {"step": 3, "trouble/kl_blow_up": 0.0, "trouble/repetition": 1.0, "trouble/sampler_gap": 0.0},
        {"step": 4, "trouble/kl_blow_up": 1.0, "trouble/repetition": 0.0, "trouble/sampler_gap": 0.0},
    ]
    console = Console(file=io.StringIO(), width=120)
    print_troubles(console, shown)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "trouble: kl_blow_up in 2 of 4 steps, first in step 2, last in step 4",
        "trouble: repetition in 1 of 4 steps, first in step 3, last in step 3",
    ]
