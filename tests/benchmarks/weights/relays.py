"""Eight replicas of a small model against one: by relay, one after the other from the trainer, and by a shared file."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.subject import Subject
from benchmarks.weights.figures import Bar, Place, Timing, generation, report, say, syncing
from benchmarks.weights.slow_link import slow_links
from ppod_trainer.config import WeightTransferConfig
from ppod_trainer.weight_sync import WeightSync
from support.processes import ServiceProcess
from support.tiny_model import VOCAB_SIZE, build_tokenizer

REPLICAS = 8
UPLINK_BYTES_PER_S = 25e6


def small_model(hidden_size: int) -> LlamaForCausalLM:
    """Four layers of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def measure_relays(place: Place, hidden_size: int) -> bool:
    """Alternate one replica and eight: that share a directory, as on one host, and that share none."""
    policy, model, size = _saved(place, hidden_size)
    relays = {
        "chain": WeightTransferConfig(relay="chain"),
        "tree of 2": WeightTransferConfig(relay="tree", relay_fanout=2),
        "tree of 4": WeightTransferConfig(relay="tree", relay_fanout=4),
    }
    others = {
        "each from the trainer": WeightTransferConfig(),
        "one shared file": WeightTransferConfig(plane="shared", directory=place.shared / "files"),
    }
    computed: dict[str, float] = {}
    alone: list[Timing] = []
    timings: list[Timing] = []
    for directory, ways in ((place.shared / "relay", {"chain": relays["chain"]}), (None, {**relays, **others})):
        where = "on one host" if directory else "apart"
        with ExitStack() as stack:
            services = [
                stack.enter_context(generation(model, place, map_files=True, relay=True, relay_directory=directory))
                for _ in range(REPLICAS)
            ]
            for way, config in ways.items():
                name = f"eight replicas {where}, {way}"
                one, eight, computed[name] = _alternate(place, services, config, policy)
                alone.append(Timing(f"one replica, beside {name}", size, one))
                timings.append(Timing(name, size, eight))
                say(f"    {alone[-1]}\n    {timings[-1]}")
    ratios = [eight.median_s / one.median_s for one, eight in zip(alone, timings, strict=True)]
    bars = [
        Bar(f"eight replicas that share a directory, by relay / one, {size / 1e6:.1f} MB", ratios[0], 2.0),
        Bar("eight replicas that share none, by relay / one", min(ratios[1 : 1 + len(relays)]), 2.0),
    ]
    figures: dict[str, object] = {"bytes": size, "replicas": REPLICAS}
    # Where this, over the number of cores, is more than the bar, no way of sending reaches it.
    figures["processor seconds of all eight replicas in one push"] = computed
    return report("relay", place, [*alone, *timings], bars, figures)


def _alternate(
    place: Place, services: list[ServiceProcess], config: WeightTransferConfig, policy: LlamaForCausalLM
) -> tuple[list[float], list[float], float]:
    """Seconds of pushes to one replica and to all, in turns, and processor seconds of all for one push to all."""
    targets = [service.admin_target for service in services]
    one: list[float] = []
    eight: list[float] = []
    computed_s = 0.0
    with syncing(targets[:1], WeightTransferConfig()) as single, syncing(targets, config) as sync:
        for number in range(place.rounds + 2):
            alone = _push(single, policy)
            before = _cpu_s(services)
            seconds = _push(sync, policy)
            # Files are written in turns: the first ones are new.
            if number >= 2:
                one.append(alone)
                eight.append(seconds)
                computed_s += (_cpu_s(services) - before) / place.rounds
    return one, eight, computed_s


def measure_uplinks(place: Place, hidden_size: int) -> bool:
    """The same where every sender's uplink carries so many bytes a second, which is what a relay is for."""
    policy, model, size = _saved(place, hidden_size)
    relay = WeightTransferConfig(relay="chain")
    with ExitStack() as stack:
        services = [stack.enter_context(generation(model, place, relay=True)) for _ in range(REPLICAS)]
        ports = [service.admin_port for service in services]
        own = stack.enter_context(slow_links(ports, UPLINK_BYTES_PER_S, one_uplink=False))
        trainers = stack.enter_context(slow_links(ports, UPLINK_BYTES_PER_S, one_uplink=True))
        ways = {
            "one replica": stack.enter_context(syncing(own[:1], WeightTransferConfig())),
            "eight replicas, chain": stack.enter_context(syncing(own, relay)),
            "eight replicas, each from the trainer": stack.enter_context(syncing(trainers, WeightTransferConfig())),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(place.rounds + 1):
            for name, sync in ways.items():
                took = _push(sync, policy)
                if number:
                    seconds[name].append(took)
    timings = [
        Timing(f"{name}, uplinks of {UPLINK_BYTES_PER_S / 1e6:g} MB/s", size, took) for name, took in seconds.items()
    ]
    bars = [Bar("eight replicas by relay / one, by slow uplinks", timings[1].median_s / timings[0].median_s, 2.0)]
    return report("uplinks", place, timings, bars, {"bytes": size, "replicas": REPLICAS})


def _saved(place: Place, hidden_size: int) -> tuple[LlamaForCausalLM, dict[str, object], int]:
    """The small model, what a service loads it by, and its bytes."""
    policy = small_model(hidden_size)
    directory = place.shared / "model"
    policy.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    model: dict[str, object] = {**Subject(str(directory), place.subject.device).served("bfloat16"), "threads": 1}
    policy.to(place.subject.device)  # pyright: ignore[reportArgumentType]
    return policy, model, sum(parameter.numel() * 2 for parameter in policy.parameters())


def _cpu_s(services: list[ServiceProcess]) -> float:
    """Processor seconds that these have used."""
    ticks = 0
    for service in services:
        fields = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _push(sync: WeightSync, policy: LlamaForCausalLM) -> float:
    version = max(sync.serving_versions()) + 1
    start = time.perf_counter()
    done = sync.push(policy, torch.bfloat16, version)
    seconds = time.perf_counter() - start
    if done.fallbacks or done.lost:
        raise SystemExit(f"a replica was lost: {done}")
    return seconds
