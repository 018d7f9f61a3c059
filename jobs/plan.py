"""What a run would do and take, from the recipe and the model's shape alone: no torch, no cluster, no network.

    make_plan   the gate that driver, submit and every attempt pass: batch, ZeRO stage, memory; refuses what cannot fit
    Survey      the same for a person, whether it fits or not, with work, time, money, and what would make it fit

Both describe what the trainer does and nothing else: `train.zero: auto` is the one choice that is made here, and jobs/
attempts.py takes it from here. There is no offload, and micro-batch and checkpointing are as the recipe says.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import PlanError
from cluster.gpus import find_gpu
from cluster.licences.chain import Judgement
from cluster.licences.gate import Gate
from cluster.models import ModelConfig, Shape, read_shape
from jobs import cost, limits, terms
from jobs.config import LoraConfig, Recipe
from jobs.memory import GIB, GPU_CONTEXT_BYTES, RUNTIME_BYTES, Memory, peak, snapshot_bytes
from jobs.tensors import is_dora, trained_parameters

MOST_ADVISED_WORKERS = 512


@dataclass(frozen=True)
class Plan:
    """What will be done. Memory in bytes, of one worker; `parameters` are the base model's."""

    workers: int
    zero: int
    zero_reason: str
    global_batch: int
    micro_batch: int
    micro_batches_per_step: int
    tokens_per_step: int
    parameters: int
    trained_parameters: int
    memory: Memory
    memory_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.memory.total

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.memory_bytes


@dataclass(frozen=True)
class Advice:
    """Overrides with which the same recipe fits, and what a worker then needs."""

    overrides: tuple[str, ...]
    total_bytes: int

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)} ({self.total_bytes / GIB:.1f} GiB)"


@dataclass(frozen=True)
class Survey:
    """All that can be said of a recipe before anything is spent.

    Attributes:
        at_most: the plan for the most workers, where that is another number.
        advice: what makes it fit, when it does not; each was planned, and fits.
        refused: the limits that even the least which it can take is above, or that it has no room to be evaluated.
        licences: the verdict on each use that the organisation's policy means.
    """

    recipe: Recipe
    plan: Plan
    at_most: Plan | None
    work: cost.Work
    cost: cost.Cost
    advice: tuple[Advice, ...]
    refused: tuple[str, ...]
    licences: tuple[Judgement, ...]

    @classmethod
    def of(cls, recipe: Recipe, shape: Shape, folder: Path, gate: Gate) -> "Survey":
        """Survey a recipe whose data files count from `folder`. Raises PlanError for an unknown GPU type."""
        plan = best_plan(recipe, shape)
        is_gpu = recipe.cluster.accelerator == "gpu"
        host = RUNTIME_BYTES + snapshot_bytes(recipe, plan.trained_parameters) if is_gpu else None
        work = cost.estimate_work(recipe, folder)
        most = recipe.train.most
        found = cost.estimate_cost(recipe, shape, work, host)
        return cls(
            recipe=recipe,
            plan=plan,
            at_most=best_plan(recipe.at(workers=most), shape) if most > recipe.train.fewest else None,
            work=work,
            cost=found,
            advice=() if plan.fits else tuple(advise(recipe, shape)),
            refused=tuple(filter(None, [*limits.above(recipe, found), evaluation_refusal(recipe, shape)])),
            licences=terms.judge(recipe, gate),
        )

    def to_dict(self) -> dict[str, object]:
        """For scripts; ranges as {"low", "high"}, null where nothing is known."""
        plan = {**asdict(self.plan), "total_bytes": self.plan.total_bytes, "fits": self.plan.fits}
        return {
            **plan,
            "model": self.recipe.model.name,
            "method": self.recipe.method.kind,
            "cluster": self.recipe.cluster.name,
            "licence": self._licence(),
            "at_most": asdict(self.at_most) if self.at_most else None,
            "work": asdict(self.work),
            "cost": asdict(self.cost),
            "advice": [asdict(each) for each in self.advice],
            "limits": {**self.recipe.limits.model_dump(include={"hours", "usd"}), "refused": list(self.refused)},
        }

    def _licence(self) -> dict[str, object]:
        strictest = max(self.licences, key=lambda each: each.level)
        return {
            "id": self.recipe.model.licence,
            "verdict": str(strictest.level),
            "uses": {each.use: each.to_dict() for each in self.licences},
        }


