"""Output filters behind a running service: what is sent, what is withheld, what fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ppod import Completion, FilterFailed, FinishReason, GenerationClient, Sampling
from support.processes import ServiceProcess, metrics_of, running_service
from support.services import tiny_model_config
from support.tiny_model import build_tokenizer

TOKENIZER = build_tokenizer().backend_tokenizer


@pytest.fixture(scope="module")
def service(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    values = {"model": tiny_model_config(tiny_model_dir), "output_filters": [{"filter": "test_scripted"}]}
    with running_service("ppod_services.generation", tmp_path_factory.mktemp("filters"), values) as up:
        yield up


def write(service: ServiceProcess, letter: str, prompt: str = "Say ", resumed: int = 0) -> Completion:
    """Make the model write one letter until there are three tokens, with those that were sampled before."""
    sampling = Sampling(3, logit_bias={TOKENIZER.encode(letter).ids[0]: 1e4}, unscaled_logprobs=True)
    with GenerationClient(service.target) as client:
        [done] = client.generate([TOKENIZER.encode(prompt).ids], sampling, seeds=[5], resumed_tokens=[resumed])
    return done


def test_what_passes_is_sent_and_what_does_not_is_withheld(service: ServiceProcess) -> None:
    passed = write(service, "a")
    assert TOKENIZER.decode(passed.token_ids.tolist()) == "aaa"
    assert (passed.finish_reason, passed.filter_reason) == (FinishReason.LENGTH, "")
    withheld = write(service, "#")
    assert (withheld.finish_reason, withheld.filter_reason) == (FinishReason.FILTERED, "after Say : ###")
    assert (len(withheld.token_ids), len(withheld.logprobs), withheld.weight_spans) == (0, 0, ())
    assert withheld.seed == 5
    assert withheld.timing.tokens == 4 + 3


def test_what_was_sampled_before_is_judged_too(service: ServiceProcess) -> None:
    assert write(service, "a", prompt="Say #").finish_reason is FinishReason.LENGTH
    assert write(service, "a", prompt="Say #", resumed=1).filter_reason == "after Say : #aa"


def test_a_filter_that_fails_sends_nothing(service: ServiceProcess) -> None:
    with pytest.raises(FilterFailed) as caught:
        write(service, "!")
    assert (caught.value.filter, caught.value.sample) == ("test_scripted", 0)
    assert caught.value.found == "RuntimeError: cannot judge this"
    assert write(service, "a").finish_reason is FinishReason.LENGTH


def test_verdicts_are_counted(service: ServiceProcess) -> None:
    before = metrics_of(service)
    write(service, "#")
    counted = 'ppod_filter_completions_total{filter="test_scripted",verdict="withheld"} '
    numbers = [float(text.split(counted)[1].split()[0]) for text in (before, metrics_of(service))]
    assert numbers[1] == numbers[0] + 1


def test_a_service_whose_filter_cannot_be_made_does_not_start(tiny_model_dir: Path, tmp_path: Path) -> None:
    filters = [{"filter": "test_scripted", "parameters": {"fault": "no word list"}}]
    values = {"model": tiny_model_config(tiny_model_dir), "output_filters": filters}
    with (
        pytest.raises(AssertionError, match="no word list"),
        running_service("ppod_services.generation", tmp_path, values),
    ):
        pass
