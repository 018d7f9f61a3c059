"""Which replica a request goes to: pure, so that it can be tried on any traffic.

Serve's own router keeps an adapter on the replicas that hold it until they reject, however long their queues are. Here
a replica that does not hold it costs what loading it would, in the same measure as its queue: tokens. The cost is
shared by those who have use of the load, so that a hot adapter spreads as soon as waiting would take longer than its
part, and then levels the queues of the replicas that hold it; a cold one stays where it is, and takes no second place.

Of replicas that would do equally well, within `TIE_TOKENS`, and do not hold the adapter, that one loads it which had to
load least lately: a new one first, and then all come to have about as much worth keeping. Where they are equal in this,
too, rendezvous hashing decides (Thaler & Ravishankar 1998), so that ingresses that know nothing yet agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

LOAD_TOKENS = 2_000.0
"""What loading an adapter is worth waiting for, in tokens of a replica's queue: a second or so of its work for the
load, and as much again for what leaves its place and is loaded anew later."""

UNEVENNESS = 3.0
"""Of the mean queue: added to LOAD_TOKENS. A replica computes its requests together, so that the longer queues are, the
less a difference of a few requests matters."""

TIE_TOKENS = 500.0
"""How much longer a queue may be for a replica to be as good as the best: about two requests."""

LOADS_HALF_LIFE = 1024.0
"""After how many requests a load counts half in what a replica had to load lately."""


@dataclass(frozen=True)
class Candidate:
    """A replica: its id, the tokens that it was given and has not ended, the digests of the adapters it holds, and how
    many it had to load lately."""

    id: str
    load: float
    holds: frozenset[str]
    loads: float = 0.0


def cost_of_loading(candidates: Sequence[Candidate], under_way: int) -> float:
    """In tokens of a queue, for one request more beside those for the same adapter that are under way anywhere."""
    mean = sum(each.load for each in candidates) / max(1, len(candidates))
    return (LOAD_TOKENS + UNEVENNESS * mean) / (1 + under_way)


def rank(candidates: Sequence[Candidate], adapter: str, under_way: int = 0) -> list[str]:
    """All candidates, the best first, for a request to `adapter`; "" is the bare base, which everybody holds."""
    cost = cost_of_loading(candidates, under_way)
    holders = {each.id for each in candidates if not adapter or adapter in each.holds}
    waits = {each.id: each.load + (0.0 if each.id in holders else cost) for each in candidates}
    good = min(waits.values(), default=0.0) + TIE_TOKENS

    def order(each: Candidate) -> tuple[int, float, float]:
        if waits[each.id] > good:
            return 2, waits[each.id], 0.0
        if each.id in holders:
            return 0, waits[each.id], 0.0
        return 1, each.loads, -weight(adapter, each.id)

    return [each.id for each in sorted(candidates, key=order)]


def weight(adapter: str, replica: str) -> float:
    """How much rendezvous hashing prefers one replica for one adapter, from 0 to 1."""
    return int.from_bytes(blake2b(f"{adapter} {replica}".encode(), digest_size=8).digest()) / 2**64
