"""Evaluation on held-out prompts with fixed seeds: what a run is judged by, before and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ppod import RewardClient
from ppod.tensors import TokenArray
from ppod_models.decoding import decode_parts
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.collector import RolloutCollector
from ppod_trainer.errors import TrainerError
from ppod_trainer.metrics import StepTimer
from ppod_trainer.prompts import Prompt, references_of, turns_of
from ppod_trainer.reward_versions import RewardVersion
from ppod_trainer.rollouts import Rollout, ScoredRollout, sample_seed

Decode = Callable[[TokenArray], str]

_STOP = BadSamples("stop")
_EVALUATION_SEED = 7  # Not the run's: every run is judged on the same draws.


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its continuation, as text, and its scores.

    Attributes:
        seed: that it was sampled with; 0 in evaluations from before it was kept.
    """

    prompt: str
    continuation: str
    score: float
    judge: float | None
    tokens: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures over the held-out prompts.

    Attributes:
        score, score_standard_error, score_std: of the outcomes, what an environment paid included: mean, standard error
            of it, standard deviation.
        judge, judge_standard_error: the held-out judge's, over the samples that it does not refuse; None where there is
            none.
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
        bad_samples: what becomes of a sample that the judge refuses.
    """

    def __init__(
        self,
        collector: RolloutCollector,
        judge: RewardClient | None,
        prompts: Sequence[Prompt],
        decode: Decode,
        bad_samples: BadSamples = _STOP,
    ) -> None:
        self._bad_samples = bad_samples
        self._collector = collector
        self._judge = judge
        self._judge_version = RewardVersion("the held-out judge")
        self._prompts = prompts
        self._decode = decode

    def evaluate(self, step: int, policy_version: int) -> Evaluation:
        """Evaluate the weights of a version.

        Raises:
            PpodError: a service failed.
            TrainerError: every sample was refused, so that there is nothing to tell of.
        """
        seeds = [sample_seed(_EVALUATION_SEED, "heldout", 0, index) for index in range(len(self._prompts))]
        scored = self._collector.collect(self._prompts, seeds, policy_version, StepTimer())
        if not scored:
            raise TrainerError(
                f"evaluation after step {step}: all {len(seeds)} samples of the held-out prompts were refused; look at "
                "the warnings above"
            )
        judged = self.judge(scored)
        samples = tuple(self._sample(one, judged.get(one.rollout.seed)) for one in scored)
        judgements = np.array(list(judged.values()), dtype=np.float32)
        scores = np.array([one.outcome for one in scored])
        kl = [float((one.rollout.sampler_logprobs - one.ref_logprobs)[one.rollout.action_mask].sum()) for one in scored]
        return Evaluation(
            step=step,
            score=float(scores.mean()),
            score_standard_error=standard_error(scores),
            score_std=float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
            judge=float(judgements.mean()) if judged else None,
            judge_standard_error=standard_error(judgements) if judged else None,
            kl=float(np.mean(kl)),
            length=float(np.mean([one.rollout.sampled for one in scored])),
            distinct_2=distinct_2([sample.continuation for sample in samples]),
            samples=samples,
        )

    def judge(self, scored: Sequence[ScoredRollout]) -> dict[int, float]:
        """The held-out judge's scores by the samples' seeds, in their order: of all but those that it refuses.

        Empty without a judge.

        Raises:
            PpodError: the judge failed; or it named a bad sample and the configuration says to stop.
        """
        judge = self._judge
        if judge is None:
            return {}

        def score(kept: Sequence[Rollout]) -> list[float]:
            prompts = [rollout.prompt for rollout in kept]
            scores = judge.score(
                [rollout.judged_tokens for rollout in kept],
                prompt_lengths=[len(prompt.token_ids) for prompt in prompts],
                prompts=turns_of(prompts),
                references=references_of(prompts),
            )
            self._judge_version.see(scores.state)
            return scores.values.tolist()

        kept, scores = self._bad_samples.call([one.rollout for one in scored], score)
        return {rollout.seed: value for rollout, value in zip(kept, scores, strict=True)}

    def _sample(self, scored: ScoredRollout, judge: float | None) -> Sample:
        rollout = scored.rollout
        ends = len(rollout.prompt.token_ids), len(rollout.tokens)
        prompt, continuation = decode_parts(self._decode, rollout.tokens, ends)
        return Sample(
            prompt=prompt,
            continuation=continuation,
            score=scored.outcome,
            judge=judge,
            tokens=rollout.sampled,
            seed=rollout.seed,
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
