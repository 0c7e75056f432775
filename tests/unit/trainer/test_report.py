"""The report that a run prints at its end."""

from __future__ import annotations

import io

from rich.console import Console

from ppod_trainer.evaluation import Evaluation, Sample
from ppod_trainer.report import print_report


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
