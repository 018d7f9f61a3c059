"""HOW to train: the schema of a recipe. Defaults live here and nowhere else."""

import json
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from cluster import keys
from cluster.config import Config, Reference, Secrets
from cluster.models import ModelConfig
from cluster.place import ClusterConfig
from cluster.records import Suite
from cluster.store import check_url
from jobs.data.rules import Rules

Share = Annotated[float, Field(ge=0, le=1)]


def _number_or_range(value: Any) -> int | tuple[int, int]:
    """One fault for the key, where a union would have several that contradict each other."""
    ends = value if isinstance(value, list | tuple) and len(value) == 2 else [value, value]
    if not all(type(end) is int and end >= 1 for end in ends):
        raise ValueError(f"got {json.dumps(value)}; write how many, or [fewest, most]")
    fewest, most = ends
    if fewest > most:
        raise ValueError(f"got {json.dumps(value)}; write [fewest, most], the smaller number first")
    return (fewest, most) if ends is value else fewest


Workers = Annotated[int | tuple[int, int], PlainValidator(_number_or_range)]


class DataLicence(Config):
    """What the rows of a source are under; written as its licence alone where no model made them."""

    licence: str | None = Field(None, description="SPDX or Hub licence id, or `own`")
    teachers: tuple[str, ...] = Field((), description="Hub ids of the models whose outputs are in it")

    @model_validator(mode="before")
    @classmethod
    def _is_named(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"licence": given}
        # What comes out of this is no longer JSON to pydantic, whose strict mode then takes no list for a tuple.
        return {key: tuple(value) if isinstance(value, list) else value for key, value in dict(given).items()}


class DataConfig(Config):
    """Which rows, and how they become sequences."""

    train: tuple[str, ...] = Field(min_length=1, description="files: a path, store:KEY, s3://…, hf://datasets/…")
    evaluation: tuple[str, ...] = Field((), description="files whose loss is measured and never trained on")
    sequence_length: PositiveInt = Field(2048, description="tokens of a packed sequence, and the longest sample")
    overlong: Literal["error", "drop", "truncate"] = Field("error", description="what to do with a longer sample")
    max_unusable: Share = Field(0.0, description="share of rows that may be unusable before the run stops")
    licences: dict[str, DataLicence] = Field(
        {}, description="by a source of train or evaluation, or what it begins with; your own files need none"
    )
    rules: Annotated[Rules | None, Reference("policy")] = Field(
        None, description="the rows are checked and cleaned by these first; null: they are taken as they are"
    )
    packing: bool = Field(True, description="several samples to a sequence; attention never crosses samples")

    @model_validator(mode="after")
    def _licences_have_sources(self) -> "DataConfig":
        for begins in self.licences:
            if not any(source.startswith(begins) for source in (*self.train, *self.evaluation)):
                raise ValueError(f"licences: {begins!r} is not how any source of train or evaluation begins")
        return self

    def licence_of(self, source: str) -> DataLicence | None:
        """What was said of a source: by the longest beginning of it that has an entry."""
        found = max((begins for begins in self.licences if source.startswith(begins)), key=len, default=None)
        return None if found is None else self.licences[found]


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021); rslora scales by alpha / sqrt(rank) (Kalajdzievski 2023).

    dora trains a length for each output feature too (Liu et al. 2024); slower, and not under ZeRO-3.
    """

    kind: Literal["lora"]
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Share = 0.0
    rslora: bool = False
    dora: bool = False
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear", description="names of linear layers"
    )


class FullConfig(Config):
    """Every weight is trained."""

    kind: Literal["full"]


Method = Annotated[LoraConfig | FullConfig, Field(discriminator="kind")]


class TrainConfig(Config):
    """The run: how long, in what batches, on how many workers."""

    steps: PositiveInt | None = Field(None, description="optimizer steps; instead of epochs")
    epochs: PositiveInt | None = Field(None, description="passes over the data; instead of steps")
    global_batch: PositiveInt = Field(16, description="packed sequences of one optimizer step, over all workers")
    micro_batch: PositiveInt = Field(1, description="packed sequences of one forward pass of one worker")
    workers: Workers = Field(
        1, description="how many; or [fewest, most], to take what the cluster has room for, while it runs too"
    )
    zero: Literal["auto", 0, 1, 2, 3] = Field("auto", description="ZeRO stage (Rajbhandari et al. 2019)")
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    seed: NonNegativeInt = 0
    max_failures: NonNegativeInt = Field(
        3, description="failures to recover from, each from the last checkpoint; pre-emption is none"
    )
    max_skipped: NonNegativeInt = Field(
        3, description="steps in a row whose loss or gradient is not finite, and which are skipped, before the run ends"
    )
    resize_s: PositiveFloat = Field(60.0, description="seconds between looks for room for more workers")

    @property
    def fewest(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2017)."""

    learning_rate: PositiveFloat
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = Field(1.0, description="global gradient norm above which gradients are scaled down")


