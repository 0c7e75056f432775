"""What RewardService is asked, and how its replies are checked; free of I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from ppod.client.breakdown import (
    RewardComponent,
    RewardDescription,
    join_components,
    read_component,
    read_description,
)
from ppod.client.core import ClientCore, Program, SingleJob, parse
from ppod.client.identity import (
    ModelDescription,
    ModelState,
    Pin,
    Priority,
    Timing,
    check_state,
    join_timings,
    new_request_id,
    read_limits,
    read_timing,
)
from ppod.client.jobs import Answerer
from ppod.client.splitting import RowSizes
from ppod.client.texts import check_texts
from ppod.errors import InvalidArgument, InvalidReply
from ppod.tensors import FloatArray, TokenArray, pack_sequences, split_ragged, unpack_reply_floats, unpack_reply_tokens
from ppod.v1 import common_pb2, reward_pb2

REWARD_SERVICE = "ppod.v1.RewardService"
_TOKENS_PER_BYTE = 0.25
"""Tokens that a byte of text makes, roughly; only for sharing work out."""


class Truncation(Enum):
    """What the server does with a sequence longer than its model takes."""

    NONE = reward_pb2.TRUNCATION_SIDE_NONE
    LEFT = reward_pb2.TRUNCATION_SIDE_LEFT
    RIGHT = reward_pb2.TRUNCATION_SIDE_RIGHT


class Granularity(Enum):
    """How finely the way to the end of a sequence is scored."""

    STEP = reward_pb2.PROCESS_GRANULARITY_STEP
    TOKEN = reward_pb2.PROCESS_GRANULARITY_TOKEN


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn of a conversation; `role` as the model's chat template names it: "system", "user", "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, eq=False)
class ProcessScores:
    """Scores along the way.

    Attributes:
        positions: for each sequence int32 [scored positions], ascending: how much of it each score has seen, in tokens
            of the whole sequence for token ids, in characters for text.
        scores: for each sequence float32 [scored positions], finite.
    """

    positions: list[TokenArray]
    scores: list[FloatArray]


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one request.

    Attributes:
        values: float32 [sequences], finite.
        truncated_tokens: tokens dropped from each sequence; all zero unless truncation was asked for.
        state: which model answered.
        timing: where the server's time went.
        breakdown: how the scores came about; None where the server does not tell.
        process: scores along the way; None unless asked for.
    """

    values: FloatArray
    truncated_tokens: tuple[int, ...]
    state: ModelState
    timing: Timing
    breakdown: RewardComponent | None = None
    process: ProcessScores | None = None


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What every kind of input may ask for; see `RewardClient.score`."""

    truncation: Truncation = Truncation.NONE
    references: Sequence[str] = ()
    process: Granularity | int | None = None
    priority: Priority = Priority.NORMAL
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class _Part:
    scores: Scores
    start: int


class ScoreJob:
    """Scores sequences of one kind of input."""

    method = f"/{REWARD_SERVICE}/Score"
    repeatable = True

    def __init__(
        self, request: reward_pb2.ScoreRequest, sizes: RowSizes, lengths: Sequence[int] | None, pin: Pin
    ) -> None:
        self.sizes = sizes
        self.input_field = request.WhichOneof("input") or "input"
        self._request = request
        self._lengths = lengths
        self._pin = pin
        self._parts: list[_Part] = []

    def encode(self, rows: range, part: int | None) -> bytes:
        """The request for some of the sequences."""
        whole = self._request
        if part is None:
            return whole.SerializeToString()
        cut = reward_pb2.ScoreRequest(
            request_id=f"{whole.request_id}/{part}",
            selector=whole.selector,
            truncation=whole.truncation,
            priority=whole.priority,
            process=whole.process,
            process_interval=whole.process_interval,
            prompt_lengths=whole.prompt_lengths[rows.start : rows.stop],
            references=whole.references[rows.start : rows.stop],
        )
        if whole.HasField("prompts"):
            cut.prompts.conversations.extend(whole.prompts.conversations[rows.start : rows.stop])
        match self.input_field:
            case "tokens":
                start = 4 * sum(whole.tokens.lengths[: rows.start])
                lengths = whole.tokens.lengths[rows.start : rows.stop]
                cut.tokens.token_ids = whole.tokens.token_ids[start : start + 4 * sum(lengths)]
                cut.tokens.lengths.extend(lengths)
            case "texts":
                cut.texts.texts.extend(whole.texts.texts[rows.start : rows.stop])
                cut.texts.prompts.extend(whole.texts.prompts[rows.start : rows.stop])
            case _:
                cut.conversations.conversations.extend(whole.conversations.conversations[rows.start : rows.stop])
        return cut.SerializeToString()

    def accept(self, rows: range, data: bytes) -> Answerer:
        """Check and keep a reply."""
        reply = parse(reward_pb2.ScoreResponse, data)
        count = len(rows)
        values = unpack_reply_floats(reply.scores, count, "scores")
        truncated = tuple(reply.truncated_tokens) or (0,) * count
        if len(truncated) != count:
            raise InvalidReply("truncated_tokens", f"{len(truncated)} values", f"{count} or none")
        state = check_state(reply.model, self._pin)
        breakdown = read_component(reply.breakdown, count) if reply.HasField("breakdown") else None
        if breakdown is not None and not np.array_equal(breakdown.scores, values):
            raise InvalidReply("breakdown.scores", "other values", "the values of scores")
        scores = Scores(values, truncated, state, read_timing(reply.timing), breakdown, self._read_process(rows, reply))
        self._parts = [each for each in self._parts if each.start != rows.start]
        self._parts.append(_Part(scores, rows.start))
        if breakdown is None:
            return Answerer(state, (state.weight_version,))
        return Answerer(state, (state.weight_version, *breakdown.versions), breakdown.signature)

    def forget(self) -> None:
        """Drop the replies kept so far."""
        self._parts.clear()

    def result(self) -> Scores:
        """All parts as one."""
        parts = [part.scores for part in sorted(self._parts, key=lambda part: part.start)]
        if len(parts) == 1:
            return parts[0]
        breakdowns = [part.breakdown for part in parts if part.breakdown is not None]
        processes = [part.process for part in parts if part.process is not None]
        return Scores(
            values=np.concatenate([part.values for part in parts]),
            truncated_tokens=tuple(dropped for part in parts for dropped in part.truncated_tokens),
            state=parts[0].state,
            timing=join_timings([part.timing for part in parts]),
            breakdown=join_components(breakdowns) if breakdowns else None,
            process=ProcessScores(
                positions=[each for process in processes for each in process.positions],
                scores=[each for process in processes for each in process.scores],
            )
            if processes
            else None,
        )

    def _read_process(self, rows: range, reply: reward_pb2.ScoreResponse) -> ProcessScores | None:
        wanted = self._request.process != reward_pb2.PROCESS_GRANULARITY_UNSPECIFIED
        if reply.HasField("process") != wanted:
            raise InvalidReply("process", "none" if wanted else "some", "some" if wanted else "none, as asked for")
        if not wanted:
            return None
        lengths = list(reply.process.lengths)
        if len(lengths) != len(rows):
            raise InvalidReply("process.lengths", f"{len(lengths)} values", f"{len(rows)}, one for each sequence")
        if self._request.process == reward_pb2.PROCESS_GRANULARITY_TOKEN:
            self._check_token_counts(rows, lengths)
        total = sum(lengths)
        flat = unpack_reply_tokens(reply.process.positions, "process.positions") if total else np.empty(0, np.int32)
        if len(flat) != total:
            raise InvalidReply("process.positions", f"{len(flat)} values", f"{total}, as process.lengths tell")
        scores = unpack_reply_floats(reply.process.scores, total, "process.scores")
        positions = split_ragged(flat, lengths)
        # The last message of a conversation may be empty: it is one step, at whose end nothing of it was seen.
        least = 0 if self.input_field == "conversations" else 1
        for row, places in zip(rows, positions, strict=True):
            most = None if self._lengths is None else self._lengths[row]
            if len(places) and (places[0] < least or (np.diff(places) < 1).any() or (most and places[-1] > most)):
                raise InvalidReply("process.positions", f"{places.tolist()} of sequence {row}", "ascending ones within")
        return ProcessScores(positions, split_ragged(scores, lengths))

    def _check_token_counts(self, rows: range, lengths: Sequence[int]) -> None:
        prompts = self._request.prompt_lengths
        for row, found in zip(rows, lengths, strict=True):
            whole = 0 if self._lengths is None else self._lengths[row]
            tokens = whole - (prompts[row] if prompts else 0)
            # The first one, every so many behind it, and the last one.
            expected = -(-(tokens - 1) // (self._request.process_interval or 1)) + 1
            # Truncation may have dropped some of them.
            if found > expected or (found < expected and self._request.truncation == Truncation.NONE.value):
                raise InvalidReply("process.lengths", f"{found} for sequence {row}", f"{expected}, as response tokens")


def token_job(
    sequences: Sequence[npt.ArrayLike],
    prompt_lengths: Sequence[int],
    prompts: Sequence[Sequence[ChatTurn]],
    options: ScoreOptions,
    pin: Pin,
) -> ScoreJob:
    """Score token ids."""
    tokens = pack_sequences(sequences)
    if prompt_lengths:
        _check_count("prompt_lengths", len(prompt_lengths), len(sequences))
    beside = _reference_bytes(options, len(sequences))
    request = _request(options, pin)
    request.tokens.CopyFrom(tokens)
    request.prompt_lengths.extend(prompt_lengths)
    if prompts:
        _check_count("prompts", len(prompts), len(sequences))
    if any(prompts):
        sizes = _add_conversations(request.prompts, prompts, "prompts")
        beside = [size + more for size, more in zip(beside, sizes, strict=True)]
    lengths = list(tokens.lengths)
    wire_bytes = [4 * length + more for length, more in zip(lengths, beside, strict=True)]
    return ScoreJob(request, RowSizes(lengths, wire_bytes), lengths, pin)


def text_job(texts: Sequence[str], prompts: Sequence[str], options: ScoreOptions, pin: Pin) -> ScoreJob:
    """Score texts, each after its prompt where there are prompts."""
    after, before = check_texts("texts", texts), check_texts("texts.prompts", prompts)
    if prompts:
        _check_count("texts.prompts", len(prompts), len(texts))
    references = _reference_bytes(options, len(texts))
    request = _request(options, pin)
    request.texts.CopyFrom(common_pb2.TextSequences(texts=texts, prompts=prompts))
    sizes = [size + ahead for size, ahead in zip(after, before or [0] * len(texts), strict=True)]
    return ScoreJob(request, _text_sizes(sizes, references), None, pin)


def conversation_job(conversations: Sequence[Sequence[ChatTurn]], options: ScoreOptions, pin: Pin) -> ScoreJob:
    """Score conversations."""
    references = _reference_bytes(options, len(conversations))
    request = _request(options, pin)
    sizes = _add_conversations(request.conversations, conversations, "conversations")
    return ScoreJob(request, _text_sizes(sizes, references), None, pin)


def score(core: ClientCore, job: ScoreJob, timeout_s: float | None) -> Program[Scores]:
    """Deliver a job and put its parts together."""
    yield from core.deliver(job, lambda left_s: describe(core, left_s), timeout_s)
    return job.result()


def describe(core: ClientCore, timeout_s: float | None) -> Program[ModelDescription]:
    """Ask which model is served and what it takes."""
    request = reward_pb2.GetRewardModelRequest(selector=core.pin.to_proto())
    job = SingleJob(f"/{REWARD_SERVICE}/GetRewardModel", request)
    yield from core.ask(job, timeout_s)
    reply = parse(reward_pb2.GetRewardModelResponse, job.reply)
    return core.learn(ModelDescription(check_state(reply.model, core.pin), read_limits(reply.limits)))


def list_rewards(core: ClientCore, timeout_s: float | None) -> Program[tuple[RewardDescription, ...]]:
    """Ask for every reward of the service."""
    job = SingleJob(f"/{REWARD_SERVICE}/ListRewards", reward_pb2.ListRewardsRequest())
    yield from core.ask(job, timeout_s)
    reply = parse(reward_pb2.ListRewardsResponse, job.reply)
    if not reply.rewards:
        raise InvalidReply("rewards", "none", "at least one reward")
    return tuple(read_description(each, f"rewards[{index}]") for index, each in enumerate(reply.rewards))


def _add_conversations(
    message: reward_pb2.Conversations, conversations: Sequence[Sequence[ChatTurn]], field: str
) -> list[int]:
    """Returns the bytes of each."""
    check_texts(field, ["".join(turn.role + turn.content for turn in turns) for turns in conversations])
    message.SetInParent()
    for turns in conversations:
        messages = [reward_pb2.ChatMessage(role=turn.role, content=turn.content) for turn in turns]
        message.conversations.add(messages=messages)
    return [conversation.ByteSize() for conversation in message.conversations]


def _reference_bytes(options: ScoreOptions, count: int) -> list[int]:
    """What each sequence's reference adds to a request: a part with long ones must not outgrow a message."""
    sizes = check_texts("references", options.references)
    if sizes:
        _check_count("references", len(sizes), count)
    return sizes or [0] * count


