"""The queue of a shared cluster as the real actor: several jobs ask at once, and one is in at a time."""

import json
from itertools import pairwise

from cluster.nodes import LocalCluster
from tests.e2e.submit import said


def test_jobs_that_need_the_whole_cluster_run_one_after_another(ray_cluster: LocalCluster) -> None:
    found = json.loads(said(ray_cluster, "tests.e2e.turns").splitlines()[-1])
    spans = found["spans"]
    order = sorted(spans, key=lambda name: spans[name][0])
    assert sorted(order) == ["ann-0", "ann-1", "bob-0", "bob-1"]
    assert all(spans[one][1] <= spans[other][0] for one, other in pairwise(order))
    assert any("it is next, and its 4 workers fit when one of these ends: holds" in text for text in found["said"])
