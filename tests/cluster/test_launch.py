"""Every cluster that ships gives files that Ray, KubeRay and the clouds take, and their checks find what is spoilt."""

import copy
import json
import re
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
from cluster.launch.files import CONTAINER, JOB, LAUNCHER, SERVICE
from jobs.config import Recipe
from tests.cluster.kuberay.checker import faults
from tests.cluster.shipped import (
    CLOUDS,
    LAUNCHED,
    PODS,
    ROOT,
    STORE,
    cluster,
    launcher,
    made,
    manifests,
    nodes,
    put,
)


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
        config = prepare_config(launcher(name, f"provider.access.private_key={key}"))
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


def test_a_rayjob_trains_the_recipe_that_it_names() -> None:
    job = yaml.safe_load(made(PODS[0])[JOB])["spec"]
    python, module, command, recipe, *overrides = job["entrypoint"].split()
    assert (python, module, command) == ("python", "-m", "jobs.train")
    loaded = load(ROOT / recipe, Recipe, overrides)
    assert (loaded.cluster.name, loaded.store) == (PODS[0], STORE)
    assert job["entrypointNumCpus"] > 0, "the head has no CPUs, so the driver would never start on it"


def test_a_service_is_one_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = yaml.safe_load(made(PODS[0])[SERVICE])["spec"]["serveConfigV2"]
    serve = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert [application.name for application in serve.applications] == ["qwen3-8b"]
