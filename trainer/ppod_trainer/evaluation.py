"""Evaluation on held-out prompts with fixed seeds: what a run is judged by, before and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ppod import RewardClient
from ppod.tensors import TokenArray
from ppod_trainer.collector import RolloutCollector
from ppod_trainer.metrics import StepTimer
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import ScoredRollout, sample_seed

Decode = Callable[[TokenArray], str]

_EVALUATION_SEED = 7  # Not the run's: every run is judged on the same draws.


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its continuation, as text, and its scores."""

    prompt: str
    continuation: str
    score: float
    judge: float | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures over the held-out prompts.

    Attributes:
        score, score_standard_error, score_std: reward-model score: mean, standard error of it, standard deviation.
        judge, judge_standard_error: the held-out judge's; None without a judge.
        kl: mean over responses of the summed log(policy / reference) of the sampled tokens, nats a response.
        length: mean tokens of a response.
        distinct_2: different word pairs over all word pairs of the continuations.
        samples: all of them, in the order of the prompts.
    """

    step: int
    score: float
    score_standard_error: float
    score_std: float
    judge: float | None
    judge_standard_error: float | None
    kl: float
    length: float
    distinct_2: float
    samples: tuple[Sample, ...]

    def record(self) -> dict[str, float]:
        """As metrics, under `heldout/`."""
        figures = {
            "heldout/score": self.score,
            "heldout/score_standard_error": self.score_standard_error,
            "heldout/score_std": self.score_std,
            "heldout/kl": self.kl,
            "heldout/length": self.length,
            "heldout/distinct_2": self.distinct_2,
        }
        if self.judge is not None and self.judge_standard_error is not None:
            figures["heldout/judge"] = self.judge
            figures["heldout/judge_standard_error"] = self.judge_standard_error
        return figures


class Evaluator:
    """Samples, scores and judges the held-out prompts.

    Args:
        collector: the services that training uses.
        judge: client of the held-out judge, or None.
        prompts: the held-out prompts.
        decode: turns token ids into text, special tokens left out.
    """

    def __init__(
        self, collector: RolloutCollector, judge: RewardClient | None, prompts: Sequence[Prompt], decode: Decode
    ) -> None:
        self._collector = collector
        self._judge = judge
        self._prompts = prompts
        self._decode = decode

    def evaluate(self, step: int, policy_version: int) -> Evaluation:
        """Evaluate the weights of a version. Raises PpodError when a service fails."""
        seeds = [sample_seed(_EVALUATION_SEED, "heldout", 0, index) for index in range(len(self._prompts))]
        scored = self._collector.collect(self._prompts, seeds, policy_version, StepTimer())
        judged = self.judge(scored)
        samples = tuple(
            self._sample(one, None if judged is None else float(judged[position]))
            for position, one in enumerate(scored)
        )
        scores = np.array([one.outcome for one in scored])
        kl = [float((one.rollout.sampler_logprobs - one.ref_logprobs)[one.rollout.action_mask].sum()) for one in scored]
        return Evaluation(
            step=step,
            score=float(scores.mean()),
            score_standard_error=standard_error(scores),
            score_std=float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
            judge=None if judged is None else float(judged.mean()),
            judge_standard_error=None if judged is None else standard_error(judged),
            kl=float(np.mean(kl)),
            length=float(np.mean([one.rollout.sampled for one in scored])),
            distinct_2=distinct_2([sample.continuation for sample in samples]),
            samples=samples,
        )

    def judge(self, scored: Sequence[ScoredRollout]) -> np.ndarray | None:
        """The held-out judge's scores, float32 [samples]; None without a judge."""
        if self._judge is None:
            return None
        return self._judge.score([one.rollout.visible_tokens for one in scored]).values

    def _sample(self, scored: ScoredRollout, judge: float | None) -> Sample:
        rollout = scored.rollout
        return Sample(
            prompt=self._decode(rollout.prompt.token_ids),
            continuation=self._decode(rollout.response),
            score=scored.outcome,
            judge=judge,
            tokens=rollout.sampled,
        )


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean; 0 for fewer than two values."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def distinct_2(texts: Sequence[str]) -> float:
    """Different word bigrams over all word bigrams (Li et al. 2016); 0 where there is none."""
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def write_samples(path: Path, evaluation: Evaluation) -> None:
    """Write every sample as one JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"step": evaluation.step, **asdict(sample)}, ensure_ascii=False) for sample in evaluation.samples
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_evaluation(path: Path) -> Evaluation:
    """Read an evaluation that was written as JSON."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["samples"] = tuple(Sample(**sample) for sample in values["samples"])
    return Evaluation(**values)
