"""How much things are asked for lately: counts that fade, so that what was wanted long ago gives way.

A count halves every `half_life` on the clock it is given. With a clock of requests this is LRFU (Lee et al. 2001): a
half-life of one request orders as "least recently used" does, an endless one as "least frequently used".
"""

from collections.abc import Callable

MAX_REMEMBERED = 4096
"""Things that are counted, here or not; beyond, the less wanted half is forgotten."""

_FORGOTTEN = 0.01


class Popularity:
    """Fading counts by key."""

    def __init__(self, half_life: float, clock: Callable[[], float]) -> None:
        self._half_life = half_life
        self._clock = clock
        self._counted: dict[str, tuple[float, float]] = {}  # how many, as of when

    def count(self, key: str, amount: float = 1.0) -> None:
        """It was asked for."""
        self._counted[key] = self.of(key) + amount, self._clock()
        if len(self._counted) > MAX_REMEMBERED:
            now = self._clock()
            self._counted = {each: (count, now) for each, count in self.most()[: MAX_REMEMBERED // 2]}

    def of(self, key: str) -> float:
        """How much, with what has faded taken off."""
        count, at = self._counted.get(key, (0.0, 0.0))
        return count * float(2 ** ((at - self._clock()) / self._half_life))

    def most(self) -> list[tuple[str, float]]:
        """Everything that counts for something still, the most popular first."""
        found = [(key, self.of(key)) for key in self._counted]
        return sorted((each for each in found if each[1] >= _FORGOTTEN), key=lambda each: -each[1])
