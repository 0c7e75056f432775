"""Runs that are paid by functions alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from integration.trainer.conftest import System, records_of
from ppod import RewardClient
from ppod_models.loading import load_tokenizer, token_id_bound
from ppod_trainer.evaluation import load_evaluation
from support.processes import running_service
from support.tiny_model import VOCAB_SIZE

EXACT = {"name": "exact", "kind": "function", "function": "exact_answer"}


def test_answers_are_held_against_the_references_of_their_own_prompts(system: System, tmp_path: Path) -> None:
    words = [f"{first}{second}" for first in "abcdef" for second in "ghijkl"]

    def evaluated(name: str, references: Mapping[str, str]) -> tuple[float, dict[str, str]]:
        """The score before training, and the continuation of each prompt that is held out."""
        lines = [json.dumps({"prompt": word, "reference": references.get(word, "none of these")}) for word in words]
        prompts = tmp_path / f"{name}.jsonl"
        prompts.write_text("\n".join(lines))
        config = system.config(name, steps=1, prompts={"path": str(prompts), "heldout": 6})
        done = system.train({**config, "services": {**services, "judge_model": "exact"}})
        assert done.returncode == 0, done.stderr
        before = load_evaluation(system.directory / name / "evaluation_before.json")
        assert before.judge == before.score
        return before.score, {one.prompt: one.continuation for one in before.samples}

    rewards = {"rewards": [EXACT], "tokenizers": [str(system.model_dir)]}
    with running_service("ppod_services.reward", tmp_path, rewards) as service:
        services = dict(system.config("x")["services"], reward=service.target)  # pyright: ignore
        score, said = evaluated("unknown-answers", {})
        assert (score, len(said)) == (0.0, 6)
        assert len(set(said.values())) > 1
        score, again = evaluated("known-answers", said)
        assert (score, again) == (1.0, said)

        done = system.train({**system.config("no-answers"), "services": services | {"judge_model": None}})
    assert done.returncode == 1
    assert "services.reward_model: exact compares responses with references, and the prompts have none" in done.stderr


def test_functions_alone_pay_a_policy_with_a_padded_vocabulary(system: System, tmp_path: Path) -> None:
    # As in published models; this one, whose weights are random, often samples the ids between.
    bound = token_id_bound(load_tokenizer(system.model_dir))
    assert bound < VOCAB_SIZE
    length = {"name": "length", "kind": "function", "function": "length", "parameters": {"minimum": 6}}
    rewards = {"rewards": [length], "tokenizers": [str(system.model_dir)]}
    config = system.config("functions", steps=2)
    with running_service("ppod_services.reward", tmp_path, rewards) as service:
        services = dict(config["services"], reward=service.target, judge_model=None)  # pyright: ignore
        done = system.train({**config, "services": services})
        assert done.returncode == 0, done.stderr
        with RewardClient(service.target) as client:
            # "abc", as the tokenizer has it, between ids that it has not.
            known = load_tokenizer(system.model_dir).encode("abc")
            samples = [known, [VOCAB_SIZE - 1, *known, bound, 2**31 - 1], [bound, bound]]
            assert client.score(samples).values.tolist() == [-3.0, -3.0, -6.0]
    assert records_of(system.directory / "functions")[-1]["step"] == 2
