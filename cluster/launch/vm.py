"""A cluster-launcher file (`ray up`) as far as all providers of machines share it.

Every key is written out, also the empty ones, because what is left out comes from Ray's own defaults: in Ray 2.60
those open the dashboard to the network and install a nightly Ray. Only the provider, the node types, and the way to
the machines differ from cloud to cloud.
"""

from typing import Any

from cluster import env
from cluster.launch.release import Release
from cluster.launch.spec import Access, Aws, Azure, Gcp, Labels, MachineGroup, OnPremises

Launcher = dict[str, Any]
"""A cluster-launcher file, before it is written as YAML."""

HEAD_TYPE = "head"
FOLDER = "~/luthier-cluster"
"""On every node: `token`, mode 0600, and `environment` where one is given. Copied over SSH, named nowhere by value."""

LOCAL_FOLDER = "~/.luthier/clusters/{name}"
"""The same on this machine. Outside of the checkout, so that nothing ships it with a job."""

_ULIMIT = 65536


def launcher(
    name: str, provider: Aws | Gcp | Azure, where: dict[str, Any], nodes: Launcher, release: Release
) -> Launcher:
    """A file for machines of a cloud, which all run the image.

    Args:
        name: of the cluster.
        where: Ray's `provider` section.
        nodes: `auth` and `available_node_types`.
    """
    run_options = [
        *(f"--ulimit nofile={_ULIMIT}:{_ULIMIT}", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
        f"--env={env.LUTHIER_IMAGE}={provider.image}",
    ]
    return {
        "cluster_name": name,
        "max_workers": sum(group.max for group in provider.groups.values()),
        "idle_timeout_minutes": provider.idle_minutes,
        "provider": where,
        **nodes,
        "head_node_type": HEAD_TYPE,
        "docker": {
            "image": provider.image,
            "container_name": "luthier",
            "pull_before_run": True,
            "run_options": run_options,
        },
        "initialization_commands": list(provider.prepare),
        "setup_commands": [f"python -c '{release.check}'"],
        **start(name, provider),
    }


def start(
    name: str, provider: Aws | Gcp | Azure | OnPremises, bin_folder: str = "", labels: Labels | None = None
) -> Launcher:
    """The keys that start Ray, and what it is started with. `labels` are those of workers without a node type."""
    ray = f"{bin_folder}ray"
    first = f"{environment(provider.usage_stats)} ulimit -n {_ULIMIT};"
    autoscaler = f"export RAY_enable_autoscaler_v2={int(not isinstance(provider, OnPremises))};"
    ports = "--object-manager-port=8076"
    spot = not isinstance(provider, OnPremises) and any(each.market == "spot" for each in provider.groups.values())
    marked = f" --labels={','.join(f'{key}={value}' for key, value in labels.items())}" if labels else ""
    return {
        "upscaling_speed": 1.0,
        "file_mounts": {FOLDER: LOCAL_FOLDER.format(name=name)},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            f"{ray} stop",
            f"{first} {autoscaler} {ray} start --head --port=6379 {ports} --dashboard-host=127.0.0.1 "
            "--num-cpus=0 --num-gpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml",
            *([f"{first} {_beside('market', '--config=$HOME/ray_bootstrap_config.yaml --gcs=localhost:6379')}"] * spot),
        ],
        "worker_start_ray_commands": [
            f"{ray} stop",
            f"{first} {ray} start --address=$RAY_HEAD_IP:6379 {ports}{marked}",
            *([f"{first} {_beside('spot', f'{provider.kind} --gcs=$RAY_HEAD_IP:6379')}"] * spot),
        ],
    }


def _beside(module: str, options: str) -> str:
    """Shell words that start one of our watchers beside Ray, in place of one that is still there."""
    command, log = f"python -m cluster.{module}", f"$HOME/luthier-{module}.log"
    return f"pkill -f '^{command} '; setsid nohup {command} {options} > {log} 2>&1 < /dev/null &"


def environment(usage_stats: bool) -> str:
    """Shell words that a node's Ray, and whoever speaks to it there, begins with."""
    statistics = int(usage_stats)
    return (
        f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={FOLDER}/token RAY_USAGE_STATS_ENABLED={statistics}; "
        f"if [ -f {FOLDER}/environment ]; then set -a; . {FOLDER}/environment; set +a; fi;"
    )


def head_type(node_config: dict[str, Any]) -> Launcher:
    """The head's node type: no work on it."""
    return {"node_config": node_config, "resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0}


def worker_type(group: MachineGroup, node_config: dict[str, Any]) -> Launcher:
    """A group's node type."""
    node_type = {
        "node_config": node_config,
        "resources": {"CPU": group.cpus, **({"GPU": group.gpus} if group.gpus else {})},
        "labels": group.node_labels,
        "min_workers": group.min,
        "max_workers": group.max,
        "priority": group.priority,
    }
    return node_type | ({"docker": {"worker_run_options": ["--gpus=all"]}} if group.gpus else {})


def auth(access: Access, tunnel: str | None = None) -> Launcher:
    """Ray's `auth` section. `tunnel` is the cloud's own: a command that reaches a machine by its id (%h)."""
    keys = {"ssh_user": access.user, "ssh_private_key": access.private_key}
    match access.via:
        case "cloud":
            return keys | {"ssh_proxy_command": tunnel, "ssh_proxy_use_node_id": True}
        case "direct":
            return keys
        case jump:
            return keys | {"ssh_proxy_command": f"ssh -W %h:%p {jump}"}
