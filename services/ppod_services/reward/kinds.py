"""Configuration of each kind of reward. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from ppod.client.replicas import parse_target
from ppod.errors import InvalidArgument
from ppod_models.configuration import ClientTlsConfig, ConfigModel, ModelConfig, check_url
from ppod_services.reward.functions.registry import FUNCTIONS

KINDS = ("head", "sequence_classification", "token_classification", "function", "judge", "ensemble", "sum")


def _tagger(kinds: tuple[str, ...], default: str) -> Callable[[object], str | None]:
    """Reads the tag of a section off its key `kind`; tags begin with "kind=", which paths of faults leave out."""

    def tag_of(value: object) -> str | None:
        if isinstance(value, BaseModel):
            kind: object = getattr(value, "kind", None)
        elif isinstance(value, Mapping):
            kind = cast(Mapping[str, object], value).get("kind", default)
        else:
            return None
        return f"kind={kind}" if kind in kinds else None

    return tag_of


class NormalizationConfig(ConfigModel):
    """What puts raw scores on a common scale: (raw - mean) / std has mean 0 and deviation 1 on reference samples."""

    mean: float = Field(description="mean of the raw scores of the reference samples")
    std: float = Field(gt=0, description="their standard deviation")


class ClipConfig(ConfigModel):
    """Bounds of a score, after normalisation."""

    low: float | None = Field(default=None, description="lowest score; none: not clipped below")
    high: float | None = Field(default=None, description="highest score; none: not clipped above")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("give low, high or both")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low must be below high, found {self.low} and {self.high}")
        return self


class StepsConfig(ConfigModel):
    """What ends a step of a response."""

    separator: str = Field(default="\n", min_length=1, description="text that ends a step and belongs to it")


class NamedReward(ConfigModel):
    """What every kind of reward has."""

    name: str = Field(min_length=1, description="what requests call the reward")
    normalization: NormalizationConfig | None = Field(default=None, description="none: scores stay raw")
    clip: ClipConfig | None = Field(default=None, description="none: scores are not clipped")
    steps: StepsConfig = StepsConfig()


class PretrainedReward(NamedReward):
    """What every reward with a model in this process has."""

    model: ModelConfig


class HeadConfig(PretrainedReward):
    """A trunk and a linear head on it, as `ppod train reward` makes them."""

    kind: Literal["head"] = "head"
    head: str = Field(min_length=1, description="name of a head that ppod carries, or the directory of one")


class ClassifierReward(PretrainedReward):
    """A model that transformers loads whole, with its own scoring layer."""

    allow_remote_code: tuple[str, ...] = Field(
        default=(), description="sources whose own Python code may run; model.source must be named here word for word"
    )


class SequenceClassificationConfig(ClassifierReward):
    """A reward model of transformers: AutoModelForSequenceClassification with one label."""

    kind: Literal["sequence_classification"]


class TokenClassificationConfig(ClassifierReward):
    """A process reward model of transformers: AutoModelForTokenClassification with two labels, as TRL saves it."""

    kind: Literal["token_classification"]
    reduce: Literal["min", "product", "last", "mean"] = Field(
        default="min", description="how the probabilities of the steps become the score of the sequence"
    )


class FunctionConfig(NamedReward):
    """A Python function of the entry point group `ppod.rewards`."""

    kind: Literal["function"]
    function: str = Field(min_length=1, description="name of the entry point")
    parameters: Mapping[str, object] = Field(default={}, description="what the function takes; it checks them itself")
    timeout_s: float = Field(default=5.0, gt=0, le=3_600, description="longest time for one text; then it is stopped")
    workers: int = Field(default=1, ge=1, le=256, description="processes that run the function")
    max_waiting: int = Field(
        default=65_536, ge=1, description="most texts that wait; beyond it callers come back later"
    )

    @model_validator(mode="after")
    def _takes_the_parameters(self) -> Self:
        FUNCTIONS.parse(self.function, self.parameters)
        return self


class ScaleConfig(ConfigModel):
    """The numbers that a judge may give."""

    low: float = Field(default=1.0, description="the worst")
    high: float = Field(default=10.0, description="the best")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, found {self.low} and {self.high}")
        return self


class RubricConfig(ConfigModel):
    """What a judge goes by."""

    criteria: str = Field(min_length=1, description="what makes a response good, in words")
    scale: ScaleConfig = ScaleConfig()
    principles: tuple[str, ...] = Field(
        default=(), description="constitutional principles that the response must respect (Bai et al. 2022)"
    )


class OpenAiServerConfig(ConfigModel):
    """Any server with OpenAI's chat completions."""

    kind: Literal["openai"] = "openai"
    base_url: Annotated[str, AfterValidator(check_url)] = Field(description="such as http://127.0.0.1:8000/v1")
    model: str = Field(min_length=1, description="the model to ask for")
    api_key_env: str | None = Field(
        default=None, min_length=1, description="environment variable that holds the key; none: the server needs no key"
    )


