"""How often a row is taken, so that groups weigh what they shall: the same rows for the same seed, on any machine.

A row of weight w is taken floor(w) times, and once more with the probability that is left. The draw is by the row's
number and the seed, so that it does not depend on the order in which parts were done.
"""

import numpy as np
import numpy.typing as npt

from cluster.errors import DataError
from jobs.data.rules import Balance

MAX_GROUPS = 1_000
MAX_COPIES = 100


def weights(counts: dict[str, int], rule: Balance) -> dict[str, float]:
    """How often a row of each group is taken, on average.

    Args:
        counts: rows of each group that stay.

    Raises:
        DataError: a column with too many values to be groups, a weight for a group that is not there, or a group that
            would be repeated more than MAX_COPIES times.
    """
    if len(counts) > MAX_GROUPS:
        raise DataError(
            f"balance.by {rule.by}: {len(counts):,} different values, over {MAX_GROUPS:,}: name a column of classes"
        )
    if rule.do == "measure" or not counts:
        return dict.fromkeys(counts, 1.0)
    if rule.do == "weights":
        if missing := sorted(set(rule.weights) - set(counts)):
            raise DataError(f"balance.weights: no row has {rule.by} {missing[0]!r}; there are: {', '.join(counts)}")
        found = {name: rule.weights.get(name, 1.0) for name in counts}
    else:
        goal = min(counts.values()) if rule.do == "down" else max(counts.values())
        found = {name: goal / count for name, count in counts.items()}
    if too_many := [name for name, weight in found.items() if weight > MAX_COPIES]:
        raise DataError(
            f"balance.{rule.do}: each row of {rule.by} {too_many[0]!r} would be taken {found[too_many[0]]:.0f} times, "
            f"more than {MAX_COPIES}: gather more rows of it, or use do: down or weights"
        )
    return found


def copies(row_weights: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.uint16]:
    """[rows] how often each row is taken."""
    whole = np.floor(row_weights)
    draws = _uniform(np.arange(len(row_weights), dtype=np.uint64), seed)
    taken: npt.NDArray[np.uint16] = (whole + (draws < row_weights - whole)).astype(np.uint16)
    return taken


def _uniform(numbers: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each row, by the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        mixed = (numbers + np.uint64(seed % 2**32) * np.uint64(0x1_0000_0001)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    uniform: npt.NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform
