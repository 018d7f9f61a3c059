"""The training loop of one worker.

next global batch → forward → loss → backward → step → record; now and then a checkpoint
"""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import LuthierError, RunFailed, StoreError
from cluster.logs import say
from jobs import checkpoint, runs
from jobs.checkpoint import Retention
from jobs.dataset import Dataset
from jobs.job import Job
from jobs.kernels import summed_cross_entropy
from jobs.objectives import PackedRow, pack_row, supervised_logits
from jobs.packing import SampleSchedule
from jobs.progress import Recorder, RemoteBoard, StepRecord
from jobs.saver import Position, Saver
from jobs.schedule import learning_rate
from jobs.watchdog import Watchdog
from jobs.zero import ZeroEngine

State = Literal["succeeded", "stopped", "moving"]
"""How an attempt ends that does not fail. A moving run has saved its state, and goes on in another attempt."""


class Trainer:
    """The loop and its position: `step` is the next optimizer step."""

    def __init__(self, job: Job, engine: ZeroEngine, dataset: Dataset, found: checkpoint.Found) -> None:
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
        self._samples_seen = 0
        self._stall_s = 0.0
        self._skipped_in_a_row = 0
        self._last: StepRecord | None = None
        self._measured: tuple[int, float] | None = None  # after which step, and the evaluation loss then
        self._evaluation = self._fetch_evaluation()
        if found.restored:
            self._resume(found.restored)
        self._asked: State | None = None
        self._is_any_full = False
        attempt: list[Any] = [self._begin_attempt(found) if self._rank == 0 else None]
        dist.broadcast_object_list(attempt)
        self._recorder = Recorder(job.store, job.run_id, attempt[0], job.board) if self._rank == 0 else None
        keep = recipe.checkpoint
        retention = Retention(keep.keep_last, keep.keep_best, keep.keep_every_steps)
        self._saver = Saver(engine, job.store, job.run_id, attempt[0], self._rank, RemoteBoard(job.board), retention)
        self._watchdog = Watchdog(job.board, self._rank)

    def train(self) -> State:
        """Every step that is left, each recorded, with the checkpoints that the recipe asks for.

        Returns early, with the state on its way to the store, when the run is asked to stop or to move.
        """
        every = self._job.recipe.checkpoint.every_steps
        is_due = False
        while self.step < self.total_steps and not self._asked:
            self._last = self._one_step()
            if self._recorder:
                self._recorder.record(self._last)
            self.step += 1
            is_due |= bool(every and self.step % every == 0)
            is_end = self._asked is not None or self.step == self.total_steps
            # A skipped step is no state to go back to. A due checkpoint waits for room on every rank, but for the last.
            if not self._last.skipped and (is_end or (is_due and not self._is_any_full)):
                self._save()
                is_due = False
        self._watchdog.pause()
        return "succeeded" if self.step == self.total_steps else self._asked or "stopped"

    def finish(self) -> dict[str, float]:
        """Have everything in the store. Returns the run's figures."""
        metrics = self._figures()
        if self._evaluation and self.step == self.total_steps:
            metrics["evaluation_loss"] = self._measure(self._evaluation)
        self._close()
        return metrics

    def give_up(self) -> None:
        """Have in the store what can still get there."""
        self._watchdog.pause()
        if isinstance(self._saver.failure, StoreError):
            return
        with suppress(LuthierError):
            self._saver.close()
        with suppress(LuthierError):
            if self._recorder:
                self._recorder.close()

    def _close(self) -> None:
        self._saver.close()
        if self._recorder:
            self._recorder.close()
        self._watchdog.close()
        dist.barrier()  # every shard is stored, so the last checkpoint is committed

    def _figures(self) -> dict[str, float]:
        """The last step's loss, also when a restart found all steps done."""
        if self._last:
            return {"loss": self._last.loss} if self._last.loss is not None else {}
        steps = [step["loss"] for step in runs.read_steps(self._job.store, self._job.run_id)]
        return {"loss": steps[-1]} if steps and steps[-1] is not None else {}

    def _one_step(self) -> StepRecord:
        recipe, engine, mark = self._job.recipe, self._engine, self._watchdog.mark
        began, cpu_began = time.perf_counter(), time.process_time()
        mark(f"step {self.step}: reading samples")
        samples = np.concatenate(self._schedule.batch(self.step))
        supervised = int(self._dataset.supervised_counts[samples].sum())
        rows = self._rows(self._schedule.share(self.step, self._rank, engine.world_size))
        data_wait_s = time.perf_counter() - began

        engine.module.train()
        loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        for index, row in enumerate(rows):
            mark(f"step {self.step}: forward and backward of micro-batch {index}")
            # Dropout draws from a generator that the data alone decides, so that it is the same at any world size.
            torch.manual_seed(hash((recipe.train.seed, self.step, row.first_sample)) & 0xFFFFFFFF)
            # No name for the logits: it would hold them through the backward pass and into the next micro-batch.
            share = summed_cross_entropy(supervised_logits(engine.engine, row), row.targets) * (row.weight / supervised)
            engine.accumulate(share, last=index == len(rows) - 1)
            loss += share.detach()
        rate = learning_rate(self.step, self.total_steps, recipe.optimizer.learning_rate, recipe.schedule)
        self._settle()
        mark(f"step {self.step}: reduction of gradients and the optimizer's step")
        norm = engine.step(rate)
        mark(f"step {self.step}: reduction of the loss")
        loss, memory_bytes = self._agree(loss)
        is_finite = self._judge(loss.item(), norm)
        self._watchdog.step_done()

        self._samples_seen += len(samples)
        tokens = int(self._dataset.lengths[samples].sum())
        seconds = time.perf_counter() - began
        stall_s, self._stall_s = self._stall_s, 0.0
        return StepRecord(
            step=self.step,
            loss=loss.item() if is_finite else None,
            grad_norm=norm if is_finite else None,
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
            memory_bytes=memory_bytes,
            skipped=not is_finite,
        )

    def _settle(self) -> None:
        """Let the copy of the state be finished, before the optimizer changes it."""
        began = time.perf_counter()
        self._saver.settle()
        self._stall_s += time.perf_counter() - began

    def _agree(self, loss: Tensor) -> tuple[Tensor, int]:
        """The step's loss over all ranks, and the memory of the fullest; and in the same message what all do next.

        Raises RunFailed on every rank.
        """
        requests = self._recorder.requests() if self._recorder else set()
        mine = ("stop" in requests, "move" in requests, self._saver.is_full, self._saver.failure is not None)
        memory = [0.0] * self._engine.world_size  # a place each, since a sum is what all else needs
        memory[self._rank] = float(self._engine.held_bytes())
        message = torch.cat([loss[None], loss.new_tensor([*map(float, mine), *memory])])
        dist.all_reduce(message)
        stop, move, self._is_any_full, has_failed = (bool(flag) for flag in message[1 : 1 + len(mine)])
        self._asked = "stopped" if stop else "moving" if move else None
        if has_failed:
            raise self._saver.failure or RunFailed(f"run {self._job.run_id}: a rank can store no checkpoint any more")
        return message[0], int(message[1 + len(mine) :].max())

    def _judge(self, loss: float, norm: float) -> bool:
        """Whether the step counted; one that is not finite changed nothing. Raises RunFailed after many in a row."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._skipped_in_a_row = 0
            return True
        self._skipped_in_a_row += 1
        text = f"step {self.step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}"
        allowed = self._job.recipe.train.max_skipped
        if self._skipped_in_a_row > allowed:
            after = f", after {allowed} such steps in a row that were skipped" if allowed else ""
            raise RunFailed(
                f"run {self._job.run_id}: {text}{after}; lower "
                "optimizer.learning_rate or optimizer.clip_norm, lengthen schedule.warmup_steps, or look at the samples"
            )
        if self._recorder:
            self._recorder.tell(f"{text}, so it is skipped", step=self.step + 1, kind="skipped")
        return False

    def _begin_attempt(self, found: checkpoint.Found) -> int:
        """Rank 0: note the start of this attempt, and what it has to do again. Returns its number."""
        job = self._job
        for reason in found.passed_over:
            say(f"warning: {reason}")
            runs.tell(job.store, job.run_id, reason)
        done = list(runs.read_steps(job.store, job.run_id))
        world_size, micro_batch = self._engine.world_size, job.recipe.train.micro_batch
        number = runs.begin_attempt(job.store, job.run_id, self.step, world_size, micro_batch)
        lost = [step for step in done if step["step"] >= self.step]
        again = f"; {len(lost)} step(s) are done again" if lost else ""
        runs.tell(
            job.store,
            job.run_id,
            f"attempt {number}: training from step {self.step} of {self.total_steps} on {world_size} worker(s){again}",
            "running",
            kind="attempt",
            step=self.step,
            steps_lost=len(lost),
            seconds_lost=round(sum(step["step_s"] for step in lost), 3),
        )
        return number

    def _rows(self, packs: Sequence[npt.NDArray[np.int64]]) -> list[PackedRow]:
        """This rank's micro-batches: `micro_batch` packs to a row."""
        size = self._job.recipe.train.micro_batch
        groups = [packs[first : first + size] for first in range(0, len(packs), size)]
        return [self._row(np.concatenate(group)) for group in groups]

    def _row(self, samples: npt.NDArray[np.int64]) -> PackedRow:
        return row_of(self._dataset, samples).to(self._engine.device)

    def _save(self) -> None:
        if self._asked and self._recorder:
            why = "asked to stop" if self._asked == "stopped" else "about to move"
            self._recorder.tell(f"{why}: saving after step {self.step}", step=self.step, state="saving")
        metric = self._last.loss if self._last else None
        if self._evaluation and self._job.recipe.checkpoint.evaluate:
            self._watchdog.pause()
            metric = self._measure(self._evaluation)
        began = time.perf_counter()
        if self._saver.is_full:
            self._watchdog.pause()  # the last checkpoint waits for the store, as long as that takes
        position = Position(self.step, self._engine.updates(), self._samples_seen, metric)
        self._saver.begin(position, self._recorder.flush() if self._recorder else ())
        self._stall_s += time.perf_counter() - began

    def _resume(self, restored: checkpoint.Restored) -> None:
        """Continue at the checkpoint's step. The moments exist only after a step, so one is taken at rate 0."""
        row = self._row(np.empty(0, np.int64))
        self._engine.module.train()
        self._engine.accumulate(supervised_logits(self._engine.engine, row).sum() * 0.0, last=True)
        self._engine.step(0.0)
        self._engine.restore_moments(restored, restored.updates)
        self.step, self._samples_seen = restored.next_step, restored.samples_seen
        restored.close()

    def _fetch_evaluation(self) -> Dataset | None:
        """The held-out samples. Without them the run goes on, and says so: they measure, and change nothing."""
        job = self._job
        if not job.evaluation:
            return None
        try:
            dataset, error = Dataset.fetch(job.store, job.evaluation), None
        except LuthierError as missing:
            dataset, error = None, missing
        everywhere = torch.tensor(float(dataset is not None), device=self._engine.device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        if bool(everywhere):
            return dataset
        if error:
            runs.tell(job.store, job.run_id, f"there is no evaluation: {error}")
        return None

    def _measure(self, dataset: Dataset) -> float:
        """The loss on the held-out samples now, also told to the run's log; measured once a step."""
        if self._measured and self._measured[0] == self.step:
            return self._measured[1]
        loss = self._evaluate(dataset)
        self._measured = (self.step, loss)
        if self._recorder:
            text = f"evaluation loss {loss:.4f} after step {self.step}"
            self._recorder.tell(text, self.step, kind="evaluation", evaluation_loss=loss)
        return loss

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