class PpodServerConfig(ConfigModel):
    """A generation service of ppod."""

    kind: Literal["ppod"]
    target: str = Field(min_length=1, description="its address, host:port")
    tokenizer: str = Field(min_length=1, description="source of its model's tokenizer, which needs a chat template")
    token_env: str | None = Field(
        default=None, min_length=1, description="environment variable that holds the team's token; none: anonymous"
    )
    tls: ClientTlsConfig | None = Field(default=None, description="none: plain text")
    plain_text_token: bool = Field(default=False, description="send the token without TLS to other machines, too")

    @field_validator("target")
    @classmethod
    def _leads_somewhere(cls, target: str) -> str:
        try:
            parse_target(target)
        except InvalidArgument as error:
            raise ValueError(f"expected {error.expected}") from error
        return target


JudgeServerConfig = Annotated[
    Annotated[OpenAiServerConfig, Tag("kind=openai")] | Annotated[PpodServerConfig, Tag("kind=ppod")],
    Discriminator(
        _tagger(("openai", "ppod"), "openai"),
        custom_error_type="judge_server",
        custom_error_message="expected a mapping whose kind is openai or ppod",
    ),
]


class JudgeConfig(NamedReward):
    """A language model that scores by a rubric (RLAIF)."""

    kind: Literal["judge"]
    rubric: RubricConfig
    server: JudgeServerConfig
    attempts: int = Field(default=3, ge=1, le=10, description="questions at most, until a reply holds a valid score")
    concurrency: int = Field(default=8, ge=1, le=1_024, description="questions under way at a time")
    timeout_s: float = Field(default=60.0, gt=0, le=3_600, description="longest wait for one reply")
    max_tokens: int = Field(
        default=512, ge=8, le=32_768, description="longest reply, what a model that reasons thinks included"
    )
    temperature: float = Field(
        default=0.0,
        ge=0,
        le=2,
        description="0 is greedy, which makes repeated scores equal; servers that take none have their own",
    )
    max_waiting: int = Field(default=4_096, ge=1, description="most texts that wait; beyond it callers come back later")


class EnsembleConfig(NamedReward):
    """Rewards that estimate the same thing; the score is mean - pessimism * std (Coste et al. 2023)."""

    kind: Literal["ensemble"]
    members: tuple[str, ...] = Field(min_length=2, description="names of rewards of this service")
    pessimism: float = Field(default=0.0, ge=0, description="k of mean - k * std; 0 is the plain mean")


class TermConfig(ConfigModel):
    """One term of a sum."""

    reward: str = Field(min_length=1, description="name of a reward of this service")
    weight: float = Field(default=1.0, description="its factor")


class SumConfig(NamedReward):
    """A weighted sum of rewards."""

    kind: Literal["sum"]
    terms: tuple[TermConfig, ...] = Field(min_length=1, description="what is added up")


ModelRewardConfig = HeadConfig | SequenceClassificationConfig | TokenClassificationConfig


RewardConfig = Annotated[
    Annotated[HeadConfig, Tag("kind=head")]
    | Annotated[SequenceClassificationConfig, Tag("kind=sequence_classification")]
    | Annotated[TokenClassificationConfig, Tag("kind=token_classification")]
    | Annotated[FunctionConfig, Tag("kind=function")]
    | Annotated[JudgeConfig, Tag("kind=judge")]
    | Annotated[EnsembleConfig, Tag("kind=ensemble")]
    | Annotated[SumConfig, Tag("kind=sum")],
    Discriminator(
        _tagger(KINDS, "head"),
        custom_error_type="reward_kind",
        custom_error_message=f"expected a mapping whose kind is one of {', '.join(KINDS)}",
    ),
]
