"""What a run takes besides memory: tokens, steps, hours, money, and bytes on disks and in the store. No torch.

Everything is a range where it is not known. Tokens of data that nobody has tokenised are estimated from the files'
size; hours from the GPU's peak and a range of how much of it training reaches; money from the table's prices.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.gpus import GpuType, find_gpu
from cluster.models import Shape
from jobs.config import Recipe
from jobs.tensors import trained_parameters

BYTES_PER_TOKEN = (3.0, 6.0)
"""Of a data file, JSON and all: few for code and for languages far from the tokenizer's, many for plain English."""

UTILISATION = (0.20, 0.45)
"""Share of the peak that training reaches, counting the work of `flops_per_token`. No GPU was at hand to measure it:
published is 0.41 for LoRA on an 8B model, bf16, 4k, on one H100 (NeMo AutoModel). Slow networks go below."""

DATASET_BYTES_PER_TOKEN = 4 + 1 / 8  # jobs/dataset.py: an int32, and a bit for supervised


@dataclass(frozen=True)
class Span:
    """A figure between two ends."""

    low: float
    high: float

    def __mul__(self, factor: float) -> "Span":
        return Span(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Work:
    """How much there is to do.

    Attributes:
        data: what was found of the training files, in words.
        tokens: over the whole run; steps: of the optimizer; epochs: passes over the data. None where not known.
    """

    data: str
    tokens: Span | None
    steps: Span | None
    epochs: Span | None


@dataclass(frozen=True)
class Cost:
    """What it takes. Bytes; hours of the whole run; US dollars.

    Attributes:
        host_bytes: memory of a worker's process beside a GPU; None on CPUs, where the worker's memory is all there is.
        publish_bytes: what rank 0's host holds while it publishes.
        node_disk_bytes: base model and tokenised data in a node's cache.
        checkpoint_bytes: one checkpoint; checkpoints: how many the store holds at most, with one on its way.
        store_bytes: all that the run leaves there, at most.
        basis: where hours and money come from, in words.
    """

    host_bytes: int | None
    publish_bytes: int
    node_disk_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    store_bytes: int
    hours: Span | None
    usd: Span | None
    basis: str


def estimate_work(recipe: Recipe, folder: Path) -> Work:
    """Steps from epochs or the other way round, as far as the data can be looked at.

    Args:
        folder: what paths of data files count from.
    """
    train, data = recipe.train, recipe.data
    sizes = [_local_size(source, folder) for source in data.train]
    here = [size for size in sizes if size is not None]
    per_step = train.global_batch * data.sequence_length
    if len(here) < len(sizes):
        missing = f"{len(sizes) - len(here)} of {len(sizes)} data file(s) not on this machine"
        if train.steps is None:
            return Work(f"{missing}: how many tokens an epoch has is not known", None, None, None)
        tokens = Span(per_step * train.steps, per_step * train.steps)
        return Work(f"{missing}: sequences are taken as full", tokens, Span(train.steps, train.steps), None)
    size = sum(here)
    once = Span(size / BYTES_PER_TOKEN[1], size / BYTES_PER_TOKEN[0])
    text = (
        f"{len(sizes)} file(s), {size:,} bytes, not tokenised: tokens are taken as {BYTES_PER_TOKEN[0]:g} to "
        f"{BYTES_PER_TOKEN[1]:g} bytes each"
    )
    if train.steps:
        tokens = Span(min(once.low, per_step) * train.steps, per_step * train.steps)
        return Work(text, tokens, Span(train.steps, train.steps), Span(tokens.low / once.high, tokens.high / once.low))
    epochs = train.epochs or 1
    steps = Span(*(epochs * max(1, -(-int(end) // per_step)) for end in (once.low, once.high)))
    return Work(text, once * epochs, steps, Span(epochs, epochs))


def _local_size(source: str, folder: Path) -> int | None:
    if source.startswith(("store:", "s3://", "hf://")):
        return None
    path = Path(unquote(urlsplit(source).path)) if source.startswith("file://") else folder / Path(source).expanduser()
    return path.stat().st_size if path.is_file() else None


def estimate_cost(recipe: Recipe, shape: Shape, work: Work, host_bytes: int | None) -> Cost:
    """Bytes, hours and money of a run. Raises PlanError for a GPU type that the table does not have."""
    width = 2 if recipe.model.dtype == "bf16" else 4
    trained = trained_parameters(recipe, shape)
    checkpoint = 12 * trained  # fp32 weight and both moments
    keep = recipe.checkpoint
    held = keep.keep_last + keep.keep_best + 1  # one that is on its way
    if keep.every_steps is None:
        held = 1
    elif work.steps:
        made = -(-int(work.steps.high) // keep.every_steps)
        every = int(work.steps.high) // keep.keep_every_steps if keep.keep_every_steps else 0
        held = min(held + every, made)
    base = width * shape.parameters
    passes = work.epochs.low if work.epochs else 1
    tokenised = int(DATASET_BYTES_PER_TOKEN * work.tokens.high / passes) if work.tokens else 0
    mirrored = base if recipe.model.is_folder else 0  # a Hub model is mirrored by `luthier cluster models add` alone
    published = width * trained if recipe.publish else 0
    hours, usd, basis = _time_and_money(recipe, shape, work)
    return Cost(
        host_bytes=host_bytes,
        publish_bytes=published,
        node_disk_bytes=base + tokenised,
        checkpoint_bytes=checkpoint,
        checkpoints=held,
        store_bytes=held * checkpoint + published + tokenised + mirrored,
        hours=hours,
        usd=usd,
        basis=basis,
    )


def flops_per_token(recipe: Recipe, shape: Shape, *, is_useful: bool = False) -> float:
    """Multiplications and additions of forward and backward for a token, after Kaplan et al. 2020.

    2 for each weight that it meets, forward; as many for the gradient of the input, and as many again for that of a
    weight that is trained; 2 more where checkpointing computes forward twice. The input embedding is looked up, not
    multiplied. Attention's own products: 2·2·heads·head_dim for each of half the sequence, three times in all.

    Args:
        is_useful: leave out what is only computed again, as the MFU of Chowdhery et al. 2022 does.
    """
    matrices = shape.parameters - (0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size)
    passes = 2 if recipe.method.kind == "lora" else 3
    passes += 1 if recipe.train.activation_checkpointing and not is_useful else 0
    attention = 3 * 2 * 2 * shape.num_hidden_layers * shape.query_size * recipe.data.sequence_length / 2
    adapter = 6 * trained_parameters(recipe, shape) if recipe.method.kind == "lora" else 0
    return 2 * passes * matrices + attention + adapter


def worker_tokens_per_s(recipe: Recipe, shape: Shape) -> float | None:
    """At the peak of a worker's GPU, all of it useful: a throughput's share of this is its MFU. None without a type."""
    if not recipe.cluster.gpu:
        return None
    return find_gpu(recipe.cluster.gpu).bf16_tflops * 1e12 / flops_per_token(recipe, shape, is_useful=True)


def _time_and_money(recipe: Recipe, shape: Shape, work: Work) -> tuple[Span | None, Span | None, str]:
    cluster = recipe.cluster
    if not cluster.gpu:
        return None, None, f"hours and money are not estimated: cluster {cluster.name} names no `gpu` type"
    if not work.tokens:
        return None, None, "hours and money are not estimated, because the tokens are not known"
    gpu = find_gpu(cluster.gpu)
    own = [price for price in (cluster.prices.gpu_spot, cluster.prices.gpu) if price is not None]
    total = work.tokens * flops_per_token(recipe, shape)
    train = recipe.train
    # A step lasts as long as the worker with most of its sequences, and the others wait for it.
    busy = train.global_batch / (-(-train.global_batch // train.fewest) * train.fewest)
    peak = train.fewest * busy * gpu.bf16_tflops * 1e12 * 3600
    hours = Span(total.low / (peak * UTILISATION[1]), total.high / (peak * UTILISATION[0]))
    low, high = UTILISATION
    basis = f"{cluster.gpu}, {gpu.bf16_tflops:g} TFLOP/s, {low:.0%} to {high:.0%} of it reached"
    if recipe.model.dtype == "fp32":
        basis += " (bf16's peak; fp32 is slower)"
    if own:
        money = Span(hours.low * min(own), hours.high * max(own)) * recipe.train.fewest
        offers = " to ".join(f"${price:.2f}" for price in sorted(set(own)))
        return hours, money, f"{basis}; {offers} an hour (prices of cluster {cluster.name})"
    if not gpu.prices:
        return hours, None, f"{basis}; the table has no price for it"
    return hours, _money(hours * recipe.train.fewest, gpu), f"{basis}; {_offers(gpu)}"


def _money(gpu_hours: Span, gpu: GpuType) -> Span:
    prices = [price.usd_per_hour for price in gpu.prices]
    return Span(gpu_hours.low * min(prices), gpu_hours.high * max(prices))


def _offers(gpu: GpuType) -> str:
    ordered = sorted(gpu.prices, key=lambda price: price.usd_per_hour)
    ends = ordered[:1] + ordered[1:][-1:]
    return ", ".join(f"${each.usd_per_hour:.2f} an hour ({each.offer}, {each.read_on})" for each in ends)
