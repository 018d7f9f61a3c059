"""Limits in hours and money: refused beforehand where that can be known, and counted over the whole run."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import load
from cluster.errors import ConfigError, InputError, PlanError, exit_code
from cluster.ledger import MS_PER_HOUR, Spent
from cluster.licences.gate import Gate
from cluster.models import Shape
from jobs import limits
from jobs.cli import app
from jobs.config import LimitsConfig, Recipe
from jobs.driver import RESUMABLE
from jobs.plan import Survey, shape_of

RECIPE = Path("configs/recipes/support.yaml")
ON_GPUS = ("train.steps=1000", "train.epochs=null")


def recipe(*overrides: str) -> Recipe:
    return load(RECIPE, Recipe, [*ON_GPUS, *overrides])


def shape(of: Recipe) -> Shape:
    found = shape_of(of.model)
    assert found
    return found


@given(st.integers(0, 10**9), st.floats(1e-6, 1e3), st.fractions(0, 10**6), st.floats(1e-6, 1e6))
def test_a_limit_is_reached_when_all_of_it_is_used(held_ms: int, hours: float, usd: Fraction, most: float) -> None:
    spent = Spent(held_ms=held_ms, known_usd=usd)
    both = LimitsConfig(hours=hours, usd=most)
    is_over = held_ms / MS_PER_HOUR >= hours or usd >= Fraction(most)
    assert (limits.reached(both, spent) is not None) == is_over
    used = limits.share(both, spent)
    assert used is not None
    assert used == pytest.approx(max(held_ms / MS_PER_HOUR / hours, float(usd) / most))
    assert limits.reached(LimitsConfig(), spent) is None
    assert limits.share(LimitsConfig(), spent) is None


def test_a_limit_in_money_needs_a_price_and_says_where_to_write_it() -> None:
    limits.check(recipe("limits.usd=50"))
    limits.check(recipe("limits.hours=1", "cluster=cpu"))
    with pytest.raises(ConfigError, match=r"cluster\.prices\.cpu: has no price.*configs/clusters/cpu\.yaml") as caught:
        limits.check(recipe("limits.usd=50", "cluster=cpu"))
    assert exit_code(caught.value) == 2
    limits.check(recipe("limits.usd=50", "cluster=cpu", "cluster.prices.cpu=0.04"))
    with pytest.raises(ConfigError, match=r"prices\.gpu: has(.|\n)*prices\.cpu: has"):
        limits.check(recipe("limits.usd=50", "cluster=aws"))


def test_a_plan_above_a_limit_is_refused_at_its_lowest_estimate() -> None:
    plain = recipe()
    cost = Survey.of(plain, shape(plain), Path(), Gate.here()).cost
    assert cost.hours
    assert cost.usd
    for key, low in (("limits.hours", cost.hours.low), ("limits.usd", cost.usd.low)):
        allowed, refused = recipe(f"{key}={low * 1.001}"), recipe(f"{key}={low * 0.999}")
        limits.check_plan(allowed, shape(allowed), Path())
        with pytest.raises(PlanError, match=f"at least.* and {key} is") as caught:
            limits.check_plan(refused, shape(refused), Path())
        assert exit_code(caught.value) == 2
    elastic = recipe(f"limits.hours={cost.hours.low * 0.6}", "train.workers=[4,8]")
    limits.check_plan(elastic, shape(elastic), Path())  # on eight it could be done


def test_a_plan_counts_with_the_clusters_own_prices() -> None:
    plain, own, spot = (
        Survey.of(each, shape(each), Path(), Gate.here()).cost
        for each in (
            recipe(),
            recipe("cluster.prices.gpu=10"),
            recipe("cluster.prices={gpu: 10, gpu_spot: 2.5}"),
        )
    )
    for cost, low, high in ((plain, 2.69, 6.88), (own, 10, 10), (spot, 2.5, 10)):
        assert cost.hours
        assert cost.usd
        assert (cost.usd.low, cost.usd.high) == pytest.approx((4 * cost.hours.low * low, 4 * cost.hours.high * high))
    assert "$2.50 to $10.00 an hour (prices of cluster gpu-80gb)" in spot.basis


def test_the_command_prints_the_plan_and_refuses_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(RECIPE), *ON_GPUS, "limits.usd=0.5", "limits.hours=100"]
    with pytest.raises(PlanError, match=r"the run costs \$[\d.]+ at least, and limits\.usd is 0\.5"):
        app(arguments, standalone_mode=False)
    printed = capsys.readouterr().out
    assert "limits                100 hours in which workers are held" in printed
    assert "$0.50, counted at $6.88 an hour of a GPU (h100-80gb: AWS p5.48xlarge" in printed
    with pytest.raises(PlanError):
        app([*arguments, "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)["limits"]
    assert (told["hours"], told["usd"], len(told["refused"])) == (100.0, 0.5, 1)


def test_submit_and_train_take_limits_as_the_overrides_that_they_are() -> None:
    given = limits.overrides(max_hours=8.0, max_cost=1e-05)
    assert recipe(*given).limits == LimitsConfig(hours=8, usd=1e-05)
    assert limits.overrides(None, None) == []
    with pytest.raises(PlanError, match=r"limits\.usd is 0\.25"):
        app(["submit", str(RECIPE), *ON_GPUS, "--max-cost", "0.25"], standalone_mode=False)
    with pytest.raises(PlanError, match=r"limits\.hours is 0\.01"):
        app(["train", str(RECIPE), *ON_GPUS, "--max-hours", "0.01"], standalone_mode=False)


def test_a_run_with_nothing_left_goes_on_only_with_more() -> None:
    spent = Spent(held_ms=2 * MS_PER_HOUR)
    said = r"limits\.hours 2 is reached.*`luthier jobs resume r limits\.hours=… --store …`"
    with pytest.raises(InputError, match=said) as caught:
        limits.check_left("r", LimitsConfig(hours=2), spent)
    assert exit_code(caught.value) == 2
    limits.check_left("r", LimitsConfig(hours=2.01), spent)
    unpriced = Spent(held_ms=1, cpu_ms=Fraction(1), unpriced_cpu_ms=Fraction(1))
    limits.check_left("r", LimitsConfig(hours=1), unpriced)
    with pytest.raises(InputError, match=r"had no price.*by limits\.hours"):
        limits.check_left("r", LimitsConfig(usd=1000), unpriced)
    assert {"limits.hours", "limits.usd"} <= set(RESUMABLE)


@pytest.mark.parametrize("wrong", ["limits.hours=0", "limits.usd=-1", "limits.hors=1", "project=Not A Name"])
def test_what_no_limit_or_project_can_be_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.partition("=")[0].partition(".")[0]):
        recipe(wrong)
