"""A survey as text for a person: what `luthier jobs plan` prints."""

from collections.abc import Iterator, Sequence

from cluster.licences.chain import Judgement
from cluster.prices import gpu_price
from jobs.config import LoraConfig
from jobs.cost import Span
from jobs.memory import GIB
from jobs.plan import Plan, Survey

_WIDTH = 22  # of the first column
_MEANING = {
    "runtime": "libraries, process",
    "weights": "",
    "gradients": "",
    "optimizer": "fp32 master weights and both moments, as far as DeepSpeed keeps them",
    "activations": "with attention's",
    "logits": "every position supervised, with softmax and gradient",
    "buffers": "reduction, gathered weights, the update's temporary tensors",
    "checkpoints": "snapshots on their way to the store",
    "allocator": "free memory in which no block fits",
}


def text(survey: Survey) -> str:
    """Lines of a name and what there is to say."""
    return "\n".join(f"{name:<{_WIDTH}}{said}".rstrip() for name, said in _lines(survey))


def _lines(survey: Survey) -> Iterator[tuple[str, str]]:
    yield from _what(survey)
    yield from _batch(survey)
    yield from _strategy(survey)
    yield from _memory(survey)
    yield from _elsewhere(survey)
    yield from _duration(survey)
    yield from _verdict(survey)


def _what(survey: Survey) -> Iterator[tuple[str, str]]:
    recipe, plan = survey.recipe, survey.plan
    model, method = recipe.model, recipe.method
    how = f"lora of rank {method.rank}" if isinstance(method, LoraConfig) else "all weights"
    share = plan.trained_parameters / plan.parameters
    yield "model", f"{model.name}, {plan.parameters / 1e9:.2f} billion parameters in {model.dtype}"
    yield "method", f"{how}: {plan.trained_parameters:,} trained parameters ({share:.2%})"
    yield from _licences(survey.licences)
    if recipe.evaluation and recipe.publish:
        moves = f", before {recipe.publish.name}@{recipe.publish.alias} moves" if recipe.publish.alias else ""
        yield "evaluation", f"{', '.join(recipe.evaluation.suites)}, on one worker{moves}"


def _licences(judged: Sequence[Judgement]) -> Iterator[tuple[str, str]]:
    """The verdict on each use, what it obliges to, and what stands against it; each sentence once."""
    verdicts = "; ".join(f"{each.use}: {each.level}" for each in judged)
    yield "licence", f"{', '.join(judged[0].licences)}; {verdicts}"
    said = (line for each in judged for line in (*each.reasons, *each.duties, *each.notes))
    for line in dict.fromkeys(map(str, said)):
        yield "", line


def _batch(survey: Survey) -> Iterator[tuple[str, str]]:
    recipe, plan, work = survey.recipe, survey.plan, survey.work
    length = recipe.data.sequence_length
    yield "step", f"{plan.global_batch} sequences of {length:,} tokens, at most {plan.tokens_per_step:,} in all"
    yield "workers", _sharing(plan)
    if survey.at_most:
        yield "", _sharing(survey.at_most)
    yield "data", work.data
    yield "steps", _whole(work.steps)
    yield "epochs", _number(work.epochs)
    yield "tokens", _millions(work.tokens)


def _sharing(plan: Plan) -> str:
    accumulated = plan.micro_batches_per_step
    return f"{plan.workers}, each {accumulated} micro-batch(es) of {plan.micro_batch} sequence(s) a step"


def _strategy(survey: Survey) -> Iterator[tuple[str, str]]:
    plan = survey.plan
    kind = "data parallel" if plan.zero == 0 else f"ZeRO-{plan.zero}"
    yield "strategy", f"{kind}: {plan.zero_reason}"
    if survey.at_most and survey.at_most.zero != plan.zero:
        yield "", f"ZeRO-{survey.at_most.zero} on {survey.at_most.workers}: {survey.at_most.zero_reason}"
    checkpointing = "on" if survey.recipe.train.activation_checkpointing else "off"
    yield "recomputing", f"{checkpointing}, as train.activation_checkpointing says"
    yield "offload", "none: the trainer has none"


def _memory(survey: Survey) -> Iterator[tuple[str, str]]:
    plan = survey.plan
    device = "GPU" if survey.recipe.cluster.accelerator == "gpu" else "worker"
    yield f"memory of a {device}", f"peak at the {plan.memory.moment} of a step"
    for name, value in plan.memory.parts().items():
        if value:
            yield f"  {name}", f"{value / GIB:8.2f} GiB  {_MEANING[name]}"
    yield "  total", f"{plan.total_bytes / GIB:8.2f} GiB  of {plan.memory_bytes / GIB:.2f}"
    if survey.recipe.cluster.accelerator == "gpu":
        yield "", "the formulas were checked on CPUs; runtime and allocator are assumptions for a GPU"


def _elsewhere(survey: Survey) -> Iterator[tuple[str, str]]:
    cost = survey.cost
    if cost.host_bytes is not None:
        yield "host memory", f"{_gib(cost.host_bytes)} a worker, with its checkpoints on their way"
    if cost.publish_bytes:
        yield "", f"{_gib(cost.publish_bytes)} more on the first worker while it publishes"
    yield "disk", f"{_gib(cost.node_disk_bytes)} of cache on each node: base model, tokenised data"
    yield (
        "store",
        f"{_gib(cost.store_bytes)} at most: {cost.checkpoints} checkpoint(s) of {_gib(cost.checkpoint_bytes)}, what is "
        "published, data",
    )


def _duration(survey: Survey) -> Iterator[tuple[str, str]]:
    cost = survey.cost
    if cost.hours:
        yield "time", f"{_between(cost.hours, '.2f')} hours, without start and tokenising"
    if cost.usd:
        yield "cost", f"${_between(cost.usd, ',.2f')} for the workers' GPUs alone"
    yield "" if cost.hours else "time, cost", cost.basis
    limits = survey.recipe.limits
    if limits.hours is not None:
        yield "limits", f"{limits.hours:g} hours in which workers are held, over the whole run"
    if limits.usd is not None:
        price = gpu_price(survey.recipe.cluster, None)
        counted = f", counted at ${price.usd_per_hour:.2f} an hour of a GPU ({price.basis})" if price else ""
        yield "" if limits.hours else "limits", f"${limits.usd:,.2f}{counted}"
    for refusal in survey.refused:
        yield "", refusal


def _verdict(survey: Survey) -> Iterator[tuple[str, str]]:
    if survey.plan.fits:
        yield "fits", "yes"
        return
    yield "fits", "no"
    if not survey.advice:
        yield "what would fit", "nothing that a recipe can change: take more memory, or a smaller model"
    for number, advice in enumerate(survey.advice):
        yield "" if number else "what would fit", str(advice)


def _gib(value: int) -> str:
    return f"{value / GIB:.2f} GiB"


def _between(span: Span, form: str) -> str:
    low, high = f"{span.low:{form}}", f"{span.high:{form}}"
    return low if low == high else f"{low} to {high}"


def _whole(span: Span | None) -> str:
    return _between(span, ",.0f") if span else "not known"


def _number(span: Span | None) -> str:
    return _between(span, ".3g") if span else "not known"


def _millions(span: Span | None) -> str:
    return f"{_between(span * 1e-6, ',.2f')} million" if span else "not known"
