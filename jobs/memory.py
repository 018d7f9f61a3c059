"""The most memory that one worker holds, by part, from the recipe and the model's shape: no torch.

With P parameters held in b bytes, T of them trained, N workers, and a micro-batch of t tokens, three moments of a step
compete, and the largest is the peak:

    loss        all activations are there, the logits, and the gradients of earlier micro-batches
    backward    the last micro-batch's backward pass ends: gradients are whole, and in buckets on their way
    update      AdamW's step, with its temporary tensors

What stays through all of them (Rajbhandari et al. 2019, table 1, corrected by what DeepSpeed 0.19 does):

    weights     b·P, from stage 3 on b·P/N
    optimizer   two fp32 moments, and an fp32 copy of the weights where DeepSpeed wraps the optimizer (`_master_bytes`)
    gradients   b·T, from stage 2 on b·T/N

Terms are derived from the code that allocates; each function says which. Those that are measured instead say where.
`scripts/bench plan` compares the sum with real workers, on CPUs.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from cluster.models import Shape
from jobs.config import LoraConfig, Recipe

MIB = 1 << 20
GIB = 1 << 30

RUNTIME_BYTES = 535 * MIB
"""A worker with nothing loaded: Python, torch, Ray, DeepSpeed and transformers imported, gloo joined, the libraries of
the first step. Measured by `scripts/bench plan` (2026-11-26, torch 2.13 for CPUs, Ray 2.60, DeepSpeed 0.19.8)."""

GPU_CONTEXT_BYTES = 1_200 * MIB
"""CUDA's context and kernels, cuBLAS's workspace, NCCL's channels. Not measured here: users report 0.5 to 1.5 GiB."""

SNAPSHOTS = 2
"""Shards that jobs/saver.py keeps: it takes turns between two, once two checkpoints have been made."""

LOSS_CHUNK = 1024  # of jobs/kernels.py, which imports torch
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size, which jobs/zero.py leaves alone."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's sub_group_size: what stage 3 updates at a time."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: gathered weights that may wait for their next use."""

UNTRIED_RESERVE = 0.05
"""CUDA's caching allocator: what it holds and cannot hand out. Not measured here."""

ARENA_BYTES = 64 * MIB
"""glibc's heaps for threads other than the main one; larger blocks are mapped, and go back whole."""

HOLES = 1.0
"""A CPU worker's heap holds as much again as its layers allocate in a step. Before glibc 2.38, a freed block of an
aligned allocation (all of torch's) is too small for the next one of its own size, and the heap grows instead.
Measured as 0.8 to 1.2 of it with 3, 8 and 16 layers, with and without recomputing (2026-11-26, glibc 2.36)."""


@dataclass(frozen=True)
class Memory:
    """One worker's memory at its peak, in bytes by part, and the moment of the step that it is at.

    Attributes:
        runtime: libraries and, on a GPU, CUDA's context.
        activations: what forward keeps for backward, with attention's; and at the end of backward one layer's.
        logits: of the supervised positions, all of them at worst, with softmax and gradient.
        buffers: gradients in buckets, gathered weights (stage 3), temporary tensors of the update.
        checkpoints: snapshots on their way to the store; on a GPU they are in the host's memory instead.
        allocator: what is free and cannot be used, because blocks do not fit.
    """

    moment: str
    runtime: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    checkpoints: int
    allocator: int

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return {name: value for name, value in asdict(self).items() if name != "moment"}


def peak(recipe: Recipe, shape: Shape, stage: int) -> Memory:
    """The peak of one of `recipe.train.fewest` workers at a ZeRO stage."""
    sizes = _Sizes.of(recipe, shape, stage)
    return max((_at_loss(sizes), _at_backward(sizes), _at_update(sizes)), key=lambda memory: memory.total)


def activations(recipe: Recipe, shape: Shape) -> int:
    """Bytes that the forward pass of one micro-batch keeps for the backward pass, without the logits."""
    return _activations(_Sizes.of(recipe, shape, stage=0))


