"""The second set of parameters beside vLLM's own models: what it is filled with serves from an install on."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ppod_services.generation.vllm_backend.receiver import WorkerReceiver
from ppod_services.generation.vllm_backend.reload import load_pushed
from ppod_services.generation.vllm_backend.segments import Segment
from ppod_services.generation.vllm_backend.staging import Copies, Stage, Weights
from ppod_services.generation.vllm_backend.watch import SERVICE_VARIABLE
from support.architectures import build_architecture
from support.vllm_models import (
    DEVICE,
    assert_computes,
    computed,
    engine_model,
    one_worker,
    pushed,
    saved,
    served_beside,
    shuffle,
    standby,
)

# vLLM's own, of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """The process groups of an engine of one worker, in this process."""
    with one_worker():
        yield


@pytest.mark.parametrize(
    ("kind", "further", "dtype"),
    [
        ("llama", {}, "bfloat16"),
        ("llama", {"tie_word_embeddings": True}, "float32"),
        ("qwen2", {"tie_word_embeddings": True}, "bfloat16"),
        ("qwen3", {}, "float32"),
        ("gemma2", {}, "bfloat16"),
        ("phi3", {}, "float32"),
        ("gpt2", {}, "bfloat16"),
        ("mixtral", {}, "bfloat16"),
        ("qwen3_moe", {}, "float32"),
        ("glm4_moe", {"head_dim": 32}, "bfloat16"),
        ("deepseek_v3", {"topk_method": "noaux_tc"}, "bfloat16"),
        ("deepseek_v2", {}, "float32"),
        ("llama4_text", {}, "bfloat16"),
        # Run as transformers has it, with routers that its loader calls by another name than their first.
        ("mellum", {}, "float32"),
    ],
)
def test_a_version_that_was_filled_serves_from_its_install_on(
    tmp_path: Path, kind: str, further: dict[str, object], dtype: str
) -> None:
    policy = build_architecture(kind, **further)
    config, serving, second = served_beside(policy, tmp_path / "0", dtype)
    expected = computed(serving)
    for version in range(1, 4):
        shuffle(policy, version)
        if version == 3:
            # As where there was no room for it. The one after it finds its place again.
            second.drop()
            load_pushed(config, serving, pushed(policy))
        else:
            second.fill(pushed(policy))
            assert_computes(serving, expected)
            second.install()
        # What an engine has that starts with these.
        expected = computed(engine_model(saved(policy, tmp_path / str(version)), dtype)[1])
        assert_computes(serving, expected)
    shuffle(policy, 4)
    second.fill(pushed(policy))
    assert_computes(serving, expected)
    second.install()
    assert_computes(serving, computed(engine_model(saved(policy, tmp_path / "4"), dtype)[1]))


def test_tensors_of_another_type_than_the_models_are_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """vLLM's loaders warn of each of them, which would be hundreds of lines a push."""
    policy = build_architecture("llama")
    config, serving = engine_model(saved(policy, tmp_path), "bfloat16")
    logger = logging.getLogger("vllm.model_executor.models.utils")
    # As in a worker that has loaded nothing else yet.
    logger.setLevel(logging.NOTSET)
    logger.addHandler(caplog.handler)
    try:
        second = standby(config, serving, policy)
        assert second is not None
        second.fill(pushed(policy))
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.name == logger.name]


def test_kernels_that_read_weights_where_they_were_loaded_get_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZenDNN's, where they are told not to pack: the next version would be loaded into what serves."""
    from vllm.platforms import current_platform  # pyright: ignore  # noqa: PLC0415

    if DEVICE.type != "cpu":
        pytest.skip("they are of CPUs")

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **_: object) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(type(current_platform), "is_zen_cpu", lambda _: True)
    monkeypatch.setattr(torch.ops.zentorch, "zentorch_linear_unary", linear, raising=False)
    policy = build_architecture("llama")
    config, serving = engine_model(saved(policy, tmp_path), "float32")
    assert standby(config, serving, policy) is None