def shape_of(model: ModelConfig) -> Shape | None:
    """The model's shape as far as it is known without a network: from its folder or its config file."""
    folder = Path(model.source).expanduser()
    return read_shape(folder) if model.is_folder and folder.exists() else model.shape


def make_plan(recipe: Recipe, shape: Shape) -> Plan:
    """The plan, if it fits. Raises PlanError, with what would make it fit."""
    plan = best_plan(recipe, shape)
    if not plan.fits:
        raise PlanError(refusal(recipe, plan, list(advise(recipe, shape))))
    if refused := evaluation_refusal(recipe, shape):
        raise PlanError(refused)
    return plan


def evaluation_refusal(recipe: Recipe, shape: Shape) -> str | None:
    """Why the result cannot be evaluated, which is done on one worker however many train; None when it can."""
    if recipe.evaluation is None:
        return None
    width = 4 if recipe.model.dtype == "fp32" else 2
    tokens = recipe.data.sequence_length + recipe.evaluation.max_tokens  # of a prompt as long as a sample
    cache = 2 * tokens * shape.num_hidden_layers * shape.key_size * width * recipe.evaluation.batch
    runtime = GPU_CONTEXT_BYTES if recipe.cluster.accelerator == "gpu" else RUNTIME_BYTES
    needed = runtime + width * shape.parameters + cache
    if needed <= _memory_of(recipe):
        return None
    return (
        f"evaluation: one worker holds all of {recipe.model.name} and the keys and values of {recipe.evaluation.batch} "
        f"prompts, {needed / GIB:.1f} GiB, and {recipe.cluster.name} has {recipe.cluster.memory_gb_per_worker:g}; "
        "lower evaluation.batch, take a cluster with more memory for each worker, or leave `evaluation` out"
    )


def refusal(recipe: Recipe, plan: Plan, advice: list[Advice]) -> str:
    """Why a plan is refused, and the ways out."""
    way = (
        f"this fits: {'; or '.join(map(str, advice))}"
        if advice
        else "no change of the recipe makes it fit: take a cluster with more memory for each worker, or a smaller model"
    )
    return (
        f"{recipe.model.name} needs {plan.total_bytes / GIB:.1f} GiB on each of {plan.workers} workers "
        f"(ZeRO-{plan.zero}), and {recipe.cluster.name} has {plan.memory_bytes / GIB:.1f}; {way}"
    )


def best_plan(recipe: Recipe, shape: Shape) -> Plan:
    """At the first ZeRO stage that is allowed and fits; when none does, at the one that needs least."""
    auto = [0, 1, 2] if is_dora(recipe) else [0, 1, 2, 3]
    stages = auto if recipe.train.zero == "auto" else [recipe.train.zero]
    if recipe.train.fewest == 1 and recipe.train.zero == "auto":
        stages = [0]
    plans = [_plan_at(recipe, shape, stage) for stage in stages]
    return next((plan for plan in plans if plan.fits), min(plans, key=lambda plan: plan.total_bytes))


