"""What a run would take, from the recipe and the model's shape alone: no torch, no cluster, no data.

Memory of one worker, in bytes, after the ZeRO paper (Rajbhandari et al. 2019, table 1): with P parameters held in
precision b, T trained ones and N workers,

    weights     b·P            /N from stage 3
    gradients   b·T            /N from stage 2
    optimizer   12·T in bf16 (fp32 copy and two moments), 8·T in fp32    /N from stage 1
    activations of one micro-batch of t tokens in L layers of hidden size h and feed-forward size f:
                b·t·(L·(14·h + 3·f))  without, b·t·L·h + one layer with activation checkpointing;
                b·f·(f + 3·h) more with DoRA
    logits      of the supervised positions (all t at worst): (b + 4 + 4)·t·V for logits, fp32 softmax and its gradient
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import PlanError
from cluster.models import ModelConfig, Shape, read_shape
from jobs.config import LoraConfig, Recipe

GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What will be done; every figure per worker unless it says otherwise. Memory in bytes."""

    workers: int
    zero: int
    zero_reason: str
    global_batch: int
    micro_batch: int
    micro_batches_per_step: int
    tokens_per_step: int
    parameters: int
    trained_parameters: int
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logits_bytes: int
    memory_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes + self.logits_bytes
        )

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.memory_bytes

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "total_bytes": self.total_bytes, "fits": self.fits}


def shape_of(model: ModelConfig) -> Shape | None:
    """The model's shape as far as it is known without a network: from its folder or its config file."""
    folder = Path(model.source).expanduser()
    return read_shape(folder) if model.is_folder and folder.exists() else model.shape


def make_plan(recipe: Recipe, shape: Shape) -> Plan:
    """Choose the ZeRO stage and count. Raises PlanError when it cannot fit at any allowed stage."""
    highest = 2 if _is_dora(recipe) else 3
    stages = list(range(1 + highest)) if recipe.train.zero == "auto" else [recipe.train.zero]
    if recipe.train.fewest == 1 and recipe.train.zero == "auto":
        stages = [0]
    plans = [_plan_at(recipe, shape, stage) for stage in stages]
    chosen = next((plan for plan in plans if plan.fits), None)
    if chosen is None:
        best = min(plans, key=lambda plan: plan.total_bytes)
        raise PlanError(
            f"{recipe.model.name} needs {best.total_bytes / GIB:.1f} GiB on each of {best.workers} workers "
            f"(ZeRO-{best.zero}), and {recipe.cluster.name} has {best.memory_bytes / GIB:.1f}; {_advice(recipe, best)}"
        )
    return chosen


def _plan_at(recipe: Recipe, shape: Shape, stage: int) -> Plan:
    train = recipe.train
    weight = 2 if recipe.model.dtype == "bf16" else 4
    trained = trained_parameters(recipe, shape)
    tokens = train.micro_batch * recipe.data.sequence_length
    layer = 14 * shape.hidden_size + 3 * shape.intermediate_size
    layers = shape.num_hidden_layers
    per_token = layers * shape.hidden_size + layer if train.activation_checkpointing else layers * layer
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
        trained_parameters=trained,
        weights_bytes=weight * shape.parameters // (train.fewest if stage >= 3 else 1),
        gradient_bytes=weight * trained // (train.fewest if stage >= 2 else 1),
        optimizer_bytes=(12 if weight == 2 else 8) * trained // (train.fewest if stage >= 1 else 1),
        activation_bytes=weight * (tokens * per_token + (_norm_values(shape) if _is_dora(recipe) else 0)),
        logits_bytes=(weight + 8) * tokens * shape.vocab_size,
        memory_bytes=int(recipe.cluster.memory_gb_per_worker * GIB),
    )


def trained_parameters(recipe: Recipe, shape: Shape) -> int:
    """Parameters that get gradients: all, or rank·(in + out) for each adapted linear layer, and out with DoRA."""
    method = recipe.method
    if not isinstance(method, LoraConfig):
        return shape.parameters
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    sides = {
        "q_proj": (hidden, query),
        "k_proj": (hidden, key_value),
        "v_proj": (hidden, key_value),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    chosen = list(sides.values())
    if method.targets != "all-linear":
        chosen = [sides.get(name, (hidden, hidden)) for name in method.targets]
    each_layer = sum(method.rank * (inputs + outputs) + outputs * method.dora for inputs, outputs in chosen)
    return shape.num_hidden_layers * each_layer


def _norm_values(shape: Shape) -> int:
    """What peft's DoRA holds at once for the norms of the widest layer: an identity of in × in, BA, s·BA and W + s·BA.

    Its peak in one layer, as torch's profiler counts it, is this to the percent.
    """
    return shape.intermediate_size * (shape.intermediate_size + 3 * shape.hidden_size)


def _is_dora(recipe: Recipe) -> bool:
    """Then ZeRO-3 is out: it has a layer's weights together only while that layer runs."""
    return isinstance(recipe.method, LoraConfig) and recipe.method.dora


def _reason(recipe: Recipe, stage: int) -> str:
    if recipe.train.zero != "auto":
        return "as the recipe says"
    if recipe.train.fewest == 1:
        return "one worker has nothing to share"
    return ("fits without sharding", "optimizer sharded, because it does not fit otherwise",
            "optimizer and gradients sharded, because they do not fit otherwise",
            "weights sharded too, because the model does not fit otherwise")[stage]  # fmt: skip


def _advice(recipe: Recipe, plan: Plan) -> str:
    advice = []
    if plan.zero < 3 and plan.workers > 1:
        advice.append("set train.zero: auto")
    if plan.weights_bytes + plan.optimizer_bytes + plan.gradient_bytes > plan.memory_bytes:
        if _is_dora(recipe):
            advice.append("set method.dora: false, which ZeRO-3 needs")
        else:
            advice.append("use more train.workers" if plan.zero == 3 else "use more train.workers with train.zero: 3")
        if recipe.method.kind == "full":
            advice.append("train a lora instead")
    if not recipe.train.activation_checkpointing:
        advice.append("set train.activation_checkpointing: true")
    if recipe.train.micro_batch > 1:
        advice.append("lower train.micro_batch")
    return ", or ".join([*advice, "lower data.sequence_length"])


def readable(name: str, value: object) -> str:
    """A figure of a plan for a person: bytes in GiB, counts in groups of three digits."""
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return f"{value / GIB:.2f} GiB" if name.endswith("_bytes") else f"{value:,}"
