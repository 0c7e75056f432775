"""What of the vLLM backend needs no vLLM: configuration, refusals, the reading of results, shared memory."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from ppod.errors import Internal, InvalidArgument, NonFiniteOutput
from ppod_models.configuration import ConfigError, parse_config
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.generation.requests import Ending, GenerationItem, TokenFilter, VersionSpan
from ppod_services.generation.vllm_backend.completions import (
    OutsideStops,
    engine_seed,
    read_sample,
    sampling_values,
    signed_seed,
)
from ppod_services.generation.vllm_backend.loading import engine_arguments
from ppod_services.generation.vllm_backend.outputs import Ended
from ppod_services.generation.vllm_backend.segments import Segment
from ppod_services.generation.vllm_backend.watch import SERVICE_VARIABLE
from support.generation_engine import StepSink, Versions
from support.generation_engine import item as plain_item
from support.tiny_model import build_tokenizer, save_longrope_model
from support.vllm_stand_in import without_vllm

KNOWN = frozenset({"block_size", "enable_chunked_prefill", "max_num_batched_tokens", "swap_space"})


def config(**vllm: object) -> GenerationServiceConfig:
    values = {"listen": {"port": 1}, "model": {"source": "x", "dtype": "float32"}, "backend": "vllm", "vllm": vllm}
    return parse_config(GenerationServiceConfig, values, "test")


def item(token_filter: TokenFilter | None = None, *, unscaled: bool = False, resumed: int = 0) -> GenerationItem:
    return GenerationItem(
        prompt_index=3,
        sample=0,
        prompt=np.array([97, 98, 99], dtype=np.int32),
        seed=5,
        max_tokens=9,
        token_filter=token_filter or TokenFilter(temperature=1.0),
        stop_ids=frozenset({256, 7}),
        stop_strings=("cd",),
        resumed=resumed,
        unscaled=unscaled,
    )


@dataclass
class Logprobs:
    logprobs: list[float]


@dataclass
class Labelled:
    version: str
    start: int
    end: int


@dataclass
class Output:
    """What vLLM's CompletionOutput has."""

    token_ids: Sequence[int]
    logprobs: Logprobs | None
    finish_reason: str | None = "length"
    stop_reason: int | str | None = None
    weight_versions: Sequence[Labelled] | None = field(default_factory=list[Labelled])


def read(output: Output, of: GenerationItem | None = None, *, tokens: int | None = None, both: bool = False):
    return read_sample(of or item(), Ended(output, tokens), both_logprobs=both, serving=4)


