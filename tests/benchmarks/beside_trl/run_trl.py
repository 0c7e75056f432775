# ruff: noqa: ARG002, PLC0415 - transformers names a callback's arguments; TRL's imports take seconds
"""Runs TRL's PPOTrainer on one setting and writes the seconds of each step. Runs in TRL's own environment.

usage: python run_trl.py SETTING --steps N --model DIRECTORY --reviews FILE --services DIRECTORY --out FILE [--seed N]
    [--reward HEAD] [--kl-coefficient C]

Policy, reference and a separate value model start from the same weights. The reward model is ppod's own: a head on the
frozen language model. Without that head (--reward last-state) it is a random linear head on the last token's state.
TRL's speed options are set in its favour: no gradient checkpointing, one rollout batch, no sample generation.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from settings import SETTINGS, Setting

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    setting: Setting
    steps: int
    model: Path
    reviews: Path
    services: Path
    reward: str
    out: Path


def main() -> None:
    """Train for a few steps and write the result as JSON."""
    options = read_options()
    # accelerate reads its precision from the environment; PPOTrainer passes none on.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if options.setting.trl.dtype == "bfloat16" else "no"
    trainer, clock = build_trainer(options)
    trainer.train()
    seconds = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]
    import torch
    import transformers
    import trl

    result = {
        "setting": asdict(options.setting),
        "seconds_per_step": statistics.median(seconds),
        "seconds": [round(value, 3) for value in seconds],
        "scores": clock.scores,
        "kl": clock.kls,
        "reward": options.reward,
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def read_options() -> Options:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reviews", type=Path, required=True)
    parser.add_argument("--services", type=Path, required=True, help="folder that holds ppod_models")
    parser.add_argument("--reward", default="reviews-reward", help="a head's name or directory, or last-state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kl-coefficient", type=float, help="none: the setting's")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    setting = replace(SETTINGS[given.setting], seed=given.seed)
    if given.kl_coefficient is not None:
        setting = replace(setting, kl_coefficient=given.kl_coefficient)
    return Options(setting, given.steps, given.model, given.reviews, given.services, given.reward, given.out)


def build_trainer(options: Options):
    """PPOTrainer and the clock that it reports to."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    setting = options.setting
    torch.manual_seed(setting.seed)
    frozen = torch.bfloat16 if setting.trl.dtype == "bfloat16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    # TRL hides every pad token from the models, so it must not be the end-of-sequence token.
    tokenizer.pad_token_id = 0
    attention = setting.trl.attention
    policy = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=attention, dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(
        options.model, attn_implementation=attention, dtype=torch.float32, num_labels=1
    )
    torch.nn.init.zeros_(value.score.weight)
    reference = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=attention, dtype=frozen).eval()
    trunk = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=attention, dtype=frozen).eval()
    trunk.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = read_prompts(options.reviews, tokenizer, setting)
    clock = make_clock()
    config = PPOConfig(
        output_dir=str(options.out.parent / "trl-output"),
        # Not minibatch size and accumulation: accelerate would then step once for all minibatches together.
        per_device_train_batch_size=setting.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=setting.minibatches,
        num_ppo_epochs=setting.epochs,
        total_episodes=options.steps * setting.batch_size,
        local_rollout_forward_batch_size=setting.batch_size,
        response_length=setting.response_tokens,
        learning_rate=setting.learning_rate,
        kl_coef=setting.kl_coefficient,
        temperature=setting.temperature,
        stop_token="eos",
        num_sample_generations=0,
        gradient_checkpointing=False,
        # Off: TRL's own check refuses bfloat16 without a GPU. accelerate's autocast, set in `main`, works on this CPU.
        bf16=False,
        seed=setting.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=make_reward_model(options, trunk, tokenizer),
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(1)),
        callbacks=[clock],
    )
    return trainer, clock


def read_prompts(reviews: Path, tokenizer, setting: Setting):
    """The first tokens of each review, as TRL's data set."""
    from datasets import Dataset

    with reviews.open(encoding="utf-8", newline="") as stream:
        texts = [row["text"] for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)]
    ids = [tokenizer.encode(text)[: setting.prompt_tokens] for text in texts]
    return Dataset.from_dict({"input_ids": [prompt for prompt in ids if len(prompt) == setting.prompt_tokens]})


def make_clock():
    """A callback that notes the time at each step's end, and what TRL logs."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.scores: list[float] = []
            self.kls: list[float] = []

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            self.times.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs) -> None:
            self.times.append(time.perf_counter())
            print(f"step {len(self.times) - 1}: {self.times[-1] - self.times[-2]:.2f} s", file=sys.stderr, flush=True)

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if logs and "objective/scores" in logs:
                self.scores.append(round(float(logs["objective/scores"]), 4))
                self.kls.append(round(float(logs["objective/kl"]), 4))

    return Clock()


def make_reward_model(options: Options, trunk, tokenizer):
    """ppod's reward model in the shape that TRL asks for: a backbone with hidden states and a `score` head.

    The backbone scores whole sequences itself and hands the score out as the hidden state of every position, so TRL's
    identity head reads the very number that ppod's reward service would answer.
    """
    import torch
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutput

    score_sequences = load_scorer(options, trunk, tokenizer)

    class Backbone(nn.Module):
        def forward(self, input_ids, attention_mask, **kwargs) -> BaseModelOutput:
            rows = [ids[mask].cpu().numpy() for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]
            scores = torch.as_tensor(score_sequences(rows), dtype=torch.float32, device=input_ids.device)
            return BaseModelOutput(hidden_states=(scores[:, None, None].expand(*input_ids.shape, 1),))

    class RewardModule(nn.Module):
        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone()
            self.score = nn.Identity()

    return RewardModule()


def load_scorer(options: Options, trunk, tokenizer):
    """A function from token sequences to scores."""
    import torch

    if options.reward != "last-state":
        sys.path.insert(0, str(options.services))
        from ppod_models.reward_model import RewardModel

        return RewardModel.load(trunk, tokenizer, options.reward).score
    head = torch.nn.Linear(trunk.config.hidden_size, 1)

    @torch.no_grad()
    def score(rows):
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)
        mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
        states = trunk.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return head(states[torch.arange(len(rows)), lengths - 1].float()).squeeze(-1)

    return score


if __name__ == "__main__":
    main()
