"""Runs whose prompts are conversations."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from integration.trainer.conftest import System
from ppod import ChatTurn, RewardClient
from ppod.client import Pin
from ppod_trainer.assembly import open_run
from ppod_trainer.config import TrainerConfig
from ppod_trainer.evaluation import load_evaluation
from ppod_trainer.metrics import StepTimer
from ppod_trainer.ranks import Ranks
from ppod_trainer.stopping import StopSignal
from support.processes import running_service
from support.services import tiny_model_config
from support.tiny_classifiers import chat_tokenizer, save_decoder, save_encoder


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


@pytest.mark.parametrize("mode", ["auto", "hide"])
def test_a_reward_model_of_the_policy_s_tokenizer_reads_the_end_of_a_conversation_s_turn(
    system: System, tmp_path: Path, mode: str
) -> None:
    """As it did when it learned, and as models of other tokenizers do; not where it is told to be hidden."""
    policy = shutil.copytree(system.model_dir, tmp_path / "policy")
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(policy)
    decoder = tiny_model_config(save_decoder(tmp_path / "decoder"))
    rewards = {"rewards": [{"name": "decoder", "kind": "sequence_classification", "model": decoder}]}
    lines = [{"messages": [{"role": "user", "content": f"{number}?"}]} for number in range(80)]
    (prompts := tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {"policy": tiny_model_config(policy), "prompts": {"path": str(prompts), "heldout": 60}}
    sampling = {"batch_size": 8, "max_tokens": 64}
    config = system.config("turn-ends", steps=1, **changes, rollout=sampling, rewards={"stop_token": mode})
    with running_service("ppod_services.reward", tmp_path, rewards) as service, ExitStack() as opened:
        named = {"reward": service.target, "reward_model": "decoder", "judge_model": "decoder"}
        config["services"] = dict(config["services"], **named)  # pyright: ignore[reportCallIssue, reportArgumentType]
        run = opened.enter_context(
            open_run(TrainerConfig.model_validate(config), StopSignal(), Ranks(torch.device("cpu")))
        )
        scored = run.parts.collector.collect(
            run.parts.prompts.heldout, range(60), run.state.policy_version, StepTimer()
        )
        judged = run.parts.evaluator.judge(scored)
        ended = [one.rollout.response[-1] == tokenizer.eos_token_id for one in scored]
        whole = [one.rollout.tokens for one in scored]
        seen = [ids[:-1] if ends and mode == "hide" else ids for ids, ends in zip(whole, ended, strict=True)]
        with RewardClient(service.target, pin=Pin(model="decoder")) as client:
            expected = client.score(seen).values.tolist()
            apart = np.abs(client.score(whole).values - client.score([ids[:-1] for ids in whole]).values)
    assert 3 <= sum(ended) < 60
    assert apart[ended].min() > 1e-3
    assert [one.score for one in scored] == pytest.approx(expected, abs=1e-5)
    assert [judged[one.rollout.seed] for one in scored] == pytest.approx(expected, abs=1e-5)