@pytest.mark.parametrize(
    ("vllm", "words"),
    [
        ({"engine_args": {"dtype": "float16"}}, "vllm.engine_args: dtype is set by model.dtype"),
        ({"engine_args": {"logprobs_mode": "raw_logits"}}, "vllm.engine_args: logprobs_mode cannot be set"),
        ({"engine_args": {"weight_transfer_config": {"backend": "nccl"}}}, "weight_transfer_config cannot be set"),
        (
            {"engine_args": {"spec_method": "ngram"}},
            "vllm.engine_args: spec_method cannot be set: logprobs of",
        ),
        ({"engine_args": {"spec_model": "draft"}}, "vllm.engine_args: spec_model cannot be set"),
        ({"engine_args": {"spec_tokens": 2}}, "vllm.engine_args: spec_tokens cannot be set"),
        ({"engine_args": {"watermark_config": {"key": 1}}}, "vllm.engine_args: watermark_config cannot be set"),
        ({"engine_args": {"enable_lora": True}}, "vllm.engine_args: enable_lora cannot be set: adapters are pushed"),
        ({"engine_args": {"kv_transfer_config": {}}}, "vllm.engine_args: kv_transfer_config cannot be set: stores of"),
        (
            {"engine_args": {"kv_offloading_backend": "lmcache"}},
            "vllm.engine_args: kv_offloading_backend cannot be",
        ),
        ({"engine_args": {"enable_eplb": True}}, "vllm.engine_args: enable_eplb cannot be set: pushed experts"),
        ({"engine_args": {"offload_group_size": 4}}, "vllm.engine_args: offload_group_size cannot be set: each step"),
        ({"engine_args": {"quantization_config": {}}}, "vllm.engine_args: quantization_config cannot be set"),
        ({"weights_received_by": "nobody"}, "vllm.weights_received_by"),
        ({"tensor_parallel_size": 0}, "vllm.tensor_parallel_size"),
        ({"nonsense": 1}, "vllm.nonsense: unknown key"),
    ],
)
def test_configuration_that_cannot_be_is_named(vllm: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        config(**vllm)


def test_sequences_are_no_longer_than_frequencies_last(tmp_path: Path) -> None:
    """vLLM takes LongRoPE's frequencies by the longest sequence that may come, whatever comes."""
    found = engine_arguments(config(), save_longrope_model(tmp_path, 24), "cpu", KNOWN)
    assert found["max_model_len"] == 24


def test_engine_arguments_come_from_the_configuration(tiny_model_dir: Path) -> None:
    found = engine_arguments(config(engine_args={"block_size": 32}), tiny_model_dir, "cpu", KNOWN)
    assert (found["model"], found["dtype"], found["max_model_len"]) == (str(tiny_model_dir), "float32", 128)
    assert (found["max_num_seqs"], found["kv_cache_memory_bytes"], found["enforce_eager"]) == (64, 2**30, True)
    assert (found["logprobs_mode"], found["block_size"]) == ("processed_logprobs", 32)
    # vLLM's CPU sampler cannot take back the draw of a part of a prompt.
    assert found["enable_chunked_prefill"] is False
    with pytest.raises(ConfigError, match=r"vllm\.engine_args\.enable_chunked_prefill: on CPUs"):
        engine_arguments(config(engine_args={"enable_chunked_prefill": True}), tiny_model_dir, "cpu", KNOWN)
    on_gpu = engine_arguments(config(max_model_len=100, kv_cache_gib=2), tiny_model_dir, "cuda", KNOWN)
    assert (on_gpu["max_model_len"], on_gpu["kv_cache_memory_bytes"]) == (100, 2**31)
    assert on_gpu["enforce_eager"] is False
    assert (found["weight_transfer_config"], on_gpu["weight_transfer_config"]) == (None, None)
    receiving = engine_arguments(config(weights_received_by="workers"), tiny_model_dir, "cuda", KNOWN)
    assert receiving["weight_transfer_config"] == {"backend": "ppod"}
    assert "enable_chunked_prefill" not in on_gpu


@pytest.mark.parametrize(
    ("seed", "signed"), [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 2, -2), (2**64 - 1, -(2**63))]
)
def test_seeds_fit_int64_and_never_ask_for_a_random_one(seed: int, signed: int) -> None:
    assert signed_seed(seed) == signed


def test_all_bits_of_a_seed_reach_generators_that_take_its_low_half() -> None:
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    assert len({engine_seed(seed) % 2**32 for seed in seeds}) == len(seeds)
    assert all(-(2**63) <= engine_seed(seed) < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("token_filter", "wanted"),
    [
        (TokenFilter(temperature=0.005), "sampling.temperature"),
        (TokenFilter(temperature=2.01), "sampling.temperature"),
        (TokenFilter(temperature=1.0, logit_bias=tuple((i, 1.0) for i in range(1_025))), "sampling.logit_bias"),
    ],
)
def test_what_vllm_would_sample_otherwise_is_refused(token_filter: TokenFilter, wanted: str) -> None:
    with pytest.raises(InvalidArgument, match="vLLM backend") as caught:
        sampling_values(item(token_filter), both_logprobs=True)
    assert caught.value.field == wanted


def test_the_least_temperature_is_taken_as_it_travels() -> None:
    values = sampling_values(item(TokenFilter(temperature=float(np.float32(0.01)))), both_logprobs=True)
    assert values["temperature"] == 0.01
    assert sampling_values(item(TokenFilter(temperature=0.0)), both_logprobs=True)["temperature"] == 0.0


@pytest.mark.parametrize(
    "token_filter",
    [
        TokenFilter(temperature=0.7),
        TokenFilter(temperature=1.0, top_k=5),
        TokenFilter(temperature=1.0, min_p=0.1),
        TokenFilter(temperature=0.0, repetition_penalty=1.1),
        TokenFilter(temperature=1.0, logit_bias=((1, 1.0),)),
    ],
)
def test_unscaled_logprobs_are_refused_where_the_engine_tells_one_kind(token_filter: TokenFilter) -> None:
    with pytest.raises(InvalidArgument) as caught:
        sampling_values(item(token_filter, unscaled=True), both_logprobs=False)
    assert caught.value.field == "sampling.unscaled_logprobs"
    assert sampling_values(item(token_filter, unscaled=True), both_logprobs=True)["logprobs"] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_untouched_distribution_s_logprobs_are_the_unscaled_ones(temperature: float) -> None:
    asked = item(TokenFilter(temperature=temperature), unscaled=True)
    assert sampling_values(asked, both_logprobs=False)["logprobs"] == 0
    sample = read(Output([8], Logprobs([-0.5]), weight_versions=[Labelled("4", 0, 1)]), asked)
    assert sample.unscaled_logprobs is not None
    assert sample.unscaled_logprobs.tolist() == [-0.5]


