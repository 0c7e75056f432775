# ruff: noqa: PLC0415 - TRL's imports take seconds
"""Runs one update of TRL's PPOTrainer on a tiny random model and keeps what it computed, to be compared with ours.

usage: python record_update.py OUT.npz      in TRL's own environment, which setup.sh makes

The trainer is TRL's own, unchanged: each time that its loop asks accelerate for a backward pass, the loop's variables
are read from the frame that asks. Two runs are kept: in `full` no response ends before the longest length, in `ended`
some do. Their keys are `RUN/NAME` for what is computed once, `RUN/N/NAME` for the N-th minibatch.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

VOCABULARY = 48
PAD, END = 0, 1
PROMPTS = [[5, 9, 17], [33, 4], [8, 8, 21, 40], [12, 30, 2], [45, 3], [7, 19, 28, 11], [26], [14, 37, 6]]
RESPONSE_TOKENS = 6

ONCE = (
    "query_responses",
    "responses",
    "logprobs",
    "ref_logprobs",
    "values",
    "scores",
    "sequence_lengths",
    "rewards",
    "advantages",
    "returns",
)
EACH = ("micro_batch_inds", "new_logprobs", "vpred", "pg_loss", "vf_loss", "loss")


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its name, whether responses may end early, and the seed of its sampling."""

    name: str
    stops: bool
    seed: int


def main() -> None:
    """Record both runs."""
    import trl

    arrays: dict[str, np.ndarray] = {"trl_version": np.array(trl.__version__)}
    # Seeds with which no pad token is sampled, which TRL would take for the end, and, in the second, some ends are.
    for run in (Run("full", stops=False, seed=2), Run("ended", stops=True, seed=5)):
        arrays |= record(run)
    np.savez_compressed(Path(sys.argv[1]), **arrays)
    print(f"{sys.argv[1]}: {Path(sys.argv[1]).stat().st_size} bytes")


def record(run: Run) -> dict[str, np.ndarray]:
    """Train for one update and give what was computed."""
    import torch

    arrays: dict[str, np.ndarray] = {}
    minibatch = 0
    with tempfile.TemporaryDirectory() as directory:
        trainer, models = build_trainer(run, Path(directory))
        if run.name == "full":
            for part, model in models.items():
                arrays |= {f"weights/{part}/{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
            arrays = {key: value.copy() for key, value in arrays.items()}
        backward = trainer.accelerator.backward

        def recording(loss: torch.Tensor) -> None:
            nonlocal minibatch
            seen = sys._getframe(1).f_locals
            for key in ONCE if minibatch == 0 else ():
                arrays[f"{run.name}/{key}"] = seen[key].numpy().copy()
            for key in EACH:
                value = seen[key]
                array = value if isinstance(value, np.ndarray) else value.detach().numpy()
                arrays[f"{run.name}/{minibatch}/{key}"] = array.copy()
            backward(loss)
            if minibatch == 0 and run.name == "full":
                gradients = {
                    name: parameter.grad.numpy().copy()
                    for name, parameter in trainer.model.named_parameters()
                    if parameter.grad is not None
                }
                arrays.update({f"full/gradients/{name}": gradient for name, gradient in gradients.items()})
            minibatch += 1

        trainer.accelerator.backward = recording
        torch.manual_seed(run.seed)
        trainer.train()
    check(arrays, run)
    return arrays


def check(arrays: dict[str, np.ndarray], run: Run) -> None:
    """Refuse a recording that does not show what it is for."""
    responses = arrays[f"{run.name}/responses"]
    longest = arrays[f"{run.name}/sequence_lengths"] == RESPONSE_TOKENS - 1
    if run.stops:
        ends = (responses == END).any(axis=1)
        # Behind its end a response is padding; a pad token in front of it was sampled.
        good = not longest.all() and longest.any() and (ends | longest).all()
    else:
        good = bool(longest.all())
    if not good:
        raise SystemExit(f"{run}: responses {responses.tolist()}; choose another seed")


def build_trainer(run: Run, directory: Path):
    """TRL's PPOTrainer for four minibatches, and its models: policy, reference and value."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2", padding_side="left"
    )
    torch.manual_seed(0)
    policy, value, reward = (kind(model_config()) for kind in (LlamaForCausalLM, *[LlamaForSequenceClassification] * 2))
    reference = LlamaForCausalLM(model_config())
    # Near the policy, so that the KL penalty is neither zero nor all there is.
    with torch.no_grad():
        for mine, others in zip(reference.parameters(), policy.parameters(), strict=True):
            mine.copy_(others + 0.05 * torch.randn_like(others))
    config = PPOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=len(PROMPTS),
        gradient_accumulation_steps=1,
        num_mini_batches=2,
        num_ppo_epochs=2,
        total_episodes=len(PROMPTS),
        local_rollout_forward_batch_size=len(PROMPTS),
        response_length=RESPONSE_TOKENS,
        learning_rate=1e-3,
        kl_coef=0.1,
        gamma=0.97,
        lam=0.9,
        temperature=0.8,
        stop_token="eos" if run.stops else None,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        seed=run.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": PROMPTS}),
        eval_dataset=Dataset.from_dict({"input_ids": PROMPTS[:1]}),
    )
    return trainer, {"policy": policy, "reference": reference, "value": value}


def model_config():
    """Llama, as small as it gets, with weights large enough that its distributions are far from uniform."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        num_labels=1,
    )


if __name__ == "__main__":
    main()
