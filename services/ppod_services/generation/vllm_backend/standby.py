"""A second set of a model's parameters, which the next version is loaded into while the first one serves.

vLLM's loaders split and merge what they are given, and its reload takes the layers that serve apart for that. Most
models need no more than copies, so their loader runs on a double of the model here: the same modules, with parameters
of their own. What a CPU packs is packed there, too. A commit then copies from one set to the other, each worker's part
only, into the memory that captured graphs read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType, NoneType
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ppod_models.loading import DTYPES
from ppod_services.generation.vllm_backend.experts import PACKED_EXPERTS, leaves_experts, pack_experts
from ppod_services.generation.vllm_backend.reload import Loads, check_taken, first_names, hush_loaders
from ppod_services.generation.vllm_backend.staging import TensorAt, Weights
from ppod_services.generation.vllm_backend.worker_calls import LOADING_ERRORS

_LOGGER = logging.getLogger(__name__)
_PACKED = "cpu_linear"
"""What vLLM's CPU build computes a layer with; it may hold the only copy of the layer's weight."""
_LATENT = frozenset({"W_UV", "W_UK_T", "W_UK_T_dcp_qrep"})
"""What latent attention computes with: parts of a projection's weight once more, which vLLM makes after each load."""
_REGISTERED = ("_modules", "_parameters", "_buffers")


class NotPlainError(Exception):
    """Loading this model takes more than copies."""


