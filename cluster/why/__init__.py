"""Why nothing happens: the one cause, what shows it, and what to do about it.

    gather (asks the dashboard, and the store) → Facts → explain (pure) → Finding

facts      what is known of a cluster at one moment
finding    what the answer may be
room       what waits for room, what room there is, and what could come
ended      rules: what cannot be asked, has ended, or cannot start whatever room there is
stuck      rules: what waits for a place, and why none comes
awake      rules: what runs and does no good; and what to say when nothing is wrong
gather     the edge: reads Facts by the dashboard's REST alone
lists      what the dashboard's lists hold, as facts
autoscaler what Ray's autoscaler does, read from its log and the cluster's status
"""

from collections.abc import Callable, Sequence

from cluster.why import awake, ended, stuck
from cluster.why.facts import Facts
from cluster.why.finding import Finding

RULES: Sequence[Callable[[Facts], Finding | None]] = (
    *(ended.over, ended.refused, ended.disk, ended.environment, ended.failed, ended.lost, ended.replica),
    *(stuck.infeasible, stuck.autoscaler, stuck.held, stuck.capacity, stuck.cap),
    *(awake.forgotten, awake.adapter, awake.pinned, awake.unread),
)
"""From what explains everything to what explains one thing; the first that finds something is the answer.

What has ended well; a cluster that cannot be asked; a node that can no longer write; what has ended badly; then why
what waits has no place, where that which no waiting will mend comes first; then what runs and does no good.
"""


def explain(facts: Facts) -> Finding:
    """The one answer."""
    found = (finding for rule in RULES if (finding := rule(facts)) is not None)
    return next(found, None) or awake.nothing(facts)
