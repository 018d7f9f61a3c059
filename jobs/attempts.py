"""One start of the workers after another, until the run has an end: what the driver does between them.

    an attempt ends      what follows
    with a result        nothing: that is the run's
    moving               room is looked for again; it has saved, so nothing is lost and no failure is counted
    out of memory        the same global batch in micro-batches of half the size
    in a failure         another attempt from the last checkpoint, `train.max_failures` times; pre-emption is none

Ray Train starts one worker group for each attempt, and never a second one: its own recovery would neither save before
it resizes nor say what happened.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import env, models, secret, session
from cluster.errors import LuthierError, OutOfMemory, RunFailed, StoreError
from cluster.ledger import in_words
from cluster.logs import say
from cluster.models import Shape
from cluster.records import EventKind, RunRecord
from cluster.store import Store
from cluster.who import submitter
from jobs import runs
from jobs.account import Account
from jobs.config import Recipe
from jobs.cost import worker_tokens_per_s
from jobs.gauges import TrainingGauges
from jobs.job import Job
from jobs.memory import GIB
from jobs.plan import make_plan
from jobs.progress import Board
from jobs.pulse import Pulse
from jobs.screen import Screen
from jobs.turn import Turn, ticket

ROOM_S = 600.0
"""How long a run waits for nodes before it gives up, on a cluster that does not scale."""

_SETTLE_S = 10.0  # for the places of workers that have just ended to be free again
_LOOK_S = 1.0


class Attempts:
    """The attempts of one run by one driver.

    Args:
        shape: the base model's, for a new plan when the number of workers changes.
        store: the run's; outlasts outages.
        plain_store: the same without that, to be sent to workers and for what may be missed.
        began: when the driver began, in seconds since 1970.
    """

    def __init__(
        self, record: RunRecord, recipe: Recipe, shape: Shape, store: Store, plain_store: Store, began: float
    ) -> None:
        self._record = record
        self._recipe = recipe
        self._shape = shape
        self._store = store
        self._plain_store = plain_store
        self._failures = 0
        limit = recipe.cluster.memory_gb_per_worker * GIB
        self._gauges = TrainingGauges(record.run_id, limit, worker_tokens_per_s(recipe, shape))
        # On the driver's node, so that no lost worker node takes it along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        self._account = Account(store, record, recipe, self._gauges, began)
        self._pulse = Pulse(
            plain_store, record.run_id, self._board, recipe.cluster, recipe.train.resize_s, self._account
        )

    @property
    def is_replaced(self) -> bool:
        """Whether another driver has taken the run."""
        return self._pulse.is_replaced

    def run(self) -> dict[str, Any]:
        """Train to the end. Returns what rank 0 left on the board. Raises LuthierError."""
        screen = Screen(self._board, self._recipe.name, self._recipe.train.steps, self._gauges)
        watching = threading.Thread(target=screen.watch, daemon=True)
        watching.start()
        try:
            with self._pulse, self._turn():
                while True:
                    result = self._attempt()
                    if result and result["state"] != "moving":
                        return result
                    if self._pulse.is_stopping and not result:
                        raise RunFailed(f"run {self._record.run_id}: it was asked to stop, and failed before it had")
        finally:
            self._settle()
            screen.stop()
            watching.join()
            self._gauges.end()

    def _settle(self) -> None:
        """Have all entries of the ledger in the store, and say what the run has cost."""
        try:
            self._account.close(self._store)
        except StoreError as error:
            say(f"warning: what the run has held since its last entry in the cost ledger is not counted: {error}")
        say(f"cost of the whole run: {in_words(self._account.spent())}")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """On a shared cluster, from its turn to its end. Raises RunFailed when it was stopped before."""
        recipe = self._recipe
        if not recipe.cluster.shared:
            yield
            return
        asked = ticket(self._record.run_id, submitter(), recipe.priority, recipe.train.fewest, recipe.cluster)
        began = time.monotonic()
        with Turn(asked, recipe.cluster) as turn:
            if not turn.wait(self._note, lambda: self._pulse.is_stopping):
                raise RunFailed(f"run {self._record.run_id}: it was stopped while it waited for its turn")
            self._note(f"its turn came after {time.monotonic() - began:.0f} s")
            yield

    def _attempt(self) -> dict[str, Any] | None:
        """One worker group, from its start to its end. Returns its result; None when it is to be tried again."""
        os.environ.setdefault(env.RAY_TRAIN_ENABLE_STATE_TRACKING, "1")  # the dashboard's view of a training job
        # Ray Train imports torch: only now, after everything that may be refused.
        from ray.train import TrainingFailedError

        workers = self._find_room()
        recipe = self._recipe.at(workers=workers)
        job = Job(
            run_id=self._record.run_id,
            recipe=recipe,
            base=self._record.base,
            zero=make_plan(recipe, self._shape).zero,
            dataset=self._record.dataset,
            evaluation=self._record.evaluation,
            parent=self._record.parent,
            store=self._plain_store,
            board=self._board,
            licences=self._record.licences,
            gate=self._record.gate,
        )
        self._pulse.watch(wanted=self._recipe.train.most - workers)
        failure: TrainingFailedError | None = None
        try:
            _trainer(job, workers).fit()
        except TrainingFailedError as error:
            failure = error
            session.release_places()
        finally:
            self._pulse.rest()
        result: dict[str, Any] | LuthierError | None = ray.get(self._board.result.remote())
        if isinstance(result, OutOfMemory):
            self._halve_micro_batch(str(result))
        elif isinstance(result, LuthierError):
            raise result
        elif result and result["state"] == "moving":
            self._tell(f"moved: {self._pulse.moving}", "move")
        elif result:
            return result
        else:
            self._count(failure)
        return result if isinstance(result, dict) else None

    def _count(self, failure: BaseException | None) -> None:
        """Say why an attempt ended, and whether there may be another. Raises RunFailed."""
        why, is_memory = _cause(failure) if failure else ("the workers ended without a result", False)
        if is_memory:
            self._halve_micro_batch(why)
            return
        if self._pulse.hang:
            why = self._pulse.hang
        elif self._pulse.moving:
            self._tell(f"moved before its state was saved: {self._pulse.moving} ({why})", "move")
            return
        self._failures += 1
        self._gauges.failed(self._failures)
        allowed = self._recipe.train.max_failures
        if self._failures > allowed:
            raise RunFailed(f"run {self._record.run_id}: {why} (failure {self._failures}, and {allowed} are allowed)")
        self._tell(f"failure {self._failures} of {allowed} that are allowed: {why}", "failure")

    def _halve_micro_batch(self, why: str) -> None:
        size = self._recipe.train.micro_batch
        if size == 1:
            raise OutOfMemory(
                f"run {self._record.run_id}: out of memory with a micro-batch of 1 ({why}); lower "
                "data.sequence_length, set train.activation_checkpointing: true, or use more workers with train.zero: 3"
            )
        self._recipe = self._recipe.at(micro_batch=size // 2)
        said = f"out of memory ({why}): train.micro_batch is {size // 2} from now on; the global batch stays"
        self._tell(said, "memory")

    def _find_room(self) -> int:
        """How many workers to start: as many as fit, waiting for the fewest that are allowed. Raises RunFailed."""
        train, cluster = self._recipe.train, self._recipe.cluster
        began = time.monotonic()
        is_told = False
        while True:
            waited_s = time.monotonic() - began
            if train.fewest == train.most:
                places = session.capacity(cluster)
            else:
                places = session.room(cluster)
                if places < train.most and waited_s < _SETTLE_S:
                    places = 0  # workers that have just ended may still hold theirs
            if places >= train.fewest:
                return min(places, train.most)
            if cluster.autoscales and waited_s > _SETTLE_S:
                return train.fewest  # asking for them is what makes nodes come
            if waited_s > ROOM_S or self._pulse.is_stopping:
                raise RunFailed(
                    f"run {self._record.run_id}: the cluster has room for {places} of at least {train.fewest} workers "
                    f"since {waited_s:.0f} s; add nodes, or go on with fewer by `luthier jobs resume --workers`"
                )
            if waited_s > _SETTLE_S and not is_told:
                self._tell(f"waiting for room: the cluster has it for {places} of at least {train.fewest} workers")
                is_told = True
            time.sleep(_LOOK_S)

    def _note(self, text: str) -> None:
        say(text)
        runs.tell(self._store, self._record.run_id, text)

    def _tell(self, text: str, kind: EventKind | None = None) -> None:
        say(text)
        runs.tell(self._store, self._record.run_id, text, "resuming", kind=kind)


def _trainer(job: Job, workers: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from jobs.network import OwnAddress

    gpu = job.recipe.cluster.accelerator == "gpu"
    return TorchTrainer(
        _loop(job),
        torch_config=OwnAddress(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": job.recipe.cluster.cpus_per_worker}
        ),
        run_config=RunConfig(
            name=job.run_id,
            # Ray Train's own records; nothing of ours is kept there.
            storage_path=str(models.cache_folder() / "ray-train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def _loop(job: Job) -> Callable[[], None]:
    """What each worker runs. A closure, because Ray Train's config dictionary would lose the types."""

    def loop() -> None:
        secret.load(job.recipe.secrets)
        prepare_environment(job.recipe.cluster.accelerator)
        from jobs.worker import work

        work(job)

    return loop


