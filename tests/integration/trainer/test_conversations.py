"""Runs whose prompts are conversations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from integration.trainer.conftest import System
from ppod import ChatTurn, RewardClient
from ppod.client import Pin
from ppod_trainer.evaluation import load_evaluation
from support.processes import running_service
from support.services import tiny_model_config
from support.tiny_classifiers import chat_tokenizer, save_encoder


def test_a_reward_model_of_another_tokenizer_reads_a_run_s_conversations_by_its_own_template(
    system: System, tmp_path: Path
) -> None:
    policy = shutil.copytree(system.model_dir, tmp_path / "policy")
    chat_tokenizer().save_pretrained(policy)
    rewards = {
        "rewards": [
            {
                "name": "encoder",
                "kind": "sequence_classification",
                "model": tiny_model_config(save_encoder(tmp_path / "encoder")),
            },
            {"name": "alone", "kind": "sum", "terms": [{"reward": "encoder"}]},
        ],
        "tokenizers": [str(policy)],
    }
    asked = {f"[user]{word}?[assistant]": word for word in (f"{a}{b}" for a in "abcd" for b in "efgh")}
    lines = [{"messages": [{"role": "user", "content": f"{word}?"}]} for word in asked.values()]
    (prompts := tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {"policy": tiny_model_config(policy), "prompts": {"path": str(prompts), "heldout": 6}}
    config = system.config("conversations", steps=1, **changes)
    with running_service("ppod_services.reward", tmp_path, rewards) as service:
        named = {"reward": service.target, "reward_model": "alone", "judge_model": "alone"}
        done = system.train({**config, "services": dict(config["services"], **named)})  # pyright: ignore
        assert done.returncode == 0, done.stderr
        before = load_evaluation(system.directory / "conversations" / "evaluation_before.json")
        chats = [
            [ChatTurn("user", f"{asked[one.prompt]}?"), ChatTurn("assistant", one.continuation)]
            for one in before.samples
        ]
        with RewardClient(service.target, pin=Pin(model="encoder")) as client:
            expected = client.score_conversations(chats).values.tolist()
    assert len(set(expected)) == len(expected) == 6
    assert [one.score for one in before.samples] == pytest.approx(expected, abs=1e-5)
    assert [one.judge for one in before.samples] == pytest.approx(expected, abs=1e-5)
