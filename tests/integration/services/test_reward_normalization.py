"""The command that measures a reward's scale, and the examples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from ppod_services.reward.normalization import Measurement, ReferenceFileError, read_references, section
from ppod_services.reward.samples import TextContent
from support.processes import ROOT, run_to_exit, write_config
from support.services import tiny_model_config
from support.tiny_head import scores_alone
from support.tiny_model import build_tokenizer

EXAMPLES = sorted((ROOT / "services/ppod_services/reward/examples").glob("*.yaml"))
COMMAND = "ppod_services.reward.normalization"


@pytest.fixture
def config(tiny_model_dir: Path, tiny_heads: dict[str, Path], tmp_path: Path) -> Path:
    trunk = tiny_model_config(tiny_model_dir)
    rewards = [
        {"name": "head", "model": trunk, "head": str(tiny_heads["first"]), "normalization": {"mean": 9, "std": 9}},
        {"name": "answer", "kind": "function", "function": "exact_answer"},
    ]
    return write_config(tmp_path / "c.yaml", {"listen": {"port": 1}, "rewards": rewards})


def test_a_reward_is_measured_as_it_is_before_its_own_normalisation(
    config: Path, tiny_model_dir: Path, tiny_heads: dict[str, Path], tmp_path: Path
) -> None:
    texts = [f"text {number} " + "x" * number for number in range(70)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n\n")
    done = run_to_exit(COMMAND, "--config", str(config), "--texts", str(tmp_path / "texts.txt"))
    assert done.returncode == 0, done.stderr
    ids = [build_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = np.asarray(scores_alone(tiny_model_dir, tiny_heads["first"], ids), dtype=np.float64)
    found = yaml.safe_load(done.stdout)["normalization"]
    assert (found["mean"], found["std"]) == pytest.approx((expected.mean(), expected.std()), rel=1e-4)
    assert "70 samples" in done.stdout


def test_files_of_the_configuration_are_laid_over_each_other(tmp_path: Path) -> None:
    base = write_config(tmp_path / "base.yaml", {"listen": {"port": 1}})
    over = write_config(tmp_path / "over.yaml", {"rewards": [{"name": "f", "kind": "function", "function": "length"}]})
    (tmp_path / "texts.txt").write_text("a\nb\n")
    done = run_to_exit(COMMAND, "--config", str(base), "--config", str(over), "--texts", str(tmp_path / "texts.txt"))
    assert "all 2 samples have the score 0" in done.stderr


def test_samples_with_references_measure_a_function(config: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "1+1", "text": "2", "reference": "2"}, {"text": "3", "reference": "2"}]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    done = run_to_exit(COMMAND, "--config", str(config), "--texts", str(file), "--reward", "answer")
    assert yaml.safe_load(done.stdout) == {"normalization": {"mean": 0.5, "std": 0.5}}


def test_a_mean_that_is_far_from_zero_is_told_as_exactly_as_the_deviation_needs_it() -> None:
    found = yaml.safe_load(section(Measurement(100, 12345.67891234, 0.0123456789)))["normalization"]
    assert found == {"mean": 12345.6789123, "std": 0.0123457}
    found = yaml.safe_load(section(Measurement(100, -1e-9, 1234.56789)))["normalization"]
    assert found == {"mean": 0.0, "std": 1234.57}


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("a.txt", "only one\n", 2, "found 1 samples"),
        ("a.jsonl", '{"text": "a"}\n{"test": "b"}\n', 2, "line 2"),
        ("a.jsonl", '{"text": "a", "reference": "b"}\n' * 2, 1, "all 2 samples have the score 0"),
    ],
)
def test_what_cannot_be_measured_is_told(
    config: Path, tmp_path: Path, name: str, content: str, code: int, words: str
) -> None:
    (tmp_path / name).write_text(content)
    arguments = ("--config", str(config), "--texts", str(tmp_path / name), "--reward", "answer")
    done = run_to_exit(COMMAND, *arguments)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    """Texts from the web hold other separators, which JSON leaves as they are; blank lines count for none."""
    texts = ["one\u2028and the same", "two\x0cof a\x85page"]
    (tmp_path / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8", newline="\r\n")
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "samples.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    for name in ("samples.txt", "samples.jsonl"):
        assert [sample.content for sample in read_references(tmp_path / name)] == [
            TextContent("", one) for one in texts
        ]
    (tmp_path / "samples.jsonl").write_text("\n\n".join([*lines, "{}"]), encoding="utf-8")
    with pytest.raises(ReferenceFileError, match="line 5: KeyError"):
        read_references(tmp_path / "samples.jsonl")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_right(path: Path) -> None:
    checked = run_to_exit("ppod_services.reward", "--config", str(path), "--check")
    assert checked.returncode == 0, checked.stderr


def test_there_are_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["composed", "judge"]


@pytest.mark.parametrize(("name", "line"), [("a.txt", "good"), ("a.jsonl", '{"text": "good"}')])
def test_the_mark_that_windows_puts_before_utf_8_is_no_text(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).write_text(f"{line}\n{line}\n", encoding="utf-8-sig")
    first, second = read_references(tmp_path / name)
    assert first == second


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": null}', "text is None, no text"),
        ('{"text": "a", "prompt": 1}', "prompt is 1, no text"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "content is None, no text"),
    ],
)
def test_what_is_no_text_is_not_measured_as_one(tmp_path: Path, line: str, fault: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(ReferenceFileError, match=f"line 2: .*{fault}"):
        read_references(tmp_path / "a.jsonl")
