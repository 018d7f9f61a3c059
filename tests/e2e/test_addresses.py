"""Ray on three machines with addresses of their own, behind a firewall that lets a laptop through to the dashboard.

The machines are namespaces (tests/machines.py), and the scene is addresses.py. On each of them its name resolves to
127.0.1.1, as Debian writes it, so that what finds others by their names fails here as it does there.
"""

import json
from pathlib import Path

import pytest

from tests.e2e.addresses import DASHBOARD, GCS, HEAD, WORKERS
from tests.machines import isolated

pytestmark = pytest.mark.long


def test_a_job_is_submitted_through_one_port_and_trains_on_two_addresses(tmp_path: Path) -> None:
    seen, complaints = isolated("tests.e2e.addresses", tmp_path, "ss", timeout_s=500)
    said = json.dumps(seen, indent=1) + complaints
    assert seen["addresses"] == [HEAD, *WORKERS], said
    assert [HEAD, GCS] in seen["listening"], said
    assert {address for address, _ in seen["listening"]} >= {HEAD, *WORKERS}, said
    assert seen["open to a worker"] == seen["listening"], "they are open, but not to everybody"
    assert seen["open to the laptop"] == [[HEAD, DASHBOARD]], said
    names, elsewhere = seen["seen of the laptop"]
    assert "addresses.yaml" in names, said
    assert elsewhere == "", "what the job reads has been sent along"
    for submit in ("no token", "wrong token"):
        code, output = seen[submit]
        assert code == 2, said
        assert "refuses the token" in output, said
        assert "Traceback" not in output, said
    assert seen["trained"][0] == 0, said
    assert seen["last"]["state"] == "succeeded", said
    assert (seen["last"]["step"], seen["last"]["adapter"]) == (8, "addresses@1"), said
    assert seen["ranks"] in [dict(zip(order, "01", strict=True)) for order in (WORKERS, WORKERS[::-1])], said
    assert seen["driver"] in WORKERS, "the head computes nothing"
    assert seen["world sizes"] == [2] * 8, said
    assert not any(event.startswith("failure") for event in seen["events"]), said
    assert seen["adapter"] is True, said
