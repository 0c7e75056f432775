"""What an exchange is told about the request that it delivers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ppod.client.identity import ModelState
from ppod.client.splitting import RowSizes


@dataclass(frozen=True, slots=True)
class Answerer:
    """Who answered a part: all parts of a request must have the same.

    Attributes:
        state: model, weights and tokenizer of the reply.
        versions: weight versions of every model that took part, the reply's own first.
        signature: everything else that must be equal: names, kinds and settings of a reward's components.
    """

    state: ModelState
    versions: tuple[int, ...]
    signature: str = ""


class Job(Protocol):
    """What is asked, in terms of its sequences ("rows"): one method, many of them."""

    @property
    def method(self) -> str:
        """Full name of the RPC: /package.Service/Method."""
        ...

    @property
    def sizes(self) -> RowSizes:
        """What each row weighs."""
        ...

    @property
    def repeatable(self) -> bool:
        """Whether doing it twice is the same as doing it once."""
        ...

    def encode(self, rows: range, part: int | None) -> bytes:
        """The request for some of the rows; `part` is None when these are all of them."""
        ...

    def accept(self, rows: range, data: bytes) -> Answerer:
        """Check and keep the reply for some of the rows.

        Raises:
            InvalidReply: it breaks the contract. FailedPrecondition: it is not what the pin insists on.
        """
        ...
