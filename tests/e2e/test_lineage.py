"""What came of real runs can be answered for: done again with the same losses, and traced to the end."""

import json

from cluster import registry
from cluster.nodes import LocalCluster
from jobs import runs
from tests.e2e.conftest import Pair
from tests.e2e.submit import said


def test_a_published_adapter_is_reproduced(pair: Pair, ray_cluster: LocalCluster) -> None:
    store = pair.store
    before = registry.names(store), registry.alias_state(store, "pair-one")
    printed = said(ray_cluster, "jobs", "reproduce", "pair-one@1", "--store", store.url)
    line = json.loads(printed.splitlines()[-1])
    assert line["reproduces"] == pair.one["run_id"]
    assert (line["state"], line["steps_compared"], line["is_reproduced"], line["adapter"]) == (
        "succeeded",
        48,
        True,
        None,
    )
    assert line["largest_difference"] <= 1e-4
    losses = [step["loss"] for step in runs.read_steps(store, line["run_id"])]
    assert max(abs(one - other) for one, other in zip(losses, pair.losses(pair.one), strict=True)) <= 1e-4
    ours, theirs = (runs.find(store, run_id).record for run_id in (line["run_id"], pair.one["run_id"]))
    assert ours.reproduces == theirs.run_id
    assert (ours.dataset, ours.base, ours.sources) == (theirs.dataset, theirs.base, theirs.sources)
    assert (registry.names(store), registry.alias_state(store, "pair-one")) == before, "nothing was published"
