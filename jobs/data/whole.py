"""What no row alone decides: which rows say the same as an earlier one, and which are in the evaluation data too.

Evaluation files come first in a set, so that a training row's twin in them always is the earlier one. Rows of
evaluation are never taken out: it is for training to leave them alone. Synthetic rows may be like their origin.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jobs.data.examine import CHECKS, KEPT, OUTCOMES, Check, Outcome
from jobs.data.rules import Rules
from jobs.data.table import Numbers, Table

Pairs = Iterable[tuple[int, int, float]]
"""(the row that stays, the one that says the same, their similarity)."""


@dataclass(frozen=True)
class Twin:
    """A row that says what an earlier one says."""

    index: int
    of: int
    similarity: float
    check: Check
    outcome: Outcome


def exact(table: Table) -> Pairs:
    """Each row that stays and whose digest an earlier such row has, with the first of those."""
    alive = np.flatnonzero(table.why == KEPT)
    digests = table.digests[alive]
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: within equal digests the earlier row is first
    ranked = digests[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    firsts: Numbers = order[np.flatnonzero(is_first)][np.cumsum(is_first) - 1] if len(order) else order
    again = ~is_first
    found = np.stack([alive[firsts[again]], alive[order[again]]], axis=1)
    return ((int(of), int(index), 1.0) for of, index in found[np.argsort(found[:, 1])])


def judge(table: Table, pairs: Pairs, rules: Rules, kind: str) -> Iterator[Twin]:
    """What becomes of each pair, written into `table.why` where a row is taken out.

    Args:
        kind: exact or near.
    """
    near = "near " if kind == "near" else ""
    is_evaluation = table.is_evaluation
    leaks, doubles = getattr(rules.leakage, kind), getattr(rules.duplicates, kind)
    for of, index, similarity in pairs:
        if is_evaluation[index] or table.why[index] != KEPT:
            continue
        if near and table.synthetic[index] and not is_evaluation[of]:
            continue  # it was made to be like another one
        check: Check = f"{near}{'leakage' if is_evaluation[of] else 'duplicates'}"  # type: ignore[assignment]
        do = leaks if is_evaluation[of] else doubles
        if do == "off":
            continue
        outcome = OUTCOMES[do]
        if outcome in ("removed", "refused"):
            table.why[index] = CHECKS.index(check) + 1
        yield Twin(index, of, similarity, check, outcome)


def alive(table: Table) -> npt.NDArray[np.bool_]:
    """[rows] whether each stays."""
    found: npt.NDArray[np.bool_] = table.why == KEPT
    return found


def has_line(table: Table) -> npt.NDArray[np.bool_]:
    """[rows] whether a row is among those that its part wrote: its own checks, the first in CHECKS, left it."""
    found: npt.NDArray[np.bool_] = (table.why == KEPT) | (table.why > CHECKS.index("duplicates"))
    return found
