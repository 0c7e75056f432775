"""What output filters withhold, and what becomes of those that fail."""

from __future__ import annotations

import threading
import tomllib
from collections.abc import Sequence

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from ppod.errors import FilterFailed
from ppod_services.generation.config import OutputFilterConfig
from ppod_services.generation.filters import FilteredText
from ppod_services.generation.filters.registry import FILTERS, make_filter
from ppod_services.generation.filters.regular_expression import RegularExpression, RegularExpressionParameters
from ppod_services.generation.output_filtering import OutputFilters
from ppod_services.generation.requests import Ending, GeneratedSample, VersionSpan
from support.generation_engine import item
from support.joined_words import joined_words
from support.processes import ROOT
from support.tiny_model import build_tokenizer

TOKENIZER = build_tokenizer().backend_tokenizer


def decode(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(list(tokens), skip_special_tokens=True)


def sample(text: str, *more: int) -> GeneratedSample:
    tokens = np.asarray([*TOKENIZER.encode(text).ids, *more], dtype=np.int32)
    logprobs = np.zeros(len(tokens), dtype=np.float32)
    return GeneratedSample(tokens, logprobs, None, Ending.LENGTH, 0, (VersionSpan(0, len(tokens)),))


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a Secret plan", "secrets"), ("call 555-1234", "numbers"), ("secret 555-1234", "secrets"), ("fine", None)],
)
def test_regular_expressions_by_hand(text: str, reason: str | None) -> None:
    parameters = {"patterns": {"secrets": r"\bsecret\b", "numbers": r"\d{3}-\d{4}"}}
    made = RegularExpression(RegularExpressionParameters.model_validate(parameters))
    assert made.reason(FilteredText("a secret prompt", text)) == reason


def test_regular_expressions_may_mind_the_case() -> None:
    parameters = RegularExpressionParameters(patterns={"x": "secret"}, ignore_case=False)
    assert RegularExpression(parameters).reason(FilteredText("", "SECRET")) is None


def test_the_filter_that_ppod_carries_is_declared_to_other_packages() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["ppod.output_filters"]
    module, _, name = declared["regular_expression"].partition(":")
    assert (module, name) == (RegularExpression.__module__, RegularExpression.__name__)


@pytest.mark.parametrize(
    ("name", "parameters", "fault"),
    [
        ("nobody", {}, "no output filter 'nobody': installed packages declare .*test_scripted"),
        ("test_no_filter", {}, "must be a class with parameters_type"),
        ("test_missing", {}, "cannot be loaded"),
        ("test_scripted", {"fault": 3}, "parameters.fault: Input should be a valid string, found 3"),
    ],
)
def test_filters_that_cannot_be_had_are_told_with_the_configuration(
    name: str, parameters: dict[str, object], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        OutputFilterConfig.model_validate({"filter": name, "parameters": parameters})


def test_a_filter_that_cannot_be_made_says_why() -> None:
    with pytest.raises(ValueError, match="output filter 'test_scripted' cannot be made: no word list"):
        make_filter("test_scripted", {"fault": "no word list"})


@pytest.mark.parametrize("patterns", [{}, {"": "x"}, {"odd": "("}])
def test_patterns_that_are_none(patterns: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="patterns"):
        RegularExpressionParameters.model_validate({"patterns": patterns})


async def test_filters_see_whole_completions_in_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    filters = OutputFilters([OutputFilterConfig(filter="test_scripted")], registry)
    threads: list[str] = []
    scripted = FILTERS.find("test_scripted")
    judge = scripted.reason  # pyright: ignore

    def noted(self: object, text: FilteredText) -> str | None:
        threads.append(threading.current_thread().name)
        return judge(self, text)

    monkeypatch.setattr(scripted, "reason", noted)
    prompt = TOKENIZER.encode("Say").ids
    begun = TOKENIZER.encode(" a#").ids
    resumed = item([*prompt, *begun], resumed=len(begun))
    assert await filters.reason(resumed, sample("b", 256), decode) == "after Say:  a#b"
    assert await filters.reason(item([*prompt, *begun]), sample("b"), decode) is None
    nothing = sample("")
    assert await filters.reason(resumed, nothing, decode) is None, "without a new token there is nothing to withhold"
    assert threads == ["filters_0"] * 2
    assert registry.get_sample_value("ppod_filter_completions_total", count("withheld")) == 1
    assert registry.get_sample_value("ppod_filter_completions_total", count("passed")) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("oh!", "RuntimeError: cannot judge this"),
        ("oh?", "TypeError: reason() returned 3, expected a reason in words or None"),
    ],
)
async def test_what_a_filter_cannot_judge_is_an_error(text: str, found: str) -> None:
    registry = CollectorRegistry()
    filters = OutputFilters([OutputFilterConfig(filter="test_scripted")], registry)
    with pytest.raises(FilterFailed) as caught:
        await filters.reason(item([1]), sample(text), decode)
    assert (caught.value.filter, caught.value.found, caught.value.sample) == ("test_scripted", found, 0)
    assert registry.get_sample_value("ppod_filter_completions_total", count("failed")) == 1


def count(verdict: str) -> dict[str, str]:
    return {"filter": "test_scripted", "verdict": verdict}


async def test_a_completion_is_judged_with_the_space_before_it() -> None:
    """Many decoders drop it before the first word, and with it what a pattern may look for."""
    tokenizer = joined_words("The", "film", "was", "great")
    config = {"filter": "regular_expression", "parameters": {"patterns": {"praise": r"\sgreat"}}}
    filters = OutputFilters([OutputFilterConfig.model_validate(config)], CollectorRegistry())
    said = GeneratedSample(
        np.array([4], np.int32), np.zeros(1, np.float32), None, Ending.LENGTH, 0, (VersionSpan(0, 1),)
    )

    def read(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=True)

    assert await filters.reason(item([1, 2, 3]), said, read) == "praise"
    # What was sampled before the completion was resumed is a part of it.
    assert await filters.reason(item([1, 2, 3, 4], resumed=1), said, read) == "praise"
