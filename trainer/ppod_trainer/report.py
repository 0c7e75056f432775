"""What a person sees: a line a step, the table at the end, and the curves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppod_trainer.evaluation import Evaluation, Sample
from ppod_trainer.metrics import Record

mpl.use("Agg")

_TROUBLE = "trouble/"


def format_step(step: int, steps: int, record: Record, eta_s: float) -> str:
    """One line about a step, with columns that stay in place."""
    seconds = " ".join(
        f"{label} {record.get(f'seconds/{phase}', 0.0):.1f}"
        for label, phase in (
            ("gen", "generate"),
            ("score+ref", "score_and_reference"),
            ("old", "old_logprobs"),
            ("upd", "update"),
            ("push", "push"),
        )
    )
    judge = f"judge {record['judge/mean']:+.2f}" if "judge/mean" in record else " " * 11
    return (
        f"step {step:>{len(str(steps))}}/{steps}  score {record['score/mean']:+.2f}  {judge}  "
        f"kl {record['kl/reference']:5.2f}  len {record['response/length']:4.1f}  "
        f"clip {record['policy/clip_fraction']:.2f}  {record['seconds/step']:5.1f} s ({seconds})  "
        f"eta {_clock(eta_s)}"
    )


def format_evaluation(evaluation: Evaluation) -> str:
    """One line about an evaluation."""
    judge = "" if evaluation.judge is None else f"  judge {evaluation.judge:+.2f}"
    return (
        f"held-out prompts after step {evaluation.step}: score {evaluation.score:+.2f} "
        f"(+-{evaluation.score_standard_error:.2f}){judge}  kl {evaluation.kl:.2f}  "
        f"length {evaluation.length:.1f}  distinct-2 {evaluation.distinct_2:.2f}"
    )


def print_report(console: Console, before: Evaluation, after: Evaluation, shown: int) -> None:
    """Print figures and samples, before and after, side by side."""
    count = len(after.samples)
    table = Table(title=f"{count} held-out prompts, fixed seeds, before and after {after.step} steps")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name, old, new in _figures(before, after):
        table.add_row(name, old, new, _change(old, new))
    console.print(table)
    if before.score_std > 0:
        rise = (after.score - before.score) / before.score_std
        console.print(f"The score moved by {rise:+.2f} standard deviations of the scores before training.")
    # Episodes of an environment may begin alike, with the same prompt.
    earlier = {(sample.prompt, sample.seed): sample for sample in before.samples}
    found = ((earlier.get((sample.prompt, sample.seed)), sample) for sample in after.samples)
    pairs = [(old_sample, sample) for old_sample, sample in found if old_sample is not None]
    same = len(pairs) == len(before.samples) == count
    if not same or any((old.judge is None) != (new.judge is None) for old, new in pairs):
        _print_common(console, pairs, len(before.samples), count)
    samples = Table(title="samples, same prompt and seed", show_lines=True)
    for column in ("prompt", "before", "after"):
        samples.add_column(column, overflow="fold")
    for old_sample, new_sample in pairs[:shown]:
        # As text, not markup: what a model writes in brackets is no style of ours.
        samples.add_row(Text(old_sample.prompt), _continuation(old_sample), _continuation(new_sample))
    if samples.row_count:
        console.print(samples)


def _print_common(console: Console, pairs: Sequence[tuple[Sample, Sample]], before: int, after: int) -> None:
    """Samples that were refused are in one evaluation alone: how the scores of the others moved."""
    told = f"Some samples were refused: of {before} before and {after} after {len(pairs)} are in both."
    if pairs:
        told += f" Over these the score went from {_means([(old.score, new.score) for old, new in pairs])}"
        judged = [(old.judge, new.judge) for old, new in pairs if old.judge is not None and new.judge is not None]
        told += f", the held-out judge's, of {len(judged)}, from {_means(judged)}." if judged else "."
    console.print(told, highlight=False, soft_wrap=True)


def _means(pairs: Sequence[tuple[float, float]]) -> str:
    old, new = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return f"{old:+.3f} to {new:+.3f}"


def print_troubles(console: Console, records: Sequence[Record]) -> None:
    """Print which troubles the run's steps showed, for who was not there when they were logged."""
    for key in sorted({key for record in records for key in record if key.startswith(_TROUBLE)}):
        looked = [record for record in records if key in record]
        seen = [f"{record['step']:g}" for record in looked if record[key]]
        if seen:
            which = f"{len(seen)} of {len(looked)} steps, first in step {seen[0]}, last in step {seen[-1]}"
            console.print(f"trouble: {key.removeprefix(_TROUBLE)} in {which}", highlight=False, soft_wrap=True)


