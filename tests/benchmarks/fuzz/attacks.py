"""Requests that are malformed, mutated or merely odd: each follows from a seed and its number, to be sent again."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from ppod.v1 import common_pb2, reference_pb2, reward_pb2

REWARD, REFERENCE = "reward", "reference"
SCORE = "/ppod.v1.RewardService/Score"
LOGPROBS = "/ppod.v1.ReferenceService/ComputeLogprobs"
DESCRIBE = {REWARD: "/ppod.v1.RewardService/GetRewardModel", REFERENCE: "/ppod.v1.ReferenceService/GetReferenceModel"}
_FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e38, float("inf"), float("-inf"), float("nan")]
_INTEGERS = [0, 1, 2, 3, 64, 65, 255, 65_536, 2**31 - 1, 2**31, 2**32 - 1]
_WORDS = [
    "",
    "a",
    "nobody",
    "\0",
    "\u202e\ufeff",
    "😀" * 50,
    "x" * 5_000,
    "'; DROP TABLE models; --",
    "../../etc/passwd",
]
_REWARDS = ["first", "second", "length", "answer", "ensemble", "sum"]


@dataclass(frozen=True, slots=True)
class Attack:
    """One request: which service gets it, under which method name, and what was done to it."""

    kind: str
    service: str
    method: str
    payload: bytes


def good_score(rng: random.Random) -> reward_pb2.ScoreRequest:
    """A request that the tiny model answers."""
    sequences = [[rng.randrange(250) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 4))]
    return reward_pb2.ScoreRequest(request_id=f"good-{rng.randrange(10**6)}", tokens=_pack(sequences))


def good_texts(rng: random.Random) -> reward_pb2.ScoreRequest:
    """The same as text."""
    texts = ["".join(rng.choice("abc é") for _ in range(rng.randint(1, 10))) for _ in range(rng.randint(1, 4))]
    return reward_pb2.ScoreRequest(texts=common_pb2.TextSequences(texts=texts))


def good_logprobs(rng: random.Random) -> reference_pb2.ComputeLogprobsRequest:
    """A request that the tiny reference answers."""
    sequences = [[rng.randrange(250) for _ in range(rng.randint(2, 12))] for _ in range(rng.randint(1, 4))]
    lengths = [rng.randint(1, len(sequence) - 1) for sequence in sequences]
    return reference_pb2.ComputeLogprobsRequest(tokens=_pack(sequences), prompt_lengths=lengths, temperature=1.0)


def attack(seed: int, number: int) -> Attack:
    """The attack of this number; the kinds take turns."""
    kinds = list(_KINDS)
    kind = kinds[number % len(kinds)]
    rng = random.Random(f"{seed}/{number}")
    service, method, payload = _KINDS[kind](rng)
    return Attack(kind, service, method, payload)


Made = tuple[str, str, bytes]


def _base(rng: random.Random) -> tuple[str, str, Message]:
    match rng.randrange(3):
        case 0:
            return REWARD, SCORE, good_score(rng)
        case 1:
            return REWARD, SCORE, good_texts(rng)
        case _:
            return REFERENCE, LOGPROBS, good_logprobs(rng)


def _random_bytes(rng: random.Random) -> Made:
    service, method, _ = _base(rng)
    if rng.random() < 0.2:
        method = DESCRIBE[service]
    return service, method, rng.randbytes(rng.choice([0, 1, 2, 7, 64, 1_000, 20_000]))


def _flipped_bits(rng: random.Random) -> Made:
    service, method, message = _base(rng)
    data = bytearray(message.SerializeToString())
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return service, method, bytes(data)


def _truncated(rng: random.Random) -> Made:
    service, method, message = _base(rng)
    data = message.SerializeToString()
    return service, method, data[: rng.randrange(len(data))]


def _spliced(rng: random.Random) -> Made:
    service, method, message = _base(rng)
    data = message.SerializeToString()
    other = _base(rng)[2].SerializeToString()
    at, start = rng.randrange(len(data)), rng.randrange(len(other))
    return service, method, data[:at] + other[start:] + data[at:]


def _wrong_lengths(rng: random.Random) -> Made:
    service, method, message = _token_message(rng)
    tokens: common_pb2.TokenSequences = message.tokens  # pyright: ignore
    match rng.randrange(6):
        case 0:
            tokens.lengths[rng.randrange(len(tokens.lengths))] = rng.choice([0, 1_000, 2**31, 2**32 - 1])
        case 1:
            tokens.lengths.extend([rng.choice([0, 1, 2**32 - 1])] * rng.choice([1, 20, 3_000]))
        case 2:
            del tokens.lengths[:]
        case 3:
            tokens.token_ids = tokens.token_ids[: rng.randrange(len(tokens.token_ids))]
        case 4:
            tokens.token_ids = b""
        case _:
            tokens.token_ids += rng.randbytes(rng.choice([1, 3, 4, 400]))
    return service, method, message.SerializeToString()


def _many_or_long(rng: random.Random) -> Made:
    service, method, message = _token_message(rng)
    count, length = rng.choice([(17, 2), (1_000, 2), (1, 129), (1, 40_000), (16, 5_000), (100_000, 1)])
    message.tokens.CopyFrom(common_pb2.TokenSequences(token_ids=b"\1\0\0\0" * count * length, lengths=[length] * count))  # pyright: ignore
    if isinstance(message, reference_pb2.ComputeLogprobsRequest):
        message.prompt_lengths[:] = [1] * count
    return service, method, message.SerializeToString()


def _bad_ids(rng: random.Random) -> Made:
    service, method, message = _token_message(rng)
    tokens: common_pb2.TokenSequences = message.tokens  # pyright: ignore
    ids = bytearray(tokens.token_ids)
    at = 4 * rng.randrange(len(ids) // 4)
    ids[at : at + 4] = struct.pack("<i", rng.choice([-1, 320, 321, 2**31 - 1, -(2**31), 10**6]))
    tokens.token_ids = bytes(ids)
    return service, method, message.SerializeToString()


def _odd_numbers(rng: random.Random) -> Made:
    message = good_logprobs(rng)
    match rng.randrange(4):
        case 0:
            message.temperature = rng.choice(_FLOATS)
        case 1:
            message.top_k = rng.choice(_INTEGERS)
        case 2:
            message.prompt_lengths[rng.randrange(len(message.prompt_lengths))] = rng.choice(_INTEGERS)
        case _:
            message.prompt_lengths.extend([1] * rng.choice([1, 5_000]))
    return REFERENCE, LOGPROBS, message.SerializeToString()


def _unknown_enums(rng: random.Random) -> Made:
    service, method, message = _base(rng)
    names = ["priority"] if service == REFERENCE else ["priority", "truncation", "process"]
    setattr(message, rng.choice(names), rng.choice([-1, 4, 99, 2**31 - 1, -(2**31)]))
    return service, method, message.SerializeToString()


def _bad_utf8(rng: random.Random) -> Made:
    service, method, message = _base(rng)
    bad = rng.choice([b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"ok\x80", b"\xf8\x88\x80\x80\x80"])
    where = rng.randrange(3)
    if where == 0:  # request_id
        extra = b"\x0a" + bytes([len(bad)]) + bad
    elif where == 1:  # selector.model
        extra = b"\x12" + bytes([len(bad) + 2]) + b"\x0a" + bytes([len(bad)]) + bad
    else:  # texts.texts of a score, an unknown field of the tokens elsewhere
        extra = b"\x22" + bytes([len(bad) + 2]) + b"\x0a" + bytes([len(bad)]) + bad
    return service, method, message.SerializeToString() + extra


def _wrong_methods(rng: random.Random) -> Made:
    service, method, message = _base(rng)
    package, _, name = method.rpartition("/")
    odd = rng.choice(
        [
            f"{package}/Nothing",
            f"{package}/{name.lower()}",
            f"/ppod.v1.NoService/{name}",
            "/ppod.v1.WeightService/CommitWeights",
            "/ppod.v1.RewardAdminService/ReplaceModel",
            f"{package}/",
            "/",
            "/grpc.health.v1.Health/Nothing",
        ]
    )
    return service, odd, message.SerializeToString()


def _conflicts(rng: random.Random) -> Made:
    """Fields that do not go together."""
    message = good_texts(rng) if rng.random() < 0.5 else good_score(rng)
    message.selector.model = rng.choice(_REWARDS)
    match rng.randrange(6):
        case 0:
            message.references.extend(["42"] * rng.choice([1, 2, 9]))
        case 1:
            message.prompt_lengths.extend(rng.choices(_INTEGERS, k=rng.randint(1, 9)))
        case 2:
            message.texts.prompts.extend(["p"] * rng.choice([1, 9]))
        case 3:
            # Both inputs on the wire: the last one wins, whichever that is.
            both = [good_texts(rng).SerializeToString(), good_score(rng).SerializeToString()]
            rng.shuffle(both)
            return REWARD, SCORE, b"".join(both)
        case 4:
            message.process = rng.choice([1, 2])  # pyright: ignore
        case _:
            conversation = message.conversations.conversations.add()
            for _ in range(rng.choice([0, 1, 3])):
                conversation.messages.add(role=rng.choice(_WORDS), content=rng.choice(_WORDS))
    return REWARD, SCORE, message.SerializeToString()


def _selectors(rng: random.Random) -> Made:
    service, method, message = _base(rng)
    selector: common_pb2.ModelSelector = message.selector  # pyright: ignore
    selector.model = rng.choice(_WORDS + _REWARDS)
    if rng.random() < 0.5:
        selector.weight_version = rng.choice([1, 2**63, 2**64 - 1])
    if rng.random() < 0.5:
        selector.tokenizer_fingerprint = rng.choice(_WORDS)
    return service, method, message.SerializeToString()


def _empty_or_nested(rng: random.Random) -> Made:
    service, method, message = _base(rng)
    match rng.randrange(3):
        case 0:
            return service, method, b""
        case 1:  # groups, one in the other, under an unknown number
            depth = rng.choice([1, 50, 99, 101, 5_000])
            return service, method, message.SerializeToString() + b"\x9b\x06" * depth + b"\x9c\x06" * depth
        case _:  # an unknown field with a length that is not there
            return service, method, message.SerializeToString() + b"\x9a\x06" + b"\xff\xff\xff\xff\x0f"


def _any_fields(rng: random.Random) -> Made:
    """Every field of the message may be set, to values at the edges of its type."""
    service, method, message = _base(rng)
    for _ in range(rng.randint(1, 3)):
        _disturb(rng, message)
    return service, method, message.SerializeToString()


def _disturb(rng: random.Random, message: Message) -> None:
    field = rng.choice(message.DESCRIPTOR.fields)
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        value = getattr(message, field.name)
        if field.is_repeated:
            value.add() if not value or rng.random() < 0.5 else _disturb(rng, rng.choice(value))
        else:
            _disturb(rng, value)
        return
    value = _value(rng, field)
    if field.is_repeated:
        getattr(message, field.name).extend([value] * rng.choice([1, 1, 4, 100]))
    else:
        setattr(message, field.name, value)


def _value(rng: random.Random, field: FieldDescriptor) -> object:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return rng.choice(_WORDS)
        case FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.choice([0, 1, 4, 8, 100]))
        case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
            return rng.choice(_FLOATS)
        case FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.TYPE_ENUM:
            return rng.choice([-1, 0, 1, 2, 3, 99])
        case _:
            return rng.choice(_INTEGERS)


def _token_message(rng: random.Random) -> tuple[str, str, Message]:
    if rng.random() < 0.5:
        return REWARD, SCORE, good_score(rng)
    return REFERENCE, LOGPROBS, good_logprobs(rng)


def _pack(sequences: list[list[int]]) -> common_pb2.TokenSequences:
    flat = [token for sequence in sequences for token in sequence]
    return common_pb2.TokenSequences(
        token_ids=struct.pack(f"<{len(flat)}i", *flat), lengths=[len(sequence) for sequence in sequences]
    )


_KINDS: dict[str, Callable[[random.Random], Made]] = {
    "random bytes": _random_bytes,
    "flipped bits": _flipped_bits,
    "truncated": _truncated,
    "spliced": _spliced,
    "wrong lengths": _wrong_lengths,
    "many or long": _many_or_long,
    "bad ids": _bad_ids,
    "odd numbers": _odd_numbers,
    "unknown enums": _unknown_enums,
    "bad UTF-8": _bad_utf8,
    "wrong methods": _wrong_methods,
    "conflicts": _conflicts,
    "selectors": _selectors,
    "empty or nested": _empty_or_nested,
    "any fields": _any_fields,
}
