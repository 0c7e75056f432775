"""LoRA adapters on one base model: several named models, one copy of the base's weights (Hu et al., 2021)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import cast

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ppod_models.sources import ModelSourceError, resolve_adapter
from ppod_services.core.config import AdapterConfig


class Adapters:
    """Adapters put into a base model, all of them off until one is asked for.

    The base's own parameters stay the same objects under the same names, so new weights of the base still reach them.

    Raises:
        ModelSourceError: an adapter is missing, is not safetensors, does not fit, or changes the output layer.
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
        path = str(resolve_adapter(config.source))
        try:
            _check_output_layer(base, config, PeftConfig.from_pretrained(path))
            if self._model is None:
                self._model = PeftModel.from_pretrained(base, path, adapter_name=config.name).eval()
            else:
                self._model.load_adapter(path, adapter_name=config.name)
                self._model.eval()
        except (ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
            raise ModelSourceError(f"adapter {config.name!r} from {config.source!r}: {error}") from error


def _check_output_layer(base: PreTrainedModel, config: AdapterConfig, peft: PeftConfig) -> None:
    """Logits are made from the base's output layer alone; an adapter there would be silently ignored."""
    output = base.get_output_embeddings()
    name = next(name for name, module in base.named_modules() if module is output).rsplit(".", maxsplit=1)[-1]
    touched = [
        *_names(cast(object, getattr(peft, "target_modules", None))),
        *_names(cast(object, getattr(peft, "modules_to_save", None))),
    ]
    if name in touched:
        raise ModelSourceError(f"adapter {config.name!r} changes the output layer {name}, which ppod does not serve")


def _names(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(name) for name in cast("list[object]", list(value))] if isinstance(value, list | set | tuple) else []
