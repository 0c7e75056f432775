"""Adapters on the weights that serve, in process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import xxhash
from peft import PeftModel
from torch import nn

from ppod import FailedPrecondition, InvalidArgument
from ppod.client import LoraAdapter as SentAdapter
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.weight_manifest import IncomingManifest, IncomingTensor, LoraAdapter
from ppod_services.core.weight_store import Install, ReceivedWeights
from ppod_services.core.weights import ServedWeights
from support.saved_adapters import adapter_tensors
from support.served_weights import assert_same, changed, put, served, slightly_other, state, whole
from support.tiny_adapter import build_adapted_model
from support.tiny_model import build_model


def adapter_push(model: PeftModel, version: int, base_version: int) -> tuple[IncomingManifest, bytes]:
    sent, tensors = adapter_tensors(model, "default")
    assert isinstance(sent, SentAdapter)
    incoming = tuple(
        IncomingTensor(one.name, "float32", one.shape, xxhash.xxh3_64_intdigest(one.data)) for one in tensors
    )
    adapter = LoraAdapter(sent.rank, sent.alpha / sent.rank, sent.target_modules)
    return IncomingManifest(version, incoming, base_version, adapter), b"".join(bytes(one.data) for one in tensors)


def merged(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT itself makes of base and adapter."""
    return state(adapted.merge_and_unload())


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_adapters_come_and_go_without_a_trace() -> None:
    model = build_model(seed=0, tied=True)
    weights, store = served(model)
    base = state(model)
    put(weights, *adapter_push(build_adapted_model(seed=1), 1, 0))
    assert_close(state(model), merged(build_adapted_model(seed=1)))
    assert not torch.equal(
        model.get_parameter("model.layers.0.self_attn.q_proj.weight"), base["model.layers.0.self_attn.q_proj.weight"]
    )
    assert (weights.version, weights.status.base_version) == (1, 0)
    # Another adapter of other layers: the first one's layers are the base's again, to the bit.
    put(weights, *adapter_push(build_adapted_model(seed=2, target_modules=("v_proj",)), 2, 0))
    assert_close(state(model), merged(build_adapted_model(seed=2, target_modules=("v_proj",))))
    untouched = {name: value for name, value in base.items() if "v_proj" not in name}
    assert_same({name: state(model)[name] for name in untouched}, untouched)
    # And the first again gives what it gave.
    put(weights, *adapter_push(build_adapted_model(seed=1), 3, 0))
    again = state(model)
    assert_close(again, merged(build_adapted_model(seed=1)))
    image = store.image("model.layers.0.self_attn.q_proj.weight", "float32")
    assert image is not None
    assert torch.equal(image, base["model.layers.0.self_attn.q_proj.weight"])


class Interrupted(dict[str, nn.Parameter]):
    """Parameters; the first time that somebody looks one up, another thread begins its work."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], other: threading.Thread) -> None:
        super().__init__(parameters)
        self._other = other

    def __getitem__(self, name: str) -> nn.Parameter:
        found = super().__getitem__(name)
        if self._other.ident is None:
            before = found.data
            self._other.start()
            # Long enough for a swap that nothing keeps waiting.
            self._other.join(0.1)
            return cast(nn.Parameter, SimpleNamespace(data=before))
        return found


def test_an_adapter_that_is_staged_while_weights_are_installed_goes_on_no_other_adapter() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    layer = cast(nn.Linear, model[0])
    nn.init.zeros_(layer.weight)
    store = ModelWeights(model)
    adapter = LoraAdapter(1, 1.0, ("0",))

    def staged(version: int, value: float) -> Install:
        tensors = {name: torch.full(shape, value) for name, shape in store.shapes(adapter).items()}
        return store.stage(ReceivedWeights(version, tensors, adapter))

    staged(1, 1.0)()
    second = threading.Thread(target=store.stage(ReceivedWeights(2, {"0.weight": torch.full((2, 2), 5.0)})))
    store._parameters = Interrupted(store._parameters, second)
    third = staged(3, 3.0)
    if second.ident is None:
        second.start()
    second.join()
    assert layer.weight[0, 0].item() == 5.0
    third()
    assert layer.weight[0, 0].item() == 9.0, "3 * 3 on the first base's zeros, not on the first adapter"


class AmidInstall(ModelWeights):
    """Calls something while whole weights are installed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.amid: Callable[[], None] = lambda: None

    def stage(self, received: ReceivedWeights) -> Install:
        install = super().stage(received)

        def install_and_call() -> None:
            install()
            amid, self.amid = self.amid, lambda: None
            amid()

        return install_and_call


