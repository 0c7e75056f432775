# ruff: noqa: ARG002, PLC0415 - transformers names a callback's arguments; TRL's imports take seconds
"""Runs TRL's GRPOTrainer on verified answers, or judges a model on them. Runs in TRL's own environment.

usage: python run_trl_grpo.py train TASK.json --model DIRECTORY --out DIRECTORY [--seed N] [--dtype float32|bfloat16]
       python run_trl_grpo.py judge TASK.json --model DIRECTORY --out FILE

TASK.json holds the prompts that are trained on and those that are held out, as messages with references, and the
hyperparameters. TRL's speed options are set in its favour: no gradient checkpointing, no completions in its log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_NUMBER = re.compile(r"-?\d+")
_JUDGED_SAMPLES = 4
"""Of each held-out prompt."""


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "judge"))
    parser.add_argument("task", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    task: dict[str, Any] = json.loads(options.task.read_text())
    if options.what == "judge":
        options.out.write_text(json.dumps({"right": judge(task, options.model)}) + "\n")
        return
    # accelerate reads its precision from here; what TRL sets it to by default is bfloat16.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if options.dtype == "bfloat16" else "no"
    train(task, options)


def right(response: str, reference: str) -> float:
    """As ppod's `exact_answer` with a pattern: the last number of the response is the answer."""
    numbers = _NUMBER.findall(response)
    return float(bool(numbers) and int(numbers[-1]) == int(reference))


def train(task: dict[str, Any], options: argparse.Namespace) -> None:
    """Train, and write the model and the seconds of each step."""
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(options.seed)
    rows = [{"prompt": one["messages"], "reference": one["reference"]} for one in task["training"]]
    clock = make_clock(minibatches := task["minibatches"])

    def reward(completions, reference, **_):
        return [right(one[0]["content"], answer) for one, answer in zip(completions, reference, strict=True)]

    config = GRPOConfig(
        output_dir=str(options.out / "trl-output"),
        per_device_train_batch_size=task["batch_size"] // minibatches,
        steps_per_generation=minibatches,
        num_generations=task["samples_per_prompt"],
        max_completion_length=task["max_tokens"],
        max_steps=task["steps"] * minibatches,
        learning_rate=task["learning_rate"],
        warmup_steps=task["warmup_steps"] * minibatches,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        beta=task["kl_coefficient"],
        loss_type="bnpo",  # a mean over the minibatch's tokens
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        bf16=False,
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=minibatches,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(
        model=str(options.model),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(str(options.out / "model"))
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    result = {"seconds": clock.seconds, "rewards": clock.rewards, "versions": versions}
    (options.out / "trl.json").write_text(json.dumps(result, indent=2) + "\n")


def make_clock(minibatches: int):
    """A callback that notes the seconds of each step, of a batch of rollouts, and what TRL logs."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.rewards: list[float] = []
            self._begun = 0.0

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            self._begun = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step % minibatches == 0:
                now = time.perf_counter()
                self.seconds.append(round(now - self._begun, 3))
                self._begun = now
                print(f"step {len(self.seconds)}: {self.seconds[-1]:.2f} s", flush=True)

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if logs and "reward" in logs:
                self.rewards.append(round(float(logs["reward"]), 4))

    return Clock()


def judge(task: dict[str, Any], model_dir: Path) -> float:
    """The share of right answers to the held-out prompts, at temperature 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    chats = [one["messages"] for one in task["heldout"]]
    asked = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    found = model.generate(
        **asked,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        num_return_sequences=_JUDGED_SAMPLES,
        max_new_tokens=task["max_tokens"],
    )
    said = tokenizer.batch_decode(found[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [one["reference"] for one in task["heldout"] for _ in range(_JUDGED_SAMPLES)]
    return sum(map(right, said, answers)) / len(said)


if __name__ == "__main__":
    main()