def _continuation(sample: Sample) -> Text:
    return Text.assemble(sample.continuation.strip(), (f"\nscore {sample.score:+.2f}", "dim"))


def plot_curves(path: Path, records: Sequence[Record], title: str) -> None:
    """Draw score, judge, KL and the seconds of each phase over the steps as a PNG."""
    from matplotlib import pyplot  # noqa: PLC0415 - after the backend is chosen

    steps = [record for record in records if "score/mean" in record]
    heldout = [record for record in records if "heldout/score" in record]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    score, kl, seconds = axes
    # A line of one point is not drawn.
    dot = "." if len(steps) == 1 else ""
    score.plot([r["step"] for r in steps], [r["score/mean"] for r in steps], marker=dot, label="training prompts")
    if judged := [r for r in steps if "judge/mean" in r]:
        score.plot([r["step"] for r in judged], [r["judge/mean"] for r in judged], "o-", ms=3, label="held-out judge")
    score.errorbar(
        [r["step"] for r in heldout],
        [r["heldout/score"] for r in heldout],
        yerr=[r["heldout/score_standard_error"] for r in heldout],
        fmt="s",
        color="black",
        label="held-out prompts",
    )
    score.set(xlabel="step", ylabel="score", title="score")
    score.legend()
    kl.plot([r["step"] for r in steps], [r["kl/reference"] for r in steps], marker=dot, color="tab:red")
    kl.set(xlabel="step", ylabel="nats a response", title="KL to the reference")
    bottom = [0.0] * len(steps)
    phases = [phase_seconds(r) for r in steps]
    for phase in dict.fromkeys(phase for each in phases for phase in each):
        values = [each.get(phase, 0.0) for each in phases]
        seconds.bar([r["step"] for r in steps], values, bottom=bottom, width=1.0, label=phase.replace("_", " "))
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    # Room above the bars for the legend.
    seconds.set(xlabel="step", ylabel="seconds", title="seconds a step", ylim=(0, 1.35 * max(bottom, default=1.0)))
    seconds.legend(fontsize="small", ncols=2, loc="upper center")
    figure.suptitle("\n".join(textwrap.wrap(title, 120)))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def phase_seconds(record: Record) -> dict[str, float]:
    """The seconds of a step by phase, which add up to no more than the step's.

    Rollouts that were made while the step before trained took none of it: only what they were waited for counts.
    """
    making, learning = (
        {phase: record.get(f"seconds/{phase}", 0.0) for phase in phases}
        for phases in (("generate", "score_and_reference"), ("old_logprobs", "update", "push"))
    )
    made = sum(making.values())
    waited = record.get("seconds/rollout_wait", made)
    return (making if waited >= made else {"rollout_wait": waited}) | learning


def _figures(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str]]:
    def pair(name: str, old: float | None, new: float | None, digits: int) -> tuple[str, str, str]:
        return (name, *("-" if value is None else f"{value:.{digits}f}" for value in (old, new)))  # pyright: ignore

    return [
        pair("mean score", before.score, after.score, 3),
        pair("  its standard error", before.score_standard_error, after.score_standard_error, 3),
        pair("held-out judge", before.judge, after.judge, 3),
        pair("  its standard error", before.judge_standard_error, after.judge_standard_error, 3),
        pair("KL to the reference, nats a response", before.kl, after.kl, 2),
        pair("response length, tokens", before.length, after.length, 1),
        pair("distinct-2", before.distinct_2, after.distinct_2, 3),
    ]


def _change(old: str, new: str) -> str:
    return "" if "-" in (old, new) else f"{float(new) - float(old):+.2f}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
