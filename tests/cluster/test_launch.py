"""Every cluster that ships gives files that Ray and KubeRay take, and that are closed by default."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import ray.autoscaler._private._azure as ray_azure
import yaml
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from cluster.config import load
from cluster.errors import ConfigError
from cluster.launch.files import CONTAINER, JOB, LAUNCHER, SERVICE, make_files
from cluster.launch.release import Release
from cluster.launch.spec import Kubernetes
from cluster.place import ClusterConfig
from jobs.config import Recipe
from tests.cluster.kuberay.checker import faults

ROOT = Path(__file__).parents[2]
RECIPE = "configs/recipes/support.yaml"
SERVING = "configs/serving/qwen3-8b.yaml"
STORE = "s3://bucket/prefix"
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


def shipped(*kinds: str) -> list[str]:
    """Names of the clusters that are made with one of these providers, or any."""
    found = []
    for path in sorted((ROOT / "configs" / "clusters").glob("*.yaml")):
        provider = yaml.safe_load(path.read_text()).get("provider")
        if provider and provider["kind"] in (kinds or (provider["kind"],)):
            found.append(path.stem)
    return found


CLOUDS = shipped("aws", "gcp", "azure")
LAUNCHED = [*CLOUDS, *shipped("ssh")]
PODS = shipped("kubernetes")


def cluster(name: str, *overrides: str) -> ClusterConfig:
    return load(ROOT / "configs" / "clusters" / f"{name}.yaml", ClusterConfig, overrides)


def made(name: str, *overrides: str) -> dict[str, str]:
    config = cluster(name, *overrides)
    if isinstance(config.provider, Kubernetes):
        return make_files(config, Release.read(), recipe=RECIPE, serving=SERVING, store=STORE)
    return make_files(config, Release.read())


def launcher(name: str, *overrides: str) -> dict[str, Any]:
    return yaml.safe_load(made(name, *overrides)[LAUNCHER])


def manifests(name: str, *overrides: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for file, text in made(name, *overrides).items() if file.endswith(".yaml")]


def nodes(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value in a document, with its path."""
    yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from nodes(item, (*path, key))


