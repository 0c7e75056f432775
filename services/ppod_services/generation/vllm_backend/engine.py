"""Samples completions with vLLM, which batches them itself: a run hands it items and carries what comes back."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence

from tokenizers import Tokenizer

from ppod.errors import Internal, InvalidArgument, PpodError, Unavailable
from ppod_services.core.scheduler import JoinableSink
from ppod_services.core.weights import ServedWeights
from ppod_services.generation.requests import GeneratedSample, GenerationItem
from ppod_services.generation.vllm_backend.api import EngineDeadError, VLLMValidationError, make_sampling
from ppod_services.generation.vllm_backend.completions import OutsideStops, read_sample, sampling_values, unbegun_sample
from ppod_services.generation.vllm_backend.host import Answer, EngineHost, Prompt

_POLL_S = 0.005
"""How often newcomers and those who want the model are looked for, where no completion ends meanwhile."""
_SWEEP_S = 0.1
"""How often completions are looked for that nobody waits for any more."""

Sink = JoinableSink[GenerationItem, GeneratedSample]


class VllmEngine:
    """Runs batches of the scheduler on vLLM.

    Args:
        host: the engine.
        weights: tells the version that serves.
        tokenizer: the model's.
        both_logprobs: whether the engine tells unscaled logprobs besides those of the sampled distribution.
    """

    def __init__(self, host: EngineHost, weights: ServedWeights, tokenizer: Tokenizer, *, both_logprobs: bool) -> None:
        self._host = host
        self._weights = weights
        self._tokenizer = tokenizer
        self._both_logprobs = both_logprobs

    def run(self, items: Sequence[GenerationItem], sink: Sink) -> None:
        """Complete each prompt, and emit each completion as soon as it is finished."""
        run = _Run(self._host, self._weights, self._tokenizer, sink, both_logprobs=self._both_logprobs)
        try:
            run.add(items)
            while run.active:
                run.collect(_POLL_S)
                if sink.between_steps():
                    run.hand_back()
                    return
                run.sweep()
                run.add(sink.more())
        finally:
            run.close()


class _Run:
    """The completions of one run that are under way, by their positions."""

    def __init__(
        self, host: EngineHost, weights: ServedWeights, tokenizer: Tokenizer, sink: Sink, *, both_logprobs: bool
    ) -> None:
        self._host = host
        self._weights = weights
        self._tokenizer = tokenizer
        self._sink = sink
        self._both_logprobs = both_logprobs
        self._count = 0
        self._active: dict[int, tuple[GenerationItem, str]] = {}
        self._answers: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
        self._swept_s = time.monotonic()

    @property
    def active(self) -> bool:
        """Whether a completion is under way."""
        return bool(self._active)

    def add(self, items: Sequence[GenerationItem]) -> None:
        """Start completions; hand back those whose version is gone, and refuse those that this engine cannot make."""
        prompts: list[Prompt] = []
        for item in items:
            position, self._count = self._count, self._count + 1
            if item.weight_version not in (None, self._weights.version):
                # It insists on a version that went out of service while it waited.
                self._sink.emit(position, unbegun_sample(item, item.weight_version))
                continue
            try:
                prompt = self._prompt(position, item)
            except PpodError as error:
                self._sink.fail(position, error)
                continue
            self._active[position] = (item, prompt.request_id)
            prompts.append(prompt)
        if prompts:
            self._host.check()
            self._host.begin(prompts)

    def collect(self, timeout_s: float) -> None:
        """Carry what has ended; wait for the first one.

        Raises:
            Unavailable: the engine can serve no more.
        """
        try:
            position, answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self._host.check()
            return
        self._settle(position, answer)
        while not self._answers.empty():
            self._settle(*self._answers.get())

    def sweep(self) -> None:
        """Drop completions that nobody waits for any more."""
        now_s = time.monotonic()
        if now_s - self._swept_s < _SWEEP_S:
            return
        self._swept_s = now_s
        gone = [position for position in self._active if self._sink.abandoned(position)]
        if gone:
            self._host.abort([self._active.pop(position)[1] for position in gone])

    def hand_back(self) -> None:
        """End all completions where they are, and carry what they have."""
        self._host.abort([request_id for _, request_id in self._active.values()])
        while self._active:
            self.collect(_POLL_S)

    def close(self) -> None:
        """Leave nothing behind in the engine, whatever ended the run."""
        if self._active and self._host.failure is None:
            self._host.abort([request_id for _, request_id in self._active.values()])

    def _prompt(self, position: int, item: GenerationItem) -> Prompt:
        """A completion as vLLM is to make it; raise PpodError when it cannot be."""
        stops = OutsideStops.needed(item, self._tokenizer)
        values = sampling_values(item, both_logprobs=self._both_logprobs, finds_stops=stops is None)
        try:
            sampling = make_sampling(values, stepwise=stops is not None)
        except VLLMValidationError as error:
            raise _of_one_request(error) from error
        return Prompt(
            request_id=self._host.new_id(),
            token_ids=item.prompt.tolist(),
            sampling=sampling,
            pinned=item.weight_version is not None,
            stops=stops,
            done=_Taker(position, self._answers),
        )

    def _settle(self, position: int, answer: Answer) -> None:
        taken = self._active.pop(position, None)
        if taken is None:
            # Nobody waits for it any more.
            return
        error = answer.exception()
        if isinstance(error, EngineDeadError) or (error is not None and self._host.failure is not None):
            self._active[position] = taken
            raise Unavailable(self._host.failure or str(error)) from error
        item = taken[0]
        # Where new weights ended one that insists on those before, these serve already.
        serving = self._weights.version if item.weight_version is None else item.weight_version
        try:
            if error is not None:
                raise _of_one_request(error) from error
            sample = read_sample(item, answer.result(), both_logprobs=self._both_logprobs, serving=serving)
        except PpodError as fault:
            self._sink.fail(position, fault)
        else:
            self._sink.emit(position, sample)


class _Taker:
    """Puts an answer into the run's queue, with its position."""

    def __init__(self, position: int, answers: queue.SimpleQueue[tuple[int, Answer]]) -> None:
        self._position = position
        self._answers = answers

    def __call__(self, answer: Answer) -> None:
        self._answers.put((self._position, answer))


def _of_one_request(error: BaseException) -> PpodError:
    """What its caller hears of an error that leaves the engine and all others unharmed."""
    if isinstance(error, PpodError):
        return error
    if isinstance(error, VLLMValidationError):
        return InvalidArgument("sampling", str(error), "what vLLM takes")
    return Internal("vLLM failed to complete a prompt; the server's log has the cause")