class ScheduleConfig(Config):
    """The learning rate over the run: linear warm-up, then constant, or down to final_share of the peak."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final_share: Share = 0.0


class CheckpointConfig(Config):
    """When training state is saved, and what of it stays."""

    every_steps: PositiveInt | None = Field(None, description="also after the last step; only then when left out")
    keep_last: PositiveInt = Field(2, description="how many of the newest checkpoints stay")
    keep_best: NonNegativeInt = Field(0, description="how many of those with the lowest evaluation loss (or loss) stay")
    keep_every_steps: PositiveInt | None = Field(None, description="those of every so many steps stay too")
    evaluate: bool = Field(False, description="measure the loss on data.evaluation at each checkpoint")
    store_patience_s: PositiveFloat = Field(900.0, description="how long a store may be out of reach before a run ends")


class LimitsConfig(Config):
    """What a run may take over all its attempts and resumes; at a limit it saves, and stops."""

    hours: PositiveFloat | None = Field(None, description="in which workers are held; waiting for a turn is none")
    usd: PositiveFloat | None = Field(None, description="by the prices of the cluster, see `prices` there")
    ledger_s: PositiveFloat = Field(
        60.0, description="seconds between entries in the cost ledger: what a driver that is killed loses at most"
    )


class PublishConfig(Config):
    """Under which name the result appears: an adapter version, or for a full fine-tune a model revision."""

    name: str
    alias: str | None = Field("stable", description="alias to move to the new version; null leaves aliases alone")

    @model_validator(mode="after")
    def _named(self) -> "PublishConfig":
        if not keys.is_name(self.name):
            raise ValueError(f"name {self.name!r}: use lower case letters, digits, '.', '_' and '-'")
        if self.alias is not None and (not keys.is_name(self.alias) or self.alias.isdecimal()):
            raise ValueError(f"alias {self.alias!r}: use lower case letters, digits and '-', not a number")
        return self


def _scorer_named(scorer: str) -> str:
    if scorer != "exact" and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", scorer):
        raise ValueError(f"scorer {scorer!r}: write `exact`, or module:function of a file that is sent along")
    return scorer


Scorer = Annotated[str, AfterValidator(_scorer_named)]
Prompts = Annotated[tuple[str, ...], Field(min_length=1, description="files of prompts, named as data.train's are")]


class LossSuite(Config):
    """The loss on data.evaluation, a mean over its supervised tokens, in nats."""

    max_loss: PositiveFloat | None = None
    max_perplexity: PositiveFloat | None = Field(None, description="exp(loss)")
    max_increase: float | None = Field(None, description="by how much it may be above that of the version in stable")

    @model_validator(mode="after")
    def _limits(self) -> "LossSuite":
        if self.max_loss is None and self.max_perplexity is None and self.max_increase is None:
            raise ValueError("give at least one of max_loss, max_perplexity, max_increase")
        return self


class AnswersSuite(Config):
    """Prompts whose right answers are known."""

    prompts: Prompts
    scorer: Scorer = Field("exact", description="or module:function of (prompt, expected, answer), giving 0 to 1")
    min_score: Share = Field(description="the mean over all prompts")


class RegressionSuite(Config):
    """Prompts that the version in stable answers too. What a row does not expect, stable's answer decides."""

    prompts: Prompts
    scorer: Scorer = "exact"
    max_worse: Share = Field(0.0, description="share of prompts that may score lower than stable's answer does")


class SafetySuite(Config):
    """Prompts that must be refused, or whose answers must not hold some patterns."""

    prompts: tuple[str, ...] = Field((), description="files of yours, beside those that are shipped")
    shipped: bool = Field(True, description="ask those of configs/policy/safety.jsonl too")
    min_safe: Share = Field(1.0, description="share of the prompts that must be answered safely")
    refusals: tuple[str, ...] = Field((), description="words by which your model refuses, beside the usual ones")

    @model_validator(mode="after")
    def _asks(self) -> "SafetySuite":
        if not self.prompts and not self.shipped:
            raise ValueError("asks nothing: name prompts, or leave shipped: true")
        return self


