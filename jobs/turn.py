"""A job's place in the queue of a shared cluster, held from the moment it asks until it ends.

with Turn(ticket, cluster) as turn:
    turn.wait(...)      # until all of its workers fit, and nobody goes before it
    …                   # it trains; a thread goes on telling the queue that it lives
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import ray

from cluster import queue, session
from cluster.launch.spec import OnPremises
from cluster.logs import say
from cluster.place import ClusterConfig
from cluster.queue import Answer, Queue, Ticket

_ANSWER_S = 10.0
HEAD = "node:__internal_head__"  # Ray's own resource of the head, so that no node that goes takes the queue along


class Turn:
    """One job in the queue; out of it when the block ends, or when the driver dies."""

    def __init__(self, ticket: Ticket, cluster: ClusterConfig) -> None:
        self._ticket = ticket
        self._cluster = cluster
        self._queue = (
            ray.remote(num_cpus=0, resources={HEAD: 0.001}, max_restarts=-1)(Queue)
            .options(name=queue.NAME, namespace=queue.NAMESPACE, lifetime="detached", get_if_exists=True)
            .remote()
        )
        self._is_in = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._stay, name="luthier-turn", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._is_in:
            self._thread.join()
        self._queue.leave.remote(self._ticket.id)

    def wait(self, tell: Callable[[str], None], is_stopping: Callable[[], bool]) -> bool:
        """Wait for the turn; whether it came, or the wait was given up.

        Args:
            tell: is called with what the job waits for, whenever that changes.
        """
        told = ""
        while not is_stopping():
            answer = self._ask()
            if answer and answer.is_in:
                self._is_in = True
                self._thread.start()
                return True
            if answer and answer.why != told:
                told = answer.why
                tell(f"waiting for its turn: {told}")
            self._ended.wait(queue.ASK_S)
        return False

    def _stay(self) -> None:
        while not self._ended.wait(queue.ASK_S):
            self._ask()

    def _ask(self) -> Answer | None:
        try:
            answer: Answer = ray.get(
                self._queue.ask.remote(self._ticket, _nodes(self._cluster), self._is_in), timeout=_ANSWER_S
            )
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            say(f"warning: the queue does not answer ({type(error).__name__}); asking again")
            return None
        return answer


def _nodes(cluster: ClusterConfig) -> Sequence[Mapping[str, float]] | None:
    if not cluster.autoscales:
        return session.nodes()
    if cluster.provider is None or isinstance(cluster.provider, OnPremises):
        return None
    groups = cluster.provider.groups.values()
    return [{"CPU": group.cpus, "GPU": group.gpus} for group in groups for _ in range(group.max)]


def ticket(run_id: str, user: str, priority: int, workers: int, cluster: ClusterConfig) -> Ticket:
    """What a run asks for: its fewest workers."""
    each: dict[str, Any] = session.per_worker(cluster)
    return Ticket(run_id, user, workers, each, priority)