def put(document: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at a path."""
    changed = copy.deepcopy(document)
    at: Any = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


def test_all_providers_are_shipped() -> None:
    assert set(CLOUDS) == {"aws", "gcp", "azure"}
    assert LAUNCHED[3:]
    assert PODS


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_launcher_file_and_adds_nothing_of_its_own(name: str) -> None:
    ours = launcher(name)
    prepared = prepare_config(copy.deepcopy(ours))
    validate_config(prepared)
    own_types = {"available_node_types", "head_node_type", "min_workers"}  # which Ray makes for machines over SSH
    merged = {"head_setup_commands", "worker_setup_commands"}
    assert prepared.keys() - own_types == ours.keys() - own_types
    assert all(prepared[key] == ours[key] for key in ours.keys() - own_types - merged)
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == ours["setup_commands"]
    if name in CLOUDS:
        assert prepared["available_node_types"] == ours["available_node_types"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dashboard_host",), "127.0.0.1"),
        (("max_workers",), "many"),
        (("max_workers",), -1),
        (("head_node_type",), "no such type"),
        (("docker", "imagee"), "x"),
        (("auth", "ssh_key"), "x"),
        (("available_node_types", "head", "max"), 1),
        (("available_node_types", "head", "resources"), {"CPU": "0"}),
        (("available_node_types", "cpu", "labels"), {"a": 1}),
        (("head_start_ray_commands",), "ray start"),
        (("provider", "security_group"), {"Open": True}),
    ],
)
def test_a_spoilt_launcher_file_is_found(path: tuple[str | int, ...], value: Any) -> None:
    with pytest.raises((ValidationError, ValueError)):
        validate_config(prepare_config(put(launcher("aws"), path, value)))


@pytest.mark.parametrize("name", PODS)
def test_kuberay_takes_the_manifests(name: str) -> None:
    made_kinds = {manifest["kind"] for manifest in manifests(name)}
    assert made_kinds == {"RayCluster", "RayJob", "RayService", "NetworkPolicy"}
    for manifest in manifests(name):
        assert faults(manifest) == []


@pytest.mark.parametrize("name", PODS)
def test_every_spoilt_place_of_a_manifest_is_found(name: str) -> None:
    """An unknown key in any mapping, a mapping in place of any value: the checker is closed everywhere."""
    for manifest in manifests(name):
        spoilt = [
            put(manifest, (*path, "unknown") if isinstance(value, dict) else path, {"a": 1})
            for path, value in nodes(manifest)
        ]
        assert len(spoilt) > 20
        assert [changed for changed in spoilt if not faults(changed)] == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "said"),
    [
        ("RayCluster", ("spec", "managedBy"), "somebody", "must be either"),
        ("RayService", ("spec", "rayClusterConfig", "managedBy"), "somebody", "must be either"),
        ("RayJob", ("spec", "deletionStrategy"), {"onSuccess": {"policy": "DeleteSelf"}}, "requires either BOTH"),
        ("RayJob", ("spec", "deletionStrategy"),
         {"deletionRules": [{"policy": "DeleteSelf", "condition": {}}]}, "requires either the JobStatus"),
        ("RayCluster", ("spec", "authOptions", "mode"), "none", "is not one of"),
        ("RayCluster", ("metadata", "name"), "Upper_case", "does not match"),
    ],
)  # fmt: skip
def test_kuberays_rules_are_applied(kind: str, path: tuple[str | int, ...], value: Any, said: str) -> None:
    manifest = next(each for each in manifests(PODS[0]) if each["kind"] == kind)
    assert any(said in fault for fault in faults(put(manifest, path, value)))


def test_ec2_takes_every_machine() -> None:
    """Against the service's own description of RunInstances."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node_type in launcher("aws")["available_node_types"].values():
        config = dict(node_type["node_config"])
        assert config.pop("SubnetIds")  # Ray's own key: it tries each
        report = ParamValidator().validate(config | {"MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), report.generate_report()


def test_rays_template_takes_every_azure_machine() -> None:
    """Ray passes our parameters to its template as they are, and fails on one that it does not know."""
    template = json.loads((Path(ray_azure.__file__).parent / "azure-vm-template.json").read_text())["parameters"]
    of_rays_own = {"vmName", "vmTags", "vmCount", "msi", "nsg", "subnet", "provisionPublicIp", "zones"}
    types = {"string": str, "securestring": str, "int": int, "object": dict, "bool": bool}
    for node_type in launcher("azure")["available_node_types"].values():
        given = node_type["node_config"]["azure_arm_parameters"]
        for key, value in given.items():
            assert isinstance(value, types[template[key]["type"]]), key
        assert {key for key, entry in template.items() if "defaultValue" not in entry} <= given.keys() | of_rays_own


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
        start = ours[key][-1]
        assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/luthier-cluster/token" in start
        assert "RAY_USAGE_STATS_ENABLED=0" in start
        assert "0.0.0.0" not in start
    head = ours["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0 --num-gpus=0" in head
    assert ours["file_mounts"]["~/luthier-cluster"] == f"~/.luthier/clusters/{name}"
    if name in CLOUDS:
        assert ours["provider"]["use_internal_ips"] is True
        assert ours["available_node_types"]["head"]["resources"] == {"CPU": 0}
        assert "accessConfigs" not in str(ours)  # a public address, on Google Cloud
        assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(ours["docker"]["run_options"])


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


def test_nodes_get_the_versions_of_the_lock_file() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert pinned
    for name in CLOUDS:
        texts = made(name)
        assert f"Ray {pinned[1]}, Python" in texts[LAUNCHER]
        assert "--constraint requirements.lock" in texts[CONTAINER]
        assert "USER 1000" in texts[CONTAINER]
    over_ssh = launcher(LAUNCHED[-1])
    assert any("--requirement ~/luthier-requirements.lock" in command for command in over_ssh["setup_commands"])
    assert over_ssh["file_mounts"]["~/luthier-requirements.lock"] == str(ROOT / "requirements.lock")


@pytest.mark.parametrize("name", [*CLOUDS, *PODS])
def test_rays_autoscaler_starts_what_a_job_accepts(name: str, tmp_path: Path) -> None:
    """Ray's own scheduler on our node types: spot first where either will do, and never where it will not."""
    key = tmp_path / "key"
    key.write_text("Ray tells by it whether a machine was started with the same settings")
    if name in PODS:
        manifest = next(each for each in manifests(name) if each["kind"] == "RayCluster")
        config = _derive_autoscaling_config_from_ray_cr(manifest)
    else:
        config = prepare_config(launcher(name, f"provider.ssh.private_key={key}"))
    types = AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()
    groups = cluster(name).provider.groups  # type: ignore[union-attr]
    for node_type in types.values():
        validate_node_label_syntax(node_type.labels)
    gpu = next(group.gpu for group in groups.values() if group.gpus)

    def launched(selector: dict[str, str]) -> list[str]:
        constraints = [(label, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for label, value in selector.items()]
        request = ResourceRequestUtil.make({"GPU": 1, "CPU": 1}, label_selectors=[constraints])
        scheduled = ResourceDemandScheduler(AutoscalerEventLogger(None)).schedule(
            SchedulingRequest(
                node_type_configs=types,
                disable_launch_config_check=False,
                max_num_nodes=9,
                resource_requests=ResourceRequestUtil.group_by_count([request]),
            )
        )
        return [groups[launch.instance_type].market for launch in scheduled.to_launch]

    assert launched({}) == ["spot"]
    assert launched({"ray.io/market-type": "spot"}) == ["spot"]
    assert launched({"ray.io/market-type": "on-demand", "ray.io/accelerator-type": gpu}) == ["on-demand"]
    assert launched({"ray.io/accelerator-type": "none such"}) == []


def test_the_stores_secret_is_named_and_only_where_work_is_done() -> None:
    for manifest in manifests(PODS[0]):
        for path, value in nodes(manifest):
            if path[-1:] == ("containers",):
                for container in value:
                    expected = [] if "submitter" in container["name"] else [{"secretRef": {"name": "luthier-store"}}]
                    assert container.get("envFrom", []) == expected


def test_a_rayjob_trains_the_recipe_that_it_names() -> None:
    job = yaml.safe_load(made(PODS[0])[JOB])["spec"]
    python, module, command, recipe, *overrides = job["entrypoint"].split()
    assert (python, module, command) == ("python", "-m", "jobs.train")
    loaded = load(ROOT / recipe, Recipe, overrides)
    assert (loaded.cluster.name, loaded.store) == (PODS[0], STORE)
    assert job["entrypointNumCpus"] > 0, "the head has no CPUs, so the driver would never start on it"


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
        ("aws", ["cpus_per_worker=500"], "no group has a node for one worker of 500 CPUs and a GPU"),
        ("aws", ["autoscales=false"], "autoscales: write `true`"),
        ("gcp", ["provider.disk_image=projects/x/global/images/family/common-gpu"], "provider.disk_image"),
        ("azure", ["provider.ssh.via=cloud"], "Azure has no tunnel"),
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


def test_a_service_is_one_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = yaml.safe_load(made(PODS[0])[SERVICE])["spec"]["serveConfigV2"]
    serve = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert [application.name for application in serve.applications] == ["qwen3-8b"]
