"""`ppod run` as a user starts it: the real model, the shipped reward model and judge, three services, PPO."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppod_deploy.defaults import default_config
from support.processes import ROOT, environment, free_ports


def run_file(directory: Path) -> Path:
    """The CPU's run file on free ports, cut down to a minute."""
    values = yaml.safe_load((ROOT / "deploy/ppod_deploy/configs/smollm2-cpu.yaml").read_text())
    ports = iter(free_ports(9))
    for service in values["services"].values():
        service["listen"] = {key: next(ports) for key in service["listen"]}
    values["trainer"]["metrics"] = {"port": next(ports)}
    values["trainer"]["steps"] = 2
    values["trainer"]["optimizer"] = {"learning_rate": 1e-5}
    values["trainer"]["rollout"] = {"batch_size": 8, "max_tokens": 12}
    values["trainer"]["prompts"] = {"heldout": 8}
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def marked_processes(mark: int) -> list[str]:
    """Command lines of living processes whose environment carries the test's mark."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"PPOD_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().decode())
            except OSError:
                continue
    return found


def run_ppod(file: Path, run_dir: Path) -> str:
    """Run to the end and return stdout; no process of it may be left."""
    result = subprocess.run(
        [sys.executable, "-m", "ppod_deploy", "run", "--config", str(file), "--trainer.run-dir", str(run_dir)],
        env={**environment(), "PPOD_TEST_MARK": str(os.getpid())},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert marked_processes(os.getpid()) == []
    return result.stdout


def records_of(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without timings."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if not k.startswith(("seconds/", "tokens_per_second"))} for one in records]


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_the_default_run_end_to_end_twice(tmp_path: Path) -> None:
    file, run_dir, again = run_file(tmp_path), tmp_path / "run", tmp_path / "again"
    stdout = run_ppod(file, run_dir)
    assert "step 2/2" in stdout
    assert "held-out judge" in stdout
    steps = [record for record in records_of(run_dir) if "score/mean" in record]
    assert len(steps) == 2
    assert all(record["policy/first_ratio_error"] == 0 for record in steps)
    assert all(record["sampler/gap_mean"] < 0.1 for record in steps), "bfloat16 at the worst, sampler and autocast"
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final_model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final_model")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in answer, "two small steps do not unlearn the world"
    for name in ("reward", "reference", "generation"):
        lines = (run_dir / "logs" / f"{name}.jsonl").read_text().splitlines()
        events = [json.loads(line)["event"] for line in lines]
        assert {"listening", "ready", "draining", "stopped"} <= set(events)

    run_ppod(file, again)
    assert records_of(run_dir) == records_of(again), "one seed gives one result"
    for relative in ("samples/step_000002.jsonl", "final_model/model.safetensors"):
        assert (run_dir / relative).read_bytes() == (again / relative).read_bytes()


def test_the_default_follows_the_machine() -> None:
    # The launcher reads the CPU's flags; torch asks the CPU itself.
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    expected = "smollm2-cuda" if torch.cuda.is_available() else "smollm2-cpu" if fast else "smollm2-cpu-float32"
    assert default_config().stem == expected