def _request(options: ScoreOptions, pin: Pin) -> reward_pb2.ScoreRequest:
    return reward_pb2.ScoreRequest(
        request_id=options.request_id or new_request_id(),
        selector=pin.to_proto(),
        truncation=options.truncation.value,
        priority=options.priority.value,
        references=options.references,
        process=_granularity(options.process),
        process_interval=options.process if isinstance(options.process, int) else 0,
    )


def _granularity(process: Granularity | int | None) -> reward_pb2.ProcessGranularity:
    if process is None:
        return reward_pb2.PROCESS_GRANULARITY_UNSPECIFIED
    if isinstance(process, int) and process < 1:
        raise InvalidArgument("process", str(process), "1 or more tokens from one score to the next")
    return reward_pb2.PROCESS_GRANULARITY_TOKEN if isinstance(process, int) else process.value


def _check_count(field: str, found: int, expected: int) -> None:
    if found != expected:
        raise InvalidArgument(field, f"{found} values", f"{expected}, one for each sequence, or none")


def _text_sizes(texts: list[int], references: list[int]) -> RowSizes:
    wire_bytes = [text + beside for text, beside in zip(texts, references, strict=True)]
    return RowSizes([1 + int(_TOKENS_PER_BYTE * size) for size in texts], wire_bytes)
