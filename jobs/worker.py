"""The training loop of one worker, from its share of the first batch to the published result.

    next global batch → forward → loss → backward → step → record; now and then a checkpoint

Runs inside Ray Train's worker group: torch.distributed is up (gloo on CPUs, NCCL on GPUs), one process a worker.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from cluster import keys, models
from cluster.errors import InputError, ObjectDamaged, RegistryError, RunFailed
from jobs import checkpoint, lora, publish, runs
from jobs.config import FullConfig
from jobs.dataset import Dataset
from jobs.job import Job
from jobs.kernels import keep_freed_memory, summed_cross_entropy
from jobs.model import load_model
from jobs.objectives import PackedRow, pack_row, supervised_logits
from jobs.packing import SampleSchedule
from jobs.progress import Recorder, StepRecord
from jobs.schedule import learning_rate
from jobs.zero import ZeroEngine, join_process_group, put_weights, sharded_loading

PROBE_TOKENS = 64


def work(job: Job) -> None:
    """Train, checkpoint, publish; the result, or a refusal, is left on the board.

    Ray Train starts the workers again after any error that they raise. A refusal (a model, data or an adapter that
    cannot be used, a loss that is not finite) would only be met again, so it is told and not raised.
    """
    try:
        _work(job)
    except (InputError, RegistryError, ObjectDamaged, RunFailed) as refusal:
        ray.get(job.board.finish.remote(refusal))


def _work(job: Job) -> None:
    recipe = job.recipe
    torch.set_num_threads(recipe.cluster.cpus_per_worker)
    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    join_process_group()
    dataset = Dataset.fetch(job.store, job.dataset)
    folder = models.fetch(recipe.model, job.base, job.store)
    engine, restored = _prepare(job, folder)
    trainer = Trainer(job, engine, dataset, restored)
    is_whole = trainer.train()
    metrics = trainer.finish()
    published = None
    if recipe.publish and is_whole:
        if isinstance(recipe.method, FullConfig):
            published = publish.publish_model(engine, job.store, recipe.publish.name, folder, recipe.model, job.run_id)
        else:
            ids = torch.from_numpy(dataset.sample(0)[0][:PROBE_TOKENS].astype(np.int64))[None]
            published = publish.publish_adapter(
                engine, job.store, recipe.publish.name, job.base, recipe.model, ids, job.run_id, trainer.step, metrics
            )
    if dist.get_rank() == 0:
        result = {
            "state": "succeeded" if is_whole else "stopped",
            "step": trainer.step,
            "metrics": metrics,
            "checkpoint": trainer.last_checkpoint,
            "published": published,
        }
        ray.get(job.board.finish.remote(result))


def _prepare(job: Job, folder: Any) -> tuple[ZeroEngine, checkpoint.Restored | None]:
    """The model in its engine, as the newest checkpoint left it, if the run has one."""
    recipe = job.recipe
    torch.manual_seed(recipe.train.seed)
    model = load_model(folder, recipe.model.dtype, sharded_loading(job.zero, recipe.model.dtype))
    trained = lora.prepare(model, recipe.method, recipe.train.seed, fused=job.zero < 3)
    if recipe.train.activation_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    restored = checkpoint.load_latest(job.store, job.run_id)
    if restored:
        put_weights(trained, restored.states, job.zero)
    return ZeroEngine(trained, recipe.optimizer, job.zero, recipe.model.dtype), restored


class Trainer:
    """The loop and its position: `step` is the next optimizer step."""

    def __init__(self, job: Job, engine: ZeroEngine, dataset: Dataset, restored: checkpoint.Restored | None) -> None:
        recipe = job.recipe
        self._job = job
        self._engine = engine
        self._dataset = dataset
        self._rank = dist.get_rank()
        self._schedule = SampleSchedule(
            dataset.lengths,
            recipe.train.seed,
            recipe.data.sequence_length,
            recipe.data.packing,
            recipe.train.global_batch,
        )
        self.total_steps = recipe.train.steps or (recipe.train.epochs or 1) * self._schedule.steps_per_epoch
        self.step = 0
        self.last_checkpoint: str | None = None
        self._samples_seen = 0
        self._stall_s = 0.0
        self._last: StepRecord | None = None
        if restored:
            self._resume(restored)
        self._is_stopping = False
        self._recorder = self._begin_attempt() if self._rank == 0 else None

    def train(self) -> bool:
        """Every step that is left, each recorded, with the checkpoints that the recipe asks for.

        Returns False when the run was asked to stop; its state is then saved.
        """
        every = self._job.recipe.checkpoint.every_steps
        while self.step < self.total_steps and not self._is_stopping:
            self._last = self._one_step()
            if self._recorder:
                self._recorder.record(self._last)
            self.step += 1
            if self._is_stopping or self.step == self.total_steps or (every and self.step % every == 0):
                self._save()
        return self.step == self.total_steps

    def finish(self) -> dict[str, float]:
        """Close the records. Returns the run's figures."""
        metrics = {"loss": self._last.loss} if self._last else self._metrics_of_earlier_attempt()
        if self._job.evaluation and self.step == self.total_steps:
            metrics["evaluation_loss"] = self._evaluate(Dataset.fetch(self._job.store, self._job.evaluation))
        if self._recorder:
            self._recorder.close()
        return metrics

    def _metrics_of_earlier_attempt(self) -> dict[str, float]:
        """The loss, when a restart found all steps done."""
        steps = list(runs.read_steps(self._job.store, self._job.run_id))
        return {"loss": steps[-1]["loss"]} if steps else {}

    def _one_step(self) -> StepRecord:
        recipe, engine = self._job.recipe, self._engine
        began, cpu_began = time.perf_counter(), time.process_time()
        samples = np.concatenate(self._schedule.batch(self.step))
        supervised = int(self._dataset.supervised_counts[samples].sum())
        rows = self._rows(self._schedule.share(self.step, self._rank, engine.world_size))
        data_wait_s = time.perf_counter() - began

        engine.module.train()
        loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        for index, row in enumerate(rows):
            # Dropout draws from a generator that the data alone decides, so that it is the same at any world size.
            torch.manual_seed(hash((recipe.train.seed, self.step, row.first_sample)) & 0xFFFFFFFF)
            logits = supervised_logits(engine.engine, row)
            share = summed_cross_entropy(logits, row.targets) * (row.weight / supervised)
            engine.accumulate(share, last=index == len(rows) - 1)
            loss += share.detach()
        rate = learning_rate(self.step, self.total_steps, recipe.optimizer.learning_rate, recipe.schedule)
        norm = engine.step(rate)
        loss = self._agree(loss, norm)

        self._samples_seen += len(samples)
        tokens = int(self._dataset.lengths[samples].sum())
        seconds = time.perf_counter() - began
        stall_s, self._stall_s = self._stall_s, 0.0
        return StepRecord(
            step=self.step,
            loss=loss.item(),
            grad_norm=norm,
            lr=rate,
            tokens=tokens,
            supervised_tokens=supervised,
            samples_seen=self._samples_seen,
            tokens_per_s=tokens / seconds,
            step_s=seconds,
            cpu_s=time.process_time() - cpu_began,
            data_wait_s=data_wait_s,
            checkpoint_stall_s=stall_s,  # of the checkpoint before this step
            padding_fraction=0.0,  # rows are as long as their samples
            world_size=engine.world_size,
        )

    def _agree(self, loss: Tensor, norm: float) -> Tensor:
        """The step's loss over all ranks; and in the same message, whether to stop. Raises RunFailed on every rank."""
        asked = self._recorder is not None and self._recorder.is_stopping()
        both = torch.stack([loss, loss.new_tensor(float(asked))])
        dist.all_reduce(both)
        self._is_stopping = bool(both[1])
        if not (torch.isfinite(both[0]) and math.isfinite(norm)):
            if self._recorder:
                self._recorder.close()
            raise RunFailed(
                f"run {self._job.run_id}: in step {self.step + 1} the loss is {both[0]:g} and the gradient's norm "
                f"{norm:g}, so no step after it would mean anything; lower optimizer.learning_rate or "
                f"optimizer.clip_norm, or lengthen schedule.warmup_steps (last checkpoint: {self.last_checkpoint})"
            )
        return both[0]

    def _begin_attempt(self) -> Recorder:
        """Rank 0: note the start of this attempt, and what it has to do again."""
        job = self._job
        done = list(runs.read_steps(job.store, job.run_id))
        number = runs.begin_attempt(job.store, job.run_id, self.step, self._engine.world_size)
        lost = [step for step in done if step["step"] >= self.step]
        again = f"; {len(lost)} step(s) are done again" if lost else ""
        runs.tell(
            job.store,
            job.run_id,
            f"attempt {number}: training from step {self.step} of {self.total_steps} on "
            f"{self._engine.world_size} worker(s){again}",
            "running",
            step=self.step,
            steps_lost=len(lost),
            seconds_lost=round(sum(step["step_s"] for step in lost), 3),
        )
        return Recorder(job.store, job.run_id, number, job.board)

    def _rows(self, packs: Sequence[npt.NDArray[np.int64]]) -> list[PackedRow]:
        """This rank's micro-batches: `micro_batch` packs to a row."""
        size = self._job.recipe.train.micro_batch
        groups = [packs[first : first + size] for first in range(0, len(packs), size)]
        return [self._row(np.concatenate(group)) for group in groups]

    def _row(self, samples: npt.NDArray[np.int64]) -> PackedRow:
        return row_of(self._dataset, samples).to(self._engine.device)

    def _save(self) -> None:
        began = time.perf_counter()
        job = self._job
        if self._recorder:
            if self._is_stopping:
                text = f"asked to stop: saving after step {self.step}"
                runs.tell(job.store, job.run_id, text, "saving", step=self.step)
            self._recorder.settle()
        self.last_checkpoint = checkpoint.save(self._engine, job.store, job.run_id, self.step, self._samples_seen)
        self._stall_s = time.perf_counter() - began

    def _resume(self, restored: checkpoint.Restored) -> None:
        """Continue at the checkpoint's step. The moments exist only after a step, so one is taken at rate 0."""
        row = self._row(np.empty(0, np.int64))
        self._engine.module.train()
        self._engine.accumulate(supervised_logits(self._engine.engine, row).sum() * 0.0, last=True)
        self._engine.step(0.0)
        self._engine.restore_moments(restored.states, restored.updates)
        self.step, self._samples_seen = restored.next_step, restored.samples_seen
        self.last_checkpoint = keys.checkpoint_manifest(self._job.run_id, restored.next_step)

    @torch.no_grad()
    def _evaluate(self, dataset: Dataset) -> float:
        """Mean cross-entropy per supervised token over a dataset, its samples shared out over the ranks."""
        self._engine.module.eval()
        capacity = self._job.recipe.data.sequence_length
        schedule = SampleSchedule(dataset.lengths, 0, capacity, True, self._engine.world_size)
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for step in range(schedule.steps_per_epoch):
            (pack,) = schedule.share(step, self._rank, self._engine.world_size)
            row = row_of(dataset, pack).to(self._engine.device)
            total += summed_cross_entropy(supervised_logits(self._engine.engine, row), row.targets) * row.weight
        dist.all_reduce(total)
        return float(total.item() / dataset.supervised_counts.sum())


def row_of(dataset: Dataset, samples: npt.NDArray[np.int64]) -> PackedRow:
    """A row of these samples; without any, one that weighs nothing, since every rank must join every collective."""
    return pack_row(dataset, samples) if len(samples) else pack_row(dataset, np.zeros(1, np.int64), weight=0.0)
