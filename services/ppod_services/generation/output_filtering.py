"""Runs the output filters on completions, between the engine and the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, cast

import numpy as np
from prometheus_client import CollectorRegistry, Counter

from ppod.errors import FilterFailed
from ppod_models.decoding import decode_parts
from ppod_services.generation.config import OutputFilterConfig
from ppod_services.generation.filters import FilteredText, OutputFilter
from ppod_services.generation.filters.registry import make_filter
from ppod_services.generation.requests import GeneratedSample, GenerationItem


class Decode(Protocol):
    """Turns token ids into text, without special tokens."""

    def __call__(self, tokens: Sequence[int], /) -> str:
        """The text."""
        ...


@dataclass(frozen=True, slots=True)
class _NamedFilter:
    name: str
    filter: OutputFilter


class OutputFilters:
    """The filters of a service, in their order.

    Args:
        configs: which ones.
        registry: where withheld completions are counted.

    Raises:
        ValueError: a filter cannot be made.
    """

    def __init__(self, configs: Sequence[OutputFilterConfig], registry: CollectorRegistry) -> None:
        self._filters = [
            _NamedFilter(config.filter, make_filter(config.filter, config.parameters)) for config in configs
        ]
        # One thread of their own: neither the model nor the callers of other requests wait for them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="filters") if configs else None
        self._checked = Counter(
            "ppod_filter_completions",
            "Completions by output filter and verdict",
            ["filter", "verdict"],
            registry=registry,
        )
        for config in configs:
            for verdict in ("passed", "withheld", "failed"):
                self._checked.labels(config.filter, verdict)

    async def reason(self, item: GenerationItem, sample: GeneratedSample, decode: Decode) -> str | None:
        """Why a completion is withheld; None: it may be sent.

        Raises:
            FilterFailed: a filter raised, or gave something that is no reason.
        """
        if self._thread is None or not len(sample.tokens):
            return None
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._judge, item, sample, decode)

    def _judge(self, item: GenerationItem, sample: GeneratedSample, decode: Decode) -> str | None:
        begin, tokens = len(item.prompt) - item.resumed, np.concatenate([item.prompt, sample.tokens])
        text = FilteredText(*decode_parts(lambda part: decode(part.tolist()), tokens, (begin, len(tokens))))
        for each in self._filters:
            with _Told(each.name, item.prompt_index, self._checked):
                # What a package of somebody else's returns is not what it says.
                reason = cast(object, each.filter.reason(text))
                if reason is not None and not (isinstance(reason, str) and reason):
                    raise TypeError(f"reason() returned {reason!r}, expected a reason in words or None")
            self._checked.labels(each.name, "passed" if reason is None else "withheld").inc()
            if reason is not None:
                return reason
        return None


class _Told:
    """Turns whatever a filter raises into the error that the caller gets."""

    def __init__(self, name: str, sample: int, checked: Counter) -> None:
        self._name = name
        self._sample = sample
        self._checked = checked

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):
            return
        self._checked.labels(self._name, "failed").inc()
        expected = "a reason to withhold the completion, or None"
        raise FilterFailed(self._name, f"{type(error).__name__}: {error}", expected, self._sample) from error