class Form(Protocol):
    """Of a checkpoint."""

    def of(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors as a checkpoint has them."""
        ...


@dataclass(slots=True, eq=False)
class _Parameter:
    """One parameter of the double, and all modules that have it.

    Attributes:
        live: the one that serves.
        form: on no device, as its loader wants it.
        copied: whether a commit copies it as it was loaded; else a CPU has it packed, and `live` is empty or of no use.
        places: modules of the double, and its name there.
        real: what is loaded into.
    """

    live: torch.Tensor
    form: torch.Tensor
    copied: bool
    places: list[tuple[nn.Module, str]] = field(default_factory=list[tuple[nn.Module, str]])
    real: torch.Tensor | None = None

    def put(self, tensor: torch.Tensor) -> None:
        """Let the double's modules have this."""
        for module, name in self.places:
            vars(module)["_parameters"][name] = tensor


class Standby:
    """The second set of one worker's parameters.

    Args:
        model: the one that serves.
        device: its own.
        form: turns what is pushed into what a checkpoint has.

    Raises:
        NotPlainError: it takes more than copies to load it.
    """

    def __init__(self, model: nn.Module, device: torch.device, form: Form) -> None:
        self._device = device
        self._form = form
        self._doubles: dict[nn.Module, nn.Module] = {}
        self._parameters: dict[int, _Parameter] = {}
        self._spoilt: set[str] = set()
        """What the loader writes to as it loads it, as gpt-oss's biases on all workers but the first."""
        self._twin = self._double(model)
        self._names = first_names(model)
        self._expected = {name for name, one in model.named_parameters() if id(one) in self._parameters}
        for parameter in self._parameters.values():
            parameter.put(parameter.form)
        self._attention = [cast(Any, live) for live in self._doubles if _is_attention(live)]
        self._latent = [cast(Any, live) for live in self._doubles if _is_latent(live)]
        self._packs = [(live, twin) for live, twin in self._doubles.items() if _PACKED in vars(live)]
        self._experts = [(live, twin) for live, twin in self._doubles.items() if self._packs_experts(live)]
        self._packed = {name for one in self._parameters.values() if not one.copied for _, name in one.places}

    def wanted_bytes(self, tensors: Sequence[TensorAt]) -> int:
        """See `Waiting`: however a version travels, it waits in the model's own types."""
        del tensors
        return sum(one.form.nbytes for one in self._parameters.values() if one.real is None)

    def rehearse(self, weights: Weights) -> None:
        """Load tensors that are on no device, which shows that nothing but the double is written to.

        Raises:
            NotPlainError: it is otherwise. Others: as the loader tells that it is.
        """
        # Before: what the checkpoint alone has is read from its files, which does not go with the mode.
        given = list(self._form.of(weights))
        with _OnDouble() as seen:
            self._load(iter(given))
        self._spoilt = {name for name, tensor in given if _storage(tensor) in seen.written}
        for live, twin in self._doubles.items():
            if changed := _changed(live, twin):
                raise NotPlainError(f"{type(live).__name__} keeps {changed[0]} of its weights")

    def fill(self, weights: Weights) -> None:
        """See `Waiting`. Raises ValueError: vLLM did not take a tensor, or some parameters got none."""
        for _, twin in self._packs:
            # That of a version before goes first, or there would be three of them, and what is packed.
            vars(twin)[_PACKED] = None
        for parameter in self._parameters.values():
            # One that a layer packs is kept by nobody else, unless its kernel reads it where it lies.
            if parameter.real is None or not parameter.copied:
                parameter.real = _on(self._device, parameter.form)
            parameter.put(parameter.real)
        # Others read them where they lie: the service, which keeps them, and the other workers.
        whole = self._form.of(weights)
        self._load((name, tensor.clone() if name in self._spoilt else tensor) for name, tensor in whole)
        for parameter in self._parameters.values():
            if not parameter.copied:
                # Its layer has it, and lets go of it when it is packed.
                parameter.real = None
        for _, twin in self._packs:
            cast(Any, twin).quant_method.process_weights_after_loading(twin)
        for _, twin in self._experts:
            pack_experts(twin)

    def install(self) -> None:
        """See `Waiting`."""
        with torch.no_grad():
            for parameter in self._parameters.values():
                if parameter.copied:
                    assert parameter.real is not None
                    parameter.live.data.copy_(parameter.real.data, non_blocking=True)
            for live, twin in self._experts:
                for name, packed in twin.named_parameters(recurse=False):
                    if name in self._packed:
                        # By its name: each reload leaves another one.
                        live.get_parameter(name).data.copy_(packed.data)
            for layer in self._attention:
                # Some keep their sinks in another type, as FlashInfer's; a reload's end would renew that, too.
                layer.impl.process_weights_after_loading(layer.dtype)
            for layer in self._latent:
                # In their places.
                layer.process_weights_after_loading(layer.W_UV.dtype)
        for live, twin in self._packs:
            # The old one goes where the next version is packed, and not while everything stands still.
            vars(live)[_PACKED], vars(twin)[_PACKED] = vars(twin)[_PACKED], vars(live)[_PACKED]

    def drop(self) -> None:
        """See `Waiting`."""
        for parameter in self._parameters.values():
            parameter.real = None
            parameter.put(parameter.form)
        for _, twin in self._packs:
            # Not what serves: a reload would pack that anew, and it would be held here.
            vars(twin)[_PACKED] = None

    def _load(self, left: Iterator[tuple[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            loaded = cast(Loads, self._twin).load_weights(left)
        if loaded is None:
            raise ValueError("vLLM's loader does not tell what it loaded")
        check_taken(left, self._expected, {self._names.get(name, name) for name in loaded})

    def _double(self, module: nn.Module) -> nn.Module:
        if (found := self._doubles.get(module)) is not None:
            return found
        _need_plain(module)
        twin = object.__new__(type(module))
        self._doubles[module] = twin
        attributes = vars(module)
        # What is registered as None stays so.
        own = {name: dict(attributes[name]) for name in _REGISTERED}
        vars(twin).update({**attributes, **own})
        own["_modules"] |= {name: self._double(child) for name, child in own["_modules"].items() if child is not None}
        for name, live in module.named_parameters(recurse=False, remove_duplicate=False):
            if name in _LATENT and _is_latent(module):
                continue
            known = self._parameters.get(id(live))
            if known is None:
                experts = self._packs_experts(module)
                form = _form(module, twin, name, live, experts=experts)
                packed = form.shape != live.shape or (experts and name in PACKED_EXPERTS)
                known = self._parameters[id(live)] = _Parameter(live, form, not packed)
            known.places.append((twin, name))
        return twin

    def _packs_experts(self, module: nn.Module) -> bool:
        return self._device.type == "cpu" and leaves_experts(getattr(module, "quant_method", None))


def standby_of(model: nn.Module, device: torch.device, form: Form, tensors: Sequence[TensorAt]) -> Standby | None:
    """A second set of a model's parameters; None where its loader does more than to copy.

    Args:
        model: the one that serves.
        device: its own.
        form: turns what is pushed into what a checkpoint has.
        tensors: of a push.
    """
    from vllm.platforms import current_platform  # pyright: ignore  # noqa: PLC0415

    if current_platform.device_type not in ("cpu", "cuda") or current_platform.is_zen_cpu():
        # What vLLM makes of weights for others has not been looked at, and ZenDNN may read them where they were loaded.
        return None
    hush_loaders()
    nowhere = ((name, torch.empty(shape, dtype=DTYPES[dtype], device="meta")) for name, dtype, shape, _ in tensors)
    try:
        standby = Standby(model, device, form)
        standby.rehearse(nowhere)
    except (NotPlainError, *LOADING_ERRORS) as reason:
        _LOGGER.info("versions that wait are loaded at their commit: %s", reason)
        return None
    return standby


class _OnDouble(TorchDispatchMode):
    """Refuses to write to what is on a device, and notes what else is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(  # pyright: ignore
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func._schema.is_mutable:
            if not args[0].is_meta:
                raise RuntimeError(f"{func} writes to what serves")
            self.written.add(_storage(args[0]))
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    """Which memory a tensor looks into, also where that is on no device."""
    return tensor.untyped_storage()._cdata  # pyright: ignore


def _need_plain(module: nn.Module) -> None:
    """Raise NotPlainError where vLLM makes more of a module's weights than what its kernels take them by."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod  # pyright: ignore  # noqa: PLC0415
    from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore  # noqa: PLC0415
        UnquantizedEmbeddingMethod,
    )

    kind = type(module).__name__
    if _is_latent(module) or (_is_attention(module) and not list(module.parameters(recurse=False))):
        # They have scales of their cache, which nobody pushes.
        return
    if leaves_experts(module):
        # Such a method is a module itself.
        return
    method = getattr(module, "quant_method", None)
    plain = type(method) in (NoneType, UnquantizedLinearMethod, UnquantizedEmbeddingMethod) or leaves_experts(method)
    if not plain:
        raise NotPlainError(f"{kind} has its weights by {type(method).__name__}")
    if callable(getattr(module, "process_weights_after_loading", None)):
        raise NotPlainError(f"{kind} makes something of its weights")
    if kept := vars(module)["_buffers"].keys() - vars(module)["_non_persistent_buffers_set"]:
        raise NotPlainError(f"{kind} has {min(kept)} beside its parameters")


def _is_attention(module: nn.Module) -> bool:
    from vllm.model_executor.layers.attention import Attention  # pyright: ignore  # noqa: PLC0415

    # Those of chunks or windows are their own types.
    own = getattr(type(module), "process_weights_after_loading", None)
    return isinstance(module, Attention) and own is Attention.process_weights_after_loading


def _is_latent(module: nn.Module) -> bool:
    from vllm.model_executor.layers.attention import MLAAttention  # pyright: ignore  # noqa: PLC0415

    # A CPU's kernels pack what they need elsewhere, and leave nothing of the projection's weight.
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return type(module) is MLAAttention and bool(own) and own <= _LATENT


def _form(module: nn.Module, twin: nn.Module, name: str, live: torch.Tensor, *, experts: bool) -> torch.Tensor:
    """A parameter as its loader wants it, on no device; of `experts` that a CPU packs, and may have padded, or not."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info  # pyright: ignore  # noqa: PLC0415

    # vLLM has noted what it has before its first load. Biases come later, and stay as they are.
    noted = get_layerwise_info(module).restore_metadata[0].get(name, live)
    packed = experts or (_PACKED in vars(module) and not live.numel() and noted.ndim == 2)
    if noted.shape != live.shape and not packed:
        raise NotPlainError(f"{type(module).__name__} has its {name} in another shape than it was loaded in")
    if noted.dtype != live.dtype or (noted.shape == live.shape and noted.stride() != live.stride()):
        raise NotPlainError(f"{type(module).__name__} has its {name} in another layout than it was loaded in")
    form = torch.empty_strided(noted.shape, noted.stride(), dtype=noted.dtype, device="meta")
    return _like(noted, form, {key: _of_twin(value, module, twin) for key, value in vars(noted).items()})


def _on(device: torch.device, form: torch.Tensor) -> torch.Tensor:
    """A parameter's memory; what no loader writes, as padding, is 0."""
    memory = torch.empty_strided(form.shape, form.stride(), dtype=form.dtype, device=device).zero_()
    return _like(form, memory, vars(form))


def _like(parameter: torch.Tensor, memory: torch.Tensor, attributes: Mapping[str, object]) -> torch.Tensor:
    memory.__class__ = parameter.__class__
    vars(memory).update(attributes)
    return memory


def _of_twin(value: object, module: nn.Module, twin: nn.Module) -> object:
    """A parameter's attribute; a loader without what a reload has put around it, and bound to the double."""
    from vllm.model_executor.model_loader.reload.sanitize import layer_ref_sentinel  # pyright: ignore  # noqa: PLC0415

    while getattr(value, "__name__", "") == "online_process_loader":
        value = cast(Any, value).__wrapped__
    if isinstance(value, MethodType) and (value.__self__ is module or value.__self__ is layer_ref_sentinel):
        return MethodType(value.__func__, twin)
    return value


def _changed(live: nn.Module, twin: nn.Module) -> list[str]:
    """Attributes that loading gave the double, other than parameters."""
    ours, theirs = ({**vars(one), **vars(one)["_buffers"]} for one in (live, twin))
    names = (ours.keys() | theirs.keys()).difference(_REGISTERED)
    return sorted(name for name in names if ours.get(name) is not theirs.get(name))
