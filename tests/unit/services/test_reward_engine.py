"""Loading of reward models: one trunk for many heads, and heads that do not fit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ppod_models.configuration import ModelConfig
from ppod_models.sources import ModelSourceError
from ppod_services.reward.config import RewardModelConfig
from support import fake_reward_model


def reward_models(directory: Path, *dtypes_and_heads: tuple[str, str]) -> list[RewardModelConfig]:
    return [
        RewardModelConfig.model_validate(
            {"name": f"model-{index}", "model": ModelConfig(source=str(directory), dtype=dtype), "head": head}  # pyright: ignore
        )
        for index, (dtype, head) in enumerate(dtypes_and_heads)
    ]


@pytest.fixture(autouse=True)
def _arithmetic_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ppod_models.reward_model", fake_reward_model)
    monkeypatch.delitem(sys.modules, "ppod_services.reward.engine", raising=False)


def test_models_of_one_source_share_their_trunk(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ppod_services.reward.engine import load_reward_models  # noqa: PLC0415

    trunks: list[object] = []
    load = fake_reward_model.RewardModel.load

    def remember(trunk: object, tokenizer: object, head: str) -> object:
        trunks.append(trunk)
        return load(trunk, tokenizer, head)  # pyright: ignore

    monkeypatch.setattr(fake_reward_model.RewardModel, "load", remember)
    configs = reward_models(tiny_model_dir, ("float32", "1"), ("float32", "2"), ("bfloat16", "3"))
    _, targets = load_reward_models(configs, max_batch_tokens=10)
    assert trunks[0] is trunks[1]
    assert trunks[0] is not trunks[2]
    assert [target.info.dtype for target in targets] == ["float32", "float32", "bfloat16"]
    # A sequence that fits no batch could never be scored.
    assert targets[0].info.max_sequence_tokens == 10


def test_a_missing_head_names_its_model(tiny_model_dir: Path) -> None:
    from ppod_services.reward.engine import load_reward_models  # noqa: PLC0415

    with pytest.raises(ModelSourceError, match=r"model-1.*no head 'missing'"):
        load_reward_models(reward_models(tiny_model_dir, ("float32", "1"), ("float32", "missing")), 100)
