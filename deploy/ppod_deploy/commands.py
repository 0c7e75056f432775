"""The subcommands of `ppod` as plain data: what tyro shows in --help and fills in. Importing this stays cheap."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ppod_deploy.k8s.commands import K8s, LaidOver

Positional = tyro.conf.Positional
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
OptionalLaidOver = Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")]


@dataclass(frozen=True, slots=True)
class Run:
    """Start the three services and the trainer on this machine, train, and stop everything.

    The run file holds a section for each service and one for the trainer. Without --config it is the packaged one,
    which trains SmolLM2-135M to write better-liked movie reviews, on a CUDA device or on the CPU.

    Every key of the run file can be overridden by its dotted path; --help lists them all:
        ppod run --trainer.steps 5 --trainer.optimizer.learning-rate 1e-5 --services.reward.listen.port 6001

    Everything is validated before anything starts. Ctrl-C lets the trainer write a checkpoint; a second one does not
    wait. Exit code: the trainer's; 1 a service failed; 2 the configuration is wrong; 130 Ctrl-C.
    """

    config: OptionalLaidOver = ()
    """YAML run file; given again: values that are laid over those before. Default: the packaged one for this
    machine."""

    resume: OptionalPath = None
    """Go on from the newest checkpoint of this run directory, with the run file it keeps (or --config's)."""


@dataclass(frozen=True, slots=True)
class Up:
    """Start the three services on this machine and keep them until Ctrl-C.

    Takes the same run file and the same overrides as `ppod run`; logs go to <trainer.run_dir>/logs.
    """

    config: OptionalLaidOver = ()
    """YAML run file; given again: values that are laid over those before. Default: the packaged one for this
    machine."""


@dataclass(frozen=True, slots=True)
class TrainPpo:
    """Run the PPO trainer alone, against services that are up already.

    The file is a run file's trainer section; `services` says where they listen. Prints a line a step and, at the end,
    what changed on held-out prompts; leaves everything in `run_dir`. SIGINT and SIGTERM write a checkpoint, and
    `resume: true` goes on from it. Exit code: 0 done; 1 a failure, named; 2 the configuration is wrong; 3 stopped by
    `watch.stop`; 128 + signal.
    """

    config: LaidOver
    """YAML configuration of the trainer; given again: values that are laid over those before."""


@dataclass(frozen=True, slots=True)
class TrainReward:
    """Train a reward head on pairwise human preferences.

    Fits a scalar head on a frozen language model by the Bradley-Terry loss over pairs of rated texts, and writes it to
    `output` with a card, held-out accuracy, a margin histogram and a reliability diagram. The shipped heads' files:
        ppod train reward --config trainer/ppod_trainer/reward_training/configs/reviews-reward.yaml
        ppod train reward --config trainer/ppod_trainer/reward_training/configs/reviews-judge.yaml

    Exit code: 0 done; 1 a failure, named; 2 the configuration is wrong; 130 Ctrl-C.
    """

    config: LaidOver
    """YAML configuration of the reward training; given again: values that are laid over those before."""


@dataclass(frozen=True, slots=True)
class Train:
    """Run one training job in the foreground: `ppo` or `reward`."""

    job: tyro.conf.OmitSubcommandPrefixes[
        Annotated[TrainPpo, tyro.conf.subcommand("ppo")] | Annotated[TrainReward, tyro.conf.subcommand("reward")]
    ]


@dataclass(frozen=True, slots=True)
class Serve:
    """Run one service in the foreground, as its container does. JSON logs on stderr; SIGTERM drains it."""

    service: Positional[Literal["reward", "reference", "generation"]]
    """Which service."""

    config: LaidOver
    """YAML configuration of the service: its section of a run file; given again: values that are laid over those
    before."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How the service is reached, where not in plain text."""

    ca_file: OptionalPath = None
    """Certificates that the service's must come from; makes the connection TLS."""

    certificate_file: OptionalPath = None
    """The caller's own certificate, for mutual TLS."""

    key_file: OptionalPath = None
    """The key of that certificate."""

    server_name: str = ""
    """Name in the service's certificate; empty: the target's host."""

    plain_text_token: bool = False
    """Send the token without TLS to another machine, as inside a mesh that encrypts itself."""


@dataclass(frozen=True, slots=True)
class Score:
    """Ask a reward service for the scores of texts.

    The team's token comes from PPOD_TOKEN, or from the file that PPOD_TOKEN_FILE names. Texts come from the command
    line, or one a line from stdin:
        ppod score --target 127.0.0.1:50051 "A joy from start to end." "I want my two hours back."
    """

    texts: Positional[tuple[str, ...]] = ()
    """Texts to score; none: lines of stdin."""

    target: str = "127.0.0.1:50051"
    """host:port of the reward service; several with commas between share the work."""

    model: str = ""
    """Name of the reward model; empty: the service's first."""

    json: bool = False
    """Print one JSON object a line."""

    timeout_s: float = 60.0
    """Deadline of the call in seconds."""

    tls: Tls = field(default_factory=Tls)


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask a generation service to complete prompts.

    The team's token comes from PPOD_TOKEN, or from the file that PPOD_TOKEN_FILE names. Prompts come from the command
    line, or one a line from stdin:
        ppod generate --target 127.0.0.1:50053 "This movie was"
    """

    prompts: Positional[tuple[str, ...]] = ()
    """Prompts to complete; none: lines of stdin."""

    target: str = "127.0.0.1:50053"
    """host:port of the generation service."""

    tokenizer: str = "packaged:smollm2-135m-instruct"
    """Model whose tokenizer the service's policy uses: packaged:NAME, a directory, or a hub id. A note on stderr tells
    where it is another one."""

    max_tokens: int = 48
    """Longest completion in tokens."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""

    top_p: float = 1.0
    """Draws from the smallest set of tokens with this probability; 1 keeps all."""

    min_p: float = 0.0
    """Draws from tokens at least this likely, relative to the likeliest; 0 keeps all."""

    repetition_penalty: float = 1.0
    """Makes tokens that are there already less likely; 1 does not."""

    stop: tuple[str, ...] = ()
    """Texts that end a completion."""

    n: int = 1
    """Completions of each prompt."""

    seed: int | None = None
    """Seed of the first completion; the next ones have the next ones. Default: the service picks."""

    json: bool = False
    """Print one JSON object a line, with logprobs."""

    timeout_s: float = 120.0
    """Deadline of the call in seconds."""

    tls: Tls = field(default_factory=Tls)


AnyCommand = Run | Up | Train | Serve | Score | Generate | K8s

COMMANDS: dict[str, type[AnyCommand]] = {
    "run": Run,
    "up": Up,
    "train": Train,
    "serve": Serve,
    "score": Score,
    "generate": Generate,
    "k8s": K8s,
}

Command = (
    Annotated[Run, tyro.conf.subcommand("run", description="Train on this machine: three services and the trainer.")]
    | Annotated[Up, tyro.conf.subcommand("up", description="Start the three services alone, until Ctrl-C.")]
    | Annotated[Train, tyro.conf.subcommand("train", description="Run one training job: ppo or reward.")]
    | Annotated[Serve, tyro.conf.subcommand("serve", description="Run one service: reward, reference, generation.")]
    | Annotated[Score, tyro.conf.subcommand("score", description="Ask a reward service for scores of texts.")]
    | Annotated[Generate, tyro.conf.subcommand("generate", description="Ask a generation service for completions.")]
    | Annotated[
        K8s, tyro.conf.subcommand("k8s", description="Run on Kubernetes: up, status, train, scale, logs, down.")
    ]
)
