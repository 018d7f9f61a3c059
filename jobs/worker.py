"""One worker of one attempt: prepare, train, publish, and leave the outcome on the board.

Runs inside Ray Train's worker group: torch.distributed is up (gloo on CPUs, NCCL on GPUs), one process a worker.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
import transformers

from cluster import models
from cluster.errors import InputError, ObjectDamaged, ObjectNotFound, OutOfMemory, RegistryError, RunFailed, StoreError
from cluster.logs import say
from cluster.patient import Outage, PatientStore
from cluster.records import CheckpointRef
from cluster.store import Store
from jobs import checkpoint, lora, publish, runs
from jobs.config import FullConfig
from jobs.dataset import Dataset
from jobs.job import Job
from jobs.kernels import keep_freed_memory
from jobs.model import load_model
from jobs.trainer import Trainer
from jobs.zero import ZeroEngine, join_process_group, put_weights, sharded_loading, trained_elements

PROBE_TOKENS = 64


def work(job: Job) -> None:
    """Train, checkpoint, publish; the result, or why there can be none, is left on the board.

    The driver starts the workers again after an error, unless the board has one that they would only meet again: a
    model, data or an adapter that cannot be used, a loss that stays infinite.
    """
    job = replace(
        job, store=PatientStore(job.store.impatient(), job.recipe.checkpoint.store_patience_s, outage_teller(job))
    )
    try:
        _work(job)
    except (RunFailed, RegistryError) as refusal:  # all ranks have agreed on it
        ray.get(job.board.finish.remote(refusal))
    except (InputError, ObjectDamaged) as refusal:
        ray.get(job.board.finish.remote(refusal))
        if dist.get_world_size() > 1:
            raise  # the other ranks may wait for this one
    except Exception as error:
        if _is_out_of_memory(error):
            ray.get(job.board.finish.remote(OutOfMemory(str(error).strip().splitlines()[0])))
        raise


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a class for a GPU's memory alone."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate" in said


def outage_teller(job: Job) -> Callable[[Outage], None]:
    """What writes an outage of the store that is over into the run's log."""
    store, run_id = job.store, job.run_id

    def tell(outage: Outage) -> None:
        text = f"the store was out of reach for {outage.seconds:.0f} s from {outage.began_at} on: {outage.error}"
        say(f"warning: {text}")
        with suppress(StoreError):  # it may go on for others than this rank
            runs.tell(store, run_id, text)

    return tell


def _work(job: Job) -> None:
    recipe = job.recipe
    rank = dist.get_rank()
    ray.get(job.board.join.remote(rank, ray.get_runtime_context().get_node_id()))
    torch.set_num_threads(recipe.cluster.cpus_per_worker)
    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    join_process_group()
    dataset = Dataset.fetch(job.store, job.dataset)
    folder = models.fetch(recipe.model, job.base, job.store)
    engine, found = _prepare(job, folder)
    trainer = Trainer(job, engine, dataset, found)
    try:
        state = trainer.train()
    except RunFailed:
        trainer.give_up()
        raise
    metrics = trainer.finish()
    published = None
    if recipe.publish and state == "succeeded":
        if job.licences is None:
            raise RunFailed(f"run {job.run_id} was never judged by its licences, so nothing is published")
        if isinstance(recipe.method, FullConfig):
            published = publish.publish_model(
                engine,
                job.store,
                recipe.publish.name,
                folder,
                recipe.model,
                job.run_id,
                trainer.step,
                metrics,
                job.licences,
            )
        else:
            ids = torch.from_numpy(dataset.sample(0)[0][:PROBE_TOKENS].astype(np.int64))[None]
            published = publish.publish_adapter(
                engine,
                job.store,
                recipe.publish.name,
                job.base,
                recipe.model,
                ids,
                job.run_id,
                trainer.step,
                metrics,
                job.licences,
                folder,
                job.gate,
            )
    if rank == 0:
        checkpoint_key = ray.get(job.board.checkpoint.remote())
        result = {
            "state": state,
            "step": trainer.step,
            "metrics": metrics,
            "checkpoint": checkpoint_key,
            "published": published,
        }
        ray.get(job.board.finish.remote(result))


def _prepare(job: Job, folder: Any) -> tuple[ZeroEngine, checkpoint.Found]:
    """The model in its engine, as the newest checkpoint left it, if the run has one, or the run that it starts from."""
    recipe = job.recipe
    torch.manual_seed(recipe.train.seed)
    model = load_model(folder, recipe.model.dtype, sharded_loading(job.zero, recipe.model.dtype))
    trained = lora.prepare(model, recipe.method, recipe.train.seed, fused=job.zero < 3)
    if recipe.train.activation_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elements = trained_elements(trained)
    found = checkpoint.load_latest(job.store, job.run_id, elements)
    if found.restored:
        put_weights(trained, found.restored, job.zero)
    elif job.parent:
        begin = _load_parent(job.store, job.parent, elements)
        put_weights(trained, begin, job.zero)
        begin.close()
    return ZeroEngine(trained, recipe.optimizer, job.zero, recipe.model.dtype), found


def _load_parent(store: Store, parent: CheckpointRef, elements: Mapping[str, int]) -> checkpoint.Restored:
    try:
        restored = checkpoint.load(store, parent.run_id, parent.step)
        restored.check(elements)
    except (ObjectDamaged, ObjectNotFound) as error:
        others = [str(step) for step in runs.checkpoint_steps(store, parent.run_id) if step != parent.step]
        have = f"name another: from={parent.run_id}@{' or '.join(others)}" if others else "the run has no other"
        raise ObjectDamaged(f"from: {error}; {have}") from error
    except RunFailed as error:
        raise RunFailed(f"from: {error}") from error
    return restored
