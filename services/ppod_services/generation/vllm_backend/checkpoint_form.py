"""Weights as transformers holds them, in the form of a checkpoint, which vLLM's loaders take. Free of vLLM.

For most models both are the same. But transformers stacks the experts of a layer in one parameter, calls some parts
otherwise than checkpoints do, and turns all that back as it saves a model. vLLM takes such a stack for one of another
layout, without a word. And what a model holds beside its parameters, such as the bias by which DeepSeek-V3 chooses
its experts, is pushed by nobody, but is a parameter of vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from ppod_services.generation.vllm_backend.checkpoint import Checkpoint

_Shapes = dict[str, torch.Size]


class CheckpointForm:
    """Turns the weights of one model, a few at a time, so that no second copy of all of them is needed.

    Args:
        path: directory of the model that the engine started with.
    """

    def __init__(self, path: Path) -> None:
        self._checkpoint = Checkpoint(path)
        with torch.device("meta"):
            model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)))
        # Found once: transformers looks for them at each call where they are missing. As it does then, without
        # prefixes, which only some checkpoints of a model have.
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [one for one in found if not isinstance(one, PrefixChange)]
        model._weight_conversions = conversions  # pyright: ignore
        self._model = model
        self._changed, self._together = self._plan() if conversions else (set[str](), set[str]())
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._buffers = self._turned({name: one for name, one in model.state_dict().items() if name not in parameters})

    def of(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of all parameters as a checkpoint has them, and the engine's own of what is beside them."""
        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            if name in self._together:
                waiting[name] = tensor
            elif name in self._changed:
                yield from self._turned({name: tensor}).items()
            else:
                yield name, tensor
        yield from self._turned(waiting).items()
        for name in self._buffers:
            if (kept := self._checkpoint.read(name)) is not None:
                yield name, kept

    def _turned(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return cast("dict[str, torch.Tensor]", revert_weight_conversion(self._model, weights)) if weights else {}

    def _plan(self) -> tuple[set[str], set[str]]:
        """Names of what changes by itself, and of what makes something only together with others."""
        own = {name: parameter.data for name, parameter in self._model.named_parameters()}
        whole = _shapes(self._turned(own))
        changed: set[str] = set()
        together: set[str] = set()
        for name, tensor in own.items():
            try:
                alone = _shapes(self._turned({name: tensor}))
            except (ValueError, RuntimeError, LookupError):
                together.add(name)
                continue
            if not alone.items() <= whole.items():
                together.add(name)
            elif alone != {name: tensor.shape}:
                changed.add(name)
        return changed, together


@lru_cache(maxsize=1)
def checkpoint_form(path: str) -> CheckpointForm:
    """The form of a worker's model; to find it takes a moment."""
    return CheckpointForm(Path(path))


def _shapes(weights: dict[str, torch.Tensor]) -> _Shapes:
    return {name: tensor.shape for name, tensor in weights.items()}
