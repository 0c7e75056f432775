from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
import yaml

from ppod_models.configuration import load_config
from ppod_models.reward_heads import read_head
from ppod_models.reward_model import RewardModel
from ppod_trainer.reward_training import config as config_module
from ppod_trainer.reward_training.__main__ import main
from ppod_trainer.reward_training.config import RewardTrainingConfig
from support.tiny_trunk import save_tiny_trunk, tiny_tokenizer, tiny_trunk

CONFIGS = Path(config_module.__file__).parent / "configs"


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setenv("PPOD_CACHE_DIR", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    words = ["warm", "funny", "dull", "lifeless"]
    rows = []
    for number in range(120):
        chosen = random.integers(0, 4, size=6)
        rating = float(np.sum(chosen < 2) - 3)
        rows.append(f"{number}\t{rating}\t0.5\t{' '.join(words[i] for i in chosen)} {number}")
    ratings = tmp_path / "ratings.tsv"
    ratings.write_text("id\tmean_rating\tstddev\ttext\n" + "\n".join(rows) + "\n")
    return {
        "name": "toy",
        "model": {"source": str(save_tiny_trunk(tmp_path / "trunk")), "device": "cpu", "dtype": "float32"},
        "data": {"half": "a", "ratings": str(ratings), "held_out_share": 0.3},
        "features": {"suffix": " it is", "reads": [{"layer": 2, "pooling": "mean"}, {"layer": 3, "pooling": "end"}]},
        "fit": {"l2": [0.01, 0.1]},
        "output": str(tmp_path / "head"),
    }


def run(tmp_path: Path, values: dict[str, object], *over: Path) -> int:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return main([word for one in (file, *over) for word in ("--config", str(one))])


def test_same_seed_gives_the_same_bytes_with_and_without_cached_features(tmp_path, values, monkeypatch) -> None:
    assert run(tmp_path, values) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "head").iterdir()}
    assert set(first) == {
        "card.json",
        "head.safetensors",
        "figures.json",
        "report.md",
        "margins.png",
        "reliability.png",
    }
    assert run(tmp_path, values) == 0
    monkeypatch.setenv("PPOD_CACHE_DIR", str(tmp_path / "another-cache"))
    assert run(tmp_path, values) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "head").iterdir()} == first


def test_trained_head_loads_and_orders_what_it_was_taught(tmp_path, values) -> None:
    (over := tmp_path / "over.yaml").write_text("name: laid-over")
    assert run(tmp_path, values, over) == 0
    card = read_head(tmp_path / "head").card
    assert card.name == "laid-over"
    assert card.held_out.accuracy > 0.75
    files = f"--config {tmp_path / 'config.yaml'} --config {over}"
    assert card.training.command == f"python -m ppod_trainer.reward_training {files}"
    model = RewardModel.load(tiny_trunk(), tiny_tokenizer(), tmp_path / "head")
    texts = ["warm funny warm funny warm 1", "dull lifeless dull lifeless dull 1"]
    good, bad = model.score([np.array(tiny_tokenizer().encode(text)) for text in texts])
    assert good > bad


def test_every_fault_of_a_configuration_is_listed(tmp_path, values, capsys) -> None:
    values["surprise"] = 1
    values["name"] = "Not A Name"
    values["features"] = {"reads": [{"layer": 0, "pooling": "first"}, {"layer": 1, "pooling": "end"}]}
    values["fit"] = {"l2": [0.1, -1.0]}
    assert run(tmp_path, values) == 2
    problems = capsys.readouterr().err
    for path in ("surprise: unknown key", "name:", "features.reads.0.layer:", "features.reads.0.pooling:", "fit.l2.1:"):
        assert f"  {path}" in problems
    assert "5 problems" in problems


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "source", "/no/such/model", "error: model '/no/such/model': no such directory"),
        ("data", "ratings", "/no/such.tsv", "error: /no/such.tsv: cannot be read: No such file or directory"),
        ("features", "reads", [{"layer": 9, "pooling": "end"}], "error: the head reads layer 9, the trunk has 4"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, values, capsys, section, key, value, message) -> None:
    part = values[section]
    assert isinstance(part, dict)
    part[key] = value
    assert run(tmp_path, values) == 1
    assert capsys.readouterr().err.strip() == message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1.0 good"], "fitting part of half a: found 0 reviews, expected two at least whose mean ratings"),
        (["1.0 good"] * 40, "fitting part of half a: found 1"),
        ([f"{number / 5 - 2} good" for number in range(20)], "validation part of half a: found 0 reviews"),
        ([f"{number % 2} good" for number in range(120)], "differ by more than 1; add reviews, spread the ratings"),
        ([f"{number % 8 - 4} {'good ' * 200}" for number in range(120)], "tokens, and the trunk takes 1 to "),
    ],
    ids=["one", "equal", "few", "narrow", "long"],
)
def test_ratings_that_teach_nothing_are_one_line(tmp_path, values, capsys, rows: list[str], message: str) -> None:
    table = [(number, *row.split(" ", 1)) for number, row in enumerate(rows)]
    lines = [f"{number}\t{rating}\t0.5\t{text} {number}" for number, rating, text in table]
    (tmp_path / "ratings.tsv").write_text("\n".join(["id\tmean_rating\tstddev\ttext", *lines]))
    assert run(tmp_path, values) == 1
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {tmp_path / 'ratings.tsv'}, ")
    assert message in error


def test_a_trunk_that_reads_all_texts_alike_is_one_line(tmp_path, values, capsys) -> None:
    trunk = tiny_trunk()
    with torch.no_grad():
        trunk.get_input_embeddings().weight.zero_()
    trunk.save_pretrained(tmp_path / "trunk")
    assert run(tmp_path, values) == 1
    expected = "error: no feature tells the reviews apart: look whether their texts differ, and what the trunk is\n"
    assert capsys.readouterr().err == expected


def test_an_output_that_cannot_be_written_is_told_before_anything_is_computed(tmp_path, values, capsys) -> None:
    (tmp_path / "head").touch()
    assert run(tmp_path, values) == 1
    shown = capsys.readouterr()
    assert shown.err == f"error: {tmp_path / 'head'}: File exists\n"
    assert "reviews to train on" not in shown.out


def test_shipped_configurations_describe_the_shipped_heads() -> None:
    heads = {}
    for name in ("reviews-reward", "reviews-judge"):
        config = load_config(RewardTrainingConfig, CONFIGS / f"{name}.yaml")
        heads[name] = read_head(name).card
        assert config.name == heads[name].name == config.output.name == name
        assert config.features == heads[name].features
        assert config.data.half == heads[name].training.half
        assert config.data.split_seed == heads[name].training.split_seed
    reward, judge = heads["reviews-reward"], heads["reviews-judge"]
    assert reward.training.half != judge.training.half
    assert not set(reward.features.reads) & set(judge.features.reads)
    assert reward.features.suffix != judge.features.suffix
    assert reward.held_out.accuracy >= 0.80
    assert reward.held_out.clear_accuracy >= 0.90


def test_ctrl_c_is_one_line(tmp_path, values, monkeypatch, capsys) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("ppod_trainer.reward_training.pipeline.fit_head", interrupt)
    assert run(tmp_path, values) == 130
    assert capsys.readouterr().err == "SIGINT: stopped\n"