def test_both_logprobs_are_told_apart() -> None:
    output = Output([8, 9], Logprobs([-0.5, -1.0, -0.25, -2.0]), weight_versions=[Labelled("4", 0, 2)])
    sample = read(output, item(unscaled=True), both=True)
    assert sample.logprobs.tolist() == [-0.5, -0.25]
    assert sample.unscaled_logprobs is not None
    assert sample.unscaled_logprobs.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("finish", "stop", "ending"),
    [
        ("stop", 256, Ending.STOP),
        ("stop", "cd", Ending.STOP_STRING),
        ("length", None, Ending.LENGTH),
        ("abort", None, Ending.ABORTED),
    ],
)
def test_endings(finish: str, stop: int | str | None, ending: Ending) -> None:
    output = Output([8], Logprobs([-0.5]), finish, stop, [Labelled("4", 0, 1)])
    assert read(output).ending is ending


@pytest.mark.parametrize("finish", ["error", None])
def test_an_ending_that_nobody_knows_is_none(finish: str | None) -> None:
    with pytest.raises(Internal, match=f"ended a completion with {finish!r}"):
        read(Output([8], Logprobs([-0.5]), finish, None, [Labelled("4", 0, 1)]))


def test_versions_of_tokens_follow_the_engine_s_labels() -> None:
    spans = [Labelled("2", 0, 2), Labelled("5", 2, 3)]
    sample = read(Output([1, 2, 3], Logprobs([-1.0, -2.0, -3.0]), weight_versions=spans))
    assert sample.spans == (VersionSpan(2, 2), VersionSpan(5, 1))
    assert sample.weight_version == 5
    nothing = read(Output([], Logprobs([]), "abort", weight_versions=None))
    assert (nothing.weight_version, nothing.spans, len(nothing.tokens)) == (4, (), 0)


def test_a_completion_without_labels_is_never_attributed() -> None:
    with pytest.raises(Internal, match="weight versions of 0 tokens, expected 1"):
        read(Output([1], Logprobs([-1.0]), weight_versions=None))


def test_logprobs_that_are_missing_or_not_finite_are_errors() -> None:
    with pytest.raises(Internal, match="2 tokens and 1 logprobs"):
        read(Output([1, 2], Logprobs([-1.0]), weight_versions=[Labelled("4", 0, 2)]))
    with pytest.raises(NonFiniteOutput) as caught:
        read(Output([1], Logprobs([math.nan]), weight_versions=[Labelled("4", 0, 1)]))
    assert caught.value.sample == 3


def test_vllm_finds_stop_texts_behind_a_prompt_of_whole_characters() -> None:
    tokenizer = build_tokenizer().backend_tokenizer
    whole = np.asarray(tokenizer.encode("ab\N{CLAPPER BOARD}").ids, dtype=np.int32)
    assert OutsideStops.needed(replace(item(), prompt=whole), tokenizer) is None
    assert OutsideStops.needed(replace(item(), prompt=whole[:-1]), tokenizer) is not None
    assert OutsideStops.needed(replace(item(), prompt=whole[:-1], stop_strings=()), tokenizer) is None


def test_a_stop_text_of_a_resumed_completion_cuts_what_came_after_it() -> None:
    tokenizer = build_tokenizer().backend_tokenizer
    stops = OutsideStops.needed(item(resumed=1), tokenizer)
    assert stops is not None
    assert sampling_values(item(resumed=1), both_logprobs=True, finds_stops=False)["stop"] == []
    c, d, x = 66, 67, 87
    assert build_tokenizer().decode([c, d]) == "cd"
    assert not stops.look([x])
    assert not stops.look([x, c])
    assert stops.look([x, c, d, x])
    output = Output([x, c, d, x], Logprobs([-1.0, -2.0, -3.0, -4.0]), "abort", weight_versions=[Labelled("4", 0, 4)])
    sample = read(output, item(resumed=1), tokens=stops.tokens)
    assert sample.ending is Ending.STOP_STRING
    assert sample.tokens.tolist() == [x, c, d]
    assert sample.logprobs.tolist() == [-1.0, -2.0, -3.0]
    assert sample.spans == (VersionSpan(4, 3),)


