"""LoRA and QLoRA policies: an adapter that is trained on a base that stands still, and is its reference.

Source: Hu et al. 2021, "LoRA"; Dettmers et al. 2023, "QLoRA". PEFT does the work; this says what ppod needs of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ppod_trainer.config import LoraConfig
from ppod_trainer.errors import TrainerError

_NAME = "default"
_BASE_LAYER = ".base_layer."


class PolicyAdapter:
    """LoRA layers in a policy's model, and what the model is with and without them.

    Args:
        model: the base; its layers are wrapped in place and its own parameters stand still.
        config: which layers, and how.

    Raises:
        TrainerError: no layer is called like that.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig) -> None:
        adapter = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - PEFT's own kernels take any number
            use_rslora=config.rank_stabilized,
            target_modules=list(config.target_modules) or "all-linear",
            # With dropout the ratio of new to old probabilities would be noise.
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        try:
            self.peft = cast(PeftModel, get_peft_model(model, adapter, adapter_name=_NAME))
        except ValueError as error:
            raise TrainerError(f"policy.lora: {error}") from error
        self._model = model
        # PEFT turns to training mode, which would turn dropout of the base on.
        self.peft.eval()

    def base_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The base's parameters by the names that they have without adapter; quantised ones as what they stand for."""
        for name, parameter in self._model.named_parameters():
            if ".lora_" not in name:
                yield name.replace(_BASE_LAYER, "."), _dense(parameter)

    @torch.no_grad()
    def merged_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's parameters as whole weights: W + scaling * B @ A where it is adapted."""
        changes = {
            f"{name}.weight": cast(torch.Tensor, module.get_delta_weight(_NAME))
            for name, module in self._model.named_modules()
            if isinstance(module, LoraLayer)
        }
        for name, parameter in self.base_parameters():
            change = changes.get(name)
            yield name, parameter if change is None else parameter + change.to(parameter.dtype)


def load_quantised(path: Path, *, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Load a causal language model whose linear layers are in 4-bit NormalFloat, in evaluation mode.

    Args:
        path: its directory, with safetensors.
        device: where it computes; bitsandbytes has kernels for CUDA and for CPUs.
        dtype: of all that is not quantised, and of what is computed.
        attention: "sdpa" or "eager".

    Raises:
        TrainerError: bitsandbytes is not installed.
    """
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            quantization_config=quantisation,
            device_map={"": device},
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except ImportError as error:
        raise TrainerError(f"policy.lora.quantization: {error}; install ppod[qlora]") from error
    return model.eval()


def _dense(parameter: nn.Parameter) -> torch.Tensor:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - only quantised bases need it

    return dequantize_4bit(parameter.data, state)
