"""Bases in 4 bits: loading them, and what their parameters stand for.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"; bitsandbytes does the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME

from ppod_models.loading import check_attention, check_whole, reading
from ppod_trainer.errors import TrainerError


def load_quantised(path: Path, *, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Load a causal language model whose linear layers are in 4-bit NormalFloat, in evaluation mode.

    Args:
        path: its directory, with safetensors.
        device: where it computes; bitsandbytes has kernels for CUDA and for CPUs.
        dtype: of all that is not quantised, and of what is computed.
        attention: "sdpa" or "eager".

    Raises:
        TrainerError: bitsandbytes is not installed.
        ModelSourceError: see `check_attention` and `check_whole`.
    """
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
    with reading(path):
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                quantization_config=quantisation,
                device_map={"": device},
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except ImportError as error:
            raise TrainerError(f"policy.lora.quantization: {error}; install ppod[qlora]") from error
    model, info = cast("tuple[PreTrainedModel, dict[str, object]]", loaded)
    check_whole(path, info)
    check_attention(model)
    _compute_in_its_dtype(model)
    return model.eval()


def _compute_in_its_dtype(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from its kernel for CPUs with AVX-512 bfloat16.

    It rounds activations and weights to bfloat16 whatever was asked for, and packs the weights anew at first use:
    policy, reference and generation then disagree by 0.06 nats a token where they are the same model.
    """
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportPrivateImportUsage]  # noqa: PLC0415

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dense(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter, or what it stands for where bitsandbytes keeps it in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - only quantised bases need it

    return dequantize_4bit(parameter.detach(), state)


def check_layers(dense_model: PreTrainedModel) -> None:
    """Raise TrainerError where a layer keeps its weight transposed: in 4 bits it would be the other way round.

    Those of GPT-2 are the ones; without quantisation they take no adapter, either.
    """
    for name, module in dense_model.named_modules():
        if isinstance(module, Conv1D):
            raise TrainerError(
                f"policy.lora.quantization: {name} keeps its weight transposed (Conv1D), and takes neither 4 bits nor "
                "an adapter; leave policy.lora out"
            )


def dense_copy(path: Path, *, attention: str) -> PreTrainedModel:
    """The model of a directory as it is without quantisation, on the meta device: all of it but its weights."""
    with reading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if (path / GENERATION_CONFIG_NAME).is_file():
        # Some models name a part of their end-of-sequence ids there alone.
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model
