"""Machines that are there, over SSH: a cluster-launcher file of Ray's `local` provider.

They run no container: a virtual environment at `venv`, made from `requirements.lock` where it is not there yet (it may
lie on a shared disk). Ray sees their CPUs and GPUs by itself, and takes no node types for them.

The autoscaler that starts the workers is Ray's v1: v2 (of 2.60) never learns that the head is there, gives it up as
lost, and starts nothing (v1 alone calls `record_local_head_state_if_needed`).
"""

from cluster.launch.release import Release
from cluster.launch.spec import MARKET, OnPremises
from cluster.launch.vm import Launcher, auth, start

_LOCK = "~/luthier-requirements.lock"


def launcher_file(name: str, provider: OnPremises, release: Release) -> Launcher:
    """What `ray up` reads."""
    venv = provider.venv.rstrip("/")
    python = f"{venv}/bin/python"
    started = start(name, provider, f"{venv}/bin/", {MARKET: "on-demand", **provider.labels})
    started["file_mounts"][_LOCK] = str(release.lock)
    return {
        "cluster_name": name,
        "max_workers": len(provider.workers),
        "min_workers": len(provider.workers),
        "idle_timeout_minutes": 5.0,  # written like everything else; no worker is above the minimum
        "provider": {"type": "local", "head_ip": provider.head, "worker_ips": list(provider.workers)},
        "auth": auth(provider.access),
        "docker": {},
        "initialization_commands": [],
        "setup_commands": [
            f"[ -x {python} ] || python{release.python} -m venv {venv}",
            f"[ -x {venv}/bin/ray ] || {python} -m pip install --quiet --requirement {_LOCK}",
            f"{python} -c '{release.check}'",
        ],
        **started,
    }
