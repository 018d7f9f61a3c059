"""Every cluster that ships is closed by default, and what would open it is refused."""

import copy
import json
import re

import pytest

from cluster.errors import ConfigError
from cluster.launch.release import Release
from cluster.launch.spec import MARKET
from tests.cluster.shipped import (
    CLOUDS,
    LAUNCHED,
    PODS,
    cluster,
    launcher,
    made,
    manifests,
    nodes,
)

DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


@pytest.mark.parametrize(
    ("sdk", "module", "parent"),
    [
        ("googleapiclient", "cluster.launch.gcp_provider", "GCPNodeProvider"),
        ("azure.mgmt.compute", "cluster.launch.azure_provider", "AzureNodeProvider"),
    ],
)
def test_our_providers_are_rays_without_its_wide_rights(sdk: str, module: str, parent: str) -> None:
    """Where the cloud's SDK is installed; without it Ray's own module cannot be imported."""
    pytest.importorskip(sdk)
    provider = pytest.importorskip(module).Provider
    assert parent in {base.__name__ for base in provider.__mro__}
    file = launcher("gcp")
    assert provider.bootstrap_config(copy.deepcopy(file)) == file


@pytest.mark.parametrize("name", [*LAUNCHED, *PODS])
def test_nothing_is_open(name: str) -> None:
    for file, text in made(name).items():
        assert "0.0.0.0/0" not in text, file
        assert "::/0" not in text, file
        for image in re.findall(r"(?:image:|FROM) (\S+)", text):
            assert DIGEST.search(image), f"{file}: {image} can change under the cluster"


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_starts_closed_on_machines(name: str) -> None:
    ours = launcher(name)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = (command for command in ours[key] if "ray start " in command)
        assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/luthier-cluster/token" in start
        assert "RAY_USAGE_STATS_ENABLED=0" in start
        assert "0.0.0.0" not in start
    (head,) = (command for command in ours["head_start_ray_commands"] if "ray start " in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0 --num-gpus=0" in head
    assert ours["file_mounts"]["~/luthier-cluster"] == f"~/.luthier/clusters/{name}"
    if name in CLOUDS:
        assert ours["provider"]["use_internal_ips"] is True
        assert ours["available_node_types"]["head"]["resources"] == {"CPU": 0}
        assert "accessConfigs" not in str(ours)  # a public address, on Google Cloud
        assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(ours["docker"]["run_options"])


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_nodes_are_watched_where_the_cloud_tells_it(name: str) -> None:
    ours = launcher(name)
    groups = ours["available_node_types"].values()
    assert any(group.get("labels", {}).get(MARKET) == "spot" for group in groups)
    assert f"python -m cluster.spot {name} --gcs=$RAY_HEAD_IP:6379" in ours["worker_start_ray_commands"][-1]
    market = ours["head_start_ray_commands"][-1]
    assert "python -m cluster.market --config=$HOME/ray_bootstrap_config.yaml --gcs=localhost:6379" in market
    assert "export RAY_AUTH_MODE=token" in market


def test_the_heads_rights_end_at_its_own_cluster() -> None:
    policy = json.loads(made("aws")["iam-head.json"])
    for statement in policy["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions)
        nothing_narrower = all(action.startswith(("ec2:Describe", "ssm")) for action in actions)
        assert nothing_narrower or statement["Resource"] != "*"
        if "ec2:TerminateInstances" in actions:
            assert statement["Condition"]["StringEquals"]["aws:ResourceTag/ray-cluster-name"] == "aws"
    machines = launcher("aws")["available_node_types"]
    assert {machine["node_config"]["IamInstanceProfile"]["Name"] for machine in machines.values()} == {
        "luthier-head",
        "luthier-worker",
    }


@pytest.mark.parametrize("name", PODS)
def test_pods_start_closed(name: str) -> None:
    specs = {
        "RayCluster": lambda spec: spec,
        "RayJob": lambda spec: spec["rayClusterSpec"],
        "RayService": lambda spec: spec["rayClusterConfig"],
    }
    for manifest in manifests(name):
        for key in ("hostNetwork", "hostPath", "privileged", "hostPID", "LoadBalancer", "NodePort"):
            assert key not in str(manifest)
        for path, value in nodes(manifest):
            if path[-1:] == ("containers",):
                for container in value:
                    assert container["securityContext"]["allowPrivilegeEscalation"] is False
                    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                    assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
                    assert {"name": "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "value": "1"} in container["env"]
        if manifest["kind"] in specs:
            spec = specs[manifest["kind"]](manifest["spec"])
            assert spec["authOptions"] == {"mode": "token"}
            assert spec["rayVersion"] == Release.read().ray
            start = spec["headGroupSpec"]["rayStartParams"]
            assert start["num-cpus"] == "0"
            # In a RayJob and a RayService the operator itself speaks to the dashboard.
            assert start["dashboard-host"] == ("127.0.0.1" if manifest["kind"] == "RayCluster" else "0.0.0.0")
            assert all(
                group["template"]["spec"]["automountServiceAccountToken"] is False for group in spec["workerGroupSpecs"]
            )
            labelled = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
            assert all(group["template"]["metadata"]["labels"]["luthier.io/cluster"] == name for group in labelled)
    policy = next(manifest for manifest in manifests(name) if manifest["kind"] == "NetworkPolicy")["spec"]
    assert policy["podSelector"] == {"matchLabels": {"luthier.io/cluster": name}}
    dashboards = [rule for rule in policy["ingress"] if {"protocol": "TCP", "port": 8265} in rule.get("ports", ())]
    assert [list(peer) for rule in dashboards for peer in rule["from"]] == [["namespaceSelector"]]


@pytest.mark.parametrize("name", [*LAUNCHED, *PODS])
def test_statistics_are_sent_only_when_asked(name: str) -> None:
    texts = "".join(made(name, "provider.usage_stats=true").values())
    assert "RAY_USAGE_STATS_ENABLED=1" in texts or "'1'" in texts


def test_the_stores_secret_is_named_and_only_where_work_is_done() -> None:
    for manifest in manifests(PODS[0]):
        for path, value in nodes(manifest):
            if path[-1:] == ("containers",):
                for container in value:
                    expected = [] if "submitter" in container["name"] else [{"secretRef": {"name": "luthier-store"}}]
                    assert container.get("envFrom", []) == expected


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("aws", ["provider.image=rayproject/ray:2.60.0"], "'rayproject/ray:2.60.0' is not pinned"),
        ("kubernetes", ["provider.image=luthier:latest"], "is not pinned"),
        ("aws", ["provider.base_image=python:3.11"], "is not pinned"),
        ("aws", ["provider.regoin=x"], "did you mean 'region'?"),
        ("aws", ["provider.groups.cpu.machine=x"], "provider.groups.cpu.machine: unknown key"),
        ("aws", ["provider.security_groups=[]"], "provider.security_groups"),
        ("aws", ["provider.ami=latest_dlami"], "provider.ami"),
        ("aws", ["provider.groups.cpu.min=9"], "min 9 is more than max 4"),
        ("aws", ["provider.groups.cpu.gpus=1"], "gpus and gpu go together"),
        ("aws", ["provider.groups.cpu.labels={ray.io/market-type: spot}"], "are set from market and gpu"),
        ("aws", ["provider.groups.cpu.labels={team: 'a b'}"], "is not a Kubernetes label"),
        ("aws", ["name=../aws"], "'../aws': use at most 40 small letters"),
        ("aws", ["provider.groups.head={type: x, max: 1, cpus: 1}"], "give the group another name"),
        ("on-premises", ["provider.labels={rack: 'a;reboot'}"], "is not a Kubernetes label"),
        ("on-premises", ["provider.venv=/x; reboot"], "provider.venv"),
        ("on-premises", ["provider.access.via=-oProxyCommand=reboot@x"], "provider.access.via"),
        ("on-premises", ["provider.workers=['1.2.3.4; reboot']"], "provider.workers"),
        ("aws", ["cpus_per_worker=500"], "no group has a node for one worker of 500 CPUs and a GPU"),
        ("aws", ["autoscales=false"], "autoscales: write `true`"),
        ("gcp", ["provider.disk_image=projects/x/global/images/family/common-gpu"], "provider.disk_image"),
        ("azure", ["provider.access.via=cloud"], "Azure has no tunnel"),
        ("on-premises", ["provider.workers=[10.0.0.10]"], "each address stands once"),
        ("kubernetes", ["provider.groups.h100-spot.node_selector={}"], "which nodes those are"),
        ("kubernetes", ["provider.groups.Big={max: 1, cpus: 1, memory_gb: 1}"], "small letters"),
        ("kubernetes", ["provider.kind=nomad"], "provider"),
    ],
)
def test_what_would_be_open_or_never_run_is_refused(name: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cluster(name, *overrides)
    assert said in str(caught.value)