def test_memory_is_taken_once_and_given_back(tmp_path: Path) -> None:
    policy = build_architecture("llama")
    _, _, second = served_beside(policy, tmp_path, "bfloat16")
    whole = sum(parameter.numel() * 2 for parameter in policy.parameters())
    assert second.wanted_bytes([]) == whole
    second.fill(pushed(policy))
    places = {one.real.data_ptr() for one in second._parameters.values() if one.real is not None}
    second.install()
    second.fill(pushed(policy))
    assert places == {one.real.data_ptr() for one in second._parameters.values() if one.real is not None}
    packed = [one for one in second._parameters.values() if not one.copied]
    # Of what is packed nothing is kept beside that.
    assert second.wanted_bytes([]) == sum(one.form.nbytes for one in packed)
    second.drop()
    assert second.wanted_bytes([]) == whole


def test_what_is_packed_is_held_in_one_form_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else loading would take memory for the version before and for one that is not packed, too."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod  # pyright: ignore  # noqa: PLC0415

    policy = build_architecture("llama")
    config, serving, second = served_beside(policy, tmp_path, "float32")
    if not second._packs:
        pytest.skip("this device packs nothing")
    second.fill(pushed(policy))
    second.install()
    before = [weakref.ref(vars(twin)["cpu_linear"]) for _, twin in second._packs]
    loaded: list[weakref.ref[torch.Tensor]] = []

    def weights() -> Weights:
        assert not [one for one in before if one() is not None]
        yield from pushed(policy)
        reals = [one.real for one in second._parameters.values() if not one.copied]
        loaded.extend(weakref.ref(one) for one in reals if one is not None)

    left: list[int] = []
    pack: Any = UnquantizedLinearMethod.process_weights_after_loading

    def counted(method: object, layer: nn.Module) -> None:
        pack(method, layer)
        left.append(sum(one() is not None for one in loaded))

    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", counted)
    second.fill(weights())
    # Four in each of four layers.
    assert left == list(range(15, -1, -1))
    second.drop()
    before = [weakref.ref(vars(live)["cpu_linear"]) for live, _ in second._packs]
    load_pushed(config, serving, pushed(policy))
    assert not [one for one in before if one() is not None]


def test_a_version_that_is_not_whole_does_not_wait(tmp_path: Path) -> None:
    policy = build_architecture("llama")
    _, serving, second = served_beside(policy, tmp_path, "float32")
    expected = computed(serving)
    rest = [(name, tensor) for name, tensor in pushed(policy) if name != "model.norm.weight"]
    with pytest.raises(ValueError, match=r"1 parameters of .* got no weights, the first model\.norm\.weight"):
        second.fill(rest)
    with pytest.raises(ValueError, match=r"no module or parameter named"):
        second.fill([*pushed(policy), ("another.weight", torch.zeros(2))])
    assert_computes(serving, expected)


@pytest.mark.parametrize("kind", ["phi", "apertus"])
def test_a_model_whose_loader_does_more_than_to_copy_has_none(tmp_path: Path, kind: str) -> None:
    """One's writes to what serves, the other's activation keeps numbers beside its parameters."""
    policy = build_architecture(kind)
    config, serving = engine_model(saved(policy, tmp_path), "float32")
    expected = computed(serving)
    assert standby(config, serving, policy) is None
    assert_computes(serving, expected)


def test_workers_that_load_what_they_receive_forget_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have the same number, of a push that was given up, and would serve where that number is restored."""
    # The module ends its process with this one.
    monkeypatch.setenv(SERVICE_VARIABLE, str(os.getpid()))
    from ppod_services.generation.vllm_backend.worker import PpodWorker  # noqa: PLC0415

    worker: Any = PpodWorker()
    worker.device = DEVICE
    # As `standby` is None.
    worker.stage = Stage(DEVICE, Copies(DEVICE, lambda _: pytest.fail("what was given up serves")))
    worker.weight_transfer_engine = SimpleNamespace(receiver=WorkerReceiver(DEVICE, 0))
    segment = Segment([(3,)], [torch.float32])
    tensors = [("a", "float32", (3,), 0)]
    worker.ppod_stage_weights(segment.path, tensors, 5)
    worker.ppod_stage_received(tensors, 5)
    assert worker.ppod_staged()
    assert not worker.stage.install(5)
