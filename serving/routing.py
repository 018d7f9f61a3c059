"""Which replica a request goes to: pure, so that it can be tried on any traffic.

Serve's own router keeps an adapter on the replicas that hold it until they reject, however long their queues are. Here
a replica that does not hold it costs what loading it would, in the same measure as its queue: tokens. So an adapter
stays where it is while that is worth it, and a hot one spreads as soon as waiting would take longer than a load.

Replicas that would do equally well, within `SLACK`, are taken by rendezvous hashing (Thaler & Ravishankar 1998) of
adapter and replica: every ingress comes to the same one without asking the others, and a replica that comes or goes
moves only the adapters that are its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

COLD_TOKENS = 1_000.0
"""What loading an adapter is worth waiting for, in tokens of a replica's queue: a second or so of its work."""

SLACK = 0.25
"""Of COLD_TOKENS: how much longer a queue may be for a replica to be as good as the best."""


@dataclass(frozen=True)
class Candidate:
    """A replica: its id, the tokens that it was given and has not ended, and the digests of the adapters it holds."""

    id: str
    load: float
    holds: frozenset[str]


def rank(candidates: Sequence[Candidate], adapter: str, cold_tokens: float = COLD_TOKENS) -> list[str]:
    """All candidates, the best first, for a request to `adapter`; "" is the bare base, which everybody holds."""
    waits = {
        each.id: each.load + (cold_tokens if adapter and adapter not in each.holds else 0.0) for each in candidates
    }
    good = min(waits.values(), default=0.0) + SLACK * cold_tokens

    def order(each: Candidate) -> tuple[bool, float]:
        if not adapter or adapter in each.holds or waits[each.id] > good:
            return waits[each.id] > good, waits[each.id]
        return False, good - _weight(adapter, each.id)

    return [each.id for each in sorted(candidates, key=order)]


def _weight(adapter: str, replica: str) -> float:
    """From 0 to 1."""
    return int.from_bytes(blake2b(f"{adapter} {replica}".encode(), digest_size=8).digest()) / 2**64
