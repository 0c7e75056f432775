"""What becomes of a sample that a service refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol, TypeVar

from ppod import PpodError
from ppod_trainer.errors import with_notes
from ppod_trainer.patience import Patience
from ppod_trainer.prompts import Prompt

log = logging.getLogger(__name__)


class Prompted(Protocol):
    """What has a prompt."""

    @property
    def prompt(self) -> Prompt:
        """What it began with."""
        ...


SampleT = TypeVar("SampleT", bound=Prompted)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class BadSamples:
    """Calls services; where an error names one sample, the run stops, or goes on without it.

    Attributes:
        mode: which of the two; a sample that is left out is logged.
        patience: with a service that refuses all of them for now.
    """

    mode: Literal["stop", "skip"]
    patience: Patience = field(default_factory=Patience)

    def call(
        self, samples: Sequence[SampleT], call: Callable[[Sequence[SampleT]], Sequence[ResultT | PpodError]]
    ) -> tuple[list[SampleT], list[ResultT]]:
        """Call a service with all samples, and again without each that it refuses.

        Args:
            samples: what it is asked about.
            call: asks it; a result may be an error of its sample alone, which leaves the others theirs.

        Returns:
            The samples that are left, and a result for each.

        Raises:
            PpodError: it names no sample, or the mode is "stop"; a note tells the sample's prompt.
        """
        kept = list(samples)
        while kept:
            try:
                results = self.patience.ask(partial(call, kept))
            except PpodError as error:
                sample: int | None = getattr(error, "sample", None)
                if sample is None or not 0 <= sample < len(kept):
                    raise
                self._leave_out(error, sample, kept[sample])
                del kept[sample]
            else:
                return self._without_errors(kept, results)
        return [], []

    def _without_errors(
        self, samples: Sequence[SampleT], results: Sequence[ResultT | PpodError]
    ) -> tuple[list[SampleT], list[ResultT]]:
        kept: list[SampleT] = []
        found: list[ResultT] = []
        for number, (sample, result) in enumerate(zip(samples, results, strict=True)):
            if isinstance(result, PpodError):
                self._leave_out(result, number, sample)
            else:
                kept.append(sample)
                found.append(result)
        return kept, found

    def _leave_out(self, error: PpodError, number: int, sample: Prompted) -> None:
        # The sample's number is its place in one request.
        error.add_note(f"sample {number} has prompt {sample.prompt.index}")
        if self.mode == "stop":
            error.add_note("rollout.on_bad_sample: skip would leave it out")
            raise error
        log.warning("dropped a sample: %s", with_notes(error))
