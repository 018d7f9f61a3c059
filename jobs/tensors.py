"""The tensors of training by size: what is trained, what forward keeps for backward, the logits. No torch.

Read from transformers' modules, jobs/kernels.py, jobs/model.py and jobs/objectives.py; `tests/jobs/test_plan.py`
compares what forward keeps with what autograd does keep, for each family of models.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cluster.models import Shape
from jobs.config import LoraConfig, Recipe

LOSS_CHUNK = 1024  # of jobs/kernels.py, which imports torch


def trained_parameters(recipe: Recipe, shape: Shape) -> int:
    """Parameters that get gradients: all, or rank·(in + out) for each adapted linear layer, and out with DoRA."""
    method = recipe.method
    if not isinstance(method, LoraConfig):
        return shape.parameters
    adapted = [sides(shape, name) for name in targets(method)]
    return shape.num_hidden_layers * sum(
        method.rank * (inputs + outputs) + outputs * method.dora for inputs, outputs in adapted
    )


def is_dora(recipe: Recipe) -> bool:
    """Then ZeRO-3 is out: it has a layer's weights together only while that layer runs."""
    return isinstance(recipe.method, LoraConfig) and recipe.method.dora


def norm_elements(shape: Shape) -> int:
    """What peft's DoRA holds at once for the norms of the widest layer: an identity of in × in, BA, s·BA and W + s·BA.

    Its peak in one layer, as torch's profiler counts it, is this to the percent.
    """
    return shape.intermediate_size * (shape.intermediate_size + 3 * shape.hidden_size)


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


def sides(shape: Shape, name: str) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; one of another name is taken for a square of the hidden size."""
    return _LINEAR[name](shape) if name in _LINEAR else (shape.hidden_size, shape.hidden_size)


@dataclass(frozen=True)
class Sizes:
    """What memory's terms are made of.

    Attributes:
        width: bytes of a parameter, and of an activation.
        trained: parameters; kept: those whose moments this worker keeps.
        tokens: of a micro-batch; accumulates: whether a worker has several in a step.
    """

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
    def of(cls, recipe: Recipe, shape: Shape, stage: int) -> "Sizes":
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


def forward_keeps(sizes: Sizes) -> int:
    """What forward keeps: every layer's, or with checkpointing each layer's input alone; and both ends'."""
    shape, layers = sizes.shape, sizes.shape.num_hidden_layers
    recompute, hidden = sizes.recipe.train.activation_checkpointing, sizes.tokens * shape.hidden_size
    # The last norm and the output layer. Where only adapters are trained, the first norm has no gradient to pass on
    # and keeps nothing, which is as much as the last one does; but recomputing asks for the embedding's gradient.
    normalised = 4 if shape.model_type.startswith("gemma") else sizes.width
    ends = (4 + normalised + sizes.width) * hidden if sizes.is_full else 4 * hidden * recompute
    return ends + layers * (sizes.width * hidden if recompute else layer(sizes))


def layer(sizes: Sizes) -> int:
    """Bytes that autograd keeps of one decoder layer."""
    return sum(layer_tensors(sizes))


def layer_tensors(sizes: Sizes) -> list[int]:
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
            products += [(width + 1) * sides(shape, name)[0] for name in adapted]
    return [sizes.tokens * size for size in (*norms, *products, *small)]


def largest_trained(sizes: Sizes) -> int:
    """Elements of the largest trained tensor."""
    shape, method = sizes.shape, sizes.recipe.method
    if isinstance(method, LoraConfig):
        return method.rank * max(max(sides(shape, name)) for name in targets(method))
    return shape.hidden_size * max(shape.vocab_size, shape.intermediate_size)


def logit_blocks(sizes: Sizes) -> list[int]:
    """The logits; their gradient in parts of LOSS_CHUNK positions; and the larger of what it is made of: a part's
    softmax in fp32, which in fp32 is the part itself; and the joined gradient, where there are several parts."""
    positions, width, vocabulary = sizes.tokens, sizes.width, sizes.shape.vocab_size
    chunk = min(positions, LOSS_CHUNK)
    parts = [width * vocabulary * min(chunk, positions - first) for first in range(0, positions, chunk)]
    softmax = 4 * vocabulary * chunk if width < 4 else 0
    joined = width * vocabulary * positions if len(parts) > 1 else 0
    return [width * vocabulary * positions, *parts, max(softmax, joined)]
