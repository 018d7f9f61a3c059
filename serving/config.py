"""WHAT is served and how: the schema of `configs/serving/NAME.yaml`. Defaults live here and nowhere else."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from cluster import keys
from cluster.config import Config, Reference, Secrets
from cluster.models import ModelConfig
from serving.engine.protocol import Quantization

Port = Annotated[int, Field(ge=1, le=65535)]


class _EngineLimits(Config):
    """What bounds the batches and the adapters of each replica's engine, whichever it is."""

    max_adapters: PositiveInt = Field(16, description="adapters in the engine at once; others replace idle ones")
    max_rank: PositiveInt = Field(64, description="largest LoRA rank that is accepted")
    max_batch_tokens: PositiveInt = Field(512, description="tokens of one forward pass; long prompts come in chunks")
    max_running: PositiveInt = Field(64, description="sequences that generate at once")
    max_waiting: PositiveInt = Field(256, description="sequences that wait in the engine before it answers 429")
    prefix_cache: bool = Field(
        True, description="prompts that begin alike are computed once for each adapter, while there is memory"
    )
    max_context: PositiveInt | None = Field(None, description="prompt and answer, in tokens; not set: the model's own")
    default_max_tokens: PositiveInt = Field(
        1024, description="answer length of a chat request that gives none; memory is reserved for all of it"
    )
    threads: PositiveInt = Field(1, description="torch threads of a replica")

    @model_validator(mode="before")
    @classmethod
    def _is_named(cls, given: Any) -> Any:
        """`engine: vllm` is short for `engine: {kind: vllm}`."""
        return {"kind": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_running > self.max_batch_tokens:
            raise ValueError(
                f"max_running {self.max_running} is more than max_batch_tokens {self.max_batch_tokens}: "
                "each running sequence takes one token of a forward pass"
            )
        return self


class EngineConfig(_EngineLimits):
    """The native engine, in the replica's own process."""

    kind: Literal["native"] = "native"
    quantization: Quantization | None = Field(
        None,
        description="the base's linear layers in 8 bits (int8) or 4 (nf4) as they are loaded; not set: in model.dtype",
    )
    kv_tokens: Annotated[int, Field(ge=64)] = Field(
        16384, description="tokens that all running sequences hold together"
    )
    adapter_bytes: PositiveInt | None = Field(
        None, description="memory that adapters take in the engine at most; not set: as much as max_adapters need"
    )

    @property
    def max_sequence_tokens(self) -> int:
        """What one sequence can hold as far as the engine goes."""
        return min(self.kv_tokens, self.max_context or self.kv_tokens)


class VllmConfig(_EngineLimits):
    """vLLM, in a process and an environment of its own on the replica's node (`scripts/setup-vllm` makes one)."""

    kind: Literal["vllm"] = "vllm"
    max_rank: Annotated[int, Field(ge=1, le=512)] = Field(64, description="largest LoRA rank that is accepted")
    python: str | None = Field(
        None, description="its environment's interpreter, on each node; not set: LUTHIER_VLLM_PYTHON, or .venv-vllm"
    )
    kv_bytes: PositiveInt | None = Field(
        None, description="memory for keys and values; not set: 4 GiB on a CPU, what is left of it on a GPU"
    )
    start_timeout_s: PositiveFloat = Field(1800.0, description="how long it may take to load, compile and answer")
    arguments: str = Field("", description="more of vLLM's own arguments, written as in a shell")

    @model_validator(mode="before")
    @classmethod
    def _quantizes_by_itself(cls, given: Any) -> Any:
        if isinstance(given, dict) and "quantization" in given:
            raise ValueError(
                "quantization is the native engine's; vLLM has its own, for example "
                "arguments: --quantization bitsandbytes"
            )
        return given

    @field_validator("arguments")
    @classmethod
    def _runs_no_code(cls, arguments: str) -> str:
        if "trust" in arguments.lower():  # --trust-remote-code and its spellings, in a JSON argument too
            raise ValueError("no code that a model brings is ever run; leave out --trust-remote-code")
        return arguments

    @property
    def max_sequence_tokens(self) -> int | None:
        """What one sequence can hold as far as the engine goes."""
        return self.max_context


def _engine_kind(given: Any) -> str | None:
    """Which engine a section is for: it says so, or is nothing but the name; else it is the native one."""
    if isinstance(given, str):
        return given
    return given.get("kind", "native") if isinstance(given, dict) else getattr(given, "kind", None)


class ReplicaConfig(Config):
    """How many replicas, when to add one, and what each takes of a node."""

    min: NonNegativeInt = Field(1, description="replicas kept even when idle; 0 scales to zero")
    max: PositiveInt = Field(1, description="replicas at most")
    target_ttft_s: PositiveFloat = Field(
        2.0,
        description="time to a first token that autoscaling aims at; a long prompt's own computing comes on top",
    )
    catch_up_s: PositiveFloat = Field(
        30.0, description="in what time added replicas shall work off a queue; about what one takes to start"
    )
    max_ongoing: PositiveInt = Field(
        128, description="requests in a replica, which takes them in fair turns; further ones queue in front of it"
    )
    max_queued: PositiveInt = Field(256, description="requests that queue in front of the replicas before 429")
    downscale_delay_s: NonNegativeFloat = Field(
        300.0, description="how long fewer replicas must have been enough before one is removed"
    )
    drain_timeout_s: PositiveFloat = Field(600.0, description="how long a leaving replica may finish its streams")
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = Field(
        100, description="replicas that an update starts before it stops old ones; 0 where there is no room for more"
    )
    cpus: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for a replica")
    gpus: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves for a replica")

    @model_validator(mode="after")
    def _ordered(self) -> "ReplicaConfig":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class HttpConfig(Config):
    """The HTTP side. Host and port belong to Ray Serve, so all applications of a cluster share them."""

    host: str = Field("127.0.0.1", description="address to listen on; there is no authentication yet, keep it private")
    port: Port = Field(8000, description="TCP port")
    ingresses: PositiveInt = Field(1, description="processes that parse and stream")
    cpus: NonNegativeFloat = Field(0.0, description="CPUs that Ray reserves for each of them")


class AdaptersConfig(Config):
    """Where adapters come from and how fresh their names are."""

    alias_refresh_s: PositiveFloat = Field(2.0, description="a moved alias, and a new name, are live within this time")
    disk_max_bytes: PositiveInt = Field(20 * 2**30, description="downloaded adapters kept on a node; oldest use goes")
    retry_failed_s: NonNegativeFloat = Field(
        30.0, description="how long an adapter that could not be loaded, by its own fault, is refused without trying"
    )
    weights: dict[str, PositiveFloat] = Field(
        {}, description="by name, how much of a full engine an adapter (or the base) gets beside others; else 1"
    )
    load_ahead: bool = Field(
        True, description="a new replica loads, into places that are free, what others are asked for and what is stable"
    )
    pinned: tuple[str, ...] = Field(
        (), description="adapters (NAME, NAME@ALIAS, NAME@VERSION) that every replica loads at once and never evicts"
    )


class ServingConfig(Config):
    """One base model with its adapters behind one HTTP endpoint."""

    name: str = Field(description="of the Serve application; deploying the same name again updates it")
    model: Annotated[ModelConfig, Reference("models")]
    store: str = Field(description="s3://bucket/prefix or file:///folder, where adapters are published")
    engine: Annotated[
        Annotated[EngineConfig, Tag("native")] | Annotated[VllmConfig, Tag("vllm")],
        Discriminator(
            _engine_kind,
            custom_error_type="engine_kind",
            custom_error_message="write native or vllm, or a section whose kind is one of them",
        ),
    ] = EngineConfig()
    replicas: ReplicaConfig = ReplicaConfig()
    http: HttpConfig = HttpConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    secrets: Secrets = Field({}, description="variables that are set in each replica and ingress: NAME: secret://…")

    @property
    def quantization(self) -> Quantization | None:
        """How the weights that answer differ from those of the base's revision."""
        return self.engine.quantization if self.engine.kind == "native" else None

    @model_validator(mode="after")
    def _check(self) -> "ServingConfig":
        if not keys.is_name(self.name):
            raise ValueError(f"name {self.name!r}: use lower case letters, digits, '.', '_' and '-'")
        if self.adapters.weights and self.engine.kind != "native":
            raise ValueError("adapters.weights is the native engine's; vLLM takes requests as they come")
        if unknown := [name for name in self.adapters.weights if not keys.is_name(name) and name != self.model.name]:
            raise ValueError(f"adapters.weights: {unknown[0]!r} is no adapter's name; a weight is for all its versions")
        if len(self.adapters.pinned) >= self.engine.max_adapters:
            raise ValueError(
                f"{len(self.adapters.pinned)} adapters are pinned of engine.max_adapters {self.engine.max_adapters}; "
                "leave at least one place for the others"
            )
        return self