def trained_parameters(recipe: Recipe, shape: Shape) -> int:
    """Parameters that get gradients: all, or rank·(in + out) for each adapted linear layer."""
    method = recipe.method
    if not isinstance(method, LoraConfig):
        return shape.parameters
    sides = (sum(_sides(shape, name)) for name in targets(method))
    return shape.num_hidden_layers * method.rank * sum(sides)


def targets(method: LoraConfig) -> tuple[str, ...]:
    """The adapted linear layers of one decoder layer."""
    return tuple(_LINEAR) if method.targets == "all-linear" else method.targets


_LINEAR: dict[str, Callable[[Shape], tuple[int, int]]] = {
    "q_proj": lambda shape: (shape.hidden_size, shape.query_size),
    "k_proj": lambda shape: (shape.hidden_size, shape.key_size),
    "v_proj": lambda shape: (shape.hidden_size, shape.key_size),
    "o_proj": lambda shape: (shape.query_size, shape.hidden_size),
    "gate_proj": lambda shape: (shape.hidden_size, shape.intermediate_size),
    "up_proj": lambda shape: (shape.hidden_size, shape.intermediate_size),
    "down_proj": lambda shape: (shape.intermediate_size, shape.hidden_size),
}


def _sides(shape: Shape, name: str) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; one of another name is taken for a square of the hidden size."""
    return _LINEAR[name](shape) if name in _LINEAR else (shape.hidden_size, shape.hidden_size)


@dataclass(frozen=True)
class _Sizes:
    """What the terms are made of, in the letters of the docstring above. `kept` is T, or this worker's share of it."""

    recipe: Recipe
    shape: Shape
    stage: int
    is_gpu: bool
    is_full: bool
    width: int
    workers: int
    trained: int
    kept: int
    tokens: int
    accumulates: bool

    @classmethod
    def of(cls, recipe: Recipe, shape: Shape, stage: int) -> "_Sizes":
        train = recipe.train
        trained = trained_parameters(recipe, shape)
        return cls(
            recipe=recipe,
            shape=shape,
            stage=stage,
            is_gpu=recipe.cluster.accelerator == "gpu",
            is_full=recipe.method.kind == "full",
            width=2 if recipe.model.dtype == "bf16" else 4,
            workers=train.fewest,
            trained=trained,
            kept=trained // train.fewest if stage else trained,
            tokens=train.micro_batch * recipe.data.sequence_length,
            accumulates=-(-train.global_batch // train.fewest) > train.micro_batch,
        )


def _at_loss(sizes: _Sizes) -> Memory:
    """Logits and all activations; and of earlier micro-batches the gradients, where there are any."""
    gradients = sizes.width * (sizes.kept if sizes.stage >= 2 else sizes.trained) if sizes.accumulates else 0
    kept, logits = _activations(sizes), _logits(sizes)
    return _memory(sizes, "loss", gradients, activations=kept, logits=logits, buffers=0)


def _at_backward(sizes: _Sizes) -> Memory:
    """The gradients of all trained weights, in their buckets; of the activations the last layer's and its gradients.

    Stage 0: every gradient, and a flat copy for the reduction (engine.py, allreduce_bucket), also with one worker.
    Stage 1: the same in a bucket of DeepSpeed's, and its copy. Stages 2 and 3: the shares that have been reduced, the
    bucket, and its copy. A bucket is allocated whole, and on a CPU only counts where it was written.
    """
    whole = sizes.width * min(sizes.trained, BUCKET_ELEMENTS)
    bucket = sizes.width * BUCKET_ELEMENTS if sizes.is_gpu else whole
    gradients = sizes.width * (sizes.kept if sizes.stage >= 2 else sizes.trained)
    one_layer = _layer(sizes) + sizes.width * sizes.tokens * (
        3 * sizes.shape.intermediate_size + 4 * sizes.shape.hidden_size
    )
    buffers = whole + (bucket if sizes.stage else 0)
    return _memory(sizes, "backward", gradients, activations=one_layer, logits=0, buffers=buffers)


def _at_update(sizes: _Sizes) -> Memory:
    """AdamW: an fp32 gradient where it was not one, and temporary tensors.

    On GPUs torch updates all tensors together, with one temporary tensor for each (√v); on CPUs one after another,
    with two. From stage 1 on there is one tensor, flat; at stage 3 one for each SUB_GROUP_ELEMENTS.
    """
    gradients = sizes.width * (sizes.kept if sizes.stage >= 2 else sizes.trained)
    together = min(sizes.kept, SUB_GROUP_ELEMENTS) if sizes.stage == 3 else sizes.kept
    in_fp32 = 4 * together if sizes.stage or sizes.width == 2 else 0
    largest = together if sizes.stage else _largest(sizes)
    scratch = 4 * together if sizes.is_gpu else 8 * largest
    return _memory(sizes, "update", gradients, activations=0, logits=0, buffers=in_fp32 + scratch)


def _memory(sizes: _Sizes, moment: str, gradients: int, activations: int, logits: int, buffers: int) -> Memory:
    """With what stays through all moments of a step."""
    shape, stage, width = sizes.shape, sizes.stage, sizes.width
    gathered = width * min(shape.parameters, LIVE_ELEMENTS) if stage == 3 and moment != "update" else 0
    bucket = width * BUCKET_ELEMENTS if stage == 3 and moment != "backward" else 0
    # Plain fp32 at stage 0 is updated in place; at stage 3 the shards are the master copy.
    master = 0 if width == 4 and stage in (0, 3) else 4 * sizes.kept
    # A bucket of stage 3 stays written on a CPU too, from the first backward pass on.
    written = width * min(sizes.trained, BUCKET_ELEMENTS) if stage == 3 and moment != "backward" else 0
    buffers += gathered + (bucket if sizes.is_gpu else written)
    return Memory(
        moment=moment,
        runtime=GPU_CONTEXT_BYTES if sizes.is_gpu else RUNTIME_BYTES,
        weights=width * shape.parameters // (sizes.workers if stage == 3 else 1),
        gradients=gradients,
        optimizer=8 * sizes.kept + master,
        activations=activations,
        logits=logits,
        buffers=buffers,
        checkpoints=0 if sizes.is_gpu else snapshot_bytes(sizes.recipe, sizes.trained),
        allocator=(
            int(UNTRIED_RESERVE * (activations + logits + buffers))
            if sizes.is_gpu
            else _unused_heap(sizes, activations, is_loss=moment == "loss")
        ),
    )


def _unused_heap(sizes: _Sizes, activations: int, is_loss: bool) -> int:
    """What a CPU worker's heap holds besides `activations` and, at the loss, the logits: it never shrinks.

    Allocated there in a step is what all layers keep (recomputing allocates it too) and logits, up to ARENA_BYTES; with
    stage 3 the gathered weights, the trained shards before DeepSpeed put them into one buffer, and peft's own LoRA
    layer, which makes two more tensors of each output.
    """
    shape, method, width = sizes.shape, sizes.recipe.method, sizes.width
    layers = shape.num_hidden_layers * sum(block for block in _layer_tensors(sizes) if block <= ARENA_BYTES)
    logits = sum(block for block in _logit_blocks(sizes) if block <= ARENA_BYTES)
    gathered = adapters = 0
    if sizes.stage == 3:
        gathered = width * (min(shape.parameters, LIVE_ELEMENTS) + sizes.kept)
        if isinstance(method, LoraConfig):
            outputs = sum(_sides(shape, name)[1] for name in targets(method))
            adapters = 2 * width * sizes.tokens * outputs * shape.num_hidden_layers
    highest = _activations(sizes) + logits + (_layer(sizes) if sizes.recipe.train.activation_checkpointing else 0)
    live = activations + (logits if is_loss else 0)
    return int(HOLES * (layers + logits + gathered + adapters)) + max(0, highest - live)


def snapshot_bytes(recipe: Recipe, trained: int) -> int:
    """Host memory of a worker's checkpoints on their way: fp32 weight and moments, each element on one worker."""
    train, every = recipe.train, recipe.checkpoint.every_steps
    is_once = every is None or (train.steps is not None and train.steps <= every)
    return (1 if is_once else SNAPSHOTS) * 12 * trained // train.fewest


def _largest(sizes: _Sizes) -> int:
    """Elements of the largest trained tensor."""
    shape, method = sizes.shape, sizes.recipe.method
    if isinstance(method, LoraConfig):
        return method.rank * max(max(_sides(shape, name)) for name in targets(method))
    return shape.hidden_size * max(shape.vocab_size, shape.intermediate_size)


def _activations(sizes: _Sizes) -> int:
    """What forward keeps: every layer's, or with checkpointing each layer's input alone; and both ends'."""
    shape, layers = sizes.shape, sizes.shape.num_hidden_layers
    recompute, hidden = sizes.recipe.train.activation_checkpointing, sizes.tokens * shape.hidden_size
    # The last norm and the output layer. Where only adapters are trained, the first norm has no gradient to pass on
    # and keeps nothing, which is as much as the last one does; but recomputing asks for the embedding's gradient.
    normalised = 4 if shape.model_type.startswith("gemma") else sizes.width
    ends = (4 + normalised + sizes.width) * hidden if sizes.is_full else 4 * hidden * recompute
    return ends + layers * (sizes.width * hidden if recompute else _layer(sizes))


def _layer(sizes: _Sizes) -> int:
    return sum(_layer_tensors(sizes))


def _layer_tensors(sizes: _Sizes) -> list[int]:
    """The tensors that autograd keeps of one decoder layer, read from transformers' modules and jobs/kernels.py; bytes.

    A norm keeps its input in fp32 and its inverse root, and where its weight is trained the normalised input too. A
    linear layer keeps its input where it, or its adapter, is trained. Attention keeps queries, keys, values, its output
    and a logarithm for each head; the row's output is a copy, put together from the samples'. The gated MLP keeps both
    of its branches and the activated one.
    """
    shape, method, width = sizes.shape, sizes.recipe.method, sizes.width
    hidden, query, key, inner = shape.hidden_size, shape.query_size, shape.key_size, shape.intermediate_size
    is_gemma = shape.model_type.startswith("gemma")
    has_query_norm = is_gemma or shape.model_type.startswith("qwen3")
    heads = shape.num_attention_heads + shape.num_key_value_heads
    normed = [hidden] * (4 if is_gemma else 2) + ([query, key] if has_query_norm else [])
    roots = 4 * ((4 if is_gemma else 2) + (heads if has_query_norm else 0))
    norms = [4 * size for size in normed]
    if sizes.is_full:
        norms += [(4 if is_gemma else width) * size for size in normed]
    adapted = targets(method) if isinstance(method, LoraConfig) else tuple(_LINEAR)
    inputs = [
        hidden if {"q_proj", "k_proj", "v_proj"} & set(adapted) else 0,  # one for all that read the same
        query if "o_proj" in adapted else 0,
        hidden if {"gate_proj", "up_proj"} & set(adapted) else 0,
        inner if "down_proj" in adapted else 0,
    ]
    products = [width * size for size in (*inputs, query, key, key, query, inner, inner, inner)]
    small = [roots, 4 * shape.num_attention_heads]
    if isinstance(method, LoraConfig):
        small.append(width * method.rank * len(adapted))
        if method.dropout:
            products += [(width + 1) * _sides(shape, name)[0] for name in adapted]
    return [sizes.tokens * size for size in (*norms, *products, *small)]


def _logits(sizes: _Sizes) -> int:
    """jobs/kernels.py's loss in its backward pass, all positions supervised."""
    return sum(_logit_blocks(sizes))


def _logit_blocks(sizes: _Sizes) -> list[int]:
    """The logits; their gradient in parts of LOSS_CHUNK positions; and the larger of what it is made of: a part's
    softmax in fp32, which in fp32 is the part itself; and the joined gradient, where there are several parts."""
    positions, width, vocabulary = sizes.tokens, sizes.width, sizes.shape.vocab_size
    chunk = min(positions, LOSS_CHUNK)
    parts = [width * vocabulary * min(chunk, positions - first) for first in range(0, positions, chunk)]
    softmax = 4 * vocabulary * chunk if width < 4 else 0
    joined = width * vocabulary * positions if len(parts) > 1 else 0
    return [width * vocabulary * positions, *parts, max(softmax, joined)]
