"""Configuration of the trainer. Importing it needs neither torch nor a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ClientTlsConfig, ConfigModel, ModelConfig, TracingConfig

Target = str


def has_replicas(target: Target) -> bool:
    """Whether a target may be more than one server."""
    return "," in target or target.startswith("dns:")


class ServicesConfig(ConfigModel):
    """Where the services listen, as gRPC targets `host:port`.

    Replicas share each step's work: `a:1,b:2`, or for reward and reference `dns:///host:port`, every address of a
    headless service. Every replica of generation needs its address in generation_admin. The team's token comes from
    PPOD_TOKEN, or from the file that PPOD_TOKEN_FILE names.
    """

    reward: Target = "127.0.0.1:50051"
    reference: Target = "127.0.0.1:50052"
    generation: Target = "127.0.0.1:50053"
    reference_admin: Target = Field(default="127.0.0.1:50062", description="port on which the reference takes weights")
    generation_admin: Target = Field(
        default="127.0.0.1:50063", description="ports on which the replicas of generation take weights"
    )
    reward_model: str = Field(default="", description="name of the reward model; empty: the service's first")
    judge_model: str | None = Field(default=None, description="name of the held-out judge; none: no judge")
    timeout_s: float = Field(default=120.0, gt=0, description="deadline of each call")
    ready_timeout_s: float = Field(default=120.0, gt=0, description="how long to wait for the services at the start")
    tls: ClientTlsConfig | None = Field(default=None, description="none: plain text")
    plain_text_token: bool = Field(
        default=False, description="send the token without TLS to other machines, as inside a mesh that encrypts itself"
    )

    @property
    def generation_admins(self) -> list[str]:
        """One administration port for each replica of generation."""
        return [one.strip() for one in self.generation_admin.split(",")]

    @model_validator(mode="after")
    def _weights_reach_all(self) -> Self:
        if has_replicas(self.reference_admin):
            raise ValueError(
                f"reference_admin is {self.reference_admin!r}: its weights are pushed to one server, so it must be one "
                "host:port"
            )
        for key in ("generation", "generation_admin"):
            target: Target = getattr(self, key)
            if target.startswith("dns:"):
                raise ValueError(f"{key} is {target!r}: weights are pushed to each server, so list every host:port")
        replicas, admins = self.generation.count(",") + 1, len(self.generation_admins)
        if replicas != admins:
            raise ValueError(
                f"generation lists {replicas} and generation_admin {admins} addresses: every replica must get weights"
            )
        return self


class WeightTransferConfig(ConfigModel):
    """How new weights reach generation; services/ppod_services/README.md tells which to take when."""

    plane: Literal["grpc", "shared"] = Field(
        default="grpc", description="grpc: a stream of chunks, works everywhere; shared: files that both sides see"
    )
    directory: Path | None = Field(
        default=None,
        description="shared: where files are written, at the same path for the services, which allow it by "
        "weights.shared_directories; /dev/shm/... on one host, else a volume",
    )
    encoding: Literal["full", "delta"] = Field(
        default="full", description="delta: only elements that changed since the last version, exactly"
    )
    relay: Literal["none", "chain", "tree"] = Field(
        default="none",
        description="how several replicas get them: each from the trainer, or from each other, which they allow by "
        "weights.relay_targets",
    )
    relay_fanout: int = Field(default=2, ge=2, le=64, description="tree: servers that one server sends to")
    pause: Literal["wait", "keep", "abort"] = Field(
        default="wait", description="what a commit does about running sequences; see WeightPause in weights.proto"
    )
    lost_replicas: Literal["stop", "skip"] = Field(
        default="stop", description="what a replica that did not get its weights does to the run, while others did"
    )

    @model_validator(mode="after")
    def _directory_is_used(self) -> Self:
        if (self.plane == "shared") != (self.directory is not None):
            raise ValueError(
                f"plane is {self.plane!r}, directory {str(self.directory)!r}: give one for shared, else none"
            )
        if self.directory is not None and not self.directory.is_absolute():
            raise ValueError(f"directory is {str(self.directory)!r}: it must be absolute, the services open it too")
        return self


class PromptsConfig(ConfigModel):
    """Prompts: the first tokens of texts."""

    path: Path | None = Field(
        default=None,
        description=".tsv with a `text` column, .jsonl with a `prompt` field, or .txt; none: movie reviews",
    )
    first_tokens: int | None = Field(default=6, ge=1, description="tokens kept of each text; none: all")
    heldout: int = Field(default=64, ge=1, description="prompts kept aside for evaluation")


class RolloutConfig(ConfigModel):
    """How samples are drawn. top-p and top-k are refused in training: the old policy's support would differ."""

    batch_size: int = Field(default=32, ge=1, description="samples in a step")
    max_tokens: int = Field(default=24, ge=1, description="longest response")
    temperature: float = Field(default=1.0, gt=0, description="divides sampler, policy and reference logits alike")
    top_p: float = Field(default=1.0, description="must be 1 in training")
    top_k: int = Field(default=0, description="must be 0 in training")
    on_bad_sample: Literal["stop", "skip"] = Field(
        default="stop", description="what a typed error that names a sample does: stop the run, or drop the sample"
    )

    @model_validator(mode="after")
    def _refuse_cut_support(self) -> Self:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                "top_p must be 1 and top_k 0 in training: the sampler would draw from a smaller support than the "
                "trainer's and the reference's logprobs are computed on"
            )
        return self


