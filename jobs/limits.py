"""Limits of a run in hours and money: looked at before anything is spent, and while it runs.

They count over the whole run, under whichever drivers. Hours are those in which workers are held, however many; the
wait for a turn or for nodes is none. Money is all that the ledger counts. Who reaches a limit saves after the step
that it is at, so a limit is overrun by a step and a checkpoint, and by the seconds between two looks (`pulse.LOOK_S`).
"""

from pathlib import Path

from cluster import prices
from cluster.errors import ConfigError, Fault, InputError, PlanError
from cluster.ledger import Spent
from cluster.models import Shape
from jobs.config import LimitsConfig, Recipe
from jobs.cost import Cost, estimate_cost, estimate_work


def check(recipe: Recipe) -> None:
    """Raise ConfigError for a limit in money where something that the run may hold has no price."""
    if recipe.limits.usd is None:
        return
    advice = (
        f"has no price, and limits.usd is {recipe.limits.usd:g}; write its US dollars an hour into `prices:` of "
        f"configs/clusters/{recipe.cluster.name}.yaml, or as {{key}}=… on the command line"
    )
    faults = [Fault("limits.usd", key, advice.format(key=key)) for key in prices.unknown(recipe.cluster)]
    if faults:
        raise ConfigError(faults)


def check_plan(recipe: Recipe, shape: Shape, folder: Path) -> None:
    """Raise ConfigError as `check`, and PlanError when the least that the run can take is above a limit.

    Args:
        folder: what paths of data files count from.
    """
    check(recipe)
    if recipe.limits.hours is not None or recipe.limits.usd is not None:
        cost = estimate_cost(recipe, shape, estimate_work(recipe, folder), None)
        if refusals := above(recipe, cost):
            raise PlanError("; ".join(refusals))


def above(recipe: Recipe, cost: Cost) -> list[str]:
    """The limits that the least which was estimated is above, in words."""
    limits, train, found = recipe.limits, recipe.train, []
    if limits.hours is not None and cost.hours and (least := cost.hours.low * train.fewest / train.most) > limits.hours:
        found.append(
            f"the run takes {least:.2f} hours at least on {train.most} worker(s), and limits.hours is "
            f"{limits.hours:g}; raise it, or train for fewer steps or on more workers"
        )
    if limits.usd is not None and cost.usd and cost.usd.low > limits.usd:
        found.append(
            f"the run costs ${cost.usd.low:,.2f} at least, and limits.usd is {limits.usd:g}; raise it, or train for "
            "fewer steps"
        )
    return found


def reached(limits: LimitsConfig, spent: Spent) -> str | None:
    """The limit that is used up, in words; None while there is none."""
    if limits.hours is not None and spent.hours >= limits.hours:
        return f"limits.hours {limits.hours:g} is reached (workers were held for {spent.hours:.4g} hours)"
    if limits.usd is not None and spent.known_usd >= limits.usd:
        return f"limits.usd {limits.usd:g} is reached (${float(spent.known_usd):,.4g} were spent)"
    return None


def check_left(run_id: str, limits: LimitsConfig, spent: Spent) -> None:
    """Raise InputError where a run that is to go on has nothing left, or where that cannot be told."""
    if limits.usd is not None and not spent.is_whole:
        raise InputError(
            f"run {run_id}: some of what it has held so far had no price, so limits.usd cannot count it; limit what is "
            "to come by limits.hours"
        )
    if why := reached(limits, spent):
        key = why.partition(" ")[0]
        again = f"`luthier jobs resume {run_id} {key}=… --store …`"
        raise InputError(f"run {run_id}: {why}, over all that it has done; {again} goes on with a higher one")


def share(limits: LimitsConfig, spent: Spent) -> float | None:
    """How much of the nearest limit is used, 1 where all is; None without a limit."""
    shares = []
    if limits.hours is not None:
        shares.append(spent.hours / limits.hours)
    if limits.usd is not None:
        shares.append(float(spent.known_usd) / limits.usd)
    return max(shares, default=None)


def overrides(max_hours: float | None, max_cost: float | None) -> list[str]:
    """`--max-hours` and `--max-cost` as the overrides that they are."""
    given = {"limits.hours": max_hours, "limits.usd": max_cost}
    return [f"{key}={value!r}" for key, value in given.items() if value is not None]
