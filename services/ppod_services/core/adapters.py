"""LoRA adapters on one base model: several named models, one copy of the base's weights (Hu et al., 2021)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ppod_models.sources import ModelSourceError, resolve_adapter
from ppod_services.core.config import AdapterConfig


class Adapters:
    """Adapters put into a base model, all of them off until one is asked for.

    The base's own parameters stay the same objects under the same names, so new weights of the base still reach them.

    Raises:
        ModelSourceError: an adapter is missing, is not safetensors, does not fit, changes the base or the output layer,
            or is no change of layers.
    """

    def __init__(self, base: PreTrainedModel, configs: Sequence[AdapterConfig]) -> None:
        self._model: PeftModel | None = None
        for config in configs:
            self._add(base, config)

    @contextmanager
    def active(self, name: str | None) -> Generator[None]:
        """Within the block the model is the base with this adapter; None: the base alone."""
        if self._model is None:
            yield
        elif name is None:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(name)
            yield

    def _add(self, base: PreTrainedModel, config: AdapterConfig) -> None:
        path = resolve_adapter(config.source)
        output = base.get_output_embeddings()
        name = next(name for name, module in base.named_modules() if module is output)
        try:
            if PeftConfig.from_pretrained(str(path)).is_prompt_learning:
                raise ModelSourceError(
                    f"adapter {config.name!r} changes prompts; ppod serves changes of layers, as LoRA's"
                )
            check = _Check(base, config, path)
            if self._model is None:
                self._model = PeftModel.from_pretrained(base, str(path), adapter_name=config.name).eval()
            else:
                self._model.load_adapter(str(path), adapter_name=config.name)
                self._model.eval()
        except (ValueError, KeyError, RuntimeError, TypeError, OSError, SafetensorError) as error:
            raise ModelSourceError(f"adapter {config.name!r} from {config.source!r}: {error}") from error
        # Logits are made from the base's output layer alone; an adapter there would be silently ignored.
        if base.get_output_embeddings() is not output:
            raise ModelSourceError(
                f"adapter {config.name!r} changes the output layer {name}, which ppod does not serve"
            )
        check.loaded(self._model)


class _Check:
    """Whether PEFT took an adapter's file whole, and into the adapter: of both it warns at most."""

    def __init__(self, base: PreTrainedModel, config: AdapterConfig, path: Path) -> None:
        self._name = config.name
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            self._found = {str(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        # Tensors of the base may be in the file as well: biases, embeddings that were saved along.
        parameters = {_plain(name): one for name, one in base.named_parameters(remove_duplicate=False)}
        self._base = {
            key: (parameter, parameter.detach().clone())
            for key in sorted(self._found)
            if (parameter := parameters.get(_plain(key))) is not None
        }

    def loaded(self, model: PeftModel) -> None:
        """Raise ModelSourceError where the adapter does not fit, or changed the base."""
        for key, (parameter, before) in self._base.items():
            if not torch.equal(parameter, before):
                expected = "save it without, bias none and save_embedding_layers off"
                raise ModelSourceError(f"adapter {self._name!r} changes {key} of the base itself: {expected}")
        states = get_peft_model_state_dict(model, adapter_name=self._name, save_embedding_layers=False)
        for what, keys in (
            ("lacks", set(states) - self._found),
            ("has for no layer", self._found - set(states) - set(self._base)),
        ):
            if keys:
                listed = ", ".join(sorted(keys)[:3])
                raise ModelSourceError(f"adapter {self._name!r} is of another model: its file {what} {listed}")


def _plain(name: str) -> str:
    """The name of a base's tensor without what PEFT makes of it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
