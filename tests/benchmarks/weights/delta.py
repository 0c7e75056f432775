"""Changes of real PPO steps: bytes, seconds to find them, and seconds to push them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from benchmarks.weights.figures import Bar, Place, Timing, generation, report, say, syncing
from ppod.client import WireImage
from ppod_trainer.config import WeightTransferConfig
from ppod_trainer.policy_weights import PolicyTensors
from support.processes import ROOT, environment

_OWN = "model."
"""What stands before the names of the model's parameters in a checkpoint, which holds a value head besides."""


def train(run_dir: Path, steps: int) -> None:
    """Begin the default run, with a checkpoint after each step, and stop it after so many."""
    arguments = ["--trainer.run_dir", str(run_dir), "--trainer.checkpoint.interval", "1"]
    arguments += ["--trainer.checkpoint.keep", str(steps + 1), "--trainer.evaluation.judge_interval", "1000"]
    command = [sys.executable, "-m", "ppod_deploy", "run", *arguments]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL)
    last = run_dir / "checkpoints" / f"step_{steps:06d}"
    try:
        while not last.is_dir():
            if process.poll() is not None:
                raise SystemExit(f"the run ended with exit code {process.returncode} before step {steps}")
            time.sleep(1.0)
    finally:
        process.terminate()
        process.wait(120)


def measure_delta(checkpoints: Path, place: Place) -> bool:
    """Push every checkpoint after the one before it, by gRPC and by files."""
    found = sorted(checkpoints.glob("step_*"))
    if not found:
        raise SystemExit(f"{checkpoints} holds no checkpoints")
    timings: list[Timing] = []
    figures: dict[str, object] = {"checkpoints": [path.name for path in found]}
    model = place.subject.load(torch.float32)
    full = sum(parameter.numel() * 2 for parameter in model.parameters())
    encode = _encodings(model, found, figures)
    timings.append(Timing("finding and encoding the changes of one step", full, encode))
    target = place.subject.served("bfloat16")
    for name, config in (
        ("gRPC", WeightTransferConfig(encoding="delta")),
        ("a file", WeightTransferConfig(encoding="delta", plane="shared", directory=place.shared)),
        ("gRPC, whole", WeightTransferConfig()),
    ):
        model = place.subject.load(torch.float32)
        seconds: list[float] = []
        sent: list[int] = []
        with generation(target, place) as service, syncing([service.admin_target], config) as sync:
            sync.push(model, torch.bfloat16, 1)
            for version, path in enumerate(found, start=2):
                _load(model, path)
                start = time.perf_counter()
                done = sync.push(model, torch.bfloat16, version)
                seconds.append(time.perf_counter() - start)
                sent.append(done.sent_bytes)
                say(f"    {name}, {path.name}: {done.sent_bytes / 1e6:.1f} MB, {seconds[-1]:.3f} s")
        timings.append(Timing(f"push after a step over {name}, from float32 parameters", full, seconds))
        figures[f"sent_bytes over {name}"] = sent
    bars: list[Bar] = []
    return report("delta", place, timings, bars, figures)


def _encodings(model: PreTrainedModel, found: list[Path], figures: dict[str, object]) -> list[float]:
    """Seconds for each step, from the parameters on; how many elements changed goes to the figures."""
    policy = PolicyTensors(model, torch.bfloat16)
    base, new = WireImage(policy.layout), WireImage(policy.layout)
    base.fill(policy.write)
    seconds: list[float] = []
    shares: list[float] = []
    sizes: list[int] = []
    for path in found:
        _load(model, path)
        start = time.perf_counter()
        new.fill(PolicyTensors(model, torch.bfloat16).write)
        changes = new.changes(base)
        seconds.append(time.perf_counter() - start)
        sizes.append(sum(len(tensor.data) for tensor in changes))
        shares.append(_changed_share(new, base))
        base, new = new, base
        kinds = {kind: sum(one.encoding.name == kind for one in changes) for kind in ("DENSE", "BITMAP", "GAPS")}
        say(f"    {path.name}: {shares[-1]:.1%} of the elements changed, {sizes[-1] / 1e6:.1f} MB, {kinds}")
    figures.update(full_bytes=base.nbytes, changed_share=shares, encoded_bytes=sizes)
    return seconds


def _changed_share(new: WireImage, base: WireImage) -> float:
    changed = elements = 0
    for one, other in zip(new.tensors(), base.tensors(), strict=True):
        bits = [torch.frombuffer(tensor.data, dtype=torch.int16) for tensor in (one, other)]
        changed += int((bits[0] != bits[1]).sum())
        elements += len(bits[0])
    return changed / elements


@torch.no_grad()
def _load(model: PreTrainedModel, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "policy.safetensors")
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[_OWN + name])