@pytest.mark.parametrize(
    ("prompt", "resumed", "found"), [([64, 66], 1, True), ([67, 64, 66], 2, True), ([66, 67], 1, False)]
)
def test_a_stop_text_may_begin_in_what_was_sampled_before_but_not_in_the_prompt(
    prompt: list[int], resumed: int, found: bool
) -> None:
    assert build_tokenizer().decode([64, 66, 67]) == "acd"
    resuming = replace(item(resumed=resumed), prompt=np.array(prompt, dtype=np.int32))
    stops = OutsideStops.needed(resuming, build_tokenizer().backend_tokenizer)
    assert stops is not None
    assert stops.look([67]) is found
    assert stops.tokens == (1 if found else None)


class UnbegunEngine:
    """An AsyncLLM whose completions end only by an abort, before their first token."""

    errored = False

    def __init__(self) -> None:
        self._ends: dict[str, asyncio.Event] = {}
        self.engine_core = self

    async def get_supported_tasks(self) -> None: ...

    async def generate(self, _prompt: object, _sampling: object, request_id: str) -> AsyncIterator[object]:
        self._ends[request_id] = asyncio.Event()
        await self._ends[request_id].wait()
        yield SimpleNamespace(outputs=[Output([], None, "abort")])

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._ends[request_id].set()

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None: ...

    def shutdown(self, timeout_s: float) -> None: ...


def test_an_engine_that_does_not_start_is_waited_for_no_longer_than_it_may_take() -> None:
    with without_vllm():
        from ppod_services.generation.vllm_backend.host import EngineHost  # noqa: PLC0415
    go_on = threading.Event()

    def start() -> UnbegunEngine:
        go_on.wait(30)
        return UnbegunEngine()

    try:
        with pytest.raises(TimeoutError):
            EngineHost(start, 0.05)  # pyright: ignore
    finally:
        go_on.set()


def test_whoever_insists_on_a_version_that_goes_is_handed_back_with_it() -> None:
    with without_vllm():
        from ppod_services.generation.vllm_backend.engine import VllmEngine  # noqa: PLC0415
        from ppod_services.generation.vllm_backend.host import EngineHost  # noqa: PLC0415
    weights, host = Versions(3), EngineHost(UnbegunEngine)  # pyright: ignore

    def commit() -> bool:
        host.call(host.pause)
        weights.version = 4
        return False

    begun, waiting = (plain_item([5, 6], weight_version=3) for _ in range(2))
    sink = StepSink(joining={1: [waiting]}, pauses={1: commit})
    engine = VllmEngine(host, weights, build_tokenizer().backend_tokenizer, both_logprobs=False)  # pyright: ignore
    engine.run([begun], sink)
    host.close()
    assert not sink.errors
    for position in range(2):
        sample = sink.samples[position]
        assert (sample.ending, len(sample.tokens), sample.weight_version) == (Ending.ABORTED, 0, 3)


def test_a_segment_is_seen_by_other_processes_and_goes_with_its_owner() -> None:
    segment = Segment([(2, 3), (), (0, 4)], [torch.float32, torch.bfloat16, torch.float16])
    segment.tensors[0].copy_(torch.arange(6).view(2, 3))
    segment.tensors[1].fill_(1.5)
    assert segment.tensors[2].shape == (0, 4)
    assert segment.holds([(2, 3), (), (0, 4)], [torch.float32, torch.bfloat16, torch.float16])
    assert not segment.holds([(2, 3), (), (0, 4)], [torch.float32, torch.float32, torch.float16])
    script = f"import numpy; print(numpy.fromfile({segment.path!r}, dtype='<f4')[:6].tolist())"
    seen = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert seen.stdout.strip() == str([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    path = Path(segment.path)
    assert path.exists()
    tensors = segment.tensors
    del segment
    assert not path.exists()
    assert tensors[0].sum() == 15


@pytest.mark.parametrize("killed", ["service", "engine"])
def test_the_engine_s_processes_end_with_the_service_and_with_the_engine(tmp_path: Path, killed: str) -> None:
    """A stand-in for the service, killed as nothing can be prepared for; the engine's process, and a worker's."""
    worker = (
        "from ppod_services.generation.vllm_backend.watch import end_with_service as end; end(); print(1, flush=True)"
    )
    sleep = "import time; time.sleep(60)"
    engine = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {worker + ';' + sleep!r}]); {sleep}"
    service = (
        "import os, subprocess, sys;"
        f"os.environ['{SERVICE_VARIABLE}'] = str(os.getpid());"
        f"subprocess.Popen([sys.executable, '-c', {engine!r}]); {sleep}"
    )
    with subprocess.Popen([sys.executable, "-c", service], stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) == 2
        (process if killed == "service" else started[0]).kill()
        _, alive = psutil.wait_procs(started[1:], timeout=10)
        process.kill()
    assert not alive
    assert not psutil.wait_procs(started, timeout=10)[1]