def test_an_adapter_that_is_prepared_while_its_base_is_replaced_never_serves() -> None:
    """Its layers would be of the base before, among those of the base after."""
    model = build_model(seed=0)
    store = AmidInstall(model)
    weights = ServedWeights(store, lambda _: None)
    adapter = weights.begin(adapter_push(build_adapted_model(seed=1), 2, 0)[0])
    adapter.write(adapter_push(build_adapted_model(seed=1), 2, 0)[1])
    merged_with_the_old = weights.stage(adapter)
    weights.end(adapter, None)
    store.amid = lambda: weights.end(adapter, merged_with_the_old)
    put(weights, *whole(build_model(seed=1), 1))
    assert weights.status.prepared_version == 2
    for ask in (weights.would_change, weights.commit):
        with pytest.raises(FailedPrecondition, match="base_version: the server has 1, the request needs 0"):
            ask(2)
    assert_same(state(model), state(build_model(seed=1)))


def test_whole_weights_and_changes_after_an_adapter_find_the_base() -> None:
    model = build_model(seed=0)
    weights, _ = served(model)
    first = build_model(seed=1)
    second = slightly_other(first, 2)
    third = slightly_other(second, 3)
    # Of layers that differ a little from base to base, so that they travel as changes.
    adapted = build_adapted_model(seed=1, target_modules=("v_proj",))
    assert not torch.equal(*(one.get_parameter("model.layers.0.self_attn.v_proj.weight") for one in (first, second)))
    put(weights, *whole(first, 1))
    put(weights, *adapter_push(adapted, 2, 1))
    with pytest.raises(FailedPrecondition, match="base_version: the server has 1, the request needs 2"):
        put(weights, *adapter_push(adapted, 3, 2))
    put(weights, *changed(second, first, 3, 1))
    assert_same(state(model), state(second))
    assert weights.status.base_version == 3
    put(weights, *adapter_push(adapted, 4, 3))
    # Of the base that the first adapter was merged into nothing is left to be found.
    put(weights, *changed(third, second, 5, 3))
    assert_same(state(model), state(third))
    put(weights, *adapter_push(adapted, 6, 5))
    put(weights, *whole(first, 7))
    assert_same(state(model), state(first))


@pytest.mark.parametrize(
    ("layer", "words"), [("model.norm", "linear layer"), ("lm_head", "weights of its own"), ("model.nothing", "linear")]
)
def test_adapters_of_what_is_no_layer_are_refused(layer: str, words: str) -> None:
    weights, _ = served(build_model(seed=0, tied=True))
    manifest = IncomingManifest(1, (), 0, LoraAdapter(4, 2.0, (layer,)))
    with pytest.raises(InvalidArgument, match=words):
        weights.begin(manifest)


def test_an_adapter_of_another_rank_than_its_tensors_is_refused() -> None:
    weights, _ = served(build_model(seed=0))
    manifest, _ = adapter_push(build_adapted_model(seed=1), 1, 0)
    assert manifest.adapter is not None
    lied = IncomingManifest(1, manifest.tensors, 0, LoraAdapter(8, 1.0, manifest.adapter.target_modules))
    with pytest.raises(InvalidArgument, match=r"lora_A.weight.shape: found \[4, 64\], expected \[8, 64\]"):
        weights.begin(lied)
