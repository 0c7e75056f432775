"""What GenerationService is called with; free of I/O."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy.typing as npt

from ppod.client.completions import Completion, CompletionChecks, GenerateOptions, Sampling, check_unsigned
from ppod.client.core import ClientCore, Program, SingleJob, parse
from ppod.client.identity import ModelDescription, Pin, SeedPromise, check_state, new_request_id, read_limits
from ppod.errors import FilterFailed, InvalidArgument, InvalidReply, NonFiniteOutput, PpodError
from ppod.tensors import pack_sequences
from ppod.v1 import generation_pb2

GENERATION_SERVICE = "ppod.v1.GenerationService"


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    """One completion of a request: position of its prompt, and which of the prompt's completions it is."""

    index: int
    sample: int


class GenerateJob:
    """Samples completions of prompts. A stream that broke is asked for again, for what is missing.

    Without seeds that is so only until the first completion: a request repeated in part would mix two draws.
    """

    method = f"/{GENERATION_SERVICE}/Generate"

    def __init__(
        self, prompts: Sequence[npt.ArrayLike], sampling: Sampling, options: GenerateOptions, pin: Pin
    ) -> None:
        check_unsigned("seeds", options.seeds, bits=64)
        check_unsigned("resumed_tokens", options.resumed_tokens, bits=32)
        self._request = generation_pb2.GenerateRequest(
            request_id=options.request_id or new_request_id(),
            selector=pin.to_proto(),
            prompts=pack_sequences(prompts),
            sampling=sampling.to_proto(),
            seeds=options.seeds,
            priority=options.priority.value,
            resumed_tokens=options.resumed_tokens,
        )
        if options.weight_version is not None:
            self._request.selector.weight_version = options.weight_version
        self._checks = CompletionChecks(sampling, options.weight_version, pin)
        self._n = max(sampling.n, 1)
        self._max_tokens = sampling.max_tokens
        self._all = [_Place(index, sample) for index in range(len(prompts)) for sample in range(self._n)]
        self._missing = set(self._all)
        self._asked, self._asked_n = self._all, self._n

    @property
    def tokens(self) -> int:
        """Most tokens that the request will hold."""
        return self._n * sum(self._request.prompts.lengths) + self._max_tokens * len(self._all)

    @property
    def resumable(self) -> bool:
        """Whether what is missing may be asked for again."""
        return bool(self._request.seeds) or len(self._missing) == len(self._all)

    @property
    def complete(self) -> bool:
        """Whether every completion is there."""
        return bool(self._all) and not self._missing

    def encode(self) -> bytes:
        """The request for the completions that are missing."""
        if len(self._missing) == len(self._all):
            self._asked, self._asked_n = self._all, self._n
            return self._request.SerializeToString()
        # Each by itself: of a prompt's completions some may be here already, and n is the same for all prompts.
        self._asked, self._asked_n = sorted(self._missing), 1
        rest = generation_pb2.GenerateRequest()
        rest.CopyFrom(self._request)
        rest.sampling.n = 1
        lengths = list(self._request.prompts.lengths)
        ends = [0, *itertools.accumulate(4 * length for length in lengths)]
        flat = memoryview(self._request.prompts.token_ids)
        rest.prompts.token_ids = b"".join(flat[ends[each.index] : ends[each.index + 1]] for each in self._asked)
        rest.prompts.lengths[:] = [lengths[each.index] for each in self._asked]
        rest.seeds[:] = [self._request.seeds[self._number(each)] for each in self._asked]
        if self._request.resumed_tokens:
            rest.resumed_tokens[:] = [self._request.resumed_tokens[each.index] for each in self._asked]
        return rest.SerializeToString()

    def accept(self, data: bytes) -> Completion:
        """Check a completion, and strike it off."""
        reply = parse(generation_pb2.GenerateResponse, data)
        if reply.sample >= self._asked_n:
            raise InvalidReply("sample", str(reply.sample), f"a number below {self._asked_n}")
        if reply.index >= len(self._asked) // self._asked_n:
            raise InvalidReply("index", str(reply.index), f"an index below {len(self._asked) // self._asked_n}")
        place = self._asked[reply.index * self._asked_n + reply.sample]
        if place not in self._missing:
            raise InvalidReply("index", f"{reply.index} twice", f"{self._n} completion(s) for each prompt")
        seeds = self._request.seeds
        if seeds and reply.seed != seeds[self._number(place)]:
            raise InvalidReply("seed", str(reply.seed), f"{seeds[self._number(place)]}, as asked for")
        completion = self._checks.read(reply, place.index, place.sample)
        self._missing.discard(place)
        return completion

    def locate(self, error: PpodError) -> None:
        """Let an error name its prompt by the position in the whole request, where only a part was asked for again."""
        if isinstance(error, InvalidArgument | NonFiniteOutput | FilterFailed) and error.sample is not None:
            # The server counts prompts, and here stand their completions.
            place = error.sample * self._asked_n
            if 0 <= place < len(self._asked):
                error.sample = self._asked[place].index

    def finish(self) -> None:
        """Raise InvalidReply unless every completion is there."""
        if self._missing:
            first = min(self._missing)
            which = f" {first.sample}" if self._n > 1 else ""
            expected = f"{self._n} completion(s) for each prompt"
            raise InvalidReply("index", f"no completion{which} of prompt {first.index}", expected)

    def _number(self, place: _Place) -> int:
        return place.index * self._n + place.sample


def describe(core: ClientCore, timeout_s: float | None) -> Program[ModelDescription]:
    """Ask which model is served and what it takes."""
    job = SingleJob(f"/{GENERATION_SERVICE}/GetGenerationModel", generation_pb2.GetGenerationModelRequest())
    yield from core.ask(job, timeout_s)
    reply = parse(generation_pb2.GetGenerationModelResponse, job.reply)
    state = check_state(reply.model, core.pin)
    try:
        promise = SeedPromise(reply.seed_promise)
    except ValueError:
        # A newer server may promise what this client does not know.
        promise = SeedPromise.UNKNOWN
    return core.learn(ModelDescription(state, read_limits(reply.limits), tuple(reply.eos_token_ids), promise))
