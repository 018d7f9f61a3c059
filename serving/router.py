"""The policy of routing.py behind Serve's router interface: which replica the ingress hands a call to.

It runs in each ingress, knows what that ingress has given out and not got back, in tokens, and what the replicas say
they hold (affinity.py). A replica that is still loading an adapter counts as holding it, so that a burst for a new
adapter does not load it everywhere. Serve's own limits stay: a replica that rejects is passed by for the next in order.
"""

from collections import defaultdict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from serving.calls import Call, Prompt
from serving.popularity import Popularity
from serving.routing import LOADS_HALF_LIFE, Candidate, rank

_CHARACTERS_PER_TOKEN = 4
_ANSWER_TOKENS = 256
"""What an answer without max_tokens is taken to be."""


class AdapterRouter(RequestRouter):  # type: ignore[misc]
    """Prefers the replica whose queue and, where it is needed, load of the adapter take least."""

    def initialize_state(self, **_: Any) -> None:
        """Called by Serve after its own __init__."""
        # By replica and request: its tokens and its adapter.
        self._given: defaultdict[ReplicaID, dict[str, tuple[float, str]]] = defaultdict(dict)
        self._routed = 0
        self._loads = Popularity(LOADS_HALF_LIFE, lambda: self._routed)  # by replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All of them, in order, each alone in its rank."""
        adapter = pending_request.metadata.multiplexed_model_id if pending_request else ""
        if pending_request:
            pending_request.routing_context.should_backoff = True
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        candidates = [self._candidate(replica) for replica in candidate_replicas]
        under_way = sum(each == adapter for given in self._given.values() for _, each in given.values())
        return [[by_id[each]] for each in rank(candidates, adapter, under_way)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:  # noqa: ARG002
        """Count a call, or the adapter of a prefetch."""
        metadata = pending_request.metadata
        adapter = metadata.multiplexed_model_id
        self._routed += 1
        replica = self.curr_replicas.get(replica_id)
        if adapter and replica is not None and adapter not in self._candidate(replica).holds:
            self._loads.count(replica_id.unique_id)
        tokens = sum(tokens_of(each) for each in pending_request.args if isinstance(each, Call))
        self._given[replica_id][metadata.internal_request_id] = tokens, adapter

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended, whatever way."""
        self._given[replica_id].pop(internal_request_id, None)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget it."""
        super().on_replica_actor_died(replica_id)
        self._given.pop(replica_id, None)

    def _candidate(self, replica: RunningReplica) -> Candidate:
        given = self._given[replica.replica_id].values()
        holds = {*replica.multiplexed_model_ids, *(adapter for _, adapter in given)}
        name = replica.replica_id.unique_id
        return Candidate(name, sum(tokens for tokens, _ in given), frozenset(holds), self._loads.of(name))


def tokens_of(call: Call) -> float:
    """About how many tokens a call is."""
    answer = call.n * (call.max_tokens or _ANSWER_TOKENS)
    return float(sum(_prompt_tokens(prompt) + answer for prompt in call.prompts))


def _prompt_tokens(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt) // _CHARACTERS_PER_TOKEN
    return sum(1 if isinstance(each, int) else len(str(each)) // _CHARACTERS_PER_TOKEN for each in prompt)
