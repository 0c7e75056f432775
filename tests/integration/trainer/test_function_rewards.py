"""A run that is paid by a function alone, with a policy that has more embeddings than its tokenizer makes ids."""

from __future__ import annotations

from pathlib import Path

from integration.trainer.conftest import System, records_of
from ppod import RewardClient
from ppod_models.loading import load_tokenizer, token_id_bound
from support.processes import running_service
from support.tiny_model import VOCAB_SIZE


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
