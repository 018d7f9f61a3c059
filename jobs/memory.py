"""The most memory that one worker holds, by part, from the recipe and the model's shape: no torch.

With P parameters held in b bytes, T of them trained, N workers, and a micro-batch of t tokens, three moments of a step
compete, and the largest is the peak:

    loss        all activations are there, the logits, and the gradients of earlier micro-batches
    backward    the last micro-batch's backward pass ends: gradients are whole, and in buckets on their way
    update      AdamW's step, with its temporary tensors

What stays through all of them (Rajbhandari et al. 2019, table 1, corrected by what DeepSpeed 0.19 does):

    weights     b·P, from stage 3 on b·P/N
    optimizer   two fp32 moments, and an fp32 copy of the weights where DeepSpeed makes one
    gradients   b·T, from stage 2 on b·T/N

Terms are derived from the code that allocates; each function says which. Those that are measured instead say where.
`scripts/bench plan` compares the sum with real workers, on CPUs.
"""

from dataclasses import asdict, dataclass

from cluster.models import Shape
from jobs.config import LoraConfig, Recipe
from jobs.tensors import (
    Sizes,
    forward_keeps,
    is_dora,
    largest_trained,
    layer,
    layer_tensors,
    logit_blocks,
    norm_elements,
    sides,
    targets,
)

MIB = 1 << 20
GIB = 1 << 30

RUNTIME_BYTES = 535 * MIB
"""A worker with nothing loaded: Python, torch, Ray, DeepSpeed and transformers imported, gloo joined, the libraries of
the first step. Measured in real workers (2026-11-26, torch 2.13 for CPUs, Ray 2.60, DeepSpeed 0.19.8)."""

GPU_CONTEXT_BYTES = 1_200 * MIB
"""CUDA's context and kernels, cuBLAS's workspace, NCCL's channels. Not measured here: users report 0.5 to 1.5 GiB."""

SNAPSHOTS = 2
"""Shards that jobs/saver.py keeps: it takes turns between two, once two checkpoints have been made."""

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
    sizes = Sizes.of(recipe, shape, stage)
    return max((_at_loss(sizes), _at_backward(sizes), _at_update(sizes)), key=lambda memory: memory.total)


def _at_loss(sizes: Sizes) -> Memory:
    """Logits and all activations; and of earlier micro-batches the gradients, where there are any."""
    gradients = sizes.width * (sizes.kept if sizes.stage >= 2 else sizes.trained) if sizes.accumulates else 0
    kept, logits = forward_keeps(sizes), sum(logit_blocks(sizes))
    if is_dora(sizes.recipe):
        kept += sizes.width * norm_elements(sizes.shape)  # of the last layer; its heap does not shrink before the loss
    return _memory(sizes, "loss", gradients, activations=kept, logits=logits, buffers=0)


def _at_backward(sizes: Sizes) -> Memory:
    """The gradients of all trained weights, in their buckets; of the activations the last layer's and its gradients.

    Stage 0: every gradient, and a flat copy for the reduction (engine.py, allreduce_bucket), also with one worker.
    Stage 1: the same in a bucket of DeepSpeed's, and its copy. Stages 2 and 3: the shares that have been reduced, the
    bucket, and its copy. A bucket is allocated whole, and on a CPU only counts where it was written.
    """
    whole = sizes.width * min(sizes.trained, BUCKET_ELEMENTS)
    bucket = sizes.width * BUCKET_ELEMENTS if sizes.is_gpu else whole
    gradients = sizes.width * (sizes.kept if sizes.stage >= 2 else sizes.trained)
    one_layer = layer(sizes) + sizes.width * sizes.tokens * (
        3 * sizes.shape.intermediate_size + 4 * sizes.shape.hidden_size
    )
    buffers = whole + (bucket if sizes.stage else 0)
    return _memory(sizes, "backward", gradients, activations=one_layer, logits=0, buffers=buffers)


def _at_update(sizes: Sizes) -> Memory:
    """AdamW: an fp32 gradient where it was not one, and temporary tensors.

    On GPUs torch updates all tensors together, with one temporary tensor for each (√v); on CPUs one after another,
    with two. From stage 1 on there is one tensor, flat; at stage 3 one for each SUB_GROUP_ELEMENTS.
    """
    gradients = sizes.width * (sizes.kept if sizes.stage >= 2 else sizes.trained)
    together = min(sizes.kept, SUB_GROUP_ELEMENTS) if sizes.stage == 3 else sizes.kept
    in_fp32 = 4 * together if sizes.stage or sizes.width == 2 else 0
    largest = together if sizes.stage else largest_trained(sizes)
    scratch = 4 * together if sizes.is_gpu else 8 * largest
    return _memory(sizes, "update", gradients, activations=0, logits=0, buffers=in_fp32 + scratch)


def _memory(sizes: Sizes, moment: str, gradients: int, activations: int, logits: int, buffers: int) -> Memory:
    """With what stays through all moments of a step."""
    shape, stage, width = sizes.shape, sizes.stage, sizes.width
    gathered = width * min(shape.parameters, LIVE_ELEMENTS) if stage == 3 and moment != "update" else 0
    # Made for stage 3 with the engine, for stages 1 and 2 when a backward pass begins.
    has_bucket = stage == 3 if moment == "update" else stage > 0 and moment == "loss"
    bucket = width * BUCKET_ELEMENTS if has_bucket else 0
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
            else _unused_heap(sizes, moment, activations)
        ),
    )


def _unused_heap(sizes: Sizes, moment: str, activations: int) -> int:
    """What a CPU worker's heap holds besides `activations` and, at the loss, the logits: it never shrinks.

    Allocated there in a step is what all layers keep (recomputing allocates it too) and logits, up to ARENA_BYTES; with
    stage 3 the gathered weights, the trained shards before DeepSpeed put them into one buffer, and peft's own LoRA
    layer, which makes two more tensors of each output.
    """
    shape, method, width = sizes.shape, sizes.recipe.method, sizes.width
    recompute = sizes.recipe.train.activation_checkpointing
    layers = shape.num_hidden_layers * sum(block for block in layer_tensors(sizes) if block <= ARENA_BYTES)
    logits = sum(block for block in logit_blocks(sizes) if block <= ARENA_BYTES)
    gathered = adapters = 0
    if sizes.stage == 3:
        gathered = width * (min(shape.parameters, LIVE_ELEMENTS) + sizes.kept)
        if isinstance(method, LoraConfig):
            outputs = sum(sides(shape, name)[1] for name in targets(method))
            adapters = 2 * width * sizes.tokens * outputs * shape.num_hidden_layers
    holes = int(HOLES * (layers + logits + gathered + adapters))
    again = layer(sizes) if recompute else 0
    if moment == "loss":
        return holes + again
    highest = (forward_keeps(sizes) if recompute else layers) + again + logits
    return holes + max(0, highest - activations)


def snapshot_bytes(recipe: Recipe, trained: int) -> int:
    """Host memory of a worker's checkpoints on their way: fp32 weight and moments, each element on one worker."""
    train, every = recipe.train, recipe.checkpoint.every_steps
    is_once = every is None or (train.steps is not None and train.steps <= every)
    return (1 if is_once else SNAPSHOTS) * 12 * trained // train.fewest
