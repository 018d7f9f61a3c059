"""From trained weights to a version in the registry, or a model revision: checked, probed, then handed over.

Refused are adapters that other systems have published silently: empty tensors, tensors that are all zero or not
finite, shapes that don't fit the base, and an adapter that leaves the base's logits as they were.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster import keys, made, models, records, registry
from cluster.errors import AdapterRefused
from cluster.models import ModelConfig
from cluster.records import BaseModelRef, LicenceRecord, Requirement, RunRecord
from cluster.store import Store
from jobs import card, export
from jobs.zero import ZeroEngine

PROBE = "probe.safetensors"
"""Beside each adapter: token ids and the trainer's logits after them, so that whoever loads it can compare."""


def publish_adapter(
    engine: ZeroEngine,
    store: Store,
    name: str,
    base: BaseModelRef,
    model: ModelConfig,
    probe_ids: Tensor,
    run_id: str,
    step: int,
    metrics: dict[str, float],
    licences: LicenceRecord,
    base_folder: Path,
    gate: Requirement | None = None,
) -> dict[str, Any] | None:
    """Publish the adapter under training as the next version of `name`. A collective.

    Args:
        licences: how the run was judged; its notice and the licence files of `base_folder` go along.
        gate: what it must show before an alias moves to it.

    Returns:
        On rank 0 {"name", "version", "digest"}; None elsewhere.

    Raises:
        AdapterRefused: on every rank, and nothing was written.
    """
    peft_model = engine.module
    assert isinstance(peft_model, PeftModel)
    weights = export.gather(engine, model.dtype)
    adapted = export.probe_logits(engine, probe_ids)
    with peft_model.disable_adapter():
        plain = export.probe_logits(engine, probe_ids)
    check_probe(adapted, plain, name)
    published: list[dict[str, Any] | AdapterRefused | None] = [None]
    if dist.get_rank() == 0:
        try:
            check_weights(peft_model, weights, name)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                export.write_adapter(peft_model, weights, base, model.source if model.is_hub else base.name, folder)
                export.add_notice(licences, base_folder, folder)
                save_file({"input_ids": probe_ids, "logits": adapted}, folder / PROBE)
                run = records.read(store, keys.run_record(run_id), RunRecord)
                how = made.of_run(run, "adapter", step, licences)
                card.write(store, folder, name, how, run, metrics.get("evaluation_loss"), licences.notice)
                record = registry.publish(
                    store, name, folder, base, run_id, step, metrics, licences.artefacts, gate, run
                )
            published = [{"name": record.name, "version": record.version, "digest": record.digest}]
        except AdapterRefused as error:
            published = [error]
    dist.broadcast_object_list(published)
    if isinstance(published[0], AdapterRefused):
        raise published[0]
    return published[0]


def check_probe(adapted: Tensor, plain: Tensor, name: str) -> None:
    """Raise AdapterRefused unless the adapter changes the base's logits, to something finite."""
    if not torch.isfinite(adapted).all():
        raise AdapterRefused(f"adapter {name} gives logits that are not finite; lower optimizer.learning_rate")
    if torch.equal(adapted, plain):
        raise AdapterRefused(
            f"adapter {name} leaves the base model's logits as they were: it learned nothing; "
            "train longer, or with a higher optimizer.learning_rate"
        )


def check_weights(model: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Raise AdapterRefused for the first tensor that is missing, empty, zero, not finite or of a wrong shape."""
    expected = adapter_shapes(model)
    for key, shape in expected.items():
        tensor = weights.get(key)
        if tensor is None or not tensor.numel():
            raise AdapterRefused(f"adapter {name}: tensor {key} is empty")
        if tuple(tensor.shape) != shape:
            raise AdapterRefused(
                f"adapter {name}: tensor {key} has shape {tuple(tensor.shape)}, the base needs {shape}"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterRefused(f"adapter {name}: tensor {key} is not finite; lower optimizer.learning_rate")
        if not tensor.any():
            raise AdapterRefused(f"adapter {name}: tensor {key} is all zeros: its layer was never trained")
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise AdapterRefused(f"adapter {name}: tensor {unknown[0]} belongs to no adapted layer")


def adapter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name to shape of every low-rank factor, and of DoRA's lengths, that the base model's layers call for."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            rank = layer.r["default"]
            shapes[f"{path}.lora_A.default.weight"] = (rank, layer.in_features)
            shapes[f"{path}.lora_B.default.weight"] = (layer.out_features, rank)
            if layer.use_dora["default"]:
                shapes[f"{path}.lora_magnitude_vector.default.weight"] = (layer.out_features,)
    return shapes


def publish_model(
    engine: ZeroEngine,
    store: Store,
    name: str,
    base_folder: Path,
    model: ModelConfig,
    run_id: str,
    step: int,
    metrics: dict[str, float],
    licences: LicenceRecord,
) -> dict[str, Any] | None:
    """Publish a full fine-tune as a revision of model `name`. A collective. Returns {"name", "revision"} on rank 0."""
    weights = export.gather_frozen(engine) | export.gather(engine, model.dtype)
    published: list[dict[str, Any] | AdapterRefused | None] = [None]
    if dist.get_rank() == 0:
        broken = next((key for key, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
        if broken:
            published = [AdapterRefused(f"model {name}: tensor {broken} is not finite; lower optimizer.learning_rate")]
        else:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                export.write_model(engine.module, weights, base_folder, folder)
                export.add_notice(licences, base_folder, folder)
                run = records.read(store, keys.run_record(run_id), RunRecord)
                made.write(folder, how := made.of_run(run, "model", step, licences))
                card.write(store, folder, name, how, run, metrics.get("evaluation_loss"), licences.notice)
                described = ModelConfig(
                    name=name, source=str(folder), revision=None, licence=model.licence, dtype=model.dtype, shape=None
                )
                revision = models.mirror(described, folder, store, f"run {run_id}", licences.artefacts)
                published = [{"name": name, "revision": revision}]
    dist.broadcast_object_list(published)
    if isinstance(published[0], AdapterRefused):
        raise published[0]
    return published[0]