def prepare_environment(accelerator: str) -> None:
    """Set what deepspeed reads when it is imported, and what it needs to compile its CPU operation only once."""
    if accelerator == "cpu":
        os.environ[env.DS_ACCELERATOR] = "cpu"  # else DeepSpeed takes a GPU that happens to be there
    if sys.prefix != sys.base_prefix:
        # In torch's shared default folder, two virtual environments recompile one another's operation (a minute each).
        os.environ.setdefault(env.TORCH_EXTENSIONS_DIR, f"{Path(sys.prefix).resolve()}/torch_extensions")
    # The ninja beside this interpreter, which an environment that is not activated would miss; and never another one,
    # since two versions of ninja take one another's builds for out of date.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _cause(error: BaseException) -> tuple[str, bool]:
    """What the workers raised first, in a line; and whether it was memory that was too small."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    causes = {rank: _innermost(failure) for rank, failure in sorted(failures.items())}
    for rank, cause in causes.items():
        if type(cause).__name__ == "OutOfMemoryError":  # torch's, and that of Ray's watch over a node's memory
            return f"rank {rank}: {_line(cause)}", True
    # A rank that died takes the others' collectives along, so what they raise is not the cause.
    died = [rank for rank, cause in causes.items() if isinstance(cause, ray.exceptions.RayActorError)]
    if died:
        return f"rank {', '.join(map(str, died))} died", False
    if causes:
        return "; ".join(f"rank {rank}: {_line(cause)}" for rank, cause in causes.items()), False
    return _line(getattr(error, "controller_failure", error)), False


def _innermost(failure: Any) -> BaseException:
    """The error that Ray Train wrapped."""
    for wrapper in ("_base_exc", "health_check_failure"):
        failure = getattr(failure, wrapper, failure)
    found: BaseException = failure
    return found


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