class RewardsConfig(ConfigModel):
    """From the reward model's score to token rewards."""

    clip: float | None = Field(default=None, gt=0, description="bounds the score to [-clip, clip]")
    missing_eos_penalty: float = Field(default=0.0, ge=0, description="taken off the score of a response cut off")
    mask_truncated: bool = Field(default=False, description="leave responses that were cut off out of the loss")


class AdaptiveKlConfig(ConfigModel):
    """Proportional controller of Ziegler et al. 2019, section 2.2."""

    target: float = Field(default=6.0, gt=0, description="KL to the reference to steer to, nats a response")
    horizon: int = Field(default=10_000, ge=1, description="samples over which the coefficient adapts")


class KlConfig(ConfigModel):
    """KL penalty to the reference."""

    coefficient: float = Field(default=0.05, ge=0, description="starting, or fixed, coefficient")
    placement: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3"] = "k1"
    adaptive: AdaptiveKlConfig | None = None

    @model_validator(mode="after")
    def _refuse_k1_loss(self) -> Self:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError("estimator k1 in the loss has a gradient of mean zero; use k2 (KL's gradient) or k3")
        return self


class AdvantagesConfig(ConfigModel):
    """How advantages come from rewards and values."""

    kind: Literal["gae", "sequence"] = Field(
        default="gae", description="sequence: A = R - V(s), the same for all tokens"
    )
    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of GAE")
    whiten: bool = Field(default=True, description="mean 0 and variance 1 over the batch's response tokens")
    bootstrap_truncated: bool = Field(
        default=False, description="a response cut off continues with V(next state); its score is still paid"
    )


class PpoConfig(ConfigModel):
    """The clipped update."""

    epochs: int = Field(default=2, ge=1)
    minibatches: int = Field(default=2, ge=1, description="optimizer steps in an epoch")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="samples in a forward pass; gradients accumulate; none: the minibatch"
    )
    clip: float = Field(default=0.2, gt=0, description="epsilon of the policy ratio")
    value_clip: float | None = Field(
        default=0.2, gt=0, description="bound on the move from the old value; none: no clip"
    )
    value_coefficient: float = Field(default=0.1, ge=0)
    entropy_coefficient: float = Field(default=0.0, ge=0)
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    max_grad_norm: float = Field(default=1.0, gt=0)
    stop_kl: float | None = Field(
        default=None, gt=0, description="end the step's update when KL(old, new) exceeds this, nats a token"
    )
    importance_cap: float | None = Field(
        default=None, gt=0, description="truncated importance sampling of the sampler's mismatch; none: off"
    )


class OptimizerConfig(ConfigModel):
    """Adam with linear warm-up and linear decay."""

    learning_rate: float = Field(default=2e-5, gt=0)
    value_learning_rate: float | None = Field(default=None, gt=0, description="of the value head; none: the same")
    warmup_steps: int = Field(default=0, ge=0)
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="learning rate at the end, of the peak's")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class EvaluationConfig(ConfigModel):
    """Evaluation on the held-out prompts, with fixed seeds, before, during and after training."""

    interval: int | None = Field(default=None, ge=1, description="steps between evaluations; none: before and after")
    judge_interval: int = Field(default=5, ge=1, description="steps between judgements of the training samples")
    shown_samples: int = Field(default=3, ge=0)


class CheckpointConfig(ConfigModel):
    """Checkpoints, beside those at the end and on SIGTERM."""

    interval: int | None = Field(default=None, ge=1, description="steps between checkpoints; none: only at the end")
    keep: int = Field(default=1, ge=1)


class MetricsConfig(ConfigModel):
    """Where metrics go, beside metrics.jsonl."""

    port: int | None = Field(default=9104, ge=1, le=65535, description="Prometheus port; none: no exporter")
    host: str = "127.0.0.1"
    tensorboard: bool = True


class TrainerConfig(ConfigModel):
    """One PPO run."""

    run_dir: Path = Path("runs/ppo")
    resume: bool = Field(default=False, description="go on from the newest checkpoint of run_dir")
    seed: int = Field(default=0, ge=0, lt=2**32)
    steps: int = Field(default=30, ge=1)
    policy: ModelConfig = ModelConfig(source="packaged:smollm2-135m-instruct")
    services: ServicesConfig = ServicesConfig()
    weight_transfer: WeightTransferConfig = WeightTransferConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    kl: KlConfig = KlConfig()
    advantages: AdvantagesConfig = AdvantagesConfig()
    ppo: PpoConfig = PpoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    reference_refresh_steps: int | None = Field(
        default=None, ge=1, description="steps after which the reference becomes the policy; none: never"
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()

    @model_validator(mode="after")
    def _refresh_reaches_all(self) -> Self:
        if self.reference_refresh_steps is not None and has_replicas(self.services.reference):
            raise ValueError(
                f"services.reference is {self.services.reference!r}: a reference that is refreshed must be one server"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_splits(self) -> Self:
        if self.ppo.minibatches > self.rollout.batch_size:
            raise ValueError(
                f"ppo.minibatches is {self.ppo.minibatches}, more than rollout.batch_size, {self.rollout.batch_size}"
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; steps, {self.steps}, must be more"
            )
        return self