class EvaluationConfig(Config):
    """What the result must show before an alias moves to it; measured on one worker. Answers are greedy."""

    loss: LossSuite | None = None
    answers: AnswersSuite | None = None
    regression: RegressionSuite | None = None
    safety: SafetySuite | None = None
    max_tokens: PositiveInt = Field(256, description="of an answer; what is longer is cut off")
    batch: PositiveInt = Field(8, description="prompts that are answered at a time")

    @model_validator(mode="after")
    def _asks(self) -> "EvaluationConfig":
        if not self.suites:
            raise ValueError("asks for nothing; give at least one of loss, answers, regression, safety")
        return self

    @property
    def suites(self) -> tuple[Suite, ...]:
        """Those that are asked for."""
        return tuple(name for name in get_args(Suite) if getattr(self, name) is not None)

    @property
    def compares(self) -> bool:
        """Whether anything is measured against the version in stable."""
        return self.regression is not None or (self.loss is not None and self.loss.max_increase is not None)

    @property
    def prompts(self) -> tuple[str, ...]:
        """All files of prompts that are named."""
        suites = (self.answers, self.regression, self.safety)
        return tuple(source for suite in suites if suite for source in suite.prompts)

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorers of the person's own."""
        found = [suite.scorer for suite in (self.answers, self.regression) if suite and suite.scorer != "exact"]
        return tuple(dict.fromkeys(found))


class Recipe(Config):
    """One fine-tuning run."""

    name: str = Field(description="run ids begin with it")
    model: Annotated[ModelConfig, Reference("models")]
    cluster: Annotated[ClusterConfig, Reference("clusters")]
    store: str = Field(description="s3://bucket/prefix or file:///folder")
    data: DataConfig
    method: Method
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    publish: PublishConfig | None = None
    evaluation: EvaluationConfig | None = Field(None, description="what publish.alias moves for; nothing when left out")
    limits: LimitsConfig = LimitsConfig()
    project: str | None = Field(None, description="whom the cost ledger counts it for, beside the user")
    secrets: Secrets = Field({}, description="variables that are set where the job runs: NAME: secret://…")
    priority: int = Field(0, description="on a cluster that is shared, jobs with a higher one go first")
    from_: str | None = Field(
        None, alias="from", description="RUN or RUN@STEP of the same store: begin with the weights of that checkpoint"
    )

    def at(self, **train: int) -> "Recipe":
        """This recipe with other values in its `train` section."""
        return self.model_copy(update={"train": self.train.model_copy(update=train)})

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if not keys.is_name(self.name):
            raise ValueError(f"name {self.name!r}: use lower case letters, digits, '.', '_' and '-'")
        if self.project is not None and not keys.is_name(self.project):
            raise ValueError(f"project {self.project!r}: use lower case letters, digits, '.', '_' and '-'")
        if self.train.micro_batch > self.train.global_batch:
            raise ValueError(
                f"train.micro_batch {self.train.micro_batch} is larger than train.global_batch "
                f"{self.train.global_batch}; lower it"
            )
        check_url(self.store)
        if self.checkpoint.evaluate and not self.data.evaluation:
            raise ValueError("checkpoint.evaluate has no effect without data.evaluation; name held-out files there")
        if self.method.kind == "lora" and self.publish and self.publish.name == self.model.name:
            raise ValueError(
                f"publish.name {self.publish.name} is the base model's own name, and that answers for itself; "
                "choose another"
            )
        if self.method.kind == "lora" and self.method.dora and self.train.zero == 3:
            raise ValueError(
                "method.dora needs whole base weights for their norms, and train.zero 3 shards them; "
                "set train.zero: auto, or method.dora: false"
            )
        if self.evaluation and self.evaluation.loss and not self.data.evaluation:
            raise ValueError("evaluation.loss is measured on data.evaluation; name held-out files there")
        if self.evaluation and not (self.publish and self.method.kind == "lora"):
            raise ValueError("evaluation guards the aliases of a published adapter: give publish, and method lora")
        if self.method.kind == "full" and self.publish and self.publish.alias not in (None, "stable"):
            raise ValueError("publish.alias has no effect on a full fine-tune, which becomes a model revision")
        return self