def _plan_at(recipe: Recipe, shape: Shape, stage: int) -> Plan:
    train = recipe.train
    per_worker = -(-train.global_batch // train.fewest)
    return Plan(
        workers=train.fewest,
        zero=stage,
        zero_reason=_reason(recipe, stage),
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        micro_batches_per_step=-(-per_worker // train.micro_batch),
        tokens_per_step=train.global_batch * recipe.data.sequence_length,
        parameters=shape.parameters,
        trained_parameters=trained_parameters(recipe, shape),
        memory=peak(recipe, shape, stage),
        memory_bytes=_memory_of(recipe),
    )


def _memory_of(recipe: Recipe) -> int:
    """What a worker may take. Raises PlanError when the cluster's file promises more than its GPU has."""
    cluster = recipe.cluster
    if cluster.gpu and cluster.memory_gb_per_worker > find_gpu(cluster.gpu).memory_gb:
        raise PlanError(
            f"cluster {cluster.name}: memory_gb_per_worker is {cluster.memory_gb_per_worker:g}, and a process can have "
            f"{find_gpu(cluster.gpu).memory_gb:g} GiB of a {cluster.gpu}; write that or less"
        )
    return int(cluster.memory_gb_per_worker * GIB)


def _reason(recipe: Recipe, stage: int) -> str:
    if recipe.train.zero != "auto":
        return "as the recipe says"
    if recipe.train.fewest == 1:
        return "one worker has nothing to share"
    return ("fits without sharding", "optimizer sharded, because it does not fit otherwise",
            "optimizer and gradients sharded, because they do not fit otherwise",
            "weights sharded too, because the model does not fit otherwise")[stage]  # fmt: skip


def advise(recipe: Recipe, shape: Shape) -> Iterator[Advice]:
    """What makes a recipe fit, the least change first; nothing that was not planned and found to fit.

    First what leaves the result as it is: sharding, recomputing, smaller micro-batches, those together, more workers.
    Then what does not: shorter sequences, a LoRA instead of all weights.
    """
    exact: dict[str, object] = {}
    if recipe.train.zero != "auto" and recipe.train.fewest > 1:
        exact["train.zero"] = "auto"
    if not recipe.train.activation_checkpointing:
        exact["train.activation_checkpointing"] = True
    if recipe.train.micro_batch > 1:
        exact["train.micro_batch"] = 1
    alone = [found for key, value in exact.items() if (found := _fitting(recipe, shape, {key: value}))]
    yield from alone
    together = None if alone or len(exact) < 2 else _fitting(recipe, shape, exact)
    if together:
        yield together
    largest = min(recipe.train.global_batch, MOST_ADVISED_WORKERS)  # more would have nothing to do
    for changes in ({}, exact):
        sharded = {**changes, "train.zero": "auto"} if recipe.train.zero != "auto" else changes
        numbers = (1 << bits for bits in range(largest.bit_length()))
        more = (
            _fitting(recipe, shape, {"train.workers": number, **sharded})
            for number in numbers
            if recipe.train.fewest < number <= largest
        )
        found = next((each for each in more if each), None)
        if found:
            yield found
            break
    yield from _with_another_result(recipe, shape, exact)


def _with_another_result(recipe: Recipe, shape: Shape, exact: dict[str, object]) -> Iterator[Advice]:
    length = recipe.data.sequence_length // 2
    while length >= 128:
        if found := _fitting(recipe, shape, {"data.sequence_length": length}):
            yield found
            break
        length //= 2
    if is_dora(recipe) and (found := _fitting(recipe, shape, {"method.dora": False, **exact})):
        yield found  # which ZeRO-3 needs
    if recipe.method.kind == "full":
        for changes in ({}, exact):
            if found := _fitting(recipe, shape, {"method": LoraConfig(kind="lora"), **changes}):
                yield found
                break


def _fitting(recipe: Recipe, shape: Shape, changes: dict[str, object]) -> Advice | None:
    """The changes as advice, if the recipe fits with them."""
    changed = recipe
    for key, value in changes.items():
        section, _, name = key.partition(".")
        new = getattr(changed, section).model_copy(update={name: value}) if name else value
        changed = changed.model_copy(update={section: new})
    plan = best_plan(changed, shape)
    overrides = tuple(f"{key}={_written(value)}" for key, value in changes.items())
    return Advice(overrides, plan.total_bytes) if plan.fits else None


def _written(value: object) -> str:
    """A value as it is written on a command line."""
    return "'{kind: lora}'" if isinstance(value, LoraConfig) else str(value).lower()
